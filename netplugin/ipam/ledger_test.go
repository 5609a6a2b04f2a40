package ipam

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

// lanPool is a pool on a parent, bound to a network.
// on are a pool's options with a parent.
func on(p Pool, parent string) PoolOptions {
	o := p.Options
	o.Parent = parent
	return o
}

func lanPool(t testing.TB, a *Allocator, subnet, rng, network string) Pool {
	t.Helper()
	req := PoolRequest{Prefix: prefix(subnet), Options: DefaultOptions()}
	req.Options.Parent = "eth1"
	if rng != "" {
		req.Range = prefix(rng)
	}
	p := mustPool(t, a, req)
	if network != "" {
		_, err := a.Bind(p.ID, network)
		assert.NilError(t, err)
	}
	return p
}

func TestPoolsOfAParentNeverGiveOutAnAddressTwice(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	one := lanPool(t, a, "10.1.0.0/24", "", "0123456789abcdef")
	two := lanPool(t, a, "10.1.0.0/29", "", "n2")
	other := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/24")})

	first := mustRequest(t, a, AddressRequest{Pool: one.ID})
	assert.Equal(t, first, addr("10.1.0.1"))
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: two.ID}), addr("10.1.0.2"))
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: other.ID}), first, "another parent has nothing to do with it")

	for _, req := range []AddressRequest{{Pool: two.ID, Addr: first}, {Pool: two.ID, Addr: first, Gateway: true}, {Pool: two.ID, Addr: first, Key: "web"}} {
		_, _, err := a.Request(req)
		var taken *Taken
		assert.Assert(t, errors.As(err, &taken) && taken.Pool.ID == one.ID, "%v", err)
		assert.Error(t, err, "address 10.1.0.1 of subnet 10.1.0.0/29 is already in use by a container on Berth network 0123456789ab of the same parent eth1")
	}
	_, err := a.Attach(two.ID, first, "e")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)

	// The end of a pool is that of its own leases only.
	assert.Assert(t, a.ReleasePool(two.ID))
	_, ok := a.Lease(one.ID, first)
	assert.Assert(t, ok)
	a.Release(two.ID, first)
	_, ok = a.Lease(one.ID, first)
	assert.Assert(t, ok)
}

func TestARouterIsTheGatewayOfSeveralNetworks(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	router, printer := addr("10.1.0.254"), addr("10.1.0.7")
	pools := []Pool{lanPool(t, a, "10.1.0.0/24", "", ""), lanPool(t, a, "10.1.0.0/24", "", "")}
	for _, p := range pools {
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: router, Gateway: true}), router)
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: printer}), printer)
		_, _, err := a.Request(AddressRequest{Pool: p.ID, Addr: router})
		assert.ErrorContains(t, err, "as the gateway", "one pool has it once")
	}
	// Without --gateway it is one router too.
	auto := lanPool(t, a, "10.1.0.0/24", "", "")
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: auto.ID, Gateway: true}), addr("10.1.0.1"))
	auto2 := lanPool(t, a, "10.1.0.0/24", "", "")
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: auto2.ID, Gateway: true}), addr("10.1.0.1"))

	for _, p := range pools {
		_, err := a.Bind(p.ID, "n"+p.ID)
		assert.NilError(t, err)
		_, _, err = a.Request(AddressRequest{Pool: p.ID, Addr: router, Key: "web"})
		assert.Assert(t, errdefs.IsConflict(err), "a container must not have the router's address: %v", err)
	}
	a.ReleasePool(pools[0].ID)
	_, _, err := a.Request(AddressRequest{Pool: pools[1].ID, Addr: router, Key: "web"})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	a.Release(pools[1].ID, router)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: pools[1].ID, Addr: router, Key: "web"}), router)
}

func TestTheGatewayOfAPoolIsGivenAgainUntilItIsANetworks(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/24")})
	want := AddressRequest{Pool: p.ID, Addr: addr("10.1.0.1"), Gateway: true}
	mustRequest(t, a, want)
	mustRequest(t, a, want)
	_, err := a.Bind(p.ID, "n")
	assert.NilError(t, err)
	_, _, err = a.Request(want)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
}

