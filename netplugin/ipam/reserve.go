package ipam

import (
	"bytes"
	"cmp"
	"math"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Reservation keeps an address for a key. It is plain data.
type Reservation struct {
	Addr netip.Addr
	Key  string
	// Since is when it was made.
	Since time.Time
}

// A Conflict is an address that somebody on the LAN was found to have. It is
// plain data.
type Conflict struct {
	Addr netip.Addr
	// MAC is who answered.
	MAC net.HardwareAddr
	// Since is when that was found; the zero Time is now, or when it was found
	// first.
	Since time.Time
	// Until is when the address may be tried again.
	Until time.Time
}

// maxKey is longer than any name of a container.
const maxKey = 256

// Reserve keeps an address for a key, until Unreserve or the end of the pool:
// only that key gets it without asking for it by name, and only that key or one
// who is not known by any. It may lie outside the range and in excluded ranges.
// The same again is success. Errors: notfound for the pool, invalid for the
// address or key, conflict when it is reserved for another key, *Taken when
// another has it, *InUse when somebody on the LAN has it.
func (a *Allocator) Reserve(poolID string, addr netip.Addr, key string) error {
	p, ok := a.pools[poolID]
	if !ok {
		return unknownPool(poolID)
	}
	if !p.Prefix.Contains(addr) || !IsHost(p.Prefix, addr) {
		return fault.Invalid("address %s: want that of a host of subnet %s", addr, p.Prefix)
	}
	if key == "" || len(key) > maxKey {
		return fault.Invalid("reservation of %s: want the name of a container, of at most %d bytes", addr, maxKey)
	}
	at := a.tick()
	a.expire(p.led, at)
	n := number(addr)
	if r, ok := p.led.reserved[n]; ok {
		if r.key == key && r.pool == p {
			return nil
		}
		return fault.Conflict("address %s of subnet %s is reserved for %s already", addr, p.Prefix, r.key)
	}
	if i := p.led.table.get(n); i != 0 {
		e := a.entries.at(i)
		others := e.kind == kindLease && (e.pool != p.no || e.key != "" && e.key != key)
		if others || e.kind == kindOutside || e.is(markPending) {
			return a.taken(p.led, p, i)
		}
	}
	if c, ok := p.led.conflicts[n]; ok {
		return inUse(p, addr, c)
	}
	at = a.tick()
	a.reserve(p, n, key, at.UnixNano())
	a.record(Reserved{Pool: poolID, Reservation: Reservation{addr, key, at}})
	return nil
}

func (a *Allocator) reserve(p *pool, n num, key string, at int64) {
	led := p.led
	if led.reserved == nil {
		led.reserved = make(map[num]reservation)
	}
	led.reserved[n] = reservation{p, key, at}
	if p.reserved == nil {
		p.reserved = make(map[string][]netip.Addr)
	}
	addrs := slices.Concat(p.reserved[key], []netip.Addr{n.addr(led.is4)})
	slices.SortFunc(addrs, netip.Addr.Compare)
	p.reserved[key] = addrs

	// What the key had before does not count any more, and nor does who had
	// the address.
	for i := a.keys.first(&a.entries, p.no, key); i != 0; {
		e, more := a.entries.at(i), a.keys.more(&a.entries, i)
		if e.kind == kindReleased && p.prefersOther(key, e.addr.addr(led.is4)) {
			a.unkey(led, i, at)
		}
		i = more
	}
	i := a.entryOf(led, n)
	e := a.entries.at(i)
	if e.kind == kindReleased && (e.key != key || e.pool != p.no) {
		a.unkey(led, i, at)
	}
	e.marks |= markReserved
	a.relink(led, i)
}

// Unreserve ends a reservation and reports whether there was one.
func (a *Allocator) Unreserve(poolID string, addr netip.Addr) bool {
	p, ok := a.pools[poolID]
	if !ok || addr.Is4() != p.is4() {
		return false
	}
	n := number(addr)
	if r, ok := p.led.reserved[n]; !ok || r.pool != p {
		return false
	}
	at := a.tick()
	a.dropReservation(p.led, n)
	a.unmark(p.led, n, markReserved, at.UnixNano())
	a.record(Unreserved{Pool: poolID, Addr: addr, At: at})
	return true
}

// dropReservation forgets a reservation, but leaves the mark.
func (a *Allocator) dropReservation(l *ledger, n num) {
	r := l.reserved[n]
	delete(l.reserved, n)
	addr := n.addr(l.is4)
	kept := slices.DeleteFunc(r.pool.reserved[r.key], func(x netip.Addr) bool { return x == addr })
	if r.pool.reserved[r.key] = kept; len(kept) == 0 {
		delete(r.pool.reserved, r.key)
	}
	i := l.table.get(n)
	if e := a.entries.at(i); e.kind == kindReleased && e.pool == r.pool.no && e.key == r.key && r.pool.prefersOther(r.key, addr) {
		a.setKey(l, i, "")
		e.marks &^= markNamed
	}
}

// unmark takes a mark from an address. If it is a released one, it counts as
// released now.
func (a *Allocator) unmark(l *ledger, n num, mark uint8, at int64) {
	i := l.table.get(n)
	e := a.entries.at(i)
	e.marks &^= mark
	if e.kind == kindNone {
		a.tidy(l, i)
		return
	}
	if e.kind == kindReleased && e.list == inNone {
		e.since = at
	}
	a.relink(l, i)
	if e.list == inFree || e.list == inPinned {
		a.limit(l, l.home(n), e.since)
	}
}

// MarkConflict says that somebody on the LAN has an address: it is not given to
// one who wants any until then, nor to one who asks for it by name. It may be
// leased: then this holds after its release. Marked again, the later news count.
// Errors: notfound for the pool, invalid
// for the address.
func (a *Allocator) MarkConflict(poolID string, c Conflict) error {
	p, ok := a.pools[poolID]
	if !ok {
		return unknownPool(poolID)
	}
	if !p.Prefix.Contains(c.Addr) {
		return fault.Invalid("address %s: want one of subnet %s", c.Addr, p.Prefix)
	}
	c.MAC = slices.Clone(c.MAC)
	if c.Since.IsZero() {
		c.Since = a.now()
		if old, ok := p.led.conflicts[number(c.Addr)]; ok && bytes.Equal(old.mac, c.MAC) {
			c.Since = time.Unix(0, old.since)
		}
	}
	a.mark(p, c)
	a.record(ConflictSet{Pool: poolID, Conflict: c})
	return nil
}

func (a *Allocator) mark(p *pool, c Conflict) {
	led, n := p.led, number(c.Addr)
	if led.conflicts == nil {
		led.conflicts = make(map[num]conflict)
	}
	led.conflicts[n] = conflict{p, c.MAC, c.Since.UnixNano(), c.Until.UnixNano()}
	led.due = min(led.due, c.Until.UnixNano())
	i := a.entryOf(led, n)
	a.entries.at(i).marks |= markConflict
	a.relink(led, i)
}

// ClearConflict ends a conflict on a pool's ledger and reports whether there was
// one.
func (a *Allocator) ClearConflict(poolID string, addr netip.Addr) bool {
	p, ok := a.pools[poolID]
	if !ok || addr.Is4() != p.is4() {
		return false
	}
	n := number(addr)
	c, ok := p.led.conflicts[n]
	if ok {
		a.endConflict(p.led, n, c)
	}
	return ok
}

func (a *Allocator) endConflict(l *ledger, n num, c conflict) {
	at := a.tick()
	a.dropConflict(l, n)
	a.unmark(l, n, markConflict, at.UnixNano())
	a.record(ConflictCleared{Pool: c.pool.ID, Addr: n.addr(l.is4), At: at})
}

// dropConflict forgets a conflict, but leaves the mark.
func (a *Allocator) dropConflict(l *ledger, n num) {
	delete(l.conflicts, n)
	if len(l.conflicts) == 0 {
		l.due = math.MaxInt64
	}
}

// expire ends the conflicts that are over.
func (a *Allocator) expire(l *ledger, now time.Time) {
	if now.UnixNano() < l.due {
		return
	}
	var over []num
	l.due = math.MaxInt64
	for n, c := range l.conflicts {
		if c.until <= now.UnixNano() {
			over = append(over, n)
		} else {
			l.due = min(l.due, c.until)
		}
	}
	slices.SortFunc(over, func(x, y num) int {
		return cmp.Or(cmp.Compare(l.conflicts[x].until, l.conflicts[y].until), cmp.Compare(x.hi, y.hi), cmp.Compare(x.lo, y.lo))
	})
	for _, n := range over {
		a.endConflict(l, n, l.conflicts[n])
	}
}
