package ipam

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// An AddressRequest asks for an address of a pool.
type AddressRequest struct {
	Pool string
	// Addr is the address the user wants; the zero Addr asks for any.
	Addr netip.Addr
	// Gateway says that it is for the network's gateway.
	Gateway bool
	// Key is the container's name or what else it is known by, where that is
	// known. The same container asking twice without using the first answer
	// gets it again.
	Key string
	// Probed says that Addr may be had although somebody on the LAN was found
	// to have it: the caller has looked again, or only warns.
	Probed bool
	// MAC and DHCP become those of the lease. With neither, an address that
	// the key has or had keeps what it had.
	MAC  net.HardwareAddr
	DHCP *DHCP
}

// A Taken error says that an address is in use, and by whom. It is a conflict.
type Taken struct {
	error
	// Pool is the pool that has the address: another one of the same parent,
	// perhaps.
	Pool Pool
	// Lease is the one in the way.
	Lease Lease
}

// Unwrap gives the kind.
func (t *Taken) Unwrap() error { return t.error }

// An InUse error says that somebody on the LAN was found to have an address. It is
// a conflict.
type InUse struct {
	error
	// MAC is who answered.
	MAC net.HardwareAddr
}

// Unwrap gives the kind.
func (e *InUse) Unwrap() error { return e.error }

// Request gives out an address. The pool is returned because its Next has moved.
//
// An address that is wanted may lie outside the pool's range (an aux-address
// does) and in excluded ranges. Errors: notfound for the pool, invalid for an
// address that no host of the pool can have, *Taken when it is in use, *InUse when
// somebody on the LAN has it, conflict when it is reserved for another key,
// exhausted when none is free.
func (a *Allocator) Request(req AddressRequest) (Lease, Pool, error) {
	p, lease, err := a.decide(req)
	if err != nil {
		return Lease{}, Pool{}, err
	}
	a.change(p, lease)
	return lease, p.Pool, nil
}

// Hold is the first half of Request: it chooses an address and keeps all others
// from it until Commit or Cancel. Nothing has changed for the record until then.
// The answer to the same key is another one meanwhile.
func (a *Allocator) Hold(req AddressRequest) (Lease, Pool, error) {
	p, lease, err := a.decide(req)
	if err != nil {
		return Lease{}, Pool{}, err
	}
	i := a.entryOf(p.led, number(lease.Addr))
	a.entries.at(i).marks |= markPending
	a.pending[i] = pending{p, lease}
	return lease, p.Pool, nil
}

type pending struct {
	pool  *pool
	lease Lease
}

// Commit makes a held address a lease, with what MAC, DHCP and Key now say. The
// error is a conflict when it is not held any more, because its pool was released.
func (a *Allocator) Commit(poolID string, lease Lease) (Pool, error) {
	p, ok := a.unhold(poolID, lease.Addr)
	if !ok {
		return Pool{}, fault.Conflict("address %s was given up meanwhile: its pool %q was released", lease.Addr, poolID)
	}
	a.change(p, lease)
	return p.Pool, nil
}

// Cancel undoes Hold: all is as it was, except that the search for an address that
// was never used goes on after this one. It reports whether the address was held.
func (a *Allocator) Cancel(poolID string, addr netip.Addr) bool {
	p, ok := a.unhold(poolID, addr)
	if ok {
		a.tidy(p.led, p.led.table.get(number(addr)))
	}
	return ok
}

// unhold takes the mark from a held address.
func (a *Allocator) unhold(poolID string, addr netip.Addr) (*pool, bool) {
	p, ok := a.pools[poolID]
	if !ok || addr.Is4() != p.is4() {
		return nil, false
	}
	i := p.led.table.get(number(addr))
	if i == 0 {
		return nil, false
	}
	if held, ok := a.pending[i]; !ok || held.pool != p {
		return nil, false
	}
	delete(a.pending, i)
	a.entries.at(i).marks &^= markPending
	return p, true
}

// tidy removes an entry that says nothing.
func (a *Allocator) tidy(l *ledger, i uint32) {
	if e := a.entries.at(i); e.kind == kindNone && e.marks == 0 {
		a.clear(l, i)
	}
}

// decide chooses the lease for a request.
func (a *Allocator) decide(req AddressRequest) (*pool, Lease, error) {
	p, ok := a.pools[req.Pool]
	if !ok {
		return nil, Lease{}, unknownPool(req.Pool)
	}
	now := a.tick()
	a.expire(p.led, now)
	lease := Lease{Addr: req.Addr, Role: RoleEndpoint, Key: req.Key, Since: now, MAC: req.MAC, DHCP: req.DHCP}
	switch {
	case req.Gateway:
		lease.Role = RoleGateway
	case req.Addr.IsValid() && p.Network == "" && req.Key == "":
		lease.Role = RoleReserved
	}
	if lease.Role != RoleEndpoint {
		lease.Key, lease.MAC, lease.DHCP = "", nil, nil
	}
	if req.Addr.IsValid() {
		lease.Named = true
		if req.Addr.Is6() != p.Prefix.Addr().Is6() || !p.Prefix.Contains(req.Addr) {
			return nil, Lease{}, fault.Invalid("address %s: want one of subnet %s", req.Addr, p.Prefix)
		}
		if !IsHost(p.Prefix, req.Addr) {
			return nil, Lease{}, fault.Invalid("address %s: it is the network or broadcast address of subnet %s", req.Addr, p.Prefix)
		}
		if err := a.available(p, lease, req.Probed); err != nil {
			return nil, Lease{}, err
		}
	} else {
		addr, err := a.pick(p, lease)
		if err != nil {
			return nil, Lease{}, err
		}
		lease.Addr = addr
	}
	a.inherit(p, &lease)
	return p, lease, nil
}

