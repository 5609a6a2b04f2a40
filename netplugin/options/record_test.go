package options

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/golden"
)

// What engines have sent, as networks, endpoints and ports. The IDs, which are new
// with each recording, are left out.
func TestRecordedRequests(t *testing.T) {
	files, err := filepath.Glob("../../shared/pluginapi/testdata/calls/*.txt")
	assert.NilError(t, err)
	assert.Assert(t, len(files) > 0)
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".txt")
		t.Run(name, func(t *testing.T) {
			golden.Assert(t, parseRecorded(t, file), "recorded-"+name+".golden")
		})
	}
}

func parseRecorded(t *testing.T, file string) string {
	t.Helper()
	type call struct{ method, body string }
	var calls []call
	f, err := os.Open(file)
	assert.NilError(t, err)
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		method, body, _ := strings.Cut(lines.Text(), " ")
		calls = append(calls, call{method, body})
	}
	assert.NilError(t, lines.Err())

	var out []string
	show := func(method string, value any, warnings []string) {
		text, err := json.Marshal(value)
		assert.NilError(t, err)
		out = append(out, fmt.Sprintf("%s %s %q", method, text, warnings))
	}
	networks := map[string]Network{}
	for _, c := range calls {
		if c.method != "NetworkDriver.CreateNetwork" {
			continue
		}
		var req network.CreateNetworkRequest
		assert.NilError(t, json.Unmarshal([]byte(c.body), &req))
		n, warnings, err := ParseNetwork(req.NetworkID, req.Options, req.IPv4Data, req.IPv6Data)
		assert.NilError(t, err, c.body)
		assertStored(t, n)
		networks[n.ID] = n
		n.ID = "NETWORK"
		show(c.method, n, warnings)
	}
	for _, c := range calls {
		switch c.method {
		case "NetworkDriver.GwAllocCheck":
			var req struct{ Options map[string]any }
			assert.NilError(t, json.Unmarshal([]byte(c.body), &req))
			n, warnings, err := ParseNetworkOptions(req.Options)
			assert.NilError(t, err, c.body)
			show(c.method, []bool{n.SkipGateway4(), n.SkipGateway6()}, warnings)
		case "NetworkDriver.CreateEndpoint":
			var req network.CreateEndpointRequest
			assert.NilError(t, json.Unmarshal([]byte(c.body), &req))
			ep, warnings, err := ParseEndpoint(networks[req.NetworkID], req.EndpointID, req.Interface, req.Options)
			assert.NilError(t, err, c.body)
			assertStored(t, ep)
			ep.ID, ep.NetworkID = "ENDPOINT", "NETWORK"
			show(c.method, ep, warnings)
		case "NetworkDriver.ProgramExternalConnectivity":
			var req network.ProgramExternalConnectivityRequest
			assert.NilError(t, json.Unmarshal([]byte(c.body), &req))
			ports, no6to4, err := ParsePorts(req.Options)
			assert.NilError(t, err, c.body)
			out = append(out, fmt.Sprintf("%s %v no_proxy_6to4=%t", c.method, ports, no6to4))
		}
	}
	return strings.Join(out, "\n") + "\n"
}

