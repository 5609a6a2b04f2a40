package ipam

import (
	"fmt"
	"net/netip"

	"github.com/berth-plugin/berth/shared/fault"
)

// An AddressRequest asks for an address of a pool.
type AddressRequest struct {
	Pool string
	// Addr is the address the user wants; the zero Addr asks for any.
	Addr netip.Addr
	// Gateway says that it is for the network's gateway.
	Gateway bool
	// Key is the container's name, where it is known. The same container
	// asking twice without using the first answer gets it again.
	Key string
}

// A Taken error says that an address is in use, and by whom. It is a conflict.
type Taken struct {
	error
	// Lease is the one in the way.
	Lease Lease
}

// Unwrap gives the kind.
func (t *Taken) Unwrap() error { return t.error }

// Request gives out an address. The pool is returned because its Next has moved.
//
// An address that is wanted may lie outside the pool's range (an aux-address
// does). Errors: notfound for the pool, invalid for an address that no host of
// the pool can have, *Taken when it is in use, exhausted when none is free.
func (a *Allocator) Request(req AddressRequest) (Lease, Pool, error) {
	p, ok := a.pools[req.Pool]
	if !ok {
		return Lease{}, Pool{}, unknownPool(req.Pool)
	}
	now := a.cfg.Now()
	lease := Lease{Addr: req.Addr, Role: RoleEndpoint, Key: req.Key, Since: now}
	switch {
	case req.Gateway:
		lease.Role = RoleGateway
	case req.Addr.IsValid() && p.Network == "":
		lease.Role = RoleReserved
	}

	if req.Addr.IsValid() {
		if req.Addr.Is6() != p.Prefix.Addr().Is6() || !p.Prefix.Contains(req.Addr) {
			return Lease{}, Pool{}, fault.Invalid("address %s: want one of subnet %s", req.Addr, p.Prefix)
		}
		if !IsHost(p.Prefix, req.Addr) {
			return Lease{}, Pool{}, fault.Invalid("address %s: it is the network or broadcast address of subnet %s", req.Addr, p.Prefix)
		}
		if err := p.available(lease); err != nil {
			return Lease{}, Pool{}, err
		}
	} else if err := a.pickAny(p, &lease); err != nil {
		return Lease{}, Pool{}, err
	}

	p.Used = true
	p.put(lease)
	return lease, p.Pool, nil
}

// pickAny chooses the address of a request that wants none.
func (a *Allocator) pickAny(p *pool, lease *Lease) error {
	if lease.Role == RoleGateway {
		// The first address of the subnet, also where --ip-range is
		// elsewhere: it is what users expect of a gateway.
		first, _, ok := hosts(p.Prefix, p.Prefix)
		if ok && !p.held.has(number(first)) {
			lease.Addr = first
			return nil
		}
	} else if own, ok := p.byKey(lease.Key); ok {
		lease.Addr = own.Addr
		return nil
	}
	addr, err := p.pick(lease.Since)
	if err != nil {
		return err
	}
	lease.Addr = addr
	p.Next = addr.Next()
	return nil
}

// available says why an address cannot be leased.
func (p *pool) available(want Lease) error {
	held, ok := p.leases[want.Addr]
	if !ok || p.forgotten(held, want.Since) {
		return nil
	}
	_, loose := p.loose[want.Addr]
	if loose && want.Role == RoleEndpoint && want.Key != "" && held.Key == want.Key {
		return nil
	}
	return p.taken(*held)
}

func (p *pool) taken(held Lease) error {
	by := "by a container"
	switch {
	case held.Role == RoleGateway:
		by = "as the gateway"
	case held.Role == RoleReserved:
		by = "as a reserved address (--aux-address)"
	case held.Endpoint != "":
		by = "by endpoint " + short(held.Endpoint)
	}
	if held.Key != "" && held.Role == RoleEndpoint {
		by += fmt.Sprintf(" of container %s", held.Key)
	}
	return &Taken{
		error: fault.Conflict("address %s of subnet %s is already in use %s", held.Addr, p.Prefix, by),
		Lease: held,
	}
}

// Release ends the lease of an address. When an endpoint still has the address,
// the lease stays, marked, and is returned with kept set: it ends with Detach.
// dockerd removes the endpoint before it releases the address, so this is either
// a message that comes late, when the next container already has the address, or
// an endpoint whose end dockerd could not tell.
func (a *Allocator) Release(poolID string, addr netip.Addr) (l Lease, kept bool) {
	p, ok := a.pools[poolID]
	if !ok {
		return Lease{}, false
	}
	held, ok := p.leases[addr]
	if !ok {
		return Lease{}, false
	}
	if held.Endpoint != "" {
		held.Released = true
		return *held, true
	}
	p.remove(addr)
	return *held, false
}

// Attach gives an address to an endpoint. It takes the address when it had been
// given up meanwhile. The error is *Taken when it belongs to another, invalid
// when no host of the pool can have it.
func (a *Allocator) Attach(poolID string, addr netip.Addr, endpoint string) (Lease, error) {
	p, ok := a.pools[poolID]
	if !ok {
		return Lease{}, unknownPool(poolID)
	}
	if !p.Prefix.Contains(addr) || !IsHost(p.Prefix, addr) {
		return Lease{}, fault.Invalid("address %s: want that of a host of subnet %s", addr, p.Prefix)
	}
	lease := Lease{Addr: addr, Role: RoleEndpoint, Since: a.cfg.Now()}
	if held, ok := p.leases[addr]; ok {
		if held.Role != RoleEndpoint || held.Endpoint != "" && held.Endpoint != endpoint {
			return Lease{}, p.taken(*held)
		}
		lease = *held
	}
	lease.Endpoint, lease.Released = endpoint, false
	p.put(lease)
	return lease, nil
}

// Detach takes an address from an endpoint that is gone. The lease stays until
// dockerd releases it, or is forgotten; when dockerd already did, it ends and
// kept is false. It does nothing when another endpoint has the address.
func (a *Allocator) Detach(poolID string, addr netip.Addr, endpoint string) (l Lease, kept bool) {
	p, ok := a.pools[poolID]
	if !ok {
		return Lease{}, false
	}
	held, ok := p.leases[addr]
	if !ok {
		return Lease{}, false
	}
	lease := *held
	if lease.Endpoint != endpoint {
		return lease, true
	}
	if lease.Released {
		p.remove(addr)
		return lease, false
	}
	lease.Endpoint, lease.Since = "", a.cfg.Now()
	p.put(lease)
	return lease, true
}

// Lease returns the lease of an address.
func (a *Allocator) Lease(poolID string, addr netip.Addr) (Lease, bool) {
	p, ok := a.pools[poolID]
	if !ok {
		return Lease{}, false
	}
	held, ok := p.leases[addr]
	if !ok {
		return Lease{}, false
	}
	return *held, true
}

// RestoreLease puts back a lease as it was, when its end could not be stored.
func (a *Allocator) RestoreLease(poolID string, l Lease) {
	if p, ok := a.pools[poolID]; ok {
		p.put(l)
	}
}
