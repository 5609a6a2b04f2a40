package quota

import (
	"errors"
	"os"
	"strings"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// fsxattr of linux/fs.h.
type fsxattr struct {
	flags   uint32
	_       [2]uint32 // extent size hint, number of extents
	project uint32
	_       [3]uint32 // copy-on-write extent size hint, padding
}

const (
	fsGetXattr  = 0x801c581f // FS_IOC_FSGETXATTR
	fsSetXattr  = 0x401c5820 // FS_IOC_FSSETXATTR
	flagInherit = 0x200      // FS_XFLAG_PROJINHERIT
)

func getAttr(fd int) (fsxattr, error) {
	var attr fsxattr
	return attr, ioctl(fd, fsGetXattr, unsafe.Pointer(&attr))
}

func setAttr(fd int, attr fsxattr) error { return ioctl(fd, fsSetXattr, unsafe.Pointer(&attr)) }

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// Commands of quotactl(2), of linux/quota.h and linux/dqblk_xfs.h. The general ones
// work on xfs as well.
const (
	getQuota   = 0x800007 // Q_GETQUOTA
	setQuota   = 0x800008 // Q_SETQUOTA
	getStatus  = 0x5808   // Q_XGETQSTATV
	ofProjects = 2        // PRJQUOTA

	statusVersion = 1
	// XFS_QUOTA_PDQ_ACCT and XFS_QUOTA_PDQ_ENFD: counted and enforced.
	statusOn = 1<<4 | 1<<5
)

// dqblk is struct if_dqblk.
type dqblk struct {
	// Limits in blocks of 1024 bytes, space in bytes.
	hardBlocks, softBlocks, space    uint64
	hardInodes, softInodes, inodes   uint64
	blocksGraceTime, inodesGraceTime uint64
	valid                            uint32
	_                                uint32
}

const (
	blockSize   = 1024
	validLimits = 1 // QIF_BLIMITS
)

// enforced tells whether the file system counts projects and stops them.
func enforced(fd int) (bool, error) {
	// struct fs_quota_statv: version, padding, flags, and more of no interest.
	var status struct {
		version uint8
		_       uint8
		flags   uint16
		_       [252]uint8
	}
	status.version = statusVersion
	err := quotactl(fd, getStatus, 0, unsafe.Pointer(&status))
	return status.flags&statusOn == statusOn, err
}

func get(fd int, project uint32) (Usage, error) {
	var q dqblk
	err := quotactl(fd, getQuota, project, unsafe.Pointer(&q))
	if errors.Is(err, unix.ENOENT) {
		return Usage{}, nil
	}
	return Usage{Bytes: q.space, Files: q.inodes, Limit: q.hardBlocks * blockSize}, err
}

func setLimit(fd int, project uint32, size uint64) error {
	q := dqblk{hardBlocks: (size + blockSize - 1) / blockSize, valid: validLimits}
	return quotactl(fd, setQuota, project, unsafe.Pointer(&q))
}

// quotactl commands the file system that fd is on.
func quotactl(fd int, command uintptr, id uint32, arg unsafe.Pointer) error {
	command = command<<8 | ofProjects
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, uintptr(fd), command, uintptr(id), uintptr(arg), 0, 0)
	if errno == unix.ENOSYS {
		return quotactlByDevice(fd, command, id, arg)
	}
	if errno != 0 {
		return errno
	}
	return nil
}

// quotactlByDevice is quotactl for kernels before 5.14. It needs the device's node. A kernel
// without quotas says ENOSYS to both.
func quotactlByDevice(fd int, command uintptr, id uint32, arg unsafe.Pointer) error {
	device, err := deviceOf(fd)
	if err != nil {
		return err
	}
	path, err := unix.BytePtrFromString(device)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall6(unix.SYS_QUOTACTL, command, uintptr(unsafe.Pointer(path)), uintptr(id), uintptr(arg), 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func deviceOf(fd int) (string, error) {
	mount, err := rooted.MountID(fd)
	if err != nil {
		return "", err
	}
	mounts, err := mountinfo.GetMounts(func(info *mountinfo.Info) (skip, stop bool) { return info.ID != mount, info.ID == mount })
	if err != nil {
		return "", err
	}
	if len(mounts) == 0 || !strings.HasPrefix(mounts[0].Source, "/") {
		return "", unix.EOPNOTSUPP
	}
	if _, err := os.Stat(mounts[0].Source); err != nil {
		return "", unix.EOPNOTSUPP
	}
	return mounts[0].Source, nil
}