// Records of every member survive being stored, and members without a value do not
// show in them.
func TestRecordsAreLossless(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	routes := []Route{{Destination: prefix("10.9.0.0/16")}, {prefix("fd00:9::/64"), addr("fd00:1::9")}}
	n := Network{
		ID: "n", Mode: ModeBridge, Bridge: "br0", MTU: 1400, Internal: true, Masquerade: true, ContainerPrefix: "eth",
		Subnets: []Subnet{{prefix("10.2.0.0/24"), addr("10.2.0.1"), addr("10.2.0.254")}, {Pool: prefix("fd00:1::/64")}},
		IPv4:    Family{Mode: GatewayUnprotected, Source: addr("192.0.2.1"), Binding: addr("127.0.0.1")},
		IPv6:    Family{Mode: GatewayRouted, Source: addr("2001:db8::1"), Binding: addr("::1")},
		NoICC:   true, InhibitIPv4: true, Adopted: true, AdoptedAddrs: []netip.Prefix{prefix("10.2.0.1/24"), prefix("fd00:1::1/64")},
		HostFirewall: true, Sources: []netip.Prefix{prefix("10.0.0.0/8"), prefix("::/0")}, Trusted: []string{"eth1"}, NoProxy: true,
		Routes: routes, RateIn: 8000, RateOut: maxRate,
		Uplink: "eth1.50", UplinkUp: true, SpoofCheck: true,
		LAN: LAN{
			Parent: "eth1", Type: IPvlanL2, Flag: IPvlanVEPA, HostAccess: true, HostAddrs: []netip.Addr{addr("10.2.0.9"), addr("fd00:1::9")},
			BroadcastQueue: 2000, GatewayBridge: true,
		},
		IPAM: map[string]string{"quarantine": "5m"},
	}
	ep := Endpoint{
		ID: "e", NetworkID: "n", HostLink: "bv0", ContainerLink: "bc0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1},
		IPv4: prefix("10.2.0.2/24"), IPv6: prefix("fd00:1::2/64"), ContainerName: "lan0", Routes: routes, RateIn: 1, RateOut: 2,
		Ports: []PublishedPort{
			{TCP, addr("0.0.0.0"), 8080, addr("10.2.0.2"), 80, 1}, {UDP, addr("::"), 53, addr("10.2.0.2"), 53, 2},
			{Proto: SCTP, Container: addr("fd00:1::2"), ContainerPort: 9, Count: 3},
		},
		NoProxy6to4: true,
	}
	for _, value := range []any{n, ep, n.IPv4, n.LAN, n.Subnets[0]} {
		v := reflect.ValueOf(value)
		for i := range v.NumField() {
			assert.Assert(t, !v.Field(i).IsZero(), "%s.%s has no value in this test", v.Type(), v.Type().Field(i).Name)
		}
	}
	assertStored(t, n)
	assertStored(t, ep)
	assertStored(t, Network{})
	assertStored(t, Endpoint{})

	empty, err := json.Marshal(plainNetwork())
	assert.NilError(t, err)
	assert.Equal(t, string(empty), `{"ID":"n","Mode":"bridge","Bridge":"","MTU":0,"Internal":false,"Masquerade":true,"ContainerPrefix":"eth","Subnets":null,"IPv4":{"Mode":"nat"},"IPv6":{"Mode":"nat"}}`)
}

// A record of a Berth that knew of no gateway modes is that of a NAT network.
func TestRecordOfAnOlderBerth(t *testing.T) {
	var n Network
	assert.NilError(t, json.Unmarshal([]byte(`{"ID":"n","Mode":"bridge","Bridge":"bth0","MTU":0,"Internal":false,"Masquerade":true,"ContainerPrefix":"eth",`+
		`"Subnets":[{"Pool":"10.2.0.0/24","Gateway":"10.2.0.1"}]}`), &n))
	assert.Assert(t, !n.IPv4.Routed() && !n.SkipGateway4() && !n.SkipGateway6() && n.IPv4 == Family{} && len(n.Sources) == 0)
	assert.Equal(t, n.Subnets[0].DefaultGateway(), netip.MustParseAddr("10.2.0.1"))
}

// Each parser of one value returns what it can write again, or an error on one line.
func FuzzValues(f *testing.F) {
	for _, s := range []string{
		"10.9.0.0/16 via 10.2.0.254,fd00:9::/64", "10mbit", "99999999999999999999gbit", "10.0.0.0/8,10.1.0.0/16,::/0", "open", "host-firewall",
		"eth0:wg0,lo", "127.0.0.1", "::ffff:127.0.0.1", "fe80::1%eth0", "nat-unprotected", "1.2.3.4/33;;via via via",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		g := given{"option", value}
		n := Network{}
		routes, routesErr := parseRoutes(g)
		rate, rateErr := parseRate(g)
		for _, err := range []error{
			routesErr, rateErr, n.setPublish(g), n.setTrusted(g), n.setBinding4(g), n.setBinding6(g), setSource(&n.IPv4, g, false), n.IPv4.setMode(g),
		} {
			assert.Assert(t, err == nil || len(err.Error()) < 500 && !strings.ContainsAny(err.Error(), "\n\x00"), "%q", err)
		}
		if routesErr == nil {
			var words []string
			for _, r := range routes {
				word := r.Destination.String()
				if r.NextHop.IsValid() {
					word += " via " + r.NextHop.String()
				}
				words = append(words, word)
			}
			again, err := parseRoutes(given{"option", strings.Join(words, ";")})
			assert.NilError(t, err)
			assert.DeepEqual(t, again, routes, compareNetip())
		}
		if rateErr == nil {
			again, err := parseRate(given{"option", fmt.Sprint(rate)})
			assert.NilError(t, err)
			assert.Equal(t, again, rate)
		}
	})
}
