package volplugin

import (
	"context"
	"errors"
	"sync"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/keylock"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// holders say which volumes are to stay attached to this host: those that a
// container has, by the ledger, and those that an operation of this process works
// on. Directories need no attachment, images and devices are mounted by it.
type holders struct {
	// locks has one lock for each volume by UUID, held while it is attached or
	// detached.
	locks *keylock.Locker

	mu    sync.Mutex // guards the following
	count map[string]int
}

func newHolders() *holders {
	return &holders{locks: keylock.New(), count: map[string]int{}}
}

func (h *holders) add(uuid string, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.count[uuid] += n; h.count[uuid] == 0 {
		delete(h.count, uuid)
	}
}

func (h *holders) held(uuid string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.count[uuid] > 0
}

// hold is volume.Location's: it attaches a volume until release is called, and as
// long as anybody else has it.
func (s *store) hold(ctx context.Context, rec volume.Record) (release func() error, err error) {
	root, err := s.open()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return s.holdIn(ctx, root, rec)
}

// holdIn is hold for those who have the root open.
func (s *store) holdIn(ctx context.Context, root *volume.Root, rec volume.Record) (release func() error, err error) {
	unlock, err := s.holders.locks.Lock(ctx, rec.UUID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := s.enter(ctx, root, rec); err != nil {
		return nil, err
	}
	// Also for directories: what an engine keeps until a volume is first used goes.
	if err := root.Attach(ctx, rec); err != nil {
		if !s.holders.held(rec.UUID) && !s.ledger.hasMounts(rec.UUID) {
			err = errors.Join(err, s.leave(context.WithoutCancel(ctx), root, rec))
		}
		return nil, err
	}
	s.settleTrouble(rec.UUID)
	s.holders.add(rec.UUID, 1)
	return sync.OnceValue(func() error {
		s.holders.add(rec.UUID, -1)
		return s.detachIdle(context.WithoutCancel(ctx), rec)
	}), nil
}

// detachIdle detaches a volume that nobody has.
func (s *store) detachIdle(ctx context.Context, rec volume.Record) error {
	if treeEngine(rec.Engine) && s.alone() {
		return nil // there is nothing to detach, and nobody to tell
	}
	unlock, err := s.holders.locks.Lock(ctx, rec.UUID)
	if err != nil {
		return err
	}
	defer unlock()
	if s.holders.held(rec.UUID) || s.ledger.hasMounts(rec.UUID) {
		return nil
	}
	root, err := s.open()
	if errors.Is(err, volume.ErrFresh) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	if err = root.Detach(ctx, rec); err == nil {
		return s.leave(ctx, root, rec)
	}
	if fault.Kind(err) == "conflict" {
		// A process that Berth knows nothing of is in it. It is tried again after the
		// next use, and at the next start.
		s.cfg.Log.WithField("volume", rec.Name).WithError(err).Info("left attached")
		return nil
	}
	return err
}
