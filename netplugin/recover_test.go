package netplugin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/state"
)

// A daemon that dies, or a step that fails, anywhere in the life of a container
// leaves nothing behind, and the same can be done again.
func TestTroubleAtEveryStep(t *testing.T) {
	for _, then := range []trouble{failBefore, failAfter, killBefore, killAfter} {
		for step := 1; step <= 7; step++ {
			t.Run(fmt.Sprintf("step %d %s", step, then), func(t *testing.T) {
				e := newEnv(t)
				e.host.at(step, then)
				if !e.life() {
					// dockerd heard no answer; its user tries again.
					e.restart()
				}
				assert.Equal(t, e.host.steps, 0, "the step did not happen")
				for range 2 {
					e.d.tick(t.Context())
				}
				e.healthy()
				assert.Assert(t, e.life(), "the second try died")
				e.d.tick(t.Context())
				e.healthy()

				// What dockerd could not give back is all that is left.
				for _, n := range e.host.networks {
					assert.NilError(t, e.net.DeleteNetwork(t.Context(), &network.DeleteNetworkRequest{NetworkID: n.ID}))
				}
				assert.Equal(t, len(e.host.networks)+len(e.host.endpoints), 0)
			})
		}
	}
}

// life is a network and a container made and removed. It reports whether the
// daemon lived; errors of single calls are dockerd's daily bread.
func (e *testEnv) life() bool {
	alive := !killed(func() {
		n, err := e.createNetwork("net", "10.1.0.0/24", nil)
		if err != nil {
			return
		}
		if c, err := e.run(n, "c", ""); err == nil {
			_ = e.stop(c) // dockerd ignores it
		}
		_ = e.removeNetwork(n) // dockerd ignores it
	})
	if !alive {
		// dockerd forgets what it could not finish; a user gives back what
		// was given out. After ten minutes Berth does.
		e.t0 = e.t0.Add(10 * time.Minute)
	}
	return alive
}

func TestAFailedCreationLeavesNothing(t *testing.T) {
	for _, then := range []trouble{failBefore, failAfter} {
		e := newEnv(t)
		e.host.at(1, then)
		_, err := e.createNetwork("net", "10.1.0.0/24", nil)
		assert.ErrorIs(t, err, errInjected)
		e.empty()

		n := mustNetwork(t, e, "net", "10.1.0.0/24")
		e.host.at(1, then)
		_, err = e.run(n, "c", "10.1.0.9")
		assert.ErrorIs(t, err, errInjected)
		assert.NilError(t, e.removeNetwork(n))
		e.empty()
	}
}

func TestAfterARebootNetworksAreBuiltAgain(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	c := mustRun(t, e, n, "c", "10.1.0.7")
	before := e.host.networks[n.id]
	e.host.reboot()
	e.restart()
	assert.DeepEqual(t, e.host.networks[n.id].Bridge, before.Bridge)
	assert.Equal(t, len(e.host.endpoints), 0, "a link was made for a container that is gone")

	// dockerd removes what it had, or does not come to it.
	assert.NilError(t, e.stop(c))
	again := mustRun(t, e, n, "c2", "10.1.0.7")
	assert.Equal(t, again.mac, c.mac)
	e.healthy()

	e.host.reboot()
	e.restart()
	e.t0 = e.t0.Add(settleTime)
	third := mustRun(t, e, n, "c3", "10.1.0.7")
	assert.Equal(t, third.mac, c.mac)
	e.healthy()
}

func TestLiveContainersKeepTheirLinksAcrossARestart(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	c := mustRun(t, e, n, "c", "")
	e.restart()
	e.t0 = e.t0.Add(24 * time.Hour)
	for range 10 {
		e.t0 = e.t0.Add(time.Minute)
		e.d.tick(t.Context())
	}
	assert.Assert(t, e.host.moved[c.endpoint])
	_, err := e.run(n, "c2", "10.1.0.2")
	assert.ErrorContains(t, err, "address 10.1.0.2 of subnet 10.1.0.0/24 is already in use by endpoint "+c.endpoint[:12])
	e.healthy()
}

