package thin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// defaultMode of new data; dockerd replaces it when it copies an image's content.
const defaultMode = 0o755

// Find implements engine.Engine.
func (e *Engine) Find(p engine.Place, name string) (bool, error) {
	dir, err := volumesDir(p)
	if missing(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer dir.Close()
	_, err = readPointer(dir, name+suffix)
	if missing(err) {
		return false, nil
	}
	return err == nil, err
}

// volumesDir opens the directory of pointers alone, for what needs no device.
func volumesDir(p engine.Place) (*rooted.Dir, error) {
	dir, err := p.Root.Dir(metaName)
	for _, name := range []string{thinName, volumesName} {
		if err != nil {
			return nil, err
		}
		parent := dir
		dir, err = parent.Dir(name)
		_ = parent.Close()
	}
	return dir, err
}

// errAbsent is the error about a volume that is not there.
func errAbsent(name string) error {
	return fmt.Errorf("thin volume %s: %w", name, fs.ErrNotExist)
}

// volume loads the pointer of a volume.
func (o *opened) volume(ctx context.Context, name string) (pointer, error) {
	return o.load(ctx, o.volumes, name+suffix)
}

// openVolume opens the place of a volume that has to be there.
func (e *Engine) openVolume(ctx context.Context, p engine.Place, name string) (*opened, pointer, error) {
	o, err := e.open(ctx, p, false)
	if missing(err) {
		return nil, pointer{}, errAbsent(name)
	}
	if err != nil {
		return nil, pointer{}, err
	}
	ptr, err := o.volume(ctx, name)
	if err != nil {
		o.close()
		return nil, pointer{}, err
	}
	return o, ptr, nil
}

// Create implements engine.Engine. A volume without a size gets the default one.
func (e *Engine) Create(ctx context.Context, p engine.Place, v engine.Volume, attr engine.Attributes) (created bool, err error) {
	o, err := e.open(ctx, p, true)
	if err != nil {
		return false, err
	}
	defer o.close()
	if err := o.settle(ctx, v.UUID); err != nil {
		return false, err
	}
	ptr, err := o.volume(ctx, v.Name)
	if err == nil {
		return false, o.takeOver(ctx, v, ptr, attr)
	}
	if !missing(err) {
		return false, err
	}
	kind := filesystem.Kind(v.FS)
	if kind == "" {
		kind = DefaultFS
	}
	if err := filesystem.Available(kind); err != nil {
		return false, err
	}
	size := v.Size
	if size == 0 {
		size = e.settings.DefaultSize
	}
	if size, err = checkSize(size, kind); err != nil {
		return false, err
	}
	h, err := o.newDevice(ctx, claim{Volume: v.UUID, Name: v.Name},
		func(id uint32) string { return "create_thin " + claimName(id) }, lowPart, nil)
	if err != nil {
		return false, err
	}
	ptr = o.pointer(v.UUID, h.id, kind, size)
	err = o.format(ctx, ptr, v, attr)
	if err == nil {
		err = o.commit(ctx, o.volumes, v.Name+suffix, ptr)
	}
	if err != nil {
		return false, errors.Join(o.explainRunning(err), o.drop(ctx, h))
	}
	_ = o.made(h)   // or later, when the pointer is read
	_ = o.quit(ctx) // or later, at the next one's end
	return true, nil
}

func (o *opened) pointer(volume string, device uint32, kind filesystem.Kind, size uint64) pointer {
	return pointer{Schema: schema, Kind: pointerKind, Pool: o.pool.UUID, Volume: volume, Device: device, FS: kind, Size: size, Fresh: true}
}

// commit makes a device real: its file system is unmounted and on disk.
func (o *opened) commit(ctx context.Context, dir *rooted.Dir, name string, ptr pointer) error {
	if err := o.Before(ctx, "device.commit"); err != nil {
		return err
	}
	return o.newFile(dir, name, ptr)
}

// explainRunning is explain when nobody knows whether the pool runs.
func (o *opened) explainRunning(err error) error {
	if _, errFind := o.client.Find(o.poolDevice()); errFind != nil {
		return err
	}
	return o.explain(err)
}

// checkSize rounds a size up and refuses what the file system cannot have.
func checkSize(size uint64, kind filesystem.Kind) (uint64, error) {
	if size < kind.MinSize() {
		return 0, fault.Invalid("option size=%d: %s needs at least %s", size, kind, human(kind.MinSize()))
	}
	if size > maxSize {
		return 0, fault.Invalid("option size=%d: at most %s are possible", size, human(maxSize))
	}
	return (size + sizeUnit - 1) / sizeUnit * sizeUnit, nil
}

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
	if attr.UID != nil || attr.GID != nil {
		if err := data.SetOwner(chownID(attr.UID), chownID(attr.GID)); err != nil {
			return err
		}
	}
	// After the owner: changing that clears set-ID bits.
	if attr.Mode != nil {
		err = data.SetMode(*attr.Mode)
	} else if created {
		err = data.SetMode(defaultMode)
	}
	return errors.Join(err, data.Sync())
}

// chownID is chown's form of an ID.
func chownID(given *uint32) int {
	if given == nil {
		return -1
	}
	return int(*given)
}

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

