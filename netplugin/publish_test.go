package netplugin

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/options"
)

// hostPorts are those that the endpoint publishes on the host.
func (e *testEnv) hostPorts(c *container) []uint16 {
	var out []uint16
	for _, p := range e.host.ports[c.endpoint] {
		out = append(out, p.HostPort)
	}
	slices.Sort(out)
	return out
}

func TestProgramReplacesWhatIsPublished(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	c := mustRun(t, e, n, "c", "")
	assert.NilError(t, e.program(c, port{8080, 80}, port{8081, 81}))
	assert.DeepEqual(t, e.hostPorts(c), []uint16{8080, 8081})
	assert.NilError(t, e.program(c, port{8081, 81}))
	assert.DeepEqual(t, e.hostPorts(c), []uint16{8081})
	e.healthy()
	assert.NilError(t, e.program(c))
	assert.Equal(t, len(e.host.ports)+len(e.host.reserved), 0)
	e.healthy()
}

func TestAPortInUseFailsTheStartAndLeavesNothing(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	first, second := mustRun(t, e, n, "first", ""), mustRun(t, e, n, "second", "")
	assert.NilError(t, e.program(first, port{8080, 80}))
	err := e.program(second, port{8080, 80})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "already allocated")
	assert.Equal(t, len(e.hostPorts(second)), 0)
	assert.DeepEqual(t, e.hostPorts(first), []uint16{8080})
	e.healthy()
}

// A container whose end Berth was not told of does not keep its ports from others.
func TestPortsOfDeadContainersAreFreed(t *testing.T) {
	e := newEnv(t)
	n, other := mustNetwork(t, e, "net", "10.1.0.0/24"), mustNetwork(t, e, "other", "10.2.0.0/24")
	dead, next := mustRun(t, e, n, "dead", ""), mustRun(t, e, other, "next", "")
	assert.NilError(t, e.program(dead, port{8080, 80}))
	e.host.mu.Lock()
	delete(e.host.moved, dead.endpoint)
	e.host.mu.Unlock()
	assert.Assert(t, errdefs.IsConflict(e.program(next, port{8080, 80})), "dockerd may be about to move its link")
	e.host.mu.Lock()
	delete(e.host.endpoints, dead.endpoint)
	e.host.mu.Unlock()
	assert.NilError(t, e.program(next, port{8080, 80}))
	assert.DeepEqual(t, e.hostPorts(next), []uint16{8080})
	_, known := e.d.store.endpoint(n.id, dead.endpoint)
	assert.Assert(t, !known)
}

// Each of the three calls at a container's end is enough, in any order.
func TestAnyCallAtTheEndUnpublishes(t *testing.T) {
	for name, end := range map[string]func(e *testEnv, c *container) error{
		"Revoke": func(e *testEnv, c *container) error {
			return e.net.RevokeExternalConnectivity(t.Context(), &network.RevokeExternalConnectivityRequest{NetworkID: c.net.id, EndpointID: c.endpoint})
		},
		"Leave": func(e *testEnv, c *container) error {
			return e.net.Leave(t.Context(), &network.LeaveRequest{NetworkID: c.net.id, EndpointID: c.endpoint})
		},
		"DeleteEndpoint": func(e *testEnv, c *container) error {
			return e.net.DeleteEndpoint(t.Context(), &network.DeleteEndpointRequest{NetworkID: c.net.id, EndpointID: c.endpoint})
		},
		"DeleteNetwork": func(e *testEnv, c *container) error {
			return e.net.DeleteNetwork(t.Context(), &network.DeleteNetworkRequest{NetworkID: c.net.id})
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			n := mustNetwork(t, e, "net", "10.1.0.0/24")
			c := mustRun(t, e, n, "c", "")
			assert.Equal(t, len(e.hostPorts(c)), 1)
			for range 2 {
				assert.NilError(t, end(e, c))
				assert.Equal(t, len(e.host.ports)+len(e.host.reserved), 0)
			}
			e.restart()
			assert.Equal(t, len(e.host.ports)+len(e.host.reserved), 0)
		})
	}
}

// A port that somebody takes while the daemon is away is missing, and nothing else.
func TestAPortTakenMeanwhileDoesNotBreakTheNetwork(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	c := mustRun(t, e, n, "c", "")
	e.host.portsBroken = errInjected
	e.restart()
	assert.Assert(t, !e.d.isBroken(n.id))
	mustNetwork(t, e, "other", "10.2.0.0/24")
	e.d.tick(t.Context())
	assert.Equal(t, len(e.host.reserved[c.endpoint]), 0)
	e.host.portsBroken = nil
	e.d.tick(t.Context())
	assert.Assert(t, slices.Equal(e.host.reserved[c.endpoint], e.host.ports[c.endpoint]))
	e.healthy()
}

func TestInternalNetworksPublishNothing(t *testing.T) {
	e := newEnv(t)
	n, err := e.createNetwork("net", "10.1.0.0/24", map[string]any{})
	assert.NilError(t, err)
	rec, _ := e.d.store.network(n.id)
	rec.Spec.Internal = true
	e.d.store.mu.Lock()
	e.d.store.networks[n.id].rec = rec
	e.d.store.mu.Unlock()
	c := mustRun(t, e, n, "c", "")
	assert.Equal(t, len(e.host.ports), 0)
	assert.NilError(t, e.program(c, port{8080, 80}))
	assert.Equal(t, len(e.host.ports), 0)
}

func TestJoinGivesRoutesOfTheFamiliesThatTheEndpointHas(t *testing.T) {
	net := options.Network{Routes: []options.Route{route("10.9.0.0/16", "10.1.0.9"), route("fd00:9::/64", "fd00:1::9")}}
	ep := options.Endpoint{IPv4: prefix("10.1.0.2/24"), Routes: []options.Route{route("10.8.0.0/16", "")}}
	got := staticRoutes(net, ep)
	assert.DeepEqual(t, got, []*network.StaticRoute{
		{Destination: "10.9.0.0/16", RouteType: 0, NextHop: "10.1.0.9"},
		{Destination: "10.8.0.0/16", RouteType: 1},
	})
	ep.IPv6 = prefix("fd00:1::2/64")
	assert.Equal(t, len(staticRoutes(net, ep)), 3)
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func route(to, via string) options.Route {
	r := options.Route{Destination: prefix(to)}
	if via != "" {
		r.NextHop = netip.MustParseAddr(via)
	}
	return r
}
