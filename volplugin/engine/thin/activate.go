package thin

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/filesystem"
)

// activate makes a device of this host, of at least size bytes, of a thin device, and
// starts the pool for it.
func (o *opened) activate(ctx context.Context, id uint32, size uint64, readOnly bool) (node string, err error) {
	release, err := o.turn(ctx)
	if err != nil {
		return "", err
	}
	defer release()
	defer func() {
		if err != nil {
			err = errors.Join(o.explain(err), o.stopPool())
		}
	}()
	pool, _, err := o.startPool(ctx, false)
	if err != nil {
		return "", err
	}
	name := o.deviceName(id)
	table := devmapper.Thin(size/devmapper.SectorSize, pool.Number, id)
	dev, err := o.client.Find(name)
	if err == nil && (!dev.Active || dev.ReadOnly != readOnly) {
		if err := o.client.Remove(name); err != nil {
			return "", err
		}
		err = fs.ErrNotExist
	}
	if missing(err) {
		if err := o.Before(ctx, "device.activate"); err != nil {
			return "", err
		}
		_, err = o.client.Create(name, o.deviceUUID(id), readOnly, table)
		if errors.Is(err, unix.ENODATA) {
			err = fault.Unavailable("thin device %d is missing in the pool of %s: was its metadata repaired, or an old copy put back? %w", id, o.Root.Path(), err)
		}
		if err != nil {
			return "", err
		}
		return o.client.NodePath(name), nil
	}
	if err != nil {
		return "", err
	}
	now, err := o.client.Table(name)
	if err != nil {
		return "", err
	}
	if len(now) != 1 || now[0].Kind != targetThin || now[0].Params != table.Params {
		return "", fault.Conflict("device %s is not thin device %d of the pool", name, id)
	}
	if now[0].Length < table.Length {
		if err := o.client.Load(name, readOnly, table); err != nil {
			return "", err
		}
		if err := o.reload(name); err != nil {
			return "", err
		}
	} else if dev.Suspended {
		if err := o.client.Resume(name); err != nil {
			return "", err
		}
	}
	return o.client.Node(dev)
}

// reload puts a loaded table in the place of the present one.
func (o *opened) reload(name string) error {
	return errors.Join(o.client.Suspend(name), o.client.Resume(name))
}

// deactivate unmounts a device and removes it from this host. It is a conflict when
// somebody uses it, and then it is mounted as before.
func (o *opened) deactivate(id uint32) error {
	target := o.target(id)
	name := o.deviceName(id)
	was, err := o.isMounted(id)
	if err != nil {
		return err
	}
	if was {
		if err := filesystem.Unmount(target); err != nil {
			return err
		}
	}
	err = o.client.Remove(name)
	if errors.Is(err, unix.EBUSY) {
		err = fault.Conflict("thin device %s is in use: %w", name, err)
		if was {
			// A mount of it elsewhere keeps the file system alive: this is one more of it.
			err = errors.Join(err, o.remount(id))
		}
		return err
	}
	if err != nil {
		return err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// remount mounts a file system again that somebody still has mounted.
func (o *opened) remount(id uint32) error {
	name := o.deviceName(id)
	info, err := filesystem.IdentifyFile(o.client.NodePath(name))
	if err != nil {
		return err
	}
	dev, err := o.client.Find(name)
	if err != nil {
		return err
	}
	return filesystem.Mount(o.client.NodePath(name), info.Kind, o.target(id), filesystem.MountOptions{ReadOnly: dev.ReadOnly, Discard: !dev.ReadOnly})
}

// quit stops the pool when nothing is active in it.
func (o *opened) quit(ctx context.Context) error {
	ctx, cancel := undoContext(ctx)
	defer cancel()
	release, err := o.turn(ctx)
	if err != nil {
		return err
	}
	defer release()
	return o.stopPool()
}
