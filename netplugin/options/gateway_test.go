package options

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"
)

func TestNetworkOptionsHaveTwoNames(t *testing.T) {
	addr := netip.MustParseAddr
	prefixes := func(words ...string) []netip.Prefix {
		var out []netip.Prefix
		for _, w := range words {
			out = append(out, netip.MustParsePrefix(w))
		}
		return out
	}
	for _, tc := range []struct {
		name string
		opts map[string]any
		want func(*Network)
	}{
		{"Docker's names", map[string]any{
			"com.docker.network.bridge.enable_icc": "false", "com.docker.network.bridge.inhibit_ipv4": "1",
			"com.docker.network.bridge.gateway_mode_ipv4": "nat-unprotected", "com.docker.network.bridge.gateway_mode_ipv6": "routed",
			keyBinding: "127.0.0.1", "com.docker.network.bridge.trusted_host_interfaces": "eth1:wg0::eth1",
			"com.docker.network.host_ipv4": "192.0.2.1",
		}, func(n *Network) {
			n.NoICC, n.InhibitIPv4, n.Trusted = true, true, []string{"eth1", "wg0"}
			n.IPv4 = Family{Mode: GatewayUnprotected, Binding: addr("127.0.0.1"), Source: addr("192.0.2.1")}
			n.IPv6 = Family{Mode: GatewayRouted}
		}},
		{"Berth's names", map[string]any{
			"icc": "false", "inhibit4": "true", "gateway4": "nat-unprotected", "gateway6": "nat", "binding4": "127.0.0.1", "binding6": "::1",
			"trusted": "eth1, wg0", "source4": "192.0.2.1", "source6": "2001:db8::1", "proxy": "false", "mtu": "0", "publish": "open",
			"rate.in": "1gbit", "rate.out": "512kbit",
		}, func(n *Network) {
			n.NoICC, n.InhibitIPv4, n.Trusted, n.NoProxy = true, true, []string{"eth1", "wg0"}, true
			n.IPv4 = Family{Mode: GatewayUnprotected, Binding: addr("127.0.0.1"), Source: addr("192.0.2.1")}
			n.IPv6 = Family{Mode: GatewayNAT, Binding: addr("::1"), Source: addr("2001:db8::1")}
			n.RateIn, n.RateOut = 1_000_000_000, 512_000
		}},
		{"empty as Docker's defaults", map[string]any{
			"gateway4": "", "gateway6": "", "binding4": "", "binding6": "", "trusted": "", "source4": "", "source6": "", "proxy": "", "icc": "",
		}, func(*Network) {}},
		{"host firewall", map[string]any{"publish": "host-firewall"}, func(n *Network) { n.HostFirewall = true }},
		{"sources, sorted and without parts", map[string]any{"publish": "2001:db8::/32,192.0.2.7, 10.0.0.0/8,10.1.0.0/16,192.0.2.7/32,2001:db8::1"},
			func(n *Network) { n.Sources = prefixes("10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32") }},
		{"sources of one whole family", map[string]any{"publish": "10.0.0.0/8,0.0.0.0/0"}, func(n *Network) { n.Sources = prefixes("0.0.0.0/0") }},
		{"binding to all", map[string]any{keyBinding: "0.0.0.0"}, func(n *Network) { n.IPv4.Binding = addr("0.0.0.0") }},
		{"binding to all of IPv6", map[string]any{keyBinding: "::"}, func(n *Network) { n.IPv6.Binding = addr("::") }},
		{"binding of IPv6 by Docker's name", map[string]any{keyBinding: "::1"}, func(n *Network) { n.IPv6.Binding = addr("::1") }},
		{"binding of IPv6 by both", map[string]any{keyBinding: "::1", "binding6": "::1"}, func(n *Network) { n.IPv6.Binding = addr("::1") }},
		{"binding of IPv4 in IPv6 notation", map[string]any{keyBinding: "::ffff:127.0.0.1"}, func(n *Network) { n.IPv4.Binding = addr("127.0.0.1") }},
		{"binding of IPv4, all of IPv6", map[string]any{"binding4": "127.0.0.1", "binding6": "::", "gateway6": "routed"},
			func(n *Network) {
				n.IPv4.Binding, n.IPv6 = addr("127.0.0.1"), Family{Mode: GatewayRouted, Binding: addr("::")}
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, warnings, err := ParseNetwork("n", generic(tc.opts), nil, nil)
			assert.NilError(t, err)
			assert.DeepEqual(t, got, withPlain(tc.want), compareNetip())
			assert.Equal(t, len(warnings), 0)
		})
	}
}

