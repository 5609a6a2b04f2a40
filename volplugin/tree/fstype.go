package tree

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// fsType is a file system's magic number.
type fsType int64

const (
	btrfs fsType = unix.BTRFS_SUPER_MAGIC
	xfs   fsType = unix.XFS_SUPER_MAGIC
	ext   fsType = unix.EXT4_SUPER_MAGIC
	tmpfs fsType = unix.TMPFS_MAGIC
	f2fs  fsType = unix.F2FS_SUPER_MAGIC
	nfs   fsType = unix.NFS_SUPER_MAGIC
)

func typeOf(dir *rooted.Dir) (fsType, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(dir.FD(), &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", dir.Path(), err)
	}
	return fsType(uint32(st.Type)), nil
}

// local tells whether the file system does just as it is told with owners and modes, and
// has this machine's clock.
func (t fsType) local() bool {
	return t == btrfs || t == xfs || t == ext || t == tmpfs || t == f2fs
}

// syncs tells whether syncfs puts all on disk. An NFS client does so, and each close
// has done it before.
func (t fsType) syncs() bool { return t.local() || t == nfs }

// copies tells whether copy_file_range does no more than read and write.
func (t fsType) copies() bool { return t == ext || t == tmpfs || t == f2fs }
