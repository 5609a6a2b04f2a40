package netplugin

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/state"
)

// A store is the records, in the file and in memory. A change is in the file
// before a method returns nil, and in neither place when it returns an error.
type store struct {
	db  *state.DB
	b   buckets
	now func() time.Time

	// mu is held over a decision and the transaction that stores it, so that
	// memory and file agree. It guards all that follows.
	mu       sync.Mutex
	networks map[string]*networkState
	alloc    *ipam.Allocator
}

// networkState is a network with its endpoints by ID.
type networkState struct {
	rec       networkRecord
	endpoints map[string]endpointRecord
}

// openStore reads all records. It makes the host's own record at the first start.
func openStore(db *state.DB, supernets []ipam.Supernet, now func() time.Time, random io.Reader) (*store, error) {
	s := &store{db: db, b: newBuckets(), now: now, networks: make(map[string]*networkState)}
	host, err := s.hostRecord(random)
	if err != nil {
		return nil, err
	}
	s.alloc = ipam.New(ipam.Config{
		Supernets: ipam.DefaultSupernets(supernets, host.ULA),
		Now:       now,
		Random:    random,
	})
	return s, db.View(s.load)
}

func (s *store) hostRecord(random io.Reader) (host hostRecord, _ error) {
	return host, s.db.Update(func(tx *state.Tx) (err error) {
		var ok bool
		if host, ok, err = s.b.host.Get(tx, hostKey); ok || err != nil {
			return err
		}
		if host.ULA, err = ipam.NewULA(random); err != nil {
			return err
		}
		return s.b.host.Put(tx, hostKey, host)
	})
}

func (s *store) load(tx *state.Tx) error {
	err := s.b.networks.Each(tx, func(key string, rec networkRecord) error {
		s.networks[key] = &networkState{rec: rec, endpoints: make(map[string]endpointRecord)}
		return nil
	})
	if err != nil {
		return err
	}
	err = s.b.endpoints.Each(tx, func(key string, rec endpointRecord) error {
		n, ok := s.networks[rec.Spec.NetworkID]
		if !ok {
			return fault.Unavailable("state record endpoints/%s is damaged: there is no network %s", key, rec.Spec.NetworkID)
		}
		n.endpoints[rec.Spec.ID] = rec
		return nil
	})
	if err != nil {
		return err
	}
	leases := make(map[string][]ipam.Lease)
	err = s.b.leases.Each(tx, func(_ string, rec leaseRecord) error {
		leases[rec.Pool] = append(leases[rec.Pool], rec.Lease)
		return nil
	})
	if err != nil {
		return err
	}
	return s.b.pools.Each(tx, func(key string, pool ipam.Pool) error {
		if err := s.alloc.Restore(pool, leases[key]); err != nil {
			return fault.Unavailable("state record pools/%s is damaged: %w", key, err)
		}
		return nil
	})
}

// network returns a network's record.
func (s *store) network(id string) (networkRecord, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.networks[id]
	if !ok {
		return networkRecord{}, false
	}
	return n.rec, true
}

// allNetworks returns the records of all networks by age.
func (s *store) allNetworks() []networkRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	recs := make([]networkRecord, 0, len(s.networks))
	for _, n := range s.networks {
		recs = append(recs, n.rec)
	}
	slices.SortFunc(recs, func(a, b networkRecord) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Spec.ID, b.Spec.ID))
	})
	return recs
}

// hasReady reports whether the bridge is that of a complete network, and so not of
// one that Berth is making or removing at this moment.
func (s *store) hasReady(bridge string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.networks {
		if n.rec.Spec.Bridge == bridge && n.rec.Phase == phaseReady {
			return true
		}
	}
	return false
}

// endpoints returns the records of a network's endpoints by ID.
func (s *store) endpoints(network string) []endpointRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.networks[network]
	if !ok {
		return nil
	}
	recs := make([]endpointRecord, 0, len(n.endpoints))
	for _, id := range slices.Sorted(maps.Keys(n.endpoints)) {
		recs = append(recs, n.endpoints[id])
	}
	return recs
}

// endpoint returns the record of an endpoint.
func (s *store) endpoint(network, id string) (endpointRecord, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.networks[network]
	if !ok {
		return endpointRecord{}, false
	}
	rec, ok := n.endpoints[id]
	return rec, ok
}

// An overlapError says which network has some of the addresses that another one
// wants. It is a conflict.
type overlapError struct {
	error
	network string
}

func (e *overlapError) Unwrap() error { return e.error }

