package btrfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// noCOWFlag is FS_NOCOW_FL of linux/fs.h.
const noCOWFlag = 0x800000

// Trees implements engine.Trees. The zero value is ready to use.
type Trees struct{}

var _ engine.Trees = Trees{}

// Name returns "btrfs".
func (Trees) Name() string { return "btrfs" }

// Probe implements engine.Trees.
func (Trees) Probe(_ context.Context, dir *rooted.Dir) (engine.Abilities, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(dir.FD(), &st); err != nil {
		return engine.Abilities{}, fail("statfs", dir.Path(), err)
	}
	if st.Type != unix.BTRFS_SUPER_MAGIC {
		return engine.Abilities{}, fmt.Errorf("%s has no subvolumes: btrfs is needed", fileSystem(dir))
	}
	if _, err := treeOf(dir); err != nil {
		return engine.Abilities{}, err
	}
	return engine.Abilities{FileSystem: "btrfs", Limit: true, Instant: true, Consistency: engine.Crash}, nil
}

// fileSystem is the type of the file system that a directory is on, as mount(8) has it.
func fileSystem(dir *rooted.Dir) string {
	mounts, err := mountinfo.GetMounts(func(info *mountinfo.Info) (skip, stop bool) {
		return info.ID != dir.MountID(), info.ID == dir.MountID()
	})
	if err != nil || len(mounts) == 0 {
		return "the file system"
	}
	return mounts[0].FSType
}

// Make implements engine.Trees.
func (Trees) Make(parent *rooted.Dir, name string, noCOW bool) error {
	if err := createSubvolume(parent, name); err != nil {
		return err
	}
	err := prepare(parent, name, noCOW)
	if err != nil {
		err = errors.Join(err, deleteSubvolume(context.Background(), parent, name))
	}
	return err
}

