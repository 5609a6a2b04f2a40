package options

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

// portMap is the options of ProgramExternalConnectivity with these entries.
func portMap(t *testing.T, entries string) map[string]any {
	t.Helper()
	var list []any
	assert.NilError(t, json.Unmarshal([]byte(entries), &list))
	return map[string]any{keyPortMap: list, keyExposedPorts: []any{}}
}

func TestParsePorts(t *testing.T) {
	addr := netip.MustParseAddr
	for _, tc := range []struct {
		name, entries string
		want          []PortRequest
	}{
		{"none", `[]`, nil},
		{"fixed, range and ephemeral, in the order to choose them in", `[
			{"Proto":6,"IP":"","Port":90,"HostIP":"","HostPort":0,"HostPortEnd":0},
			{"Proto":17,"IP":"","Port":81,"HostIP":"","HostPort":8000,"HostPortEnd":8002},
			{"Proto":6,"IP":"","Port":80,"HostIP":"127.0.0.1","HostPort":8080,"HostPortEnd":8080}]`, []PortRequest{
			{TCP, addr("127.0.0.1"), 8080, 8080, 80}, {UDP, netip.Addr{}, 8000, 8002, 81}, {TCP, netip.Addr{}, 0, 0, 90},
		}},
		{"little said", `[{"Proto":132,"Port":1,"HostPort":65535}]`, []PortRequest{{SCTP, netip.Addr{}, 65535, 65535, 1}}},
		{"members of engines to come", `[{"Proto":6,"Port":1,"HostPort":1,"Shiny":{}}]`, []PortRequest{{TCP, netip.Addr{}, 1, 1, 1}}},
		{"every kind of address", `[
			{"Proto":6,"Port":80,"HostPort":1,"HostIP":"fd00::1"},{"Proto":6,"Port":80,"HostPort":1,"HostIP":"::"},
			{"Proto":6,"Port":80,"HostPort":1,"HostIP":"192.0.2.1"},{"Proto":6,"Port":80,"HostPort":1,"HostIP":"0.0.0.0"},
			{"Proto":6,"Port":80,"HostPort":1,"HostIP":"::ffff:192.0.2.2"},{"Proto":6,"Port":80,"HostPort":1,"HostIP":""}]`, []PortRequest{
			{TCP, netip.Addr{}, 1, 1, 80}, {TCP, addr("0.0.0.0"), 1, 1, 80}, {TCP, addr("192.0.2.1"), 1, 1, 80},
			{TCP, addr("192.0.2.2"), 1, 1, 80}, {TCP, addr("::"), 1, 1, 80}, {TCP, addr("fd00::1"), 1, 1, 80},
		}},
		{"the same thing twice", `[{"Proto":6,"Port":80,"HostPort":1},{"Proto":6,"Port":80,"HostPort":1,"HostPortEnd":1}]`, []PortRequest{{TCP, netip.Addr{}, 1, 1, 80}}},
		{"one host port for each protocol and address", `[
			{"Proto":6,"Port":80,"HostPort":1,"HostIP":"127.0.0.1"},{"Proto":17,"Port":81,"HostPort":1},
			{"Proto":6,"Port":82,"HostPort":1,"HostIP":"127.0.0.2"},{"Proto":6,"Port":83,"HostPort":1,"HostIP":"::"}]`, []PortRequest{
			{TCP, addr("127.0.0.1"), 1, 1, 80}, {TCP, addr("127.0.0.2"), 1, 1, 82}, {TCP, addr("::"), 1, 1, 83}, {UDP, netip.Addr{}, 1, 1, 81},
		}},
		{"ranges share host ports", `[{"Proto":6,"Port":80,"HostPort":1,"HostPortEnd":2},{"Proto":6,"Port":81,"HostPort":1,"HostPortEnd":2},{"Proto":6,"Port":82,"HostPort":1}]`, []PortRequest{
			{TCP, netip.Addr{}, 1, 1, 82}, {TCP, netip.Addr{}, 1, 2, 80}, {TCP, netip.Addr{}, 1, 2, 81},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			opts := portMap(t, tc.entries)
			for range 2 {
				got, no6to4, err := ParsePorts(opts)
				assert.NilError(t, err)
				assert.DeepEqual(t, got, tc.want, compareNetip())
				assert.Assert(t, !no6to4)
				slices.Reverse(opts[keyPortMap].([]any))
			}
		})
	}
	for _, value := range []any{true, "true"} {
		ports, no6to4, err := ParsePorts(map[string]any{keyNoProxy6to4: value, keyPortMap: nil})
		assert.NilError(t, err)
		assert.Assert(t, no6to4 && ports == nil)
	}
	ports, no6to4, err := ParsePorts(map[string]any{keyNoProxy6to4: false})
	assert.NilError(t, err)
	assert.Assert(t, !no6to4 && ports == nil)
}

