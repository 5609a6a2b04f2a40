package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// pointMode of directories that are mounted on: nobody writes into one that is
// not mounted by mistake.
const pointMode = 0

// ErrOther says that something else than the volume's data is mounted at its path.
var ErrOther = errors.New("another directory is mounted there")

// A Binder mounts data directories below one base directory. Its methods may be
// called concurrently for different names.
type Binder struct {
	base string
}

// NewBinder uses the directory base and makes it where it is missing.
func NewBinder(base string) (*Binder, error) {
	if !filepath.IsAbs(base) {
		return nil, fault.Invalid("mounts directory %q: want an absolute path", base)
	}
	if err := os.MkdirAll(base, 0o700); err != nil {
		return nil, fmt.Errorf("mounts directory: %w", err)
	}
	// mountinfo shows paths without symbolic links.
	real, err := filepath.EvalSymlinks(base)
	if err != nil {
		return nil, fmt.Errorf("mounts directory: %w", err)
	}
	return &Binder{base: real}, nil
}

// Path of the volume name, mounted or not.
func (b *Binder) Path(name string) string { return filepath.Join(b.base, name) }

// Mounted tells whether anything is mounted at the path of name.
func (b *Binder) Mounted(name string) (bool, error) {
	mounts, err := b.at(b.Path(name))
	return len(mounts) > 0, err
}

// at lists the mounts at exactly path, the one that is seen last.
func (b *Binder) at(path string) ([]*mountinfo.Info, error) {
	mounts, err := mountinfo.GetMounts(func(info *mountinfo.Info) (skip, stop bool) {
		return info.Mountpoint != path, false
	})
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	return mounts, nil
}

// List gives the names that something is mounted for.
func (b *Binder) List() (map[string]bool, error) {
	mounts, err := mountinfo.GetMounts(func(info *mountinfo.Info) (skip, stop bool) {
		return filepath.Dir(info.Mountpoint) != b.base, false
	})
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	names := make(map[string]bool, len(mounts))
	for _, info := range mounts {
		names[filepath.Base(info.Mountpoint)] = true
	}
	return names, nil
}

// Bind mounts data at the path of name. made is false when it was mounted there
// already; a second mount is never put on top. The error wraps ErrOther when
// something else is, or what is there is gone from its server, and ErrFlags when its
// flags are not those, with the ones of the mount that the data is on. Mounts below the data do not come
// along.
func (b *Binder) Bind(data *rooted.Dir, name string, flags Flags) (made bool, err error) {
	path := b.Path(name)
	mounts, err := b.at(path)
	if err != nil {
		return false, err
	}
	if len(mounts) > 0 {
		same, err := data.Same(path)
		if errors.Is(err, unix.ESTALE) {
			return false, fmt.Errorf("%s: %w (%w)", path, ErrOther, err)
		}
		if err != nil {
			return false, fmt.Errorf("%s: %w", path, err)
		}
		if !same {
			return false, fmt.Errorf("%s: %w", path, ErrOther)
		}
		inherited, err := mountFlags(data)
		if err != nil {
			return false, err
		}
		if has, want := flagsOf(mounts[len(mounts)-1]), flags.or(inherited); has != want {
			return false, fmt.Errorf("%s: %w: it has %s, and %s is asked for", path, ErrFlags, has, want)
		}
		return false, nil
	}
	base, err := rooted.Open(b.base)
	if err != nil {
		return false, err
	}
	defer base.Close()
	if err := base.EnsureDir(name, pointMode); err != nil {
		return false, err
	}
	point, err := base.Handle(name)
	if err != nil {
		return false, err
	}
	defer point.Close()
	if err := bind(data, point, flags); err != nil {
		return false, fmt.Errorf("mount %s at %s: %w", data.Path(), path, err)
	}
	return true, nil
}

// Unbind unmounts all that is mounted at the path of name and removes the empty
// directory below it. Not mounted is no error; a busy mount is a conflict.
func (b *Binder) Unbind(name string) error {
	path := b.Path(name)
	mounts, err := b.at(path)
	if err != nil {
		return err
	}
	for range mounts {
		switch err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW); err {
		case nil, unix.EINVAL, unix.ENOENT:
		case unix.EBUSY:
			return fault.Conflict("unmount %s: it is busy", path)
		default:
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	// rmdir fails on whatever is not an empty, unmounted directory.
	if err := unix.Rmdir(path); err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove mount point %s: %w", path, err)
	}
	return nil
}

// Tidy removes the directories below the base that nothing is mounted on, left
// when a process was killed. Those that are not empty stay.
func (b *Binder) Tidy() error {
	entries, err := os.ReadDir(b.base)
	if err != nil {
		return err
	}
	mounted, err := b.List()
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		if mounted[entry.Name()] || !entry.IsDir() {
			continue
		}
		if err := unix.Rmdir(b.Path(entry.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove mount point %s: %w", b.Path(entry.Name()), err))
		}
	}
	return errors.Join(errs...)
}

// within tells whether path is dir or below it.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}
