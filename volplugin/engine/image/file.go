package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// The floor of free space under which nothing is begun that fills the root later.
const (
	floorPart = 20 // of the root's size
	floorMost = 1 << 30
)

// chunk of what is reserved or copied between looks at ctx.
const chunk = 1 << 30

// openFile opens an image file for reading, and for writing if mode says so. The
// error wraps one of rooted's for what is no file in this directory.
func openFile(dir *rooted.Dir, name string, mode int) (*os.File, error) {
	path := filepath.Join(dir.Path(), name)
	fail := func(err error) error { return &fs.PathError{Op: "open", Path: path, Err: err} }
	fd, err := unix.Openat(dir.FD(), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fail(err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fail(err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFLNK:
		return nil, fail(rooted.ErrSymlink)
	default:
		return nil, fail(rooted.ErrNotFile)
	}
	mount, err := rooted.MountID(fd)
	if err != nil {
		return nil, fail(err)
	}
	if mount != dir.MountID() {
		return nil, fail(rooted.ErrMountPoint)
	}
	opened, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), mode|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fail(err)
	}
	return os.NewFile(uintptr(opened), path), nil
}

// present tells whether there is an image file. It errs for what is none.
func present(dir *rooted.Dir, name string) (bool, error) {
	f, err := openFile(dir, name, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, f.Close()
}

// newFile makes an empty file in Tmp.
func newFile(p engine.Place, name string) (*os.File, error) {
	path := filepath.Join(p.Tmp.Path(), name)
	fd, err := unix.Openat(p.Tmp.FD(), name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &fs.PathError{Op: "create", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// childPath leads a child process to the open file.
func childPath(f *os.File) string {
	return "/proc/" + strconv.Itoa(os.Getpid()) + "/fd/" + strconv.Itoa(int(f.Fd()))
}

func sizeOf(f *os.File) (uint64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return uint64(info.Size()), nil
}

// extend gives a file size bytes, with all their space or, sparse, without. After an
// error the file has the size that it had.
func extend(ctx context.Context, p engine.Place, f *os.File, size uint64, sparse bool) (err error) {
	old, err := sizeOf(f)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Truncate(int64(old)))
		}
	}()
	if sparse {
		if err := aboveFloor(p); err != nil {
			return err
		}
		return f.Truncate(int64(size))
	}
	if free, err := freeSpace(p); err != nil {
		return err
	} else if size > old && size-old > free {
		return noRoom(size-old, free)
	}
	return reserve(ctx, p, f, old, size)
}

// reserve takes the space of a part of a file, where it has none yet.
func reserve(ctx context.Context, p engine.Place, f *os.File, from, size uint64) error {
	for ; from < size; from += min(chunk, size-from) {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := unix.Fallocate(int(f.Fd()), 0, int64(from), int64(min(chunk, size-from)))
		switch {
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
			free, _ := freeSpace(p)
			return noRoom(size-from, free)
		case errors.Is(err, unix.EFBIG):
			return fault.Invalid("option size=%s: the root's file system has no files as large as that", units.BytesSize(float64(size)))
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			return fault.Invalid("option sparse: the root's file system cannot reserve space for an image; sparse=true does without")
		case err != nil:
			return &fs.PathError{Op: "fallocate", Path: f.Name(), Err: err}
		}
	}
	return nil
}

func noRoom(size, free uint64) error {
	return fault.Exhausted("the root has no room for %s: %s are free", units.BytesSize(float64(size)), units.BytesSize(float64(free)))
}

func freeSpace(p engine.Place) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(p.Tmp.FD(), &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: p.Tmp.Path(), Err: err}
	}
	return st.Bavail * uint64(st.Bsize), nil
}

// aboveFloor errs when the root is nearly full.
func aboveFloor(p engine.Place) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(p.Tmp.FD(), &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: p.Tmp.Path(), Err: err}
	}
	free, floor := st.Bavail*uint64(st.Bsize), min(st.Blocks*uint64(st.Bsize)/floorPart, floorMost)
	if free < floor {
		return fault.Exhausted("the root is nearly full: %s are free, and what shares or saves space asks for %s",
			units.BytesSize(float64(free)), units.BytesSize(float64(floor)))
	}
	return nil
}

