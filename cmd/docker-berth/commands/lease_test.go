package commands

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/docker/docker/api/types"
	"github.com/google/go-cmp/cmp/cmpopts"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/golden"

	"github.com/berth-plugin/berth/shared/control"
)

// What a user sees of addresses, word for word.
func TestOutputOfAddresses(t *testing.T) {
	for name, args := range map[string][]string{
		"lease-ls":          {"lease", "ls"},
		"lease-ls-quiet":    {"lease", "ls", "-q", "--filter", "network=office"},
		"lease-ls-conflict": {"lease", "ls", "--filter", "state=conflict", "--format", `{{.Address}}\t{{.MAC}}\t{{.Container}}\t{{.Expires}}`},
		"lease-ls-template": {"lease", "ls", "--filter", "container=web", "--format", `table {{.Address}}\t{{.Container}}\t{{.Reserved}}\t{{.Pinned}}\t{{.PoolID}}\t{{.EndpointID}}`},
		"lease-ls-dhcp":     {"lease", "ls", "--filter", "address=192.0.2.129", "--no-trunc", "--format", `table {{.Address}}\t{{.DHCP}}\t{{.DHCPServer}}\t{{.NetworkID}}\t{{.ContainerID}}`},
		"lease-inspect":     {"lease", "inspect", "office", "192.0.2.129", "192.0.2.132", "--format", "{{.Network}} {{.Container}} {{.Key}} {{with .DHCP}}{{.ClientID}} {{.Hostname}}{{end}}"},
		"pool-ls":           {"pool", "ls"},
		"pool-ls-quiet":     {"pool", "ls", "-q", "--filter", "network=app9"},
		"pool-ls-template": {
			"pool", "ls", "--filter", "parent=eth1.50", "--format",
			`table {{.Subnet}}\t{{.Family}}\t{{.Reserved}}\t{{.Released}}\t{{.Sticky}}\t{{.Quarantine}}\t{{.Probe}}\t{{.Conflict}}\t{{.Exclude}}\t{{.DHCP}}\t{{.Created}}`,
		},
		"network-ls-lan":      {"network", "ls", "--filter", "mode=macvlan"},
		"network-ls-lan-more": {"network", "ls", "--filter", "parent=eth1.50", "--format", `{{.Name}}\t{{.Bridge}}\t{{.Parent}}\t{{.LANType}}\t{{.HostAccess}}\t{{.Uplink}}`},
	} {
		t.Run(name, func(t *testing.T) { golden.Assert(t, newLAN(t).run(args...), name+".golden") })
	}
}

func TestFiltersOfAddresses(t *testing.T) {
	w := newLAN(t)
	for filter, want := range map[string]string{
		"network=off":           "192.0.2.1 192.0.2.9 192.0.2.129 192.0.2.131 192.0.2.132",
		"network=aaaa":          "10.1.0.2 10.1.0.3 10.1.0.4 10.1.0.10 fd00:1::2",
		"pool=pool-2":           "10.1.0.2 10.1.0.3 10.1.0.4 10.1.0.10",
		"pool=fd00:1::/64":      "fd00:1::2",
		"pool=192.0.2.128/28":   "192.0.2.1 192.0.2.9 192.0.2.129 192.0.2.131 192.0.2.132",
		"pool=10.1.0.0/28":      "",
		"state=active":          "10.1.0.2 fd00:1::2 192.0.2.129",
		"key=we":                "10.1.0.2 fd00:1::2",
		"key=02-00-00-00-00-09": "192.0.2.132",
		"container=333":         "192.0.2.129",
		"container=job":         "10.1.0.4",
		"address=10.1.0.0/29":   "10.1.0.2 10.1.0.3 10.1.0.4",
		"address=fd00:1::2":     "fd00:1::2",
		"reserved=true":         "10.1.0.2 192.0.2.132",
		"reserved=no":           "want true or false",
		"address=10.1":          "want an address or a subnet",
		"color=red":             "invalid filter",
	} {
		stdout, _, err := w.try("lease", "ls", "-q", "--filter", filter)
		if err != nil {
			assert.ErrorContains(t, err, want, filter)
			continue
		}
		assert.Equal(t, strings.Join(strings.Fields(stdout), " "), want, filter)
	}
	for filter, want := range map[string]string{
		"family=6": "pool-3", "family=ipv4": "pool-2 pool-1 pool-4", "parent=eth1": "", "network=office": "pool-1", "family=ipx": "want ipv4 or ipv6",
	} {
		stdout, _, err := w.try("pool", "ls", "-q", "--filter", filter)
		if err != nil {
			assert.ErrorContains(t, err, want, filter)
			continue
		}
		assert.Equal(t, strings.Join(strings.Fields(stdout), " "), want, filter)
	}
	assert.Equal(t, w.run("lease", "ls", "-q", "--filter", "address=10.1.0.2", "--filter", "address=10.1.0.3"), "10.1.0.2\n10.1.0.3\n")
}

