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
	counters := make([]counter, workers(0))
	scanners := make([]scanner, len(counters))
	for i := range counters {
		scanners[i] = &counters[i]
	}
	s := &scan{verb: "stat", skip: func(err error) bool { return errors.Is(err, unix.EXDEV) }}
	if err := s.run(ctx, dir, &b, scanners); err != nil {
		return Held{}, err
	}
	var all Held
	for _, c := range counters {
		all.Files += c.Files
		all.Dirs += c.Dirs
		all.Bytes += c.Bytes
	}
	return all, nil
}

type counter struct{ Held }

func (c *counter) enter(int, bool) error {
	c.Dirs++
	return nil
}

// entry counts a file. What else there is needs no call.
func (c *counter) entry(dir int, e entry) (isDir bool, err error) {
	if e.kind != unix.DT_REG && e.kind != unix.DT_UNKNOWN {
		return e.kind == unix.DT_DIR, nil
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, e.name, &st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT); err != nil {
		return false, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		c.Files++
		c.Bytes += uint64(st.Size)
	}
	return st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}
