package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Snapshot implements engine.Engine.
func (e *Engine) Snapshot(ctx context.Context, p engine.Place, v engine.Volume, snap string, progress func(engine.Progress)) (done engine.Copy, err error) {
	top, kind, err := e.top(p, v)
	if err != nil {
		return engine.Copy{}, err
	}
	defer top.Close()
	if found, err := e.fileSnapshot(p, v, snap); err != nil || found {
		return engine.Copy{}, errors.Join(err, taken(snap, found))
	}
	asFile, err := e.snapshotsAreFiles(p, top, kind)
	if err != nil {
		return engine.Copy{}, err
	}
	if asFile {
		return e.freezeAndShare(ctx, p, v, snap, top)
	}
	err = e.inside(p, top, kind, func(trees engine.Engine, in engine.Place) error {
		done, err = trees.Snapshot(ctx, in, insideVolume(v), snap, progress)
		return err
	})
	return done, err
}

func taken(snap string, found bool) error {
	if !found {
		return nil
	}
	return fmt.Errorf("snapshot %s: %w", snap, fs.ErrExist)
}

// snapshotsAreFiles tells where a new snapshot goes.
func (e *Engine) snapshotsAreFiles(p engine.Place, top *rooted.Dir, kind filesystem.Kind) (bool, error) {
	if kind == filesystem.Btrfs {
		return false, nil
	}
	inside, err := hasInsideSnapshots(top)
	if err != nil || inside {
		return false, err
	}
	return reflinks(p)
}

func hasInsideSnapshots(top *rooted.Dir) (bool, error) {
	dir, err := top.Dir(filesystem.SnapshotsName)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer dir.Close()
	empty, err := dir.Empty()
	return !empty, err
}

// fileSnapshot tells whether snap is a file.
func (e *Engine) fileSnapshot(p engine.Place, v engine.Volume, snap string) (bool, error) {
	image, err := openSnapshotFile(p, v, snap)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, image.Close()
}

func openSnapshotFile(p engine.Place, v engine.Volume, snap string) (*os.File, error) {
	dir, err := p.Snapshots.Dir(v.UUID)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return openFile(dir, imageName(snap), unix.O_RDONLY)
}

