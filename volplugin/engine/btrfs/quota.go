package btrfs

import (
	"context"
	"encoding/binary"
	"errors"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

const (
	quotaTree = 8

	statusKind = 240
	infoKind   = 242
	limitKind  = 244

	statusRescan       = 1 << 1
	statusInconsistent = 1 << 2
	statusSimple       = 1 << 3

	quotaEnable = 1
	// limitReferenced says that a limit on referenced bytes is meant, and in the quota
	// tree that there is one.
	limitReferenced = 1 << 0
	// noLimit takes a limit away.
	noLimit = ^uint64(0)

	pollTime = 100 * time.Millisecond
)

// quotaStatus tells whether quotas are on, and their flags.
func quotaStatus(dir *rooted.Dir) (on bool, flags uint64, err error) {
	items, err := search(dir.FD(), quotaTree, 0, statusKind, 0, 0)
	if err != nil || len(items) == 0 {
		return false, 0, err
	}
	if len(items[0].data) < 24 {
		return false, 0, errItems
	}
	return true, binary.LittleEndian.Uint64(items[0].data[16:]), nil
}

// enableQuotas switches quotas on where they are off, and waits until all that is
// there is counted.
func enableQuotas(ctx context.Context, dir *rooted.Dir) error {
	on, flags, err := quotaStatus(dir)
	if err != nil {
		return err
	}
	if !on {
		args := [2]uint64{quotaEnable, 0}
		if err := ioctl(dir.FD(), quotaControl, unsafe.Pointer(&args)); err != nil {
			return fail("switch quotas on for", dir.Path(), err)
		}
		return waitForScan(ctx, dir)
	}
	if err := recount(dir, flags); err != nil {
		return err
	}
	return waitForScan(ctx, dir)
}

// recount starts the counting of all there is when the kernel has given it up.
func recount(dir *rooted.Dir, flags uint64) error {
	if flags&statusInconsistent == 0 || flags&(statusRescan|statusSimple) != 0 {
		return nil
	}
	var args [8]uint64
	err := ioctl(dir.FD(), quotaRescan, unsafe.Pointer(&args))
	if errors.Is(err, unix.EINPROGRESS) {
		return nil
	}
	return fail("count quotas of", dir.Path(), err)
}

func waitForScan(ctx context.Context, dir *rooted.Dir) error {
	for wait := time.Millisecond; ; wait = min(2*wait, pollTime) {
		var args [8]uint64
		if err := ioctl(dir.FD(), rescanStatus, unsafe.Pointer(&args)); err != nil {
			return fail("count quotas of", dir.Path(), err)
		}
		if args[0] == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fault.Unavailable("btrfs is counting, once, what all subvolumes of the file system use; try again when it has: %w", ctx.Err())
		case <-time.After(wait):
		}
	}
}

// setLimit sets the limit of a subvolume, 0 for none. Quotas are on.
func setLimit(dir *rooted.Dir, id, size uint64) error {
	args := limitArgs{qgroup: id, flags: limitReferenced, maxReferenced: size}
	if size == 0 {
		args.maxReferenced = noLimit
	}
	err := ioctl(dir.FD(), qgroupLimit, unsafe.Pointer(&args))
	if errors.Is(err, unix.ENOENT) {
		create := [2]uint64{1, id}
		if err := ioctl(dir.FD(), qgroupCreate, unsafe.Pointer(&create)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fail("create the quota group of", dir.Path(), err)
		}
		err = ioctl(dir.FD(), qgroupLimit, unsafe.Pointer(&args))
	}
	return fail("limit", dir.Path(), err)
}

// A quota is what the file system knows of a subvolume's use, in bytes.
type quota struct{ referenced, exclusive, limit uint64 }

// readQuota reads the quota group of a subvolume. known is false when there is none, or
// none that is right.
func readQuota(dir *rooted.Dir, id uint64) (q quota, known bool, err error) {
	on, flags, err := quotaStatus(dir)
	if err != nil || !on {
		return quota{}, false, err
	}
	limits, err := search(dir.FD(), quotaTree, 0, limitKind, id, id)
	if err != nil {
		return quota{}, false, err
	}
	if len(limits) > 0 {
		if q.limit, err = parseLimit(limits[0].data); err != nil {
			return quota{}, false, err
		}
	}
	if flags&(statusInconsistent|statusRescan) != 0 {
		return q, false, recount(dir, flags)
	}
	infos, err := search(dir.FD(), quotaTree, 0, infoKind, id, id)
	if err != nil || len(infos) == 0 {
		return q, false, err
	}
	if len(infos[0].data) < 40 { // struct btrfs_qgroup_info_item
		return quota{}, false, errItems
	}
	q.referenced = binary.LittleEndian.Uint64(infos[0].data[8:])
	q.exclusive = binary.LittleEndian.Uint64(infos[0].data[24:])
	return q, true, nil
}

// parseLimit reads struct btrfs_qgroup_limit_item.
func parseLimit(data []byte) (uint64, error) {
	if len(data) < 40 {
		return 0, errItems
	}
	if binary.LittleEndian.Uint64(data)&limitReferenced == 0 {
		return 0, nil
	}
	return binary.LittleEndian.Uint64(data[8:]), nil
}

// dropQgroup removes the quota group of a subvolume that was deleted. Kernels refuse
// that until its blocks are free. Those since 6.11 remove it themselves then; with older ones
// it goes at the next deletion of any subvolume after that.
func dropQgroup(dir *rooted.Dir, id uint64) error {
	on, _, err := quotaStatus(dir)
	if err != nil || !on {
		return err
	}
	stale, err := staleQgroups(dir, id)
	if err != nil {
		return err
	}
	for _, group := range append(stale, id) {
		args := [2]uint64{0, group}
		err := ioctl(dir.FD(), qgroupCreate, unsafe.Pointer(&args))
		switch {
		case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOTCONN), errors.Is(err, unix.EINVAL):
		default:
			return fail("remove the quota group of a subvolume in", dir.Path(), err)
		}
	}
	return nil
}

// staleQgroups lists the quota groups of subvolumes that are gone with all their blocks.
// IDs only grow: below one that was deleted nothing is in the making.
func staleQgroups(dir *rooted.Dir, below uint64) ([]uint64, error) {
	if below <= firstID {
		return nil, nil
	}
	infos, err := search(dir.FD(), quotaTree, 0, infoKind, firstID, below-1)
	if err != nil {
		return nil, err
	}
	var stale []uint64
	for _, info := range infos {
		if len(info.data) < 40 {
			return nil, errItems
		}
		// An empty subvolume has a block, too.
		if binary.LittleEndian.Uint64(info.data[8:]) != 0 || binary.LittleEndian.Uint64(info.data[24:]) != 0 {
			continue
		}
		roots, err := search(dir.FD(), rootTree, info.offset, rootItemKind, 0, ^uint64(0))
		if err != nil {
			return nil, err
		}
		if len(roots) == 0 {
			stale = append(stale, info.offset)
		}
	}
	return stale, nil
}
