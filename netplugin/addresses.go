package netplugin

import (
	"context"
	"net/netip"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/journal"
)

// requestPool gives out a subnet, clear of all networks. When ctx has ended nobody
// will hear the answer, and nothing is given out.
func (s *store) requestPool(ctx context.Context, req ipam.PoolRequest) (pool ipam.Pool, reclaimed []string, err error) {
	s.mu.Lock()
	for _, n := range s.networks {
		for _, subnet := range n.rec.Spec.Subnets {
			req.Busy = append(req.Busy, subnet.Pool)
		}
	}
	s.mu.Unlock()
	err = s.leases.decide(ctx, func(a *ipam.Allocator) (err error) {
		if err := ctx.Err(); err != nil {
			return err
		}
		pool, reclaimed, err = a.RequestPool(req)
		return err
	}, func(a *ipam.Allocator) { a.ReleasePool(pool.ID) })
	return pool, reclaimed, err
}

// releasePool ends a pool with all its leases; there need not be one.
func (s *leaseStore) releasePool(id string) (ended []endedLease, _ error) {
	// What cannot be stored is in the next snapshot: dockerd has forgotten the pool.
	err := s.decide(context.Background(), func(a *ipam.Allocator) error {
		ended = endPool(a, id)
		return nil
	}, nil)
	return ended, err
}

// hold chooses an address, which nobody else gets until commit or cancel.
func (s *leaseStore) hold(req ipam.AddressRequest) (ipam.Lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lease, _, err := s.alloc.Hold(req)
	return lease, err
}

// peek returns the next n addresses that hold would choose.
func (s *leaseStore) peek(pool string, n int) []netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.alloc.Peek(pool, n)
}

// cancel gives up an address that was held.
func (s *leaseStore) cancel(pool string, addr netip.Addr) {
	_, _ = s.begin(func(a *ipam.Allocator) error { a.Cancel(pool, addr); return nil })
}

// commit makes an address that was held a lease. When it cannot be stored, or ctx
// ends before, so that nobody hears of it, it is not one.
func (s *leaseStore) commit(ctx context.Context, pool string, lease ipam.Lease) error {
	err := s.decide(ctx, func(a *ipam.Allocator) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		_, err := a.Commit(pool, lease)
		return err
	}, func(a *ipam.Allocator) {
		// Nobody has heard of it, so nothing of it is kept.
		_, _ = a.Forget(pool, lease.Addr)
	})
	if err != nil {
		s.cancel(pool, lease.Addr)
	}
	return err
}

// releaseAddress ends a lease; there need not be one. kept says that an endpoint
// still has the address, so that the lease ends only with it.
func (s *leaseStore) releaseAddress(pool string, addr netip.Addr) (lease ipam.Lease, kept bool, _ error) {
	err := s.decide(context.Background(), func(a *ipam.Allocator) error {
		lease, kept = a.Release(pool, addr)
		return nil
	}, nil)
	return lease, kept, err
}

// markConflict notes that somebody on the LAN has an address.
func (s *leaseStore) markConflict(pool string, c ipam.Conflict) error {
	return s.decide(context.Background(), func(a *ipam.Allocator) error { return a.MarkConflict(pool, c) }, nil)
}

// clearConflict notes that nobody on the LAN has an address any more. If that is lost
// it is asked for again.
func (s *leaseStore) clearConflict(pool string, addr netip.Addr) {
	_, _ = s.begin(func(a *ipam.Allocator) error { a.ClearConflict(pool, addr); return nil })
}

// pool returns a pool by its ID.
func (s *leaseStore) pool(id string) (pool ipam.Pool, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.alloc.Pool(id)
}

// unboundPool returns the pool that is exactly this subnet, that no network uses, and
// that a network like this one may use.
func (s *leaseStore) unboundPool(n options.Network, prefix netip.Prefix) (pool ipam.Pool, ok bool, _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var other string
	for _, candidate := range s.alloc.Unbound(prefix) {
		parent := candidate.Options.Parent
		switch {
		case !n.OnLAN() || parent == n.Segment():
			return candidate, true, nil
		case parent == "":
			pool, ok = candidate, true
		default:
			other = parent
		}
	}
	if !ok && other != "" {
		what := "parent"
		if n.Uplink != "" {
			what = "uplink"
		}
		return pool, false, fault.Invalid("IPAM option parent=%s: the %s of the network is %q, want the same for both", other, what, n.Segment())
	}
	return pool, ok, nil
}

