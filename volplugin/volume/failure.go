package volume

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// reason drops the path from a file error whose path the message names already.
func reason(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// failed gives an error of the file system the kind that its cause has. Errors
// that have a kind keep it.
func failed(err error) error {
	if err == nil || fault.Kind(err) != "internal" {
		return err
	}
	for _, full := range []error{unix.ENOSPC, unix.EDQUOT} {
		if errors.Is(err, full) {
			return fault.Exhausted("%w", err)
		}
	}
	for _, away := range []error{unix.EIO, unix.ESTALE, unix.EROFS, unix.ETIMEDOUT, unix.EHOSTDOWN, unix.EHOSTUNREACH, unix.ECONNREFUSED, unix.ENOTCONN} {
		if errors.Is(err, away) {
			return fault.Unavailable("%w", err)
		}
	}
	for _, wrong := range []error{rooted.ErrSymlink, rooted.ErrMountPoint, rooted.ErrNotDir} {
		if errors.Is(err, wrong) {
			return fault.Conflict("%w", err)
		}
	}
	return err
}
