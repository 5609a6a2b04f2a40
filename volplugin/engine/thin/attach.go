package thin

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// mount activates a device and mounts it on this host, where it is not yet, and
// gives its top directory.
func (o *opened) mount(ctx context.Context, ptr pointer, readOnly bool) (_ *rooted.Dir, err error) {
	if err := o.bury(ptr.Device); err != nil {
		return nil, err
	}
	node, err := o.activate(ctx, ptr.Device, ptr.Size, readOnly)
	if err != nil {
		return nil, err
	}
	mounted, err := o.isMounted(ptr.Device)
	if err != nil {
		return nil, err
	}
	if !mounted {
		target, err := o.makeTarget(ptr.Device)
		if err != nil {
			return nil, err
		}
		if err := filesystem.Mount(node, ptr.FS, target, filesystem.MountOptions{ReadOnly: readOnly, Discard: !readOnly}); err != nil {
			return nil, err
		}
		if ptr.FS == filesystem.XFS && !readOnly {
			o.boundRetries(ptr.Device)
		}
	}
	top, err := rooted.Open(o.target(ptr.Device))
	if err != nil {
		return nil, err
	}
	if ptr.Grow && !readOnly {
		if err := filesystem.Grow(ctx, top.FD(), ptr.FS, ptr.Size); err != nil {
			return nil, errors.Join(err, top.Close())
		}
	}
	return top, nil
}

// retryLimit in seconds is how long xfs tries to write metadata that the pool has no
// room for.
const retryLimit = "30"

// boundRetries makes xfs give up after retryLimit. It would go on for ever otherwise,
// and whoever writes would wait with it. It is no reason to refuse the volume when
// that cannot be set.
func (o *opened) boundRetries(id uint32) {
	dev, err := o.client.Find(o.deviceName(id))
	if err != nil {
		return
	}
	link, err := os.Readlink(filepath.Join("/sys/dev/block", dev.Number.String()))
	if err != nil {
		return
	}
	name := filepath.Base(link)
	if err := writeRetries("/sys", name); !errors.Is(err, unix.EROFS) {
		return
	}
	// A plugin's /sys cannot be written. It is another mount of the same thing.
	own, err := os.MkdirTemp(o.Local, ".sys-")
	if err != nil {
		return
	}
	defer func() { _ = os.Remove(own) }()
	if err := unix.Mount("sysfs", own, "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil { //nolint:forbidigo // no volume's
		return
	}
	defer func() { _ = unix.Unmount(own, unix.MNT_DETACH) }() //nolint:forbidigo // see above
	_ = writeRetries(own, name)
}

func writeRetries(sys, device string) error {
	for _, kind := range []string{"ENOSPC", "EIO", "default"} {
		path := filepath.Join(sys, "fs/xfs", device, "error/metadata", kind, "retry_timeout_seconds")
		if err := os.WriteFile(path, []byte(retryLimit), 0); err != nil {
			return err
		}
	}
	return nil
}

// Attach implements engine.Engine.
func (e *Engine) Attach(ctx context.Context, p engine.Place, v engine.Volume) error {
	o, ptr, err := e.openVolume(ctx, p, v.Name)
	if err != nil {
		return err
	}
	defer o.close()
	top, err := o.mount(ctx, ptr, false)
	if err != nil {
		return errors.Join(err, o.deactivateUnused(ctx, ptr.Device))
	}
	defer top.Close()
	if ptr.Fresh || ptr.Grow {
		ptr.Fresh, ptr.Grow = false, false
		return o.replaceFile(o.volumes, v.Name+suffix, ptr)
	}
	return nil
}

// deactivateUnused removes a device again that could not be mounted.
func (o *opened) deactivateUnused(ctx context.Context, id uint32) error {
	mounted, err := o.isMounted(id)
	if err != nil || mounted {
		return err
	}
	if dev, err := o.client.Find(o.deviceName(id)); err != nil || dev.Opened > 0 {
		return nil //nolint:nilerr // it is not there, or in use
	}
	return errors.Join(o.deactivate(id), o.quit(ctx))
}

// Detach implements engine.Engine. A volume in the trash is detached too.
func (e *Engine) Detach(ctx context.Context, p engine.Place, v engine.Volume) error {
	o, err := e.open(ctx, p, false)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer o.close()
	ptr, err := o.volume(ctx, v.Name)
	if missing(err) || err == nil && ptr.Volume != v.UUID {
		ptr, err = o.load(ctx, o.Trash, v.UUID)
	}
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := o.detach(ctx, ptr.Device); err != nil {
		return err
	}
	_ = o.settle(ctx, v.UUID) // nothing of the volume stays active
	return nil
}

func (o *opened) detach(ctx context.Context, id uint32) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return errors.Join(o.deactivate(id), o.quit(ctx))
}

// Open implements engine.Engine.
func (e *Engine) Open(p engine.Place, v engine.Volume) (*rooted.Dir, error) {
	o, ptr, err := e.openVolume(context.Background(), p, v.Name) // reads two small files
	if err != nil {
		return nil, err
	}
	defer o.close()
	return o.data(ptr.Device, v.Name)
}

// data opens the data directory of a device that is mounted.
func (o *opened) data(id uint32, what string) (*rooted.Dir, error) {
	mounted, err := o.isMounted(id)
	if err != nil {
		return nil, err
	}
	if !mounted {
		return nil, fault.Unavailable("thin volume %s is not attached", what)
	}
	top, err := rooted.Open(o.target(id))
	if err != nil {
		return nil, err
	}
	defer top.Close()
	return top.Handle(filesystem.DataName)
}
