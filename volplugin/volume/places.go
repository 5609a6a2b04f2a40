package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// workName is a directory in the volume itself, where single paths are restored before
// they take their places: by renaming, which needs the volume's own file system, and on
// btrfs its own subvolume. Nobody sees it, because a volume that is restoring is in
// nobody's use.
func (r Record) workName() string { return ".berth-restore-" + r.UUID }

// untouched tells whether single paths are being restored into a volume, and nothing of
// its data has changed yet.
func (r Record) untouched() bool {
	return r.Phase == Restoring && r.halfRestored() && len(r.Source.Paths) > 0 && !r.Source.Placing
}

// tidyTime is how long it may take to remove what was restored and is not wanted.
const tidyTime = 10 * time.Minute

// openData opens the data of an attached volume with a handle that can be read.
func (r *Root) openData(rec Record) (*rooted.Dir, error) {
	handle, err := r.Data(rec)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	return rooted.Open(handle.ProcPath())
}

// errPathsInterrupted is why single paths are not in their places whose restore was
// interrupted: nobody waits for them any more, and the volume is ready as it was.
var errPathsInterrupted = fault.Conflict("restoring was interrupted, and nothing has changed: restore again")

// restorePaths restores single paths of a backup and then puts each in its place. What was
// interrupted in doing so starts over: a path that is in its place already comes once more.
func (r *Root) restorePaths(ctx context.Context, rec Record, progress func(engine.Progress)) (Record, error) {
	top, err := r.openData(rec)
	if err != nil {
		return Record{}, err
	}
	defer top.Close()
	name := rec.workName()
	if _, err := top.Stat(name); err == nil && !rec.Source.Placing {
		return Record{}, errPathsInterrupted
	}
	if err := top.RemoveTree(ctx, name); err != nil {
		return Record{}, err
	}
	if err := r.step(ctx, "restore.work", rec.Name); err != nil {
		return Record{}, err
	}
	if err := top.Mkdir(name, 0o700); err != nil {
		return Record{}, err
	}
	work, err := top.Dir(name)
	if err != nil {
		return Record{}, err
	}
	defer work.Close()
	if err := r.step(ctx, "restore.data", rec.Name); err != nil {
		return Record{}, err
	}
	if err := r.Restore(ctx, rec, work, progress); err != nil {
		return Record{}, err
	}
	paths := outermost(rec.Source.Paths)
	for _, path := range paths {
		if err := placeable(top, work, path); err != nil {
			return Record{}, placeError(path, err)
		}
	}
	if err := r.step(ctx, "restore.placing", rec.Name); err != nil {
		return Record{}, err
	}
	if rec, err = r.advance(ctx, rec, func(now *Record) { now.Source.Placing = true }); err != nil {
		return Record{}, err
	}
	for _, path := range paths {
		if err := r.step(ctx, "restore.place", rec.Name); err != nil {
			return Record{}, err
		}
		if err := place(top, work, path); err != nil {
			return Record{}, placeError(path, err)
		}
	}
	if err := unix.Syncfs(top.FD()); err != nil {
		return Record{}, &fs.PathError{Op: "syncfs", Path: top.Path(), Err: err}
	}
	if err := r.step(ctx, "restore.tidy", rec.Name); err != nil {
		return Record{}, err
	}
	return rec, errors.Join(top.RemoveTree(ctx, name), top.Sync())
}

// outermost leaves out the paths that are below others.
func outermost(paths []string) []string {
	var out []string
	for _, path := range slices.Sorted(slices.Values(paths)) {
		if !slices.ContainsFunc(out, func(above string) bool { return path == above || strings.HasPrefix(path, above+"/") }) {
			out = append(out, path)
		}
	}
	return out
}

// placeError names the path, and what is in its way.
func placeError(path string, err error) error {
	var at *fs.PathError
	if errors.As(err, &at) {
		for _, wrong := range []error{rooted.ErrSymlink, rooted.ErrNotDir, rooted.ErrMountPoint} {
			if errors.Is(at.Err, wrong) {
				return fault.Conflict("path %s: %s, which is above it, %w in the volume: remove that, or restore it instead", path, filepath.Base(at.Path), wrong)
			}
		}
	}
	return fmt.Errorf("path %s: %w", path, err)
}

