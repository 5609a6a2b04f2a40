package bridge

import (
	"net/netip"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/hostport"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/shared/testkit"
)

func start(t *testing.T, ns *testkit.Netns) *Mode {
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
	return New(links, fw, ports)
}

// Killed after each step, and started again: to go on, or to take it all back.
func TestKilledBetweenSteps(t *testing.T) {
	for _, kind := range []string{"own", "adopted", "uplink"} {
		adopted := kind == "adopted"
		net := modetest.Network(1)
		net.NoICC, net.RateIn, net.RateOut = true, 1_000_000, 1_000_000
		if adopted {
			net.Adopted, net.AdoptedAddrs = true, gateways(net)
		}
		if kind == "uplink" {
			net.Uplink, net.Masquerade, net.SpoofCheck = "eth1", false, true
			for i, s := range net.Subnets {
				net.Subnets[i].Gateway, net.Subnets[i].ContainerGateway = netip.Addr{}, s.Gateway
			}
		}
		ep := modetest.Endpoint(modetest.Network(1), 1)
		steps := append(planNetwork(net), planEndpoint(net, ep, true)...)
		for killed := range len(steps) + 1 {
			for _, goOn := range []bool{true, false} {
				ns := testkit.NewNetns(t)
				if adopted {
					ns.Run("ip", "link", "add", net.Bridge, "address", "02:00:00:00:00:77", "type", "bridge")
					ns.Run("ip", "link", "set", net.Bridge, "up")
				}
				if kind == "uplink" {
					ns.Run("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "far1")
				}
				before := ns.Run("ip", "-br", "link") + ns.Run("ip", "-br", "-4", "addr")
				m := start(t, ns)
				for _, s := range steps[:killed] {
					_, err := m.do(t.Context(), s)
					assert.NilError(t, err)
				}
				m = start(t, ns)
				if goOn {
					assert.NilError(t, m.EnsureNetwork(t.Context(), net), "%s, killed after step %d", kind, killed)
					assert.NilError(t, m.EnsureEndpoint(t.Context(), net, ep), "%s, killed after step %d", kind, killed)
				}
				assert.NilError(t, m.RemoveEndpoint(t.Context(), net, ep))
				assert.NilError(t, m.RemoveNetwork(t.Context(), net))
				assert.Equal(t, ns.Run("ip", "-br", "link")+ns.Run("ip", "-br", "-4", "addr"), before, "%s, killed after step %d", kind, killed)
				assert.Equal(t, ns.Run("nft", "list", "ruleset"), "")
			}
		}
	}
}
