package volplugin

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// A scope says what an operation keeps away from a volume meanwhile.
type scope int

const (
	// beside: containers may start and end, and have the volume.
	beside scope = iota
	// alone: no request of dockerd for the volume is answered.
	alone
)

// operate runs an operation on an existing volume that may take long: as long as
// ctx lets it. One at a time works on a volume. When ctx ends first, the operation is
// given up as a request is: it holds its locks until the kernel lets it go.
func (d *Driver) operate(ctx context.Context, name string, how scope, fn func(ctx context.Context, s *store, root *volume.Root) error) error {
	if err := volume.CheckName(name); err != nil {
		return err
	}
	unlock, err := d.lockOperation(ctx, name, how)
	if err != nil {
		return err
	}
	s, err := d.storeOf(ctx, name)
	if err != nil {
		unlock()
		return fmt.Errorf("volume %s: %w", name, err)
	}
	return s.inRoot(ctx, unlock, func(ctx context.Context, root *volume.Root) error { return fn(ctx, s, root) })
}

// lockOperation waits for a volume, for as long as a request would.
func (d *Driver) lockOperation(ctx context.Context, name string, how scope) (unlock func(), err error) {
	wait, cancel := context.WithTimeout(ctx, d.cfg.request)
	defer cancel()
	unlocks := func() {}
	if how == alone {
		if unlocks, err = d.locks.Lock(wait, name); err != nil {
			return nil, fault.Conflict("volume %s: an earlier request has not ended (%w)", name, err)
		}
	}
	unlockOp, err := d.ops.Lock(wait, name)
	if err != nil {
		unlocks()
		return nil, fault.Conflict("volume %s: another operation has not ended, a snapshot or a copy perhaps; try again later", name)
	}
	return func() {
		unlockOp()
		unlocks()
	}, nil
}

// inRoot runs fn with the root open. release is called when fn has returned or was
// never started.
func (s *store) inRoot(ctx context.Context, release func(), fn func(ctx context.Context, root *volume.Root) error) error {
	return s.changes.run(ctx, release, func(ctx context.Context, _ func() bool) error {
		root, err := s.open()
		if errors.Is(err, volume.ErrFresh) {
			return fault.NotFound("volume root %s has no volumes yet", s)
		}
		if err != nil {
			return err
		}
		defer root.Close()
		return fn(ctx, root)
	})
}

// inNewRoot is inRoot for what may be the first volume of a root.
func (s *store) inNewRoot(ctx context.Context, release func(), fn func(ctx context.Context, root *volume.Root) error) error {
	return s.changes.run(ctx, release, func(ctx context.Context, _ func() bool) error {
		root, err := s.open()
		if errors.Is(err, volume.ErrFresh) {
			root, err = s.initialise(ctx)
		}
		if err != nil {
			return err
		}
		defer root.Close()
		return fn(ctx, root)
	})
}

// lookIn runs fn with the root open, for no longer than a look may take.
func (s *store) lookIn(ctx context.Context, fn func(ctx context.Context, root *volume.Root) error) error {
	if s.hung.Load() {
		return s.looks.hangs()
	}
	return s.looks.run(ctx, func() {}, func(ctx context.Context, _ func() bool) error {
		defer s.hung.Store(false)
		root, err := s.open()
		if err != nil {
			return err
		}
		defer root.Close()
		return fn(ctx, root)
	})
}

// A reporter hands progress to a caller who may be gone.
type reporter struct {
	mu   sync.Mutex
	tell func(control.Progress)
}

func newReporter(tell func(control.Progress)) *reporter { return &reporter{tell: tell} }

// step is the progress of one step of an operation.
func (r *reporter) step(step string) func(engine.Progress) {
	return func(p engine.Progress) { r.send(progressOf(step, p)) }
}

func progressOf(step string, p engine.Progress) control.Progress {
	return control.Progress{Step: step, Files: p.Files, TotalFiles: p.TotalFiles, Bytes: p.Bytes, TotalBytes: p.TotalBytes}
}

func (r *reporter) send(p control.Progress) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tell != nil {
		r.tell(p)
	}
}

// end is called before the operation's answer: what was given up tells nobody.
func (r *reporter) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tell = nil
}
