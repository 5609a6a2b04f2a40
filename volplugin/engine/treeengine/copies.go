package treeengine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Names in Tmp; see the package's documentation.
func clone(v engine.Volume) string                 { return v.UUID + ".clone" }
func cloned(v engine.Volume) string                { return v.UUID + ".cloned" }
func rollback(v engine.Volume) string              { return v.UUID + ".rollback" }
func rollbackPart(v engine.Volume) string          { return v.UUID + ".rollback.part" }
func snapshot(v engine.Volume, snap string) string { return v.UUID + ".snapshot." + snap }
func removed(v engine.Volume, snap string) string  { return v.UUID + ".removed." + snap }
func destroyed(v engine.Volume) string             { return v.UUID + ".destroyed" }

// build makes the writable copy temp in Tmp, of which nothing is left when it fails.
func (e trunk) build(ctx context.Context, p engine.Place, src *rooted.Dir, temp string, size uint64, progress func(engine.Progress)) (engine.Copy, error) {
	if err := e.clear(ctx, p, temp); err != nil {
		return engine.Copy{}, err
	}
	if err := p.Before(ctx, "duplicate"); err != nil {
		return engine.Copy{}, err
	}
	done, err := e.trees.Duplicate(ctx, src, p.Tmp, temp, false, progress)
	if err == nil && size > 0 {
		err = e.limit(ctx, p, p.Tmp, temp, size)
	}
	if err == nil {
		err = p.Tmp.Sync()
	}
	if err != nil {
		return engine.Copy{}, errors.Join(err, e.clear(context.WithoutCancel(ctx), p, temp))
	}
	return done, nil
}

func (e trunk) Snapshot(ctx context.Context, p engine.Place, v engine.Volume, snap string, progress func(engine.Progress)) (engine.Copy, error) {
	src, err := p.Root.Dir(v.Name)
	if err != nil {
		return engine.Copy{}, err
	}
	defer src.Close()
	dir, err := e.snapshots(ctx, p, v)
	if err != nil {
		return engine.Copy{}, err
	}
	defer dir.Close()
	if _, err := dir.Stat(snap); err == nil {
		return engine.Copy{}, fmt.Errorf("snapshot %s: %w", snap, fs.ErrExist)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return engine.Copy{}, err
	}
	temp := snapshot(v, snap)
	done, err := e.build(ctx, p, src, temp, 0, progress)
	if err != nil {
		return engine.Copy{}, err
	}
	undo := context.WithoutCancel(ctx)
	err = p.Before(ctx, "snapshot.move")
	if err == nil {
		err = move(p.Tmp, temp, dir, snap)
	}
	if err != nil {
		return engine.Copy{}, errors.Join(err, e.clear(undo, p, temp))
	}
	if err := e.seal(ctx, p, dir, snap); err != nil {
		return engine.Copy{}, errors.Join(err, e.discard(undo, p, dir, snap, removed(v, snap)))
	}
	return done, nil
}

