package volume

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
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
	if errors.Is(err, engine.ErrNoLimit) {
		return fault.Invalid("%w", err)
	}
	for _, wrong := range []error{rooted.ErrSymlink, rooted.ErrMountPoint, rooted.ErrNotDir} {
		if errors.Is(err, wrong) {
			return fault.Conflict("%w", err)
		}
	}
	return err
}

// absent is a text about what is not there, with the reason to be found by errors.Is.
type absent struct {
	text string
	what error
}

func (a absent) Error() string { return a.text }
func (a absent) Unwrap() error { return a.what }

// noVolume says that a volume was looked for and is not there.
func (r *Root) noVolume(name string) error {
	return fault.NotFound("%w", absent{"volume " + name + " does not exist in " + r.Path, ErrNoRecord})
}

// noSnapshot says the same of a snapshot.
func noSnapshot(volume, name string) error {
	return fault.NotFound("%w", absent{"volume " + volume + " has no snapshot " + name, ErrNoSnapshot})
}
