package ipam

import (
	"errors"
	"math"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	gocmp "github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"
)

// bound is a pool of a Berth network.
func bound(t testing.TB, a *Allocator, subnet string, change func(*PoolOptions)) Pool {
	t.Helper()
	o := DefaultOptions()
	if change != nil {
		change(&o)
	}
	p := mustPool(t, a, PoolRequest{Prefix: prefix(subnet), Options: o})
	_, err := a.Bind(p.ID, "n")
	assert.NilError(t, err)
	return p
}

func TestPickOrder(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/29", nil)
	next := func(key string) netip.Addr { return mustRequest(t, a, AddressRequest{Pool: p.ID, Key: key}) }
	use := func(key string) netip.Addr {
		got := next(key)
		_, err := a.Attach(p.ID, got, "e"+key)
		assert.NilError(t, err)
		return got
	}
	stop := func(key string, got netip.Addr) {
		a.Detach(p.ID, got, "e"+key)
		a.Release(p.ID, got)
	}
	// Never used ones go in turn.
	assert.Equal(t, use("a"), addr("10.1.0.1"))
	assert.Equal(t, use("b"), addr("10.1.0.2"))
	stop("a", addr("10.1.0.1"))
	assert.Equal(t, use("c"), addr("10.1.0.3"), "another container does not take what a had")
	assert.Equal(t, use("a"), addr("10.1.0.1"), "a has its own again, quarantine or not")
	// A reserved one.
	assert.NilError(t, a.Reserve(p.ID, addr("10.1.0.6"), "kept"))
	assert.Equal(t, use("kept"), addr("10.1.0.6"))
	assert.Equal(t, use("d"), addr("10.1.0.4"))
	assert.Equal(t, use("e"), addr("10.1.0.5"))
	// Only used ones are left: the oldest released first.
	stop("b", addr("10.1.0.2"))
	c.t = c.t.Add(DefaultQuarantine / 2)
	stop("a", addr("10.1.0.1"))
	stop("kept", addr("10.1.0.6"))
	assert.Equal(t, use("f"), addr("10.1.0.2"), "nothing else is free")
	assert.Equal(t, use("g"), addr("10.1.0.1"))
	_, _, err := a.Request(AddressRequest{Pool: p.ID, Key: "h"})
	assert.Error(t, err, "no free address in pool 10.1.0.0/29: the pool has 5 in use, reservations for 1 containers")
	assert.Equal(t, use("kept"), addr("10.1.0.6"))
}

func TestAForgottenLeaseGoesBeforeOneInQuarantine(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/30", nil)
	lost := mustRequest(t, a, AddressRequest{Pool: p.ID})
	second := mustRequest(t, a, AddressRequest{Pool: p.ID})
	_, err := a.Attach(p.ID, second, "e")
	assert.NilError(t, err)
	c.t = c.t.Add(ForgetAfter)
	a.Detach(p.ID, second, "e")
	a.Release(p.ID, second)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), lost)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), second, "in spite of its quarantine")
}

func TestQuarantineCanBeOff(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/30", func(o *PoolOptions) { o.Quarantine = 0 })
	lost, second := mustRequest(t, a, AddressRequest{Pool: p.ID}), mustRequest(t, a, AddressRequest{Pool: p.ID})
	c.t = c.t.Add(ForgetAfter)
	a.Release(p.ID, second)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), second)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), lost)
}

func TestStickyOffForgetsWhoHadWhat(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/29", func(o *PoolOptions) { o.Sticky = false })
	first := mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "web"})
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "web"}), first, "the same request again")
	a.Release(p.ID, first)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "web"}), addr("10.1.0.2"))
	assert.Equal(t, a.Tombstones(p.ID)[0].Key, "")
}

func TestAStaticAddressWaitsForItsContainer(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/29", nil)
	static := addr("10.1.0.2")
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: static, Key: "db"})
	a.Release(p.ID, static)
	c.t = c.t.Add(100 * time.Hour)
	for _, want := range []string{"10.1.0.1", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"} {
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), addr(want))
	}
	a.Release(p.ID, addr("10.1.0.4"))
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), addr("10.1.0.4"), "one in quarantine goes first")
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), static, "nothing else is left")
	a.Release(p.ID, static)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: static, Key: "db"}), static)
}