func TestJSONOfAddresses(t *testing.T) {
	w := newLAN(t)
	for _, command := range []string{"lease", "pool"} {
		for line := range strings.Lines(w.run(command, "ls", "--format", "json")) {
			var object map[string]any
			assert.NilError(t, json.Unmarshal([]byte(line), &object), line)
			assert.Assert(t, len(object) > 15, line)
			if command == "pool" {
				assert.Assert(t, object["Size"].(float64) > 0, "numbers are numbers: %s", line)
			}
		}
	}
	var details []leaseDetail
	assert.NilError(t, json.Unmarshal([]byte(w.run("lease", "inspect", "eee", "192.0.2.129")), &details))
	assert.Equal(t, details[0].Container, "printer")
	assert.Equal(t, details[0].ContainerID, long("3"))
	assert.Equal(t, details[0].DHCP.State, control.DHCPRenewing)
	assert.Equal(t, w.run("pool", "ls", "--filter", "family=6", "--format", "{{if gt .Free 100}}{{.Free}}{{end}}"), "2^64\n")

	stdout, _, err := w.try("lease", "inspect", "office", "192.0.2.200", "here", "192.0.2.9", "--format", "{{.State}}")
	assert.Equal(t, stdout, "aux\n")
	assert.ErrorContains(t, err, "address 192.0.2.200 is free on network office")
	assert.ErrorContains(t, err, `address "here": want an IP address`)
}

func TestCount(t *testing.T) {
	for n, want := range map[count]string{0: "0", 4294967296: "4294967296", 4294967297: "4.29e+09", 1 << 62: "4.61e+18", 1<<64 - 1: "2^64"} {
		assert.Equal(t, n.String(), want)
	}
}

// A reservation that gives its address to nobody is made, and the user is told.
func TestReserveTellsWhenItHasNoEffect(t *testing.T) {
	mac := control.Setting{Name: "BERTH_IPAM_KEY", Value: "mac"}
	name := control.Setting{Name: "BERTH_IPAM_KEY", Value: "name"}
	old := types.Version{Version: "28.5.1", APIVersion: "1.51"}
	for _, c := range []struct {
		key      string
		settings []control.Setting
		docker   types.Version
		want     string
	}{
		{"web", nil, types.Version{APIVersion: "1.52"}, ""},
		{"web", []control.Setting{name}, types.Version{APIVersion: "1.53"}, ""},
		{"web", []control.Setting{name}, old, "Docker 28.5.1 does not tell Berth names, Engine 29 does; set BERTH_IPAM_KEY=mac"},
		{"web", []control.Setting{mac}, old, "the daemon has BERTH_IPAM_KEY=mac; reserve it for the MAC address that web is given"},
		{"02-00-00-00-00-0A", []control.Setting{mac}, old, ""},
		{"02-00-00-00-00-0A", []control.Setting{name}, old, "the daemon has BERTH_IPAM_KEY=name; set it to mac"},
	} {
		w := newLAN(t, c.settings...)
		w.version = c.docker
		stdout, stderr, err := w.try("lease", "reserve", "app9", "10.1.0.50", c.key)
		assert.NilError(t, err)
		assert.Equal(t, stdout, "10.1.0.50\n")
		if c.want == "" {
			assert.Equal(t, stderr, "")
		} else {
			assert.Assert(t, strings.Contains(stderr, c.want), stderr)
			assert.Assert(t, strings.HasPrefix(stderr, "WARNING: 10.1.0.50 is kept from others"), stderr)
		}
		key, err := control.LeaseKey(c.key)
		assert.NilError(t, err)
		assert.DeepEqual(t, w.lan.reserved, []control.ReserveRequest{{Network: long("a"), Addr: netip.MustParseAddr("10.1.0.50"), Key: key}}, cmpAddr)
	}
}