// Abandon implements engine.Engine.
func (e *Engine) Abandon(p engine.Place, v engine.Volume) error {
	ctx, cancel := undoContext(context.Background())
	defer cancel()
	o, err := e.open(ctx, p, false)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer o.close()
	if err := o.settle(ctx, v.UUID); err != nil {
		return err
	}
	ptr, err := o.volume(ctx, v.Name)
	if missing(err) || foreign(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if !ptr.Fresh {
		empty, err := o.isEmpty(ctx, ptr)
		if err != nil || !empty {
			return err
		}
	}
	return errors.Join(o.destroy(ctx, ptr.Device, o.volumes, v.Name+suffix), o.quit(ctx))
}

// foreign tells what no Berth has made.
func foreign(err error) bool {
	return errors.Is(err, rooted.ErrSymlink) || errors.Is(err, rooted.ErrNotFile) || errors.Is(err, errForeign)
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

// Retire implements engine.Engine.
func (e *Engine) Retire(ctx context.Context, p engine.Place, v engine.Volume) error {
	o, _, err := e.openVolume(ctx, p, v.Name)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer o.close()
	if err := o.Before(ctx, "retire"); err != nil {
		return err
	}
	return move(o.volumes, v.Name+suffix, o.Trash, v.UUID)
}

// Reinstate implements engine.Engine.
func (e *Engine) Reinstate(ctx context.Context, p engine.Place, v engine.Volume) error {
	o, err := e.open(ctx, p, false)
	if missing(err) {
		return errAbsent(v.Name)
	}
	if err != nil {
		return err
	}
	defer o.close()
	_, err = o.load(ctx, o.Trash, v.UUID)
	if missing(err) {
		ptr, err := o.volume(ctx, v.Name)
		if err == nil && ptr.Volume != v.UUID {
			return errAbsent(v.Name)
		}
		return err
	}
	if err != nil {
		return err
	}
	if err := o.Before(ctx, "reinstate"); err != nil {
		return err
	}
	return move(o.Trash, v.UUID, o.volumes, v.Name+suffix)
}

// Rename implements engine.Engine.
func (e *Engine) Rename(ctx context.Context, p engine.Place, v engine.Volume, to string) error {
	o, err := e.open(ctx, p, false)
	if missing(err) {
		return errAbsent(v.Name)
	}
	if err != nil {
		return err
	}
	defer o.close()
	if _, err := o.volume(ctx, v.Name); err != nil {
		return err
	}
	if err := o.Before(ctx, "rename"); err != nil {
		return err
	}
	return move(o.volumes, v.Name+suffix, o.volumes, to+suffix)
}

// Destroy implements engine.Engine.
func (e *Engine) Destroy(ctx context.Context, p engine.Place, v engine.Volume) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	o, err := e.open(ctx, p, false)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer o.close()
	if err := o.settle(ctx, v.UUID); err != nil {
		return err
	}
	ptr, err := o.load(ctx, o.Trash, v.UUID)
	if err == nil {
		err = errors.Join(o.destroy(ctx, ptr.Device, o.Trash, v.UUID), o.quit(ctx))
	}
	if err != nil && !missing(err) {
		return err
	}
	return o.destroySnapshots(ctx, v)
}

// destroySnapshots deletes all snapshots of a volume, and their directory when
// nothing else is in it.
func (o *opened) destroySnapshots(ctx context.Context, v engine.Volume) error {
	dir, err := o.Snapshots.Dir(v.UUID)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		ptr, err := o.load(ctx, dir, name)
		if missing(err) || foreign(err) {
			continue // a record
		}
		if err == nil {
			err = errors.Join(o.destroy(ctx, ptr.Device, dir, name), o.quit(ctx))
		}
		if err != nil {
			return err
		}
	}
	err = o.Snapshots.Rmdir(v.UUID)
	if err != nil && !missing(err) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return o.Snapshots.Sync()
}

// Resize implements engine.Engine. A device can only grow.
func (e *Engine) Resize(ctx context.Context, p engine.Place, v engine.Volume, size uint64) error {
	o, ptr, err := e.openVolume(ctx, p, v.Name)
	if err != nil {
		return err
	}
	defer o.close()
	if size == 0 {
		return fault.Invalid("option size: a thin volume always has one")
	}
	if size < ptr.Size {
		return fault.Conflict("volume %s has %s and cannot be made smaller: thin volumes only grow", v.Name, human(ptr.Size))
	}
	if size, err = checkSize(size, ptr.FS); err != nil {
		return err
	}
	if size == ptr.Size {
		return nil
	}
	if err := o.Before(ctx, "resize"); err != nil {
		return err
	}
	// A device that is larger than its file system harms nobody.
	grown := ptr
	grown.Size, grown.Grow = size, true
	if err := o.replaceFile(o.volumes, v.Name+suffix, grown); err != nil {
		return err
	}
	top, err := o.mount(ctx, grown, false)
	if err != nil {
		return errors.Join(o.explainRunning(err), o.replaceFile(o.volumes, v.Name+suffix, ptr))
	}
	defer top.Close()
	grown.Grow = false
	return o.replaceFile(o.volumes, v.Name+suffix, grown)
}

// Usage implements engine.Engine. Free is bounded by what the pool has, and so may
// shrink by what other volumes write.
func (e *Engine) Usage(ctx context.Context, p engine.Place, v engine.Volume) (engine.Usage, error) {
	o, ptr, err := e.openVolume(ctx, p, v.Name)
	if err != nil {
		return engine.Usage{}, err
	}
	defer o.close()
	data, err := o.data(ptr.Device, v.Name)
	if err != nil {
		return engine.Usage{}, err
	}
	defer data.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(data.FD(), &st); err != nil {
		return engine.Usage{}, fmt.Errorf("statfs of volume %s: %w", v.Name, err)
	}
	usage := engine.Usage{
		Used:  (st.Blocks - st.Bfree) * uint64(st.Bsize),
		Limit: ptr.Size,
		Free:  st.Bavail * uint64(st.Bsize),
	}
	if st.Files > st.Ffree { // btrfs counts none
		usage.Files = st.Files - st.Ffree
	}
	if status, err := o.poolStatus(); err == nil {
		usage.Free = min(usage.Free, (status.DataTotal-min(status.DataUsed, status.DataTotal))*o.pool.BlockSize)
	}
	return usage, nil
}
