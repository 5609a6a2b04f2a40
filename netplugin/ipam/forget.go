package ipam

import (
	"net/netip"

	"github.com/berth-plugin/berth/shared/fault"
)

// Forget makes an address of a pool free for all: it takes away a reservation,
// what is kept for a key, a quarantine, a conflict, and a lease that no endpoint
// has. It returns the address as it was. Errors: notfound for the pool, and for an
// address that is free already; *Taken when it is an endpoint's or will be, the
// gateway, reserved by dockerd, that of a network of another driver or of another
// pool. A reservation of another pool of the parent stays and is a conflict.
func (a *Allocator) Forget(poolID string, addr netip.Addr) (Address, error) {
	p, ok := a.pools[poolID]
	if !ok {
		return Address{}, unknownPool(poolID)
	}
	at := a.tick()
	a.expire(p.led, at)
	n := number(addr)
	var i uint32
	if p.Prefix.Contains(addr) {
		i = p.led.table.get(n)
	}
	if i == 0 {
		return Address{}, fault.NotFound("address %s of subnet %s is free already", addr, p.Prefix)
	}
	e := a.entries.at(i)
	if e.is(markPending) || e.kind == kindOutside || e.kind == kindLease && (e.pool != p.no || !p.isLoose(e)) {
		return Address{}, a.taken(p.led, p, i)
	}
	r, reserved := p.led.reserved[n]
	if reserved && r.pool != p {
		return Address{}, fault.Conflict("address %s is reserved for %s on another network of parent %s", addr, r.key, p.led.parent)
	}
	before := a.address(p, i, at.UnixNano())
	if before.State == stateFree {
		return Address{}, fault.NotFound("address %s of subnet %s is free already", addr, p.Prefix)
	}
	if e.kind != kindNone {
		holder := a.numbered[e.pool].ID
		a.clear(p.led, i)
		a.record(Forgotten{Pool: holder, Addr: addr, At: at})
	}
	if reserved {
		a.Unreserve(poolID, addr)
	}
	a.ClearConflict(poolID, addr)
	return before, nil
}
