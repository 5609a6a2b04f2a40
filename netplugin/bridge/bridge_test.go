package bridge_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/bridge"
	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/hostport"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

func mode(t testing.TB, ns *testkit.Netns) *bridge.Mode {
	t.Helper()
	links, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(links.Close)
	fw, err := firewall.New(firewall.Options{Links: links})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, fw.Close()) })
	ports, err := hostport.New(hostport.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, ports.Close()) })
	return bridge.New(links, fw, ports)
}

func TestContract(t *testing.T) {
	modetest.Run(t, modetest.Suite{
		New:           func(t testing.TB, ns *testkit.Netns) modetest.Mode { return mode(t, ns) },
		Network:       modetest.Network,
		Endpoint:      modetest.Endpoint,
		NetworkLinks:  func(n options.Network) []string { return []string{n.Bridge} },
		EndpointLinks: func(ep options.Endpoint) []string { return []string{ep.HostLink, ep.ContainerLink} },
		Variants:      modetest.Variants(),
		Adopts:        true,
	})
}

func TestInternalNetworkHasItsGatewayAddressAndTurnsNothingOn(t *testing.T) {
	ns := testkit.NewNetns(t)
	ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
	m, n := mode(t, ns), modetest.Network(1)
	n.Internal = true
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, modetest.Endpoint(n, 1)))
	assert.Assert(t, strings.Contains(ns.Run("ip", "addr", "show", "dev", n.Bridge), n.Subnets[0].Gateway.String()+"/24"))
	assert.Equal(t, ns.Run("cat", "/proc/sys/net/ipv4/ip_forward"), "0")
}

// dockerd gives FORWARD its policy DROP only when it is the one to turn
// forwarding on: at boot it must find it off.
func TestForwardingWaitsForTheFirstEndpoint(t *testing.T) {
	ns := testkit.NewNetns(t)
	ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
	m, n := mode(t, ns), modetest.Network(1)
	forwarding := func() string {
		return ns.Run("cat", "/proc/sys/net/ipv4/ip_forward") + ns.Run("cat", "/proc/sys/net/ipv6/conf/all/forwarding")
	}
	assert.NilError(t, m.Restore(t.Context(), []options.Network{n}, nil))
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.Equal(t, forwarding(), "00")
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, modetest.Endpoint(n, 1)))
	assert.Equal(t, forwarding(), "11")
}

func TestNetworkWithoutAddresses(t *testing.T) {
	ns := testkit.NewNetns(t)
	m, n := mode(t, ns), modetest.Network(1)
	n.Subnets, n.MTU = nil, 0
	ep := modetest.Endpoint(modetest.Network(1), 1)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	assert.Assert(t, strings.Contains(ns.Run("ip", "link", "show", n.Bridge), "mtu 1500"))
	assert.Equal(t, ns.Run("ip", "-6", "addr", "show", "dev", n.Bridge), "")
}

func TestRestoreForgetsNetworksThatAreGone(t *testing.T) {
	ns := testkit.NewNetns(t)
	n, old := modetest.Network(1), modetest.Network(2)
	before := mode(t, ns)
	assert.NilError(t, before.EnsureNetwork(t.Context(), n))
	assert.NilError(t, before.EnsureNetwork(t.Context(), old))
	m := mode(t, ns)
	assert.NilError(t, m.Restore(t.Context(), []options.Network{n}, nil))
	rules := ns.Run("nft", "list", "ruleset")
	assert.Assert(t, strings.Contains(rules, n.Bridge) && !strings.Contains(rules, old.Bridge), rules)
	assert.NilError(t, m.Restore(t.Context(), nil, nil))
	assert.Equal(t, ns.Run("nft", "list", "ruleset"), "")
}

func TestEndpointNeedsItsNetwork(t *testing.T) {
	m, n := mode(t, testkit.NewNetns(t)), modetest.Network(1)
	err := m.EnsureEndpoint(t.Context(), n, modetest.Endpoint(n, 1))
	assert.ErrorContains(t, err, n.Bridge)
}

func benchmarkEndpoint(b *testing.B, others int) {
	m := mode(b, testkit.NewNetns(b))
	var networks []options.Network
	for i := range others + 1 {
		n := modetest.Network(1)
		n.ID, n.Bridge = fmt.Sprintf("n%d", i), fmt.Sprintf("bth%d", i)
		n.Subnets = []options.Subnet{{Pool: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)}}
		networks = append(networks, n)
	}
	assert.NilError(b, m.Restore(b.Context(), networks, nil))
	n := networks[0]
	assert.NilError(b, m.EnsureNetwork(b.Context(), n))
	ep := modetest.Endpoint(modetest.Network(1), 1)
	for b.Loop() {
		assert.NilError(b, m.EnsureEndpoint(b.Context(), n, ep))
		assert.NilError(b, m.RemoveEndpoint(b.Context(), n, ep))
	}
}

// A round is EnsureEndpoint and RemoveEndpoint.
func BenchmarkEndpointAlone(b *testing.B)          { benchmarkEndpoint(b, 0) }
func BenchmarkEndpointBesideThousand(b *testing.B) { benchmarkEndpoint(b, 1000) }
