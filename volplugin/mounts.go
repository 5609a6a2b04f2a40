package volplugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	api "github.com/docker/go-plugins-helpers/volume"

	"golang.org/x/sys/unix"

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

// treeEngines keep data in directories of the root, which can be handed out as they
// are. What others keep is mounted.
func treeEngine(name string) bool {
	switch name {
	case "dir", "reflink", "btrfs":
		return true
	}
	return false
}

// binderOf is what mounts a volume, or its snapshot, where dockerd finds it; nil
// when its directory itself is handed out.
func (d *Driver) binderOf(rec volume.Record, snapshot bool) *mount.Binder {
	if d.binder != nil || !snapshot && treeEngine(rec.Engine) && mountFlags(rec) == (mount.Flags{}) {
		return d.binder
	}
	return d.special
}

// mountFlags are how containers get a volume.
func mountFlags(rec volume.Record) mount.Flags {
	return mount.Flags{ReadOnly: rec.ReadOnly, NoSUID: rec.NoSUID, NoDev: rec.NoDev, NoExec: rec.NoExec}
}

// A mountable is a volume, or a snapshot, that can be handed to a container.
type mountable struct {
	ref   volume.Reference
	rec   volume.Record
	data  *rooted.Dir
	flags mount.Flags
	// done lets go of what had to be attached, after the mount is counted or has
	// failed. It closes data.
	done func() error
}

// mountable opens what is to be mounted.
func (s *store) mountable(ctx context.Context, ref volume.Reference) (m mountable, err error) {
	root, rec, err := s.ready(ref.Volume)
	if err != nil {
		return m, err
	}
	defer root.Close()
	m = mountable{ref: ref, rec: rec, flags: mountFlags(rec)}
	if ref.Snapshot != "" {
		m.flags.ReadOnly = true
		m.data, m.done, err = root.OpenSnapshot(ctx, ref.Volume, ref.Snapshot)
		return m, err
	}
	release, err := s.holdIn(ctx, root, rec)
	if err != nil {
		return m, fmt.Errorf("volume %s: %w", rec.Name, err)
	}
	if m.data, err = root.Data(rec); err != nil {
		return m, errors.Join(err, release())
	}
	m.done = func() error { return errors.Join(m.data.Close(), release()) }
	return m, nil
}

