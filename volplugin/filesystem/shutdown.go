package filesystem

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// FS_IOC_SHUTDOWN, and how: nothing of what is in memory is written, not even the log.
const (
	shutdownNumber = reads | 4<<16 | 'X'<<8 | 125
	noLogFlush     = 2
)

// Shutdown ends a mounted file system for all who have it, on the spot: what they do
// in it fails with EIO from now on, and nothing that was not on its device yet gets
// there but for what its log holds already. It stays so until the last unmount. The
// error wraps errors.ErrUnsupported where the kernel cannot: btrfs before Linux 6.19.
func Shutdown(fd int) error {
	err := unix.IoctlSetPointerInt(fd, shutdownNumber, noLogFlush)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) {
		err = errors.ErrUnsupported
	}
	if err != nil {
		return fmt.Errorf("shut the file system down: %w", err)
	}
	return nil
}

// IsDown tells whether the file system that is mounted at target for writing, the top
// of it, writes nothing any more, after Shutdown or an error of its device.
func IsDown(target string) (bool, error) {
	fd, err := unix.Open(target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Fsync(fd)
		_ = unix.Close(fd)
	}
	switch {
	case errors.Is(err, unix.EIO), errors.Is(err, unix.EROFS):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("sync %s: %w", target, err)
	}
	return false, nil
}
