package tree

import (
	"bytes"
	"errors"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// setTimes sets the times of the open file.
func setTimes(fd int, times [2]unix.Timespec) error {
	// Without a path, which golang.org/x/sys/unix has no form for, it works on
	// every kernel.
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&times)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// owner gives the copy at fd the owner in st, unless new files have it anyway.
func (w *worker) owner(fd int, st *unix.Statx_t) error {
	if w.fsType.local() && st.Uid == w.own.uid && st.Gid == w.own.gid {
		return nil
	}
	return unix.Fchown(fd, int(st.Uid), int(st.Gid))
}

// kept tells whether an extended attribute belongs to the copy, too.
func kept(name string) bool {
	switch name {
	case "system.posix_acl_access", "system.posix_acl_default":
		return true
	case "trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT":
		return false // xfs shows ACLs a second time
	case "security.evm":
		return false // a signature that names the inode
	}
	// The rest of "system." is not stored but made up by the file system.
	return !strings.HasPrefix(name, "system.")
}

// maxXattrs is the kernel's limit for a list and for a value.
const maxXattrs = 64 << 10

// xattrs copies the extended attributes, ACLs among them, of the open file src to dst, or
// to name in the directory dst unless that is "". In the latter case src may be
// opened with O_PATH.
func (w *worker) xattrs(src, dst int, name string, path func() string, repeated bool) error {
	if w.attrs == nil {
		w.attrs = make([]byte, 2*maxXattrs)
	}
	from, to := attributes{fd: src}, attributes{fd: dst}
	if name != "" {
		from.path = procFD(src)
		to.path, to.nofollow = procFD(dst)+"/"+name, true
	}
	n, err := from.list(w.attrs[:maxXattrs])
	switch {
	case err == nil:
	case errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ENOSYS), gone(err):
		return nil
	default:
		return w.failed("list the attributes of", path(), err)
	}
	for list := w.attrs[:n]; len(list) > 0; {
		var attr []byte
		attr, list, _ = bytes.Cut(list, []byte{0})
		key := string(attr)
		if !kept(key) {
			continue
		}
		n, err := from.get(key, w.attrs[maxXattrs:])
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) || gone(err) {
			continue
		}
		if err != nil {
			return w.failed("read attribute "+strconv.Quote(key)+" of", path(), err)
		}
		err = to.set(key, w.attrs[maxXattrs:maxXattrs+n])
		if errors.Is(err, unix.ENOTSUP) {
			if !repeated {
				w.note(&w.stats.Lost, &w.stats.LostSome, path()+": "+key)
			}
			continue
		}
		if err != nil {
			return w.failed("set attribute "+strconv.Quote(key)+" of the copy of", path(), err)
		}
	}
	return nil
}

// clearXattrs removes the attributes that an earlier round gave to a copy.
func (w *worker) clearXattrs(fd int) error {
	if w.attrs == nil {
		w.attrs = make([]byte, 2*maxXattrs)
	}
	n, err := unix.Flistxattr(fd, w.attrs[:maxXattrs])
	if err != nil {
		return nil //nolint:nilerr // there are none, then
	}
	for list := w.attrs[:n]; len(list) > 0; {
		var attr []byte
		attr, list, _ = bytes.Cut(list, []byte{0})
		if key := string(attr); kept(key) && key != "security.selinux" {
			if err := unix.Fremovexattr(fd, key); err != nil && err != unix.ENODATA && err != unix.ENOTSUP {
				return err
			}
		}
	}
	return nil
}

// attributes are those of an open file, or of a path.
type attributes struct {
	fd       int
	path     string
	nofollow bool
}

func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func (a attributes) list(buf []byte) (int, error) {
	if a.path == "" {
		return unix.Flistxattr(a.fd, buf)
	}
	return unix.Listxattr(a.path, buf)
}

func (a attributes) get(name string, buf []byte) (int, error) {
	if a.path == "" {
		return unix.Fgetxattr(a.fd, name, buf)
	}
	return unix.Getxattr(a.path, name, buf)
}

func (a attributes) set(name string, value []byte) error {
	switch {
	case a.path == "":
		return unix.Fsetxattr(a.fd, name, value, 0)
	case a.nofollow:
		return unix.Lsetxattr(a.path, name, value, 0)
	}
	return unix.Setxattr(a.path, name, value, 0)
}
