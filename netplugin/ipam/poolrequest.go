package ipam

import (
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"slices"

	"github.com/berth-plugin/berth/shared/fault"
)

// A PoolRequest asks for a subnet.
type PoolRequest struct {
	// Prefix is the subnet the user wants; the zero Prefix asks for one of
	// the supernets'.
	Prefix netip.Prefix
	// Range is where automatic addresses come from; zero is all of Prefix.
	Range netip.Prefix
	// IPv6 is the family.
	IPv6 bool
	// Options are the rest of what the user said.
	Options PoolOptions
	// Busy are prefixes that an automatic pool must not overlap.
	Busy []netip.Prefix
	// Avoid are prefixes that an automatic pool only overlaps when there is
	// no other.
	Avoid []netip.Prefix
}

// RequestPool gives out a subnet. Each automatic one differs from all that have
// not been released: dockerd asks again, holding the first, until it is content.
// Pools of a parent may overlap each other and those of others.
//
// reclaimed are pools that were requested and never used and now make room for
// the subnet the user wants; they are released. Errors: invalid for a wrong
// subnet, range or option, conflict when the subnet overlaps another pool without
// parent, exhausted when all supernets are in use.
func (a *Allocator) RequestPool(req PoolRequest) (_ Pool, reclaimed []string, _ error) {
	if err := req.check(); err != nil {
		return Pool{}, nil, err
	}
	now := a.tick()
	prefix := req.Prefix.Masked()
	switch {
	case !req.Prefix.IsValid():
		var ok bool
		if prefix, ok = a.choose(req); !ok {
			return Pool{}, nil, fault.Exhausted("no free subnet left in the address pools %s: remove networks, set BERTH_POOLS or give --subnet", a.supernets(req.IPv6))
		}
	case req.Options.Parent == "":
		for _, other := range a.overlapping(prefix) {
			if other.Used || other.Network != "" || other.held > 0 || now.Sub(other.Since) < ForgetAfter-slack {
				return Pool{}, nil, fault.Conflict("subnet %s overlaps %s", prefix, other.name())
			}
			reclaimed = append(reclaimed, other.ID)
		}
	}
	id, err := a.newID(prefix)
	if err != nil {
		return Pool{}, nil, err
	}
	for _, old := range reclaimed {
		a.ReleasePool(old)
	}
	rng := prefix
	if req.Range.IsValid() {
		rng = req.Range.Masked()
	}
	stored := Pool{ID: id, Prefix: prefix, Range: rng, Options: req.Options.normalized(), Since: now}
	if err := a.add(stored); err != nil {
		return Pool{}, nil, err
	}
	a.record(PoolAdded{stored})
	return stored, reclaimed, nil
}

func (r PoolRequest) check() error {
	switch {
	case r.Options.DHCP && r.IPv6:
		return fault.Invalid("IPAM option dhcp=true: addresses of IPv6 cannot be had from the LAN, neither by DHCPv6 nor by SLAAC; leave --ipv6 and IPv6 subnets out")
	case r.Options.DHCP && r.Range.IsValid():
		return fault.Invalid("range %s: with the IPAM option dhcp=true the DHCP server chooses the addresses, leave --ip-range out", r.Range)
	}
	if !r.Prefix.IsValid() {
		if r.Range.IsValid() {
			return fault.Invalid("range %s: it needs a subnet, give --subnet", r.Range)
		}
		if r.Options.DHCP {
			return fault.Invalid("IPAM option dhcp=true: it needs the LAN's subnet, give --subnet")
		}
		return nil
	}
	if r.Prefix.Addr().Is6() != r.IPv6 {
		return fault.Invalid("subnet %s: it is of the other address family", r.Prefix)
	}
	if err := CheckSubnet(r.Prefix); err != nil {
		return err
	}
	rng, what := r.Prefix.Masked(), "subnet"
	if r.Range.IsValid() {
		rng, what = r.Range.Masked(), "range"
		if !contains(r.Prefix.Masked(), rng) {
			return fault.Invalid("range %s: want a part of subnet %s", r.Range, r.Prefix.Masked())
		}
	}
	first, last, ok := hosts(r.Prefix.Masked(), rng)
	if !ok {
		return fault.Invalid("range %s: no address in it can belong to a host of subnet %s", r.Range, r.Prefix.Masked())
	}
	if out, excluded := spanOf(spansIn(r.Options.Exclude, r.Prefix.Masked()), number(first)); excluded && !out.last.less(number(last)) {
		return fault.Invalid("IPAM option exclude: it leaves no address of %s %s", what, rng)
	}
	return nil
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

// ReleasePool ends a pool with all its leases, reservations and conflicts, and
// reports whether there was one. What other pools of its parent have stays.
func (a *Allocator) ReleasePool(id string) bool {
	p, ok := a.pools[id]
	if !ok {
		return false
	}
	a.exit(p)
	a.takeSlots(p, -1)
	delete(a.pools, id)
	drop(a.byPrefix, p.Prefix, p)
	drop(a.byNetwork, p.Network, p)
	a.numbered[p.no] = nil
	a.unused = append(a.unused, p.no)
	a.record(PoolReleased{id})
	return true
}

func drop[K comparable](m map[K][]*pool, key K, p *pool) {
	if m[key] = slices.DeleteFunc(m[key], func(q *pool) bool { return q == p }); len(m[key]) == 0 {
		delete(m, key)
	}
}
