package modetest

import (
	"net/netip"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/options"
)

// adopt makes a network's bridge as an administrator does, with a port and an
// address, and returns the network on it.
func (h *host) adopt(n options.Network) options.Network {
	h.t.Helper()
	h.ns.Run("ip", "link", "add", n.Bridge, "address", "02:00:00:00:00:77", "type", "bridge")
	h.ns.Run("ip", "link", "set", n.Bridge, "alias", "the office", "group", "7", "mtu", "1400", "up")
	h.ns.Run("ip", "addr", "add", "192.0.2.1/24", "dev", n.Bridge)
	h.ns.Run("ip", "link", "add", "tap", "mtu", "1400", "master", n.Bridge, "type", "veth", "peer", "name", "tap0")
	n.Adopted, n.MTU = true, 1400
	for _, s := range n.Subnets {
		n.AdoptedAddrs = append(n.AdoptedAddrs, netip.PrefixFrom(s.Gateway, s.Pool.Bits()))
	}
	return n
}

func (s Suite) adopted(t *testing.T) {
	h := s.newHost(t)
	m, n := s.New(t, h.ns), h.adopt(s.Network(1))
	ep := s.Endpoint(n, 1)
	untouched := h.snapshot()
	for _, last := range []Mode{m, s.New(t, h.ns)} {
		h.failEverywhere(m, n, ep)
		made := h.snapshot()
		assert.Assert(t, made != untouched)
		assert.NilError(t, last.EnsureNetwork(t.Context(), n))
		assert.NilError(t, last.EnsureEndpoint(t.Context(), n, ep))
		assert.Equal(t, h.snapshot(), made)
		for range 2 {
			assert.NilError(t, last.RemoveEndpoint(t.Context(), n, ep))
		}
		for range 2 {
			assert.NilError(t, last.RemoveNetwork(t.Context(), n))
		}
		assert.Equal(t, h.snapshot(), untouched)
	}
	// With an endpoint left on it, and an address lost and found.
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	made := h.snapshot()
	h.ns.Run("ip", "addr", "del", n.AdoptedAddrs[0].String(), "dev", n.Bridge)
	h.ns.Run("ip", "link", "set", ep.HostLink, "nomaster", "down")
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	assert.Equal(t, h.snapshot(), made)
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
	assert.Equal(t, h.snapshot(), untouched)

	// An address that the bridge had is not taken from it.
	had := n
	had.AdoptedAddrs = n.AdoptedAddrs[1:]
	h.ns.Run("ip", "addr", "add", n.AdoptedAddrs[0].String(), "dev", n.Bridge)
	untouched = h.snapshot()
	assert.NilError(t, m.EnsureNetwork(t.Context(), had))
	assert.NilError(t, m.RemoveNetwork(t.Context(), had))
	assert.Equal(t, h.snapshot(), untouched)
}

func (s Suite) adoptedGone(t *testing.T) {
	h := s.newHost(t)
	m, n := s.New(t, h.ns), h.adopt(s.Network(1))
	ep := s.Endpoint(n, 1)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	h.ns.Run("ip", "link", "del", n.Bridge)
	before := h.snapshot()
	err := m.EnsureNetwork(t.Context(), n)
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.ErrorContains(t, err, n.Bridge)
	assert.Equal(t, h.snapshot(), before)
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
	// It is back, as after a reboot.
	h.ns.Run("ip", "link", "del", "tap")
	n = h.adopt(s.Network(1))
	assert.NilError(t, s.New(t, h.ns).EnsureNetwork(t.Context(), n))
}
