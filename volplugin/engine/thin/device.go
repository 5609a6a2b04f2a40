package thin

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// newDevice claims a number and makes the device with a message that ends in that
// number: "create_thin", or "create_snap" with its origin. while, unless nil, is run
// around the message. The pool is running afterwards, also when nothing is active:
// the caller activates the device or calls drop.
func (o *opened) newDevice(ctx context.Context, c claim, message func(id uint32) string, part uint64, while func(func() error) error) (_ *held, err error) {
	release, err := o.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	defer func() {
		if err != nil {
			err = errors.Join(err, o.stopPool())
		}
	}()
	_, status, err := o.startPool(ctx, true)
	if err != nil {
		return nil, err
	}
	if err := o.room(status, part); err != nil {
		return nil, err
	}
	h, err := o.claim(ctx, status, c)
	if err != nil {
		return nil, err
	}
	send := func() error {
		if err := o.Before(ctx, "device.create"); err != nil {
			return err
		}
		_, err := o.client.Message(o.poolDevice(), 0, message(h.id))
		return err
	}
	if while != nil {
		err = while(send)
	} else {
		err = send()
	}
	if errors.Is(err, unix.EEXIST) {
		// The counter has gone round, or claims were lost. It is not ours: the claim stays,
		// so that nobody else meets it.
		return nil, errors.Join(fault.Conflict("thin pool of %s has a device %d that no volume has; try again", o.Root.Path(), h.id), o.made(h))
	}
	if err == nil {
		if err = o.Before(ctx, "device.count"); err == nil {
			count := status.Transaction&^uint64(1<<counterBits-1) | uint64(o.counted(status, h.id))
			err = o.setTransaction(status.Transaction, count)
		}
	}
	if err != nil {
		undo, cancel := undoContext(ctx)
		defer cancel()
		return nil, errors.Join(o.explain(err), o.dropInTurn(undo, h))
	}
	return h, nil
}

// counted is the count that belongs to a number, at or after the present one.
func (o *opened) counted(status devmapper.PoolStatus, id uint32) uint32 {
	count := uint32(status.Transaction) + 1
	return count + (id-count)&maxDevice
}

// explain adds what is wrong with the pool to an error of it.
func (o *opened) explain(err error) error {
	if err == nil || o.pool.UUID == "" {
		return err
	}
	status, errStatus := o.poolStatus()
	if errStatus != nil {
		return err
	}
	if what := problem(status); what != "" {
		return fault.Unavailable("%s: %w", what, err)
	}
	return err
}

// drop gives up a device that no pointer leads to. ctx may have ended.
func (o *opened) drop(ctx context.Context, h *held) error {
	ctx, cancel := undoContext(ctx)
	defer cancel()
	err := o.Before(ctx, "device.deactivate")
	if err == nil {
		err = o.deactivate(h.id)
	}
	if err != nil {
		h.release()
		return err
	}
	release, err := o.turn(ctx)
	if err != nil {
		h.release()
		return err
	}
	defer release()
	if _, _, err := o.startPool(ctx, false); err != nil {
		h.release()
		return err
	}
	return errors.Join(o.dropInTurn(ctx, h), o.stopPool())
}

func (o *opened) dropInTurn(ctx context.Context, h *held) error {
	defer h.release()
	if err := o.Before(ctx, "device.drop"); err != nil {
		return err
	}
	if err := o.deleteDevice(h.id); err != nil {
		return err
	}
	return unlink(o.devices, claimName(h.id)+making)
}

// deleteDevice deletes a device from the running pool. Missing is no error.
func (o *opened) deleteDevice(id uint32) error {
	_, err := o.client.Message(o.poolDevice(), 0, "delete "+claimName(id))
	if errors.Is(err, unix.ENODATA) {
		return nil
	}
	if errors.Is(err, unix.EBUSY) {
		return fault.Conflict("thin device %d is in use: %w", id, err)
	}
	return o.explain(err)
}

// destroy deletes a device that nobody has mounted, and its pointer. When it fails
// in the middle, the device is gone for everybody, and settle goes on.
func (o *opened) destroy(ctx context.Context, id uint32, dir *rooted.Dir, name string) error {
	if err := o.deactivate(id); err != nil {
		return err
	}
	if err := o.Before(ctx, "delete.mark"); err != nil {
		return err
	}
	if err := o.phase(id, "", deleting); err != nil && !missing(err) {
		return err
	}
	if err := o.Before(ctx, "delete.pointer"); err != nil {
		return err
	}
	if err := unlink(dir, name); err != nil {
		return err
	}
	h, err := o.lockClaim(id, deleting)
	if missing(err) || errors.Is(err, errLocked) {
		return nil // somebody else is at it
	}
	if err != nil {
		return err
	}
	defer h.release()
	return o.finishDelete(ctx, h)
}

// finishDelete deletes a device whose claim says so.
func (o *opened) finishDelete(ctx context.Context, h *held) error {
	if err := o.deactivate(h.id); err != nil {
		return err
	}
	return o.withPool(ctx, func(devmapper.Device, devmapper.PoolStatus) error {
		if err := o.Before(ctx, "delete.device"); err != nil {
			return err
		}
		if err := o.deleteDevice(h.id); err != nil {
			return err
		}
		if err := o.Before(ctx, "delete.claim"); err != nil {
			return err
		}
		return unlink(o.devices, claimName(h.id)+deleting)
	})
}

// load reads a pointer, whose device is complete. The error wraps fs.ErrNotExist when
// there is none, or its deletion has begun.
func (o *opened) load(ctx context.Context, dir *rooted.Dir, name string) (pointer, error) {
	ptr, err := readPointer(dir, name)
	if err != nil {
		return pointer{}, err
	}
	if ptr.Pool != o.pool.UUID {
		return pointer{}, fault.Unavailable("%s/%s leads to thin pool %s, and the root's is %s", dir.Path(), name, ptr.Pool, o.pool.UUID)
	}
	if err := o.confirm(dir, name, ptr.Device, ptr.Volume); err != nil {
		return pointer{}, err
	}
	if r := ptr.Rollback; r != nil && r.Pending {
		return o.finishRollback(ctx, dir, name, ptr)
	}
	return ptr, nil
}

// confirm makes sure of the claim on a device that a pointer leads to.
func (o *opened) confirm(dir *rooted.Dir, name string, id uint32, volume string) error {
	if _, err := o.devices.Stat(claimName(id)); !missing(err) {
		return err
	}
	if _, err := o.devices.Stat(claimName(id) + deleting); err == nil {
		if err := unlink(dir, name); err != nil {
			return err
		}
		return &fs.PathError{Op: "open", Path: filepath.Join(dir.Path(), name), Err: fs.ErrNotExist}
	}
	err := o.phase(id, making, "")
	if !missing(err) {
		return err
	}
	// Lost. The number must not be given to another device.
	c := claim{Schema: schema, Pool: o.pool.UUID, Volume: volume, Name: "unknown"}
	if err := o.newFile(o.devices, claimName(id), c); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
