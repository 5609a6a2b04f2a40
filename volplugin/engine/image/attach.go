package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/loop"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// busyWait is how long a file system that is just being unmounted may keep a new
// mount of its device waiting.
const busyWait = 2 * time.Second

// Attach implements engine.Engine.
func (e *Engine) Attach(ctx context.Context, p engine.Place, v engine.Volume) error {
	image, err := e.openVolume(ctx, p, v)
	if err != nil {
		return err
	}
	defer image.Close()
	// From now on somebody may write, and the data is nobody's to abandon.
	if _, err := p.Tmp.Stat(cloned(v)); err == nil {
		if err := p.Before(ctx, "attach.forget"); err != nil {
			return err
		}
		if err := forget(p, cloned(v)); err != nil {
			return err
		}
	}
	target := volumeTarget(p, v)
	if err := e.bury(ctx, p, v); err != nil {
		return err
	}
	there, err := mountedFrom(target, image)
	if err != nil {
		return err
	}
	if !there {
		if !v.Sparse {
			// What fstrim(8) has given back. If it cannot be had any more, the data
			// that is there can.
			if size, err := sizeOf(image); err == nil {
				_ = reserve(ctx, p, image, 0, size)
			}
		}
		if _, err := mount(ctx, target, image, filesystem.MountOptions{Discard: v.Sparse}); err != nil {
			return fmt.Errorf("volume %s: %w", v.Name, err)
		}
	}
	top, err := rooted.Open(target)
	if err != nil {
		return err
	}
	defer top.Close()
	return e.thawLeft(ctx, v, top)
}

// thawLeft thaws what a killed process left frozen, and waits for one of this
// process's calls that has just frozen it.
func (e *Engine) thawLeft(ctx context.Context, v engine.Volume, top *rooted.Dir) error {
	unlock, err := e.freezes.Lock(ctx, v.UUID)
	if err != nil {
		return err
	}
	defer unlock()
	return filesystem.ThawLeft(top.FD())
}

// openVolume opens the image of a volume, and first puts the successor of one in its
// place that a rollback had moved away when it was killed.
func (e *Engine) openVolume(ctx context.Context, p engine.Place, v engine.Volume) (*os.File, error) {
	image, err := openFile(p.Images, imageName(v.Name), unix.O_RDWR)
	if !errors.Is(err, fs.ErrNotExist) {
		return image, err
	}
	if copied, failure := present(p.Tmp, rollback(v)); failure != nil || !copied {
		return nil, errors.Join(err, failure)
	}
	if err := p.Before(ctx, "rollback.move"); err != nil {
		return nil, err
	}
	if err := move(p.Tmp, rollback(v), p.Images, imageName(v.Name)); err != nil {
		return nil, err
	}
	return openFile(p.Images, imageName(v.Name), unix.O_RDWR)
}

// identify tells what is in an image.
func (e *Engine) identify(image *os.File) (filesystem.Info, error) {
	info, err := filesystem.Identify(image)
	if errors.Is(err, filesystem.ErrUnknown) {
		return info, fault.Unavailable("%s is damaged or was not made by Berth: it holds %w", image.Name(), err)
	}
	if err != nil {
		return info, fmt.Errorf("read %s: %w", image.Name(), err)
	}
	return info, e.known(info.Kind)
}

