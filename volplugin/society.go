package volplugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

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
	// rejoined is set when the leases of volumes that an earlier process left attached
	// were looked at.
	rejoined bool
	// turns are the leases that this host has for scheduled backups.
	turns map[string]bool
	// troubles are of exclusive volumes, by UUID, that this host may not use any more, or
	// is not sure that it may.
	troubles map[string]leaseTrouble
}

// leaseTrouble is what is wrong with the lease of a volume.
type leaseTrouble struct {
	// state is presence.Doubtful or presence.Lost.
	state presence.LeaseState
	// why, and what can be done, in words.
	why, advice string
	// ended: nothing more is to be done by Berth.
	ended bool
}

func (t leaseTrouble) String() string {
	return "its lease is " + map[presence.LeaseState]string{presence.Doubtful: "in doubt", presence.Lost: "lost"}[t.state] + ": " + t.why + "; " + t.advice
}

// What is said of leases beside why.
const (
	adviceDoubt  = "nothing is stopped yet: if another host takes the volume over, its file system is shut down here"
	adviceCut    = "its file system was shut down on this host and its containers get errors, so that no two hosts write: stop them here, and then start them where the volume is to be used"
	adviceCannot = "what its containers write may damage the volume: stop them at once"
)

// peers gives this host's presence on the root, nil when nobody shares it.
func (s *store) peers(root *volume.Root) (*presence.Presence, error) {
	s.society.mu.Lock()
	defer s.society.mu.Unlock()
	if s.society.known {
		return s.society.peers, nil
	}
	shared, err := s.cfg.shared(root)
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
	if s.society.isTurn(uuid) {
		return
	}
	log := s.cfg.Log.WithField("volume", s.nameOf(uuid))
	switch state {
	case presence.Held:
		s.settleTrouble(uuid)
		log.Info("the lease of the volume is this host's again")
	case presence.Doubtful:
		t := leaseTrouble{state: state, why: why, advice: adviceDoubt}
		s.setTrouble(uuid, t)
		log.Error(t)
	case presence.Lost:
		s.setTrouble(uuid, leaseTrouble{state: state, why: why, advice: adviceCannot})
		s.task(func(ctx context.Context) { s.cutOff(ctx, uuid) })
	}
}

// cutOff takes a volume whose lease is lost from the containers of this host.
func (s *store) cutOff(ctx context.Context, uuid string) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.request)
	defer cancel()
	log := s.cfg.Log.WithField("volume", s.nameOf(uuid))
	unlock, err := s.holders.locks.Lock(ctx, uuid)
	if err != nil {
		log.WithError(err).Errorf("the lease of the volume is lost, and it cannot be taken from its containers yet; %s", adviceCannot)
		return
	}
	defer unlock()
	t, ok := s.leaseTrouble(uuid)
	if !ok || t.state != presence.Lost || t.ended {
		return // detached meanwhile
	}
	if s.holdsLease(uuid) {
		s.settleTrouble(uuid) // and attached anew
		return
	}
	err = s.inRoot(ctx, func() {}, func(ctx context.Context, root *volume.Root) error { return s.cut(ctx, root, uuid) })
	switch {
	case err == nil:
		t.advice, t.ended = adviceCut, true
	case errors.Is(err, errors.ErrUnsupported):
		t.advice, t.ended = fmt.Sprintf("%s (%v)", adviceCannot, err), true
	default: // tried again by tend
		t.advice = fmt.Sprintf("%s; its file system could not be shut down here: %v", adviceCannot, err)
	}
	s.setTrouble(uuid, t)
	log.Error(t)
}

// cut takes a volume from the containers of this host.
func (s *store) cut(ctx context.Context, root *volume.Root, uuid string) error {
	for _, v := range s.ledger.seen(s.key) {
		if v.Record.UUID == uuid {
			return root.Cut(ctx, v.Record)
		}
	}
	return fault.NotFound("no volume with UUID %s is known", uuid)
}

