// Package copying keeps volumes as ordinary directories and makes snapshots and clones of
// them file by file, with package tree. Dir works on every file system; Reflink is for those
// on which a copy shares its data with the original until one of the two is written to, so
// that it costs no space and, for large files, no time.
//
// Both kinds are the same on disk: a root may change from one to the other.
//
// A copy is not of one moment. Programs that write meanwhile should be paused, or made to
// put their data on disk in an order that survives being read one file after the other.
//
// Sizes are project quotas (package quota), where the file system has them.
package copying

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

// noCOW is FS_NOCOW_FL of linux/fs.h.
const noCOW = 0x800000

// Trees implements engine.Trees.
type Trees struct {
	name    string
	reflink tree.Reflink
}

var _ engine.Trees = Trees{}

// Dir copies, and shares data where that happens to work.
func Dir() Trees { return Trees{name: "dir", reflink: tree.Auto} }

// Reflink shares data, or fails.
func Reflink() Trees { return Trees{name: "reflink", reflink: tree.Require} }

// Name returns "dir" or "reflink".
func (t Trees) Name() string { return t.name }

// Probe implements engine.Trees.
func (t Trees) Probe(ctx context.Context, dir *rooted.Dir) (engine.Abilities, error) {
	if err := ctx.Err(); err != nil {
		return engine.Abilities{}, err
	}
	kind := fileSystem(dir)
	if t.reflink == tree.Require {
		if err := tryReflink(dir); err != nil {
			return engine.Abilities{}, fmt.Errorf("files cannot share data on this %s (%w); engine=dir copies it", kind, err)
		}
	}
	return engine.Abilities{FileSystem: kind, Limit: limits(dir) == nil, Consistency: engine.None}, nil
}

// fileSystem is the type of the file system that a directory is on, as mount(8) has it.
func fileSystem(dir *rooted.Dir) string {
	mounts, err := mountinfo.GetMounts(func(info *mountinfo.Info) (skip, stop bool) {
		return info.ID != dir.MountID(), info.ID == dir.MountID()
	})
	if err != nil || len(mounts) == 0 {
		return "file system"
	}
	return mounts[0].FSType
}

// tryReflink shares a block between two files without a name. An NFS server that shares
// does so for this call, too.
func tryReflink(dir *rooted.Dir) error {
	src, err := nameless(dir)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	dst, err := nameless(dir)
	if err != nil {
		return err
	}
	defer unix.Close(dst)
	if _, err := unix.Pwrite(src, make([]byte, 4096), 0); err != nil {
		return err
	}
	return unix.IoctlFileClone(dst, src)
}

// nameless makes a file that is gone when it is closed.
func nameless(dir *rooted.Dir) (int, error) {
	fd, err := unix.Openat(dir.FD(), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return fd, nil
	}
	// Not on NFS. No volume has a name that begins with a dot.
	name := fmt.Sprintf(".berth-probe-%d", unix.Getpid())
	if err := dir.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return -1, err
	}
	fd, err = unix.Openat(dir.FD(), name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return -1, err
	}
	if err := dir.Remove(name); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Make implements engine.Trees. noCOW has an effect on btrfs alone.
func (t Trees) Make(parent *rooted.Dir, name string, noCOW bool) error {
	if err := parent.Mkdir(name, 0o700); err != nil {
		return err
	}
	err := prepare(parent, name, noCOW)
	if err != nil {
		err = errors.Join(err, parent.Rmdir(name))
	}
	return err
}

// prepare gives a new tree what Mkdir cannot, because of a umask, a default ACL or a
// set-group-ID bit of its parent.
func prepare(parent *rooted.Dir, name string, nocow bool) error {
	dir, err := parent.Dir(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := own(dir); err != nil {
		return err
	}
	if err := dir.SetMode(0o700); err != nil || !nocow {
		return err
	}
	flags, err := unix.IoctlGetInt(dir.FD(), unix.FS_IOC_GETFLAGS)
	if err == nil {
		err = unix.IoctlSetPointerInt(dir.FD(), unix.FS_IOC_SETFLAGS, flags|noCOW)
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
		return nil // nothing is copied on write here, or all is
	}
	if err != nil {
		return &fs.PathError{Op: "set nocow on", Path: dir.Path(), Err: err}
	}
	return nil
}

// own makes root the owner. A server that squashes root makes all files another's,
// and refuses.
func own(dir *rooted.Dir) error {
	var st unix.Stat_t
	if err := unix.Fstat(dir.FD(), &st); err != nil {
		return &fs.PathError{Op: "stat", Path: dir.Path(), Err: err}
	}
	if st.Uid == 0 && st.Gid == 0 {
		return nil
	}
	if err := dir.SetOwner(0, 0); err != nil && !errors.Is(err, unix.EPERM) {
		return err
	}
	return nil
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

// making is the name beside it under which a copy is made. What a kill has left
// under it goes when the copy is made again.
func making(name string) string { return name + ".making" }

// Duplicate implements engine.Trees. There are no read-only directories.
func (t Trees) Duplicate(ctx context.Context, src, parent *rooted.Dir, name string, _ bool, progress func(engine.Progress)) (engine.Copy, error) {
	if err := ctx.Err(); err != nil {
		return engine.Copy{}, err
	}
	if _, err := parent.Stat(name); err == nil {
		return engine.Copy{}, &fs.PathError{Op: "copy to", Path: parent.Path() + "/" + name, Err: fs.ErrExist}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return engine.Copy{}, err
	}
	temp := making(name)
	if err := tree.Remove(ctx, parent, temp); err != nil {
		return engine.Copy{}, err
	}
	done, err := t.build(ctx, src, parent, temp, progress)
	if err == nil {
		err = parent.RenameNew(temp, parent, name)
	}
	if err != nil {
		return engine.Copy{}, errors.Join(err, tree.Remove(context.WithoutCancel(ctx), parent, temp))
	}
	return done, parent.Sync()
}

func (t Trees) build(ctx context.Context, src, parent *rooted.Dir, temp string, progress func(engine.Progress)) (engine.Copy, error) {
	if err := t.Make(parent, temp, false); err != nil {
		return engine.Copy{}, err
	}
	dst, err := parent.Dir(temp)
	if err != nil {
		return engine.Copy{}, err
	}
	defer dst.Close()
	options := tree.Options{Reflink: t.reflink}
	if progress != nil {
		options.Progress = func(files, bytes uint64) { progress(engine.Progress{Files: files, Bytes: bytes}) }
	}
	stats, err := tree.Copy(ctx, src, dst, options)
	return engine.Copy{Consistency: engine.None, Files: stats.Files, Bytes: stats.Bytes, Unstable: stats.Unstable}, err
}

// Seal implements engine.Trees. There is no such thing for directories.
func (Trees) Seal(*rooted.Dir, string, bool) error { return nil }

// Delete implements engine.Trees.
func (Trees) Delete(ctx context.Context, parent *rooted.Dir, name string) error {
	if err := unlimit(ctx, parent, name); err != nil {
		return err
	}
	return tree.Remove(ctx, parent, name)
}
