// Package rooted works on a directory tree through directory handles, so that no
// name, symbolic link or mount can lead an operation out of the tree.
//
// Every call takes a single name inside an open directory; a symbolic link is
// never followed and a mount point is never entered. The tree's top is the one
// path that is resolved as the kernel does, because it is the operator's choice.
// openat2(2) does in one call what takes four without it; on kernels that have no such
// call openat(2) and /proc are enough. Calls may block for as long as the file system
// does; callers bound them. It knows nothing of volumes.
package rooted

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Errors that say why a name is not entered. fs.ErrNotExist is returned as usual.
var (
	ErrSymlink    = errors.New("is a symbolic link")
	ErrMountPoint = errors.New("is a mount point")
	ErrNotDir     = errors.New("is not a directory")
	ErrNotFile    = errors.New("is not a regular file")
	ErrTooLarge   = errors.New("is too large")
)

// A Dir is an open directory. It must be closed. Its methods may be called
// concurrently.
type Dir struct {
	// fd is -1 after Close. An os.File would ask for the flags of each descriptor.
	fd    atomic.Int32
	path  string
	mount int
}

// Open opens the top of a tree. Symbolic links in path are followed.
func Open(path string) (*Dir, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return newDir(fd, path)
}

// newDir takes over fd.
func newDir(fd int, path string) (*Dir, error) {
	mount, err := mountID(fd)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), unix.Close(fd))
	}
	return dirOf(fd, path, mount), nil
}

func dirOf(fd int, path string, mount int) *Dir {
	d := &Dir{path: path, mount: mount}
	d.fd.Store(int32(fd))
	return d
}

// Path by which the directory was opened, for messages.
func (d *Dir) Path() string { return d.path }

// Close releases the handle. Closing again is an error and closes nothing.
func (d *Dir) Close() error {
	fd := int(d.fd.Swap(-1))
	if fd < 0 {
		return &fs.PathError{Op: "close", Path: d.path, Err: fs.ErrClosed}
	}
	if err := unix.Close(fd); err != nil {
		return &fs.PathError{Op: "close", Path: d.path, Err: err}
	}
	return nil
}

// FD is the descriptor, valid until Close.
func (d *Dir) FD() int { return int(d.fd.Load()) }

// MountID is the kernel's number of the mount the directory was opened through,
// the first field of a line in mountinfo(5).
func (d *Dir) MountID() int { return d.mount }

// ProcPath leads to this very directory in system calls that take a path,
// whatever its names lead to now. It is valid until Close.
func (d *Dir) ProcPath() string { return "/proc/self/fd/" + strconv.Itoa(d.FD()) }

// Dir opens the directory name. The error is one of the Err values of this
// package or fs.ErrNotExist when there is no such directory to enter.
func (d *Dir) Dir(name string) (*Dir, error) {
	dir, err := d.enter(name, unix.O_RDONLY)
	if !errors.Is(err, errNoOpenat2) {
		return dir, err
	}
	return d.dirSlowly(name)
}

// dirSlowly is Dir for kernels before 5.6.
func (d *Dir) dirSlowly(name string) (*Dir, error) {
	handle, err := d.handleSlowly(name)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	fd, err := unix.Openat(handle.FD(), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, d.fail("open", name, err)
	}
	return dirOf(fd, handle.path, handle.mount), nil
}

// Handle is Dir without the right to read the directory: it needs no permission
// on the directory itself, which a server that squashes root may refuse.
func (d *Dir) Handle(name string) (*Dir, error) {
	child, err := d.enter(name, unix.O_PATH)
	if !errors.Is(err, errNoOpenat2) {
		return child, err
	}
	return d.handleSlowly(name)
}

// errNoOpenat2 says that the kernel has no openat2, or a seccomp filter does not know it.
var errNoOpenat2 = errors.New("openat2 is not to be had")

