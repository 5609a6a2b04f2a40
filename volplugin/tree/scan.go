package tree

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// A scanner is what one worker of a scan has to do. One goroutine calls it.
type scanner interface {
	// enter is called with a directory, open for reading, before what is in it.
	enter(fd int, top bool) error
	// entry is called with what is in the directory and tells what is a directory
	// itself, which is entered later, maybe by another worker.
	entry(dir int, e entry) (isDir bool, err error)
}

// A scan goes through a tree in no order that one could rely on.
type scan struct {
	pool[*node]
	// path of the top and verb are for errors: the verb is what scanners do.
	path, verb string
	// skip tells of the error of opening a directory that it is left out; the top never is.
	skip func(error) bool
}

// run has one worker for each scanner. The first error ends the scan.
func (s *scan) run(ctx context.Context, dir *rooted.Dir, b *beneath, scanners []scanner) error {
	s.path = dir.Path()
	do := make([]func(*node) error, len(scanners))
	for i := range do {
		w := &scanWorker{scan: s, scanner: scanners[i], lane: lane{beneath: b, top: dir.FD()}}
		defer w.drop()
		do[i] = w.dir
	}
	return run(ctx, &node{}, do, &s.pool)
}

type scanWorker struct {
	*scan
	scanner
	lane
	names   [64 << 10]byte
	entries []entry
	below   []*node
}

func (w *scanWorker) dir(n *node) error {
	fd, err := w.open(n)
	if err != nil {
		if n.parent != nil && w.skip(err) {
			return nil
		}
		return failure("open", w.path, n.path(), err)
	}
	defer w.keep(n, fd)
	if err := w.enter(fd, n.parent == nil); err != nil {
		return failure(w.verb, w.path, n.path(), err)
	}
	for {
		w.entries, err = readEntries(fd, w.names[:], w.entries[:0])
		if err != nil {
			return failure("read", w.path, n.path(), err)
		}
		if len(w.entries) == 0 {
			return nil
		}
		w.below = w.below[:0]
		for _, e := range w.entries {
			if w.ended.Load() {
				return errEnded
			}
			isDir, err := w.entry(fd, e)
			if err != nil {
				return failure(w.verb, w.path, join(n.path(), e.name), err)
			}
			if isDir {
				w.below = append(w.below, &node{parent: n, name: e.name})
			}
		}
		if len(w.below) > 0 {
			w.push(w.below...)
		}
	}
}

// left tells of the error of opening something that it is not there any more, or never
// was to be opened.
func left(err error) bool { return gone(err) || turned(err) || errors.Is(err, unix.EXDEV) }
