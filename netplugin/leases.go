package netplugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/shared/state"
)

// requestPool decides on a pool and stores it. When ctx has ended nobody will
// hear the answer, and nothing is given out.
func (s *store) requestPool(ctx context.Context, req ipam.PoolRequest) (ipam.Pool, []string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.networks {
		for _, subnet := range n.rec.Spec.Subnets {
			req.Busy = append(req.Busy, subnet.Pool)
		}
	}
	pool, reclaimed, err := s.alloc.RequestPool(req)
	if err != nil {
		return ipam.Pool{}, nil, err
	}
	err = s.db.Update(func(tx *state.Tx) error {
		for _, id := range reclaimed {
			if err := s.deletePool(tx, id); err != nil {
				return err
			}
		}
		if err := s.b.pools.Put(tx, pool.ID, pool); err != nil {
			return err
		}
		return ctx.Err()
	})
	if err != nil {
		// A pool that was reclaimed is not known any more; its record is
		// read again at the next start, which does no harm.
		s.alloc.ReleasePool(pool.ID)
		return ipam.Pool{}, nil, fmt.Errorf("record address pool: %w", err)
	}
	return pool, reclaimed, nil
}

// deletePool deletes the records of a pool and its leases.
func (s *store) deletePool(tx *state.Tx, id string) error {
	errs := []error{s.b.pools.Delete(tx, id)}
	for _, lease := range s.alloc.Leases(id) {
		errs = append(errs, s.b.leases.Delete(tx, leaseKey(id, lease.Addr)))
	}
	return errors.Join(errs...)
}

// releasePool ends a pool with all its leases; there need not be one.
func (s *store) releasePool(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.alloc.Pool(id); !ok {
		return nil
	}
	if err := s.db.Update(func(tx *state.Tx) error { return s.deletePool(tx, id) }); err != nil {
		return fmt.Errorf("forget address pool: %w", err)
	}
	s.alloc.ReleasePool(id)
	return nil
}

// requestAddress decides on an address and stores it.
func (s *store) requestAddress(ctx context.Context, req ipam.AddressRequest) (netip.Prefix, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lease, pool, err := s.alloc.Request(req)
	if err != nil {
		return netip.Prefix{}, err
	}
	err = s.db.Update(func(tx *state.Tx) error {
		if err := s.b.leases.Put(tx, leaseKey(pool.ID, lease.Addr), leaseRecord{pool.ID, lease}); err != nil {
			return err
		}
		if err := s.b.pools.Put(tx, pool.ID, pool); err != nil {
			return err
		}
		return ctx.Err()
	})
	if err != nil {
		s.alloc.Release(pool.ID, lease.Addr)
		return netip.Prefix{}, fmt.Errorf("record address: %w", err)
	}
	return netip.PrefixFrom(lease.Addr, pool.Prefix.Bits()), nil
}

// releaseAddress ends a lease; there need not be one. kept says that an endpoint
// still has the address, so that the lease ends only with it.
func (s *store) releaseAddress(pool string, addr netip.Addr) (kept bool, _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before, ok := s.alloc.Lease(pool, addr)
	if !ok {
		return false, nil
	}
	lease, kept := s.alloc.Release(pool, addr)
	err := s.db.Update(func(tx *state.Tx) error {
		if kept {
			return s.b.leases.Put(tx, leaseKey(pool, addr), leaseRecord{pool, lease})
		}
		return s.b.leases.Delete(tx, leaseKey(pool, addr))
	})
	if err != nil {
		s.alloc.RestoreLease(pool, before)
		return kept, fmt.Errorf("forget address: %w", err)
	}
	return kept, nil
}

// unboundPool returns the pool that is exactly this subnet and that no network uses.
func (s *store) unboundPool(prefix netip.Prefix) (ipam.Pool, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	pool, ok := s.alloc.PoolOf(prefix)
	return pool, ok && pool.Network == ""
}

// pool returns a pool by its ID.
func (s *store) pool(id string) (ipam.Pool, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.alloc.Pool(id)
}