func TestWrongPortsAreNamed(t *testing.T) {
	for entries, want := range map[string]string{
		`[7]`:                      "published port of unknown form: option com.docker.network.portmap: want a list of objects, got float64",
		`[null]`:                   "want a list of objects, got <nil>",
		`[{}]`:                     "published port any->0/0: Proto 0: want a number from 1 to 255",
		`[{"Proto":1,"Port":80}]`:  "published port any->80/1: Proto 1: want 6 (tcp), 17 (udp) or 132 (sctp)",
		`[{"Proto":"tcp"}]`:        "Proto: want a number from 1 to 255, got string",
		`[{"Proto":262}]`:          "Proto 262: want a number from 1 to 255",
		`[{"Proto":6}]`:            "published port any->0/tcp: Port 0: want a number from 1 to 65535",
		`[{"Proto":6,"Port":1e9}]`: "published port any->1e+09/tcp: Port 1e+09: want a number from 1 to 65535",
		`[{"Proto":6,"Port":8.5}]`: "Port 8.5: want a number from 1 to 65535",
		`[{"Proto":6,"Port":-1}]`:  "Port -1: want a number",
		`[{"Proto":6,"Port":80,"HostPort":65536}]`:                                                                                             "published port 65536->80/tcp: HostPort 65536: want a number from 0 to 65535",
		`[{"Proto":17,"Port":80,"HostPort":[]}]`:                                                                                               "HostPort: want a number from 0 to 65535, got []interface {}",
		`[{"Proto":6,"Port":80,"HostPort":9,"HostPortEnd":8}]`:                                                                                 "published port 9-8->80/tcp: host ports 9-8: want the first one from 1, and the last one no lower",
		`[{"Proto":6,"Port":80,"HostPort":0,"HostPortEnd":8}]`:                                                                                 "host ports 0-8: want the first one from 1",
		`[{"Proto":6,"Port":80,"HostPort":1,"HostPortEnd":70000}]`:                                                                             "HostPortEnd 70000: want a number from 0 to 65535",
		`[{"Proto":6,"Port":80,"HostPort":8080,"HostIP":"fe80::1%lo"}]`:                                                                        `published port [fe80::1]:8080->80/tcp: HostIP "fe80::1%lo": want an IPv4 or IPv6 address of this host without a zone`,
		`[{"Proto":6,"Port":80,"HostPort":8080,"HostIP":"localhost"}]`:                                                                         `published port 8080->80/tcp: HostIP "localhost": want an IPv4 or IPv6 address`,
		`[{"Proto":17,"Port":80,"HostPort":8080,"HostIP":"224.0.0.1"}]`:                                                                        "published port 224.0.0.1:8080->80/udp: HostIP",
		`[{"Proto":6,"Port":80,"HostPort":1,"HostIP":"255.255.255.255"}]`:                                                                      "want an IPv4 or IPv6 address",
		`[{"Proto":6,"Port":80,"HostIP":7}]`:                                                                                                   "HostIP: want an address, got float64",
		`[{"Proto":6,"Port":80,"HostPort":1},{"Proto":6,"Port":81,"HostPort":1}]`:                                                              "published ports 1->80/tcp and 1->81/tcp: port is already allocated: a host port leads to one port of the container",
		`[{"Proto":6,"Port":80,"HostPort":1,"HostIP":"127.0.0.1"},{"Proto":6,"Port":81,"HostPort":1}]`:                                         "published ports 1->81/tcp and 127.0.0.1:1->80/tcp",
		`[{"Proto":6,"Port":80,"HostPort":1,"HostIP":"fd00::1"},{"Proto":6,"Port":81,"HostPort":1,"HostIP":"::"}]`:                             "published ports [::]:1->81/tcp and [fd00::1]:1->80/tcp",
		`[{"Proto":17,"Port":80,"HostPort":1,"HostIP":"::"},{"Proto":17,"Port":81,"HostPort":1}]`:                                              "published ports 1->81/udp and [::]:1->80/udp",
		`[{"Proto":6,"Port":80,"HostPort":1,"HostIP":"::1"},{"Proto":6,"Port":81,"HostPort":1,"HostIP":"::1"}]`:                                "published ports [::1]:1->80/tcp and [::1]:1->81/tcp",
		`[{"Proto":6,"Port":9,"HostPort":1,"HostIP":"0.0.0.0"},{"Proto":6,"Port":8,"HostPort":1,"HostIP":"127.0.0.1"}]`:                        "published ports 0.0.0.0:1->9/tcp and 127.0.0.1:1->8/tcp",
		`[{"Proto":6,"Port":9,"HostPort":1},{"Proto":6,"Port":9,"HostPort":1,"HostIP":"::"},{"Proto":6,"Port":8,"HostPort":1,"HostIP":"::2"}]`: "[::]:1->9/tcp and [::2]:1->8/tcp",
	} {
		_, _, err := ParsePorts(portMap(t, entries))
		assert.ErrorContains(t, err, want)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
	_, _, err := ParsePorts(map[string]any{keyPortMap: "80"})
	assert.Error(t, err, "option com.docker.network.portmap: want a list, got string")
	_, _, err = ParsePorts(map[string]any{keyNoProxy6to4: 1.0})
	assert.ErrorContains(t, err, "option com.docker.network.driver.private.no_proxy_6to4: want true or false, got float64")
}

// All ports of the host, in the worst order, take as long as to sort them.
func TestAllPortsOfTheHost(t *testing.T) {
	var list []any
	for port := 65535; port > 0; port-- {
		for _, proto := range []Proto{TCP, UDP} {
			list = append(list, map[string]any{"Proto": float64(proto), "Port": float64(port), "HostPort": float64(port), "HostPortEnd": float64(port)})
		}
	}
	ports, _, err := ParsePorts(map[string]any{keyPortMap: list})
	assert.NilError(t, err)
	assert.Equal(t, len(ports), 2*65535)
	assert.Equal(t, ports[0], PortRequest{TCP, netip.Addr{}, 1, 1, 1})
	assert.Equal(t, ports[len(ports)-1], PortRequest{UDP, netip.Addr{}, 65535, 65535, 65535})
}

func TestPortsAreShownAsDockerDoes(t *testing.T) {
	for want, port := range map[string]PortRequest{
		"8080->80/tcp":                {TCP, netip.Addr{}, 8080, 8080, 80},
		"any->80/sctp":                {SCTP, netip.Addr{}, 0, 0, 80},
		"[::1]:8000-8010->53/udp":     {UDP, netip.IPv6Loopback(), 8000, 8010, 53},
		"0.0.0.0:any->80/tcp":         {TCP, netip.IPv4Unspecified(), 0, 0, 80},
		"127.0.0.1:65535->1/tcp":      {TCP, netip.MustParseAddr("127.0.0.1"), 65535, 65535, 1},
		"[2001:db8::7]:1-2->8080/tcp": {TCP, netip.MustParseAddr("2001:db8::7"), 1, 2, 8080},
	} {
		assert.Equal(t, port.String(), want)
		entry := map[string]any{
			"Proto": float64(port.Proto), "Port": float64(port.ContainerPort), "HostPort": float64(port.HostPort), "HostPortEnd": float64(port.HostPortEnd),
		}
		if port.HostIP.IsValid() {
			entry["HostIP"] = port.HostIP.String()
		}
		assert.Equal(t, portText(entry), want, "what is wrong is shown in the same way")
	}
}

// What ParsePorts returns can be reserved, says what was asked for, and does not
// depend on the order of the entries.
func FuzzParsePorts(f *testing.F) {
	for _, s := range []string{
		`{"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"127.0.0.1","HostPort":8080,"HostPortEnd":8090},{"Proto":17,"Port":53,"HostIP":"::"}]}`,
		`{"com.docker.network.portmap":[{"Proto":6,"Port":80,"HostPort":1},{"Proto":6,"Port":81,"HostPort":1}],"com.docker.network.driver.private.no_proxy_6to4":true}`,
		`{"com.docker.network.portmap":[null,7,{"Proto":132,"Port":1,"HostIP":"::ffff:1.2.3.4%x"}]}`,
		`{"com.docker.network.portmap":{"a":1},"com.docker.network.driver.private.no_proxy_6to4":"no"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var opts map[string]any
		if json.Unmarshal(body, &opts) != nil {
			return
		}
		ports, _, err := ParsePorts(opts)
		list, _ := opts[keyPortMap].([]any)
		reversed := slices.Clone(list)
		slices.Reverse(reversed)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err) && !strings.ContainsAny(err.Error(), "\n\x00"), "%q", err)
			if list != nil {
				_, _, err := ParsePorts(map[string]any{keyPortMap: reversed, keyNoProxy6to4: opts[keyNoProxy6to4]})
				assert.Assert(t, err != nil)
			}
			return
		}
		again, _, err := ParsePorts(map[string]any{keyPortMap: reversed})
		assert.NilError(t, err)
		assert.DeepEqual(t, ports, again, compareNetip())
		fixed := map[string]uint16{}
		for _, p := range ports {
			assert.Assert(t, p.ContainerPort > 0 && p.HostPortEnd >= p.HostPort && (p.HostPort > 0 || p.HostPortEnd == 0))
			assert.Assert(t, p.HostIP.Zone() == "" && !p.HostIP.Is4In6() && !p.HostIP.IsMulticast())
			if p.HostPort != 0 && p.HostPort == p.HostPortEnd {
				key := fmt.Sprint(p.Proto, p.HostIP, p.HostPort)
				other, twice := fixed[key]
				assert.Assert(t, !twice || other == p.ContainerPort, key)
				fixed[key] = p.ContainerPort
			}
		}
		assert.Assert(t, len(ports) <= len(list))
	})
}
