package netplugin

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/testkit"
)

// lanEnv is kernelEnv on a host with eth1 on a LAN, where a neighbour has the address
// 10.9.0.1.
func lanEnv(t *testing.T) (e *testEnv, host, neighbour *testkit.Netns, sandboxes map[string]*testkit.Netns) {
	t.Helper()
	e, host, sandboxes = kernelEnv(t)
	neighbour = testkit.NewNetns(t)
	plugIn(host, neighbour)
	return e, host, neighbour, sandboxes
}

// plugIn gives the host its eth1.
func plugIn(host, neighbour *testkit.Netns) {
	host.Run("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth0", "netns", neighbour.Path())
	host.Run("ip", "link", "set", "eth1", "up")
	neighbour.Run("ip", "link", "set", "eth0", "up")
	neighbour.Run("ip", "addr", "add", "10.9.0.1/24", "dev", "eth0")
}

func TestContainersOnALAN(t *testing.T) {
	e, host, neighbour, sandboxes := lanEnv(t)
	n, err := e.createNetwork("lan", "10.9.0.0/24", map[string]any{"parent": "eth1"})
	assert.NilError(t, err)
	a, b := mustRun(t, e, n, "a", ""), mustRun(t, e, n, "b", "")
	addr := func(c *container) string { return netip.MustParsePrefix(c.addr).Addr().String() }
	ping := func(from *testkit.Netns, to string) {
		t.Helper()
		from.Run("busybox", "ping", "-c", "1", "-W", "5", to)
	}
	ping(sandboxes[a.endpoint], addr(b))
	ping(neighbour, addr(a))

	// They are not on the host any more, and yet alive, for a daemon that starts anew
	// and long after.
	e.restart()
	e.t0 = e.t0.Add(24 * time.Hour)
	e.d.tick(t.Context())
	e.t0 = e.t0.Add(24 * time.Hour)
	e.d.tick(t.Context())
	endpoints, err := e.d.Admin().Endpoints(t.Context(), "")
	assert.NilError(t, err)
	assert.Equal(t, len(endpoints), 2)
	for _, ep := range endpoints {
		assert.Equal(t, ep.State, control.EndpointAlive)
		assert.Equal(t, ep.HostLink, "")
	}
	ping(neighbour, addr(b))
	facts, err := e.d.HostFacts()
	assert.NilError(t, err)
	assert.DeepEqual(t, facts.Parents, map[string]bool{"eth1": true})
	_, err = e.run(n, "c", addr(a))
	assert.ErrorContains(t, err, "is already in use by endpoint "+a.endpoint[:12])

	// A container that is gone without a word gives up its address when it is asked for.
	sandboxes[a.endpoint].Run("ip", "link", "del", "eth0")
	c := mustRun(t, e, n, "c", addr(a))
	ping(neighbour, addr(c))

	assert.NilError(t, e.stop(b))
	assert.NilError(t, e.stop(c))
	assert.NilError(t, e.removeNetwork(n))
	links := strings.Split(strings.TrimSpace(host.Run("ip", "-o", "link")), "\n")
	assert.Equal(t, len(links), 2, "%v", links) // lo and eth1
}

func TestAnswersForNetworksOnALAN(t *testing.T) {
	for _, tc := range []struct {
		name, gateway string
		opts          map[string]any
		wantGateway   string
		wantNoBridge  bool
	}{
		{name: "gateway of the LAN", gateway: "10.9.0.1/24", opts: map[string]any{"parent": "eth1"}, wantGateway: "10.9.0.1"},
		{name: "none", opts: map[string]any{"parent": "eth1"}, wantNoBridge: true},
		{name: "no parent", gateway: "10.9.0.1/24", opts: map[string]any{"mode": "macvlan"}, wantNoBridge: true},
		{name: "way out by docker_gwbridge", gateway: "10.9.0.1/24", opts: map[string]any{"parent": "eth1", "publish": "gwbridge"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e, _, _, _ := lanEnv(t)
			n := &dockerNet{id: id("lan"), pool: "10.9.0.0/24", gateway: tc.gateway}
			assert.NilError(t, e.net.CreateNetwork(t.Context(), n.request(tc.opts)))
			c := &container{net: n, endpoint: id("a"), addr: "10.9.0.9/24"}
			_, err := e.net.CreateEndpoint(t.Context(), c.request())
			assert.NilError(t, err)
			joined, err := e.net.Join(t.Context(), &network.JoinRequest{NetworkID: n.id, EndpointID: c.endpoint})
			assert.NilError(t, err)
			assert.Equal(t, joined.Gateway, tc.wantGateway)
			assert.Equal(t, joined.DisableGatewayService, tc.wantNoBridge)
			// Docker sends the ports of a container to whichever network is its gateway.
			assert.NilError(t, e.program(c, port{8080, 80}))
			endpoints, err := e.d.Admin().Endpoints(t.Context(), "")
			assert.NilError(t, err)
			assert.Equal(t, len(endpoints[0].Ports), 0)
			assert.NilError(t, e.net.DeleteNetwork(t.Context(), &network.DeleteNetworkRequest{NetworkID: n.id}))
		})
	}
}

// Networks on LANs may have the same addresses where the host need not choose.
func TestSubnetsOfLANs(t *testing.T) {
	e, host, _, _ := lanEnv(t)
	host.Run("ip", "link", "add", "eth2", "type", "veth", "peer", "name", "far2")
	host.Run("ip", "addr", "add", "10.9.0.2/24", "dev", "eth1")
	host.Run("ip", "addr", "add", "10.9.0.3/24", "dev", "eth2")
	create := func(name string, opts map[string]any) error {
		n := &dockerNet{id: id(name), pool: "10.9.0.0/24", gateway: "10.9.0.1/24"}
		return e.net.CreateNetwork(t.Context(), n.request(opts))
	}
	assert.NilError(t, create("one", map[string]any{"parent": "eth1", "host-access": "true"}))
	assert.NilError(t, create("two", map[string]any{"parent": "eth1"}))
	assert.NilError(t, create("three", map[string]any{"parent": "eth2"}))
	assert.ErrorContains(t, create("four", map[string]any{"parent": "eth2", "host-access": "true"}), "overlaps subnet 10.9.0.0/24 of Berth network "+id("one")[:12])
	assert.ErrorContains(t, create("five", map[string]any{}), "overlaps subnet 10.9.0.0/24 of Berth network")
	assert.ErrorContains(t, create("six", map[string]any{"parent": "eth7"}), "option parent=eth7")
}

// A network comes back by itself when its parent does.
func TestParentGoesAndComes(t *testing.T) {
	e, host, neighbour, sandboxes := lanEnv(t)
	n, err := e.createNetwork("lan", "10.9.0.0/24", map[string]any{"parent": "eth1"})
	assert.NilError(t, err)
	a := mustRun(t, e, n, "a", "")

	host.Run("ip", "link", "del", "eth1")
	e.d.repairDrift(t.Context(), anyNetwork)
	networks, err := e.d.Admin().Networks(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, networks[0].State, control.NetworkBroken)

	plugIn(host, neighbour)
	e.d.retryLANs(t.Context())
	networks, err = e.d.Admin().Networks(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, networks[0].State, control.NetworkReady)

	// The kernel has removed the container's link with the parent.
	assert.NilError(t, e.stop(a))
	b := mustRun(t, e, n, "b", "")
	sandboxes[b.endpoint].Run("busybox", "ping", "-c", "1", "-W", "5", "10.9.0.1")
}
