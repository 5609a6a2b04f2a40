package bridge

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

func comparers() cmp.Options {
	return cmp.Options{
		cmp.AllowUnexported(checkForwarding{}, enableForwarding{}, ensureRules{}, plugUplink{}, setAddrs{}, adoptBridge{}, ensureVeth{}),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	}
}

func TestPlanOfNetwork(t *testing.T) {
	pool4, pool6 := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00:1::/64")
	other4 := netip.MustParsePrefix("10.2.0.0/16")
	gw4, gw6 := netip.MustParseAddr("10.1.0.254"), netip.MustParseAddr("fd00:1::1")
	base := options.Network{ID: "n", Bridge: "bth1", MTU: 1400, Masquerade: true}
	with := func(change func(*options.Network)) options.Network {
		n := base
		change(&n)
		return n
	}
	bridge := func(mtu int, v6 bool) step {
		return ensureBridge{link.Bridge{Name: "bth1", NetworkID: "n", MAC: bridgeMAC("n"), MTU: mtu, IPv6: v6}}
	}
	for _, c := range []struct {
		name string
		in   options.Network
		want []step
	}{
		{"null IPAM", base, []step{
			checkForwarding{firewall.Network{Bridge: "bth1", Masquerade: true}},
			ensureRules{firewall.Network{Bridge: "bth1", Masquerade: true}},
			bridge(1400, false),
			setAddrs{link: "bth1"},
		}},
		{"dual", with(func(n *options.Network) {
			n.Subnets = []options.Subnet{{Pool: pool4, Gateway: gw4}, {Pool: pool6, Gateway: gw6}}
		}), []step{
			checkForwarding{firewall.Network{Bridge: "bth1", Masquerade: true, Subnets: []netip.Prefix{pool4, pool6}}},
			ensureRules{firewall.Network{Bridge: "bth1", Masquerade: true, Subnets: []netip.Prefix{pool4, pool6}}},
			bridge(1400, true),
			setAddrs{"bth1", []netip.Prefix{netip.PrefixFrom(gw4, 24), netip.PrefixFrom(gw6, 64)}},
		}},
		{"internal keeps its gateway", with(func(n *options.Network) {
			n.Internal, n.MTU = true, 0
			n.Subnets = []options.Subnet{{Pool: pool4, Gateway: gw4}}
		}), []step{
			ensureRules{firewall.Network{Bridge: "bth1", Internal: true, Masquerade: true, Subnets: []netip.Prefix{pool4}}},
			bridge(0, false),
			setAddrs{"bth1", []netip.Prefix{netip.PrefixFrom(gw4, 24)}},
		}},
		{"several subnets", with(func(n *options.Network) {
			n.Internal = true
			n.Subnets = []options.Subnet{{Pool: pool4, Gateway: gw4}, {Pool: other4, Gateway: other4.Addr().Next()}, {Pool: pool6, Gateway: gw6}}
		}), []step{
			ensureRules{firewall.Network{Bridge: "bth1", Internal: true, Masquerade: true, Subnets: []netip.Prefix{pool4, other4, pool6}}},
			bridge(1400, true),
			setAddrs{"bth1", []netip.Prefix{netip.PrefixFrom(gw4, 24), netip.PrefixFrom(other4.Addr().Next(), 16), netip.PrefixFrom(gw6, 64)}},
		}},
		{"uplink", with(func(n *options.Network) {
			n.Uplink, n.NoICC, n.Masquerade = "eth1", true, false
			n.Subnets = []options.Subnet{{Pool: pool4, ContainerGateway: gw4}, {Pool: pool6, ContainerGateway: gw6}}
		}), []step{
			ensureRules{firewall.Network{Bridge: "bth1", Internal: true, Switched: true, Subnets: []netip.Prefix{pool4, pool6}}},
			bridge(1400, false),
			setAddrs{link: "bth1"},
			plugUplink{with(func(n *options.Network) {
				n.Uplink, n.NoICC, n.Masquerade = "eth1", true, false
				n.Subnets = []options.Subnet{{Pool: pool4, ContainerGateway: gw4}, {Pool: pool6, ContainerGateway: gw6}}
			})},
		}},
		{"isolated IPv6", with(func(n *options.Network) {
			n.Internal, n.IPv6.Mode = true, options.GatewayIsolated
			n.Subnets = []options.Subnet{{Pool: pool4, Gateway: gw4}, {Pool: pool6, Gateway: gw6}}
		}), []step{
			ensureRules{firewall.Network{
				Bridge: "bth1", Internal: true, Masquerade: true, Subnets: []netip.Prefix{pool4, pool6}, IPv6: options.Family{Mode: options.GatewayIsolated},
			}},
			bridge(1400, false),
			setAddrs{"bth1", []netip.Prefix{netip.PrefixFrom(gw4, 24)}},
		}},
		{"isolated IPv4, inhibited", with(func(n *options.Network) {
			n.Internal, n.IPv4.Mode, n.InhibitIPv4 = true, options.GatewayIsolated, true
			n.Subnets = []options.Subnet{{Pool: pool4, Gateway: gw4}, {Pool: pool6, Gateway: gw6}}
		}), []step{
			ensureRules{firewall.Network{
				Bridge: "bth1", Internal: true, Masquerade: true, Subnets: []netip.Prefix{pool4, pool6}, IPv4: options.Family{Mode: options.GatewayIsolated},
			}},
			bridge(1400, true),
			setAddrs{"bth1", []netip.Prefix{netip.PrefixFrom(gw6, 64)}},
		}},
		{"adopted", with(func(n *options.Network) {
			n.Internal, n.Adopted, n.AdoptedAddrs = true, true, []netip.Prefix{netip.PrefixFrom(gw6, 64)}
			n.Subnets = []options.Subnet{{Pool: pool4, Gateway: gw4}, {Pool: pool6, Gateway: gw6}}
		}), []step{
			ensureRules{firewall.Network{Bridge: "bth1", Internal: true, Masquerade: true, Subnets: []netip.Prefix{pool4, pool6}}},
			adoptBridge{"bth1", []netip.Prefix{netip.PrefixFrom(gw6, 64)}},
		}},
		{"no gateway", with(func(n *options.Network) {
			n.Subnets = []options.Subnet{{Pool: pool4}}
		}), []step{
			checkForwarding{firewall.Network{Bridge: "bth1", Masquerade: true, Subnets: []netip.Prefix{pool4}}},
			ensureRules{firewall.Network{Bridge: "bth1", Masquerade: true, Subnets: []netip.Prefix{pool4}}},
			bridge(1400, false),
			setAddrs{link: "bth1"},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			assert.DeepEqual(t, planNetwork(c.in), c.want, comparers())
		})
	}
}

