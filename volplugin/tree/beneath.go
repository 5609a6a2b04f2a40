package tree

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// A beneath opens what is below directories and never anything else.
type beneath struct {
	// mount is the number of the mount that the tree is on.
	mount int
	// old: the kernel has no openat2.
	old bool
}

const resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_MAGICLINKS

// newBeneath finds out what the kernel can do, with the tree's top.
func newBeneath(top *rooted.Dir) beneath {
	b := beneath{mount: top.MountID()}
	fd, err := unix.Openat2(top.FD(), ".", &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: resolve})
	if err != nil {
		// ENOSYS, or EPERM from a seccomp filter that does not know the call.
		b.old = true
		return b
	}
	_ = unix.Close(fd)
	return b
}

// open opens a path of one or more components below the directory dir. A symbolic
// link anywhere in it is ELOOP, a mount point EXDEV.
func (b *beneath) open(dir int, path string, flags int) (int, error) {
	flags |= unix.O_NOFOLLOW | unix.O_CLOEXEC
	if b.old {
		return b.openSlowly(dir, path, flags)
	}
	for {
		fd, err := unix.Openat2(dir, path, &unix.OpenHow{Flags: uint64(flags), Resolve: resolve})
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		return fd, err
	}
}

// openSlowly is open for kernels before 5.6. It must not be used with flags that
// open more than directories, but for O_PATH.
func (b *beneath) openSlowly(dir int, path string, flags int) (int, error) {
	at := dir
	for {
		name, rest, more := strings.Cut(path, "/")
		with := flags
		if more {
			with = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		}
		fd, err := unix.Openat(at, name, with, 0)
		if at != dir {
			_ = unix.Close(at)
		}
		if err != nil {
			return -1, err
		}
		mount, err := rooted.MountID(fd)
		if err == nil && mount != b.mount {
			err = unix.EXDEV
		}
		if err != nil {
			_ = unix.Close(fd)
			return -1, err
		}
		if !more {
			return fd, nil
		}
		at, path = fd, rest
	}
}

// maxPath is what is opened at once; the kernel's limit is 4096.
const maxPath = 4000

// A lane opens the directories of a tree for one worker. It keeps the one that
// was left last, because the next is mostly below it.
type lane struct {
	*beneath
	top int
	at  *node // nil: none is kept
	fd  int
}

// open opens the directory n for reading.
func (l *lane) open(n *node) (int, error) {
	if n.parent == nil {
		return openAgain(l.top)
	}
	if n.parent == l.at {
		return l.openDir(l.fd, n.name)
	}
	return l.openLong(l.top, n.path())
}

// openLong opens the directory path, however long it is, below the directory from.
func (b *beneath) openLong(from int, path string) (int, error) {
	at := from
	for len(path) > maxPath {
		cut := strings.LastIndexByte(path[:maxPath], '/')
		fd, err := b.openDir(at, path[:cut])
		if at != from {
			_ = unix.Close(at)
		}
		if err != nil {
			return -1, err
		}
		at, path = fd, path[cut+1:]
	}
	fd, err := b.openDir(at, path)
	if at != from {
		_ = unix.Close(at)
	}
	return fd, err
}

// openDir does not touch the access time where it may do that.
func (b *beneath) openDir(dir int, path string) (int, error) {
	fd, err := b.open(dir, path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME)
	if errors.Is(err, unix.EPERM) {
		fd, err = b.open(dir, path, unix.O_RDONLY|unix.O_DIRECTORY)
	}
	return fd, err
}

// keep takes over the descriptor of n, which is being left.
func (l *lane) keep(n *node, fd int) {
	l.drop()
	l.at, l.fd = n, fd
}

func (l *lane) drop() {
	if l.at != nil {
		_ = unix.Close(l.fd)
		l.at = nil
	}
}

// openAgain gives a second handle of a directory, with a position of its own, that can
// be read from.
func openAgain(dir int) (int, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	fd, err := unix.Openat(dir, ".", flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		fd, err = unix.Openat(dir, ".", flags, 0)
	}
	return fd, err
}

// gone tells whether the error of a system call with a name means that nothing
// is there any more.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE)
}

// turned tells whether the error of a system call with a name means that something
// of another type is there.
func turned(err error) bool {
	return errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EISDIR)
}
