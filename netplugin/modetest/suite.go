package modetest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/options"
)

// How long a connection may take that should come about, and one that should not.
const (
	waitYes = 3 * time.Second
	waitNo  = 300 * time.Millisecond
)

// Run runs the suite.
func Run(t *testing.T, s Suite) {
	t.Run("ensuring twice is ensuring once", s.twice)
	t.Run("removing leaves nothing", s.removal)
	t.Run("removing the unknown succeeds", s.unknown)
	t.Run("failure is undone", s.failure)
	t.Run("foreign links are in the way", s.taken)
	t.Run("what is lost is made again", s.repair)
	t.Run("endpoint in a container", s.inContainer)
	t.Run("networks at the same time", s.atTheSameTime)
	for name, change := range s.Variants {
		v := s
		v.Network = func(i int) options.Network {
			n := s.Network(i)
			change(&n)
			return n
		}
		t.Run(name, func(t *testing.T) {
			t.Run("ensuring twice is ensuring once", v.twice)
			t.Run("removing leaves nothing", v.removal)
			t.Run("failure is undone", v.failure)
			t.Run("what is lost is made again", v.repair)
		})
	}
	if s.Adopts {
		t.Run("adopted bridge", s.adopted)
		t.Run("adopted bridge that is gone", s.adoptedGone)
	}
}

// one makes a host with one network and one endpoint.
func (s Suite) one(t *testing.T) (*host, Mode, options.Network, options.Endpoint) {
	t.Helper()
	h := s.newHost(t)
	m, n := s.New(t, h.ns), s.Network(1)
	ep := s.Endpoint(n, 1)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	return h, m, n, ep
}

func (s Suite) twice(t *testing.T) {
	h, m, n, ep := s.one(t)
	once := h.snapshot()
	for _, again := range []Mode{m, s.New(t, h.ns)} {
		assert.NilError(t, again.EnsureNetwork(t.Context(), n))
		assert.NilError(t, again.EnsureEndpoint(t.Context(), n, ep))
		assert.Equal(t, h.snapshot(), once)
	}
	l, ok, err := h.links.Get(ep.ContainerLink)
	assert.NilError(t, err)
	assert.Assert(t, ok)
	if ep.MAC != nil {
		assert.Equal(t, l.MAC.String(), ep.MAC.String())
	}
	assert.Equal(t, l.MTU, n.MTU)
	assert.Assert(t, !l.Up)
	addrs, err := h.links.Addrs(ep.ContainerLink)
	assert.NilError(t, err)
	assert.Equal(t, len(addrs), 0)
}

func (s Suite) removal(t *testing.T) {
	h := s.newHost(t)
	m, n, other := s.New(t, h.ns), s.Network(1), s.Network(2)
	ep, second := s.Endpoint(n, 1), s.Endpoint(n, 2)
	empty := h.snapshot()
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	one := h.snapshot()
	assert.NilError(t, m.EnsureNetwork(t.Context(), other))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, second))
	for range 2 {
		assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))
		assert.NilError(t, m.RemoveNetwork(t.Context(), other))
	}
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, second))
	assert.Equal(t, h.snapshot(), one)
	// With an endpoint left on it.
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
	assert.Equal(t, h.snapshot(), empty)
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))
}

func (s Suite) unknown(t *testing.T) {
	h := s.newHost(t)
	m, n := s.New(t, h.ns), s.Network(1)
	empty := h.snapshot()
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, s.Endpoint(n, 1)))
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
	assert.Equal(t, h.snapshot(), empty)
}

func (s Suite) failure(t *testing.T) {
	h := s.newHost(t)
	m, n := s.New(t, h.ns), s.Network(1)
	assert.NilError(t, m.EnsureNetwork(t.Context(), s.Network(2)))
	h.failEverywhere(m, n, s.Endpoint(n, 1))
}

// failEverywhere makes a network and an endpoint, which exist or not, after it has
// failed at each place.
func (h *host) failEverywhere(m Mode, n options.Network, ep options.Endpoint) {
	h.t.Helper()
	ensureNetwork := func(ctx context.Context) error { return m.EnsureNetwork(ctx, n) }
	ensureEndpoint := func(ctx context.Context) error { return m.EnsureEndpoint(ctx, n, ep) }
	// What exists is not taken away by a repair that fails.
	for range 2 {
		assert.Assert(h.t, h.untilItWorks(ensureNetwork) > 0)
		assert.Assert(h.t, h.untilItWorks(ensureEndpoint) > 0)
	}
}

// untilItWorks fails at one place after the other and returns how many there are.
func (h *host) untilItWorks(call func(context.Context) error) (failures int) {
	h.t.Helper()
	before := h.snapshot()
	for {
		err := call(limit(h.t.Context(), failures))
		if err == nil {
			return failures
		}
		assert.Assert(h.t, errors.Is(err, errUp), "%v", err)
		assert.Equal(h.t, h.snapshot(), before, "after failure %d", failures)
		failures++
		assert.Assert(h.t, failures < 100)
	}
}

