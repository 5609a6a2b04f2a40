package netplugin

import (
	"context"
	"fmt"
	"net/netip"
	"sync"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/journal"
)

// A leaseStore is the pools and addresses: an allocator that decides, and a log that
// has every decision on disk before anybody hears of it.
//
// A decision is made and appended under one lock, so that the log has them in their
// order; the wait for the disk comes after it, so that those who decide meanwhile
// share it.
type leaseStore struct {
	logger *logrus.Entry
	// background is the writing of snapshots.
	background sync.WaitGroup

	// mu is never held while the disk is waited for. Who also needs the store's lock
	// takes that first. It guards all that follows.
	mu    sync.Mutex
	alloc *ipam.Allocator
	log   *journal.Journal
	// pending are changes that are not in the log yet.
	pending [][]byte
	// compacting says that a snapshot is being written.
	compacting bool
}

// openLeases reads the log at path. mustExist says that there was one before.
func openLeases(path string, mustExist bool, cfg ipam.Config, logger *logrus.Entry) (*leaseStore, error) {
	s := &leaseStore{logger: logger}
	cfg.Record = func(e ipam.Event) { s.pending = append(s.pending, ipam.AppendEvent(nil, e)) }
	s.alloc = ipam.New(cfg)
	log, found, err := journal.Open(path, journal.Options{MustExist: mustExist, Replay: func(record []byte) error {
		event, err := ipam.DecodeEvent(record)
		if err == nil {
			err = s.alloc.Apply(event)
		}
		if err != nil {
			return fault.Unavailable("log of addresses %s is damaged (%w); restore it from a backup, or empty the file to go on with what the networks tell; nothing has been changed", path, err)
		}
		return nil
	}})
	if err != nil {
		return nil, err
	}
	s.log = log
	details := logger.WithFields(logrus.Fields{
		"damage": found.Damage, "records": found.Records, "dropped": found.DroppedRecords, "bytes": found.DroppedBytes, "kept": found.KeptAs,
	})
	switch {
	case found.Lossy():
		details.Error("log of addresses was damaged; what was before the damage is used, and the networks have told the rest")
	case found.Damage != journal.Intact:
		// The machine lost power: nobody was told of what is missing.
		details.Warnf("log of addresses: %s", found)
	}
	return s, nil
}

// close waits for what is being written.
func (s *leaseStore) close() error {
	s.background.Wait()
	return s.log.Close()
}

// begin lets fn decide and returns the way of that to the disk. What fn has changed
// before an error stays.
func (s *leaseStore) begin(fn func(*ipam.Allocator) error) (journal.Commit, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := fn(s.alloc)
	return s.appendLocked(), err
}

func (s *leaseStore) appendLocked() journal.Commit {
	records := s.pending
	s.pending = nil
	return s.log.Append(records...)
}

// finish waits for a decision. When it cannot be stored, or ctx ends before it is,
// undo takes it back.
func (s *leaseStore) finish(ctx context.Context, commit journal.Commit, undo func(*ipam.Allocator)) error {
	err := commit.Wait(ctx)
	if err != nil && undo != nil {
		// Nobody waits for this: if it is lost as well, a snapshot makes it good.
		_, _ = s.begin(func(a *ipam.Allocator) error { undo(a); return nil })
	}
	s.compact()
	return err
}

// decide is begin and finish.
func (s *leaseStore) decide(ctx context.Context, fn func(*ipam.Allocator) error, undo func(*ipam.Allocator)) error {
	commit, err := s.begin(fn)
	if err != nil {
		return err
	}
	if err := s.finish(ctx, commit, undo); err != nil {
		return fmt.Errorf("record addresses: %w", err)
	}
	return nil
}