// noCOWFlag is the kernel's FS_NOCOW_FL.
const noCOWFlag = 0x800000

// setNoCOW turns copy on write off for an empty file, where there is such a thing.
func setNoCOW(f *os.File) error {
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|noCOWFlag)
	}
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "set attribute", Path: f.Name(), Err: err}
	}
	return nil
}

// share makes the empty file dst share all that src has. The error wraps
// unix.EOPNOTSUPP, EXDEV or EINVAL where it cannot.
func share(dst, src *os.File) error {
	// btrfs refuses if only one of them has it.
	if flags, err := unix.IoctlGetInt(int(src.Fd()), unix.FS_IOC_GETFLAGS); err == nil && flags&noCOWFlag != 0 {
		if err := setNoCOW(dst); err != nil {
			return err
		}
	}
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err != nil {
		return &fs.PathError{Op: "share", Path: src.Name(), Err: err}
	}
	return nil
}

func cannotShare(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENOSYS)
}

// reflinks tells whether files of the root can share data, by trying.
func reflinks(p engine.Place) (bool, error) {
	var files [2]*os.File
	for i := range files {
		f, remove, err := scratch(p, i)
		if err != nil {
			return false, err
		}
		defer remove()
		files[i] = f
	}
	if _, err := files[0].Write(make([]byte, 4096)); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return false, nil
		}
		return false, err
	}
	err := share(files[1], files[0])
	if cannotShare(err) {
		return false, nil
	}
	return err == nil, err
}

// scratch makes a file that nobody sees.
func scratch(p engine.Place, i int) (f *os.File, remove func(), err error) {
	fd, err := unix.Openat(p.Tmp.FD(), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		f = os.NewFile(uintptr(fd), p.Tmp.Path())
		return f, func() { _ = f.Close() }, nil
	}
	// NFS has no nameless files.
	name := fmt.Sprintf("scratch.%d.%d.%d", os.Getpid(), unix.Gettid(), i)
	if f, err = newFile(p, name); err != nil {
		return nil, nil, err
	}
	return f, func() { _ = f.Close(); _ = p.Tmp.Remove(name) }, nil
}

// duplicate makes the empty file dst a copy of src, which nobody writes to, shared
// where that can be.
func duplicate(ctx context.Context, p engine.Place, dst, src *os.File) error {
	err := share(dst, src)
	if !cannotShare(err) {
		return err
	}
	size, err := sizeOf(src)
	if err != nil {
		return err
	}
	if err := dst.Truncate(int64(size)); err != nil {
		return err
	}
	for at := int64(0); ; {
		data, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return &fs.PathError{Op: "seek", Path: src.Name(), Err: err}
		}
		end, err := unix.Seek(int(src.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return &fs.PathError{Op: "seek", Path: src.Name(), Err: err}
		}
		to := data
		for at = data; at < end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n, err := unix.CopyFileRange(int(src.Fd()), &at, int(dst.Fd()), &to, int(min(64<<20, end-at)), 0)
			if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
				free, _ := freeSpace(p)
				return noRoom(uint64(end-at), free)
			}
			if err != nil {
				return &fs.PathError{Op: "copy", Path: src.Name(), Err: err}
			}
			if n == 0 {
				return fmt.Errorf("copy %s: %w", src.Name(), fs.ErrInvalid)
			}
		}
	}
}

// clear removes what is left in Tmp under a name.
func clear(ctx context.Context, p engine.Place, temp string) error {
	if _, err := p.Tmp.Stat(temp); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := p.Before(ctx, "clear"); err != nil {
		return err
	}
	return forget(p, temp)
}

// forget removes a file in Tmp.
func forget(p engine.Place, name string) error {
	if err := p.Tmp.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return p.Tmp.Sync()
}

// move renames a file in one step. The error wraps fs.ErrExist when the new name is
// taken.
func move(from *rooted.Dir, name string, to *rooted.Dir, newName string) error {
	if err := from.RenameNew(name, to, newName); err != nil {
		return err
	}
	// The new name first: a file that is seen twice is better than none.
	return errors.Join(to.Sync(), from.Sync())
}
