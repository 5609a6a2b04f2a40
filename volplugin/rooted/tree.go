package rooted

import (
	"context"
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"
)

// RemoveTree removes name and all below it. It follows no symbolic link and
// stops at a mount point with ErrMountPoint, so nothing is ever deleted through
// a mount. What is missing already is no error, so several hosts may remove the
// same tree. When ctx ends it stops early with ctx's error; a later call goes on.
func (d *Dir) RemoveTree(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := d.Remove(name)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	child, err := d.Dir(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer child.Close()
	names, err := child.Names()
	if err != nil {
		return err
	}
	for _, entry := range names {
		if err := child.RemoveTree(ctx, entry); err != nil {
			return err
		}
	}
	if err := d.Rmdir(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