// enter opens the directory name by one call, which ends at a mount point before it
// would enter it.
func (d *Dir) enter(name string, flags uint64) (*Dir, error) {
	if err := checkName(name); err != nil {
		return nil, d.fail("open", name, err)
	}
	how := unix.OpenHow{
		Flags:   flags | unix.O_NOFOLLOW | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := unix.Openat2(d.FD(), name, &how)
	switch err {
	case nil:
		return dirOf(fd, filepath.Join(d.path, name), d.mount), nil
	case unix.ENOSYS, unix.EPERM:
		return nil, errNoOpenat2
	case unix.EXDEV:
		return nil, d.fail("open", name, ErrMountPoint)
	case unix.ENOTDIR, unix.ELOOP:
		return nil, d.fail("open", name, d.notDir(name))
	}
	return nil, d.fail("open", name, err)
}

// handleSlowly is Handle for kernels before 5.6.
func (d *Dir) handleSlowly(name string) (*Dir, error) {
	if err := checkName(name); err != nil {
		return nil, d.fail("open", name, err)
	}
	fd, err := unix.Openat(d.FD(), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			err = d.notDir(name)
		}
		return nil, d.fail("open", name, err)
	}
	child, err := newDir(fd, filepath.Join(d.path, name))
	if err != nil {
		return nil, err
	}
	if child.mount != d.mount {
		return nil, errors.Join(d.fail("open", name, ErrMountPoint), child.Close())
	}
	return child, nil
}

// notDir tells a symbolic link from other files.
func (d *Dir) notDir(name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(d.FD(), name, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return ErrSymlink
	}
	return ErrNotDir
}