func TestGatewayModesAreDockers(t *testing.T) {
	for _, mode := range []GatewayMode{GatewayNAT, GatewayUnprotected, GatewayRouted, GatewayIsolated} {
		for _, internal := range []bool{false, true} {
			for name, family := range map[string]func(Network) Family{
				"gateway4": func(n Network) Family { return n.IPv4 },
				"gateway6": func(n Network) Family { return n.IPv6 },
				"com.docker.network.bridge.gateway_mode_ipv4": func(n Network) Family { return n.IPv4 },
				"com.docker.network.bridge.gateway_mode_ipv6": func(n Network) Family { return n.IPv6 },
			} {
				n, _, err := ParseNetworkOptions(map[string]any{keyInternal: internal, keyGeneric: map[string]any{name: string(mode)}})
				if mode == GatewayIsolated && !internal {
					assert.ErrorContains(t, err, "option "+name+"=isolated: want it on an internal network only")
					continue
				}
				assert.NilError(t, err)
				assert.Equal(t, family(n).Mode, mode)
				is6 := strings.HasSuffix(name, "6")
				assert.Equal(t, n.SkipGateway4(), mode == GatewayIsolated && !is6)
				assert.Equal(t, n.SkipGateway6(), mode == GatewayIsolated && is6)
			}
		}
	}
	for internal, inhibit := range map[bool]string{true: "inhibit4", false: "com.docker.network.bridge.inhibit_ipv4"} {
		n, _, err := ParseNetworkOptions(map[string]any{keyInternal: internal, keyGeneric: map[string]any{inhibit: "true"}})
		assert.NilError(t, err)
		assert.Equal(t, n.SkipGateway4(), internal, "containers need the gateway's address where there is a way out")
		assert.Assert(t, !n.SkipGateway6())
	}
}

