package ipam

import (
	"maps"
	"math"
	"net/netip"
	"slices"
	"time"
)

// A State is what an address is at present, in one word.
type State string

const (
	// StateGateway is that of the network's gateway.
	StateGateway State = "gateway"
	// StateAux is that of something outside Docker, which dockerd reserved
	// (--aux-address).
	StateAux State = "aux"
	// StateActive is an endpoint's.
	StateActive State = "active"
	// StatePending is leased, or is about to be, and no endpoint has it.
	StatePending State = "pending"
	// StateConflict is not leased, and somebody else on the LAN has it.
	StateConflict State = "conflict"
	// StateReserved is kept for a key, which does not have it.
	StateReserved State = "reserved"
	// StateQuarantined was released a moment ago.
	StateQuarantined State = "quarantined"
	// StateReleased is free, and kept for the key that had it until there is
	// nothing else.
	StateReleased State = "released"
	// stateFree is that of all others.
	stateFree State = "free"
)

// An Address is what is known of an address that is not simply free.
type Address struct {
	// Lease is the lease, or what is left of it. Where only a mark is, Since
	// is that of the mark, MAC that of who has the address in spite of Berth, and
	// Key that of the reservation.
	Lease
	State State
	// Reserved is the key that the address is kept for, "" for none.
	Reserved string
	// Until is when a quarantine or conflict ends; zero in other states.
	Until time.Time
}

// stateOfEntry is the state of an address for those who ask a pool.
func (a *Allocator) stateOfEntry(p *pool, e *entry, now int64) State {
	switch {
	case e.kind == kindOutside:
		holders := p.led.outside[e.addr]
		role := holders[0].lease.Role
		if own, ok := p.led.holding(e.addr, p); ok {
			role = own.Role
		}
		if role == RoleGateway {
			return StateGateway
		}
		return StateAux
	case e.kind == kindLease && e.endpoint != 0:
		return StateActive
	case e.kind == kindLease, e.is(markPending):
		return StatePending
	case e.is(markConflict) && p.led.conflicts[e.addr].until > now:
		return StateConflict
	case e.is(markReserved):
		return StateReserved
	case e.kind == kindReleased && now-e.since < int64(p.Options.Quarantine-slack):
		return StateQuarantined
	case e.kind == kindReleased && e.key != "":
		return StateReleased
	}
	return stateFree
}

// known reports whether an entry is the pool's and not simply free.
func (a *Allocator) known(p *pool, i uint32, now int64) bool {
	e := a.entries.at(i)
	_, outside := p.led.holding(e.addr, p)
	held, pending := a.pending[i]
	conflict, marked := p.led.conflicts[e.addr]
	reserved, kept := p.led.reserved[e.addr]
	switch a.stateOfEntry(p, e, now) {
	case StateGateway, StateAux:
		return outside
	case StatePending:
		return pending && held.pool == p || e.kind == kindLease && e.pool == p.no
	case StateConflict:
		return marked && conflict.pool == p || kept && reserved.pool == p || e.pool == p.no
	case StateReserved:
		return reserved.pool == p
	case StateActive, StateQuarantined, StateReleased:
		return e.pool == p.no
	case stateFree:
	}
	return false
}

// address returns what is known of an entry.
func (a *Allocator) address(p *pool, i uint32, now int64) Address {
	e := a.entries.at(i)
	out := Address{State: a.stateOfEntry(p, e, now)}
	held, pending := a.pending[i]
	r, reserved := p.led.reserved[e.addr]
	switch {
	case e.kind == kindOutside:
		out.Lease, _ = p.led.holding(e.addr, p)
	case pending && held.pool == p:
		out.Lease = held.lease
	case e.kind == kindLease || e.kind == kindReleased:
		out.Lease = a.lease(p.led, i)
	default:
		out.Lease = Lease{Addr: e.addr.addr(p.is4()), Role: RoleEndpoint}
		if reserved {
			out.Key, out.Since = r.key, time.Unix(0, r.since)
		}
	}
	if reserved {
		out.Reserved = r.key
	}
	switch out.State {
	case StateConflict:
		c := p.led.conflicts[e.addr]
		out.MAC, out.DHCP = slices.Clone(c.mac), nil
		out.Since, out.Until = time.Unix(0, c.since), time.Unix(0, c.until)
	case StateReserved:
		out.Key, out.Since = r.key, time.Unix(0, r.since)
	case StateQuarantined:
		out.Until = out.Since.Add(p.Options.Quarantine)
	case StateGateway, StateAux, StateActive, StatePending, StateReleased, stateFree:
	}
	return out
}

// Addresses returns what a pool has and keeps, sorted: its leases and what it
// holds for requests, its reservations, the conflicts that it found, and released
// addresses that are in quarantine or kept for a key.
func (a *Allocator) Addresses(id string) []Address {
	p, ok := a.pools[id]
	if !ok {
		return nil
	}
	now := a.now().UnixNano()
	var list []Address
	for i := range p.led.table.all() {
		if a.known(p, i, now) {
			list = append(list, a.address(p, i, now))
		}
	}
	slices.SortFunc(list, func(x, y Address) int { return x.Addr.Compare(y.Addr) })
	return list
}

