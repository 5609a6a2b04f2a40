package options

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"
)

// compareNetip compares addresses as values.
func compareNetip() cmp.Option {
	return cmp.Options{
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	}
}

func generic(opts map[string]any) map[string]any {
	return map[string]any{keyGeneric: opts, keyEnableIPv6: false}
}

func pools(data ...*network.IPAMData) []*network.IPAMData { return data }

// plainNetwork is what comes of no options at all.
func plainNetwork() Network {
	return Network{
		ID: "n", Mode: ModeBridge, Masquerade: true, ContainerPrefix: "eth",
		IPv4: Family{Mode: GatewayNAT}, IPv6: Family{Mode: GatewayNAT},
	}
}

func withPlain(change func(*Network)) Network {
	n := plainNetwork()
	change(&n)
	return n
}

func TestParseNetwork(t *testing.T) {
	plain, with := plainNetwork(), withPlain
	for _, tc := range []struct {
		name     string
		opts     map[string]any
		v4, v6   []*network.IPAMData
		want     Network
		warnings int
	}{
		{name: "nothing at all", want: plain},
		{name: "what Engine 28 sends", opts: map[string]any{
			keyGeneric: map[string]any{}, keyEnableIPv4: true, keyEnableIPv6: true, keyInternal: true,
		}, v4: pools(&network.IPAMData{AddressSpace: "berth-local", Pool: "10.2.0.0/24", Gateway: "10.2.0.1/24", AuxAddresses: map[string]any{"name": "10.2.0.9/24"}}),
			v6: pools(&network.IPAMData{AddressSpace: "berth-local", Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"}),
			want: with(func(n *Network) {
				n.Internal = true
				n.Subnets = []Subnet{
					{Pool: netip.MustParsePrefix("10.2.0.0/24"), Gateway: netip.MustParseAddr("10.2.0.1")},
					{Pool: netip.MustParsePrefix("fd00:1::/64"), Gateway: netip.MustParseAddr("fd00:1::1")},
				}
			})},
		{name: "null IPAM", v4: pools(&network.IPAMData{AddressSpace: "null", Pool: "0.0.0.0/0"}), v6: pools(&network.IPAMData{Pool: "::/0"}), want: plain},
		{name: "pool without gateway, not masked", v4: pools(&network.IPAMData{Pool: "10.2.0.7/24"}), want: with(func(n *Network) {
			n.Subnets = []Subnet{{Pool: netip.MustParsePrefix("10.2.0.0/24")}}
		})},
		{name: "short names", opts: generic(map[string]any{"mode": "bridge", "bridge": "br-lan", "mtu": "1400", "masquerade": "false", "ifprefix": "lan", "icc": "true"}),
			want: with(func(n *Network) {
				n.Bridge, n.MTU, n.Masquerade, n.ContainerPrefix = "br-lan", 1400, false, "lan"
			})},
		{name: "Docker's names", opts: generic(map[string]any{
			"com.docker.network.bridge.name": "br-lan", "com.docker.network.driver.mtu": "1400",
			"com.docker.network.bridge.enable_ip_masquerade": "false", "com.docker.network.container_iface_prefix": "lan",
			"com.docker.network.bridge.enable_icc": "1", "com.docker.network.bridge.inhibit_ipv4": "0",
			keyBinding: "0.0.0.0", "com.docker.network.bridge.gateway_mode_ipv4": "nat",
			"com.docker.network.bridge.gateway_mode_ipv6": "", "com.docker.network.bridge.default_bridge": "false",
			"com.docker.network.advertise_addr_nmsgs": "3", "com.docker.network.advertise_addr_ms": "500",
		}), want: with(func(n *Network) {
			n.Bridge, n.MTU, n.Masquerade, n.ContainerPrefix = "br-lan", 1400, false, "lan"
			n.IPv4.Binding = netip.IPv4Unspecified()
		})},
		{name: "both names, one value", opts: generic(map[string]any{"mtu": "1400", "com.docker.network.driver.mtu": "1400"}),
			want: with(func(n *Network) { n.MTU = 1400 })},
		{name: "flag without value", opts: generic(map[string]any{"masquerade": "", "icc": ""}), want: plain},
		{name: "null IPAM with IPv6", opts: map[string]any{keyEnableIPv6: true}, v4: pools(&network.IPAMData{Pool: "0.0.0.0/0"}), v6: pools(&network.IPAMData{Pool: "::/0"}), want: plain},
		{name: "IPv6 only", opts: map[string]any{keyEnableIPv4: false, keyEnableIPv6: true}, v6: pools(&network.IPAMData{Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"}),
			want: with(func(n *Network) {
				n.Subnets = []Subnet{{Pool: netip.MustParsePrefix("fd00:1::/64"), Gateway: netip.MustParseAddr("fd00:1::1")}}
			})},
		{name: "several subnets of each family", v4: pools(&network.IPAMData{Pool: "10.2.0.0/24", Gateway: "10.2.0.1/24"}, &network.IPAMData{Pool: "10.3.0.0/24"}),
			v6: pools(&network.IPAMData{Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"}, &network.IPAMData{Pool: "fd00:2::/64"}),
			want: with(func(n *Network) {
				n.Subnets = []Subnet{
					{Pool: netip.MustParsePrefix("10.2.0.0/24"), Gateway: netip.MustParseAddr("10.2.0.1")},
					{Pool: netip.MustParsePrefix("10.3.0.0/24")},
					{Pool: netip.MustParsePrefix("fd00:1::/64"), Gateway: netip.MustParseAddr("fd00:1::1")},
					{Pool: netip.MustParsePrefix("fd00:2::/64")},
				}
			})},
		{name: "another host is the gateway", v4: pools(&network.IPAMData{Pool: "10.2.0.0/24", Gateway: "10.2.0.1/24", AuxAddresses: map[string]any{auxGateway4: "10.2.0.254/24"}}),
			v6: pools(&network.IPAMData{Pool: "fd00:1::/64", Gateway: "fd00:1::1/64", AuxAddresses: map[string]any{auxGateway6: "fd00:1::fe", "printer": "fd00:1::7"}}),
			want: with(func(n *Network) {
				n.Subnets = []Subnet{
					{netip.MustParsePrefix("10.2.0.0/24"), netip.MustParseAddr("10.2.0.1"), netip.MustParseAddr("10.2.0.254")},
					{netip.MustParsePrefix("fd00:1::/64"), netip.MustParseAddr("fd00:1::1"), netip.MustParseAddr("fd00:1::fe")},
				}
			})},
		{name: "the bridge is the gateway, said twice", v4: pools(&network.IPAMData{Pool: "10.2.0.0/24", Gateway: "10.2.0.1/24", AuxAddresses: map[string]any{auxGateway4: "10.2.0.1/24"}}),
			want: with(func(n *Network) {
				n.Subnets = []Subnet{{Pool: netip.MustParsePrefix("10.2.0.0/24"), Gateway: netip.MustParseAddr("10.2.0.1")}}
			})},
		{name: "isolated in one family, on an engine that asks for a gateway all the same", opts: map[string]any{
			keyInternal: true, keyGeneric: map[string]any{"gateway4": "isolated"},
		}, v4: pools(&network.IPAMData{Pool: "10.2.0.0/24", Gateway: "10.2.0.1/24"}), v6: pools(&network.IPAMData{Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"}),
			want: with(func(n *Network) {
				n.Internal, n.IPv4.Mode = true, GatewayIsolated
				n.Subnets = []Subnet{
					{Pool: netip.MustParsePrefix("10.2.0.0/24")},
					{Pool: netip.MustParsePrefix("fd00:1::/64"), Gateway: netip.MustParseAddr("fd00:1::1")},
				}
			}), warnings: 1},
		{name: "what Engine 40 may send", opts: map[string]any{
			keyGeneric: map[string]any{"com.docker.network.bridge.shiny": "1"}, "com.docker.network.shiny": map[string]any{},
		}, want: plain, warnings: 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, warnings, err := ParseNetwork("n", tc.opts, tc.v4, tc.v6)
			assert.NilError(t, err)
			assert.DeepEqual(t, got, tc.want, compareNetip())
			assert.Equal(t, len(warnings), tc.warnings, "%v", warnings)
		})
	}
}

func TestWrongNetworkOptionsAreNamed(t *testing.T) {
	for _, tc := range []struct {
		key, value, want string
	}{
		{"mtu", "67", `option mtu="67": want a number from 68 to 65535`},
		{"mtu", "65536", "want a number from 68 to 65535"},
		{"mtu", "", "want a number"},
		{"mtu", "1500x", "want a number"},
		{"com.docker.network.driver.mtu", "x", `option com.docker.network.driver.mtu="x": want a number from 68 to 65535`},
		{"masquerade", "maybe", `option masquerade="maybe": want true or false`},
		{"bridge", "", `option bridge="": want 1 to 15 of`},
		{"bridge", "a-name-of-16-byt", "want 1 to 15 of"},
		{"bridge", "br/0", "want 1 to 15 of"},
		{"bridge", "br%d", "want 1 to 15 of"},
		{"bridge", "-br", "beginning with a letter or digit"},
		{"bridge", "br 0", "want 1 to 15 of"},
		{"bridge", "all", "the kernel uses this name itself"},
		{"ifprefix", "thirteenbytes", "want 1 to 12 of"},
		{"mode", "nat", `option mode="nat": want bridge, macvlan or ipvlan`},
		{"mode", "", "want bridge, macvlan or ipvlan"},
		{"icc", "maybe", `option icc="maybe": want true or false`},
		{"com.docker.network.bridge.enable_icc", "nonsense", `option com.docker.network.bridge.enable_icc="nonsense": want true or false`},
		{"inhibit4", "2", "want true or false"},
		{"proxy", "on", `option proxy="on": want true or false`},
		{"com.docker.network.bridge.gateway_mode_ipv4", "bridge", `option com.docker.network.bridge.gateway_mode_ipv4="bridge": want nat, nat-unprotected, routed or isolated`},
		{"gateway4", "10.1.0.1", "the gateway's address is given with --gateway"},
		{"gateway4", "isolated", "option gateway4=isolated: want it on an internal network only, create it with --internal"},
		{"com.docker.network.bridge.gateway_mode_ipv6", "isolated", "option com.docker.network.bridge.gateway_mode_ipv6=isolated: want it on an internal network only"},
		{keyBinding, "localhost", `option com.docker.network.bridge.host_binding_ipv4="localhost": want an IPv4 address of the host`},
		{keyBinding, "224.0.0.1", "want an IPv4 address of the host"},
		{"binding4", "::1", `option binding4="::1": want an IPv4 address of the host`},
		{"binding4", "255.255.255.255", "want an IPv4 address of the host"},
		{"binding6", "127.0.0.1", `option binding6="127.0.0.1": want an IPv6 address of the host`},
		{"binding6", "fe80::1%eth0", "without prefix length or zone"},
		{"binding6", "fd00::1/64", "without prefix length or zone"},
		{"com.docker.network.bridge.default_bridge", "true", "want false, there is one default bridge and it is Docker's"},
		{"com.docker.network.bridge.default_bridge", "perhaps", "want false"},
		{"com.docker.network.host_ipv4", "2001:db8::1", `option com.docker.network.host_ipv4="2001:db8::1": want an IPv4 address of the host`},
		{"source4", "0.0.0.0", `option source4="0.0.0.0": want one address of the host; without the option it is that of the outgoing link`},
		{"source6", "::", "want one address of the host"},
		{"source6", "192.0.2.1", "want an IPv6 address of the host"},
		{"trusted", "eth0:../x", `option trusted="../x": want 1 to 15 of`},
		{"com.docker.network.bridge.trusted_host_interfaces", "a-name-of-16-byt", "want 1 to 15 of"},
		{"trusted", strings.Repeat("a,", 65), "option trusted: want at most 64 links, got 65"},
		{"publish", "closed", `option publish: "closed": want open, host-firewall or a list of prefixes, as 192.0.2.0/24,2001:db8::/32`},
		{"publish", "", `option publish: "": want open, host-firewall or a list of prefixes`},
		{"publish", "open,192.0.2.0/24", `option publish: "open": want open, host-firewall or a list of prefixes`},
		{"publish", "192.0.2.1/24", "option publish: prefix 192.0.2.1/24 has bits set behind its length, want 192.0.2.0/24 or 192.0.2.1/32"},
		{"publish", "::ffff:192.0.2.0/120", "want open, host-firewall or a list of prefixes"},
		{"publish", strings.Repeat("192.0.2.1,", 1001), "option publish: want at most 1000 prefixes, got 1002"},
		{"rate.in", "8", `option rate.in="8": want bits per second from 8kbit to 100gbit, as 512kbit, 10mbit or 1gbit`},
		{"mut", "1500", `unknown option "mut": did you mean mtu or com.docker.network.driver.mtu?`},
		{"Masquerade", "true", "did you mean masquerade?"},
		{"enable_icc", "false", "did you mean com.docker.network.bridge.enable_icc?"},
		{"gateway_mode_ipv4", "routed", "did you mean com.docker.network.bridge.gateway_mode_ipv4 or com.docker.network.bridge.gateway_mode_ipv6?"},
		{"gateway", "routed", "did you mean gateway4 or gateway6?"},
		{"rate", "1mbit", "did you mean rate.in or rate.out?"},
		{"publsh", "open", "did you mean publish?"},
		{"route", "10.0.0.0/8", "did you mean routes?"},
		{"host_binding_ipv6", "::1", "did you mean com.docker.network.bridge.host_binding_ipv4?"},
		{"masqerade", "true", "did you mean masquerade?"},
		{"com.dcoker.network.driver.mtu", "1", "did you mean com.docker.network.driver.mtu"},
		{"colour", "red", `unknown option "colour": Berth has bcqueuelen, binding4, binding6, bridge, gateway4, gateway6, host-access, icc, ifprefix, inhibit4, ipam.*, ipvlan_flag, ipvlan_mode, macvlan_mode, masquerade, mode, mtu, parent, proxy, publish, rate.in, rate.out, routes, source4, source6, spoof-check, trusted and uplink`},
		{strings.Repeat("é", 200), "", `unknown option "éé`},
	} {
		_, _, err := ParseNetwork("n", generic(map[string]any{tc.key: tc.value}), nil, nil)
		assert.ErrorContains(t, err, tc.want)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		assert.Assert(t, len(err.Error()) < 400 && !strings.Contains(err.Error(), "\n"), "%q", err)
	}
}

func TestWrongNetworksAreNamed(t *testing.T) {
	for _, tc := range []struct {
		name   string
		id     string
		opts   map[string]any
		v4, v6 []*network.IPAMData
		want   string
	}{
		{name: "no ID", want: `NetworkID "": want 1 to 64 letters and digits`},
		{name: "hostile ID", id: "a/b", want: `NetworkID "a/b"`},
		{name: "long ID", id: strings.Repeat("a", 65), want: "want 1 to 64"},
		{name: "two values", id: "n", opts: generic(map[string]any{"mtu": "1400", "com.docker.network.driver.mtu": "1500"}),
			want: `options com.docker.network.driver.mtu="1500" and mtu="1400" are the same one`},
		{name: "no string", id: "n", opts: generic(map[string]any{"mtu": 1400.0}), want: `option "mtu": want a string, got float64`},
		{name: "no map", id: "n", opts: map[string]any{keyGeneric: "x"}, want: "want an object, got string"},
		{name: "internal is no flag", id: "n", opts: map[string]any{keyInternal: 7.0}, want: "want true or false, got float64"},
		{name: "no pool", id: "n", v4: pools(&network.IPAMData{}), want: `IPv4Data: subnet "": want an IPv4 prefix`},
		{name: "other family", id: "n", v4: pools(&network.IPAMData{Pool: "fd00::/64"}), want: `subnet "fd00::/64": want an IPv4 prefix`},
		{name: "other family too", id: "n", v6: pools(&network.IPAMData{Pool: "10.0.0.0/8"}), want: `subnet "10.0.0.0/8": want an IPv6 prefix`},
		{name: "null entry", id: "n", v4: pools(nil), want: "IPv4Data has an empty entry"},
		{name: "loopback", id: "n", v4: pools(&network.IPAMData{Pool: "127.0.0.0/8"}), want: "loopback"},
		{name: "gateway elsewhere", id: "n", v4: pools(&network.IPAMData{Pool: "10.1.0.0/24", Gateway: "10.2.0.1/24"}), want: `gateway "10.2.0.1/24": want the address of a host in subnet 10.1.0.0/24`},
		{name: "gateway is the network", id: "n", v4: pools(&network.IPAMData{Pool: "10.1.0.0/24", Gateway: "10.1.0.0"}), want: "want the address of a host"},
		{name: "gateway is broadcast", id: "n", v4: pools(&network.IPAMData{Pool: "10.1.0.0/24", Gateway: "10.1.0.255/24"}), want: "want the address of a host"},
		{name: "gateway is no address", id: "n", v4: pools(&network.IPAMData{Pool: "10.1.0.0/24", Gateway: "router"}), want: `gateway "router"`},
		{name: "default gateway elsewhere", id: "n", v4: pools(&network.IPAMData{Pool: "10.1.0.0/24", AuxAddresses: map[string]any{auxGateway4: "10.2.0.9/24"}}), want: `aux address DefaultGatewayIPv4="10.2.0.9/24": want the address of a host in an IPv4 subnet of the network, this one is 10.1.0.0/24`},
		{name: "default gateway of the other family", id: "n", v4: pools(&network.IPAMData{Pool: "10.1.0.0/24", AuxAddresses: map[string]any{auxGateway6: "10.1.0.9/24"}}), want: "want the address of a host in an IPv6 subnet"},
		{name: "default gateway is broadcast", id: "n", v4: pools(&network.IPAMData{Pool: "10.1.0.0/24", AuxAddresses: map[string]any{auxGateway4: "10.1.0.255"}}), want: "want the address of a host"},
		{name: "default gateway is no address", id: "n", v4: pools(&network.IPAMData{Pool: "10.1.0.0/24", AuxAddresses: map[string]any{auxGateway4: 7.0}}), want: `aux address DefaultGatewayIPv4="7"`},
		{name: "default gateway of an internal network", id: "n", opts: map[string]any{keyInternal: true}, v4: pools(&network.IPAMData{Pool: "10.1.0.0/24", AuxAddresses: map[string]any{auxGateway4: "10.1.0.9/24"}}), want: "containers of an internal network have no default gateway"},
		{name: "overlap", id: "n", v4: pools(&network.IPAMData{Pool: "10.1.0.0/24"}, &network.IPAMData{Pool: "10.1.0.0/16"}), want: "overlaps subnet 10.1.0.0/24 of the same network"},
		{name: "small MTU with IPv6", id: "n", opts: generic(map[string]any{"mtu": "1279"}), v6: pools(&network.IPAMData{Pool: "fd00::/64"}), want: "from 1280 to 65535 on a network with IPv6"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, err := ParseNetwork(tc.id, tc.opts, tc.v4, tc.v6)
			assert.ErrorContains(t, err, tc.want)
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		})
	}
}

// assertStored checks that a record gives back what was stored: repeated requests
// are compared with it by reflection.
func assertStored[T any](t *testing.T, value T) {
	t.Helper()
	stored, err := json.Marshal(value)
	assert.NilError(t, err)
	var again T
	assert.NilError(t, json.Unmarshal(stored, &again))
	assert.Assert(t, reflect.DeepEqual(again, value), "%s: %+v differs from %+v", stored, again, value)
}

// What ParseNetwork accepts can be built, and survives being stored.
func FuzzParseNetwork(f *testing.F) {
	for _, s := range []string{
		`{"NetworkID":"n","Options":{"com.docker.network.generic":{"mtu":"1400"},"com.docker.network.internal":true},"IPv4Data":[{"AddressSpace":"x","Pool":"10.2.0.0/24","Gateway":"10.2.0.1/24","AuxAddresses":{"a":"10.2.0.9/24"}}],"IPv6Data":[]}`,
		`{"NetworkID":"n","Options":{"com.docker.network.generic":{"bridge":"br0","mode":"bridge","icc":"true","ifprefix":"e"}},"IPv6Data":[{"Pool":"fd00::/64","Gateway":"fd00::1/64"}]}`,
		`{"NetworkID":"n","Options":{"com.docker.network.generic":{"gateway4":"routed","gateway6":"nat","binding6":"::1","source6":"2001:db8::1","publish":"10.0.0.0/8,::/0","trusted":"eth0:wg0","rate.in":"10mbit"}},"IPv4Data":[{"Pool":"10.2.0.0/24","Gateway":"10.2.0.1/24","AuxAddresses":{"DefaultGatewayIPv4":"10.2.0.9/24"}}]}`,
		`{"NetworkID":"n","Options":{"com.docker.network.generic":{"gateway4":"isolated","inhibit4":"true","publish":"host-firewall","proxy":"false","com.docker.network.bridge.host_binding_ipv4":"::"},"com.docker.network.internal":"true"},"IPv4Data":[{"Pool":"10.2.0.0/24","Gateway":"10.2.0.1/24"}]}`,
		`{"NetworkID":"n","Options":{"com.docker.network.generic":{"routes":"10.9.0.0/16 via 10.2.0.254;fd00:9::/64,10.8.0.0/16"}},"IPv4Data":[{"Pool":"10.2.0.0/24","Gateway":"10.2.0.1/24"}],"IPv6Data":[{"Pool":"fd00::/64"}]}`,
		`{"NetworkID":"n","IPv4Data":[{"Pool":"0.0.0.0/0"},{"Pool":"10.0.0.0/31","Gateway":"10.0.0.0"},null]}`,
		`{"NetworkID":"n","IPv6Data":[{"Pool":"::ffff:10.0.0.0/104"},{"Pool":"fe80::1%eth0/64"}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var req network.CreateNetworkRequest
		if json.Unmarshal(body, &req) != nil {
			return
		}
		n, warnings, err := ParseNetwork(req.NetworkID, req.Options, req.IPv4Data, req.IPv6Data)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
			assert.Assert(t, !strings.ContainsAny(err.Error(), "\n\x00"), "%q", err)
			return
		}
		assert.Assert(t, n.Mode == ModeBridge && len(n.Bridge) <= maxLinkName && len(n.ContainerPrefix) > 0 && n.ID != "")
		assert.Assert(t, n.MTU == 0 || n.MTU >= minMTU4 && n.MTU <= maxMTU)
		for i, s := range n.Subnets {
			assert.Equal(t, s.Pool, s.Pool.Masked())
			assert.Assert(t, !s.Gateway.IsValid() || s.Pool.Contains(s.Gateway))
			for _, other := range n.Subnets[:i] {
				assert.Assert(t, !other.Pool.Overlaps(s.Pool))
			}
		}
		for family, f := range map[bool]Family{false: n.IPv4, true: n.IPv6} {
			assert.Assert(t, f.Mode != "" && (f.Mode != GatewayIsolated || n.Internal))
			for _, addr := range []netip.Addr{f.Source, f.Binding} {
				assert.Assert(t, !addr.IsValid() || addr.Is6() == family && !addr.Is4In6() && addr.Zone() == "")
			}
			assert.Assert(t, !f.Source.IsUnspecified())
		}
		for i, p := range n.Sources {
			assert.Assert(t, p == p.Masked() && (i == 0 || !n.Sources[i-1].Overlaps(p) && comparePrefixes(n.Sources[i-1], p) < 0))
		}
		for i, r := range n.Routes {
			assert.Assert(t, r.Destination.Bits() > 0 && r.Destination == r.Destination.Masked())
			_, ok := n.SubnetOf(r.NextHop)
			assert.Assert(t, !r.NextHop.IsValid() || ok)
			assert.Assert(t, !slices.ContainsFunc(n.Routes[:i], func(other Route) bool { return other.Destination == r.Destination }))
		}
		assert.Assert(t, n.RateIn == 0 || n.RateIn >= minRate && n.RateIn <= maxRate)
		again, warningsAgain, err := ParseNetwork(req.NetworkID, req.Options, req.IPv4Data, req.IPv6Data)
		assert.NilError(t, err)
		assert.Assert(t, reflect.DeepEqual(n, again) && slices.Equal(warnings, warningsAgain), "the same request gives another network")
		assertStored(t, n)
	})
}
