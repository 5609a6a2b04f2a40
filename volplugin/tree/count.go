package tree

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Held is what a tree holds for whoever stores it name by name.
type Held struct {
	// Files are the names of regular files, those of one inode counted each; Dirs are
	// the directories, the top among them.
	Files, Dirs uint64
	// Bytes are the sizes of the files, holes included.
	Bytes uint64
}

// Count adds up what dir holds. Links are not followed and what is mounted below is left
// out. Nobody may change the tree meanwhile: an entry that is gone is an error.
func Count(ctx context.Context, dir *rooted.Dir) (Held, error) {
	b := newBeneath(dir)
	c := &counter{path: dir.Path()}
	do := make([]func(*node) error, workers(0))
	sums := make([]countWorker, len(do))
	for i := range do {
		w := &sums[i]
		w.counter, w.lane = c, lane{beneath: &b, top: dir.FD()}
		defer w.drop()
		do[i] = w.dir
	}
	if err := run(ctx, &node{}, do, &c.pool); err != nil {
		return Held{}, err
	}
	var all Held
	for i := range sums {
		all.Files += sums[i].sum.Files
		all.Dirs += sums[i].sum.Dirs
		all.Bytes += sums[i].sum.Bytes
	}
	return all, nil
}

type counter struct {
	pool[*node]
	path string
}

type countWorker struct {
	*counter
	lane
	sum     Held
	names   [64 << 10]byte
	entries []entry
	below   []*node
}

func (w *countWorker) dir(n *node) error {
	fd, err := w.open(n)
	if errors.Is(err, unix.EXDEV) && n.parent != nil {
		return nil
	}
	if err != nil {
		return failure("open", w.path, n.path(), err)
	}
	defer w.keep(n, fd)
	w.sum.Dirs++
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
			if err := w.entry(n, fd, e); err != nil {
				return failure("stat", w.path, join(n.path(), e.name), err)
			}
		}
		if len(w.below) > 0 {
			w.push(w.below...)
		}
	}
}

// entry counts a file and puts a directory on the list. What else there is needs no call.
func (w *countWorker) entry(n *node, dir int, e entry) error {
	switch e.kind {
	case unix.DT_DIR:
		w.below = append(w.below, &node{parent: n, name: e.name})
		return nil
	case unix.DT_REG, unix.DT_UNKNOWN:
	default:
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, e.name, &st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		w.sum.Files++
		w.sum.Bytes += uint64(st.Size)
	case unix.S_IFDIR:
		w.below = append(w.below, &node{parent: n, name: e.name})
	}
	return nil
}
