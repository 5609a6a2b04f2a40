package filesystem

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// MountOptions are what Mount can be told.
type MountOptions struct {
	// ReadOnly mounts without replaying the log, for devices that cannot be written: a
	// snapshot is the frozen state itself. It is read-only for everybody who mounts
	// the same device.
	ReadOnly bool
	// Discard returns what is deleted to what is below, a sparse image or a thin pool.
	// Without it a preallocated image keeps its space.
	Discard bool
}

// Mount mounts a block device at the directory target. Access times are kept as on
// other volumes of the host (relatime), so that a program finds the same whatever
// the engine. Set-ID programs and devices work as in an image: what a container may
// do with them is decided where the volume is bound to its path.
func Mount(device string, kind Kind, target string, o MountOptions) error {
	if err := knownKind(kind); err != nil {
		return err
	}
	var flags uintptr
	if o.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	err := unix.Mount(device, target, string(kind), flags, mountData(kind, o))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENODEV):
		return fault.Unavailable("mount %s: this host's kernel has no %s", device, kind)
	case errors.Is(err, unix.EBUSY):
		return fault.Conflict("mount %s: in use by something else on this host: %w", device, err)
	case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EIO), errors.Is(err, unix.EBADMSG):
		return fault.Unavailable("mount %s: the %s file system is damaged, or made by a newer kernel; the host's kernel log says more: %w", device, kind, err)
	}
	return fmt.Errorf("mount %s file system of %s at %s: %w", kind, device, target, err)
}

func mountData(kind Kind, o MountOptions) string {
	var data string
	switch kind {
	case Btrfs:
		// New kernels discard unless they are told not to.
		data = "nodiscard"
		if o.Discard {
			data = "discard=async"
		}
		return data
	case XFS:
		data = "nouuid"
		if o.ReadOnly {
			data += ",norecovery"
		}
	case Ext4:
		// A program that gets an error is better off than one that goes on.
		data = "errors=remount-ro"
		if o.ReadOnly {
			data += ",noload"
		}
	}
	if o.Discard && !o.ReadOnly {
		data += ",discard"
	}
	return data
}

// busyTries and busyPause bound how long Unmount waits for what is in use for a moment
// only.
const (
	busyTries = 50
	busyPause = 10 * time.Millisecond
)

// Unmount is the inverse of Mount. The error is a conflict while something in this
// mount is open or mounted below it; other mounts of the same device do not matter.
// Not mounted is no error.
func Unmount(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	for try := 0; errors.Is(err, unix.EBUSY) && try < busyTries; try++ {
		// A child that another goroutine starts has copies of all this process's
		// descriptors until it runs its program. The lock is not kept, because an
		// unmount writes what is dirty and may take long.
		syscall.ForkLock.RLock()
		syscall.ForkLock.RUnlock() //nolint:staticcheck // empty on purpose
		time.Sleep(busyPause)
		err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	}
	switch {
	case err == nil, errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EBUSY):
		return fault.Conflict("unmount %s: something in it is open or mounted: %w", target, err)
	}
	return fmt.Errorf("unmount %s: %w", target, err)
}