// mount mounts an image. made is false when it had a loop device before, and may be
// mounted elsewhere.
func mount(ctx context.Context, target string, image *os.File, o filesystem.MountOptions) (made bool, err error) {
	info, err := filesystem.Identify(image)
	if err != nil {
		if errors.Is(err, filesystem.ErrUnknown) {
			return false, fault.Unavailable("%s is damaged or was not made by Berth: it holds %w", image.Name(), err)
		}
		return false, fmt.Errorf("read %s: %w", image.Name(), err)
	}
	if err := os.Mkdir(target, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	device, err := loop.Attach(ctx, image, o.ReadOnly)
	if err != nil {
		return false, errors.Join(err, removeTarget(target))
	}
	// The mount keeps it from now on.
	defer func() { err = errors.Join(err, device.Close()) }()
	for end := time.Now().Add(busyWait); ; {
		err = filesystem.Mount(device.Path(), info.Kind, target, o)
		if err == nil {
			return device.Made(), nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) || ctx.Err() != nil {
			return false, errors.Join(fmt.Errorf("%s: %w", image.Name(), err), removeTarget(target))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// unmount is the inverse of mount. Not mounted is no error.
func unmount(target string) error {
	if info, err := mountAt(target); err != nil {
		return err
	} else if info != nil {
		if err := filesystem.Unmount(target); err != nil {
			return err
		}
	}
	return removeTarget(target)
}

func removeTarget(target string) error {
	err := unix.Rmdir(target)
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return &fs.PathError{Op: "rmdir", Path: target, Err: err}
}

// mountAt finds what is mounted at a directory of Local, nil if nothing is. It needs
// nothing of the file system, which may be down.
func mountAt(target string) (*mountinfo.Info, error) {
	id, err := rooted.MountIDOf(target)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	parent, err := rooted.MountIDOf(filepath.Dir(target))
	if err != nil || id == parent {
		return nil, err
	}
	return mountByID(target, id)
}

// mountedFrom tells whether the image is mounted at target, and unmounts another one
// that is.
func mountedFrom(target string, image *os.File) (bool, error) {
	info, err := mountAt(target)
	if err != nil || info == nil {
		return false, err
	}
	want, err := loop.FileOf(image)
	if err != nil {
		return false, err
	}
	got, err := loop.Backing(info.Source)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if got == want {
		return true, nil
	}
	return false, filesystem.Unmount(target)
}

// Detach implements engine.Engine.
func (e *Engine) Detach(ctx context.Context, p engine.Place, v engine.Volume) error {
	if err := unmount(workTarget(p, v)); err != nil {
		return err
	}
	target := volumeTarget(p, v)
	info, err := mountAt(target)
	if err != nil {
		return err
	}
	if info == nil {
		if err := removeTarget(target); err != nil {
			return err
		}
		return e.released(ctx, p, v)
	}
	image, err := loop.Backing(info.Source)
	if err != nil {
		return err
	}
	if err := nowhereElse(v, info); err != nil {
		return err
	}
	if err := unmount(target); err != nil {
		return fmt.Errorf("volume %s is in use: %w", v.Name, err)
	}
	err = loop.Released(ctx, image)
	if errdefs.IsConflict(err) {
		// Somebody whom this process does not see has it mounted.
		again := e.Attach(context.WithoutCancel(ctx), p, v)
		if errors.Is(again, fs.ErrNotExist) { // retired
			again = nil
		}
		return errors.Join(fmt.Errorf("volume %s is in use: %w", v.Name, err), again)
	}
	return err
}

// nowhereElse errs when a volume is mounted elsewhere than at info.
func nowhereElse(v engine.Volume, info *mountinfo.Info) error {
	others, err := mountinfo.GetMounts(func(other *mountinfo.Info) (skip, stop bool) {
		return other.Major != info.Major || other.Minor != info.Minor || other.ID == info.ID, false
	})
	if err != nil {
		return fmt.Errorf("read mountinfo: %w", err)
	}
	if len(others) > 0 {
		return fault.Conflict("volume %s is in use: it is mounted at %s", v.Name, others[0].Mountpoint)
	}
	return nil
}

// released errs when the image of a volume that is not mounted here is in use.
func (e *Engine) released(ctx context.Context, p engine.Place, v engine.Volume) error {
	id, err := fileOfVolume(p, v)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return loop.Released(ctx, id)
}

// Open implements engine.Engine.
func (e *Engine) Open(p engine.Place, v engine.Volume) (*rooted.Dir, error) {
	top, _, err := e.top(p, v)
	if err != nil {
		return nil, err
	}
	defer top.Close()
	data, err := top.Handle(filesystem.DataName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the image of volume %s has no directory %s, it is damaged or was not made by Berth: %w", v.Name, filesystem.DataName, err)
	}
	return data, err
}

// top opens the top of a volume's file system.
func (e *Engine) top(p engine.Place, v engine.Volume) (*rooted.Dir, filesystem.Kind, error) {
	target := volumeTarget(p, v)
	info, err := mountAt(target)
	if err != nil {
		return nil, "", err
	}
	if info == nil {
		found, err := e.Find(p, v.Name)
		if err == nil {
			err = missing(p.Images, imageName(v.Name), found)
		}
		if err == nil {
			err = fault.Conflict("volume %s is not attached", v.Name)
		}
		return nil, "", err
	}
	top, err := rooted.Open(target)
	if err != nil {
		return nil, "", err
	}
	kind, err := kindOf(top)
	if err == nil {
		err = e.known(kind)
	}
	if err != nil {
		return nil, "", errors.Join(err, top.Close())
	}
	return top, kind, nil
}

// kindOf tells what is mounted.
func kindOf(top *rooted.Dir) (filesystem.Kind, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(top.FD(), &st); err != nil {
		return "", &fs.PathError{Op: "statfs", Path: top.Path(), Err: err}
	}
	switch st.Type {
	case unix.BTRFS_SUPER_MAGIC:
		return filesystem.Btrfs, nil
	case unix.XFS_SUPER_MAGIC:
		return filesystem.XFS, nil
	case unix.EXT4_SUPER_MAGIC:
		return filesystem.Ext4, nil
	}
	return "", fault.Unavailable("%s: file system of type %#x is mounted where an image belongs", top.Path(), st.Type)
}

// reach runs use in the file system of a volume, which need not be attached.
func (e *Engine) reach(ctx context.Context, p engine.Place, v engine.Volume, image *os.File, use func(top *rooted.Dir, kind filesystem.Kind) error) error {
	if info, err := mountAt(volumeTarget(p, v)); err != nil {
		return err
	} else if info == nil {
		return e.work(ctx, p, v, image, use)
	}
	top, kind, err := e.top(p, v)
	if err != nil {
		return err
	}
	defer top.Close()
	return use(top, kind)
}

// work mounts an image for as long as use runs.
func (e *Engine) work(ctx context.Context, p engine.Place, v engine.Volume, image *os.File, use func(top *rooted.Dir, kind filesystem.Kind) error) (err error) {
	info, err := e.identify(image)
	if err != nil {
		return err
	}
	id, err := loop.FileOf(image)
	if err != nil {
		return err
	}
	target := workTarget(p, v)
	if err := unmount(target); err != nil { // of a killed process
		return err
	}
	made, err := mount(ctx, target, image, filesystem.MountOptions{Discard: v.Sparse})
	if err != nil {
		return err
	}
	defer func() {
		if failure := unmount(target); failure != nil {
			err = errors.Join(err, failure)
		} else if made {
			err = errors.Join(err, loop.Released(context.WithoutCancel(ctx), id))
		}
	}()
	top, err := rooted.Open(target)
	if err != nil {
		return err
	}
	defer top.Close()
	if err := e.thawLeft(ctx, v, top); err != nil {
		return err
	}
	if err := use(top, info.Kind); err != nil {
		return err
	}
	if err := unix.Syncfs(top.FD()); err != nil {
		return &fs.PathError{Op: "sync", Path: top.Path(), Err: err}
	}
	return nil
}
