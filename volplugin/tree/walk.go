package tree

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// A Visitor is told what is in a tree.
type Visitor interface {
	// Visit is called with each entry, the top included. An error ends the walk.
	Visit(item *Item) error
	// Failed is called for what cannot be read: path is an entry, or a directory of
	// which entries are not visited. An error ends the walk.
	Failed(path string, err error) error
}

// Walk visits what is in dir, in an order that depends on the names alone: a directory,
// the files in it, then what is in the directories in it. No symbolic link is followed;
// mount points are told as failed. When ctx ends, so does the walk, with its error.
func Walk(ctx context.Context, dir *rooted.Dir, v Visitor) error {
	b := newBeneath(dir)
	w := &walker{lane: lane{beneath: &b, top: dir.FD()}, visitor: v}
	defer w.drop()
	var err error
	if w.proc, err = unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return failure("open", "/proc/self/fd", "", err)
	}
	defer unix.Close(w.proc)
	waiting := []*node{{}}
	for len(waiting) > 0 {
		n := waiting[len(waiting)-1]
		waiting = waiting[:len(waiting)-1]
		below, err := w.dir(ctx, n)
		if err != nil {
			return err
		}
		for _, name := range slices.Backward(below) {
			waiting = append(waiting, &node{parent: n, name: name})
		}
	}
	return nil
}

type walker struct {
	lane
	visitor Visitor
	proc    int
	names   [64 << 10]byte
	attrs   []byte
}

// dir visits a directory and the files in it, and returns the names of directories in it.
func (w *walker) dir(ctx context.Context, n *node) (below []string, err error) {
	path := n.path()
	fd, err := w.open(n)
	if err != nil {
		return nil, w.failed(n, path, err)
	}
	defer w.keep(n, fd)
	self := &Item{Path: path, walker: w, fd: fd, open: true}
	if err := self.stat(); err != nil {
		return nil, w.failed(n, path, err)
	}
	if err := w.visitor.Visit(self); err != nil {
		return nil, err
	}
	var entries []entry
	for {
		before := len(entries)
		if entries, err = readEntries(fd, w.names[:], entries); err != nil {
			if err := w.failed(n, path, err); err != nil {
				return nil, err
			}
			break
		}
		if len(entries) == before {
			break
		}
	}
	slices.SortFunc(entries, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		isDir, err := w.file(fd, join(path, e.name), e)
		if err != nil {
			return nil, err
		}
		if isDir {
			below = append(below, e.name)
		}
	}
	return below, nil
}

// failed tells of a directory that cannot be read. For the top that is the end.
func (w *walker) failed(n *node, path string, err error) error {
	if n.parent == nil {
		return err
	}
	return w.visitor.Failed(path, mountPoint(err))
}

func mountPoint(err error) error {
	if errors.Is(err, unix.EXDEV) {
		return rooted.ErrMountPoint
	}
	return err
}

// file visits an entry unless it is a directory.
func (w *walker) file(dir int, path string, e entry) (isDir bool, err error) {
	if e.kind == unix.DT_DIR {
		return true, nil
	}
	fd, err := w.beneath.open(dir, e.name, unix.O_PATH)
	if err != nil {
		return false, w.visitor.Failed(path, mountPoint(err))
	}
	defer unix.Close(fd)
	item := &Item{Path: path, walker: w, fd: fd}
	if err := item.stat(); err != nil {
		return false, w.visitor.Failed(path, err)
	}
	if item.Stat.Mode&unix.S_IFMT == unix.S_IFDIR {
		return true, nil
	}
	return false, w.visitor.Visit(item)
}

// An Item is an entry of a tree, held so that no other can take its place. It is valid
// during the call of Visit.
type Item struct {
	// Path from the top, as raw as the names are; "" for the top itself.
	Path string
	Stat unix.Statx_t

	walker *walker
	fd     int
	open   bool // not by O_PATH
}

func (i *Item) stat() error {
	return unix.Statx(i.fd, "", unix.AT_EMPTY_PATH, wanted, &i.Stat)
}

// Open opens a regular file for reading. The caller closes the descriptor.
func (i *Item) Open() (fd int, err error) {
	if i.Stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, rooted.ErrNotFile
	}
	path := strconv.Itoa(i.fd)
	const flags = unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
	fd, err = unix.Openat(i.walker.proc, path, flags|unix.O_NOATIME, 0)
	if err == unix.EPERM {
		fd, err = unix.Openat(i.walker.proc, path, flags, 0)
	}
	return fd, err
}

// Target of a symbolic link.
func (i *Item) Target() (string, error) { return readlink(i.fd) }

// Inode tells files with several names from others, for as long as none of the tree is removed.
func (i *Item) Inode() any { return keyOf(&i.Stat) }

// Attributes calls do with the extended attributes that belong to a copy, ACLs among
// them. value is valid during the call.
func (i *Item) Attributes(do func(key string, value []byte) error) error {
	w := i.walker
	if w.attrs == nil {
		w.attrs = make([]byte, 2*maxXattrs)
	}
	from := attributes{fd: i.fd}
	if !i.open {
		from.path = procFD(i.fd)
	}
	n, err := from.list(w.attrs[:maxXattrs])
	if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	if err != nil {
		return err
	}
	for key := range bytes.SplitSeq(w.attrs[:n], []byte{0}) {
		if len(key) == 0 || !kept(string(key)) {
			continue
		}
		n, err := from.get(string(key), w.attrs[maxXattrs:])
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
			continue
		}
		if err != nil {
			return err
		}
		if err := do(string(key), w.attrs[maxXattrs:maxXattrs+n]); err != nil {
			return err
		}
	}
	return nil
}

// Keeps tells whether an extended attribute belongs to a copy: what the file system
// makes up does not, nor what is valid for one inode only.
func Keeps(attribute string) bool { return kept(attribute) }
