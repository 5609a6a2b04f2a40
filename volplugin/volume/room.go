package volume

import (
	"context"
	"errors"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// floorShare is the part of a file system, as one over it, that snapshots and
	// clones leave free, and floorMost the most bytes of it.
	floorShare = 50
	floorMost  = 1 << 30
)

// Space is that of the file system a root is on, in bytes. Total is 0 where the file
// system does not tell.
type Space struct {
	Total, Free uint64
	// Floor is what must be free for snapshots and clones.
	Floor uint64
}

// Low tells whether there is less than the floor.
func (s Space) Low() bool { return s.Total > 0 && s.Free < s.Floor }

// Space asks the root's file system.
func (r *Root) Space() (Space, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(r.top.FD(), &st); err != nil {
		return Space{}, failed(err)
	}
	unit := uint64(st.Frsize)
	if unit == 0 {
		unit = uint64(st.Bsize)
	}
	s := Space{Total: st.Blocks * unit, Free: st.Bavail * unit}
	s.Floor = min(s.Total/floorShare, floorMost)
	return s, nil
}

// MakeRoom sees to it that the root's file system has the free space that snapshots
// and clones need, and deletes from the trash for it, the oldest first. The error is
// exhausted when that is not enough.
func (r *Root) MakeRoom(ctx context.Context) error {
	space, err := r.Space()
	if err != nil || !space.Low() {
		return err
	}
	entries, err := r.Trash(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range slices.Backward(entries) {
		if entry.Err != nil || entry.Record.Phase == Restoring {
			continue
		}
		_, err := r.purge(ctx, entry.Record.UUID)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		errs = append(errs, err)
		if space, err = r.Space(); err != nil || !space.Low() {
			return err
		}
	}
	return errors.Join(fault.Exhausted("%s has %d MiB free of %d MiB, and %d MiB must stay free for what is in the volumes; the trash is empty", r.Path, space.Free>>20, space.Total>>20, space.Floor>>20), errors.Join(errs...))
}
