package ipam

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"time"
)

// An Event is one change of an Allocator: PoolAdded, PoolChanged, PoolReleased,
// LeaseSet, LeaseGone, Forgotten, Reserved, Unreserved, ConflictSet or ConflictCleared. All
// are plain data. An Allocator to which the events of another are applied in
// their order decides as that one would; only the search for an address that was
// never used may go on a little earlier.
type Event interface {
	// appendTo encodes all but the version.
	appendTo(b []byte) []byte
}

type (
	// PoolAdded is a new pool.
	PoolAdded struct{ Pool Pool }

	// PoolChanged is a pool that has another network or parent.
	PoolChanged struct{ Pool Pool }

	// PoolReleased is the end of a pool and all that it has.
	PoolReleased struct{ Pool string }

	// LeaseSet is a new lease or a change of one.
	LeaseSet struct {
		// Pool is the ID of the pool.
		Pool  string
		Lease Lease
		// Next is the pool's Next.
		Next netip.Addr
	}

	// LeaseGone is the end of a lease.
	LeaseGone struct {
		Pool      string
		Tombstone Tombstone
	}

	// Forgotten is the end of a lease, or of what was left of one, that leaves
	// nothing.
	Forgotten struct {
		Pool string
		Addr netip.Addr
		At   time.Time
	}

	// Reserved is a new reservation.
	Reserved struct {
		Pool string
		Reservation
	}

	// Unreserved is the end of one.
	Unreserved struct {
		Pool string
		Addr netip.Addr
		At   time.Time
	}

	// ConflictSet is a conflict, new or again.
	ConflictSet struct {
		Pool string
		Conflict
	}

	// ConflictCleared is the end of one.
	ConflictCleared struct {
		Pool string
		Addr netip.Addr
		At   time.Time
	}
)

// Apply repeats a change. It records nothing. The error says what does not fit
// with what was applied before, which is damage; the Allocator is of no use then.
func (a *Allocator) Apply(e Event) error {
	switch e := e.(type) {
	case PoolAdded:
		return a.add(e.Pool)
	case PoolChanged:
		return a.applyChange(e.Pool)
	case PoolReleased:
		if _, ok := a.pools[e.Pool]; !ok {
			return notThere(e.Pool)
		}
		record := a.cfg.Record
		a.cfg.Record = nil
		a.ReleasePool(e.Pool)
		a.cfg.Record = record
		return nil
	case LeaseSet:
		return a.applyLease(e)
	case LeaseGone:
		return a.applyGone(e)
	case Forgotten:
		return a.applyForgotten(e)
	case Reserved:
		return a.applyReserved(e)
	case ConflictSet:
		p, err := a.poolWith(e.Pool, e.Addr)
		if err == nil {
			a.mark(p, e.Conflict)
		}
		return err
	case Unreserved:
		p, err := a.poolWith(e.Pool, e.Addr)
		if err != nil {
			return err
		}
		n := number(e.Addr)
		if r, ok := p.led.reserved[n]; !ok || r.pool != p {
			return fmt.Errorf("pool %s has no reservation of %s", e.Pool, e.Addr)
		}
		a.last = max(a.last, e.At.UnixNano())
		a.dropReservation(p.led, n)
		a.unmark(p.led, n, markReserved, e.At.UnixNano())
		return nil
	case ConflictCleared:
		p, err := a.poolWith(e.Pool, e.Addr)
		if err != nil {
			return err
		}
		n := number(e.Addr)
		if _, ok := p.led.conflicts[n]; !ok {
			return fmt.Errorf("pool %s has no conflict of %s", e.Pool, e.Addr)
		}
		a.last = max(a.last, e.At.UnixNano())
		a.dropConflict(p.led, n)
		a.unmark(p.led, n, markConflict, e.At.UnixNano())
		return nil
	}
	return fmt.Errorf("event %T is not known", e)
}

func notThere(id string) error { return fmt.Errorf("pool %q is not there", id) }

// poolWith returns a pool that has the address.
func (a *Allocator) poolWith(id string, addr netip.Addr) (*pool, error) {
	p, ok := a.pools[id]
	if !ok {
		return nil, notThere(id)
	}
	if !p.Prefix.Contains(addr) || addr.Zone() != "" {
		return nil, fmt.Errorf("pool %s has an address outside %s: %s", id, p.Prefix, addr)
	}
	return p, nil
}

func (a *Allocator) applyChange(to Pool) error {
	p, ok := a.pools[to.ID]
	if !ok {
		return notThere(to.ID)
	}
	if to.Options.Parent != p.Options.Parent && p.Options.Parent != "" {
		return fmt.Errorf("pool %s changes from parent %s to %q", to.ID, p.Options.Parent, to.Options.Parent)
	}
	if o := to.Options.normalized(); !o.equal(p.Options) {
		if err := a.configure(p, o); err != nil {
			return err
		}
	}
	if to.Network != p.Network {
		a.bind(p, to.Network)
	}
	return nil
}

