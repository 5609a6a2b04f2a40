package netplugin

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"gotest.tools/v3/assert"

	berthipam "github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/control"
)

// Whatever was answered is what a daemon knows that starts after a kill, and nothing
// else: the files are copied after each answer, as a kill would leave them.
func TestKilledAfterAnyAnswer(t *testing.T) {
	e := newEnv(t)
	dir := t.TempDir()
	type moment struct {
		after, path string
		leases      []control.Lease
		pools       []control.Pool
		endpoints   map[string]options.Endpoint // on the host
	}
	look := func(e *testEnv) (m moment) {
		var err error
		m.leases, err = e.d.Admin().Leases(t.Context(), "")
		assert.NilError(t, err)
		m.pools, err = e.d.Admin().Pools(t.Context())
		assert.NilError(t, err)
		return m
	}
	var moments []moment
	did := func(after string, err error) {
		t.Helper()
		assert.NilError(t, err, after)
		m := look(e)
		m.endpoints = maps.Clone(e.host.endpoints)
		m.after, m.path = after, filepath.Join(dir, fmt.Sprint(len(moments)), "net.db")
		assert.NilError(t, os.Mkdir(filepath.Dir(m.path), 0o700))
		for _, ext := range []string{"", ".leases"} {
			text, err := os.ReadFile(e.path + ext)
			assert.NilError(t, err)
			assert.NilError(t, os.WriteFile(m.path+ext, text, 0o600))
		}
		moments = append(moments, m)
	}
	pool, err := e.ipam.RequestPool(t.Context(), &ipam.RequestPoolRequest{AddressSpace: localSpace, Pool: "10.1.0.0/24", Options: map[string]string{"exclude": "10.1.0.2-10.1.0.9", "quarantine": "1h"}})
	did("pool", err)
	n := &dockerNet{id: id("net"), poolID: pool.PoolID, pool: pool.Pool, gateway: "10.1.0.1/24"}
	_, err = e.send(n, "", gatewayOptions)
	did("gateway", err)
	_, err = e.send(n, "10.1.0.200", `null`)
	did("aux", err)
	did("network", e.net.CreateNetwork(t.Context(), n.request(nil)))
	a, err := e.ask(n, "a", "")
	did("address of a", err)
	b, err := e.ask(n, "b", "10.1.0.77")
	did("address of b", err)
	_, err = e.attach(n, "a", a)
	did("endpoint of a", err)
	did("b given back", e.giveBack(n, b))
	_, err = e.d.Admin().ReserveLease(t.Context(), control.ReserveRequest{Network: n.id, Addr: netip.MustParseAddr("10.1.0.50"), Key: "web"})
	did("reservation", err)
	_, err = e.ask(n, "web", "")
	did("address of web", err)
	did("web given back", e.giveBack(n, netip.MustParseAddr("10.1.0.50")))
	_, err = e.d.Admin().ReleaseLease(t.Context(), control.ReleaseRequest{Network: n.id, Addr: netip.MustParseAddr("10.1.0.50")})
	did("reservation taken away", err)
	did("a given back while it runs", e.giveBack(n, a))
	// What is held for a request that has no answer yet is nobody's after a kill.
	before := look(e)
	_, err = e.d.store.leases.hold(berthipam.AddressRequest{Pool: n.poolID})
	assert.NilError(t, err)
	assert.Equal(t, len(look(e).leases), len(before.leases)+1)
	did("an address held", nil)
	moments[len(moments)-1].leases, moments[len(moments)-1].pools = before.leases, before.pools

	for _, m := range moments {
		t.Run(m.after, func(t *testing.T) {
			other := newEnv(t)
			assert.NilError(t, other.end())
			other.path, other.t0 = m.path, e.t0
			other.host.endpoints = m.endpoints
			other.start()
			found := look(other)
			same := cmp.Options{cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.EquateApproxTime(time.Millisecond)}
			assert.DeepEqual(t, found.leases, m.leases, same)
			assert.DeepEqual(t, found.pools, m.pools, same)
		})
	}
}
