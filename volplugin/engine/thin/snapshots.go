package thin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// snapPart is the part of the pool that snapshots leave free: less than what new
// volumes leave, since they take nothing at first.
const snapPart = 4 * lowPart

// frozenTries is how often a snapshot is tried whose device somebody resumed.
const frozenTries = 3

var errResumed = errors.New("the device was resumed while its snapshot was taken")

// Snapshot implements engine.Engine.
func (e *Engine) Snapshot(ctx context.Context, p engine.Place, v engine.Volume, snap string, _ func(engine.Progress)) (engine.Copy, error) {
	o, ptr, err := e.openVolume(ctx, p, v.Name)
	if err != nil {
		return engine.Copy{}, err
	}
	defer o.close()
	if err := o.settle(ctx, v.UUID); err != nil {
		return engine.Copy{}, err
	}
	dir, err := subdir(o.Snapshots, v.UUID, true)
	if err != nil {
		return engine.Copy{}, err
	}
	defer dir.Close()
	if err := o.free(ctx, dir, snap); err != nil {
		return engine.Copy{}, err
	}
	h, err := o.copyDevice(ctx, ptr, claim{Volume: v.UUID, Snapshot: snap})
	if err != nil {
		return engine.Copy{}, err
	}
	made := o.pointer(v.UUID, h.id, ptr.FS, ptr.Size)
	made.Fresh = false
	// The file system is as large as the device was.
	err = o.distinguish(ctx, made)
	if err == nil {
		err = o.commit(ctx, dir, snap, made)
	}
	if err != nil {
		return engine.Copy{}, errors.Join(o.explainRunning(err), o.drop(ctx, h))
	}
	_ = o.made(h)
	_ = o.quit(ctx)
	return engine.Copy{Consistency: engine.Frozen}, nil
}

// free tells that a pointer's name is free, in an error that wraps fs.ErrExist when it is
// not.
func (o *opened) free(ctx context.Context, dir *rooted.Dir, name string) error {
	_, err := o.load(ctx, dir, name)
	switch {
	case err == nil:
		return fmt.Errorf("%s/%s: %w", dir.Path(), name, fs.ErrExist)
	case missing(err):
		return nil
	}
	return err
}

// copyDevice makes a snapshot of a device, frozen when it is active. The pool is
// running afterwards.
func (o *opened) copyDevice(ctx context.Context, origin pointer, c claim) (*held, error) {
	// What is dirty is written before, so that programs stand still for less.
	if mounted, err := o.isMounted(origin.Device); err == nil && mounted {
		if top, err := rooted.Open(o.target(origin.Device)); err == nil {
			_ = unix.Syncfs(top.FD())
			_ = top.Close()
		}
	}
	message := func(id uint32) string { return "create_snap " + claimName(id) + " " + claimName(origin.Device) }
	name := o.deviceName(origin.Device)
	for try := 1; ; try++ {
		h, err := o.newDevice(ctx, c, message, snapPart, func(send func() error) error {
			dev, err := o.client.Find(name)
			if missing(err) {
				return send()
			}
			if err != nil {
				return err
			}
			if !dev.Active { // left half-made by a killed process
				return errors.Join(o.client.Remove(name), send())
			}
			return o.suspended(ctx, name, send)
		})
		if errors.Is(err, errResumed) && try < frozenTries {
			continue
		}
		return h, err
	}
}

// suspended calls f while a device is suspended, which freezes its file system.
func (o *opened) suspended(ctx context.Context, name string, f func() error) (err error) {
	// Also when suspending fails half-way.
	defer func() { err = errors.Join(err, o.client.Resume(name)) }()
	if err := o.client.Suspend(name); err != nil {
		return err
	}
	if err := o.Before(ctx, "device.suspended"); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	dev, err := o.client.Find(name)
	if err != nil {
		return err
	}
	if !dev.Suspended {
		return errResumed
	}
	return nil
}