func TestReservations(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/28", func(o *PoolOptions) {
		o.Exclude = []Range{{addr("10.1.0.8"), addr("10.1.0.14")}}
	})
	kept, second := addr("10.1.0.9"), addr("10.1.0.1")
	assert.NilError(t, a.Reserve(p.ID, kept, "web"))
	assert.NilError(t, a.Reserve(p.ID, kept, "web"), "once more")
	for _, tc := range []struct {
		addr, key, want string
	}{
		{"10.1.0.9", "db", "address 10.1.0.9 of subnet 10.1.0.0/28 is reserved for web already"},
		{"10.1.0.0", "db", "address 10.1.0.0: want that of a host of subnet 10.1.0.0/28"},
		{"10.2.0.1", "db", "want that of a host"},
		{"10.1.0.3", "", "reservation of 10.1.0.3: want the name of a container"},
	} {
		assert.ErrorContains(t, a.Reserve(p.ID, addr(tc.addr), tc.key), tc.want)
	}
	_, _, err := a.Request(AddressRequest{Pool: p.ID, Addr: kept, Key: "db"})
	assert.Error(t, err, "address 10.1.0.9 of subnet 10.1.0.0/28 is reserved for web")
	assert.Assert(t, errdefs.IsConflict(err))

	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "web"}), kept)
	a.Release(p.ID, kept)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "web"}), kept, "it survives the release")
	a.Release(p.ID, kept)
	// Engines before 29 do not say who asks.
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: kept}), kept)
	a.Release(p.ID, kept)

	// A new reservation is what counts from now on.
	got := mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "db"})
	_, err = a.Attach(p.ID, got, "e")
	assert.NilError(t, err)
	assert.Equal(t, got, second)
	var taken *Taken
	assert.Assert(t, errors.As(a.Reserve(p.ID, second, "cache"), &taken))
	assert.NilError(t, a.Reserve(p.ID, addr("10.1.0.5"), "db"))
	a.Detach(p.ID, got, "e")
	a.Release(p.ID, got)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "db"}), addr("10.1.0.5"))

	assert.DeepEqual(t, a.Reservations(p.ID), []Reservation{{Addr: addr("10.1.0.5"), Key: "db"}, {Addr: kept, Key: "web"}},
		equalAddrs, gocmp.Transformer("time", func(time.Time) bool { return false }))
	assert.Assert(t, a.Unreserve(p.ID, kept))
	assert.Assert(t, !a.Unreserve(p.ID, kept))
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: kept, Key: "other"}), kept)
}

func TestConflicts(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/29", nil)
	mac := net.HardwareAddr{2, 0x42, 0, 0, 0, 7}
	used := addr("10.1.0.1")
	mark := func(x netip.Addr) {
		assert.NilError(t, a.MarkConflict(p.ID, Conflict{Addr: x, MAC: mac, Until: c.t.Add(5 * time.Minute)}))
	}
	mark(used)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), addr("10.1.0.2"))
	_, _, err := a.Request(AddressRequest{Pool: p.ID, Addr: used})
	assert.Error(t, err, "address 10.1.0.1 of subnet 10.1.0.0/29 is in use on the LAN by 02:42:00:00:00:07")
	var inUse *InUse
	assert.Assert(t, errors.As(err, &inUse) && errdefs.IsConflict(err))
	assert.Equal(t, inUse.MAC.String(), mac.String())
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: used, Probed: true}), used)
	a.Release(p.ID, used)
	assert.DeepEqual(t, a.Conflicts(p.ID)[0].Addr, used, equalAddrs)

	for range 4 {
		mustRequest(t, a, AddressRequest{Pool: p.ID})
	}
	_, _, err = a.Request(AddressRequest{Pool: p.ID})
	assert.Error(t, err, "no free address in pool 10.1.0.0/29: the pool has 5 in use, 1 that others on the LAN use")
	c.t = c.t.Add(5 * time.Minute)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), used)
	assert.Equal(t, len(a.Conflicts(p.ID)), 0)

	// One that is found while the address is leased counts afterwards.
	mark(used)
	a.Release(p.ID, used)
	_, _, err = a.Request(AddressRequest{Pool: p.ID})
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
	assert.Assert(t, a.ClearConflict(p.ID, used))
	assert.Assert(t, !a.ClearConflict(p.ID, used))
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), used)
	assert.Assert(t, errdefs.IsInvalidArgument(a.MarkConflict(p.ID, Conflict{Addr: addr("10.2.0.1")})))
}

