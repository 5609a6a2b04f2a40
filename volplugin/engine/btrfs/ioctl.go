package btrfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests of linux/btrfs.h, with the directions as most architectures number them
// (not mips, powerpc and sparc).
const (
	write, read = 1 << 30, 2 << 30

	subvolCreate  = write | 4096<<16 | 0x94<<8 | 14
	snapDestroy   = write | 4096<<16 | 0x94<<8 | 15
	treeSearch    = write | read | 4096<<16 | 0x94<<8 | 17
	treeSearchV2  = write | read | 112<<16 | 0x94<<8 | 17
	inoLookup     = write | read | 4096<<16 | 0x94<<8 | 18
	snapCreateV2  = write | 4096<<16 | 0x94<<8 | 23
	subvolGet     = read | 8<<16 | 0x94<<8 | 25
	subvolSet     = write | 8<<16 | 0x94<<8 | 26
	fsInfo        = read | 1024<<16 | 0x94<<8 | 31
	quotaControl  = write | read | 16<<16 | 0x94<<8 | 40
	qgroupCreate  = write | 16<<16 | 0x94<<8 | 42
	qgroupLimit   = read | 48<<16 | 0x94<<8 | 43
	quotaRescan   = write | 64<<16 | 0x94<<8 | 44
	rescanStatus  = read | 64<<16 | 0x94<<8 | 45
	getSubvolInfo = read | 504<<16 | 0x94<<8 | 60
	snapDestroyV2 = write | 4096<<16 | 0x94<<8 | 63
)

// Flags of requests.
const (
	readOnlyFlag = 1 << 1 // BTRFS_SUBVOL_RDONLY
	byIDFlag     = 1 << 4 // BTRFS_SUBVOL_SPEC_BY_ID
)

// nameArgs is struct btrfs_ioctl_vol_args.
type nameArgs struct {
	fd   int64
	name [4088]byte
}

// volumeArgs is struct btrfs_ioctl_vol_args_v2.
type volumeArgs struct {
	fd, transid, flags uint64
	_                  [4]uint64
	name               [4040]byte // or the subvolume's ID
}

// lookupArgs is struct btrfs_ioctl_ino_lookup_args.
type lookupArgs struct {
	tree, object uint64
	name         [4080]byte
}

// searchArgs is struct btrfs_ioctl_search_args.
type searchArgs struct {
	key    searchKey
	buffer [4096 - 104]byte
}

// bigSearchArgs is struct btrfs_ioctl_search_args_v2, with a buffer for all of a small tree.
type bigSearchArgs struct {
	key    searchKey
	size   uint64
	buffer [2 * smallTree]byte
}

// searchKey is struct btrfs_ioctl_search_key.
type searchKey struct {
	tree                                       uint64
	minObject, maxObject, minOffset, maxOffset uint64
	minTransid, maxTransid                     uint64
	minType, maxType, items, _                 uint32
	_                                          [4]uint64
}

// limitArgs is struct btrfs_ioctl_qgroup_limit_args.
type limitArgs struct {
	qgroup, flags, maxReferenced, maxExclusive, _, _ uint64
}

// subvolumeInfo is struct btrfs_ioctl_get_subvol_info_args.
type subvolumeInfo struct {
	id                                     uint64
	_                                      [256]byte // its name
	_, _                                   uint64    // where it is
	generation, flags                      uint64
	uuid, parent, received                 [16]byte
	ctransid, otransid, stransid, rtransid uint64
	ctime, otime, stime, rtime             timespec
	_                                      [8]uint64
}

// timespec is struct btrfs_ioctl_timespec.
type timespec struct {
	seconds        uint64
	nanoseconds, _ uint32
}

// fileSystemInfo is struct btrfs_ioctl_fs_info_args.
type fileSystemInfo struct {
	_, _ uint64 // devices
	id   [16]byte
	_    [992]byte
}

// ioctl makes a request. arg points to its argument.
func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return errno
		}
	}
}

// fill puts a name into an argument, with a zero byte after it.
func fill(field []byte, name string) error {
	if len(name) >= len(field) {
		return unix.ENAMETOOLONG
	}
	copy(field, name)
	return nil
}

// An item of a B-tree.
type item struct {
	object, offset uint64
	kind           uint32
	data           []byte
}

// errItems says that the kernel's answer to a search makes no sense.
var errItems = errors.New("btrfs: malformed items")

// parseItems reads n items as TREE_SEARCH answers them.
func parseItems(buffer []byte, n uint32) ([]item, error) {
	var items []item
	for range n {
		if len(buffer) < 32 {
			return nil, errItems
		}
		found := item{
			object: binary.NativeEndian.Uint64(buffer[8:]),
			offset: binary.NativeEndian.Uint64(buffer[16:]),
			kind:   binary.NativeEndian.Uint32(buffer[24:]),
		}
		size := binary.NativeEndian.Uint32(buffer[28:])
		buffer = buffer[32:]
		if uint64(size) > uint64(len(buffer)) {
			return nil, errItems
		}
		found.data, buffer = buffer[:size], buffer[size:]
		items = append(items, found)
	}
	return items, nil
}

// search gives the items of one object and kind in a tree, with offsets from first to
// last. Nothing is found in a tree that does not exist.
func search(fd int, tree, object uint64, kind uint32, first, last uint64) ([]item, error) {
	var all []item
	for {
		args := searchArgs{key: searchKey{
			tree: tree, minObject: object, maxObject: object, minOffset: first, maxOffset: last,
			maxTransid: ^uint64(0), minType: kind, maxType: kind, items: 128,
		}}
		err := ioctl(fd, treeSearch, unsafe.Pointer(&args))
		if errors.Is(err, unix.ENOENT) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("btrfs: search tree %d: %w", tree, err)
		}
		items, err := parseItems(args.buffer[:], args.key.items)
		if err != nil || len(items) == 0 {
			return all, err
		}
		all = append(all, items...)
		if first = items[len(items)-1].offset; first >= last {
			return all, nil
		}
		first++
	}
}
