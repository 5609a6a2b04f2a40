package bridge

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

func comparers() cmp.Options {
	return cmp.Options{
		cmp.AllowUnexported(checkForwarding{}, enableForwarding{}, ensureRules{}, setAddrs{}),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	}
}

func TestPlanOfNetwork(t *testing.T) {
	pool4, pool6 := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00:1::/64")
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
	veth := ensureVeth{link.Veth{Host: "bv1", Container: "bc1", EndpointID: "e", Master: "bth1", MAC: ep.MAC, MTU: 9000}}
	assert.DeepEqual(t, planEndpoint(n, ep), []step{enableForwarding{firewall.Network{Bridge: "bth1"}}, veth}, comparers())
	n.Internal = true
	assert.DeepEqual(t, planEndpoint(n, ep), []step{veth}, comparers())
}

func TestBridgeMAC(t *testing.T) {
	mac := bridgeMAC("n")
	assert.Equal(t, mac.String(), bridgeMAC("n").String())
	assert.Assert(t, mac.String() != bridgeMAC("m").String())
	assert.Equal(t, mac[0]&0x03, byte(0x02))
}