// distinguish gives the copy of a device a file system UUID of its own, where two with
// the same one are a danger. The device is not active afterwards.
func (o *opened) distinguish(ctx context.Context, ptr pointer) error {
	if ptr.FS != filesystem.Btrfs {
		return nil
	}
	node, err := o.activate(ctx, ptr.Device, ptr.Size, false)
	if err != nil {
		return err
	}
	if err := filesystem.NewUUID(ctx, ptr.FS, node, uuid.New()); err != nil {
		return err
	}
	return o.deactivate(ptr.Device)
}

// openSnapshot opens the place of a snapshot that has to be there.
func (e *Engine) openSnapshot(ctx context.Context, p engine.Place, v engine.Volume, snap string) (_ *opened, _ *rooted.Dir, _ pointer, err error) {
	absent := fmt.Errorf("snapshot %s of thin volume %s: %w", snap, v.Name, fs.ErrNotExist)
	o, err := e.open(ctx, p, false)
	if missing(err) {
		return nil, nil, pointer{}, absent
	}
	if err != nil {
		return nil, nil, pointer{}, err
	}
	dir, err := o.Snapshots.Dir(v.UUID)
	if err != nil {
		o.close()
		if missing(err) {
			err = absent
		}
		return nil, nil, pointer{}, err
	}
	ptr, err := o.load(ctx, dir, snap)
	if err != nil {
		_ = dir.Close()
		o.close()
		if missing(err) {
			err = absent
		}
		return nil, nil, pointer{}, err
	}
	return o, dir, ptr, nil
}

// OpenSnapshot implements engine.Engine.
func (e *Engine) OpenSnapshot(ctx context.Context, p engine.Place, v engine.Volume, snap string) (*rooted.Dir, error) {
	o, dir, ptr, err := e.openSnapshot(ctx, p, v, snap)
	if err != nil {
		return nil, err
	}
	defer o.close()
	defer dir.Close()
	top, err := o.mount(ctx, ptr, true)
	if err != nil {
		return nil, errors.Join(err, o.deactivateUnused(ctx, ptr.Device))
	}
	defer top.Close()
	return top.Handle(filesystem.DataName)
}

// CloseSnapshot implements engine.Engine. It is a conflict when somebody uses the
// snapshot.
func (e *Engine) CloseSnapshot(ctx context.Context, p engine.Place, v engine.Volume, snap string) error {
	o, dir, ptr, err := e.openSnapshot(ctx, p, v, snap)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer o.close()
	defer dir.Close()
	return o.detach(ctx, ptr.Device)
}

// RemoveSnapshot implements engine.Engine.
func (e *Engine) RemoveSnapshot(ctx context.Context, p engine.Place, v engine.Volume, snap string) error {
	o, dir, ptr, err := e.openSnapshot(ctx, p, v, snap)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer o.close()
	defer dir.Close()
	return errors.Join(o.destroy(ctx, ptr.Device, dir, snap), o.quit(ctx))
}