func hasFileSnapshots(p engine.Place, v engine.Volume) (bool, error) {
	dir, err := p.Snapshots.Dir(v.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer dir.Close()
	names, err := dir.Names()
	for _, name := range names {
		if strings.HasSuffix(name, suffix) {
			return true, nil
		}
	}
	return false, err
}

// snapshotDir opens the directory of the volume's snapshots and makes it first
// where there is none.
func snapshotDir(ctx context.Context, p engine.Place, v engine.Volume) (*rooted.Dir, error) {
	dir, err := p.Snapshots.Dir(v.UUID)
	if !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	if err := p.Before(ctx, "snapshot.directory"); err != nil {
		return nil, err
	}
	if err := errors.Join(p.Snapshots.EnsureDir(v.UUID, 0o700), p.Snapshots.Sync()); err != nil {
		return nil, err
	}
	return p.Snapshots.Dir(v.UUID)
}

// freezeAndShare makes a snapshot that is a file.
func (e *Engine) freezeAndShare(ctx context.Context, p engine.Place, v engine.Volume, snap string, top *rooted.Dir) (engine.Copy, error) {
	if err := aboveFloor(p); err != nil {
		return engine.Copy{}, err
	}
	image, err := openFile(p.Images, imageName(v.Name), unix.O_RDWR)
	if err != nil {
		return engine.Copy{}, err
	}
	defer image.Close()
	dir, err := snapshotDir(ctx, p, v)
	if err != nil {
		return engine.Copy{}, err
	}
	defer dir.Close()
	temp := snapshot(v, snap)
	if err := clear(ctx, p, temp); err != nil {
		return engine.Copy{}, err
	}
	if err := p.Before(ctx, "snapshot.file"); err != nil {
		return engine.Copy{}, err
	}
	err = e.shareFrozen(ctx, p, v, temp, image, top)
	if err == nil {
		err = p.Before(ctx, "snapshot.move")
	}
	if err == nil {
		err = move(p.Tmp, temp, dir, imageName(snap))
	}
	if err != nil {
		return engine.Copy{}, errors.Join(err, clear(context.WithoutCancel(ctx), p, temp))
	}
	return engine.Copy{Consistency: engine.Frozen}, nil
}

// shareFrozen makes temp share all that the image has at one moment.
func (e *Engine) shareFrozen(ctx context.Context, p engine.Place, v engine.Volume, temp string, image *os.File, top *rooted.Dir) (err error) {
	unlock, err := e.freezes.Lock(ctx, v.UUID)
	if err != nil {
		return err
	}
	defer unlock()
	file, err := newFile(p, temp)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	frozen, err := filesystem.Freeze(ctx, top.FD(), 0)
	if err != nil {
		return err
	}
	err = share(file, image)
	if err := errors.Join(err, frozen.Thaw()); err != nil {
		return err
	}
	if err := file.Chmod(0o400); err != nil {
		return err
	}
	return file.Sync()
}

// OpenSnapshot implements engine.Engine.
func (e *Engine) OpenSnapshot(ctx context.Context, p engine.Place, v engine.Volume, snap string) (*rooted.Dir, error) {
	image, err := openSnapshotFile(p, v, snap)
	if errors.Is(err, fs.ErrNotExist) {
		return e.openInside(ctx, p, v, snap)
	}
	if err != nil {
		return nil, err
	}
	defer image.Close()
	if _, err := e.identify(image); err != nil {
		return nil, err
	}
	target := snapshotTarget(p, v, snap)
	there, err := mountedFrom(target, image)
	if err != nil {
		return nil, err
	}
	if !there {
		if _, err := mount(ctx, target, image, filesystem.MountOptions{ReadOnly: true}); err != nil {
			return nil, fmt.Errorf("snapshot %s of volume %s: %w", snap, v.Name, err)
		}
	}
	top, err := rooted.Open(target)
	if err != nil {
		return nil, err
	}
	defer top.Close()
	return top.Dir(filesystem.DataName)
}

func (e *Engine) openInside(ctx context.Context, p engine.Place, v engine.Volume, snap string) (dir *rooted.Dir, err error) {
	top, kind, err := e.top(p, v)
	if err != nil {
		return nil, err
	}
	defer top.Close()
	err = e.inside(p, top, kind, func(trees engine.Engine, in engine.Place) error {
		dir, err = trees.OpenSnapshot(ctx, in, insideVolume(v), snap)
		return err
	})
	return dir, err
}

// CloseSnapshot implements engine.Engine. The error is a conflict while the snapshot
// is open.
func (e *Engine) CloseSnapshot(_ context.Context, p engine.Place, v engine.Volume, snap string) error {
	return unmount(snapshotTarget(p, v, snap))
}

// RemoveSnapshot implements engine.Engine.
func (e *Engine) RemoveSnapshot(ctx context.Context, p engine.Place, v engine.Volume, snap string) error {
	if err := clear(ctx, p, snapshot(v, snap)); err != nil {
		return err
	}
	if err := e.removeFile(ctx, p, v, snap); err != nil {
		return err
	}
	top, kind, err := e.top(p, v)
	if err != nil {
		return err
	}
	defer top.Close()
	return e.inside(p, top, kind, func(trees engine.Engine, in engine.Place) error {
		return trees.RemoveSnapshot(ctx, in, insideVolume(v), snap)
	})
}

// removeFile deletes a snapshot that is a file.
func (e *Engine) removeFile(ctx context.Context, p engine.Place, v engine.Volume, snap string) error {
	found, err := e.fileSnapshot(p, v, snap)
	if err != nil || !found {
		return err
	}
	data, errData := e.Find(p, v.Name)
	if copied, err := present(p.Tmp, rollback(v)); err != nil || errData != nil || copied && !data {
		// Between the moves of a rollback one of the snapshots is all there is of
		// the data.
		return errors.Join(err, errData, unfinished(v, copied && !data))
	}
	if err := unmountUnused(snapshotTarget(p, v, snap)); err != nil {
		return err
	}
	dir, err := p.Snapshots.Dir(v.UUID)
	if err != nil {
		return err
	}
	defer dir.Close()
	return remove(ctx, p, dir, imageName(snap))
}