// Address returns what a pool knows of an address; ok is false when it is simply
// free, or another pool's.
func (a *Allocator) Address(id string, addr netip.Addr) (_ Address, ok bool) {
	p, ok := a.pools[id]
	if !ok || !p.Prefix.Contains(addr) {
		return Address{}, false
	}
	i, now := p.led.table.get(number(addr)), a.now().UnixNano()
	if i == 0 || !a.known(p, i, now) {
		return Address{}, false
	}
	return a.address(p, i, now), true
}

// Leases returns the addresses in use of a pool, sorted.
func (a *Allocator) Leases(id string) []Lease {
	p, ok := a.pools[id]
	if !ok {
		return nil
	}
	var leases []Lease
	for i := range p.led.table.all() {
		e := a.entries.at(i)
		if e.kind == kindLease && e.pool == p.no {
			leases = append(leases, a.lease(p.led, i))
		}
	}
	for n := range p.led.outside {
		if l, ok := p.led.holding(n, p); ok {
			leases = append(leases, l)
		}
	}
	slices.SortFunc(leases, func(x, y Lease) int { return x.Addr.Compare(y.Addr) })
	return leases
}

// Tombstones returns what is known of a pool's released addresses, sorted.
func (a *Allocator) Tombstones(id string) []Tombstone {
	p, ok := a.pools[id]
	if !ok {
		return nil
	}
	var stones []Tombstone
	for i := range p.led.table.all() {
		e := a.entries.at(i)
		if e.kind == kindReleased && e.pool == p.no {
			stones = append(stones, a.tombstone(p.led, i))
		}
	}
	slices.SortFunc(stones, func(x, y Tombstone) int { return x.Addr.Compare(y.Addr) })
	return stones
}

// Reservations returns those of a pool, sorted.
func (a *Allocator) Reservations(id string) []Reservation {
	p, ok := a.pools[id]
	if !ok {
		return nil
	}
	var list []Reservation
	for _, key := range slices.Sorted(maps.Keys(p.reserved)) {
		for _, addr := range p.reserved[key] {
			list = append(list, Reservation{addr, key, time.Unix(0, p.led.reserved[number(addr)].since)})
		}
	}
	slices.SortFunc(list, func(x, y Reservation) int { return x.Addr.Compare(y.Addr) })
	return list
}

// Conflicts returns those in a pool's subnet, sorted, whichever pool of its parent
// found them.
func (a *Allocator) Conflicts(id string) []Conflict {
	p, ok := a.pools[id]
	if !ok {
		return nil
	}
	var list []Conflict
	for n, c := range p.led.conflicts {
		if found := c.of(n, p.led); p.Prefix.Contains(found.Addr) {
			list = append(list, found)
		}
	}
	slices.SortFunc(list, func(x, y Conflict) int { return x.Addr.Compare(y.Addr) })
	return list
}

func (c conflict) of(n num, l *ledger) Conflict {
	return Conflict{Addr: n.addr(l.is4), MAC: slices.Clone(c.mac), Since: time.Unix(0, c.since), Until: time.Unix(0, c.until)}
}

// Stats counts the addresses that a pool can give out by itself: those of its range
// that hosts can have and that are not excluded. Each is counted once, and Size is
// the sum of Used, Reserved, Quarantined, Conflicts and Free. What pools of the
// same parent have is as much in use as what the pool itself has.
type Stats struct {
	// Size is math.MaxUint64 when there are more, and Free then too.
	Size uint64
	// Used are leased or held for a request, by containers and others; Attached
	// is how many of them an endpoint has.
	Used, Attached uint64
	// Reserved are kept for a key that does not have them, Conflicts are
	// others' on the LAN, Quarantined were released a moment ago.
	Reserved, Conflicts, Quarantined uint64
	// Free are all others; Released is how many of these are kept for the key
	// that had them until there is nothing else.
	Free, Released uint64
}

// Stats counts a pool's addresses, one by one.
func (a *Allocator) Stats(id string) (Stats, bool) {
	p, ok := a.pools[id]
	if !ok {
		return Stats{}, false
	}
	s := Stats{Size: p.size()}
	now := a.now().UnixNano()
	for i := range p.led.table.all() {
		e := a.entries.at(i)
		if !p.automatic(e.addr) {
			continue
		}
		switch a.stateOfEntry(p, e, now) {
		case StateActive:
			s.Used++
			s.Attached++
		case StateGateway, StateAux, StatePending:
			s.Used++
		case StateConflict:
			s.Conflicts++
		case StateReserved:
			s.Reserved++
		case StateQuarantined:
			s.Quarantined++
		case StateReleased:
			s.Released++
		case stateFree:
		}
	}
	if s.Free = s.Size; s.Size != math.MaxUint64 {
		s.Free -= s.Used + s.Reserved + s.Conflicts + s.Quarantined
	}
	return s, true
}

func (p *pool) size() uint64 {
	if p.last.less(p.first) {
		return 0
	}
	size := distance(p.first, p.last)
	for _, out := range p.excluded {
		first, last := out.first, out.last
		if first.less(p.first) {
			first = p.first
		}
		if p.last.less(last) {
			last = p.last
		}
		if last.less(first) || size == math.MaxUint64 {
			continue
		}
		size -= distance(first, last)
	}
	return size
}

// distance is how many numbers there are from first to last.
func distance(first, last num) uint64 {
	hi, lo := last.hi-first.hi, last.lo-first.lo
	if last.lo < first.lo {
		hi--
	}
	if hi > 0 || lo == math.MaxUint64 {
		return math.MaxUint64
	}
	return lo + 1
}