// Clone implements engine.Engine. The clone has its source's file system, and its
// size unless a larger one is asked for.
func (e *Engine) Clone(ctx context.Context, p engine.Place, from engine.Volume, snap string, v engine.Volume, _ func(engine.Progress)) (engine.Copy, error) {
	var o *opened
	var source pointer
	var err error
	if snap == "" {
		o, source, err = e.openVolume(ctx, p, from.Name)
	} else {
		var dir *rooted.Dir
		if o, dir, source, err = e.openSnapshot(ctx, p, from, snap); err == nil {
			_ = dir.Close()
		}
	}
	if err != nil {
		return engine.Copy{}, err
	}
	defer o.close()
	done := engine.Copy{Consistency: engine.Frozen}
	if err := o.settle(ctx, v.UUID); err != nil {
		return engine.Copy{}, err
	}
	ptr, err := o.volume(ctx, v.Name)
	if err == nil {
		if ptr.Fresh && ptr.Volume == v.UUID {
			return done, nil // of a call that was killed at its end
		}
		return engine.Copy{}, fmt.Errorf("thin volume %s: %w", v.Name, fs.ErrExist)
	}
	if !missing(err) {
		return engine.Copy{}, err
	}
	if v.FS != "" && filesystem.Kind(v.FS) != source.FS {
		return engine.Copy{}, fault.Invalid("option fs=%s: a clone has the file system of its source, %s", v.FS, source.FS)
	}
	size := source.Size
	if v.Size != 0 {
		if size, err = checkSize(v.Size, source.FS); err != nil {
			return engine.Copy{}, err
		}
	}
	if size < source.Size {
		return engine.Copy{}, fault.Invalid("option size=%d: a clone is not smaller than its source, %s", v.Size, human(source.Size))
	}
	h, err := o.copyDevice(ctx, source, claim{Volume: v.UUID, Name: v.Name})
	if err != nil {
		return engine.Copy{}, err
	}
	ptr = o.pointer(v.UUID, h.id, source.FS, size)
	ptr.Grow = size > source.Size || source.Grow
	err = o.adapt(ctx, &ptr)
	if err == nil {
		err = o.commit(ctx, o.volumes, v.Name+suffix, ptr)
	}
	if err != nil {
		return engine.Copy{}, errors.Join(o.explainRunning(err), o.drop(ctx, h))
	}
	_ = o.made(h)
	_ = o.quit(ctx)
	return done, nil
}

// adapt makes a copy of a device ready to be a volume: its log is replayed, it fills
// its device, and it has a UUID of its own.
func (o *opened) adapt(ctx context.Context, ptr *pointer) error {
	if err := o.distinguish(ctx, *ptr); err != nil {
		return err
	}
	if err := o.Before(ctx, "device.adapt"); err != nil {
		return err
	}
	top, err := o.mount(ctx, *ptr, false)
	if err != nil {
		return err
	}
	err = filesystem.SetUUID(top.FD(), ptr.FS, uuid.New())
	if err == nil {
		err = unix.Syncfs(top.FD())
	}
	ptr.Grow = false
	if err := errors.Join(err, top.Close()); err != nil {
		return err
	}
	return o.deactivate(ptr.Device)
}

// Rollback implements engine.Engine.
func (e *Engine) Rollback(ctx context.Context, p engine.Place, v engine.Volume, snap, keep string, _ func(engine.Progress)) (engine.Copy, error) {
	if snap == keep {
		return engine.Copy{}, fault.Invalid("rollback of volume %s: snapshot %s cannot be replaced by what it replaces", v.Name, snap)
	}
	// Completes one that was interrupted.
	o, ptr, err := e.openVolume(ctx, p, v.Name)
	if err != nil {
		return engine.Copy{}, err
	}
	defer o.close()
	if err := o.settle(ctx, v.UUID); err != nil {
		return engine.Copy{}, err
	}
	done := engine.Copy{Consistency: engine.Frozen}
	if r := ptr.Rollback; r != nil && r.Snapshot == snap && r.Keep == keep {
		kept, err := o.hasKept(ctx, v.UUID, keep, r.Device)
		if err != nil {
			return engine.Copy{}, err
		}
		if kept {
			return done, o.remain(ctx, ptr)
		}
	}
	o2, dir, source, err := e.openSnapshot(ctx, p, v, snap)
	if err != nil {
		return engine.Copy{}, err
	}
	o2.close()
	defer dir.Close()
	if err := o.free(ctx, dir, keep); err != nil {
		return engine.Copy{}, err
	}
	h, err := o.copyDevice(ctx, source, claim{Volume: v.UUID, Name: v.Name})
	if err != nil {
		return engine.Copy{}, err
	}
	back := o.pointer(v.UUID, h.id, source.FS, max(ptr.Size, source.Size))
	back.Fresh = false
	back.Grow = back.Size > source.Size || source.Grow
	back.Rollback = &rollback{Snapshot: snap, Keep: keep, Pending: true, Device: ptr.Device, Size: ptr.Size, Grow: ptr.Grow}
	err = o.distinguish(ctx, back)
	if err == nil {
		// The last look at who uses it, and all that was written is on the device.
		err = o.deactivate(ptr.Device)
	}
	if err == nil {
		// What cannot be mounted is not rolled back to.
		err = o.remain(ctx, back)
	}
	if err == nil {
		if err = o.Before(ctx, "rollback"); err == nil {
			back.Grow = false
			err = o.swap(ctx, v.Name+suffix, ptr, back)
		}
	}
	if err != nil {
		return engine.Copy{}, errors.Join(o.explainRunning(err), o.drop(ctx, h), o.reattach(ctx, ptr))
	}
	_ = o.made(h)
	return done, nil
}

