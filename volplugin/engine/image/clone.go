package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/docker/go-units"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/loop"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// momentPrefix begins the names of snapshots in an image that a clone is copied
// from. There is one at a time.
const momentPrefix = "clone."

// A mark says that a clone is complete.
type mark struct {
	// File is the clone's file handle, which it keeps under any name.
	File string
	Copy engine.Copy
}

// markOf reads the volume's mark and tells whether the clone is in Tmp or under
// the volume's name. A mark whose clone is in neither place says nothing.
func markOf(p engine.Place, v engine.Volume) (m mark, inTmp, inPlace bool, err error) {
	data, err := p.Tmp.ReadFile(cloned(v), 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return mark{}, false, false, nil
	}
	if err != nil {
		return mark{}, false, false, err
	}
	if err := json.Unmarshal(data, &m); err != nil || m.File == "" {
		return mark{}, false, false, nil //nolint:nilerr // cut short by a kill
	}
	inTmp, err = is(p.Tmp, clone(v), m.File)
	if err == nil && !inTmp {
		inPlace, err = is(p.Images, imageName(v.Name), m.File)
	}
	return m, inTmp, inPlace, err
}

// is tells whether name is the file of that identity.
func is(dir *rooted.Dir, name, file string) (bool, error) {
	f, err := openFile(dir, name, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) || isForeign(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	got, err := identity(f)
	return got == file, err
}

// identity of a file, the same under any name and after a reboot, and of no other
// one: its handle, or where the file system has none its inode number.
func identity(f *os.File) (string, error) {
	handle, _, err := unix.NameToHandleAt(int(f.Fd()), "", unix.AT_EMPTY_PATH)
	if err == nil {
		return fmt.Sprintf("%d:%x", handle.Type(), handle.Bytes()), nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return fmt.Sprintf("inode:%d", st.Ino), nil
}

// Clone implements engine.Engine.
func (e *Engine) Clone(ctx context.Context, p engine.Place, from engine.Volume, snap string, v engine.Volume, progress func(engine.Progress)) (engine.Copy, error) {
	m, inTmp, inPlace, err := markOf(p, v)
	if err != nil {
		return engine.Copy{}, err
	}
	if inPlace {
		return m.Copy, nil
	}
	if found, err := e.Find(p, v.Name); err != nil {
		return engine.Copy{}, err
	} else if found {
		return engine.Copy{}, fmt.Errorf("data of %s: %w", v.Name, fs.ErrExist)
	}
	if !inTmp {
		if m, err = e.makeClone(ctx, p, from, snap, v, progress); err != nil {
			return engine.Copy{}, err
		}
	}
	err = p.Before(ctx, "clone.move")
	if err == nil {
		err = move(p.Tmp, clone(v), p.Images, imageName(v.Name))
	}
	if err != nil {
		return engine.Copy{}, errors.Join(err, e.abandonClone(context.WithoutCancel(ctx), p, v))
	}
	return m.Copy, nil
}

// makeClone makes a clone in Tmp, with its mark.
func (e *Engine) makeClone(ctx context.Context, p engine.Place, from engine.Volume, snap string, v engine.Volume, progress func(engine.Progress)) (m mark, err error) {
	if err := p.Before(ctx, "clone.forget"); err != nil {
		return mark{}, err
	}
	if err := errors.Join(forget(p, cloned(v)), clear(ctx, p, clone(v))); err != nil {
		return mark{}, err
	}
	image, err := openFile(p.Images, imageName(from.Name), unix.O_RDWR)
	if err != nil {
		return mark{}, err
	}
	defer image.Close()
	if m.Copy, err = e.copyVolume(ctx, p, from, image, snap, v, progress); err != nil {
		return mark{}, errors.Join(err, clear(context.WithoutCancel(ctx), p, clone(v)))
	}
	var data []byte
	file, err := openFile(p.Tmp, clone(v), unix.O_RDONLY)
	if err == nil {
		m.File, err = identity(file)
		_ = file.Close()
	}
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
		return mark{}, errors.Join(err, e.abandonClone(context.WithoutCancel(ctx), p, v), clear(context.WithoutCancel(ctx), p, clone(v)))
	}
	return m, nil
}

// abandonClone removes a clone, wherever it is, and then its mark.
func (e *Engine) abandonClone(ctx context.Context, p engine.Place, v engine.Volume) error {
	_, _, inPlace, err := markOf(p, v)
	if err != nil {
		return err
	}
	if inPlace {
		if err := clear(ctx, p, clone(v)); err != nil {
			return err
		}
		if err := p.Before(ctx, "abandon.move"); err != nil {
			return err
		}
		if err := move(p.Images, imageName(v.Name), p.Tmp, clone(v)); err != nil {
			return err
		}
	}
	return errors.Join(clear(ctx, p, clone(v)), clear(ctx, p, cloned(v)))
}

// copyVolume makes the clone in Tmp: of the whole image where that can share its data,
// file by file elsewhere.
func (e *Engine) copyVolume(ctx context.Context, p engine.Place, from engine.Volume, image *os.File, snap string, v engine.Volume, progress func(engine.Progress)) (engine.Copy, error) {
	info, err := e.identify(image)
	if err != nil {
		return engine.Copy{}, err
	}
	size, err := sizeOf(image)
	if err != nil {
		return engine.Copy{}, err
	}
	src := source{volume: from, image: image, snap: snap, kind: info.Kind}
	if snap != "" {
		src.file, err = openSnapshotFile(p, from, snap)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return engine.Copy{}, err
		}
		if src.file != nil {
			defer src.file.Close()
			if size, err = sizeOf(src.file); err != nil {
				return engine.Copy{}, err
			}
		}
	}
	if v.Size == 0 {
		v.Size = size
	}
	if v.FS == "" {
		v.FS = string(info.Kind)
	}
	shares, err := reflinks(p)
	if err != nil {
		return engine.Copy{}, err
	}
	if shares && v.FS == string(info.Kind) && v.Size >= size {
		return e.cloneImage(ctx, p, src, v, progress)
	}
	return e.cloneTree(ctx, p, src, v, progress)
}

