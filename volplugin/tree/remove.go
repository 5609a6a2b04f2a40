package tree

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Remove removes name and all below it, with several workers. It promises what
// rooted.Dir.RemoveTree does: it follows no symbolic link and stops at a mount point with
// rooted.ErrMountPoint, so nothing is ever deleted through a mount; what is missing
// already is no error, so several hosts may remove the same tree; when ctx ends it stops
// early with ctx's error, and a later call goes on. It does not run out of
// descriptors in deep trees.
func Remove(ctx context.Context, parent *rooted.Dir, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := parent.Remove(name)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	top, err := parent.Dir(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer top.Close()
	for round := 0; ; round++ {
		if err := removeContent(ctx, top); err != nil {
			return err
		}
		err := parent.Rmdir(name)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !notEmpty(err) || round == scans {
			return err
		}
	}
}

func removeContent(ctx context.Context, top *rooted.Dir) error {
	b := newBeneath(top)
	r := &remover{path: top.Path(), root: &doomed{}, lifted: "berth-" + rand.Text() + "-"}
	r.root.open.Store(1)
	do := make([]func(*doomed) error, workers(0))
	for i := range do {
		w := &removeWorker{remover: r, lane: lane{beneath: &b, top: top.FD()}}
		defer w.drop()
		do[i] = w.do
	}
	return run(ctx, r.root, do, &r.pool)
}

// notEmpty tells whether a directory could not be removed for what is in it.
func notEmpty(err error) bool {
	return errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST)
}

// A doomed directory is removed when open is 0: when it has been read and all
// directories in it are gone.
type doomed struct {
	node
	up     *doomed
	depth  int
	open   atomic.Int32
	rounds int
}

type remover struct {
	pool[*doomed]
	path string
	root *doomed
	// lifted is how names begin that directories get which are moved up.
	lifted string
	count  atomic.Uint64
}

const (
	// deepest is how far below the top a directory is worked on where it is. Every return
	// to one costs a walk down from the top, so what is deeper is moved up first; the time to
	// remove a tree does not grow with the square of its depth then.
	deepest = 128
	// scans of a directory that is found not to be empty when it should be, because
	// somebody makes new files or the file system left some out.
	scans = 10
)

type removeWorker struct {
	*remover
	lane
	names   [64 << 10]byte
	entries []entry
	below   []*doomed
}

func (w *removeWorker) do(n *doomed) error {
	fd, err := w.open(&n.node)
	switch {
	case err == nil:
	case n.up == nil:
		return w.failed("open", "", err)
	case gone(err), turned(err):
		return w.done(n)
	case errors.Is(err, unix.EXDEV):
		return w.failed("remove", n.path(), rooted.ErrMountPoint)
	default:
		return w.failed("open", n.path(), err)
	}
	leaf := true
	for {
		w.entries, err = readEntries(fd, w.names[:], w.entries[:0])
		if err != nil {
			_ = unix.Close(fd)
			return w.failed("read", n.path(), err)
		}
		if len(w.entries) == 0 {
			break
		}
		w.below = w.below[:0]
		for _, e := range w.entries {
			if err := w.entry(n, fd, e); err != nil {
				_ = unix.Close(fd)
				return err
			}
		}
		if len(w.below) > 0 {
			leaf = false
			w.push(w.below...)
			clear(w.below)
		}
	}
	if leaf {
		// The parent is more useful: it is needed at once, and for those beside this one.
		_ = unix.Close(fd)
	} else {
		w.keep(&n.node, fd)
	}
	return w.done(n)
}

// entry removes a file, or leaves a directory for later.
func (w *removeWorker) entry(n *doomed, dir int, e entry) error {
	if w.ended.Load() {
		return errEnded
	}
	if e.kind != unix.DT_DIR {
		err := unix.Unlinkat(dir, e.name, 0)
		switch {
		case err == nil, gone(err):
			return nil
		case errors.Is(err, unix.EBUSY):
			err = mountOrBusy(dir, e.name)
		case errors.Is(err, unix.EISDIR), errors.Is(err, unix.EPERM) && isDir(dir, e.name):
			err = nil
		}
		if err != nil {
			return w.failed("remove", join(n.path(), e.name), err)
		}
	}
	up, name := n, e.name
	if n.depth >= deepest {
		lifted := fmt.Sprint(w.lifted, w.count.Add(1))
		if err := unix.Renameat(dir, name, w.top, lifted); err == nil {
			up, name = w.root, lifted
		}
	}
	child := &doomed{node: node{parent: &up.node, name: name}, up: up, depth: up.depth + 1}
	child.open.Store(1)
	up.open.Add(1)
	w.below = append(w.below, child)
	return nil
}

// done ends one hold of a directory, and removes it and those above that
// nothing holds any more.
func (w *removeWorker) done(n *doomed) error {
	for n.open.Add(-1) == 0 && n.up != nil {
		again, err := w.rmdir(n)
		if err != nil {
			return w.failed("remove", n.path(), err)
		}
		if again {
			n.open.Store(1)
			n.rounds++
			w.push(n)
			return nil
		}
		n = n.up
	}
	return nil
}

// rmdir removes an empty directory. again says that it is not empty and should be read
// once more.
func (w *removeWorker) rmdir(n *doomed) (again bool, err error) {
	parent := w.fd
	if w.at != &n.up.node {
		fd, err := w.open(&n.up.node)
		if gone(err) || turned(err) {
			return false, nil // and so is n; who made it be so sees to what is there now
		}
		if err != nil {
			return false, err
		}
		w.keep(&n.up.node, fd)
		parent = fd
	}
	err = unix.Unlinkat(parent, n.name, unix.AT_REMOVEDIR)
	switch {
	case err == nil, gone(err):
		return false, nil
	case errors.Is(err, unix.ENOTDIR):
		// A file or a link has taken its place.
		err := unix.Unlinkat(parent, n.name, 0)
		switch {
		case err == nil, gone(err):
			return false, nil
		case (errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EPERM) && isDir(parent, n.name)) && n.rounds < scans:
			return true, nil
		}
		return false, err
	case errors.Is(err, unix.EBUSY):
		return false, rooted.ErrMountPoint
	case notEmpty(err) && n.rounds < scans:
		return true, nil
	}
	return false, err
}

func (r *remover) failed(op, path string, err error) error { return failure(op, r.path, path, err) }

func isDir(dir int, name string) bool {
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
}

// mountOrBusy says what is wrong with a file that cannot be removed: something is
// mounted on it, or a file server holds it.
func mountOrBusy(dir int, name string) error {
	own, err := rooted.MountID(dir)
	if err != nil {
		return unix.EBUSY
	}
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return unix.EBUSY
	}
	defer unix.Close(fd)
	if mount, err := rooted.MountID(fd); err == nil && mount != own {
		return rooted.ErrMountPoint
	}
	return unix.EBUSY
}
