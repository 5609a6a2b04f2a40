package presence

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Magic numbers of statfs(2) that x/sys/unix does not have.
const (
	zfsMagic      = 0x2fc12fc1
	bcachefsMagic = 0xca451a4e
)

// Shared tells whether other hosts may reach the file system that dir is on. Of one
// that is not known it says so, since the price is a few small files.
func Shared(dir *rooted.Dir) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(dir.FD(), &st); err != nil {
		return false, fmt.Errorf("file system of %s: %w", dir.Path(), err)
	}
	// 32 bits on all machines, some of which have them signed.
	switch uint32(st.Type) {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC, unix.F2FS_SUPER_MAGIC, unix.OVERLAYFS_SUPER_MAGIC, zfsMagic, bcachefsMagic:
		return false, nil
	}
	return true, nil
}
