package ipam

import (
	"net/netip"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Pool is one subnet that was given out. It is plain data: what the driver
// stores.
type Pool struct {
	// ID is unique for each request, even for the same subnet.
	ID string
	// Prefix is the subnet, masked.
	Prefix netip.Prefix
	// Range is where automatic addresses come from (--ip-range), within
	// Prefix, and equal to it when the user gave none.
	Range netip.Prefix
	// Network is the ID of the Berth network that uses the pool; "" for
	// networks of other drivers, and until CreateNetwork.
	Network string
	// Since is when the pool was requested.
	Since time.Time
	// Used says that an address was requested from the pool.
	Used bool
	// Next is where the search for a free address goes on. Zero is the start.
	Next netip.Addr
}

// A Role is what an address is for.
type Role string

const (
	// RoleGateway is the address of the network's gateway.
	RoleGateway Role = "gateway"
	// RoleReserved is an address asked for by name before the network was
	// made: an --aux-address, which belongs to something outside Docker.
	RoleReserved Role = "reserved"
	// RoleEndpoint is a container's address.
	RoleEndpoint Role = "endpoint"
)

// A Lease is one address in use. It is plain data: what the driver stores.
type Lease struct {
	Addr netip.Addr
	Role Role
	// Key is the name of the container, "" where dockerd does not send it
	// (before Engine 29).
	Key string
	// Since is when the address was requested or last lost its endpoint.
	Since time.Time
	// Endpoint is the ID of the endpoint that has the address; "" when there
	// is none yet or any more, and for networks of other drivers.
	Endpoint string
	// Released says that dockerd gave the address back although Endpoint
	// still has it. The lease ends with the endpoint.
	Released bool
}

// pool is a Pool with its leases.
type pool struct {
	Pool
	leases map[netip.Addr]*Lease
	held   set
	// loose are the leases for endpoints of a Berth network that no endpoint
	// has: those that may have been forgotten.
	loose map[netip.Addr]*Lease
}

func newPool(p Pool) *pool {
	return &pool{
		Pool:   p,
		leases: make(map[netip.Addr]*Lease),
		held:   newSet(),
		loose:  make(map[netip.Addr]*Lease),
	}
}

// put adds a lease or replaces that of the same address.
func (p *pool) put(l Lease) {
	p.held.add(number(l.Addr))
	p.leases[l.Addr] = &l
	delete(p.loose, l.Addr)
	if p.Network != "" && l.Role == RoleEndpoint && l.Endpoint == "" {
		p.loose[l.Addr] = &l
	}
}

func (p *pool) remove(addr netip.Addr) {
	p.held.remove(number(addr))
	delete(p.leases, addr)
	delete(p.loose, addr)
}

// forgotten reports whether nobody can be using the lease any more: it is for an
// endpoint, none has it, and that for longer than dockerd takes to make one.
func (p *pool) forgotten(l *Lease, now time.Time) bool {
	_, loose := p.loose[l.Addr]
	return loose && now.Sub(l.Since) >= ForgetAfter
}

// pick chooses an automatic address.
func (p *pool) pick(now time.Time) (netip.Addr, error) {
	first, last, ok := hosts(p.Prefix, p.Range)
	if ok {
		if addr, ok := p.after(first, last); ok {
			return addr, nil
		}
		if addr, ok := p.oldestForgotten(now); ok {
			return addr, nil
		}
	}
	if p.Range != p.Prefix {
		return netip.Addr{}, fault.Exhausted("no free address in range %s of pool %s", p.Range, p.Prefix)
	}
	return netip.Addr{}, fault.Exhausted("no free address in pool %s", p.Prefix)
}

// after returns the first free address from Next to last, or else from first. The
// zero Next is less than any address.
func (p *pool) after(first, last netip.Addr) (netip.Addr, bool) {
	start := first
	if first.Less(p.Next) && !last.Less(p.Next) {
		start = p.Next
	}
	is4 := first.Is4()
	if n, ok := p.held.free(number(start), number(last)); ok {
		return n.addr(is4), true
	}
	if start == first {
		return netip.Addr{}, false
	}
	n, ok := p.held.free(number(first), number(start.Prev()))
	return n.addr(is4), ok
}

func (p *pool) oldestForgotten(now time.Time) (netip.Addr, bool) {
	var oldest *Lease
	for _, l := range p.loose {
		if !p.Range.Contains(l.Addr) || !p.forgotten(l, now) {
			continue
		}
		if oldest == nil || l.Since.Before(oldest.Since) || l.Since.Equal(oldest.Since) && l.Addr.Less(oldest.Addr) {
			oldest = l
		}
	}
	if oldest == nil {
		return netip.Addr{}, false
	}
	return oldest.Addr, true
}

// byKey returns the lease that the container of this name asked for and never
// used, because the request for its other address failed or the answer was lost.
func (p *pool) byKey(key string) (*Lease, bool) {
	if key == "" {
		return nil, false
	}
	var found *Lease
	for _, l := range p.loose {
		if l.Key == key && (found == nil || l.Addr.Less(found.Addr)) {
			found = l
		}
	}
	return found, found != nil
}