// A descent is a pair of directories of the same name, in the volume and in what was
// restored.
type descent struct{ at, from *rooted.Dir }

// into goes one step down, and closes what it has left unless that are the tops.
func (d descent) into(name string, tops descent) (descent, error) {
	at, err := d.at.Dir(name)
	if err != nil {
		return d, err
	}
	from, err := d.from.Dir(name)
	if err != nil {
		return d, errors.Join(err, at.Close())
	}
	return descent{at, from}, d.close(tops)
}

func (d descent) close(tops descent) error {
	if d == tops {
		return nil
	}
	return errors.Join(d.at.Close(), d.from.Close())
}

// placeable looks whether what was restored at path is there and can take its place.
// Links in the volume are not followed.
func placeable(top, work *rooted.Dir, path string) error {
	return walkDown(descent{top, work}, path, func(descent, string, bool) error { return nil })
}

// walkDown follows path to where it ends, or to where the volume has no entry that it
// leads through, and calls do there.
func walkDown(tops descent, path string, do func(d descent, name string, there bool) error) (err error) {
	d := tops
	defer func() { err = errors.Join(err, d.close(tops)) }()
	elements := strings.Split(path, "/")
	for i, name := range elements {
		if _, err := d.from.Stat(name); err != nil {
			return err
		}
		_, err := d.at.Stat(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err != nil || i == len(elements)-1 {
			return do(d, name, err == nil)
		}
		if d, err = d.into(name, tops); err != nil {
			return err
		}
	}
	return nil
}

// place puts what was restored at path in its place, by one rename. Directories above it
// that the volume does not have come along, with their owner and mode of the backup.
func place(top, work *rooted.Dir, path string) error {
	err := walkDown(descent{top, work}, path, func(d descent, name string, there bool) error {
		if !there {
			return d.from.RenameNew(name, d.at, name)
		}
		err := d.from.Exchange(name, d.at, name)
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
		return exchangeSlowly(d, name, work)
	})
	if errors.Is(err, fs.ErrNotExist) {
		// It came along with a directory above it. placeable has seen it in what was restored.
		return present(top, path)
	}
	return err
}

// exchangeSlowly is for file systems that cannot exchange entries, as NFS. There is a moment
// without either; whoever is killed in it starts over. What was there goes with work.
func exchangeSlowly(d descent, name string, work *rooted.Dir) error {
	for n := 0; ; n++ {
		err := d.at.RenameNew(name, work, fmt.Sprintf(".old-%d", n))
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return err
		}
		return d.from.RenameNew(name, d.at, name)
	}
}

// present errs unless the volume has something at path.
func present(top *rooted.Dir, path string) error {
	return walkDown(descent{top, top}, path, func(_ descent, name string, there bool) error {
		if !there {
			return &fs.PathError{Op: "find", Path: name, Err: fs.ErrNotExist}
		}
		return nil
	})
}

// unplace makes a volume ready again into which single paths were to be restored, and of
// whose data nothing has changed. The snapshot that kept it goes.
func (r *Root) unplace(ctx context.Context, rec Record) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyTime)
	defer cancel()
	if err := r.step(ctx, "restore.unplace", rec.Name); err != nil {
		return err
	}
	release, err := r.hold(ctx, rec)
	if err != nil {
		return err
	}
	top, err := r.openData(rec)
	if err == nil {
		err = errors.Join(top.RemoveTree(ctx, rec.workName()), top.Sync(), top.Close())
	}
	if err := errors.Join(err, release()); err != nil {
		return err
	}
	kept, before := r.keptBefore(rec)
	rec, err = r.advance(ctx, rec, func(now *Record) { now.Phase, now.Host, now.Source = Ready, "", before })
	if err != nil || kept.Name == "" {
		return err
	}
	return r.removeSnapshot(ctx, rec, kept)
}

// keptBefore is the snapshot of what was in a volume before a restore in place, and what
// that was made from, nil for nothing or when it cannot be told.
func (r *Root) keptBefore(rec Record) (kept Snapshot, before *Source) {
	kept, err := r.snapshotOf(rec, rec.Source.Kept)
	if err != nil || kept.Source == nil || kept.Source.isZero() {
		return kept, nil
	}
	return kept, kept.Source
}
