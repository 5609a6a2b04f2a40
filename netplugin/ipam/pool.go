package ipam

import (
	"fmt"
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
	// Options are the rest of what the user said.
	Options PoolOptions
	// Network is the ID of the Berth network that uses the pool; "" for
	// networks of other drivers, and until CreateNetwork.
	Network string
	// Since is when the pool was requested.
	Since time.Time
	// Used says that an address was requested from the pool.
	Used bool
	// Next is where the search for an address that was never used goes on.
	// Zero is the start.
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

// pool is a Pool with what is needed to choose from it.
type pool struct {
	Pool
	// no is its number in entries.
	no  uint32
	led *ledger
	// first and last are the first and last address to give out, which are in
	// Range; first is the higher when there is none.
	first, last num
	// excluded are the spans of Prefix that automatic addresses avoid.
	excluded []span
	// loose are the leases in Range for endpoints of a Berth network that no
	// endpoint has: those that may have been forgotten.
	loose list
	// held counts leases.
	held int
	// exhausted is ledger.freed when the last search found that all addresses
	// were used before.
	exhausted uint64
	// reserved are the addresses kept for each key, in order.
	reserved map[string][]netip.Addr
}

func newPool(p Pool) *pool {
	p.Options = p.Options.normalized()
	out := &pool{Pool: p, first: num{lo: 1}, excluded: spansIn(p.Options.Exclude, p.Prefix)}
	if first, last, ok := hosts(p.Prefix, p.Range); ok {
		out.first, out.last = number(first), number(last)
	}
	return out
}

func (p *pool) is4() bool { return p.Prefix.Addr().Is4() }

// automatic reports whether the address may be given to one who wants any.
func (p *pool) automatic(n num) bool {
	if n.less(p.first) || p.last.less(n) {
		return false
	}
	_, excluded := spanOf(p.excluded, n)
	return !excluded
}

// unused returns the lowest address from first to last that is not excluded and
// was never used.
func (p *pool) unused(first, last num) (num, bool) {
	for !last.less(first) {
		n, ok := p.led.table.free(first, last)
		if !ok {
			return num{}, false
		}
		out, excluded := spanOf(p.excluded, n)
		if !excluded {
			return n, true
		}
		if first = out.last.next(); first == (num{}) {
			break // past the highest address of all
		}
	}
	return num{}, false
}

// rotate returns the first address from Next on that was never used, or else from
// the beginning.
func (p *pool) rotate() (num, bool) {
	if p.last.less(p.first) || p.exhausted == p.led.freed {
		return num{}, false
	}
	start := p.first
	if p.Next.IsValid() {
		if next := number(p.Next); p.first.less(next) && !p.last.less(next) {
			start = next
		}
	}
	n, ok := p.unused(start, p.last)
	if !ok && start != p.first {
		n, ok = p.unused(p.first, start.prev())
	}
	if !ok {
		p.exhausted = p.led.freed
	}
	return n, ok
}

// isLoose reports whether the lease is one that no endpoint has although one
// should.
func (p *pool) isLoose(e *entry) bool {
	return e.kind == kindLease && p.Network != "" && e.endpoint == 0
}

// name is the pool for a message to someone who does not know pool IDs.
func (p *pool) name() string {
	if p.Network != "" {
		return fmt.Sprintf("subnet %s of Berth network %s", p.Prefix, short(p.Network))
	}
	return fmt.Sprintf("subnet %s, which Berth gave to another network", p.Prefix)
}

// full is the error when there is nothing to give out. Those that cannot be
// given out are counted, since they are what the user can change.
func (p *pool) full() error {
	where := "pool " + p.Prefix.String()
	if p.Range != p.Prefix {
		where = fmt.Sprintf("range %s of pool %s", p.Range, p.Prefix)
	}
	text := fmt.Sprintf("no free address in %s: the pool has %d in use", where, p.held)
	if n := len(p.reserved); n > 0 {
		text += fmt.Sprintf(", reservations for %d containers", n)
	}
	if n := len(p.led.conflicts); n > 0 {
		text += fmt.Sprintf(", %d that others on the LAN use", n)
	}
	if len(p.excluded) > 0 {
		text += ", and excluded ranges"
	}
	return fault.Exhausted("%s", text)
}

// short is an ID as `docker ps` shows it.
func short(id string) string {
	const n = 12
	return id[:min(n, len(id))]
}

func unknownPool(id string) error {
	const most = 80
	return fault.NotFound("address pool %q is not known to Berth", id[:min(most, len(id))])
}