// Same tells whether path leads to this very directory.
func (d *Dir) Same(path string) (bool, error) {
	var mine, other unix.Stat_t
	if err := unix.Fstat(d.FD(), &mine); err != nil {
		return false, &fs.PathError{Op: "stat", Path: d.Path(), Err: err}
	}
	if err := unix.Stat(path, &other); err != nil {
		return false, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return mine.Dev == other.Dev && mine.Ino == other.Ino, nil
}

// Mkdir makes the directory name; the process's umask applies.
func (d *Dir) Mkdir(name string, mode uint32) error {
	if err := checkName(name); err != nil {
		return d.fail("mkdir", name, err)
	}
	return d.fail("mkdir", name, unix.Mkdirat(d.FD(), name, mode))
}

// EnsureDir makes the directory name where it is missing.
func (d *Dir) EnsureDir(name string, mode uint32) error {
	if err := d.Mkdir(name, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// Rmdir removes the directory name if it is empty and no mount point.
func (d *Dir) Rmdir(name string) error {
	if err := checkName(name); err != nil {
		return d.fail("rmdir", name, err)
	}
	return d.fail("rmdir", name, unix.Unlinkat(d.FD(), name, unix.AT_REMOVEDIR))
}

// Remove removes the file or symbolic link name.
func (d *Dir) Remove(name string) error {
	if err := checkName(name); err != nil {
		return d.fail("remove", name, err)
	}
	return d.fail("remove", name, unix.Unlinkat(d.FD(), name, 0))
}

// Link gives the file name a second name in another directory of the same file
// system. The error wraps fs.ErrExist when the new name is taken: of several
// hosts on one NFS server, one alone succeeds.
func (d *Dir) Link(name string, to *Dir, newName string) error {
	if err := errors.Join(checkName(name), checkName(newName)); err != nil {
		return d.fail("link", name, err)
	}
	return to.fail("link", newName, unix.Linkat(d.FD(), name, to.FD(), newName, 0))
}

// Rename moves name to newName in another directory of the same file system,
// replacing a file of that name.
func (d *Dir) Rename(name string, to *Dir, newName string) error {
	if err := errors.Join(checkName(name), checkName(newName)); err != nil {
		return d.fail("rename", name, err)
	}
	return d.fail("rename", name, unix.Renameat(d.FD(), name, to.FD(), newName))
}

// ReadFile reads the regular file name of at most limit bytes. It does not wait
// on a FIFO and does not open devices.
func (d *Dir) ReadFile(name string, limit int64) ([]byte, error) {
	if err := checkName(name); err != nil {
		return nil, d.fail("read", name, err)
	}
	fd, err := unix.Openat(d.FD(), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ELOOP) {
		err = ErrSymlink
	}
	if err != nil {
		return nil, d.fail("read", name, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, d.fail("stat", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, d.fail("read", name, ErrNotFile)
	}
	data, err := readAll(fd, st.Size, limit+1)
	if err != nil {
		return nil, d.fail("read", name, err)
	}
	if int64(len(data)) > limit {
		return nil, d.fail("read", name, ErrTooLarge)
	}
	return data, nil
}

// readAll reads a regular file of size bytes, but no more than limit. One whose size is
// told as 0 is read to its end.
func readAll(fd int, size, limit int64) ([]byte, error) {
	data := make([]byte, 0, min(size+1, limit))
	for int64(len(data)) < limit {
		if len(data) == cap(data) {
			data = slices.Grow(data, 4096)
		}
		n, err := unix.Read(fd, data[len(data):min(int64(cap(data)), limit)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		data = data[:len(data)+n]
		if n == 0 || int64(len(data)) == size {
			return data, nil
		}
	}
	return data, nil
}

// WriteNew makes the file name with the data, on disk when it returns. It
// replaces nothing, and leaves no file behind when it fails.
func (d *Dir) WriteNew(name string, data []byte, mode uint32) (err error) {
	if err := checkName(name); err != nil {
		return d.fail("create", name, err)
	}
	fd, err := unix.Openat(d.FD(), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return d.fail("create", name, err)
	}
	file := os.NewFile(uintptr(fd), filepath.Join(d.Path(), name))
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Remove(name))
		}
	}()
	_, err = file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

// A Stamp tells versions of a file apart that were each written by rename.
type Stamp struct {
	Ino          uint64
	Size         int64
	Mtime, Ctime int64 // nanoseconds
}

// Stat returns the stamp of the file name without following it.
func (d *Dir) Stat(name string) (Stamp, error) {
	if err := checkName(name); err != nil {
		return Stamp{}, d.fail("stat", name, err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(d.FD(), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return Stamp{}, d.fail("stat", name, err)
	}
	return Stamp{Ino: st.Ino, Size: st.Size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano()}, nil
}

// Self is Stat for the directory itself: its times change when a name in it is made,
// removed or replaced.
func (d *Dir) Self() (Stamp, error) {
	var st unix.Stat_t
	if err := unix.Fstat(d.FD(), &st); err != nil {
		return Stamp{}, &fs.PathError{Op: "stat", Path: d.Path(), Err: err}
	}
	return Stamp{Ino: st.Ino, Size: st.Size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano()}, nil
}

// Names lists the directory, unsorted.
func (d *Dir) Names() ([]string, error) {
	// A second handle: reading moves the position of the one it uses.
	fd, err := unix.Openat(d.FD(), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: d.Path(), Err: err}
	}
	file := os.NewFile(uintptr(fd), d.Path())
	defer file.Close()
	return file.Readdirnames(-1)
}

// Empty tells whether the directory has no entry.
func (d *Dir) Empty() (bool, error) {
	names, err := d.Names()
	return len(names) == 0, err
}

// Refresh makes the kernel ask a file server for the directory's present
// version, so that names made or removed on other hosts are seen at once and not
// when the attribute cache runs out (up to a minute on NFS).
func (d *Dir) Refresh() error {
	var st unix.Statx_t
	err := unix.Statx(d.FD(), "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_MTIME|unix.STATX_CTIME, &st)
	if err == unix.ENOSYS {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "stat", Path: d.Path(), Err: err}
	}
	return nil
}

// Sync puts names that were made, moved or removed in the directory on disk.
func (d *Dir) Sync() error {
	// Some network file systems cannot sync a directory; what they were told is
	// on the server already.
	if err := unix.Fsync(d.FD()); err != nil && err != unix.EINVAL && err != unix.ENOTSUP {
		return &fs.PathError{Op: "fsync", Path: d.Path(), Err: err}
	}
	return nil
}

// SetOwner changes owner and group of the directory; -1 leaves one as it is.
func (d *Dir) SetOwner(uid, gid int) error {
	if err := unix.Fchown(d.FD(), uid, gid); err != nil {
		return &fs.PathError{Op: "chown", Path: d.Path(), Err: err}
	}
	return nil
}

// SetMode changes the directory's permission bits, set-ID and sticky bits
// included (octal 7777).
func (d *Dir) SetMode(mode uint32) error {
	if err := unix.Fchmod(d.FD(), mode); err != nil {
		return &fs.PathError{Op: "chmod", Path: d.Path(), Err: err}
	}
	return nil
}

func (d *Dir) fail(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: filepath.Join(d.Path(), name), Err: err}
}

// checkName refuses what would lead elsewhere than to an entry of the directory.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%q is not the name of a directory entry", name)
	}
	return nil
}

// mountID is the kernel's number of the mount that fd was opened through.
func mountID(fd int) (int, error) {
	var st unix.Statx_t
	// Without a word to a file server: the answer is the kernel's own.
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st)
	if err == nil && st.Mask&unix.STATX_MNT_ID != 0 {
		return int(st.Mnt_id), nil
	}
	return procMountID(fd)
}

// procMountID is mountID for kernels before 5.8.
func procMountID(fd int) (int, error) {
	info, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(info)) {
		if value, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(value))
		}
	}
	return 0, errors.New("no mount ID in /proc/self/fdinfo")
}
