package netplugin

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/ipam"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/state"
)

// A log of addresses that is cut anywhere costs no network its pool and no container
// its address.
func TestLogOfAddressesCutAnywhere(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	containers := []*container{mustRun(t, e, n, "a", ""), mustRun(t, e, n, "b", "")}
	assert.NilError(t, errors.Join(e.d.Close(), e.db.Close()))
	log := e.path + ".leases"
	whole, err := os.ReadFile(log)
	assert.NilError(t, err)
	stateFile, err := os.ReadFile(e.path)
	assert.NilError(t, err)
	used := len(whole)
	for used > 0 && whole[used-1] == 0 {
		used--
	}
	for cut := used; cut >= 0; cut -= 7 {
		assert.NilError(t, os.WriteFile(log, whole[:cut], 0o600))
		assert.NilError(t, os.WriteFile(e.path, stateFile, 0o600))
		e.start()
		assert.DeepEqual(t, e.problems(), []string(nil))
		other := mustRun(t, e, n, "c", "")
		for _, c := range containers {
			assert.Assert(t, other.addr != c.addr, "%s was given twice after a cut at byte %d", c.addr, cut)
		}
		assert.NilError(t, e.stop(other))
		assert.NilError(t, errors.Join(e.d.Close(), e.db.Close()))
	}
	assert.NilError(t, os.WriteFile(log, whole, 0o600))
	assert.NilError(t, os.WriteFile(e.path, stateFile, 0o600))
	e.start()
	e.healthy()
}

func TestMissingLogOfAddressesIsRefused(t *testing.T) {
	e := newEnv(t)
	assert.NilError(t, errors.Join(e.d.Close(), e.db.Close()))
	log := e.path + ".leases"
	assert.NilError(t, os.Rename(log, log+".away"))
	var err error
	e.db, err = OpenState(e.path)
	assert.NilError(t, err)
	_, err = New(Config{State: e.db, LeaseLog: log, Log: e.d.log, Links: e.host, Bridge: e.host, LAN: e.lan(), Now: e.now})
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.NilError(t, e.db.Close())
	assert.NilError(t, os.Rename(log+".away", log))
	e.start()
}

// The records of version 2 become those of version 3, once, however often the way is
// interrupted before its end.
func TestPoolsAndLeasesOfTheStateFileMoveToTheLog(t *testing.T) {
	e := newEnv(t)
	since, err := json.Marshal(e.t0)
	assert.NilError(t, err)
	pool := `{"ID":"10.1.0.0/24#1","Prefix":"10.1.0.0/24","Range":"10.1.0.0/24","Network":"","Since":` + string(since) + `,"Used":true,"Next":"10.1.0.4"}`
	lease := func(addr, role string) string {
		return `{"Pool":"10.1.0.0/24#1","Lease":{"Addr":"` + addr + `","Role":"` + role + `","Key":"","Since":` + string(since) + `,"Endpoint":"","Released":false}}`
	}
	put := func() {
		assert.NilError(t, e.db.Update(func(tx *state.Tx) error {
			leases := state.NewBucket[json.RawMessage]("leases")
			return errors.Join(
				state.NewBucket[json.RawMessage]("pools").Put(tx, "10.1.0.0/24#1", json.RawMessage(pool)),
				leases.Put(tx, "10.1.0.0/24#1|10.1.0.1", json.RawMessage(lease("10.1.0.1", "gateway"))),
				leases.Put(tx, "10.1.0.0/24#1|10.1.0.3", json.RawMessage(lease("10.1.0.3", "endpoint"))),
			)
		}))
	}
	for range 2 { // the second time as after a crash behind the snapshot
		put()
		e.restart()
		left := 0
		assert.NilError(t, e.db.View(func(tx *state.Tx) error {
			return state.NewBucket[json.RawMessage]("pools").Each(tx, func(string, json.RawMessage) error { left++; return nil })
		}))
		assert.Equal(t, left, 0)
		pool, ok := e.d.store.leases.pool("10.1.0.0/24#1")
		assert.Assert(t, ok)
		assert.Equal(t, pool.Options.Quarantine, time.Minute)
		var addrs []string
		for _, want := range []string{"10.1.0.1", "10.1.0.3"} {
			_, err := e.ipam.RequestAddress(t.Context(), &ipam.RequestAddressRequest{PoolID: pool.ID, Address: want})
			assert.Assert(t, errdefs.IsConflict(err), "%s: %v", want, err)
			addrs = append(addrs, want)
		}
		got, err := e.ipam.RequestAddress(t.Context(), &ipam.RequestAddressRequest{PoolID: pool.ID})
		assert.NilError(t, err)
		assert.Assert(t, !slices.Contains(addrs, netip.MustParsePrefix(got.Address).Addr().String()))
	}
}

// A network of version 2 does not lose its pool with the log either.
func TestNetworksOfOldVersionsOutliveTheLog(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	c := mustRun(t, e, n, "a", "")
	rec, ok := e.d.store.network(id("net"))
	assert.Assert(t, ok)
	pools := rec.Pools
	assert.Equal(t, len(pools), 1)
	rec.Pools = nil
	assert.NilError(t, e.db.Update(func(tx *state.Tx) error {
		b := newBuckets()
		return errors.Join(b.networks.Put(tx, id("net"), rec), b.oldPools.Put(tx, pools[0].ID, pools[0]))
	}))
	e.restart()
	assert.NilError(t, errors.Join(e.d.Close(), e.db.Close()))
	assert.NilError(t, os.WriteFile(e.path+".leases", nil, 0o600))
	e.start()
	assert.DeepEqual(t, e.problems(), []string(nil))
	other := mustRun(t, e, n, "b", "")
	assert.Assert(t, other.addr != c.addr)
}
