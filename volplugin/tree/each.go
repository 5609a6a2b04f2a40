package tree

import (
	"context"
	"errors"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Each calls do with every directory and regular file below dir, open for reading, a directory
// before what is in it. Several calls run at a time; fd is valid during the call. What
// comes and goes meanwhile may be left out, and mount points are. The first error ends it.
func Each(ctx context.Context, dir *rooted.Dir, do func(fd int, isDir bool) error) error {
	b := newBeneath(dir)
	e := &each{path: dir.Path(), do: do}
	var err error
	if e.proc, err = unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return failure("open", "/proc/self/fd", "", err)
	}
	defer unix.Close(e.proc)
	work := make([]func(*node) error, workers(0))
	for i := range work {
		w := &eachWorker{each: e, lane: lane{beneath: &b, top: dir.FD()}}
		defer w.drop()
		work[i] = w.dir
	}
	return run(ctx, &node{}, work, &e.pool)
}

type each struct {
	pool[*node]
	path string
	proc int
	do   func(fd int, isDir bool) error
}

type eachWorker struct {
	*each
	lane
	names   [64 << 10]byte
	entries []entry
}

func (w *eachWorker) dir(n *node) error {
	fd, err := w.lane.open(n)
	if err != nil {
		if n.parent != nil && left(err) {
			return nil
		}
		return failure("open", w.path, n.path(), err)
	}
	defer w.keep(n, fd)
	if n.parent != nil {
		if err := w.do(fd, true); err != nil {
			return failure("change", w.path, n.path(), err)
		}
	}
	for {
		w.entries, err = readEntries(fd, w.names[:], w.entries[:0])
		if err != nil {
			return failure("read", w.path, n.path(), err)
		}
		if len(w.entries) == 0 {
			return nil
		}
		var below []*node
		for _, e := range w.entries {
			if w.ended.Load() {
				return errEnded
			}
			isDir, err := w.file(fd, e)
			if err != nil {
				return failure("change", w.path, join(n.path(), e.name), err)
			}
			if isDir {
				below = append(below, &node{parent: n, name: e.name})
			}
		}
		w.push(below...)
	}
}

// left tells that a file is not there to be opened any more, or never was to be.
func left(err error) bool { return gone(err) || turned(err) || errors.Is(err, unix.EXDEV) }

// file works on a regular file, and tells of a directory that it is one.
func (w *eachWorker) file(dir int, e entry) (isDir bool, err error) {
	if e.kind != unix.DT_REG && e.kind != unix.DT_UNKNOWN {
		return e.kind == unix.DT_DIR, nil
	}
	held, err := w.beneath.open(dir, e.name, unix.O_PATH)
	if err != nil {
		if left(err) {
			err = nil
		}
		return false, err
	}
	defer unix.Close(held)
	var st unix.Stat_t
	if err := unix.Fstat(held, &st); err != nil {
		return false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
	}
	fd, err := unix.Openat(w.proc, strconv.Itoa(held), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		if gone(err) {
			err = nil
		}
		return false, err
	}
	defer unix.Close(fd)
	return false, w.do(fd, false)
}