func TestAPoolGetsTheParentOfItsNetwork(t *testing.T) {
	a, c := newTestAllocator(t, "")
	there := lanPool(t, a, "10.1.0.0/24", "", "n1")
	router := addr("10.1.0.254")
	mustRequest(t, a, AddressRequest{Pool: there.ID, Addr: addr("10.1.0.9")})
	request := func(gateway string) Pool {
		p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/24")})
		mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr(gateway), Gateway: true})
		return p
	}

	wrong := request("10.1.0.9")
	_, err := a.Configure(wrong.ID, on(wrong, "eth1"))
	assert.Error(t, err, "address 10.1.0.9 of subnet 10.1.0.0/24 is already in use by a container on Berth network n1 of the same parent eth1")
	got, _ := a.Pool(wrong.ID)
	assert.Equal(t, got.Options.Parent, "")
	assert.Assert(t, a.ReleasePool(wrong.ID))

	p := request(router.String())
	assert.NilError(t, a.Reserve(p.ID, addr("10.1.0.2"), "web"))
	assert.NilError(t, a.MarkConflict(p.ID, Conflict{Addr: addr("10.1.0.3"), MAC: []byte{2, 0, 0, 0, 0, 3}, Until: c.t.Add(time.Hour)}))
	got, err = a.Configure(p.ID, on(p, "eth1"))
	assert.NilError(t, err)
	assert.Equal(t, got.Options.Parent, "eth1")
	assert.Equal(t, got.Options.ProbeMode(), ProbeFast)
	lease, ok := a.Lease(p.ID, router)
	assert.Assert(t, ok && lease.Role == RoleGateway)
	for _, want := range []string{"10.1.0.1", "10.1.0.4"} {
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: there.ID}), addr(want))
	}
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "web"}), addr("10.1.0.2"))
	_, err = a.Configure(p.ID, on(p, "eth2"))
	assert.Error(t, err, "IPAM option parent=eth1: the network's parent is eth2, want the same")
	// The next one without parent is not in its way.
	request(router.String())
}

func TestAnAddressIsFoundWhereItIsLeased(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	one, two := lanPool(t, a, "10.1.0.0/24", "", "n1"), lanPool(t, a, "10.1.0.0/24", "", "n2")
	got := mustRequest(t, a, AddressRequest{Pool: two.ID})
	// CreateNetwork took the other pool for n1's.
	p, ok := a.Find("n1", got)
	assert.Assert(t, ok)
	assert.Equal(t, p.ID, two.ID)
	p, ok = a.Find("n1", addr("10.1.0.77"))
	assert.Assert(t, ok)
	assert.Equal(t, p.ID, one.ID)
	_, ok = a.Find("n1", addr("10.2.0.1"))
	assert.Assert(t, !ok)
	_, ok = a.Find("n3", got)
	assert.Assert(t, !ok)
	assert.Equal(t, len(a.PoolsOf("n2")), 1)
	assert.Equal(t, len(a.Unbound(prefix("10.1.0.0/24"))), 0)
}

func TestReleasedAddressesGoToThePoolsThatHaveThem(t *testing.T) {
	a, c := newTestAllocator(t, "")
	all := lanPool(t, a, "10.1.0.0/29", "", "n1")
	low := lanPool(t, a, "10.1.0.0/29", "10.1.0.0/30", "n2")
	for range 6 {
		mustRequest(t, a, AddressRequest{Pool: all.ID})
	}
	for _, s := range []string{"10.1.0.5", "10.1.0.2", "10.1.0.6", "10.1.0.3"} {
		a.Release(all.ID, addr(s))
	}
	c.t = c.t.Add(time.Hour)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: low.ID}), addr("10.1.0.2"))
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: all.ID}), addr("10.1.0.5"))
	a.ReleasePool(low.ID)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: all.ID}), addr("10.1.0.2"), "free again with the pool that had it")
	for _, want := range []string{"10.1.0.6", "10.1.0.3"} {
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: all.ID}), addr(want))
	}
}

func TestReleasedAddressesOfRangesSideBySide(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	for i, rng := range []string{"10.1.0.4/31", "10.1.0.6/31"} {
		p := lanPool(t, a, "10.1.0.0/28", rng, fmt.Sprint("n", i))
		first := mustRequest(t, a, AddressRequest{Pool: p.ID})
		mustRequest(t, a, AddressRequest{Pool: p.ID})
		a.Release(p.ID, first)
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), first)
	}
}

func TestTheOldestReleasedAddressesAndKeysAreForgotten(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.0.0.0/8")})
	_, err := a.Bind(p.ID, "n")
	assert.NilError(t, err)
	key := func(i int) string { return fmt.Sprint("c", i) }
	fill(t, a, p.ID, maxReleased+10, key)
	for _, l := range a.Leases(p.ID) {
		a.Release(p.ID, l.Addr)
	}
	stones := a.Tombstones(p.ID)
	assert.Equal(t, len(stones), maxReleased)
	assert.Equal(t, stones[0].Addr, addr("10.0.0.11"))
	keyed := 0
	for _, s := range stones {
		if s.Key != "" {
			keyed++
		}
	}
	assert.Equal(t, keyed, maxKeyed)
	assert.Equal(t, stones[len(stones)-maxKeyed].Key, key(maxReleased+10-maxKeyed))
	// One that was pinned gives way as all others.
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.9.0.1"), Key: "pinned"})
	a.Release(p.ID, addr("10.9.0.1"))
	again := fill(t, a, p.ID, maxKeyed+1, func(i int) string { return fmt.Sprint("d", i) })
	for _, x := range again {
		a.Release(p.ID, x)
	}
	for _, s := range a.Tombstones(p.ID) {
		if s.Addr == addr("10.9.0.1") {
			assert.Assert(t, s.Key == "" && !s.Named, "%+v", s)
		}
	}
}
