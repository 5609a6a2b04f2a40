package filesystem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// A Kind of file system, in the words of mount(8) and of option fs.
type Kind string

// Kinds that a volume's file system can be of.
const (
	Btrfs Kind = "btrfs"
	XFS   Kind = "xfs"
	Ext4  Kind = "ext4"
)

// Kinds are all of them, the one with the most abilities first.
var Kinds = []Kind{Btrfs, XFS, Ext4}

// MinSize in bytes that a file system of the kind can be made in, and be resized to.
// mkfs.xfs refuses less than its minimum, the kernel refuses to give a btrfs less than
// 256 MiB; with ext4 less is of no use.
func (k Kind) MinSize() uint64 {
	switch k {
	case Btrfs:
		return 256 << 20
	case XFS:
		return 300 << 20
	default:
		return 16 << 20
	}
}

// ErrUnknown is in the chain of the error about something that holds no file system
// of a known kind.
var ErrUnknown = errors.New("no btrfs, xfs or ext4 file system")

// Info is what a superblock tells.
type Info struct {
	Kind Kind
	UUID uuid.UUID
	// Size in bytes that the file system takes, at most the size of what it is on.
	Size uint64
}

// Places in the superblocks. All are part of on-disk formats that do not change.
const (
	btrfsSuper = 0x10000
	ext4Super  = 1024
	superSize  = 4096
)

// Identify reads the superblock.
func Identify(r io.ReaderAt) (Info, error) {
	head, err := readAt(r, 0)
	if err != nil {
		return Info{}, err
	}
	// mkfs wipes the superblocks of other kinds, but not all of them, always: the one
	// with the place at the very beginning is the newest where two are seen.
	if info, ok := xfsInfo(head); ok {
		return info, nil
	}
	if len(head) > ext4Super {
		if info, ok := ext4Info(head[ext4Super:]); ok {
			return info, nil
		}
	}
	super, err := readAt(r, btrfsSuper)
	if err != nil {
		return Info{}, err
	}
	if info, ok := btrfsInfo(super); ok {
		return info, nil
	}
	return Info{}, ErrUnknown
}

// IdentifyFile is Identify for the image file or block device at path, which must
// not be a symbolic link.
func IdentifyFile(path string) (Info, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return Info{}, err
	}
	defer f.Close()
	info, err := Identify(f)
	if err != nil {
		return Info{}, fmt.Errorf("%s: %w", path, err)
	}
	return info, nil
}

// readAt reads as much of a superblock as there is.
func readAt(r io.ReaderAt, offset int64) ([]byte, error) {
	buf := make([]byte, superSize)
	n, err := r.ReadAt(buf, offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return buf[:n], nil
}

func xfsInfo(b []byte) (Info, bool) {
	if len(b) < 48 || !bytes.Equal(b[:4], []byte("XFSB")) {
		return Info{}, false
	}
	size, ok := product(uint64(binary.BigEndian.Uint32(b[4:])), binary.BigEndian.Uint64(b[8:]))
	return Info{Kind: XFS, UUID: uuid.UUID(b[32:48]), Size: size}, ok
}

func ext4Info(b []byte) (Info, bool) {
	if len(b) < 0x154 || binary.LittleEndian.Uint16(b[0x38:]) != 0xef53 {
		return Info{}, false
	}
	incompat := binary.LittleEndian.Uint32(b[0x60:])
	const extents, wide = 0x40, 0x80
	if incompat&extents == 0 { // ext2 or ext3
		return Info{}, false
	}
	shift := binary.LittleEndian.Uint32(b[0x18:])
	if shift > 6 {
		return Info{}, false
	}
	blocks := uint64(binary.LittleEndian.Uint32(b[4:]))
	if incompat&wide != 0 {
		blocks |= uint64(binary.LittleEndian.Uint32(b[0x150:])) << 32
	}
	size, ok := product(1024<<shift, blocks)
	return Info{Kind: Ext4, UUID: uuid.UUID(b[0x68:0x78]), Size: size}, ok
}

func btrfsInfo(b []byte) (Info, bool) {
	if len(b) < 0x78 || !bytes.Equal(b[0x40:0x48], []byte("_BHRfS_M")) {
		return Info{}, false
	}
	return Info{Kind: Btrfs, UUID: uuid.UUID(b[0x20:0x30]), Size: binary.LittleEndian.Uint64(b[0x70:])}, true
}

// product of a block size and a number of blocks; ok is false when no file system
// can have them.
func product(block, blocks uint64) (size uint64, ok bool) {
	if block == 0 || blocks > 1<<63/block {
		return 0, false
	}
	return block * blocks, true
}
