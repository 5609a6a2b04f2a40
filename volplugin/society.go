package volplugin

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/presence"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// society is this host among those that share a store's root. On a root that no
// other host can reach it stays empty, and costs nothing.
type society struct {
	mu sync.Mutex
	// known is set when the root was asked whether it is shared.
	known bool
	peers *presence.Presence
	// lost says of exclusive volumes, by UUID, why this host may not use them any
	// more, or is not sure that it may.
	lost map[string]string
}

// peers gives this host's presence on the root, nil when nobody shares it.
func (s *store) peers(root *volume.Root) (*presence.Presence, error) {
	s.society.mu.Lock()
	defer s.society.mu.Unlock()
	if s.society.known {
		return s.society.peers, nil
	}
	shared, err := root.Shared()
	if err != nil {
		return nil, err
	}
	if shared {
		name, _, _ := strings.Cut(s.ledger.hostID, "/")
		p, err := presence.New(presence.Config{
			ID: s.ledger.hostID, Name: name, Open: s.openMeta, Mounted: s.usedHere(),
			Changed: s.leaseChanged, Log: s.cfg.Log, Now: s.cfg.Now,
		})
		if err != nil {
			return nil, err
		}
		s.task(func(ctx context.Context) {
			p.Run(ctx)
			const last = 2 * time.Second
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), last)
			defer cancel()
			if err := p.Close(ctx); err != nil {
				s.cfg.Log.WithError(err).Warn("tell the hosts that share the volume root that this one stops")
			}
		})
		s.society.peers = p
	}
	s.society.known = true
	return s.society.peers, nil
}

// alone tells whether nobody is known to share the root.
func (s *store) alone() bool {
	s.society.mu.Lock()
	defer s.society.mu.Unlock()
	return s.society.peers == nil
}

// gone says that this host does not use a volume any more that is not there either.
func (s *store) gone(uuid string) {
	s.society.mu.Lock()
	p := s.society.peers
	s.society.mu.Unlock()
	if p != nil && uuid != "" && !s.ledger.hasMounts(uuid) {
		p.Leave(uuid)
	}
}

// usedHere are the volumes of this root that containers of this host have.
func (s *store) usedHere() map[string]time.Time {
	used := map[string]time.Time{}
	for _, m := range s.ledger.allMounts() {
		if m.Store == s.key && m.IDs.Total() > 0 {
			used[m.UUID] = s.cfg.Now().UTC()
		}
	}
	return used
}

// openMeta opens the directory of Berth's own.
func (s *store) openMeta() (*rooted.Dir, error) {
	root, err := s.open()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return root.Meta()
}

// leaseChanged is told of the leases of exclusive volumes.
func (s *store) leaseChanged(uuid string, state presence.LeaseState, why string) {
	s.society.mu.Lock()
	defer s.society.mu.Unlock()
	log := s.cfg.Log.WithField("volume", uuid)
	if s.society.lost == nil {
		s.society.lost = map[string]string{}
	}
	switch state {
	case presence.Held:
		delete(s.society.lost, uuid)
		log.Info("the lease of the volume is this host's again")
	case presence.Doubtful:
		s.society.lost[uuid] = "its lease is in doubt: " + why
		log.Errorf("the lease of the volume is in doubt: %s; stop the containers that use it", why)
	case presence.Lost:
		s.society.lost[uuid] = "its lease is lost: " + why
		log.Errorf("the lease of the volume is lost: %s; stop the containers that use it at once, what they write may damage it", why)
	}
}

// leaseTrouble is why this host may not be the one that has an exclusive volume.
func (s *store) leaseTrouble(uuid string) string {
	s.society.mu.Lock()
	defer s.society.mu.Unlock()
	return s.society.lost[uuid]
}

// enter says to the other hosts that this one uses a volume, and takes the lease of
// one that only one host can have.
func (s *store) enter(ctx context.Context, root *volume.Root, rec volume.Record) error {
	p, err := s.peers(root)
	if err != nil || p == nil {
		return err
	}
	if rec.Exclusive {
		if _, err := p.Acquire(ctx, rec.UUID, false); err != nil {
			return err
		}
		s.society.mu.Lock()
		delete(s.society.lost, rec.UUID)
		s.society.mu.Unlock()
	}
	return p.Enter(ctx, rec.UUID)
}

// leave is the inverse, after the volume was detached.
func (s *store) leave(ctx context.Context, root *volume.Root, rec volume.Record) error {
	p, err := s.peers(root)
	if err != nil || p == nil {
		return err
	}
	if rec.Exclusive {
		err = p.Release(ctx, rec.UUID)
	}
	p.Leave(rec.UUID)
	return err
}

// elsewhere refuses what must not happen to a volume that another host uses.
func (s *store) elsewhere(ctx context.Context, root *volume.Root, name string) error {
	p, err := s.peers(root)
	if err != nil || p == nil {
		return err
	}
	rec, err := root.Record(name)
	if errors.Is(err, volume.ErrNoRecord) {
		return nil
	}
	if err != nil {
		return err
	}
	hosts, err := p.Users(ctx, rec.UUID)
	if err != nil {
		return err
	}
	for _, h := range hosts {
		if !h.Self && h.InUse() {
			return fault.Conflict("volume %s is in use on host %s, which was last heard of %s ago", name, h.Name, h.Silent.Round(time.Second))
		}
	}
	return nil
}

// usersElsewhere lists the other hosts that use a volume.
func (s *store) usersElsewhere(ctx context.Context, root *volume.Root, uuid string) ([]control.VolumeUser, error) {
	p, err := s.peers(root)
	if err != nil || p == nil {
		return nil, err
	}
	hosts, err := p.Users(ctx, uuid)
	if err != nil {
		return nil, err
	}
	var users []control.VolumeUser
	for _, h := range slices.DeleteFunc(hosts, func(h presence.Host) bool { return h.Self || !h.InUse() }) {
		users = append(users, control.VolumeUser{Host: h.Name, Seen: s.cfg.Now().Add(-h.Silent)})
	}
	return users, nil
}
