package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

func must[T any](got T, ok bool) T {
	if !ok {
		panic("not there")
	}
	return got
}

// state is what p's addresses are by the model, in one word.
func (m *model) state(p *modelPool, a netip.Addr) State {
	x := m.get(a)
	now := m.clock.t
	switch x.kind {
	case kindOutside:
		role, own := x.outside[p]
		if !own || role == RoleGateway {
			// What it is for other pools is not shown.
			return StateGateway
		}
		return StateAux
	case kindLease:
		if x.endpoint != "" {
			return StateActive
		}
		return StatePending
	case kindNone, kindReleased:
	}
	switch {
	case x.conflict.After(now):
		return StateConflict
	case x.reserved != "":
		return StateReserved
	case x.kind == kindReleased && now.Sub(x.at) < p.options.Quarantine:
		return StateQuarantined
	case x.kind == kindReleased && x.key != "":
		return StateReleased
	}
	return stateFree
}

// states are all addresses that are shown for a pool.
func (m *model) states(p *modelPool) string {
	var out string
	for _, a := range every(p.prefix) {
		x, state := m.get(a), m.state(p, a)
		_, outside := x.outside[p]
		own := x.pool == p && (x.kind == kindLease || x.kind == kindReleased)
		shown := false
		switch state {
		case StateGateway, StateAux:
			shown = outside
		case StateActive, StatePending, StateQuarantined, StateReleased:
			shown = own
		case StateReserved:
			shown = x.reservedBy == p
		case StateConflict:
			shown = own || x.conflictBy == p || x.reservedBy == p
		case stateFree:
		}
		if shown {
			out += fmt.Sprintf("%s %s for %q endpoint %q\n", a, state, x.reserved, x.endpoint)
		}
	}
	return out
}

func states(a *Allocator, pool string) string {
	var out string
	for _, x := range a.Addresses(pool) {
		out += fmt.Sprintf("%s %s for %q endpoint %q\n", x.Addr, x.State, x.Reserved, x.Endpoint)
	}
	return out
}

// stats counts one by one.
func (m *model) stats(p *modelPool) Stats {
	var s Stats
	for _, a := range every(p.prefix) {
		if !p.automatic(a) {
			continue
		}
		s.Size++
		switch m.state(p, a) {
		case StateActive:
			s.Attached++
			s.Used++
		case StateGateway, StateAux, StatePending:
			s.Used++
		case StateReserved:
			s.Reserved++
		case StateConflict:
			s.Conflicts++
		case StateQuarantined:
			s.Quarantined++
		case StateReleased:
			s.Released++
			s.Free++
		case stateFree:
			s.Free++
		}
	}
	return s
}

// whyNotForget says why an address cannot be made free, "" if it can.
func (m *model) whyNotForget(p *modelPool, a netip.Addr) string {
	x := m.get(a)
	switch {
	case !p.prefix.Contains(a):
		return "not found"
	case x.kind == kindOutside, x.kind == kindLease && (x.pool != p || !m.loose(x)):
		return "taken"
	case x.reserved != "" && x.reservedBy != p:
		return "reserved"
	case m.state(p, a) == stateFree:
		return "not found"
	}
	return ""
}

func (m *model) forget(a netip.Addr) { *m.get(a) = modelAddr{} }

func TestForgetMakesAnAddressFree(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/29", nil)
	for _, tc := range []struct {
		name string
		make func(addr netip.Addr)
		want State
	}{
		{"a lease that no endpoint has", func(x netip.Addr) {
			mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: x, Key: "web"})
		}, StatePending},
		{"quarantine", func(x netip.Addr) {
			mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: x})
			a.Release(p.ID, x)
		}, StateQuarantined},
		{"what is kept for a key", func(x netip.Addr) {
			mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: x, Key: "web"})
			a.Release(p.ID, x)
			c.t = c.t.Add(DefaultQuarantine)
		}, StateReleased},
		{"a reservation", func(x netip.Addr) { assert.NilError(t, a.Reserve(p.ID, x, "web")) }, StateReserved},
		{"a conflict", func(x netip.Addr) {
			assert.NilError(t, a.MarkConflict(p.ID, Conflict{Addr: x, Until: c.t.Add(time.Hour)}))
		}, StateConflict},
		{"all at once", func(x netip.Addr) {
			mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: x, Key: "web"})
			a.Release(p.ID, x)
			assert.NilError(t, a.Reserve(p.ID, x, "web"))
			assert.NilError(t, a.MarkConflict(p.ID, Conflict{Addr: x, Until: c.t.Add(time.Hour)}))
		}, StateConflict},
	} {
		x := addr("10.1.0.3")
		tc.make(x)
		shown, ok := a.Address(p.ID, x)
		assert.Assert(t, ok, tc.name)
		assert.Equal(t, shown.State, tc.want, tc.name)
		was, err := a.Forget(p.ID, x)
		assert.NilError(t, err, tc.name)
		assert.DeepEqual(t, was, shown, equalAddrs)
		_, ok = a.Address(p.ID, x)
		assert.Assert(t, !ok, tc.name)
		assert.Equal(t, must(a.Stats(p.ID)), Stats{Size: 6, Free: 6}, tc.name)
		assert.Assert(t, slices.Contains(a.Peek(p.ID, 6), x), tc.name)
		_, err = a.Forget(p.ID, x)
		assert.Assert(t, errdefs.IsNotFound(err), "%s: %v", tc.name, err)
	}
}