var cmpAddr = cmpopts.EquateComparable(netip.Addr{})

func TestReserveThatIsRefused(t *testing.T) {
	w := newLAN(t)
	for args, want := range map[string]string{
		"app9 10.1.0.2 db":                 "address 10.1.0.2 is used by web",
		"nosuch 10.1.0.2 db":               "network nosuch not found",
		"bridge 10.1.0.2 db":               "network bridge has the driver bridge",
		"app9 10.1.0 db":                   `address "10.1.0": want an IP address`,
		"app9 fe80::1%eth0 db":             "want an IP address",
		"app9 10.1.0.50 w":                 "want a container's name or a MAC address",
		"app9 10.1.0.50 FF:FF:FF:FF:FF:FF": "want the MAC address of one container",
		"app9 10.1.0.50":                   "requires 3 arguments",
	} {
		stdout, _, err := w.try(append([]string{"lease", "reserve"}, strings.Fields(args)...)...)
		assert.ErrorContains(t, err, want, args)
		assert.Equal(t, stdout, "")
	}
	assert.Equal(t, len(w.lan.reserved), 1, "only the first one was asked for")
}

func TestReleaseGoesOnAfterAnError(t *testing.T) {
	w := newLAN(t)
	stdout, stderr, err := w.try("lease", "release", "app9", "10.1.0.4", "10.1.0.2", "10.1", "10.1.0.99", "10.1.0.10")
	assert.Equal(t, stdout, "10.1.0.4\n10.1.0.10\n")
	assert.Equal(t, stderr, "")
	for _, want := range []string{"address 10.1.0.2 is in use", `address "10.1": want an IP address`, "address 10.1.0.99 is free"} {
		assert.ErrorContains(t, err, want)
	}
	assert.Equal(t, len(w.lan.released), 4)
	assert.Equal(t, w.lan.released[0].Network, long("a"))
	_, _, err = w.try("lease", "release", "app9")
	assert.ErrorContains(t, err, "requires at least 2 arguments")
}

func TestCompletionOfAddresses(t *testing.T) {
	w := newLAN(t)
	offered := func(args ...string) string {
		lines := strings.Split(w.run(append([]string{"__complete", "lease"}, args...)...), "\n")
		return strings.Join(lines[:len(lines)-2], " ")
	}
	assert.Equal(t, offered("inspect", ""), "app9 app10 office")
	assert.Equal(t, offered("inspect", "app9", "10.1.0.3", ""), "10.1.0.2 10.1.0.4 10.1.0.10 fd00:1::2")
	assert.Equal(t, offered("release", "app9", ""), "10.1.0.3 10.1.0.4 10.1.0.10")
	assert.Equal(t, offered("release", "office", ""), "192.0.2.131 192.0.2.132")
	assert.Equal(t, offered("reserve", ""), "app9 app10 office")
	assert.Equal(t, offered("reserve", "app9", ""), "10.1.0.3 10.1.0.4 10.1.0.10 fd00:1::2")
	assert.Equal(t, offered("reserve", "office", "192.0.2.129", ""), "printer db web")
	assert.Equal(t, offered("reserve", "office", "192.0.2.129", "printer", ""), "")
	assert.Equal(t, offered("release", "nosuch", ""), "")
	w.server.Refuse(control.NetworkService, errNoDocker)
	w.apiErr = errNoDocker
	assert.Equal(t, offered("release", "app9", ""), "")
}

func TestDoctorNamesTheParent(t *testing.T) {
	w := newLAN(t)
	w.networks = w.networks[:3]
	stdout, _, _ := w.try("doctor", "--format", "{{.Summary}}")
	assert.Assert(t, strings.Contains(stdout, "Berth has the network eeeeeeeeeeee (eth1.50), and Docker does not know it"), stdout)
	stdout, _, err := w.try("network", "prune")
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(stdout, "eth1.50"), stdout)
}
