package netplugin

import (
	"bytes"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	dockeripam "github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/control"
)

// written is the log of addresses and how much of it is used. The rest is zeros.
func (e *testEnv) written() (log []byte, used int) {
	e.t.Helper()
	log, err := os.ReadFile(e.path + ".leases")
	assert.NilError(e.t, err)
	return log, len(bytes.TrimRight(log, "\x00"))
}

// recorded is all that is known of addresses.
func recorded(s *leaseStore) string {
	return view(s, func(a *ipam.Allocator) string {
		var all []byte
		for event := range a.Snapshot() {
			all = ipam.AppendEvent(all, event)
		}
		return string(all)
	})
}

// lifeOfAddresses are requests of dockerd and of an operator, one decision each.
func lifeOfAddresses(t *testing.T, e *testEnv) []func() error {
	ctx := t.Context()
	n := &dockerNet{id: id("net"), gateway: "10.1.0.1/29"}
	c := &container{net: n, endpoint: id("c")}
	named := func(name, ip string) func() error {
		return func() error { _, err := e.ask(n, name, ip); return err }
	}
	giveBack := func(addr string) func() error {
		return func() error { return e.giveBack(n, netip.MustParseAddr(addr)) }
	}
	db := netip.MustParseAddr("10.1.0.6")
	return []func() error{
		func() error {
			pool, err := e.ipam.RequestPool(ctx, &dockeripam.RequestPoolRequest{AddressSpace: localSpace, Pool: "10.1.0.0/29", Options: map[string]string{"quarantine": "2m"}})
			if err == nil {
				n.poolID, n.pool = pool.PoolID, pool.Pool
			}
			return err
		},
		func() error { _, err := e.send(n, "", gatewayOptions); return err },
		func() error { _, err := e.send(n, "10.1.0.4", `null`); return err },
		func() error { return e.net.CreateNetwork(ctx, n.request(map[string]any{"ipam.quarantine": "1m"})) },
		named("web", ""),
		named("", ""),
		named("db", "10.1.0.5"),
		func() error {
			c.addr = "10.1.0.2/29"
			_, err := e.net.CreateEndpoint(ctx, c.request())
			return err
		},
		giveBack("10.1.0.3"),
		giveBack("10.1.0.5"),
		func() error {
			_, err := e.d.Admin().ReserveLease(ctx, control.ReserveRequest{Network: n.id, Addr: db, Key: "db"})
			return err
		},
		named("db", ""),
		func() error {
			return e.net.DeleteEndpoint(ctx, &network.DeleteEndpointRequest{NetworkID: n.id, EndpointID: c.endpoint})
		},
		giveBack("10.1.0.2"),
		named("new", ""), // what was released longest ago
		giveBack("10.1.0.6"),
		func() error {
			_, err := e.d.Admin().ReleaseLease(ctx, control.ReleaseRequest{Network: n.id, Addr: db})
			return err
		},
		func() error {
			return e.ipam.ReleasePool(ctx, &dockeripam.ReleasePoolRequest{PoolID: n.poolID})
		},
	}
}

// Killed at any moment of what it writes, berthd knows each address as it was before the
// request or after it, and nothing between; what was answered is never lost.
func TestKilledBetweenAnyTwoSteps(t *testing.T) {
	e := newEnv(t)
	_, begin := e.written()
	states, begins := []string{recorded(e.d.store.leases)}, []int{begin}
	for i, step := range lifeOfAddresses(t, e) {
		assert.NilError(t, step(), "step %d", i)
		_, end := e.written()
		states, begins = append(states, recorded(e.d.store.leases)), append(begins, end)
		assert.Assert(t, states[i+1] != states[i] && begins[i+1] > begins[i], "step %d has decided nothing", i)
	}
	assert.Equal(t, states[len(states)-1], states[0], "something is left of all that")
	whole, _ := e.written()
	path := filepath.Join(t.TempDir(), "leases")
	logger, said := logtest.NewNullLogger()
	for step := range len(begins) - 1 {
		from, to := begins[step], begins[step+1]
		const stride = 29
		for cut := to; cut >= from; cut -= stride {
			torn := append(bytes.Clone(whole[:cut]), make([]byte, len(whole)-cut)...)
			assert.NilError(t, os.WriteFile(path, torn, 0o600))
			s, err := openLeases(path, true, ipam.Config{Now: e.now}, logrus.NewEntry(logger))
			assert.NilError(t, err)
			got := recorded(s)
			assert.NilError(t, s.close())
			assert.Assert(t, got == states[step] || got == states[step+1], "step %d is half done when killed at byte %d of %d to %d", step, cut, from, to)
			assert.Assert(t, cut < to || got == states[step+1], "what step %d has answered is lost", step)
		}
	}
	for _, entry := range said.AllEntries() {
		assert.Assert(t, entry.Level > logrus.ErrorLevel, "%s: a kill is no damage", entry.Message)
	}
}

// Killed between the two files that it writes, berthd makes them agree, and the same
// life can be lived again.
func TestKilledBetweenNetworksAndAddresses(t *testing.T) {
	type snapshot struct {
		state     []byte
		networks  map[string]options.Network
		endpoints map[string]options.Endpoint
		log       []byte
	}
	e := newEnv(t)
	take := func() snapshot {
		state, err := os.ReadFile(e.path)
		assert.NilError(t, err)
		log, _ := e.written()
		return snapshot{state, maps.Clone(e.host.networks), maps.Clone(e.host.endpoints), log}
	}
	before := []snapshot{take()}
	for i, step := range lifeOfAddresses(t, e) {
		assert.NilError(t, step(), "step %d", i)
		before = append(before, take())
	}
	for i := 1; i < len(before); i++ {
		for _, torn := range [][2]snapshot{{before[i], before[i-1]}, {before[i-1], before[i]}} {
			assert.NilError(t, e.end())
			assert.NilError(t, os.WriteFile(e.path, torn[0].state, 0o600))
			assert.NilError(t, os.WriteFile(e.path+".leases", torn[1].log, 0o600))
			e.host.networks, e.host.endpoints = maps.Clone(torn[0].networks), maps.Clone(torn[0].endpoints)
			e.start()
			e.d.tick(t.Context())
			e.healthy()
			// dockerd gives back what it knows, and all is free.
			for _, pool := range view(e.d.store.leases, (*ipam.Allocator).Pools) {
				assert.NilError(t, e.ipam.ReleasePool(t.Context(), &dockeripam.ReleasePoolRequest{PoolID: pool.ID}))
			}
			assert.NilError(t, e.net.DeleteNetwork(t.Context(), &network.DeleteNetworkRequest{NetworkID: id("net")}))
			n := mustNetwork(t, e, "net", "10.1.0.0/29")
			c := mustRun(t, e, n, "c", "")
			assert.NilError(t, e.stop(c))
			assert.NilError(t, e.removeNetwork(n))
			e.empty()
		}
	}
}
