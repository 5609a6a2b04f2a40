package volplugin

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"

	"github.com/berth-plugin/berth/volplugin/schedule"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// turnOf names the lease by which the hosts that share a root agree on who makes the
// scheduled backup of a volume. It is made of the volume's UUID, whose own lease says
// who has the volume mounted.
func turnOf(id string) (string, error) {
	space, err := uuid.Parse(id)
	if err != nil {
		return "", fmt.Errorf("UUID %.80q: %w", id, err)
	}
	return uuid.NewSHA1(space, []byte("backup")).String(), nil
}

// takeTurn lets one host at a time make the scheduled backup of a volume, until end is
// called; if the host dies another one may. The error is schedule.ErrElsewhere while
// another host is at it. On a root that nobody else can reach it does nothing.
func (d *Driver) takeTurn(ctx context.Context, s *store, rec volume.Record) (end func(), err error) {
	turn, err := turnOf(rec.UUID)
	if err != nil {
		return nil, err
	}
	end = func() {}
	err = d.bounded(ctx, s, func(ctx context.Context, root *volume.Root) error {
		p, err := s.peers(root)
		if err != nil || p == nil {
			return err
		}
		s.society.turn(turn, true)
		if _, err := p.Acquire(ctx, turn, false); err != nil {
			s.society.turn(turn, false)
			if errdefs.IsConflict(err) {
				return fmt.Errorf("%w: %w", schedule.ErrElsewhere, err)
			}
			return err
		}
		end = func() { d.endTurn(context.WithoutCancel(ctx), s, rec.Name, turn) }
		return nil
	})
	return end, err
}

// endTurn is the inverse. If it fails the next run of this host ends the turn, or
// another host takes it once this one is dead.
func (d *Driver) endTurn(ctx context.Context, s *store, name, turn string) {
	err := d.bounded(ctx, s, func(ctx context.Context, root *volume.Root) error {
		p, err := s.peers(root)
		if err != nil || p == nil {
			return err
		}
		defer s.society.turn(turn, false)
		return p.Release(ctx, turn)
	})
	if err != nil {
		d.cfg.Log.WithField("volume", name).WithError(err).Warn("tell the other hosts that the backup has ended")
	}
}

// bounded is inRoot for no longer than a request takes.
func (d *Driver) bounded(ctx context.Context, s *store, fn func(ctx context.Context, root *volume.Root) error) error {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.request)
	defer cancel()
	return s.inRoot(ctx, func() {}, fn)
}

// turn notes that a lease is one of turns, which nothing is cut off for when it is lost:
// the worst that comes of it are two backups.
func (c *society) turn(lease string, taken bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !taken {
		delete(c.turns, lease)
		return
	}
	if c.turns == nil {
		c.turns = map[string]bool{}
	}
	c.turns[lease] = true
}

func (c *society) isTurn(lease string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.turns[lease]
}