// inherit takes over the MAC address and DHCP data of a lease or tombstone of the
// same key.
func (a *Allocator) inherit(p *pool, lease *Lease) {
	if lease.Key == "" || lease.MAC != nil || lease.DHCP != nil {
		return
	}
	i := p.led.table.get(number(lease.Addr))
	if i == 0 {
		return
	}
	if e := a.entries.at(i); e.pool == p.no && e.key == lease.Key {
		old := a.lease(p.led, i)
		lease.MAC, lease.DHCP = old.MAC, old.DHCP
		lease.Named = lease.Named || e.kind == kindLease && old.Named
	}
}

// forgotten reports whether nobody can be using the lease any more: it is for an
// endpoint, none has it, and that for longer than dockerd takes to make one.
func (a *Allocator) forgotten(e *entry, now time.Time) bool {
	return e.kind == kindLease && a.numbered[e.pool].isLoose(e) && now.UnixNano()-e.since >= int64(ForgetAfter-slack)
}

// available says why an address cannot be leased.
func (a *Allocator) available(p *pool, want Lease, probed bool) error {
	n := number(want.Addr)
	i := p.led.table.get(n)
	if i == 0 {
		return nil
	}
	e := a.entries.at(i)
	if e.is(markPending) {
		return a.taken(p.led, p, i)
	}
	switch e.kind {
	case kindLease:
		again := e.pool == p.no && p.isLoose(e) && want.Role == RoleEndpoint && want.Key != "" && e.key == want.Key
		if !again && !a.forgotten(e, want.Since) {
			return a.taken(p.led, p, i)
		}
	case kindOutside:
		if !p.shares(n, want) {
			return a.taken(p.led, p, i)
		}
	case kindNone, kindReleased:
	}
	if want.Role != RoleEndpoint {
		return nil
	}
	if e.is(markReserved) {
		if r := p.led.reserved[n]; want.Key != "" && r.key != want.Key {
			return fault.Conflict("address %s of subnet %s is reserved for %s", want.Addr, p.Prefix, r.key)
		}
	}
	if c, ok := p.led.conflicts[n]; ok && !probed {
		return inUse(p, want.Addr, c)
	}
	return nil
}

func inUse(p *pool, addr netip.Addr, c conflict) error {
	return &InUse{
		error: fault.Conflict("address %s of subnet %s is in use on the LAN by %s", addr, p.Prefix, c.mac),
		MAC:   slices.Clone(c.mac),
	}
}

// shares reports whether the pool may hold an address that is outside Docker: with
// other pools of its parent, since there is one router for all of them; or once
// more the gateway of its own that it was not told to have got.
func (p *pool) shares(n num, want Lease) bool {
	own, held := p.led.holding(n, p)
	if held {
		return want.Role == RoleGateway && own.Role == RoleGateway && p.Network == ""
	}
	return want.Role != RoleEndpoint && p.Options.Parent != ""
}

// taken says who has the address of an entry of the ledger, which is that of the
// pool, or will be.
func (a *Allocator) taken(l *ledger, p *pool, i uint32) error {
	e := a.entries.at(i)
	addr, owner := e.addr.addr(l.is4), p
	var held Lease
	by := "by a container"
	switch pend, isPending := a.pending[i]; {
	case isPending:
		owner, held = pend.pool, pend.lease
		by = "by a container that is starting"
	case e.kind == kindOutside:
		var ok bool
		if held, ok = l.holding(e.addr, p); !ok {
			owner, held = l.outside[e.addr][0].pool, l.outside[e.addr][0].lease
		}
		if by = "as the gateway"; held.Role == RoleReserved {
			by = "as a reserved address (--aux-address)"
		}
	default:
		owner, held = a.numbered[e.pool], a.lease(l, i)
		if held.Endpoint != "" {
			by = "by endpoint " + short(held.Endpoint)
		}
	}
	if held.Key != "" {
		by += fmt.Sprintf(" of container %s", held.Key)
	}
	if owner != p && owner.Network != "" {
		by += fmt.Sprintf(" on Berth network %s of the same parent %s", short(owner.Network), l.parent)
	}
	return &Taken{
		error: fault.Conflict("address %s of subnet %s is already in use %s", addr, p.Prefix, by),
		Pool:  owner.Pool,
		Lease: held,
	}
}
