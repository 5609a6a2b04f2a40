package volplugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	api "github.com/docker/go-plugins-helpers/volume"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/mount"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// maxID bounds a mount ID; dockerd's have 64 digits.
const maxID = 256

// checkID refuses what dockerd does not send as a mount ID. The empty ID of a
// request without a body must not count as a user.
func checkID(name, id string) error {
	if id == "" {
		return fault.Invalid("volume %s: the mount ID is empty", name)
	}
	if len(id) > maxID {
		return fault.Invalid("volume %s: the mount ID has %d bytes: at most %d are allowed", name, len(id), maxID)
	}
	return nil
}

// Mount answers VolumeDriver.Mount. The path is that of the volume's data and
// never empty: dockerd would give the container the plugin's own files.
func (d *Driver) Mount(ctx context.Context, req *api.MountRequest) (*api.MountResponse, error) {
	if err := volume.CheckName(req.Name); err != nil {
		return nil, err
	}
	if err := checkID(req.Name, req.ID); err != nil {
		return nil, err
	}
	if d.cfg.CheckMounts != nil {
		if err := d.cfg.CheckMounts(); err != nil {
			return nil, fmt.Errorf("volume %s: %w", req.Name, err)
		}
	}
	err := d.change(ctx, req.Name, func(ctx context.Context, commit func() bool) error {
		rec, data, err := d.data(req.Name)
		if err != nil {
			return err
		}
		defer data.Close()
		if d.cfg.step != nil {
			if err := d.cfg.step("mount.bind", req.Name); err != nil {
				return err
			}
		}
		made, err := d.bind(data, rec)
		if err != nil {
			return fmt.Errorf("volume %s: %w", req.Name, err)
		}
		// An answer that comes too late is followed by no Unmount.
		if err = ctx.Err(); err == nil && !commit() {
			err = context.Cause(ctx)
		}
		if err == nil {
			err = d.addMount(rec, req.ID, made)
		}
		if err != nil && made {
			err = errors.Join(err, d.binder.Unbind(req.Name))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return &api.MountResponse{Mountpoint: d.mountpoint(req.Name)}, nil
}

// data opens the data of a volume that can be mounted.
func (d *Driver) data(name string) (volume.Record, *rooted.Dir, error) {
	root, err := d.open()
	if errors.Is(err, volume.ErrFresh) {
		return volume.Record{}, nil, fault.NotFound("volume %s does not exist: the root %s is new", name, d.cfg.Root)
	}
	if err != nil {
		return volume.Record{}, nil, fmt.Errorf("volume %s: %w", name, err)
	}
	defer root.Close()
	rec, err := root.Record(name)
	switch {
	case errors.Is(err, volume.ErrNoRecord):
		return rec, nil, fault.NotFound("volume %s does not exist in %s", name, d.cfg.Root)
	case errors.Is(err, volume.ErrDamaged), errors.Is(err, volume.ErrNewer):
		return rec, nil, fault.Unavailable("volume %s cannot be mounted, its data is untouched: %w", name, err)
	case err != nil:
		return rec, nil, err
	case rec.Phase != volume.Ready:
		return rec, nil, fault.Conflict("volume %s: host %s is %s it", name, rec.Host, rec.Phase)
	case rec.Engine != d.location.Engine.Name():
		return rec, nil, fault.Unavailable("volume %s is kept by engine %q, which this Berth does not have", name, rec.Engine)
	}
	data, err := root.Data(rec)
	return rec, data, err
}

// bind mounts the data where dockerd finds it. made tells whether it did.
func (d *Driver) bind(data *rooted.Dir, rec volume.Record) (made bool, err error) {
	if d.binder == nil {
		return false, nil
	}
	made, err = d.binder.Bind(data, rec.Name)
	if !errors.Is(err, mount.ErrOther) {
		return made, err
	}
	// What is there is left from an earlier volume of this name, or the root was
	// mounted anew below it.
	if m := d.mountsOf(rec.Name); m.UUID == rec.UUID && m.IDs.Total() > 0 {
		return false, fault.Conflict("%w, and %d mounts of containers are counted on it; stop them first", err, m.IDs.Total())
	}
	if err := d.binder.Unbind(rec.Name); err != nil {
		return false, err
	}
	return d.binder.Bind(data, rec.Name)
}

// addMount counts a Mount. Counts of another volume, of another boot, or of a
// mount that was not there any more are void.
func (d *Driver) addMount(rec volume.Record, id string, made bool) error {
	boot, err := d.cfg.BootID()
	if err != nil {
		return fmt.Errorf("boot ID: %w", err)
	}
	m := d.mountsOf(rec.Name)
	if made || m.UUID != rec.UUID || m.Boot != boot {
		m = volumeMounts{UUID: rec.UUID, Boot: boot}
	}
	m.IDs = m.IDs.Add(id)
	return d.setMounts(rec.Name, m)
}

// Unmount answers VolumeDriver.Unmount. What is not mounted, or not known, is
// unmounted already.
func (d *Driver) Unmount(ctx context.Context, req *api.UnmountRequest) error {
	if err := volume.CheckName(req.Name); err != nil {
		return err
	}
	if err := checkID(req.Name, req.ID); err != nil {
		return err
	}
	return d.change(ctx, req.Name, func(context.Context, func() bool) error {
		m := d.mountsOf(req.Name)
		if _, ok := m.IDs[req.ID]; ok {
			m.IDs = m.IDs.Drop(req.ID)
			// Before the mount goes: one without a count is made good later, a
			// count without its mount as well, but only this order leaves no
			// moment in which a container that comes now is taken for this one.
			if err := d.setMounts(req.Name, m); err != nil {
				return err
			}
		}
		if m.IDs.Total() > 0 || d.binder == nil {
			return nil
		}
		return d.binder.Unbind(req.Name)
	})
}

// release makes sure that no container of this host has the volume, and clears
// what stale counts have left.
func (d *Driver) release(ctx context.Context, root *volume.Root, name string) error {
	m := d.mountsOf(name)
	boot, err := d.cfg.BootID()
	if err != nil {
		return fmt.Errorf("boot ID: %w", err)
	}
	if total := m.IDs.Total(); total > 0 && m.Boot == boot {
		used, err := d.inUse(ctx, root, name, m)
		if err != nil {
			return fmt.Errorf("volume %s: %w", name, err)
		}
		if used {
			return fault.Conflict("volume %s is in use: it is mounted, and %d mounts of containers are counted on it", name, total)
		}
	}
	if err := d.setMounts(name, volumeMounts{}); err != nil {
		return err
	}
	if d.binder == nil {
		return nil
	}
	return d.binder.Unbind(name)
}

// inUse tells whether counts are backed by a mount.
func (d *Driver) inUse(ctx context.Context, root *volume.Root, name string, m volumeMounts) (bool, error) {
	if d.binder != nil {
		return d.binder.Mounted(name)
	}
	rec, err := root.Record(name)
	if errors.Is(err, volume.ErrNoRecord) || err == nil && rec.UUID != m.UUID {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	data, err := root.Data(rec)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer data.Close()
	return mount.InUse(ctx, data)
}