// snapshots opens the directory of the volume's snapshots and makes it first where
// there is none.
func (e trunk) snapshots(ctx context.Context, p engine.Place, v engine.Volume) (*rooted.Dir, error) {
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

// seal makes a snapshot read-only. It cannot be moved after that, so this comes last.
func (e trunk) seal(ctx context.Context, p engine.Place, dir *rooted.Dir, snap string) error {
	if err := p.Before(ctx, "seal"); err != nil {
		return err
	}
	return errors.Join(e.trees.Seal(dir, snap, true), dir.Sync())
}

func (e trunk) OpenSnapshot(_ context.Context, p engine.Place, v engine.Volume, snap string) (*rooted.Dir, error) {
	dir, err := p.Snapshots.Handle(v.UUID)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Handle(snap)
}

func (e trunk) CloseSnapshot(context.Context, engine.Place, engine.Volume, string) error { return nil }

func (e trunk) RemoveSnapshot(ctx context.Context, p engine.Place, v engine.Volume, snap string) error {
	for _, temp := range []string{snapshot(v, snap), removed(v, snap)} {
		if err := e.clear(ctx, p, temp); err != nil {
			return err
		}
	}
	dir, err := p.Snapshots.Dir(v.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if found, err := e.present(dir, snap); err != nil || !found {
		return err
	}
	// Between the moves of a rollback one of the snapshots is all there is of the data.
	data, errData := e.present(p.Root, v.Name)
	copied, errCopied := e.present(p.Tmp, rollback(v))
	if err := errors.Join(errData, errCopied); err != nil {
		return err
	}
	if copied && !data {
		return fault.Conflict("a rollback of volume %s has begun and not ended", v.Name)
	}
	return e.discard(ctx, p, dir, snap, removed(v, snap))
}

// source opens what a clone is made of.
func (e trunk) source(p engine.Place, from engine.Volume, snap string) (*rooted.Dir, error) {
	if snap == "" {
		return p.Root.Dir(from.Name)
	}
	dir, err := p.Snapshots.Dir(from.UUID)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Dir(snap)
}

// A mark says that a clone is complete.
type mark struct {
	// Tree is the clone's file handle, which it keeps under any name.
	Tree string
	Copy engine.Copy
}

// decode tells whether data is a mark. One that was cut short by a kill is none.
func (m *mark) decode(data []byte) bool { return json.Unmarshal(data, m) == nil && m.Tree != "" }

// markOf reads the volume's mark and tells whether the clone is in Tmp or under
// the volume's name. A mark whose clone is in neither place says nothing.
func (e trunk) markOf(p engine.Place, v engine.Volume) (m mark, inTmp, inPlace bool, err error) {
	data, err := p.Tmp.ReadFile(cloned(v), 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return mark{}, false, false, nil
	}
	if err != nil {
		return mark{}, false, false, err
	}
	if !m.decode(data) {
		return mark{}, false, false, nil
	}
	inTmp, err = is(p.Tmp, clone(v), m.Tree)
	if err == nil && !inTmp {
		inPlace, err = is(p.Root, v.Name, m.Tree)
	}
	return m, inTmp, inPlace, err
}

// is tells whether name is the tree of that identity.
func is(dir *rooted.Dir, name, tree string) (bool, error) {
	got, err := identity(dir, name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, rooted.ErrNotDir) || errors.Is(err, rooted.ErrSymlink) || errors.Is(err, rooted.ErrMountPoint) {
		return false, nil
	}
	return got == tree, err
}

// identity of a directory, the same under any name and after a reboot, and of no
// other one: its file handle, or where the file system has none its inode number.
func identity(dir *rooted.Dir, name string) (string, error) {
	tree, err := dir.Handle(name)
	if err != nil {
		return "", err
	}
	defer tree.Close()
	handle, _, err := unix.NameToHandleAt(tree.FD(), "", unix.AT_EMPTY_PATH)
	if err == nil {
		return fmt.Sprintf("%d:%x", handle.Type(), handle.Bytes()), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EOVERFLOW) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return "", &fs.PathError{Op: "name_to_handle_at", Path: tree.Path(), Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(tree.FD(), &st); err != nil {
		return "", &fs.PathError{Op: "stat", Path: tree.Path(), Err: err}
	}
	return fmt.Sprintf("inode:%d", st.Ino), nil
}

func (e trunk) Clone(ctx context.Context, p engine.Place, from engine.Volume, snap string, v engine.Volume, progress func(engine.Progress)) (engine.Copy, error) {
	m, inTmp, inPlace, err := e.markOf(p, v)
	if err != nil {
		return engine.Copy{}, err
	}
	if inPlace {
		return m.Copy, nil
	}
	if _, err := p.Root.Stat(v.Name); err == nil {
		return engine.Copy{}, fmt.Errorf("data of %s: %w", v.Name, fs.ErrExist)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return engine.Copy{}, err
	}
	if !inTmp {
		if m, err = e.makeClone(ctx, p, from, snap, v, progress); err != nil {
			return engine.Copy{}, err
		}
	}
	err = p.Before(ctx, "clone.move")
	if err == nil {
		err = move(p.Tmp, clone(v), p.Root, v.Name)
	}
	if err != nil {
		return engine.Copy{}, errors.Join(err, e.abandonClone(context.WithoutCancel(ctx), p, v))
	}
	return m.Copy, nil
}

// makeClone makes a clone in Tmp, with its mark.
func (e trunk) makeClone(ctx context.Context, p engine.Place, from engine.Volume, snap string, v engine.Volume, progress func(engine.Progress)) (mark, error) {
	if err := p.Before(ctx, "clone.forget"); err != nil {
		return mark{}, err
	}
	if err := forget(p, cloned(v)); err != nil {
		return mark{}, err
	}
	src, err := e.source(p, from, snap)
	if err != nil {
		return mark{}, err
	}
	defer src.Close()
	var m mark
	if m.Copy, err = e.build(ctx, p, src, clone(v), v.Size, progress); err != nil {
		return mark{}, err
	}
	m.Tree, err = identity(p.Tmp, clone(v))
	var data []byte
	if err == nil {
		data, err = json.Marshal(m)
	}
	if err == nil {
		err = p.Before(ctx, "clone.mark")
	}
	if err == nil {
		err = p.Tmp.WriteNew(cloned(v), data, 0o600)
	}
	if err == nil {
		err = p.Tmp.Sync()
	}
	if err != nil {
		return mark{}, errors.Join(err, e.abandonClone(context.WithoutCancel(ctx), p, v))
	}
	return m, nil
}

// abandonClone removes a clone, wherever it is, and then its mark.
func (e trunk) abandonClone(ctx context.Context, p engine.Place, v engine.Volume) error {
	_, _, inPlace, err := e.markOf(p, v)
	if err != nil {
		return err
	}
	if inPlace {
		if err := e.clear(ctx, p, clone(v)); err != nil {
			return err
		}
		if err := p.Before(ctx, "abandon.move"); err != nil {
			return err
		}
		if err := move(p.Root, v.Name, p.Tmp, clone(v)); err != nil {
			return err
		}
	}
	if err := e.clear(ctx, p, clone(v)); err != nil {
		return err
	}
	if _, err := p.Tmp.Stat(cloned(v)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := p.Before(ctx, "abandon.forget"); err != nil {
		return err
	}
	return forget(p, cloned(v))
}

func (e trunk) Rollback(ctx context.Context, p engine.Place, v engine.Volume, snap, keep string, progress func(engine.Progress)) (engine.Copy, error) {
	if snap == keep {
		return engine.Copy{}, fault.Invalid("the data cannot be kept as snapshot %s, to which it goes back", keep)
	}
	dir, err := p.Snapshots.Dir(v.UUID)
	if err != nil {
		return engine.Copy{}, err
	}
	defer dir.Close()
	data, errData := e.present(p.Root, v.Name)
	kept, errKept := e.present(dir, keep)
	copied, errCopied := e.present(p.Tmp, rollback(v))
	if err := errors.Join(errData, errKept, errCopied); err != nil {
		return engine.Copy{}, err
	}
	switch {
	case data && kept && !copied:
		return engine.Copy{}, nil
	case data && kept:
		return engine.Copy{}, fmt.Errorf("data of %s: %w", v.Name, fs.ErrExist)
	case !data && !kept:
		return engine.Copy{}, missing(p.Root, v.Name, false)
	}
	var done engine.Copy
	if data || !copied {
		if done, err = e.buildRollback(ctx, p, v, dir, snap, progress); err != nil {
			return engine.Copy{}, err
		}
	}
	if err := ctx.Err(); err != nil && data {
		return engine.Copy{}, errors.Join(err, e.clear(context.WithoutCancel(ctx), p, rollback(v)))
	}
	// What is left is short. Nobody shall stop between the moves.
	ctx = context.WithoutCancel(ctx)
	if data {
		err := p.Before(ctx, "rollback.keep")
		if err == nil {
			err = move(p.Root, v.Name, dir, keep)
		}
		if err != nil {
			return engine.Copy{}, errors.Join(err, e.clear(ctx, p, rollback(v)))
		}
	}
	err = e.seal(ctx, p, dir, keep)
	if err == nil {
		err = p.Before(ctx, "rollback.move")
	}
	if err == nil {
		err = move(p.Tmp, rollback(v), p.Root, v.Name)
	}
	if err != nil {
		return engine.Copy{}, errors.Join(err, e.undoRollback(ctx, p, v, dir, keep))
	}
	return done, nil
}

// buildRollback makes the writable copy of a snapshot that is to become the data.
func (e trunk) buildRollback(ctx context.Context, p engine.Place, v engine.Volume, dir *rooted.Dir, snap string, progress func(engine.Progress)) (engine.Copy, error) {
	src, err := dir.Dir(snap)
	if err != nil {
		return engine.Copy{}, err
	}
	defer src.Close()
	if err := e.clear(ctx, p, rollback(v)); err != nil {
		return engine.Copy{}, err
	}
	done, err := e.build(ctx, p, src, rollbackPart(v), v.Size, progress)
	if err != nil {
		return engine.Copy{}, err
	}
	err = p.Before(ctx, "rollback.complete")
	if err == nil {
		err = move(p.Tmp, rollbackPart(v), p.Tmp, rollback(v))
	}
	if err != nil {
		return engine.Copy{}, errors.Join(err, e.clear(context.WithoutCancel(ctx), p, rollbackPart(v)))
	}
	return done, nil
}

// undoRollback puts the data back where it was.
func (e trunk) undoRollback(ctx context.Context, p engine.Place, v engine.Volume, dir *rooted.Dir, keep string) error {
	if err := p.Before(ctx, "rollback.undo"); err != nil {
		return err
	}
	if err := e.trees.Seal(dir, keep, false); err != nil {
		return err
	}
	if err := move(dir, keep, p.Root, v.Name); err != nil {
		return err
	}
	return e.clear(ctx, p, rollback(v))
}
