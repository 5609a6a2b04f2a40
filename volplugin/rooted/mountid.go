package rooted

import (
	"io/fs"

	"golang.org/x/sys/unix"
)

// MountID is the kernel's number of the mount that the descriptor fd was opened
// through, as Dir.MountID.
func MountID(fd int) (int, error) { return mountID(fd) }

// MountIDOf is MountID of a directory by its path. It needs nothing of the file system
// that is mounted there, which may be broken.
func MountIDOf(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	return mountID(fd)
}
