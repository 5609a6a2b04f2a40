package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/loop"
)

// Resize implements engine.Engine. Growing goes on while the volume is used; btrfs
// alone can shrink.
func (e *Engine) Resize(ctx context.Context, p engine.Place, v engine.Volume, size uint64) error {
	if size == 0 {
		return fault.Invalid("option size: engine image cannot do without, as in size=10G")
	}
	top, kind, err := e.top(p, v)
	if err != nil {
		return err
	}
	defer top.Close()
	image, err := openFile(p.Images, imageName(v.Name), unix.O_RDWR)
	if err != nil {
		return err
	}
	defer image.Close()
	old, err := sizeOf(image)
	if err != nil {
		return err
	}
	if size < old {
		if err := fits(kind, size); err != nil {
			return fault.Conflict("%w", err)
		}
		if err := p.Before(ctx, "resize.shrink"); err != nil {
			return err
		}
		if err := filesystem.Shrink(ctx, top.FD(), kind, size); err != nil {
			return fmt.Errorf("volume %s from %s to %s: %w", v.Name, units.BytesSize(float64(old)), units.BytesSize(float64(size)), err)
		}
		if err := p.Before(ctx, "resize.cut"); err != nil {
			return err
		}
		if err := unix.Syncfs(top.FD()); err != nil {
			return err
		}
		return errors.Join(image.Truncate(int64(size)), image.Sync(), loop.SetCapacity(image))
	}
	if err := p.Before(ctx, "resize.file"); err != nil {
		return err
	}
	if err := extend(ctx, p, image, size, v.Sparse); err != nil {
		return err
	}
	err = image.Sync()
	if err == nil {
		err = loop.SetCapacity(image)
	}
	if err == nil {
		err = p.Before(ctx, "resize.grow")
	}
	if err == nil {
		err = filesystem.Grow(ctx, top.FD(), kind, size)
	}
	if err != nil && size > old {
		// Unless the file system has begun to use it.
		if info, failure := filesystem.Identify(image); failure == nil && info.Size <= old {
			err = errors.Join(err, image.Truncate(int64(old)), loop.SetCapacity(image))
		}
	}
	return err
}

// Usage implements engine.Engine.
func (e *Engine) Usage(_ context.Context, p engine.Place, v engine.Volume) (engine.Usage, error) {
	top, _, err := e.top(p, v)
	if err != nil {
		return engine.Usage{}, err
	}
	defer top.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(top.FD(), &st); err != nil {
		return engine.Usage{}, fmt.Errorf("usage of volume %s: %w", v.Name, err)
	}
	image, err := openFile(p.Images, imageName(v.Name), unix.O_RDONLY)
	if err != nil {
		return engine.Usage{}, err
	}
	defer image.Close()
	var file unix.Stat_t
	if err := unix.Fstat(int(image.Fd()), &file); err != nil {
		return engine.Usage{}, fmt.Errorf("usage of volume %s: %w", v.Name, err)
	}
	block := uint64(st.Bsize)
	usage := engine.Usage{Used: (st.Blocks - st.Bfree) * block, Free: st.Bavail * block, Limit: uint64(file.Size)}
	if st.Files > 0 { // btrfs has no limit of inodes
		usage.Files = st.Files - st.Ffree
	}
	// With snapshots that are files some of it may be shared.
	if shared, err := hasFileSnapshots(p, v); err == nil && !shared {
		usage.Exclusive = uint64(file.Blocks) * 512
	}
	return usage, nil
}
