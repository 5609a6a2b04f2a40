package tree

import (
	"context"
	"errors"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Usage of a tree.
type Usage struct {
	// Bytes that the file system has allocated, those of directories included.
	Bytes uint64
	// Files counts inodes, directories and the top among them.
	Files uint64
}

// Size adds up what is in dir. Files with several names count once. What is
// mounted below does not count, and neither does what comes or goes meanwhile.
func Size(ctx context.Context, dir *rooted.Dir) (Usage, error) {
	b := newBeneath(dir)
	s := &sizer{path: dir.Path(), mount: b.mount, seen: map[inode]struct{}{}}
	do := make([]func(*node) error, workers(0))
	for i := range do {
		w := &sizeWorker{sizer: s, lane: lane{beneath: &b, top: dir.FD()}}
		defer w.drop()
		s.sums = append(s.sums, &w.sum)
		do[i] = w.do
	}
	if err := run(ctx, &node{}, do, &s.pool); err != nil {
		return Usage{}, err
	}
	var all Usage
	for _, sum := range s.sums {
		all.Bytes += sum.Bytes
		all.Files += sum.Files
	}
	return all, nil
}

type sizer struct {
	pool[*node]
	path  string
	mount int
	sums  []*Usage // of each worker

	seenMu sync.Mutex
	seen   map[inode]struct{} // of files with several names
}

type sizeWorker struct {
	*sizer
	lane
	sum     Usage
	names   [64 << 10]byte
	entries []entry
	below   []*node
}

func (w *sizeWorker) do(n *node) error {
	fd, err := w.open(n)
	if err == nil {
		defer w.keep(n, fd)
		err = w.one(fd, "", unix.AT_EMPTY_PATH)
	}
	if err != nil {
		if n.parent != nil && (gone(err) || turned(err) || errors.Is(err, unix.EXDEV)) {
			return nil
		}
		return failure("open", w.path, n.path(), err)
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
			if e.kind == unix.DT_UNKNOWN {
				e.kind = w.kind(fd, e.name)
			}
			if e.kind == unix.DT_DIR {
				w.below = append(w.below, &node{parent: n, name: e.name})
				continue
			}
			if err := w.one(fd, e.name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT); err != nil && !gone(err) {
				return failure("stat", w.path, join(n.path(), e.name), err)
			}
		}
		if len(w.below) > 0 {
			w.push(w.below...)
		}
	}
}

// kind of an entry where the directory does not tell.
func (w *sizeWorker) kind(dir int, name string) byte {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return unix.DT_UNKNOWN // the next call tells why
	}
	return byte(st.Mode & unix.S_IFMT >> 12)
}

// one adds a file.
func (w *sizeWorker) one(dir int, name string, flags int) error {
	var st unix.Statx_t
	if err := unix.Statx(dir, name, flags, unix.STATX_TYPE|unix.STATX_NLINK|unix.STATX_INO|unix.STATX_BLOCKS|unix.STATX_BTIME|unix.STATX_MNT_ID, &st); err != nil {
		return err
	}
	if st.Mask&unix.STATX_MNT_ID != 0 && int(st.Mnt_id) != w.mount {
		return nil
	}
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		key := keyOf(&st)
		w.seenMu.Lock()
		_, seen := w.seen[key]
		w.seen[key] = struct{}{}
		w.seenMu.Unlock()
		if seen {
			return nil
		}
	}
	w.sum.Files++
	w.sum.Bytes += st.Blocks * 512
	return nil
}