// addNetwork records a network that is about to be made, names its bridge and
// binds the pools it uses. The error is a conflict, perhaps an *overlapError, when
// it cannot be beside the others.
func (s *store) addNetwork(spec options.Network, space string, pools []ipam.Pool) (networkRecord, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.checkSubnetsLocked(spec); err != nil {
		return networkRecord{}, err
	}
	rec := networkRecord{Phase: phaseCreating, Spec: spec, NamedBridge: spec.Bridge != "", Space: space, Since: s.now()}
	if err := s.nameBridgeLocked(&rec); err != nil {
		return networkRecord{}, err
	}
	for i, pool := range pools {
		current, ok := s.alloc.Pool(pool.ID)
		if !ok || current.Network != "" {
			return networkRecord{}, fault.Conflict("subnet %s was released or taken by another network meanwhile", pool.Prefix)
		}
		pools[i] = current
	}
	err := s.db.Update(func(tx *state.Tx) error {
		for _, pool := range pools {
			pool.Network = spec.ID
			if err := s.b.pools.Put(tx, pool.ID, pool); err != nil {
				return err
			}
		}
		return s.b.networks.Put(tx, spec.ID, rec)
	})
	if err != nil {
		return networkRecord{}, fmt.Errorf("record network: %w", err)
	}
	for _, pool := range pools {
		if _, err := s.alloc.Bind(pool.ID, spec.ID); err != nil {
			return networkRecord{}, err
		}
	}
	s.networks[spec.ID] = &networkState{rec: rec, endpoints: make(map[string]endpointRecord)}
	return rec, nil
}

func (s *store) checkSubnetsLocked(spec options.Network) error {
	for _, id := range slices.Sorted(maps.Keys(s.networks)) {
		for _, theirs := range s.networks[id].rec.Spec.Subnets {
			for _, ours := range spec.Subnets {
				if ours.Pool.Overlaps(theirs.Pool) {
					err := fault.Conflict("subnet %s overlaps subnet %s of Berth network %s", ours.Pool, theirs.Pool, short(id))
					return &overlapError{err, id}
				}
			}
		}
	}
	return nil
}

func (s *store) nameBridgeLocked(rec *networkRecord) error {
	user := make(map[string]string, len(s.networks))
	for id, n := range s.networks {
		user[n.rec.Spec.Bridge] = id
	}
	if rec.NamedBridge {
		if id, taken := user[rec.Spec.Bridge]; taken {
			return fault.Conflict("bridge %q belongs to Berth network %s", rec.Spec.Bridge, short(id))
		}
		return nil
	}
	for attempt := 0; ; attempt++ {
		rec.Spec.Bridge = options.BridgeName(rec.Spec.ID, attempt)
		if _, taken := user[rec.Spec.Bridge]; !taken {
			return nil
		}
	}
}

// setNetworkPhase moves a network on.
func (s *store) setNetworkPhase(id string, to phase) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.networks[id]
	if !ok {
		return fault.NotFound("network %s is not known to Berth", short(id))
	}
	rec := n.rec
	rec.Phase = to
	err := s.db.Update(func(tx *state.Tx) error { return s.b.networks.Put(tx, id, rec) })
	if err != nil {
		return fmt.Errorf("record network: %w", err)
	}
	n.rec = rec
	return nil
}

