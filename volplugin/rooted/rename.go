package rooted

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// RenameNew is Rename to a name that must be free: the error wraps fs.ErrExist
// when it is taken, and nothing has changed. On file systems whose rename cannot
// refuse (NFS), a look before it is all there is.
func (d *Dir) RenameNew(name string, to *Dir, newName string) error {
	if err := errors.Join(checkName(name), checkName(newName)); err != nil {
		return d.fail("rename", name, err)
	}
	err := unix.Renameat2(d.FD(), name, to.FD(), newName, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return d.lookAndRename(name, to, newName)
	}
	return d.renamed(name, to, newName, err)
}

func (d *Dir) lookAndRename(name string, to *Dir, newName string) error {
	if _, err := to.Stat(newName); err == nil {
		return d.renamed(name, to, newName, unix.EEXIST)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return d.renamed(name, to, newName, unix.Renameat(d.FD(), name, to.FD(), newName))
}

// Exchange makes two entries of directories on the same file system change places in one
// step. The error wraps errors.ErrUnsupported where the file system cannot.
func (d *Dir) Exchange(name string, to *Dir, newName string) error {
	if err := errors.Join(checkName(name), checkName(newName)); err != nil {
		return d.fail("exchange", name, err)
	}
	err := unix.Renameat2(d.FD(), name, to.FD(), newName, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		err = fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return d.renamed(name, to, newName, err)
}

// renamed words an error so that it tells which of the names is the trouble.
func (d *Dir) renamed(name string, to *Dir, newName string, err error) error {
	if errors.Is(err, fs.ErrExist) {
		return to.fail("rename", newName, err)
	}
	if err != nil {
		return d.fail("rename", name, fmt.Errorf("to %s/%s: %w", to.Path(), newName, err))
	}
	return nil
}