func TestForgetLeavesWhatIsInUse(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	foreign := mustPool(t, a, PoolRequest{Prefix: prefix("10.2.0.0/29")})
	p := bound(t, a, "10.1.0.0/29", nil)
	mustRequest(t, a, AddressRequest{Pool: foreign.ID})
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.0.1"), Gateway: true})
	_, err := a.Attach(p.ID, addr("10.1.0.2"), "0123456789abcdef")
	assert.NilError(t, err)
	held, _, err := a.Hold(AddressRequest{Pool: p.ID, Addr: addr("10.1.0.3"), Key: "web"})
	assert.NilError(t, err)
	for _, tc := range []struct {
		pool, addr, want string
	}{
		{foreign.ID, "10.2.0.1", "address 10.2.0.1 of subnet 10.2.0.0/29 is already in use by a container"},
		{p.ID, "10.1.0.1", "already in use as the gateway"},
		{p.ID, "10.1.0.2", "already in use by endpoint 0123456789ab"},
		{p.ID, "10.1.0.3", "already in use by a container that is starting of container web"},
		{p.ID, "10.1.0.4", "address 10.1.0.4 of subnet 10.1.0.0/29 is free already"},
		{p.ID, "10.3.0.4", "is free already"},
		{"none", "10.1.0.4", "not known"},
	} {
		_, err := a.Forget(tc.pool, addr(tc.addr))
		assert.ErrorContains(t, err, tc.want)
	}
	shown, ok := a.Address(p.ID, held.Addr)
	assert.Assert(t, ok)
	assert.Equal(t, shown.State, StatePending)
	assert.Equal(t, shown.Key, "web")
	assert.Equal(t, must(a.Stats(p.ID)).Used, uint64(3))
}

func TestAddressesAreShownWithWhatKeepsThem(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/24", nil)
	start := c.t
	mac := []byte{2, 0, 0, 0, 0, 1}
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.0.9"), Key: "db", MAC: mac})
	a.Release(p.ID, addr("10.1.0.9"))
	assert.NilError(t, a.Reserve(p.ID, addr("10.1.0.5"), "web"))
	assert.NilError(t, a.MarkConflict(p.ID, Conflict{Addr: addr("10.1.0.7"), MAC: mac, Until: start.Add(time.Hour)}))
	c.t = c.t.Add(time.Second)
	assert.NilError(t, a.MarkConflict(p.ID, Conflict{Addr: addr("10.1.0.7"), MAC: mac, Until: start.Add(2 * time.Hour)}))
	list := a.Addresses(p.ID)
	assert.Equal(t, len(list), 3)
	reserved, conflict, resting := list[0], list[1], list[2]
	assert.Equal(t, reserved.State, StateReserved)
	assert.Equal(t, reserved.Key, "web")
	assert.Equal(t, reserved.Reserved, "web")
	assert.Assert(t, reserved.Until.IsZero())
	assert.Equal(t, conflict.State, StateConflict)
	assert.Equal(t, conflict.MAC.String(), "02:00:00:00:00:01")
	assert.Assert(t, conflict.Since.Sub(start) < time.Second, "it was found the first time")
	assert.Assert(t, conflict.Until.Equal(start.Add(2*time.Hour)))
	assert.Equal(t, resting.State, StateQuarantined)
	assert.Equal(t, resting.Key, "db")
	assert.Assert(t, resting.Named)
	assert.Equal(t, resting.MAC.String(), "02:00:00:00:00:01")
	assert.Assert(t, resting.Until.Equal(resting.Since.Add(DefaultQuarantine)))
	assert.Assert(t, a.Addresses("none") == nil)
	_, ok := a.Address("none", addr("10.1.0.9"))
	assert.Assert(t, !ok)
}

func TestAnAddressThatChangesHandsIsShownForBoth(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := lanPool(t, a, "10.1.0.0/29", "10.1.0.0/29", "p")
	q := lanPool(t, a, "10.1.0.0/29", "10.1.0.0/29", "q")
	x := addr("10.1.0.3")
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: x, Key: "old"})
	c.t = c.t.Add(ForgetAfter)
	held, _, err := a.Hold(AddressRequest{Pool: q.ID, Addr: x, Key: "new"})
	assert.NilError(t, err)
	for pool, key := range map[string]string{p.ID: "old", q.ID: "new"} {
		shown, ok := a.Address(pool, x)
		assert.Assert(t, ok)
		assert.Equal(t, shown.State, StatePending)
		assert.Equal(t, shown.Key, key)
		assert.Equal(t, must(a.Stats(pool)).Used, uint64(1))
	}
	_, err = a.Commit(q.ID, held)
	assert.NilError(t, err)
	_, ok := a.Address(p.ID, x)
	assert.Assert(t, !ok)
}

func TestAReservationOutlastsTheLeaseThatItFound(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/29", nil)
	q := lanPool(t, a, "10.1.0.0/29", "10.1.0.0/29", "q")
	x := addr("10.1.0.3")
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: x, Key: "db"})
	assert.NilError(t, a.Reserve(q.ID, x, "web"))
	_, err := a.Configure(p.ID, on(p, "eth1"))
	assert.NilError(t, err)
	a.Release(p.ID, x)
	stones := a.Tombstones(p.ID)
	assert.Equal(t, len(stones), 1)
	assert.Equal(t, stones[0].Key, "", "it does not go back")
	_, err = a.Forget(p.ID, x)
	assert.Error(t, err, "address 10.1.0.3 is reserved for web on another network of parent eth1")
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: q.ID, Key: "web"}), x)
}