// dropNetwork forgets a network with its endpoints. Its pools are released when
// the network was complete: dockerd released them before, and did not know how
// to tell. After a failed creation dockerd still will, so they are only unbound.
func (s *store) dropNetwork(id string, releasePools bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.networks[id]
	if !ok {
		return nil
	}
	pools := s.alloc.PoolsOf(id)
	err := s.db.Update(func(tx *state.Tx) error {
		errs := []error{s.b.networks.Delete(tx, id)}
		for endpoint := range n.endpoints {
			errs = append(errs, s.b.endpoints.Delete(tx, endpointKey(id, endpoint)))
		}
		for _, pool := range pools {
			if releasePools {
				errs = append(errs, s.deletePool(tx, pool.ID))
				continue
			}
			pool.Network = ""
			errs = append(errs, s.b.pools.Put(tx, pool.ID, pool))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return fmt.Errorf("forget network: %w", err)
	}
	for _, pool := range pools {
		if releasePools {
			s.alloc.ReleasePool(pool.ID)
			continue
		}
		if _, err := s.alloc.Bind(pool.ID, ""); err != nil {
			return err
		}
	}
	delete(s.networks, id)
	return nil
}

// addEndpoint records an endpoint that is about to be made, names its links and
// attaches its addresses. The error is a conflict when another has an address.
func (s *store) addEndpoint(spec options.Endpoint) (endpointRecord, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.networks[spec.NetworkID]
	if !ok {
		return endpointRecord{}, fault.NotFound("network %s is not known to Berth", short(spec.NetworkID))
	}
	rec := endpointRecord{Phase: phaseCreating, Spec: spec, Since: s.now()}
	s.nameLinksLocked(&rec.Spec)
	var attached []leaseRecord
	undo := func() {
		for _, l := range attached {
			s.alloc.Detach(l.Pool, l.Lease.Addr, spec.ID)
		}
	}
	for _, held := range s.heldLocked(spec) {
		lease, err := s.alloc.Attach(held.Pool, held.Lease.Addr, spec.ID)
		if err != nil {
			undo()
			return endpointRecord{}, err
		}
		attached = append(attached, leaseRecord{held.Pool, lease})
	}
	err := s.db.Update(func(tx *state.Tx) error {
		for _, l := range attached {
			if err := s.b.leases.Put(tx, leaseKey(l.Pool, l.Lease.Addr), l); err != nil {
				return err
			}
		}
		return s.b.endpoints.Put(tx, endpointKey(spec.NetworkID, spec.ID), rec)
	})
	if err != nil {
		undo()
		return endpointRecord{}, fmt.Errorf("record endpoint: %w", err)
	}
	n.endpoints[spec.ID] = rec
	return rec, nil
}

// heldLocked returns the pool and address of each of the endpoint's addresses
// that comes from Berth's pools.
func (s *store) heldLocked(spec options.Endpoint) []leaseRecord {
	var held []leaseRecord
	for _, pool := range s.alloc.PoolsOf(spec.NetworkID) {
		for _, addr := range addresses(spec) {
			if pool.Prefix.Contains(addr) {
				held = append(held, leaseRecord{pool.ID, ipam.Lease{Addr: addr}})
			}
		}
	}
	return held
}

func (s *store) nameLinksLocked(spec *options.Endpoint) {
	taken := make(map[string]bool)
	for _, n := range s.networks {
		taken[n.rec.Spec.Bridge] = true
		for _, other := range n.endpoints {
			taken[other.Spec.HostLink], taken[other.Spec.ContainerLink] = true, true
		}
	}
	for attempt := 0; ; attempt++ {
		spec.HostLink, spec.ContainerLink = options.EndpointLinks(spec.ID, attempt)
		if !taken[spec.HostLink] && !taken[spec.ContainerLink] {
			return
		}
	}
}

// setEndpointPhase moves an endpoint on.
func (s *store) setEndpointPhase(spec options.Endpoint, to phase) error {
	return s.changeEndpoint(spec, func(rec *endpointRecord) { rec.Phase = to })
}

// setPorts records what an endpoint publishes.
func (s *store) setPorts(spec options.Endpoint) error {
	return s.changeEndpoint(spec, func(rec *endpointRecord) {
		rec.Spec.Ports, rec.Spec.NoProxy6to4 = spec.Ports, spec.NoProxy6to4
	})
}

func (s *store) changeEndpoint(spec options.Endpoint, change func(*endpointRecord)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.networks[spec.NetworkID]
	if !ok {
		return fault.NotFound("network %s is not known to Berth", short(spec.NetworkID))
	}
	rec, ok := n.endpoints[spec.ID]
	if !ok {
		return fault.NotFound("endpoint %s is not known to Berth", short(spec.ID))
	}
	change(&rec)
	err := s.db.Update(func(tx *state.Tx) error {
		return s.b.endpoints.Put(tx, endpointKey(spec.NetworkID, spec.ID), rec)
	})
	if err != nil {
		return fmt.Errorf("record endpoint: %w", err)
	}
	n.endpoints[spec.ID] = rec
	return nil
}

// dropEndpoint forgets an endpoint and takes its addresses from it. The leases
// stay until dockerd releases them.
func (s *store) dropEndpoint(spec options.Endpoint) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.networks[spec.NetworkID]
	if !ok {
		return nil
	}
	if _, ok := n.endpoints[spec.ID]; !ok {
		return nil
	}
	held := s.heldLocked(spec)
	before := make([]ipam.Lease, 0, len(held))
	err := s.db.Update(func(tx *state.Tx) error {
		for _, h := range held {
			old, ok := s.alloc.Lease(h.Pool, h.Lease.Addr)
			if !ok || old.Endpoint != spec.ID {
				continue
			}
			before = append(before, old)
			key := leaseKey(h.Pool, h.Lease.Addr)
			var err error
			if lease, kept := s.alloc.Detach(h.Pool, h.Lease.Addr, spec.ID); kept {
				err = s.b.leases.Put(tx, key, leaseRecord{h.Pool, lease})
			} else {
				err = s.b.leases.Delete(tx, key)
			}
			if err != nil {
				return err
			}
		}
		return s.b.endpoints.Delete(tx, endpointKey(spec.NetworkID, spec.ID))
	})
	if err != nil {
		for _, h := range held {
			for _, old := range before {
				if old.Addr == h.Lease.Addr {
					s.alloc.RestoreLease(h.Pool, old)
				}
			}
		}
		return fmt.Errorf("forget endpoint: %w", err)
	}
	delete(n.endpoints, spec.ID)
	return nil
}
