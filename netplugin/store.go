package netplugin

import (
	"cmp"
	"context"
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

// A store is the records, in the files and in memory. A change is on disk before a
// method returns nil, and in neither place when it returns an error.
type store struct {
	db     *state.DB
	b      buckets
	now    func() time.Time
	leases *leaseStore
	host   hostRecord

	// mu is held over a decision and the transaction that stores it, so that
	// memory and file agree. It guards all that follows.
	mu       sync.Mutex
	networks map[string]*networkState
}

// networkState is a network with its endpoints by ID.
type networkState struct {
	rec       networkRecord
	endpoints map[string]endpointRecord
}

// openStore reads all records. It makes the host's own record at the first start.
func openStore(cfg Config) (*store, error) {
	s := &store{db: cfg.State, b: newBuckets(), now: cfg.Now, networks: make(map[string]*networkState)}
	host, err := s.hostRecord(cfg.Random)
	if err != nil {
		return nil, err
	}
	s.host = host
	if err := s.db.View(s.load); err != nil {
		return nil, err
	}
	s.leases, err = openLeases(cfg.LeaseLog, host.LeaseLog, ipam.Config{
		Supernets: ipam.DefaultSupernets(cfg.Supernets, host.ULA),
		Now:       cfg.Now,
		Random:    cfg.Random,
	}, cfg.Log)
	if err != nil {
		return nil, err
	}
	err = s.adoptLeases()
	if err == nil && !host.LeaseLog {
		host.LeaseLog = true
		err = s.db.Update(func(tx *state.Tx) error { return s.b.host.Put(tx, hostKey, host) })
	}
	if err == nil {
		err = s.leases.reconcile(s.networks)
	}
	if err != nil {
		return nil, errors.Join(err, s.leases.close())
	}
	return s, nil
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
	return s.b.endpoints.Each(tx, func(key string, rec endpointRecord) error {
		n, ok := s.networks[rec.Spec.NetworkID]
		if !ok {
			return fault.Unavailable("state record endpoints/%s is damaged: there is no network %s", key, rec.Spec.NetworkID)
		}
		n.endpoints[rec.Spec.ID] = rec
		return nil
	})
}

// adoptLeases moves the pools and leases that versions before 3 kept in the state
// file into the log, and tells networks which pools are theirs, as later versions do.
// They go from the file last, so that it may be cut short.
func (s *store) adoptLeases() error {
	var pools []ipam.Pool
	leases := make(map[string][]ipam.Lease)
	keys := make(map[string][]string)
	err := s.db.View(func(tx *state.Tx) error {
		err := s.b.oldLeases.Each(tx, func(key string, rec leaseRecord) error {
			leases[rec.Pool] = append(leases[rec.Pool], rec.Lease)
			keys["leases"] = append(keys["leases"], key)
			return nil
		})
		return errors.Join(err, s.b.oldPools.Each(tx, func(key string, pool ipam.Pool) error {
			pools = append(pools, pool)
			keys["pools"] = append(keys["pools"], key)
			return nil
		}))
	})
	if err != nil || len(pools) == 0 {
		return err
	}
	if err := s.leases.adoptRecords(pools, leases); err != nil {
		return err
	}
	return s.db.Update(func(tx *state.Tx) error {
		var errs []error
		for id, n := range s.networks {
			if n.rec.Pools != nil {
				continue
			}
			n.rec.Pools = slices.DeleteFunc(slices.Clone(pools), func(p ipam.Pool) bool { return p.Network != id })
			errs = append(errs, s.b.networks.Put(tx, id, n.rec))
		}
		for _, key := range keys["leases"] {
			errs = append(errs, s.b.oldLeases.Delete(tx, key))
		}
		for _, key := range keys["pools"] {
			errs = append(errs, s.b.oldPools.Delete(tx, key))
		}
		return errors.Join(errs...)
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

// hasReady reports whether the link is the bridge or a parent of a complete network,
// and so not of one that Berth is making or removing at this moment.
func (s *store) hasReady(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.networks {
		if n.rec.Phase == phaseReady && slices.Contains(linksOf(n.rec.Spec), name) {
			return true
		}
	}
	return false
}

// hasLAN reports whether a network is on a LAN.
func (s *store) hasLAN() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.networks {
		if n.rec.Spec.IsLAN() {
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
	if err := s.checkUplinkLocked(spec); err != nil {
		return networkRecord{}, err
	}
	if err := s.checkSubnetsLocked(spec); err != nil {
		return networkRecord{}, err
	}
	rec := networkRecord{Phase: phaseCreating, Spec: spec, NamedBridge: spec.Bridge != "", Space: space, Since: s.now()}
	if err := s.nameBridgeLocked(&rec); err != nil {
		return networkRecord{}, err
	}
	pools, commit, err := s.leases.bind(spec, pools)
	if err != nil {
		return networkRecord{}, err
	}
	rec.Pools = pools
	err = s.db.Update(func(tx *state.Tx) error { return s.b.networks.Put(tx, spec.ID, rec) })
	if err == nil {
		err = s.leases.finish(context.Background(), commit, nil)
	}
	if err != nil {
		s.leases.unbind(pools)
		return networkRecord{}, fmt.Errorf("record network: %w", err)
	}
	s.networks[spec.ID] = &networkState{rec: rec, endpoints: make(map[string]endpointRecord)}
	return rec, nil
}

func (s *store) checkSubnetsLocked(spec options.Network) error {
	for _, id := range slices.Sorted(maps.Keys(s.networks)) {
		if apart(spec, s.networks[id].rec.Spec) {
			continue
		}
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
	if rec.Spec.IsLAN() {
		return nil
	}
	user := make(map[string]string, len(s.networks))
	for id, n := range s.networks {
		if n.rec.Spec.Bridge != "" {
			user[n.rec.Spec.Bridge] = id
		}
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

// dropNetwork forgets a network with its endpoints and returns the leases that ended. Its pools are released when
// the network was complete: dockerd released them before, and did not know how
// to tell. After a failed creation dockerd still will, so they are only unbound.
func (s *store) dropNetwork(id string, releasePools bool) ([]endedLease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.networks[id]
	if !ok {
		return nil, nil
	}
	ended, commit := s.leases.leaveNetwork(id, releasePools)
	err := s.db.Update(func(tx *state.Tx) error {
		errs := []error{s.b.networks.Delete(tx, id)}
		for endpoint := range n.endpoints {
			errs = append(errs, s.b.endpoints.Delete(tx, endpointKey(id, endpoint)))
		}
		return errors.Join(errs...)
	})
	if err == nil {
		err = s.leases.finish(context.Background(), commit, nil)
	}
	if err != nil {
		return ended, fmt.Errorf("forget network: %w", err)
	}
	delete(s.networks, id)
	return ended, nil
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
	s.nameLinksLocked(&rec.Spec, n.rec.Spec.IsLAN())
	commit, err := s.leases.attach(spec)
	if err != nil {
		return endpointRecord{}, err
	}
	err = s.db.Update(func(tx *state.Tx) error {
		return s.b.endpoints.Put(tx, endpointKey(spec.NetworkID, spec.ID), rec)
	})
	if err == nil {
		err = s.leases.finish(context.Background(), commit, nil)
	}
	if err != nil {
		s.leases.detach(spec)
		return endpointRecord{}, fmt.Errorf("record endpoint: %w", err)
	}
	n.endpoints[spec.ID] = rec
	return rec, nil
}

func (s *store) nameLinksLocked(spec *options.Endpoint, onLAN bool) {
	taken := make(map[string]bool)
	for _, n := range s.networks {
		taken[n.rec.Spec.Bridge] = n.rec.Spec.Bridge != ""
		for _, other := range n.endpoints {
			taken[other.Spec.HostLink], taken[other.Spec.ContainerLink] = other.Spec.HostLink != "", true
		}
	}
	for attempt := 0; ; attempt++ {
		spec.HostLink, spec.ContainerLink = options.EndpointLinks(spec.ID, attempt)
		if onLAN {
			spec.HostLink = ""
		}
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
// stay until dockerd releases them; those that it has released before are returned.
func (s *store) dropEndpoint(spec options.Endpoint) ([]endedLease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.networks[spec.NetworkID]
	if !ok {
		return nil, nil
	}
	if _, ok := n.endpoints[spec.ID]; !ok {
		return nil, nil
	}
	ended, commit := s.leases.detach(spec)
	err := s.db.Update(func(tx *state.Tx) error {
		return s.b.endpoints.Delete(tx, endpointKey(spec.NetworkID, spec.ID))
	})
	if err == nil {
		err = s.leases.finish(context.Background(), commit, nil)
	}
	if err != nil {
		// It had them a moment ago, and dockerd has not been told otherwise.
		_, attachErr := s.leases.attach(spec)
		return nil, errors.Join(fmt.Errorf("forget endpoint: %w", err), attachErr)
	}
	delete(n.endpoints, spec.ID)
	return ended, nil
}
