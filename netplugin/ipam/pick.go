package ipam

import (
	"net/netip"
	"slices"
	"time"
)

// pick chooses an automatic address for a lease that has all but that: one that
// the key has, had or is kept for; one that was never used, in turn; the one that
// was released first, if its quarantine is over; a forgotten one; the one released
// first in spite of its quarantine; one whose old user wants it again by name.
func (a *Allocator) pick(p *pool, want Lease) (netip.Addr, error) {
	if want.Role == RoleGateway {
		// What users expect of a gateway, also where --ip-range is elsewhere.
		if addr, ok := a.firstHost(p, want); ok {
			return addr, nil
		}
	} else if i := a.own(p, want); i.IsValid() {
		return i, nil
	}
	n, ok := p.rotate()
	if ok {
		addr := n.addr(p.is4())
		p.Next = addr.Next()
		return addr, nil
	}
	released := a.oldest(p, inFree)
	now, quarantine := want.Since.UnixNano(), int64(p.Options.Quarantine-slack)
	resting := released != 0 && now-a.entries.at(released).since < quarantine
	if released == 0 || resting {
		if i := a.oldestForgotten(p, want.Since); i != 0 {
			released = i
		}
	}
	if released == 0 {
		released = a.oldest(p, inPinned)
	}
	if released == 0 {
		return netip.Addr{}, p.full()
	}
	return a.entries.at(released).addr.addr(p.is4()), nil
}

// firstHost is the first address of the subnet that is not excluded, if it can be
// had.
func (a *Allocator) firstHost(p *pool, want Lease) (netip.Addr, bool) {
	addr, last, ok := hosts(p.Prefix, p.Prefix)
	if !ok {
		return netip.Addr{}, false
	}
	if out, excluded := spanOf(p.excluded, number(addr)); excluded {
		if !out.last.less(number(last)) {
			return netip.Addr{}, false
		}
		addr = out.last.next().addr(p.is4())
	}
	if i := p.led.table.get(number(addr)); i != 0 && a.entries.at(i).is(markReserved) {
		return netip.Addr{}, false
	}
	want.Addr = addr
	return addr, a.available(p, want, true) == nil
}

// own returns the address that is the key's in some way, the zero Addr for none.
// Where addresses are reserved for the key, what is left of its lease is one of
// these or does not count.
func (a *Allocator) own(p *pool, want Lease) netip.Addr {
	if want.Key == "" {
		return netip.Addr{}
	}
	var lease, released *entry
	for i := a.keys.first(&a.entries, p.no, want.Key); i != 0; i = a.keys.more(&a.entries, i) {
		e := a.entries.at(i)
		if e.is(markPending) || e.is(markConflict) {
			continue
		}
		switch {
		case e.kind == kindLease && p.isLoose(e) && (lease == nil || e.addr.less(lease.addr)):
			lease = e
		case e.kind == kindReleased && p.Options.Sticky && a.mayReturn(p, e):
			released = e
		}
	}
	switch {
	case lease != nil:
		return lease.addr.addr(p.is4())
	case released != nil:
		return released.addr.addr(p.is4())
	}
	for _, addr := range p.reserved[want.Key] {
		i := p.led.table.get(number(addr))
		if !a.entries.at(i).is(markConflict) && a.available(p, Lease{Addr: addr, Role: RoleEndpoint, Key: want.Key, Since: want.Since}, false) == nil {
			return addr
		}
	}
	return netip.Addr{}
}

// mayReturn reports whether a released address may go to its old user who does not
// ask for it.
func (a *Allocator) mayReturn(p *pool, e *entry) bool {
	if e.is(markReserved) {
		return p.led.reserved[e.addr].key == e.key
	}
	return p.automatic(e.addr)
}

// oldest returns the released address that the pool may give out and that was
// released first, 0 for none.
func (a *Allocator) oldest(p *pool, where place) uint32 {
	var first uint32
	for _, r := range p.led.ranges {
		if !contains(p.Range, r.prefix) {
			continue
		}
		i := r.free.head
		if where == inPinned {
			i = r.pinned.head
		}
		for i != 0 && !a.mayPick(p, i) {
			i = a.entries.at(i).next
		}
		if i != 0 && (first == 0 || a.entries.older(i, first)) {
			first = i
		}
	}
	return first
}

// oldestForgotten returns the lease that was forgotten first, 0 for none.
func (a *Allocator) oldestForgotten(p *pool, now time.Time) uint32 {
	i := p.loose.head
	for i != 0 && a.entries.at(i).is(markPending) {
		i = a.entries.at(i).next
	}
	if i == 0 || !a.forgotten(a.entries.at(i), now) {
		return 0
	}
	return i
}

// mayPick reports whether a released address is not held for a request at this
// moment and, where pools overlap, not excluded in this one. There are few that
// are.
func (a *Allocator) mayPick(p *pool, i uint32) bool {
	e := a.entries.at(i)
	return !e.is(markPending) && p.automatic(e.addr)
}

// Peek returns the next n addresses that requests without a key would get, in
// order, so that they can be looked for on the LAN in advance. It returns fewer
// when there are fewer. Nothing changes, but conflicts that are over end.
func (a *Allocator) Peek(poolID string, n int) []netip.Addr {
	p, ok := a.pools[poolID]
	if !ok {
		return nil
	}
	before := p.Next
	var addrs []netip.Addr
	for len(addrs) < n {
		lease, _, err := a.Hold(AddressRequest{Pool: poolID})
		if err != nil {
			break
		}
		addrs = append(addrs, lease.Addr)
	}
	for _, addr := range slices.Backward(addrs) {
		a.Cancel(poolID, addr)
	}
	p.Next = before
	return addrs
}

// Kept returns what a request with the key and without an address would get that
// is the key's own: an unused lease, or what is left of an earlier one, with its
// MAC address and DHCP data; ok is false when there is none.
func (a *Allocator) Kept(poolID, key string) (_ Lease, ok bool) {
	p, ok := a.pools[poolID]
	if !ok {
		return Lease{}, false
	}
	want := Lease{Role: RoleEndpoint, Key: key, Since: a.now()}
	if want.Addr = a.own(p, want); !want.Addr.IsValid() {
		return Lease{}, false
	}
	a.inherit(p, &want)
	return want, true
}