func prepare(parent *rooted.Dir, name string, noCOW bool) error {
	dir, err := parent.Dir(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := errors.Join(dir.SetOwner(0, 0), dir.SetMode(0o700)); err != nil {
		return err
	}
	if !noCOW {
		return nil
	}
	flags, err := unix.IoctlGetInt(dir.FD(), unix.FS_IOC_GETFLAGS)
	if err == nil {
		err = unix.IoctlSetPointerInt(dir.FD(), unix.FS_IOC_SETFLAGS, flags|noCOWFlag)
	}
	return fail("set nocow on", dir.Path(), err)
}

// Check implements engine.Trees.
func (Trees) Check(parent *rooted.Dir, name string) error {
	dir, err := parent.Handle(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return dir.Close()
}

// Duplicate implements engine.Trees. The copy has no limit, whatever src has.
func (t Trees) Duplicate(ctx context.Context, src, parent *rooted.Dir, name string, readOnly bool, progress func(engine.Progress)) (engine.Copy, error) {
	if err := ctx.Err(); err != nil {
		return engine.Copy{}, err
	}
	id, err := subvolumeID(src)
	if err != nil {
		return engine.Copy{}, err
	}
	if id == 0 {
		return t.duplicateDirectory(ctx, src, parent, name, readOnly, progress)
	}
	if err := snapshot(src, parent, name, readOnly); err != nil {
		return engine.Copy{}, err
	}
	if err := dropLimit(parent, name); err != nil {
		return engine.Copy{}, errors.Join(err, deleteSubvolume(context.WithoutCancel(ctx), parent, name))
	}
	return engine.Copy{Consistency: engine.Crash}, nil
}

// dropLimit takes the limit away that a snapshot has from its origin.
func dropLimit(parent *rooted.Dir, name string) error {
	on, _, err := quotaStatus(parent)
	if err != nil || !on {
		return err
	}
	dir, err := parent.Dir(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	id, err := subvolumeID(dir)
	if err != nil {
		return err
	}
	return setLimit(dir, id, 0)
}

// duplicateDirectory makes a subvolume of an ordinary directory.
func (t Trees) duplicateDirectory(ctx context.Context, src, parent *rooted.Dir, name string, readOnly bool, progress func(engine.Progress)) (engine.Copy, error) {
	if err := t.Make(parent, name, false); err != nil {
		return engine.Copy{}, err
	}
	done, err := fillSubvolume(ctx, src, parent, name, progress)
	if err == nil && readOnly {
		err = t.Seal(parent, name, true)
	}
	if err != nil {
		return engine.Copy{}, errors.Join(err, deleteSubvolume(context.WithoutCancel(ctx), parent, name))
	}
	return done, nil
}

func fillSubvolume(ctx context.Context, src, parent *rooted.Dir, name string, progress func(engine.Progress)) (engine.Copy, error) {
	dst, err := parent.Dir(name)
	if err != nil {
		return engine.Copy{}, err
	}
	defer dst.Close()
	options := tree.Options{}
	if progress != nil {
		options.Progress = func(files, bytes uint64) { progress(engine.Progress{Files: files, Bytes: bytes}) }
	}
	stats, err := tree.Copy(ctx, src, dst, options)
	return engine.Copy{Consistency: engine.None, Files: stats.Files, Bytes: stats.Bytes, Unstable: stats.Unstable}, err
}

// Seal implements engine.Trees. It does nothing to an ordinary directory.
func (Trees) Seal(parent *rooted.Dir, name string, readOnly bool) error {
	dir, err := parent.Dir(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	id, err := subvolumeID(dir)
	if err != nil || id == 0 {
		return err
	}
	return setReadOnly(dir, readOnly)
}

// Delete implements engine.Trees. The kernel frees the blocks of a subvolume later.
func (Trees) Delete(ctx context.Context, parent *rooted.Dir, name string) error {
	_, err := parent.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	dir, err := parent.Dir(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	id, err := subvolumeID(dir)
	if err != nil {
		return err
	}
	if id != 0 {
		return deleteSubvolume(ctx, parent, name)
	}
	err = tree.Remove(ctx, parent, name)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOTEMPTY) {
		// A subvolume somewhere below that is read-only.
		return deleteTree(ctx, parent, name)
	}
	return err
}

// Prune removes an empty tree. The error is rmdir's.
func (Trees) Prune(parent *rooted.Dir, name string) error {
	dir, err := parent.Handle(name)
	if err != nil {
		return parent.Rmdir(name)
	}
	defer dir.Close()
	id := uint64(0)
	if readable, err := parent.Dir(name); err == nil {
		defer readable.Close()
		if id, err = subvolumeID(readable); err != nil {
			return err
		}
	}
	if err := parent.Rmdir(name); err != nil || id == 0 {
		return err
	}
	return dropQgroup(parent, id)
}

// Limit implements engine.Trees. It switches quotas on when size is not 0.
func (Trees) Limit(ctx context.Context, parent *rooted.Dir, name string, size uint64) error {
	dir, err := parent.Dir(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	id, err := subvolumeID(dir)
	if err != nil {
		return err
	}
	switch {
	case id == 0 && size == 0:
		return nil
	case id == 0:
		return fmt.Errorf("%w: %s is an ordinary directory, not a btrfs subvolume", engine.ErrNoLimit, dir.Path())
	case size == 0:
		if on, _, err := quotaStatus(dir); err != nil || !on {
			return err
		}
	default:
		if err := enableQuotas(ctx, dir); err != nil {
			return err
		}
	}
	return setLimit(dir, id, size)
}

// Usage implements engine.Trees. It walks a tree only where quotas are off.
func (Trees) Usage(ctx context.Context, parent *rooted.Dir, name string) (engine.Usage, error) {
	dir, err := parent.Dir(name)
	if err != nil {
		return engine.Usage{}, err
	}
	defer dir.Close()
	id, err := subvolumeID(dir)
	if err != nil {
		return engine.Usage{}, err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(dir.FD(), &st); err != nil {
		return engine.Usage{}, fail("statfs", dir.Path(), err)
	}
	usage := engine.Usage{Free: st.Bavail * uint64(st.Bsize)}
	var q quota
	known := false
	if id != 0 {
		if q, known, err = readQuota(dir, id); err != nil {
			return engine.Usage{}, err
		}
	}
	if known {
		usage.Used, usage.Exclusive = q.referenced, q.exclusive
	} else {
		size, err := tree.Size(ctx, dir)
		if err != nil {
			return engine.Usage{}, err
		}
		usage.Used, usage.Files = size.Bytes, size.Files
	}
	if usage.Limit = q.limit; q.limit > 0 {
		usage.Free = min(usage.Free, q.limit-min(usage.Used, q.limit))
	}
	return usage, nil
}