func TestExclusions(t *testing.T) {
	for _, tc := range []struct {
		pool, exclude string
		gateway       string
		want          []string
	}{
		{"10.1.0.0/29", "10.1.0.3-10.1.0.5", "10.1.0.1", []string{"10.1.0.2", "10.1.0.6"}},
		{"10.1.0.0/29", "10.1.0.0/30", "10.1.0.4", []string{"10.1.0.5", "10.1.0.6"}},
		{"10.1.0.0/29", "10.9.0.0/16,fd00::/64", "10.1.0.1", []string{"10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"}},
		{"10.1.0.0/31", "10.1.0.0", "10.1.0.1", nil},
		{"fd00::/126", "fd00::2", "fd00::1", []string{"fd00::3"}},
		{"fd00::/127", "fd00::1", "fd00::", nil},
	} {
		a, _ := newTestAllocator(t, "")
		o := DefaultOptions()
		var err error
		o.Exclude, err = ParseRanges(tc.exclude)
		assert.NilError(t, err)
		p := mustPool(t, a, PoolRequest{Prefix: prefix(tc.pool), Options: o})
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Gateway: true}), addr(tc.gateway))
		for _, want := range tc.want {
			assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), addr(want))
		}
		_, _, err = a.Request(AddressRequest{Pool: p.ID})
		assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
		s, ok := a.Stats(p.ID)
		assert.Assert(t, ok)
		assert.Equal(t, s.Size, uint64(len(tc.want)+1))
	}
	a, _ := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/29", func(o *PoolOptions) { o.Exclude = []Range{{addr("10.1.0.4"), addr("10.1.0.6")}} })
	// Asked for by name it can be had, and is not given to others afterwards.
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.0.5"), Key: "db"}), addr("10.1.0.5"))
	a.Release(p.ID, addr("10.1.0.5"))
	for range 3 {
		mustRequest(t, a, AddressRequest{Pool: p.ID})
	}
	_, _, err := a.Request(AddressRequest{Pool: p.ID})
	assert.Error(t, err, "no free address in pool 10.1.0.0/29: the pool has 3 in use, and excluded ranges")

	all := PoolRequest{Prefix: prefix("10.5.0.0/29"), Options: DefaultOptions()}
	all.Options.Exclude = []Range{{addr("10.5.0.1"), addr("10.5.0.6")}}
	_, _, err = a.RequestPool(all)
	assert.Error(t, err, "IPAM option exclude: it leaves no address of subnet 10.5.0.0/29")
	_, _, err = a.RequestPool(PoolRequest{Options: PoolOptions{Conflict: ConflictRefuse, DHCP: true}})
	assert.Error(t, err, "IPAM option dhcp=true: it needs the LAN's subnet, give --subnet")
}

func TestHoldAndCancel(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/30", nil)
	had := mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "web"})
	a.Release(p.ID, had)
	before := state(a)
	events := 0
	a.cfg.Record = func(Event) { events++ }

	held, _, err := a.Hold(AddressRequest{Pool: p.ID, Key: "web"})
	assert.NilError(t, err)
	assert.Equal(t, held.Addr, had)
	_, ok := a.Lease(p.ID, had)
	assert.Assert(t, !ok, "it is no lease yet")
	other, _, err := a.Hold(AddressRequest{Pool: p.ID, Key: "web"})
	assert.NilError(t, err)
	assert.Assert(t, other.Addr != held.Addr)
	_, _, err = a.Request(AddressRequest{Pool: p.ID})
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
	_, _, err = a.Request(AddressRequest{Pool: p.ID, Addr: had})
	assert.Error(t, err, "address 10.1.0.1 of subnet 10.1.0.0/30 is already in use by a container that is starting of container web")
	_, err = a.Attach(p.ID, had, "e")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)

	assert.Assert(t, a.Cancel(p.ID, other.Addr))
	assert.Assert(t, a.Cancel(p.ID, held.Addr))
	assert.Assert(t, !a.Cancel(p.ID, held.Addr))
	assert.Equal(t, events, 0)
	assert.Equal(t, state(a), before)

	held, _, err = a.Hold(AddressRequest{Pool: p.ID, Key: "web"})
	assert.NilError(t, err)
	c.t = c.t.Add(time.Second)
	held.MAC = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	_, err = a.Commit(p.ID, held)
	assert.NilError(t, err)
	assert.Equal(t, events, 1)
	_, err = a.Commit(p.ID, held)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)

	held, _, err = a.Hold(AddressRequest{Pool: p.ID})
	assert.NilError(t, err)
	a.ReleasePool(p.ID)
	_, err = a.Commit(p.ID, held)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
}