func TestPlanOfEndpoint(t *testing.T) {
	n := options.Network{ID: "n", Bridge: "bth1", MTU: 9000}
	ep := options.Endpoint{ID: "e", NetworkID: "n", HostLink: "bv1", ContainerLink: "bc1", MAC: []byte{2, 0, 0, 0, 0, 1}}
	veth := ensureVeth{Veth: link.Veth{Host: "bv1", Container: "bc1", EndpointID: "e", Master: "bth1", MAC: ep.MAC, MTU: 9000}}
	assert.DeepEqual(t, planEndpoint(n, ep, true), []step{enableForwarding{firewall.Network{Bridge: "bth1"}}, veth}, comparers())
	n.Internal = true
	assert.DeepEqual(t, planEndpoint(n, ep, true), []step{veth}, comparers())

	n.NoICC, n.RateIn, n.RateOut = true, 10, 20
	ep.RateOut = 30
	ep.Ports = []options.PublishedPort{{Proto: options.TCP, Count: 1}}
	ep.IPv4, ep.IPv6 = netip.MustParsePrefix("10.1.0.2/24"), netip.MustParsePrefix("fd00::2/64")
	veth.Port, veth.RateIn, veth.RateOut = link.Port{Hairpin: true, Isolated: true}, 10, 30
	veth.addrs = []netip.Addr{ep.IPv4.Addr(), ep.IPv6.Addr()}
	assert.DeepEqual(t, planEndpoint(n, ep, false), []step{veth}, comparers())
	veth.Port.Isolated = false
	assert.DeepEqual(t, planEndpoint(n, ep, true), []step{veth}, comparers())
	ep.Ports, veth.Port = nil, link.Port{Isolated: true}
	assert.DeepEqual(t, planEndpoint(n, ep, true), []step{veth}, comparers())
}

func TestAllOfANetworkReachesTheFirewall(t *testing.T) {
	pool := netip.MustParsePrefix("10.1.0.0/24")
	n := options.Network{
		ID: "n", Bridge: "bth1", MTU: 1400, Internal: true, Masquerade: true, Subnets: []options.Subnet{{Pool: pool}},
		IPv4: options.Family{Mode: options.GatewayRouted}, IPv6: options.Family{Mode: options.GatewayUnprotected, Source: netip.MustParseAddr("fd00::1")},
		NoICC: true, HostFirewall: true, Sources: []netip.Prefix{pool}, Trusted: []string{"eth0"},
	}
	got := FirewallNetwork(n)
	assert.DeepEqual(t, got, firewall.Network{
		Bridge: "bth1", Internal: true, Masquerade: true, Subnets: []netip.Prefix{pool}, IPv4: n.IPv4, IPv6: n.IPv6,
		NoICC: true, HostFirewall: true, Sources: n.Sources, Trusted: n.Trusted,
	}, comparers())
	// A field that is new there is not forgotten here. Only an uplink is switched, and
	// for it others mean nothing: TestPlanOfNetwork has it.
	for v, i := reflect.ValueOf(got), 0; i < v.NumField(); i++ {
		name := v.Type().Field(i).Name
		assert.Assert(t, name == "Switched" || !v.Field(i).IsZero(), name)
	}
}