func TestEndpointsOfDeadContainersAreCollectedLate(t *testing.T) {
	for name, c := range map[string]struct {
		dies func(*testEnv, *container)
		late time.Duration
	}{
		"namespace died":       {func(e *testEnv, c *container) { delete(e.host.endpoints, c.endpoint) }, collectAfter},
		"dockerd took it back": {func(e *testEnv, c *container) { delete(e.host.moved, c.endpoint) }, settleTime + collectAfter},
	} {
		dies, late := c.dies, c.late
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			n := mustNetwork(t, e, "net", "10.1.0.0/24")
			c := mustRun(t, e, n, "c", "")
			dies(e, c)
			for range int(late / time.Minute) {
				e.d.tick(t.Context())
				_, ok := e.d.store.endpoint(n.id, c.endpoint)
				assert.Assert(t, ok, "collected at once")
				e.t0 = e.t0.Add(time.Minute)
			}
			e.d.tick(t.Context())
			_, ok := e.d.store.endpoint(n.id, c.endpoint)
			assert.Assert(t, !ok)
			e.healthy()
			// The address is not given again although the endpoint is gone...
			_, err := e.run(n, "c2", "10.1.0.2")
			assert.Assert(t, errdefs.IsConflict(err), "%v", err)
			// ... until dockerd says so.
			assert.NilError(t, e.stop(c))
			mustRun(t, e, n, "c2", "10.1.0.2")
		})
	}
}

func TestAddressesOfForeignIPAMAreNeverOnTwoContainers(t *testing.T) {
	e := newEnv(t)
	n := &dockerNet{id: id("net"), pool: "172.30.0.0/16", gateway: "172.30.0.1/16"}
	req := n.request(nil)
	req.IPv4Data[0].AddressSpace = "LocalDefault"
	assert.NilError(t, e.net.CreateNetwork(t.Context(), req))
	first := &container{net: n, endpoint: id("first"), addr: "172.30.0.2/16"}
	_, err := e.net.CreateEndpoint(t.Context(), first.request())
	assert.NilError(t, err)
	second := &container{net: n, endpoint: id("second"), addr: "172.30.0.2/16"}
	_, err = e.net.CreateEndpoint(t.Context(), second.request())
	assert.ErrorContains(t, err, "address 172.30.0.2 is in use by endpoint "+first.endpoint[:12])

	e.t0 = e.t0.Add(settleTime)
	e.host.moved[first.endpoint] = true
	_, err = e.net.CreateEndpoint(t.Context(), second.request())
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)

	delete(e.host.endpoints, first.endpoint)
	_, err = e.net.CreateEndpoint(t.Context(), second.request())
	assert.NilError(t, err)
	e.healthy()
}

func TestLinksOfNoRecordAreRemoved(t *testing.T) {
	e := newEnv(t)
	mustNetwork(t, e, "net", "10.1.0.0/24")
	for _, l := range []link.Link{
		{Name: "bthlost", Index: 101, Kind: "bridge", Owner: link.OfNetwork("lost")},
		{Name: "bvlost", Index: 102, Kind: "veth", Peer: 7, Master: 101, Owner: link.OfEndpoint("lost")},
		{Name: "half", Index: 103, Kind: "veth", Owner: link.Owner{Ours: true}},
	} {
		e.host.stray[l.Name] = l
	}
	e.restart()
	assert.Equal(t, len(e.host.stray), 0)
	e.healthy()
}

// A plugin that was enabled with another state directory must not cut containers off.
func TestLinksOfNoRecordStayWhileContainersUseThem(t *testing.T) {
	e := newEnv(t)
	mustNetwork(t, e, "net", "10.1.0.0/24")
	for _, l := range []link.Link{
		{Name: "bthlive", Index: 101, Kind: "bridge", Owner: link.OfNetwork("live")},
		{Name: "bvlive", Index: 102, Kind: "veth", Master: 101, Owner: link.OfEndpoint("live")},
		{Name: "bthdead", Index: 103, Kind: "bridge", Owner: link.OfNetwork("dead")},
	} {
		e.host.stray[l.Name] = l
	}
	e.restart()
	assert.Equal(t, len(e.host.stray), 2, "%v", e.host.stray)
	_, ok := e.host.stray["bthdead"]
	assert.Assert(t, !ok, "a bridge that nobody uses stays")
	clear(e.host.stray)
	e.healthy()
}

func TestOneBrokenNetworkDoesNotStopTheDaemon(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	e.host.reboot()
	e.host.broken = errors.New("no such sysctl")
	e.restart()
	_, err := e.run(n, "c", "")
	assert.ErrorContains(t, err, "no such sysctl")
	e.host.broken = nil
	mustRun(t, e, n, "c", "")
	e.healthy()

	e.host.reboot()
	e.host.broken = errors.New("no such sysctl")
	e.restart()
	e.host.broken = nil
	e.d.tick(t.Context())
	e.healthy()
}

func TestFailedRemovalsAreTriedAgain(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	c := mustRun(t, e, n, "c", "")
	e.host.at(2, failBefore) // the first step takes its ports
	assert.ErrorIs(t, e.stop(c), errInjected)
	assert.Equal(t, len(e.host.endpoints), 1)
	e.d.tick(t.Context())
	assert.Equal(t, len(e.host.endpoints), 0)

	e.host.at(1, failBefore)
	assert.ErrorIs(t, e.removeNetwork(n), errInjected)
	e.d.tick(t.Context())
	e.empty()
}