func TestContradictionsAreNamed(t *testing.T) {
	for _, tc := range []struct {
		opts     map[string]any
		internal bool
		want     string // "" where it is fine
	}{
		{opts: map[string]any{"trusted": "eth1"}, internal: true, want: `option trusted="eth1": an internal network publishes nothing`},
		{opts: map[string]any{"com.docker.network.bridge.trusted_host_interfaces": "eth1"}, internal: true, want: `option com.docker.network.bridge.trusted_host_interfaces="eth1": an internal network`},
		{opts: map[string]any{"trusted": ""}, internal: true},
		{opts: map[string]any{"source4": "192.0.2.1", "gateway4": "routed"}, want: "options source4=192.0.2.1 and gateway4=routed: traffic keeps the containers' addresses"},
		{opts: map[string]any{"source4": "192.0.2.1", "gateway6": "routed"}},
		{opts: map[string]any{"source6": "2001:db8::1", "com.docker.network.bridge.enable_ip_masquerade": "false"},
			want: "options source6=2001:db8::1 and com.docker.network.bridge.enable_ip_masquerade=false: traffic keeps"},
		{opts: map[string]any{keyBinding: "127.0.0.1", "gateway4": "routed"}, want: "options com.docker.network.bridge.host_binding_ipv4=127.0.0.1 and gateway4=routed: ports are published on the containers' addresses only"},
		{opts: map[string]any{keyBinding: "0.0.0.0", "gateway4": "routed"}},
		{opts: map[string]any{"binding6": "::1", "gateway6": "routed"}, want: "options binding6=::1 and gateway6=routed"},
		{opts: map[string]any{keyBinding: "::1", "gateway6": "routed"}, want: "options com.docker.network.bridge.host_binding_ipv4=::1 and gateway6=routed"},
		{opts: map[string]any{"publish": "10.0.0.0/8", "com.docker.network.bridge.gateway_mode_ipv6": "nat-unprotected"},
			want: `options publish="10.0.0.0/8" and com.docker.network.bridge.gateway_mode_ipv6=nat-unprotected`},
		{opts: map[string]any{"publish": "10.0.0.0/8", "gateway4": "nat-unprotected"}, want: `options publish="10.0.0.0/8" and gateway4=nat-unprotected: all ports are open to everybody`},
		{opts: map[string]any{"publish": "host-firewall", "gateway6": "nat-unprotected"}, want: `options publish="host-firewall" and gateway6=nat-unprotected`},
		{opts: map[string]any{"publish": "open", "gateway6": "nat-unprotected"}},
		{opts: map[string]any{"publish": "10.0.0.0/8", "gateway4": "routed", "masquerade": "true"}},
		{opts: map[string]any{keyBinding: "::1", "binding6": "::2"}, want: "options com.docker.network.bridge.host_binding_ipv4=::1 and binding6=::2 are the same one"},
		// What a daemon's default options may hold for every network.
		{opts: map[string]any{"publish": "10.0.0.0/8", "source4": "192.0.2.1", "binding4": "127.0.0.1", "icc": "false", "gateway4": "isolated", "proxy": "false", "inhibit4": "true"}, internal: true},
	} {
		_, _, err := ParseNetworkOptions(map[string]any{keyInternal: tc.internal, keyGeneric: tc.opts})
		if tc.want == "" {
			assert.NilError(t, err, "%v", tc.opts)
			continue
		}
		assert.ErrorContains(t, err, tc.want)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
}

func TestRoutes(t *testing.T) {
	v4 := pools(&network.IPAMData{Pool: "10.1.0.0/24", Gateway: "10.1.0.1/24"}, &network.IPAMData{Pool: "10.2.0.0/24", Gateway: "10.2.0.1/24",
		AuxAddresses: map[string]any{auxGateway4: "10.2.0.254"}})
	v6 := pools(&network.IPAMData{Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"})
	route := func(to, via string) Route {
		r := Route{Destination: netip.MustParsePrefix(to)}
		if via != "" {
			r.NextHop = netip.MustParseAddr(via)
		}
		return r
	}
	for value, want := range map[string][]Route{
		"10.9.0.0/16 via 10.1.0.254,10.8.0.0/16":      {route("10.9.0.0/16", "10.1.0.254"), route("10.8.0.0/16", "")},
		" 10.9.0.0/16  via\t10.1.0.254 ; fd00:9::/64": {route("10.9.0.0/16", "10.1.0.254"), route("fd00:9::/64", "")},
		"192.0.2.7;2001:db8::7 via fd00:1::7;":        {route("192.0.2.7/32", ""), route("2001:db8::7/128", "fd00:1::7")},
		"10.1.0.0/16 via 10.1.0.2":                    {route("10.1.0.0/16", "10.1.0.2")},
		"10.9.0.0/16 via 10.2.0.1":                    {route("10.9.0.0/16", "10.2.0.1")}, // not the gateway of containers
		"0.0.0.0/1,224.0.0.0/4":                       {route("0.0.0.0/1", ""), route("224.0.0.0/4", "")},
	} {
		n, _, err := ParseNetwork("n", generic(map[string]any{"routes": value}), v4, v6)
		assert.NilError(t, err, value)
		assert.DeepEqual(t, n.Routes, want, compareNetip())
	}
	for value, want := range map[string]string{
		"":                                      `option routes="": want routes, as 10.9.0.0/16 via 10.1.0.254,10.8.0.0/16`,
		";,":                                    "want routes, as",
		"10.9.0.0/16 via":                       `option routes: route "10.9.0.0/16 via": want PREFIX or PREFIX via ADDRESS`,
		"10.9.0.0/16 10.1.0.254":                "want PREFIX or PREFIX via ADDRESS",
		"10.9.0.0/16 dev 10.1.0.254":            "want PREFIX or PREFIX via ADDRESS",
		"10.8.0.0/16, ,10.9.0.0/16":             `route " ": want PREFIX`,
		"net via 10.1.0.254":                    "want the destination as a prefix",
		"::ffff:10.9.0.0/112":                   "want the destination as a prefix",
		"fe80::1%eth0":                          "want the destination as a prefix",
		"0.0.0.0/0 via 10.1.0.254":              "a default route is made with --gateway or, if it is not the bridge, --aux-address DefaultGatewayIPv4=ADDRESS",
		"::/0":                                  "a default route is made with --gateway",
		"10.9.0.1/16":                           "the destination has bits set behind its length, want 10.9.0.0/16 or 10.9.0.1/32",
		"127.0.0.0/8":                           "the kernel routes 127.0.0.0/8 itself",
		"fe80::/64":                             "the kernel routes fe80::/64 itself",
		"0.0.0.0":                               "the kernel routes 0.0.0.0/32 itself",
		"10.9.0.0/16 via gateway":               "want the next hop as an address",
		"10.9.0.0/16 via fd00:1::7":             "want destination and next hop of one family",
		"10.9.0.0/16,10.9.0.0/16 via 10.1.0.2":  "option routes: route to 10.9.0.0/16 is there twice",
		"10.9.0.0/16 via 10.3.0.1":              "want the address of a host in a subnet of the network: it has 10.1.0.0/24, 10.2.0.0/24, fd00:1::/64",
		"10.9.0.0/16 via 10.1.0.255":            "want the address of a host",
		"10.9.0.0/16 via 10.1.0.1":              "it is the network's gateway",
		"10.9.0.0/16 via 10.2.0.254":            "it is the network's gateway",
		"10.1.0.0/24":                           "it is a subnet of the network",
		"10.1.0.128/25 via 10.1.0.254":          "the next hop is its own destination",
		strings.Repeat("10.9.0.0/16 via x,", 3): "want the next hop as an address",
	} {
		_, _, err := ParseNetwork("n", generic(map[string]any{"routes": value}), v4, v6)
		assert.ErrorContains(t, err, want)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
	_, _, err := ParseNetwork("n", generic(map[string]any{"routes": "fd00:9::/64"}), v4, nil)
	assert.ErrorContains(t, err, "option routes: route to fd00:9::/64: the network has no subnet of its family")
	many := ""
	for i := range 101 {
		many += netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}).String() + ","
	}
	_, _, err = ParseNetwork("n", generic(map[string]any{"routes": many}), v4, nil)
	assert.ErrorContains(t, err, "option routes: want at most 100 routes")
}

func TestRoutesOfAnEndpoint(t *testing.T) {
	v4 := pools(&network.IPAMData{Pool: "10.1.0.0/24", Gateway: "10.1.0.1/24"}, &network.IPAMData{Pool: "10.2.0.0/24", Gateway: "10.2.0.1/24"})
	v6 := pools(&network.IPAMData{Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"})
	n, _, err := ParseNetwork("n", generic(map[string]any{"routes": "10.9.0.0/16 via 10.1.0.254,10.8.0.0/16,fd00:9::/64 via fd00:1::fe"}), v4, v6)
	assert.NilError(t, err)
	for _, tc := range []struct {
		v4, v6, routes string
		want           []string
	}{
		{"10.1.0.2/24", "fd00:1::2/64", "", []string{"10.9.0.0/16", "10.8.0.0/16", "fd00:9::/64"}},
		{"10.1.0.2/24", "", "10.7.0.0/16 via 10.1.0.253,fd00:7::/64", []string{"10.9.0.0/16", "10.8.0.0/16", "10.7.0.0/16"}},
		{"10.2.0.2/24", "", "", []string{"10.8.0.0/16"}},
		{"10.1.0.254/24", "fd00:1::fe/64", "", []string{"10.8.0.0/16"}},
		{"", "", "10.7.0.0/16", nil},
	} {
		opts := map[string]any{}
		if tc.routes != "" {
			opts["routes"] = tc.routes
		}
		ep, _, err := ParseEndpoint(n, "e", &network.EndpointInterface{Address: tc.v4, AddressIPv6: tc.v6}, opts)
		assert.NilError(t, err)
		var got []string
		for _, r := range n.RoutesOf(ep) {
			got = append(got, r.Destination.String())
		}
		assert.DeepEqual(t, got, tc.want)
	}
	_, _, err = ParseEndpoint(n, "e", &network.EndpointInterface{Address: "10.2.0.2/24"}, map[string]any{"routes": "10.7.0.0/16 via 10.1.0.253"})
	assert.ErrorContains(t, err, "route to 10.7.0.0/16 via 10.1.0.253: want a next hop in the container's own subnet, 10.2.0.0/24")
}

func TestRates(t *testing.T) {
	for value, want := range map[string]int64{
		"8kbit": 8_000, "8000": 8_000, "8000bit": 8_000, "512kbit": 512_000, "10mbit": 10_000_000, "10Mbit": 10_000_000,
		"1gbit": 1_000_000_000, "100gbit": 100_000_000_000, "100000000000": 100_000_000_000,
	} {
		got, err := parseRate(given{"rate.in", value})
		assert.NilError(t, err, value)
		assert.Equal(t, got, want)
	}
	for _, value := range []string{
		"", "0", "bit", "7999", "7kbit", "101gbit", "100000000001", "1tbit", "1.5mbit", "-1mbit", "+8kbit", "10 mbit", "10mbps", "10m",
		"9223372036854775807gbit", "18446744073709551616", "1e6", "0x10000",
	} {
		_, err := parseRate(given{"rate.in", value})
		assert.ErrorContains(t, err, "want bits per second from 8kbit to 100gbit, as 512kbit, 10mbit or 1gbit", value)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
}
