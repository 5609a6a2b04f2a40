package tree

import (
	"context"
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
	m := &measure{mount: b.mount, seen: map[inode]struct{}{}}
	sizers := make([]sizer, workers(0))
	scanners := make([]scanner, len(sizers))
	for i := range sizers {
		sizers[i].measure = m
		scanners[i] = &sizers[i]
	}
	s := &scan{verb: "stat", skip: left}
	if err := s.run(ctx, dir, &b, scanners); err != nil {
		return Usage{}, err
	}
	var all Usage
	for _, s := range sizers {
		all.Bytes += s.sum.Bytes
		all.Files += s.sum.Files
	}
	return all, nil
}

// A measure is what the workers of one Size have in common.
type measure struct {
	mount int

	seenMu sync.Mutex
	seen   map[inode]struct{} // of files with several names
}

type sizer struct {
	*measure
	sum Usage
}

func (s *sizer) enter(fd int, top bool) error {
	err := s.one(fd, "", unix.AT_EMPTY_PATH)
	if !top && gone(err) {
		return nil
	}
	return err
}

func (s *sizer) entry(dir int, e entry) (isDir bool, err error) {
	if e.kind == unix.DT_UNKNOWN {
		e.kind = kind(dir, e.name)
	}
	if e.kind == unix.DT_DIR {
		return true, nil
	}
	if err := s.one(dir, e.name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT); err != nil && !gone(err) {
		return false, err
	}
	return false, nil
}

// kind of an entry where the directory does not tell.
func kind(dir int, name string) byte {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return unix.DT_UNKNOWN // the next call tells why
	}
	return byte(st.Mode & unix.S_IFMT >> 12)
}

// one adds a file.
func (s *sizer) one(dir int, name string, flags int) error {
	var st unix.Statx_t
	if err := unix.Statx(dir, name, flags, unix.STATX_TYPE|unix.STATX_NLINK|unix.STATX_INO|unix.STATX_BLOCKS|unix.STATX_BTIME|unix.STATX_MNT_ID, &st); err != nil {
		return err
	}
	if st.Mask&unix.STATX_MNT_ID != 0 && int(st.Mnt_id) != s.mount {
		return nil
	}
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		key := keyOf(&st)
		s.seenMu.Lock()
		_, seen := s.seen[key]
		s.seen[key] = struct{}{}
		s.seenMu.Unlock()
		if seen {
			return nil
		}
	}
	s.sum.Files++
	s.sum.Bytes += st.Blocks * 512
	return nil
}
