package thin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

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
