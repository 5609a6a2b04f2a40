package ipam

import (
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// ForgetAfter is how long a lease without an endpoint, or a pool that nothing has
// used, is kept before it may be given to another. dockerd asks for addresses
// moments before it makes the endpoint; it repeats a request that was not
// answered for 15 seconds.
const ForgetAfter = 10 * time.Minute

// Config is what an Allocator does not know itself. All fields are needed.
type Config struct {
	// Supernets are where automatic pools come from, in this order.
	Supernets []Supernet
	// Now is the clock for Since and ForgetAfter.
	Now func() time.Time
	// Random makes pool IDs unique.
	Random io.Reader
}

// An Allocator decides which pools and addresses are given out. It is not safe
// for concurrent use: the caller holds a lock from a decision until it is stored,
// and undoes the decision with the opposite call when it cannot be stored.
type Allocator struct {
	cfg   Config
	pools map[string]*pool
}

// New returns an Allocator that has given out nothing.
func New(cfg Config) *Allocator {
	return &Allocator{cfg: cfg, pools: make(map[string]*pool)}
}

// Restore takes back a pool and its leases as they were stored.
func (a *Allocator) Restore(stored Pool, leases []Lease) error {
	if !stored.Prefix.IsValid() || !stored.Range.IsValid() || !contains(stored.Prefix, stored.Range) {
		return fmt.Errorf("pool %s has prefix %s and range %s", stored.ID, stored.Prefix, stored.Range)
	}
	p := newPool(stored)
	for _, l := range leases {
		if !p.Prefix.Contains(l.Addr) {
			return fmt.Errorf("pool %s has an address outside %s: %s", stored.ID, stored.Prefix, l.Addr)
		}
		p.put(l)
	}
	a.pools[stored.ID] = p
	return nil
}

// A PoolRequest asks for a subnet.
type PoolRequest struct {
	// Prefix is the subnet the user wants; the zero Prefix asks for one of
	// the supernets'.
	Prefix netip.Prefix
	// Range is where automatic addresses come from; zero is all of Prefix.
	Range netip.Prefix
	// IPv6 is the family.
	IPv6 bool
	// Busy are prefixes that an automatic pool must not overlap.
	Busy []netip.Prefix
	// Avoid are prefixes that an automatic pool only overlaps when there is
	// no other.
	Avoid []netip.Prefix
}

// RequestPool gives out a subnet. Each automatic one differs from all that have
// not been released: dockerd asks again, holding the first, until it is content.
//
// reclaimed are pools that were requested and never used and now make room for
// the subnet the user wants; they are released. Errors: invalid for a wrong
// subnet or range, conflict when the subnet overlaps another pool, exhausted when
// all supernets are in use.
func (a *Allocator) RequestPool(req PoolRequest) (_ Pool, reclaimed []string, _ error) {
	if err := req.check(); err != nil {
		return Pool{}, nil, err
	}
	now := a.cfg.Now()
	prefix := req.Prefix.Masked()
	if req.Prefix.IsValid() {
		for _, other := range a.sorted() {
			if !other.Prefix.Overlaps(prefix) {
				continue
			}
			if other.Used || other.Network != "" || len(other.leases) > 0 || now.Sub(other.Since) < ForgetAfter {
				return Pool{}, nil, fault.Conflict("subnet %s overlaps %s", prefix, other.name())
			}
			reclaimed = append(reclaimed, other.ID)
		}
	} else {
		var ok bool
		if prefix, ok = a.choose(req); !ok {
			return Pool{}, nil, fault.Exhausted("no free subnet left in the address pools %s: remove networks, set BERTH_POOLS or give --subnet", a.supernets(req.IPv6))
		}
	}
	id, err := a.newID(prefix)
	if err != nil {
		return Pool{}, nil, err
	}
	for _, old := range reclaimed {
		delete(a.pools, old)
	}
	rng := prefix
	if req.Range.IsValid() {
		rng = req.Range.Masked()
	}
	p := newPool(Pool{ID: id, Prefix: prefix, Range: rng, Since: now})
	a.pools[id] = p
	return p.Pool, reclaimed, nil
}

func (r PoolRequest) check() error {
	if !r.Prefix.IsValid() {
		if r.Range.IsValid() {
			return fault.Invalid("range %s: it needs a subnet, give --subnet", r.Range)
		}
		return nil
	}
	if r.Prefix.Addr().Is6() != r.IPv6 {
		return fault.Invalid("subnet %s: it is of the other address family", r.Prefix)
	}
	if err := CheckSubnet(r.Prefix); err != nil {
		return err
	}
	if !r.Range.IsValid() {
		return nil
	}
	if !contains(r.Prefix.Masked(), r.Range.Masked()) {
		return fault.Invalid("range %s: want a part of subnet %s", r.Range, r.Prefix.Masked())
	}
	if _, _, ok := hosts(r.Prefix.Masked(), r.Range.Masked()); !ok {
		return fault.Invalid("range %s: no address in it can belong to a host of subnet %s", r.Range, r.Prefix.Masked())
	}
	return nil
}

// choose returns the lowest free automatic pool.
func (a *Allocator) choose(req PoolRequest) (netip.Prefix, bool) {
	taken := make([]netip.Prefix, 0, len(a.pools)+len(req.Busy)+len(req.Avoid))
	for _, p := range a.pools {
		taken = append(taken, p.Prefix)
	}
	taken = append(taken, req.Busy...)
	for _, occupied := range [][]netip.Prefix{append(slices.Clone(taken), req.Avoid...), taken} {
		slices.SortFunc(occupied, comparePrefixes)
		for _, s := range a.cfg.Supernets {
			if s.Prefix.Addr().Is6() != req.IPv6 {
				continue
			}
			if p, ok := firstFree(s, occupied); ok {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}

// firstFree returns the lowest pool of the supernet that overlaps none of the
// occupied prefixes, which are sorted by address.
func firstFree(s Supernet, occupied []netip.Prefix) (netip.Prefix, bool) {
	candidate := netip.PrefixFrom(s.Prefix.Addr(), s.Size)
	for _, o := range occupied {
		// The whole family is the default route, which says nothing.
		if o.Bits() == 0 || !o.Overlaps(candidate) {
			continue
		}
		// On to the first pool that begins after both.
		end := lastAddr(candidate)
		if last := lastAddr(o); end.Less(last) {
			end = last
		}
		next := end.Next()
		if !next.IsValid() || !s.Prefix.Contains(next) {
			return netip.Prefix{}, false
		}
		candidate = netip.PrefixFrom(next, s.Size).Masked()
	}
	return candidate, true
}

func comparePrefixes(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

func (a *Allocator) supernets(is6 bool) string {
	var names []string
	for _, s := range a.cfg.Supernets {
		if s.Prefix.Addr().Is6() == is6 {
			names = append(names, s.String())
		}
	}
	return strings.Join(names, ",")
}

// newID is the subnet, for whoever reads a log, and random digits: dockerd stores
// the ID, so one that was released must not come back for another network.
func (a *Allocator) newID(prefix netip.Prefix) (string, error) {
	for {
		var b [4]byte
		if _, err := io.ReadFull(a.cfg.Random, b[:]); err != nil {
			return "", fmt.Errorf("make a pool ID: %w", err)
		}
		id := prefix.String() + "#" + hex.EncodeToString(b[:])
		if _, taken := a.pools[id]; !taken {
			return id, nil
		}
	}
}

// ReleasePool ends a pool with all its leases and reports whether there was one.
func (a *Allocator) ReleasePool(id string) bool {
	_, ok := a.pools[id]
	delete(a.pools, id)
	return ok
}

// Pool returns a pool by its ID.
func (a *Allocator) Pool(id string) (Pool, bool) {
	p, ok := a.pools[id]
	if !ok {
		return Pool{}, false
	}
	return p.Pool, true
}

// PoolOf returns the pool of exactly this subnet. There is at most one.
func (a *Allocator) PoolOf(prefix netip.Prefix) (Pool, bool) {
	for _, p := range a.pools {
		if p.Prefix == prefix {
			return p.Pool, true
		}
	}
	return Pool{}, false
}

// PoolsOf returns the pools that a Berth network uses, sorted by subnet.
func (a *Allocator) PoolsOf(network string) []Pool {
	var pools []Pool
	for _, p := range a.sorted() {
		if p.Network == network {
			pools = append(pools, p.Pool)
		}
	}
	return pools
}

// Leases returns the addresses in use of a pool, sorted.
func (a *Allocator) Leases(id string) []Lease {
	p, ok := a.pools[id]
	if !ok {
		return nil
	}
	leases := make([]Lease, 0, len(p.leases))
	for _, l := range p.leases {
		leases = append(leases, *l)
	}
	slices.SortFunc(leases, func(x, y Lease) int { return x.Addr.Compare(y.Addr) })
	return leases
}

// Bind says which Berth network uses the pool; "" that it is none any more.
// From then on addresses asked for by name are containers'.
func (a *Allocator) Bind(id, network string) (Pool, error) {
	p, ok := a.pools[id]
	if !ok {
		return Pool{}, unknownPool(id)
	}
	p.Network = network
	for _, l := range a.Leases(id) {
		p.put(l)
	}
	return p.Pool, nil
}

// sorted returns the pools by subnet, so that messages and choices do not depend
// on the order of a map.
func (a *Allocator) sorted() []*pool {
	pools := make([]*pool, 0, len(a.pools))
	for _, p := range a.pools {
		pools = append(pools, p)
	}
	slices.SortFunc(pools, func(x, y *pool) int { return comparePrefixes(x.Prefix, y.Prefix) })
	return pools
}

// name is the pool for a message to someone who does not know pool IDs.
func (p *pool) name() string {
	if p.Network != "" {
		return fmt.Sprintf("subnet %s of Berth network %s", p.Prefix, short(p.Network))
	}
	return fmt.Sprintf("subnet %s, which Berth gave to another network", p.Prefix)
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