func (a *Allocator) applyLease(e LeaseSet) error {
	p, err := a.poolWith(e.Pool, e.Lease.Addr)
	if err != nil {
		return err
	}
	switch e.Lease.Role {
	case RoleEndpoint, RoleGateway, RoleReserved:
	default:
		return fmt.Errorf("pool %s has a lease of %s for %q", e.Pool, e.Lease.Addr, e.Lease.Role)
	}
	n := number(e.Lease.Addr)
	if i := p.led.table.get(n); i != 0 {
		there := a.entries.at(i)
		container := e.Lease.Role == RoleEndpoint
		both := there.kind == kindOutside && container || there.kind == kindLease && (!container || there.pool != p.no)
		if both && (there.kind == kindOutside || there.endpoint != 0) {
			return fmt.Errorf("address %s of pool %s has two holders", e.Lease.Addr, e.Pool)
		}
	}
	p.Next = e.Next
	a.put(p, e.Lease)
	return nil
}

func (a *Allocator) applyGone(e LeaseGone) error {
	p, err := a.poolWith(e.Pool, e.Tombstone.Addr)
	if err != nil {
		return err
	}
	n := number(e.Tombstone.Addr)
	if i := p.led.table.get(n); i != 0 {
		there := a.entries.at(i)
		_, holds := p.led.holding(n, p)
		if there.kind == kindLease && there.pool != p.no || there.kind == kindOutside && !holds {
			return fmt.Errorf("address %s is not held by pool %s that gives it up", e.Tombstone.Addr, e.Pool)
		}
	}
	a.bury(p, &e.Tombstone)
	return nil
}

func (a *Allocator) applyForgotten(e Forgotten) error {
	p, err := a.poolWith(e.Pool, e.Addr)
	if err != nil {
		return err
	}
	i := p.led.table.get(number(e.Addr))
	if i == 0 {
		return fmt.Errorf("pool %s forgets %s, of which nothing is known", e.Pool, e.Addr)
	}
	if there := a.entries.at(i); there.kind != kindLease && there.kind != kindReleased || there.pool != p.no {
		return fmt.Errorf("pool %s forgets %s, which is not its own", e.Pool, e.Addr)
	}
	a.last = max(a.last, e.At.UnixNano())
	a.clear(p.led, i)
	return nil
}

func (a *Allocator) applyReserved(e Reserved) error {
	p, err := a.poolWith(e.Pool, e.Addr)
	if err != nil {
		return err
	}
	if _, ok := p.led.reserved[number(e.Addr)]; ok || e.Key == "" {
		return fmt.Errorf("pool %s reserves %s for %q, which cannot be", e.Pool, e.Addr, e.Key)
	}
	a.last = max(a.last, e.Since.UnixNano())
	a.reserve(p, number(e.Addr), e.Key, e.Since.UnixNano())
	return nil
}

// Snapshot returns events that make the present state in a new Allocator. What is
// held for requests that are not decided is not in it. The Allocator must not
// change meanwhile.
func (a *Allocator) Snapshot() iter.Seq[Event] {
	return func(yield func(Event) bool) {
		for _, p := range a.Pools() {
			if !yield(PoolAdded{p}) {
				return
			}
		}
		var events []Event
		for _, p := range a.pools {
			events = append(events, a.stateOf(p)...)
		}
		slices.SortStableFunc(events, compareAge)
		for _, e := range events {
			if !yield(e) {
				return
			}
		}
	}
}

// stateOf returns the events that make what a pool has, by age.
func (a *Allocator) stateOf(p *pool) []Event {
	led := p.led
	var events []Event
	for _, i := range a.entriesOf(p) {
		if a.entries.at(i).kind == kindLease {
			events = append(events, LeaseSet{Pool: p.ID, Lease: a.lease(led, i), Next: p.Next})
		} else {
			events = append(events, LeaseGone{Pool: p.ID, Tombstone: a.tombstone(led, i)})
		}
	}
	for n := range led.outside {
		if l, ok := led.holding(n, p); ok {
			events = append(events, LeaseSet{Pool: p.ID, Lease: l, Next: p.Next})
		}
	}
	for _, r := range a.Reservations(p.ID) {
		events = append(events, Reserved{Pool: p.ID, Reservation: r})
	}
	for n, c := range led.conflicts {
		if c.pool == p {
			events = append(events, ConflictSet{Pool: p.ID, Conflict: c.of(n, led)})
		}
	}
	slices.SortStableFunc(events, compareAge)
	return events
}

// compareAge puts marks first, which decide about tombstones, and then leases and
// tombstones in the order in which their lists have them.
func compareAge(x, y Event) int {
	rank := func(e Event) (int, time.Time, netip.Addr) {
		switch e := e.(type) {
		case LeaseSet:
			return 0, e.Lease.Since, e.Lease.Addr
		case LeaseGone:
			return 0, e.Tombstone.Since, e.Tombstone.Addr
		case Reserved:
			return -2, time.Time{}, e.Addr
		case ConflictSet:
			return -1, time.Time{}, e.Addr
		}
		return 1, time.Time{}, netip.Addr{}
	}
	rx, tx, ax := rank(x)
	ry, ty, ay := rank(y)
	if rx != ry {
		return rx - ry
	}
	if c := tx.Compare(ty); c != 0 {
		return c
	}
	return ax.Compare(ay)
}