// A source is what is cloned: the data of a volume, or a snapshot of it.
type source struct {
	volume engine.Volume
	image  *os.File
	kind   filesystem.Kind
	// snap is "" for the data. file is the snapshot if that is one, nil otherwise.
	snap string
	file *os.File
}

// cloneImage clones the file.
func (e *Engine) cloneImage(ctx context.Context, p engine.Place, src source, v engine.Volume, progress func(engine.Progress)) (done engine.Copy, err error) {
	if err := aboveFloor(p); err != nil {
		return engine.Copy{}, err
	}
	if err := p.Before(ctx, "clone.file"); err != nil {
		return engine.Copy{}, err
	}
	done.Consistency = engine.Frozen
	inside := "" // snapshot that becomes the data
	if src.snap != "" && src.file == nil {
		inside = src.snap
	}
	change := func(top *rooted.Dir, kind filesystem.Kind) error {
		return e.strip(ctx, top, kind, inside, &done, progress)
	}
	if src.file != nil {
		return done, e.copyImage(ctx, p, clone(v), v, src.file, v.Size, change)
	}
	id, err := loop.FileOf(src.image)
	if err != nil {
		return engine.Copy{}, err
	}
	inUse, err := loop.Bound(id)
	if err != nil {
		return engine.Copy{}, err
	}
	if !inUse {
		return done, e.copyImage(ctx, p, clone(v), v, src.image, v.Size, change)
	}
	unlock, err := e.sources.Lock(ctx, src.volume.UUID)
	if err != nil {
		return engine.Copy{}, err
	}
	err = e.reach(ctx, p, src.volume, src.image, func(top *rooted.Dir, _ filesystem.Kind) error {
		return e.shareFrozen(ctx, p, src.volume, clone(v), src.image, top)
	})
	unlock()
	if err != nil {
		return engine.Copy{}, err
	}
	file, err := openFile(p.Tmp, clone(v), unix.O_RDWR)
	if err != nil {
		return engine.Copy{}, err
	}
	defer file.Close()
	return done, e.own(ctx, p, v, file, v.Size, change)
}

// own makes a copy of an image a writable image of its own.
func (e *Engine) own(ctx context.Context, p engine.Place, v engine.Volume, file *os.File, size uint64, change func(*rooted.Dir, filesystem.Kind) error) error {
	if err := file.Chmod(0o600); err != nil {
		return err
	}
	info, err := e.identify(file)
	if err != nil {
		return err
	}
	id := uuid.New()
	// Before it is seen as a block device.
	if err := filesystem.NewUUID(ctx, info.Kind, childPath(file), id); err != nil {
		return err
	}
	old, err := sizeOf(file)
	if err != nil {
		return err
	}
	if size > old {
		if err := extend(ctx, p, file, size, v.Sparse); err != nil {
			return err
		}
	}
	if err := file.Sync(); err != nil {
		return err
	}
	err = e.work(ctx, p, v, file, func(top *rooted.Dir, kind filesystem.Kind) error {
		if err := filesystem.SetUUID(top.FD(), kind, id); err != nil {
			return err
		}
		if size > old {
			if err := filesystem.Grow(ctx, top.FD(), kind, size); err != nil {
				return err
			}
		}
		return change(top, kind)
	})
	if err != nil {
		return err
	}
	return file.Sync()
}