func TestPortsOnLoopback(t *testing.T) {
	any4, lo, lan := netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("192.0.2.1")
	c4, c6, any6 := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00::2"), netip.IPv6Unspecified()
	for _, c := range []struct {
		name            string
		net             options.Network
		host, container netip.Addr
		want            bool
	}{
		{name: "all", host: any4, container: c4, want: true},
		{name: "loopback", host: lo, container: c4, want: true},
		{name: "unprotected", net: options.Network{IPv4: options.Family{Mode: options.GatewayUnprotected}}, host: lo, container: c4, want: true},
		{name: "LAN", host: lan, container: c4},
		{name: "IPv6", host: any6, container: c6},
		{name: "from IPv6 by the proxy", host: any6, container: c4},
		{name: "direct", net: options.Network{IPv4: options.Family{Mode: options.GatewayRouted}}, container: c4},
		{name: "routed", net: options.Network{IPv4: options.Family{Mode: options.GatewayRouted}}, host: any4, container: c4},
		{name: "internal", net: options.Network{Internal: true}, host: any4, container: c4},
	} {
		ep := options.Endpoint{Ports: []options.PublishedPort{{Proto: options.TCP, Host: c.host, HostPort: 80, Container: c.container, ContainerPort: 80, Count: 1}}}
		assert.Equal(t, onLoopback(c.net, ep), c.want, c.name)
		assert.Equal(t, onLoopback(c.net, options.Endpoint{}), false, c.name)
	}
}

func TestFlowsOfPorts(t *testing.T) {
	host4, c4, c6, any6 := netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00::2"), netip.IPv6Unspecified()
	ep := options.Endpoint{Ports: []options.PublishedPort{
		{Proto: options.TCP, Host: host4, HostPort: 80, Container: c4, ContainerPort: 80, Count: 1},
		{Proto: options.UDP, Host: host4, HostPort: 53, Container: c4, ContainerPort: 1053, Count: 2},
		{Proto: options.UDP, Host: any6, HostPort: 53, Container: c4, ContainerPort: 1053, Count: 2},
		{Proto: options.SCTP, Container: c6, ContainerPort: 7, Count: 1},
	}}
	assert.DeepEqual(t, forwards(ep), []link.Forward{{Proto: 17, Host: host4, HostPort: 53, Container: c4, Port: 1053, Count: 2}}, comparers())
	assert.DeepEqual(t, answers(ep), []netip.Addr{c4, c6}, comparers())
	ep.Ports = ep.Ports[:1]
	assert.Equal(t, len(forwards(ep))+len(answers(ep)), 0)
}

func TestBridgesThatFit(t *testing.T) {
	pool, gw := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParseAddr("10.1.0.1")
	n := options.Network{Subnets: []options.Subnet{{Pool: pool, Gateway: gw}, {Pool: netip.MustParsePrefix("fd00::/64"), Gateway: netip.MustParseAddr("fd00::1")}}}
	inhibited := n
	inhibited.InhibitIPv4 = true
	for _, c := range []struct {
		net  options.Network
		have []string
		want string
	}{
		{net: n},
		{net: n, have: []string{"10.1.0.1/24"}},
		{net: n, have: []string{"10.1.0.1/16", "10.1.0.7/24"}},
		{net: n, have: []string{"192.0.2.1/24", "fd00::9/64"}},
		{net: n, have: []string{"10.1.0.7/24"}, want: `bridge "lan" has the address 10.1.0.7, but the gateway of subnet 10.1.0.0/24 is 10.1.0.1`},
		{net: inhibited, have: []string{"10.1.0.7/24"}},
	} {
		var have []netip.Prefix
		for _, s := range c.have {
			have = append(have, netip.MustParsePrefix(s))
		}
		err := fits("lan", have, c.net)
		if c.want == "" {
			assert.NilError(t, err)
			continue
		}
		assert.ErrorContains(t, err, c.want)
		assert.Assert(t, errdefs.IsConflict(err))
	}
}

func TestBridgeMAC(t *testing.T) {
	mac := bridgeMAC("n")
	assert.Equal(t, mac.String(), bridgeMAC("n").String())
	assert.Assert(t, mac.String() != bridgeMAC("m").String())
	assert.Equal(t, mac[0]&0x03, byte(0x02))
}