// Mount answers VolumeDriver.Mount. The path is that of the volume's data and
// never empty: dockerd would give the container the plugin's own files.
func (d *Driver) Mount(ctx context.Context, req *api.MountRequest) (*api.MountResponse, error) {
	ref, err := volume.ParseReference(req.Name)
	if err != nil {
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
	var path string // set by work that was not given up
	where := func(ctx context.Context, _ string) (*store, error) { return d.storeOf(ctx, ref.Volume) }
	err = d.change(ctx, req.Name, where, func(ctx context.Context, s *store, commit func() bool) (err error) {
		m, err := s.mountable(ctx, ref)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, m.done()) }()
		if d.cfg.step != nil {
			if err := d.cfg.step("mount.bind", req.Name); err != nil {
				return err
			}
		}
		binder := d.binderOf(m.rec, ref.Snapshot != "")
		made, err := d.bind(binder, m)
		if err != nil {
			return fmt.Errorf("volume %s: %w", req.Name, err)
		}
		if made || binder == nil && d.ledger.mountsOf(req.Name).IDs.Total() == 0 {
			err = enforceOwner(m)
		}
		// An answer that comes too late is followed by no Unmount.
		if err == nil {
			err = ctx.Err()
		}
		if err == nil && !commit() {
			err = context.Cause(ctx)
		}
		if err == nil {
			err = d.addMount(s, m, req.ID, made, binder != nil)
		}
		if err != nil && made {
			err = errors.Join(err, binder.Unbind(req.Name))
		}
		if err == nil {
			path = d.mountpoint(s, ref, m.rec)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return &api.MountResponse{Mountpoint: path}, nil
}

// enforceOwner gives a volume's top directory the owner and the mode that were asked
// for, which dockerd has replaced by those in the image when it filled the volume.
func enforceOwner(m mountable) error {
	if !m.rec.OwnerEnforce || m.ref.Snapshot != "" {
		return nil
	}
	id := func(given *uint32) int {
		if given == nil {
			return -1
		}
		return int(*given)
	}
	path := m.data.ProcPath()
	var err error
	if m.rec.UID != nil || m.rec.GID != nil {
		err = os.Chown(path, id(m.rec.UID), id(m.rec.GID))
	}
	// After the owner: changing that clears set-ID bits.
	if err == nil && m.rec.Mode != nil {
		err = unix.Chmod(path, *m.rec.Mode)
	}
	if err != nil {
		return fmt.Errorf("option owner=enforce: volume %s: %w", m.rec.Name, err)
	}
	return nil
}

// bind mounts the data where dockerd finds it. made tells whether it did.
func (d *Driver) bind(binder *mount.Binder, m mountable) (made bool, err error) {
	if binder == nil {
		if d.special == nil && (m.flags != (mount.Flags{}) || !treeEngine(m.rec.Engine)) {
			return false, fault.Unavailable("it needs a directory in which Berth mounts volumes (--mounts)")
		}
		return false, nil
	}
	name := m.ref.String()
	made, err = binder.Bind(m.data, name, m.flags)
	if !errors.Is(err, mount.ErrOther) && !errors.Is(err, mount.ErrFlags) {
		return made, err
	}
	// What is there is left from an earlier volume of this name, or the root was
	// mounted anew below it, or nobody has it mounted any more.
	if counted := d.ledger.mountsOf(name); counted.UUID == m.rec.UUID && counted.IDs.Total() > 0 {
		return false, fault.Conflict("%w, and %d mounts of containers are counted on it; stop them first", err, counted.IDs.Total())
	}
	if err := binder.Unbind(name); err != nil {
		return false, err
	}
	return binder.Bind(m.data, name, m.flags)
}

// addMount counts a Mount. Counts of another volume, of another boot, or of a
// mount that was not there any more are void.
func (d *Driver) addMount(s *store, m mountable, id string, made, bound bool) error {
	boot, err := d.cfg.BootID()
	if err != nil {
		return fmt.Errorf("boot ID: %w", err)
	}
	name := m.ref.String()
	counted := d.ledger.mountsOf(name)
	if made || counted.UUID != m.rec.UUID || counted.Boot != boot {
		counted = volumeMounts{Store: s.key, UUID: m.rec.UUID, Boot: boot, Bound: bound}
	}
	counted.IDs = counted.IDs.Add(id)
	return d.ledger.setMounts(name, counted)
}

// Unmount answers VolumeDriver.Unmount. What is not mounted, or not known, is
// unmounted already.
func (d *Driver) Unmount(ctx context.Context, req *api.UnmountRequest) error {
	ref, err := volume.ParseReference(req.Name)
	if err != nil {
		return err
	}
	if err := checkID(req.Name, req.ID); err != nil {
		return err
	}
	return d.change(ctx, req.Name, d.storeMounted, func(ctx context.Context, s *store, _ func() bool) error {
		m := d.ledger.mountsOf(req.Name)
		uuid := m.UUID
		if _, ok := m.IDs[req.ID]; ok {
			m.IDs = m.IDs.Drop(req.ID)
			// Before the mount goes: one without a count is made good later, a
			// count without its mount as well, but only this order leaves no
			// moment in which a container that comes now is taken for this one.
			if err := d.ledger.setMounts(req.Name, m); err != nil {
				return err
			}
		}
		if m.IDs.Total() > 0 {
			return nil
		}
		return errors.Join(d.unbind(req.Name), d.detach(ctx, s, ref.Volume, uuid))
	})
}

// unbind unmounts what is mounted for a name.
func (d *Driver) unbind(name string) error {
	binder := d.binder
	if binder == nil {
		binder = d.special
	}
	if binder == nil {
		return nil
	}
	return binder.Unbind(name)
}

// detach lets go of a volume that this host knows by its name, if it is still the
// one with the UUID and nobody has it any more.
func (d *Driver) detach(ctx context.Context, s *store, name, uuid string) error {
	known := s.ledger.view(s.key, name)
	if !known.ok || known.Record.UUID != uuid {
		s.gone(uuid)
		return nil
	}
	return s.detachIdle(ctx, known.Record)
}

// release makes sure that no container of this host has the volume, and clears
// what stale counts have left.
func (d *Driver) release(ctx context.Context, root *volume.Root, name string) error {
	m := d.ledger.mountsOf(name)
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
	if err := d.ledger.setMounts(name, volumeMounts{}); err != nil {
		return err
	}
	return d.unbind(name)
}

// inUse tells whether counts are backed by a mount.
func (d *Driver) inUse(ctx context.Context, root *volume.Root, name string, m volumeMounts) (bool, error) {
	if d.binder != nil {
		return d.binder.Mounted(name)
	}
	if m.Bound {
		return d.inUseSpecial(ctx, name)
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

// inUseSpecial is inUse for what is mounted by d.special, which the host sees whether
// or not a container has it.
func (d *Driver) inUseSpecial(ctx context.Context, name string) (bool, error) {
	mounted, err := d.special.Mounted(name)
	if err != nil || !mounted {
		return false, err
	}
	data, err := rooted.Open(d.special.Path(name))
	if err != nil {
		return false, err
	}
	defer data.Close()
	return mount.InUse(ctx, data)
}