func TestWhatBelongsToASlotStaysWithItsKey(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/24", nil)
	_, ok := a.Kept(p.ID, "web")
	assert.Assert(t, !ok)
	d := &DHCP{ClientID: []byte{1, 2}, Server: addr("10.1.0.254"), T1: c.t.Add(time.Hour), Hostname: "web"}
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	got := mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.0.77"), Key: "web", MAC: mac, DHCP: d})
	d.ClientID[0] = 9 // the caller's own
	d2 := DHCP{ClientID: []byte{1, 3}, Server: addr("10.1.0.254")}
	assert.Assert(t, a.SetDHCP(p.ID, got, mac, &d2))
	assert.Assert(t, !a.SetDHCP(p.ID, addr("10.1.0.78"), mac, &d2))
	a.Release(p.ID, got)
	kept, ok := a.Kept(p.ID, "web")
	assert.Assert(t, ok)
	assert.Equal(t, kept.Addr, got)
	assert.Equal(t, kept.MAC.String(), mac.String())
	assert.DeepEqual(t, kept.DHCP.ClientID, []byte{1, 3})
	l, _, err := a.Request(AddressRequest{Pool: p.ID, Key: "web"})
	assert.NilError(t, err)
	assert.Equal(t, l.MAC.String(), mac.String())
	a.Release(p.ID, got)
	l, _, err = a.Request(AddressRequest{Pool: p.ID, Addr: got, Key: "db"})
	assert.NilError(t, err)
	assert.Assert(t, l.MAC == nil && l.DHCP == nil, "another container does not get the slot")
}

func TestPeekTellsWhatComes(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/29", nil)
	mustRequest(t, a, AddressRequest{Pool: p.ID})
	a.Release(p.ID, addr("10.1.0.1"))
	before := state(a)
	got := a.Peek(p.ID, 100)
	assert.DeepEqual(t, got, []netip.Addr{addr("10.1.0.2"), addr("10.1.0.3"), addr("10.1.0.4"), addr("10.1.0.5"), addr("10.1.0.6"), addr("10.1.0.1")}, equalAddrs)
	assert.Equal(t, state(a), before)
	for _, want := range got {
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), want)
	}
	assert.Equal(t, len(a.Peek(p.ID, 1)), 0)
	assert.Equal(t, len(a.Peek("none", 1)), 0)
}

func TestStats(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := bound(t, a, "10.1.0.0/24", nil)
	for range 5 {
		mustRequest(t, a, AddressRequest{Pool: p.ID})
	}
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.0.254"), Gateway: true})
	_, err := a.Attach(p.ID, addr("10.1.0.5"), "e")
	assert.NilError(t, err)
	a.Release(p.ID, addr("10.1.0.1"))
	c.t = c.t.Add(DefaultQuarantine)
	a.Release(p.ID, addr("10.1.0.2"))
	assert.NilError(t, a.Reserve(p.ID, addr("10.1.0.9"), "web"))
	assert.NilError(t, a.MarkConflict(p.ID, Conflict{Addr: addr("10.1.0.8"), Until: c.t.Add(time.Hour)}))
	got, ok := a.Stats(p.ID)
	assert.Assert(t, ok)
	assert.Equal(t, got, Stats{Size: 254, Used: 4, Attached: 1, Quarantined: 1, Reserved: 1, Conflicts: 1, Free: 247})
	big := mustPool(t, a, PoolRequest{Prefix: prefix("fd00::/48")})
	got, _ = a.Stats(big.ID)
	assert.Equal(t, got, Stats{Size: math.MaxUint64, Free: math.MaxUint64})
	_, ok = a.Stats("none")
	assert.Assert(t, !ok)
}