func (s Suite) taken(t *testing.T) {
	n := s.Network(1)
	ep := s.Endpoint(n, 1)
	for _, name := range s.NetworkLinks(n) {
		h := s.newHost(t)
		m := s.New(t, h.ns)
		h.ns.Run("ip", "link", "add", name, "type", "bridge")
		before := h.snapshot()
		err := m.EnsureNetwork(t.Context(), n)
		assert.Assert(t, errdefs.IsConflict(err), "%s: %v", name, err)
		assert.ErrorContains(t, err, name)
		assert.Equal(t, h.snapshot(), before)
	}
	for _, name := range s.EndpointLinks(ep) {
		h := s.newHost(t)
		m := s.New(t, h.ns)
		assert.NilError(t, m.EnsureNetwork(t.Context(), n))
		h.ns.Run("ip", "link", "add", name, "type", "bridge")
		before := h.snapshot()
		err := m.EnsureEndpoint(t.Context(), n, ep)
		assert.Assert(t, errdefs.IsConflict(err), "%s: %v", name, err)
		assert.ErrorContains(t, err, name)
		assert.Equal(t, h.snapshot(), before)
	}
}

func (s Suite) repair(t *testing.T) {
	h, m, n, ep := s.one(t)
	want := h.snapshot()
	lose := func() {
		owned, err := h.links.Owned()
		assert.NilError(t, err)
		assert.Assert(t, len(owned) > 0)
		for _, l := range owned {
			assert.NilError(t, h.links.Delete(l.Name, l.Owner))
		}
	}
	flush := func() { h.ns.Run("nft", "flush", "ruleset") }
	damages := []func(){lose}
	if !s.NoRules {
		damages = append(damages, flush, func() { lose(); flush() })
	}
	for _, damage := range damages {
		for _, with := range []func() Mode{func() Mode { return m }, func() Mode { return s.New(t, h.ns) }} {
			damage()
			assert.Assert(t, h.snapshot() != want)
			mode := with()
			assert.NilError(t, mode.EnsureNetwork(t.Context(), n))
			assert.NilError(t, mode.EnsureEndpoint(t.Context(), n, ep))
			assert.Equal(t, h.snapshot(), want)
		}
	}
	// A reboot, down to the MACs that neighbours remember.
	rebooted, _, _, _ := s.one(t)
	assert.Equal(t, rebooted.snapshot(), want)
}

func (s Suite) inContainer(t *testing.T) {
	h, m, n, ep := s.one(t)
	other := s.Endpoint(n, 2)
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, other))
	first, second := h.plug(n, ep), h.plug(n, other)
	talk := func() {
		t.Helper()
		assert.Equal(t, first.Call(other.IPv4.Addr().String(), waitYes), ep.IPv4.Addr().String())
		assert.Equal(t, second.Call(ep.IPv6.Addr().String(), waitYes), other.IPv6.Addr().String())
	}
	talk()
	// Another network is out of reach.
	apart := s.Network(2)
	stranger := s.Endpoint(apart, 1)
	assert.NilError(t, m.EnsureNetwork(t.Context(), apart))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), apart, stranger))
	third := h.plug(apart, stranger)
	assert.Equal(t, third.Call(ep.IPv4.Addr().String(), waitNo), "")
	assert.Equal(t, first.Call(stranger.IPv6.Addr().String(), waitNo), "")

	// Berth starts again, somebody has flushed the rules: containers live on.
	h.ns.Run("nft", "flush", "ruleset")
	m = s.New(t, h.ns)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	talk()

	// The container stops: dockerd may have brought its end back, or not.
	first.Run("ip", "link", "set", "eth0", "netns", h.ns.Path(), "name", ep.ContainerLink)
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, other))
	_, err := second.Try("ip", "link", "show", "dev", "eth0")
	assert.Assert(t, err != nil, "the link is still in the container")
	for _, name := range append(s.EndpointLinks(ep), s.EndpointLinks(other)...) {
		_, ok, err := h.links.Get(name)
		assert.NilError(t, err)
		assert.Assert(t, !ok, "link %s is left", name)
	}
}

func (s Suite) atTheSameTime(t *testing.T) {
	h := s.newHost(t)
	m := s.New(t, h.ns)
	empty := h.snapshot()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			n := s.Network(i)
			ep := s.Endpoint(n, 1)
			assert.Check(t, m.EnsureNetwork(t.Context(), n))
			assert.Check(t, m.EnsureEndpoint(t.Context(), n, ep))
			assert.Check(t, m.RemoveEndpoint(t.Context(), n, ep))
			assert.Check(t, m.RemoveNetwork(t.Context(), n))
		}()
	}
	wg.Wait()
	assert.Equal(t, h.snapshot(), empty)
}