// bind gives pools, with the options they are to have, to a network and returns them
// as they are now. The error is a conflict when one was released or taken meanwhile.
func (s *leaseStore) bind(n options.Network, pools []ipam.Pool) ([]ipam.Pool, journal.Commit, error) {
	bound := make([]ipam.Pool, 0, len(pools))
	commit, err := s.begin(func(a *ipam.Allocator) error {
		for _, pool := range pools {
			if current, ok := a.Pool(pool.ID); !ok || current.Network != "" {
				return fault.Conflict("subnet %s was released or taken by another network meanwhile", pool.Prefix)
			}
			if _, err := a.Configure(pool.ID, pool.Options); err != nil {
				return err
			}
			current, err := a.Bind(pool.ID, n.ID)
			if err != nil {
				return err
			}
			bound = append(bound, current)
		}
		return nil
	})
	if err != nil {
		s.unbind(bound)
	}
	return bound, commit, err
}

// leaveNetwork takes a network's pools from it, and releases them with their leases
// if that is due.
func (s *leaseStore) leaveNetwork(id string, release bool) (ended []endedLease, _ journal.Commit) {
	commit, _ := s.begin(func(a *ipam.Allocator) error {
		for _, pool := range a.PoolsOf(id) {
			if release {
				ended = append(ended, endPool(a, pool.ID)...)
				continue
			}
			// It is there: the lock is held.
			_, _ = a.Bind(pool.ID, "")
		}
		return nil
	})
	return ended, commit
}

// endPool releases a pool and returns its leases.
func endPool(a *ipam.Allocator, id string) (ended []endedLease) {
	pool, _ := a.Pool(id)
	for _, lease := range a.Leases(id) {
		ended = append(ended, endedLease{pool, lease})
	}
	a.ReleasePool(id)
	return ended
}

// unbind takes pools from their network.
func (s *leaseStore) unbind(pools []ipam.Pool) {
	_, _ = s.begin(func(a *ipam.Allocator) error {
		for _, pool := range pools {
			// One that is gone meanwhile is no network's.
			_, _ = a.Bind(pool.ID, "")
		}
		return nil
	})
}

// attach gives an endpoint its addresses, as far as they come from Berth's pools. The
// error is a conflict when another has one.
func (s *leaseStore) attach(spec options.Endpoint) (journal.Commit, error) {
	var attached []held
	commit, err := s.begin(func(a *ipam.Allocator) error {
		for _, h := range heldBy(a, spec) {
			if _, err := a.Attach(h.pool, h.addr, spec.ID); err != nil {
				for _, h := range attached {
					a.Detach(h.pool, h.addr, spec.ID)
				}
				return err
			}
			attached = append(attached, h)
		}
		return nil
	})
	return commit, err
}

// detach takes an endpoint's addresses from it. The leases stay until dockerd
// releases them; ended are those that it has released before.
func (s *leaseStore) detach(spec options.Endpoint) (ended []endedLease, _ journal.Commit) {
	commit, _ := s.begin(func(a *ipam.Allocator) error {
		for _, h := range heldBy(a, spec) {
			pool, _ := a.Pool(h.pool)
			lease, leased := a.Lease(h.pool, h.addr)
			if _, kept := a.Detach(h.pool, h.addr, spec.ID); leased && !kept {
				ended = append(ended, endedLease{pool, lease})
			}
		}
		return nil
	})
	return ended, commit
}

// An endedLease is one that nobody has any more.
type endedLease struct {
	pool  ipam.Pool
	lease ipam.Lease
}

// held is an address of a pool.
type held struct {
	pool string
	addr netip.Addr
}

// heldBy returns where each of the endpoint's addresses is leased.
func heldBy(a *ipam.Allocator, spec options.Endpoint) []held {
	var list []held
	for _, addr := range addresses(spec) {
		if pool, ok := a.Find(spec.NetworkID, addr); ok {
			list = append(list, held{pool.ID, addr})
		}
	}
	return list
}

// lease returns the lease of an address of a pool.
func (s *leaseStore) lease(pool string, addr netip.Addr) (ipam.Lease, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.alloc.Lease(pool, addr)
}

// find returns the pool of an address of a network.
func (s *leaseStore) find(network string, addr netip.Addr) (ipam.Pool, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.alloc.Find(network, addr)
}

// leaseOf returns the lease of an address of a network.
func (s *leaseStore) leaseOf(network string, addr netip.Addr) (ipam.Lease, bool) {
	pool, ok := s.find(network, addr)
	if !ok {
		return ipam.Lease{}, false
	}
	return s.lease(pool.ID, addr)
}
