package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Retire implements engine.Engine.
func (e *Engine) Retire(ctx context.Context, p engine.Place, v engine.Volume) error {
	if found, err := e.Find(p, v.Name); err != nil || !found {
		return err
	}
	if err := p.Before(ctx, "retire.move"); err != nil {
		return err
	}
	if err := move(p.Images, imageName(v.Name), p.Trash, v.UUID); err != nil {
		return err
	}
	return unmountUnused(volumeTarget(p, v))
}

// unmountUnused unmounts what nobody has open. What is in use is Detach's.
func unmountUnused(target string) error {
	if err := unmount(target); err != nil && !errdefs.IsConflict(err) {
		return err
	}
	return nil
}

// Reinstate implements engine.Engine.
func (e *Engine) Reinstate(ctx context.Context, p engine.Place, v engine.Volume) error {
	retired, err := present(p.Trash, v.UUID)
	if err != nil {
		return err
	}
	if !retired {
		found, err := e.Find(p, v.Name)
		return errors.Join(err, missing(p.Trash, v.UUID, found))
	}
	if err := p.Before(ctx, "reinstate.move"); err != nil {
		return err
	}
	return move(p.Trash, v.UUID, p.Images, imageName(v.Name))
}

// Rename implements engine.Engine.
func (e *Engine) Rename(ctx context.Context, p engine.Place, v engine.Volume, to string) error {
	found, err := e.Find(p, v.Name)
	if err != nil {
		return err
	}
	if !found {
		moved, err := e.Find(p, to)
		return errors.Join(err, missing(p.Images, imageName(v.Name), moved))
	}
	if err := p.Before(ctx, "rename.move"); err != nil {
		return err
	}
	return move(p.Images, imageName(v.Name), p.Images, imageName(to))
}

// Destroy implements engine.Engine. A container that has the data mounted goes on
// with it, and its space is freed after that.
func (e *Engine) Destroy(ctx context.Context, p engine.Place, v engine.Volume) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := unmountAll(p, v); err != nil {
		return err
	}
	retired, err := present(p.Trash, v.UUID)
	if err != nil {
		return err
	}
	if retired {
		if err := remove(ctx, p, p.Trash, v.UUID); err != nil {
			return err
		}
	}
	if err := destroySnapshots(ctx, p, v); err != nil {
		return err
	}
	names, err := p.Tmp.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, v.UUID+".") {
			if err := remove(ctx, p, p.Tmp, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// unmountAll unmounts everything of a volume in Local that nobody has open.
func unmountAll(p engine.Place, v engine.Volume) error {
	entries, err := os.ReadDir(p.Local)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name, ok := strings.CutPrefix(entry.Name(), v.UUID)
		if !ok || name != "" && name[0] != '@' && name[0] != '.' {
			continue
		}
		if err := unmountUnused(filepath.Join(p.Local, entry.Name())); err != nil {
			return err
		}
	}
	return nil
}

// destroySnapshots deletes the snapshots that are files, but not their records.
func destroySnapshots(ctx context.Context, p engine.Place, v engine.Volume) error {
	dir, err := p.Snapshots.Dir(v.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasSuffix(name, suffix) {
			if err := remove(ctx, p, dir, name); err != nil {
				return err
			}
		}
	}
	if err := p.Before(ctx, "destroy.directory"); err != nil {
		return err
	}
	err = p.Snapshots.Rmdir(v.UUID)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return p.Snapshots.Sync()
}

// remove deletes a file; missing is no error.
func remove(ctx context.Context, p engine.Place, dir *rooted.Dir, name string) error {
	if err := p.Before(ctx, "remove"); err != nil {
		return err
	}
	if err := dir.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return dir.Sync()
}
