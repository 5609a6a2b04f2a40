package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func unfinished(v engine.Volume, is bool) error {
	if !is {
		return nil
	}
	return fault.Conflict("a rollback of volume %s has begun and not ended", v.Name)
}

// Rollback implements engine.Engine. The volume is attached when it returns.
func (e *Engine) Rollback(ctx context.Context, p engine.Place, v engine.Volume, snap, keep string, progress func(engine.Progress)) (done engine.Copy, err error) {
	if snap == keep {
		return engine.Copy{}, fault.Invalid("the data cannot be kept as snapshot %s, to which it goes back", keep)
	}
	s, err := e.stateOf(p, v, snap, keep)
	if err != nil {
		return engine.Copy{}, err
	}
	if s.isFile || s.kept && (s.copied || !s.data) {
		return e.rollbackFile(ctx, p, v, snap, keep, s)
	}
	top, kind, err := e.top(p, v)
	if err != nil {
		return engine.Copy{}, err
	}
	defer top.Close()
	if s.kept {
		return engine.Copy{}, taken(keep, true)
	}
	err = e.inside(p, top, kind, func(trees engine.Engine, in engine.Place) error {
		done, err = trees.Rollback(ctx, in, insideVolume(v), snap, keep, progress)
		return err
	})
	return done, err
}

// state of a rollback to a snapshot that is a file, as package treeengine's table
// has it.
type state struct {
	// isFile: the snapshot is one.
	isFile             bool
	data, kept, copied bool
}

func (e *Engine) stateOf(p engine.Place, v engine.Volume, snap, keep string) (s state, err error) {
	var errs [4]error
	s.isFile, errs[0] = e.fileSnapshot(p, v, snap)
	s.kept, errs[1] = e.fileSnapshot(p, v, keep)
	s.data, errs[2] = e.Find(p, v.Name)
	s.copied, errs[3] = present(p.Tmp, rollback(v))
	return s, errors.Join(errs[:]...)
}

func (e *Engine) rollbackFile(ctx context.Context, p engine.Place, v engine.Volume, snap, keep string, s state) (engine.Copy, error) {
	switch {
	case s.data && s.kept && !s.copied:
		return engine.Copy{Consistency: engine.Frozen}, e.Attach(ctx, p, v)
	case s.data && s.kept:
		return engine.Copy{}, fmt.Errorf("data of %s: %w", v.Name, fs.ErrExist)
	case !s.data && !s.kept:
		return engine.Copy{}, missing(p.Images, imageName(v.Name), false)
	}
	if s.data {
		if err := e.nothingInside(p, v); err != nil {
			return engine.Copy{}, err
		}
	}
	dir, err := p.Snapshots.Dir(v.UUID)
	if err != nil {
		return engine.Copy{}, err
	}
	defer dir.Close()
	if s.data || !s.copied {
		if err := e.buildRollback(ctx, p, v, dir, snap, keep, s.data); err != nil {
			return engine.Copy{}, err
		}
	}
	undo := context.WithoutCancel(ctx)
	if s.data {
		err := ctx.Err()
		if err == nil {
			err = e.Detach(ctx, p, v)
		}
		if err != nil {
			return engine.Copy{}, errors.Join(err, clear(undo, p, rollback(v)))
		}
	}
	// What is left is short. Nobody shall stop between the moves.
	ctx = undo
	if s.data {
		err := p.Before(ctx, "rollback.keep")
		if err == nil {
			err = move(p.Images, imageName(v.Name), dir, imageName(keep))
		}
		if err != nil {
			return engine.Copy{}, errors.Join(err, clear(ctx, p, rollback(v)), e.Attach(ctx, p, v))
		}
	}
	err = p.Before(ctx, "rollback.move")
	if err == nil {
		err = move(p.Tmp, rollback(v), p.Images, imageName(v.Name))
	}
	if err != nil {
		return engine.Copy{}, errors.Join(err, e.undoRollback(ctx, p, v, dir, keep))
	}
	return engine.Copy{Consistency: engine.Frozen}, e.Attach(ctx, p, v)
}

// nothingInside errs when an image has snapshots that its exchange would take away.
func (e *Engine) nothingInside(p engine.Place, v engine.Volume) error {
	top, _, err := e.top(p, v)
	if err != nil {
		return err
	}
	defer top.Close()
	inside, err := hasInsideSnapshots(top)
	if err != nil || !inside {
		return err
	}
	return fault.Conflict("volume %s has snapshots of two sorts, because its root was moved: make a clone of the snapshot instead, or remove those that were made last", v.Name)
}

// buildRollback makes the image that is to become the data.
func (e *Engine) buildRollback(ctx context.Context, p engine.Place, v engine.Volume, dir *rooted.Dir, snap, keep string, data bool) (err error) {
	src, err := openFile(dir, imageName(snap), unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer src.Close()
	// The volume keeps the size that it has now.
	now, nowName := dir, imageName(keep)
	if data {
		now, nowName = p.Images, imageName(v.Name)
	}
	present, err := openFile(now, nowName, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer present.Close()
	size, err := sizeOf(present)
	if err != nil {
		return err
	}
	if err := errors.Join(aboveFloor(p), clear(ctx, p, rollback(v)), clear(ctx, p, rollbackPart(v))); err != nil {
		return err
	}
	if err := p.Before(ctx, "rollback.file"); err != nil {
		return err
	}
	err = e.copyImage(ctx, p, rollbackPart(v), v, src, size, func(*rooted.Dir, filesystem.Kind) error { return nil })
	if err == nil {
		err = p.Before(ctx, "rollback.complete")
	}
	if err == nil {
		err = move(p.Tmp, rollbackPart(v), p.Tmp, rollback(v))
	}
	if err != nil {
		return errors.Join(err, clear(context.WithoutCancel(ctx), p, rollbackPart(v)))
	}
	return nil
}

// copyImage makes temp a writable copy of an image that nobody writes to, of size
// bytes or its own if that is more, and lets change alter what is in it.
func (e *Engine) copyImage(ctx context.Context, p engine.Place, temp string, v engine.Volume, src *os.File, size uint64, change func(*rooted.Dir, filesystem.Kind) error) (err error) {
	file, err := newFile(p, temp)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := duplicate(ctx, p, file, src); err != nil {
		return err
	}
	return e.own(ctx, p, v, file, size, change)
}

// undoRollback puts the data back where it was.
func (e *Engine) undoRollback(ctx context.Context, p engine.Place, v engine.Volume, dir *rooted.Dir, keep string) error {
	if err := p.Before(ctx, "rollback.undo"); err != nil {
		return err
	}
	if err := move(dir, imageName(keep), p.Images, imageName(v.Name)); err != nil {
		return err
	}
	return errors.Join(clear(ctx, p, rollback(v)), e.Attach(ctx, p, v))
}
