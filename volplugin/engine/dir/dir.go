// Package dir is the engine for any file system: the data of volume web is the
// directory web in the root. It limits no size and makes no snapshots.
package dir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// defaultMode of new data; dockerd replaces it when it copies an image's content.
const defaultMode = 0o755

// Engine implements engine.Engine. The zero value is ready to use.
type Engine struct{}

var _ engine.Engine = Engine{}

// Name returns "dir".
func (Engine) Name() string { return "dir" }

// Find implements engine.Engine.
func (Engine) Find(root *rooted.Dir, name string) (bool, error) {
	data, err := root.Handle(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, data.Close()
}

// Create implements engine.Engine.
func (e Engine) Create(root *rooted.Dir, name string, attr engine.Attributes) (created bool, err error) {
	// Until its owner and mode are right nobody but root looks inside.
	err = root.Mkdir(name, 0o700)
	created = err == nil
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	if err := prepare(root, name, attr, created); err != nil {
		if created {
			err = errors.Join(err, e.Abandon(root, name))
		}
		return false, err
	}
	return created, nil
}

// prepare sets owner and mode and puts the directory on disk.
func prepare(root *rooted.Dir, name string, attr engine.Attributes, created bool) error {
	asked := attr.UID != nil || attr.GID != nil || attr.Mode != nil
	if !created && !asked {
		handle, err := root.Handle(name)
		if err != nil {
			return err
		}
		return handle.Close()
	}
	data, err := root.Dir(name)
	if err != nil {
		return err
	}
	defer data.Close()
	if attr.UID != nil || attr.GID != nil {
		if err := data.SetOwner(id(attr.UID), id(attr.GID)); err != nil {
			return err
		}
	}
	// After the owner: changing that clears set-ID bits.
	if attr.Mode != nil {
		err = data.SetMode(*attr.Mode)
	} else if created {
		err = data.SetMode(defaultMode)
	}
	return errors.Join(err, data.Sync(), root.Sync())
}

// id is chown's form of an ID.
func id(given *uint32) int {
	if given == nil {
		return -1
	}
	return int(*given)
}

// Abandon implements engine.Engine.
func (Engine) Abandon(root *rooted.Dir, name string) error {
	err := root.Rmdir(name)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTEMPTY), errors.Is(err, fs.ErrExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EBUSY):
		return nil
	}
	return err
}

// Open implements engine.Engine.
func (Engine) Open(root *rooted.Dir, name string) (*rooted.Dir, error) {
	return root.Handle(name)
}

// Retire implements engine.Engine.
func (Engine) Retire(root *rooted.Dir, name string, trash *rooted.Dir, entry string) error {
	// rename(2) would replace an empty directory of that name.
	if _, err := trash.Stat(entry); err == nil {
		return fmt.Errorf("trash entry %s: %w", entry, fs.ErrExist)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	data, err := root.Handle(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer data.Close()
	if err := root.Rename(name, trash, entry); err != nil {
		return err
	}
	return errors.Join(trash.Sync(), root.Sync())
}

// Destroy implements engine.Engine.
func (Engine) Destroy(ctx context.Context, trash *rooted.Dir, entry string) error {
	return trash.RemoveTree(ctx, entry)
}
