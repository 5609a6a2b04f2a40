package thin

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// takeOver gives existing data the attributes that were asked for.
func (o *opened) takeOver(ctx context.Context, v engine.Volume, ptr pointer, attr engine.Attributes) error {
	if ptr.Volume != v.UUID {
		ptr.Volume = v.UUID
		if err := o.Before(ctx, "volume.adopt"); err != nil {
			return err
		}
		if err := o.replaceFile(o.volumes, v.Name+suffix, ptr); err != nil {
			return err
		}
	}
	if attr.UID == nil && attr.GID == nil && attr.Mode == nil {
		return nil
	}
	was, err := o.isMounted(ptr.Device)
	if err != nil {
		return err
	}
	top, err := o.mount(ctx, ptr, false)
	if err != nil {
		return err
	}
	err = setAttributes(top, attr, false)
	if err := errors.Join(err, top.Close()); err != nil || was {
		return err
	}
	return errors.Join(o.deactivate(ptr.Device), o.quit(ctx))
}

// format makes the file system of a new volume, with its data directory.
func (o *opened) format(ctx context.Context, ptr pointer, v engine.Volume, attr engine.Attributes) error {
	node, err := o.activate(ctx, ptr.Device, ptr.Size, false)
	if err != nil {
		return err
	}
	if err := o.Before(ctx, "device.format"); err != nil {
		return err
	}
	// A new device reads as zeros: the pool clears blocks when it hands them out.
	if err := filesystem.Make(ctx, ptr.FS, node, filesystem.MakeOptions{Label: v.Name, Zeroed: true}); err != nil {
		return err
	}
	top, err := o.mount(ctx, ptr, false)
	if err != nil {
		return err
	}
	err = makeData(top, v.NoCOW && ptr.FS == filesystem.Btrfs, attr)
	if err == nil {
		err = unix.Syncfs(top.FD())
	}
	if err := errors.Join(err, top.Close()); err != nil {
		return err
	}
	return o.deactivate(ptr.Device)
}

func makeData(top *rooted.Dir, noCOW bool, attr engine.Attributes) error {
	if err := top.Mkdir(filesystem.DataName, 0o700); err != nil {
		return err
	}
	if noCOW {
		data, err := top.Dir(filesystem.DataName)
		if err != nil {
			return err
		}
		defer data.Close()
		flags, err := unix.IoctlGetInt(data.FD(), unix.FS_IOC_GETFLAGS)
		if err == nil {
			err = unix.IoctlSetPointerInt(data.FD(), unix.FS_IOC_SETFLAGS, flags|noCOWFlag)
		}
		if err != nil {
			return fmt.Errorf("turn off copy on write: %w", err)
		}
	}
	return setAttributes(top, attr, true)
}

// setAttributes sets owner and mode of the data.
func setAttributes(top *rooted.Dir, attr engine.Attributes, created bool) error {
	data, err := top.Dir(filesystem.DataName)
	if err != nil {
		return err
	}
	defer data.Close()
	return attr.Set(data, created)
}

// isEmpty looks into a volume.
func (o *opened) isEmpty(ctx context.Context, ptr pointer) (bool, error) {
	was, err := o.isMounted(ptr.Device)
	if err != nil {
		return false, err
	}
	top, err := o.mount(ctx, ptr, false)
	if err != nil {
		return false, err
	}
	empty := false
	data, err := top.Dir(filesystem.DataName)
	if err == nil {
		empty, err = data.Empty()
		err = errors.Join(err, data.Close())
	}
	err = errors.Join(err, top.Close())
	if !was {
		err = errors.Join(err, o.deactivate(ptr.Device), o.quit(ctx))
	}
	return empty, err
}
