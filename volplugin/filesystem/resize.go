package filesystem

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// ioctl requests that golang.org/x/sys/unix has no names for.
const (
	writes = 1 << 30
	reads  = 2 << 30

	ext4Resize   = writes | 8<<16 | 'f'<<8 | 16
	ext4SetUUID  = writes | 8<<16 | 'f'<<8 | 44
	xfsGeometry  = reads | unsafe.Sizeof(xfsGeom{})<<16 | 'X'<<8 | 100
	xfsGrow      = writes | unsafe.Sizeof(xfsGrowth{})<<16 | 'X'<<8 | 110
	btrfsResize  = writes | unsafe.Sizeof(btrfsArgs{})<<16 | 0x94<<8 | 3
	freezeNumber = reads | writes | 4<<16 | 'X'<<8 | 119
	thawNumber   = reads | writes | 4<<16 | 'X'<<8 | 120
)

// xfsGeom is the kernel's struct xfs_fsop_geom_v1.
type xfsGeom struct {
	BlockSize, _, _, _, _, _, _, InodePercent uint32
	DataBlocks, _, _, _                       uint64
	_                                         [16]byte
	_, _, _, _, _, _, _                       uint32
}

// xfsGrowth is the kernel's struct xfs_growfs_data.
type xfsGrowth struct {
	Blocks       uint64
	InodePercent uint32
}

// btrfsArgs is the kernel's struct btrfs_ioctl_vol_args.
type btrfsArgs struct {
	FD   int64
	Name [4088]byte
}

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

// Grow makes the mounted file system, of which fd is a directory, fill size bytes
// of its device, which has them already. Less than the present size is an error for
// xfs and ext4; the present one is none, so that it can be repeated. It goes on
// while the file system is written. ext4 asks for CAP_SYS_RESOURCE.
func Grow(ctx context.Context, fd int, kind Kind, size uint64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var err error
	switch kind {
	case Btrfs:
		err = btrfsTo(fd, "1:"+strconv.FormatUint(size&^4095, 10))
	case XFS:
		var geom xfsGeom
		if err = ioctl(fd, xfsGeometry, unsafe.Pointer(&geom)); err == nil {
			growth := xfsGrowth{Blocks: size / uint64(geom.BlockSize), InodePercent: geom.InodePercent}
			if growth.Blocks != geom.DataBlocks {
				err = ioctl(fd, xfsGrow, unsafe.Pointer(&growth))
			}
		}
	case Ext4:
		var st unix.Statfs_t
		if err = unix.Fstatfs(fd, &st); err == nil {
			blocks := size / uint64(st.Bsize)
			err = ioctl(fd, ext4Resize, unsafe.Pointer(&blocks))
		}
	default:
		return knownKind(kind)
	}
	if errors.Is(err, unix.EPERM) && kind == Ext4 {
		return fmt.Errorf("grow ext4 file system to %d bytes: berthd lacks CAP_SYS_RESOURCE: %w", size, err)
	}
	if err != nil {
		return fmt.Errorf("grow %s file system to %d bytes: %w", kind, size, err)
	}
	return nil
}

// Shrink makes a mounted file system smaller, so that its device can be cut to size
// bytes. btrfs alone can do that; the error is a conflict for the others, and when
// more than size is in use. It moves data and may take long; ctx ends it, and the
// file system keeps its size.
func Shrink(ctx context.Context, fd int, kind Kind, size uint64) error {
	if kind != Btrfs {
		return fault.Conflict("a %s file system cannot be made smaller; a copy into a new volume can", kind)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = btrfsTo(fd, "1:cancel") })
	err := btrfsTo(fd, "1:"+strconv.FormatUint(size&^4095, 10))
	stop()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, unix.ENOSPC):
		return fault.Conflict("more than %d bytes are in use: %w", size, err)
	case errors.Is(err, unix.EINVAL):
		return fault.Conflict("%d bytes are too few for a btrfs file system: %w", size, err)
	}
	return fmt.Errorf("shrink btrfs file system to %d bytes: %w", size, err)
}

func btrfsTo(fd int, name string) error {
	var args btrfsArgs
	copy(args.Name[:], name)
	return ioctl(fd, btrfsResize, unsafe.Pointer(&args))
}

// SetUUID changes the UUID of a mounted ext4 file system, of which fd is a directory.
// A kernel that cannot (before 6.0) leaves it as it is, without an error, and other
// kinds are left alone: nothing but the host's tools would tell two copies apart by
// it.
func SetUUID(fd int, kind Kind, id uuid.UUID) error {
	if kind != Ext4 {
		return nil
	}
	var arg struct {
		Len, Flags uint32
		UUID       uuid.UUID
	}
	arg.Len, arg.UUID = uint32(len(id)), id
	err := ioctl(fd, ext4SetUUID, unsafe.Pointer(&arg))
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("change UUID of ext4 file system: %w", err)
	}
	return nil
}