// strip leaves nothing but the data in a clone of an image, or the snapshot snap as
// its data unless that is "".
func (e *Engine) strip(ctx context.Context, top *rooted.Dir, kind filesystem.Kind, snap string, done *engine.Copy, progress func(engine.Progress)) error {
	trees := e.trees[kind]
	dir, err := top.Dir(filesystem.SnapshotsName)
	if errors.Is(err, fs.ErrNotExist) && snap == "" {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if snap != "" {
		src, err := dir.Dir(snap)
		if err != nil {
			return err
		}
		defer src.Close()
		if err := trees.Delete(ctx, top, filesystem.DataName); err != nil {
			return err
		}
		copied, err := trees.Duplicate(ctx, src, top, filesystem.DataName, false, progress)
		if err != nil {
			return err
		}
		*done = copied
	}
	return e.empty(ctx, top, trees)
}

// empty deletes the snapshots in an image, and what is on its way there.
func (e *Engine) empty(ctx context.Context, top *rooted.Dir, trees engine.Trees) error {
	for _, name := range []string{filesystem.SnapshotsName, tmpName} {
		dir, err := top.Dir(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		defer dir.Close()
		names, err := dir.Names()
		if err != nil {
			return err
		}
		for _, entry := range names {
			if err := trees.Delete(ctx, dir, entry); err != nil {
				return err
			}
		}
	}
	return nil
}

// cloneTree makes a new image and copies all files into it.
func (e *Engine) cloneTree(ctx context.Context, p engine.Place, src source, v engine.Volume, progress func(engine.Progress)) (done engine.Copy, err error) {
	kind, err := e.kindFor(v)
	if err != nil {
		return engine.Copy{}, err
	}
	err = e.build(ctx, p, clone(v), v, kind, func(top *rooted.Dir) error {
		data, err := top.Dir(filesystem.DataName)
		if err != nil {
			return err
		}
		defer data.Close()
		return e.from(ctx, p, src, v, &done, func(tree *rooted.Dir) error {
			return copyTree(ctx, tree, data, &done, progress)
		})
	})
	if errors.Is(err, unix.ENOSPC) {
		err = fault.Exhausted("a volume of %s does not hold what is to be copied from %s: %w", units.BytesSize(float64(v.Size)), src.volume.Name, err)
	}
	return done, err
}

func copyTree(ctx context.Context, src, dst *rooted.Dir, done *engine.Copy, progress func(engine.Progress)) error {
	o := tree.Options{}
	if progress != nil {
		o.Progress = func(files, bytes uint64) { progress(engine.Progress{Files: files, Bytes: bytes}) }
	}
	stats, err := tree.Copy(ctx, src, dst, o)
	done.Files, done.Bytes, done.Unstable = stats.Files, stats.Bytes, stats.Unstable
	return err
}

// from opens the source's tree for as long as use runs.
func (e *Engine) from(ctx context.Context, p engine.Place, src source, v engine.Volume, done *engine.Copy, use func(*rooted.Dir) error) (err error) {
	unlock, err := e.sources.Lock(ctx, src.volume.UUID)
	if err != nil {
		return err
	}
	defer unlock()
	done.Consistency = engine.Frozen
	if src.file != nil {
		dir, err := e.OpenSnapshot(ctx, p, src.volume, src.snap)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, dir.Close(), unmountUnused(snapshotTarget(p, src.volume, src.snap))) }()
		return use(dir)
	}
	return e.reach(ctx, p, src.volume, src.image, func(top *rooted.Dir, kind filesystem.Kind) error {
		parent, name := top, filesystem.DataName
		switch {
		case src.snap != "":
			dir, err := top.Dir(filesystem.SnapshotsName)
			if err != nil {
				return err
			}
			defer dir.Close()
			parent, name = dir, src.snap
		case kind == filesystem.Btrfs:
			moment := momentPrefix + v.UUID
			tmp, remove, err := e.moment(ctx, top, kind, moment)
			if err != nil {
				return err
			}
			defer tmp.Close()
			defer remove()
			parent, name = tmp, moment
		default:
			done.Consistency = engine.None
		}
		dir, err := parent.Dir(name)
		if err != nil {
			return err
		}
		defer dir.Close()
		return use(dir)
	})
}

// moment makes a snapshot of the data to copy from, in tmp. What a kill leaves of it
// goes at the next clone.
func (e *Engine) moment(ctx context.Context, top *rooted.Dir, kind filesystem.Kind, name string) (tmp *rooted.Dir, remove func(), err error) {
	if err := top.EnsureDir(tmpName, 0o700); err != nil {
		return nil, nil, err
	}
	if tmp, err = top.Dir(tmpName); err != nil {
		return nil, nil, err
	}
	data, err := top.Dir(filesystem.DataName)
	if err == nil {
		defer data.Close()
		err = e.sweep(ctx, tmp, kind)
	}
	if err == nil {
		_, err = e.trees[kind].Duplicate(ctx, data, tmp, name, true, nil)
	}
	if err != nil {
		return nil, nil, errors.Join(err, tmp.Close())
	}
	return tmp, func() { _ = e.trees[kind].Delete(context.WithoutCancel(ctx), tmp, name) }, nil
}

// sweep deletes what killed calls have left of moments.
func (e *Engine) sweep(ctx context.Context, tmp *rooted.Dir, kind filesystem.Kind) error {
	names, err := tmp.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, momentPrefix) {
			if err := e.trees[kind].Delete(ctx, tmp, name); err != nil {
				return err
			}
		}
	}
	return nil
}