// swap puts a rolled back volume in the place of another, or, when it fails, leaves
// all as it was. Killed in between, the next call completes it.
func (o *opened) swap(ctx context.Context, name string, from, to pointer) error {
	if err := o.replaceFile(o.volumes, name, to); err != nil {
		return err
	}
	ctx, cancel := undoContext(ctx)
	defer cancel()
	_, err := o.finishRollback(ctx, o.volumes, name, to)
	if err == nil {
		return nil
	}
	if errUndo := o.Before(ctx, "rollback.undo"); errUndo != nil {
		return errors.Join(err, errUndo)
	}
	// In this order, or two pointers would lead to one device for a moment.
	if dir, errDir := o.Snapshots.Dir(to.Volume); errDir == nil {
		defer dir.Close()
		if kept, errRead := readPointer(dir, to.Rollback.Keep); errRead == nil && kept.Device == from.Device {
			if errUndo := unlink(dir, to.Rollback.Keep); errUndo != nil {
				return errors.Join(err, errUndo)
			}
		}
	}
	return errors.Join(err, o.replaceFile(o.volumes, name, from))
}

// remain mounts a device and leaves it mounted.
func (o *opened) remain(ctx context.Context, ptr pointer) error {
	top, err := o.mount(ctx, ptr, false)
	if err != nil {
		return err
	}
	return top.Close()
}

// reattach mounts a volume again that a call had to unmount.
func (o *opened) reattach(ctx context.Context, ptr pointer) error {
	ctx, cancel := undoContext(ctx)
	defer cancel()
	return o.remain(ctx, ptr)
}

// hasKept tells whether a volume's former device became a snapshot. Removed later, it
// did too.
func (o *opened) hasKept(ctx context.Context, volume, keep string, device uint32) (bool, error) {
	dir, err := o.Snapshots.Dir(volume)
	if missing(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer dir.Close()
	ptr, err := o.load(ctx, dir, keep)
	if missing(err) {
		return false, nil
	}
	return err == nil && ptr.Device == device, err
}

// finishRollback makes the former device of a volume the snapshot that it was
// promised to be.
func (o *opened) finishRollback(ctx context.Context, dir *rooted.Dir, name string, ptr pointer) (pointer, error) {
	r := *ptr.Rollback
	snapshots, err := subdir(o.Snapshots, ptr.Volume, true)
	if err != nil {
		return pointer{}, err
	}
	defer snapshots.Close()
	if err := o.Before(ctx, "rollback.keep"); err != nil {
		return pointer{}, err
	}
	kept := o.pointer(ptr.Volume, r.Device, ptr.FS, r.Size)
	kept.Fresh, kept.Grow = false, r.Grow
	if err := o.newFile(snapshots, r.Keep, kept); err != nil {
		other, errRead := readPointer(snapshots, r.Keep)
		if !errors.Is(err, fs.ErrExist) || errRead != nil || other.Device != r.Device {
			return pointer{}, errors.Join(err, errRead)
		}
	}
	if err := o.Before(ctx, "rollback.end"); err != nil {
		return pointer{}, err
	}
	r.Pending = false
	ptr.Rollback = &r
	return ptr, o.replaceFile(dir, name, ptr)
}
