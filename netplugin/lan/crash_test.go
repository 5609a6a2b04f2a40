package lan

import (
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

func start(t *testing.T, ns *testkit.Netns) *Mode {
	t.Helper()
	links, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(links.Close)
	return New(links)
}

// Killed after each step, and started again: to go on, or to take it all back.
func TestKilledBetweenSteps(t *testing.T) {
	access := modetest.LANNetwork(options.ModeMacvlan, 1)
	access.LAN.HostAccess = true
	private := modetest.LANNetwork(options.ModeMacvlan, 1)
	private.LAN.Parent = ""
	for _, n := range []options.Network{access, private} {
		ep := modetest.LANEndpoint(n, 1)
		steps := append(planNetwork(n), planEndpoint(n, ep)...)
		for killed := range len(steps) + 1 {
			for _, goOn := range []bool{true, false} {
				ns := testkit.NewNetns(t)
				modetest.PrepareLAN(ns)
				state := func() string {
					return ns.Run("ip", "-br", "link") + ns.Run("ip", "-br", "addr") + ns.Run("ip", "route")
				}
				before := state()
				m := start(t, ns)
				m.networks[n.ID] = n
				for _, s := range steps[:killed] {
					_, err := m.do(t.Context(), s)
					assert.NilError(t, err)
				}
				m = start(t, ns)
				assert.NilError(t, m.Restore(t.Context(), []options.Network{n}, nil))
				if goOn {
					assert.NilError(t, m.EnsureNetwork(t.Context(), n), "killed after step %d", killed)
					assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep), "killed after step %d", killed)
				}
				assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))
				assert.NilError(t, m.RemoveNetwork(t.Context(), n))
				assert.Equal(t, state(), before, "killed after step %d", killed)
			}
		}
	}
}
