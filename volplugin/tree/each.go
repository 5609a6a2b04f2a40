package tree

import (
	"context"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Each calls do with every directory and regular file below dir, open for reading, a directory
// before what is in it. Several calls run at a time; fd is valid during the call. What
// comes and goes meanwhile may be left out, and mount points are. The first error ends it.
func Each(ctx context.Context, dir *rooted.Dir, do func(fd int, isDir bool) error) error {
	b := newBeneath(dir)
	proc, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return failure("open", "/proc/self/fd", "", err)
	}
	defer unix.Close(proc)
	// They have nothing of their own.
	scanners := slices.Repeat([]scanner{&each{beneath: &b, proc: proc, do: do}}, workers(0))
	return (&scan{verb: "change", skip: left}).run(ctx, dir, &b, scanners)
}

type each struct {
	*beneath
	proc int
	do   func(fd int, isDir bool) error
}

func (w *each) enter(fd int, top bool) error {
	if top {
		return nil
	}
	return w.do(fd, true)
}

// entry works on a regular file, and tells of a directory that it is one.
func (w *each) entry(dir int, e entry) (isDir bool, err error) {
	if e.kind != unix.DT_REG && e.kind != unix.DT_UNKNOWN {
		return e.kind == unix.DT_DIR, nil
	}
	held, err := w.open(dir, e.name, unix.O_PATH)
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