// compact writes a snapshot in the background if the log has become long.
func (s *leaseStore) compact() {
	if !s.log.ShouldCompact() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.compacting {
		return
	}
	s.compacting = true
	s.background.Go(func() {
		if err := s.snapshot(); err != nil {
			s.logger.WithError(err).Error("log of addresses could not be shortened; it is tried again")
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.compacting = false
	})
}

// snapshot replaces the log by the present state.
func (s *leaseStore) snapshot() error {
	s.mu.Lock()
	// What was decided and has no place in the log yet is in the state.
	s.pending = nil
	var records [][]byte
	for event := range s.alloc.Snapshot() {
		records = append(records, ipam.AppendEvent(nil, event))
	}
	snapshot := s.log.Snapshot()
	s.mu.Unlock()
	return snapshot.Write(func(emit func([]byte) error) error {
		for _, r := range records {
			if err := emit(r); err != nil {
				return err
			}
		}
		return nil
	})
}

// view lets fn look.
func view[T any](s *leaseStore, fn func(*ipam.Allocator) T) T {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fn(s.alloc)
}

// reconcile makes the leases agree with the networks and endpoints that are on
// record, after a crash between the two, or after damage to the log. It changes
// nothing where they agree.
func (s *leaseStore) reconcile(networks map[string]*networkState) error {
	restored := false
	commit, err := s.begin(func(a *ipam.Allocator) error {
		for id, n := range networks {
			for _, pool := range n.rec.Pools {
				current, ok := a.Pool(pool.ID)
				if n.rec.Phase != phaseReady || ok && current.Network == id {
					continue
				}
				if ok {
					if _, err := a.Bind(pool.ID, id); err != nil {
						return err
					}
					continue
				}
				pool.Network = id
				if err := a.Restore(pool, nil); err != nil {
					return fault.Unavailable("state record networks/%s is damaged: %w", id, err)
				}
				restored = true
				s.logger.WithField("network", id).Errorf("pool %s was not in the log of addresses; taken from the network's record", pool.Prefix)
			}
		}
		for _, pool := range a.Pools() {
			n := networks[pool.Network]
			if pool.Network != "" && n == nil {
				if _, err := a.Bind(pool.ID, ""); err != nil {
					return err
				}
			}
			for _, lease := range a.Leases(pool.ID) {
				if lease.Endpoint != "" && !hasEndpoint(networks, lease.Endpoint) {
					a.Detach(pool.ID, lease.Addr, lease.Endpoint)
				}
			}
		}
		for id, n := range networks {
			s.retakeGateways(a, n)
			for _, ep := range n.endpoints {
				s.reattach(a, id, ep)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if restored {
		return s.snapshot() // Restore makes no records
	}
	return commit.Wait(context.Background())
}

func hasEndpoint(networks map[string]*networkState, endpoint string) bool {
	for _, n := range networks {
		if _, ok := n.endpoints[endpoint]; ok {
			return true
		}
	}
	return false
}

// retakeGateways makes sure that no container is given a network's gateway.
func (s *leaseStore) retakeGateways(a *ipam.Allocator, n *networkState) {
	for _, pool := range a.PoolsOf(n.rec.Spec.ID) {
		for _, subnet := range n.rec.Spec.Subnets {
			for _, addr := range []netip.Addr{subnet.Gateway, subnet.ContainerGateway} {
				if !addr.IsValid() || !pool.Prefix.Contains(addr) {
					continue
				}
				if _, ok := a.Lease(pool.ID, addr); ok {
					continue
				}
				if _, _, err := a.Request(ipam.AddressRequest{Pool: pool.ID, Addr: addr, Gateway: true, Probed: true}); err != nil {
					s.logger.WithError(err).WithField("network", n.rec.Spec.ID).Error("gateway of a network is not its own")
				}
			}
		}
	}
}

// reattach gives an endpoint of the records the addresses that it has.
func (s *leaseStore) reattach(a *ipam.Allocator, network string, ep endpointRecord) {
	for _, addr := range addresses(ep.Spec) {
		pool, ok := a.Find(network, addr)
		if !ok {
			continue
		}
		if lease, ok := a.Lease(pool.ID, addr); ok && lease.Endpoint == ep.Spec.ID {
			continue
		}
		if _, err := a.Attach(pool.ID, addr, ep.Spec.ID); err != nil {
			s.logger.WithError(err).WithField("endpoint", ep.Spec.ID).Error("address of an endpoint is not its own")
		}
	}
}

// adoptRecords takes over pools and leases from before there was a log. It may be
// repeated until the old records are gone.
func (s *leaseStore) adoptRecords(pools []ipam.Pool, leases map[string][]ipam.Lease) error {
	s.mu.Lock()
	for _, pool := range pools {
		s.alloc.ReleasePool(pool.ID)
		if err := s.alloc.Restore(pool, leases[pool.ID]); err != nil {
			s.mu.Unlock()
			return fault.Unavailable("state record pools/%s is damaged: %w", pool.ID, err)
		}
	}
	s.mu.Unlock()
	return s.snapshot()
}