// cutOffLeft tries again what cutOff could not.
func (s *store) cutOffLeft(ctx context.Context) {
	for uuid, t := range s.allTroubles() {
		if t.state == presence.Lost && !t.ended {
			s.cutOff(ctx, uuid)
		}
	}
}

// rejoin tells the other hosts of the volumes that an earlier process left mounted, and
// finds out which of these are lost.
func (s *store) rejoin(ctx context.Context) error {
	s.society.mu.Lock()
	done := s.society.rejoined
	s.society.mu.Unlock()
	if done {
		return nil
	}
	used := s.usedHere()
	var err error
	if len(used) > 0 {
		err = s.inRoot(ctx, func() {}, func(ctx context.Context, root *volume.Root) error { return s.resume(ctx, root, used) })
	}
	if err == nil {
		s.society.mu.Lock()
		s.society.rejoined = true
		s.society.mu.Unlock()
	}
	return err
}

// resume takes the leases of exclusive volumes among those that are used.
func (s *store) resume(ctx context.Context, root *volume.Root, used map[string]time.Time) error {
	p, err := s.peers(root)
	if err != nil || p == nil {
		return err
	}
	var errs []error
	for _, v := range s.ledger.seen(s.key) {
		uuid := v.Record.UUID
		if _, ok := used[uuid]; !ok || !v.Record.Exclusive {
			continue
		}
		why, err := p.Resume(ctx, uuid)
		if err == nil && why != "" {
			s.leaseChanged(uuid, presence.Lost, why)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// nameOf is a volume's name, or its UUID where that is all that is known.
func (s *store) nameOf(uuid string) string {
	for name, v := range s.ledger.seen(s.key) {
		if v.Record.UUID == uuid {
			return name
		}
	}
	return uuid
}

// holdsLease tells whether the lease of a volume is this process's, as far as it knows.
func (s *store) holdsLease(uuid string) bool {
	s.society.mu.Lock()
	p := s.society.peers
	s.society.mu.Unlock()
	return p != nil && p.Holds(uuid)
}

func (s *store) setTrouble(uuid string, t leaseTrouble) {
	s.society.mu.Lock()
	defer s.society.mu.Unlock()
	if s.society.troubles == nil {
		s.society.troubles = map[string]leaseTrouble{}
	}
	s.society.troubles[uuid] = t
}

// settleTrouble says that a volume's lease is this host's, or does not matter to it.
func (s *store) settleTrouble(uuid string) {
	s.society.mu.Lock()
	defer s.society.mu.Unlock()
	delete(s.society.troubles, uuid)
}

// leaseTrouble tells why this host may not be the one that has an exclusive volume.
func (s *store) leaseTrouble(uuid string) (leaseTrouble, bool) {
	s.society.mu.Lock()
	defer s.society.mu.Unlock()
	t, ok := s.society.troubles[uuid]
	return t, ok
}

// allTroubles by UUID.
func (s *store) allTroubles() map[string]leaseTrouble {
	s.society.mu.Lock()
	defer s.society.mu.Unlock()
	return maps.Clone(s.society.troubles)
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
		// What is left here from before it was lost must not be used again.
		if t, ok := s.leaseTrouble(rec.UUID); ok && t.state == presence.Lost {
			if err := root.Cut(ctx, rec); err != nil && !errors.Is(err, errors.ErrUnsupported) {
				return err
			}
		}
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
		s.settleTrouble(rec.UUID)
	}
	p.Leave(rec.UUID)
	return err
}

// forgetLease is volume.Location's: it deletes the lease of a volume whose data is gone.
// One that another host has stays, and costs nobody anything.
func (s *store) forgetLease(ctx context.Context, root *volume.Root, uuid string) error {
	p, err := s.peers(root)
	if err != nil || p == nil {
		return err
	}
	turn, err := turnOf(uuid)
	if err == nil {
		err = p.Drop(ctx, turn)
	}
	err = errors.Join(err, p.Drop(ctx, uuid))
	if errdefs.IsConflict(err) {
		s.cfg.Log.WithField("volume", uuid).WithError(err).Info("a lease of a volume that was deleted is left")
		return nil
	}
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