func TestDeleteNetworkAloneFreesEverything(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	mustRun(t, e, n, "c", "")
	assert.NilError(t, e.net.DeleteNetwork(t.Context(), &network.DeleteNetworkRequest{NetworkID: n.id}))
	assert.NilError(t, e.removeNetwork(mustNetwork(t, e, "net2", "10.1.0.0/24")))
	e.empty()
}

func TestABridgeRemovedByHandComesBack(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	mustRun(t, e, n, "c", "")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.d.Run(ctx)
	}()
	e.host.mu.Lock()
	bridge := e.host.networks[n.id].Bridge
	delete(e.host.networks, n.id)
	e.host.mu.Unlock()
	e.host.watch <- link.Event{Lost: true}
	e.host.watch <- link.Event{Removed: true, Link: link.Link{Name: bridge, Kind: "bridge"}}
	back := false
	for deadline := time.Now().Add(10 * time.Second); !back && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		e.host.mu.Lock()
		_, back = e.host.networks[n.id]
		e.host.mu.Unlock()
	}
	cancel()
	<-done
	assert.Assert(t, back)
	e.healthy()
}

func TestDamagedStateIsRefusedAndLeftAlone(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	mustRun(t, e, n, "c", "")
	for name, damage := range map[string]func(*state.Tx) error{
		"endpoint without network": func(tx *state.Tx) error { return e.d.store.b.networks.Delete(tx, n.id) },
		"pool with a wrong range": func(tx *state.Tx) error {
			return state.NewBucket[map[string]string]("pools").Put(tx, n.poolID, map[string]string{"ID": n.poolID, "Prefix": "10.1.0.0/24", "Range": "10.2.0.0/24"})
		},
		"network of another type": func(tx *state.Tx) error { return state.NewBucket[string]("networks").Put(tx, n.id, "what") },
	} {
		t.Run(name, func(t *testing.T) {
			assert.NilError(t, errors.Join(e.d.Close(), e.db.Close()))
			good, err := os.ReadFile(e.path)
			assert.NilError(t, err)
			e.db, err = OpenState(e.path)
			assert.NilError(t, err)
			assert.NilError(t, e.db.Update(damage))
			_, err = New(Config{State: e.db, LeaseLog: e.path + ".leases", Log: e.d.log, Links: e.host, Bridge: e.host, LAN: e.lan(), Now: e.now})
			assert.ErrorContains(t, err, "is damaged")
			assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
			assert.NilError(t, e.db.Close())
			assert.NilError(t, os.WriteFile(e.path, good, 0o600))
			e.start()
			e.healthy()
		})
	}
}

func TestUndoHasTimeAfterTheRequestHasNone(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	ctx, cancel := context.WithCancel(t.Context())
	e.host.late = cancel
	c := &container{net: n, endpoint: id("c"), addr: "10.1.0.2/24"}
	_, err := e.net.CreateEndpoint(ctx, c.request())
	assert.Error(t, err, "context canceled")
	assert.Equal(t, len(e.host.endpoints), 0)
	e.healthy()
	_, ok := e.d.store.endpoint(n.id, c.endpoint)
	assert.Assert(t, !ok)
}

// dockerd's own IPAM gives a subnet out again only when the network is gone.
func TestASubnetThatComesAgainReplacesAForgottenNetwork(t *testing.T) {
	e := newEnv(t)
	create := func(name, space string) error {
		n := &dockerNet{id: id(name), pool: "172.30.0.0/16", gateway: "172.30.0.1/16"}
		req := n.request(nil)
		req.IPv4Data[0].AddressSpace = space
		return e.net.CreateNetwork(t.Context(), req)
	}
	assert.NilError(t, create("old", "LocalDefault"))
	old := &container{net: &dockerNet{id: id("old")}, endpoint: id("c"), addr: "172.30.0.2/16"}
	_, err := e.net.CreateEndpoint(t.Context(), old.request())
	assert.NilError(t, err)

	err = create("new", "LocalDefault")
	assert.Assert(t, errdefs.IsConflict(err), "a container was just started: %v", err)
	e.host.moved[old.endpoint] = true
	e.t0 = e.t0.Add(time.Hour)
	err = create("new", "LocalDefault")
	assert.Assert(t, errdefs.IsConflict(err), "a container runs: %v", err)
	delete(e.host.endpoints, old.endpoint)
	err = create("new", "acme")
	assert.Assert(t, errdefs.IsConflict(err), "another IPAM driver knows nothing of this one: %v", err)

	assert.NilError(t, create("new", "LocalDefault"))
	e.healthy()
	assert.Equal(t, len(e.host.networks), 1)
	assert.Assert(t, e.host.networks[id("new")].Bridge != "")
}
