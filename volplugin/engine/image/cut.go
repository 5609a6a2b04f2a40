package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/loop"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

var _ engine.Cutter = (*Engine)(nil)

// Cut implements engine.Cutter. The file system is shut down where it can be, and its
// loop device cut off from the image. A btrfs cannot on most kernels, but has nothing in
// the device's page cache, which is all that the cut writes.
func (e *Engine) Cut(ctx context.Context, p engine.Place, v engine.Volume) error {
	var errs []error
	for _, target := range []string{volumeTarget(p, v), workTarget(p, v)} {
		info, err := mountAt(target)
		if err == nil && info != nil {
			err = cutMount(ctx, target, info)
		}
		errs = append(errs, err)
	}
	// It may be in use although it is not mounted here any more.
	id, err := fileOfVolume(p, v)
	if err == nil {
		err = loop.Cut(ctx, id)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EAGAIN) {
		err = nil // cutMount has seen to it
	}
	return errors.Join(append(errs, err)...)
}

func cutMount(ctx context.Context, target string, info *mountinfo.Info) error {
	top, err := rooted.Open(target)
	if errors.Is(err, unix.EIO) {
		return nil // down already
	}
	if err != nil {
		return err
	}
	defer top.Close()
	down := filesystem.Shutdown(top.FD())
	id, err := loop.Backing(info.Source)
	if err == nil {
		err = loop.Cut(ctx, id)
	}
	if down == nil && errors.Is(err, unix.EAGAIN) {
		err = nil // shut down, it writes nothing more
	}
	if err != nil {
		return errors.Join(err, down)
	}
	// A btrfs sees at the end of its transaction that it can write nothing, and refuses
	// writes from then on, in place of keeping them in memory.
	_ = unix.Syncfs(top.FD())
	return nil
}

// fileOfVolume finds the image of a volume, wherever it is.
func fileOfVolume(p engine.Place, v engine.Volume) (loop.File, error) {
	image, err := openFile(p.Trash, v.UUID, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		image, err = openFile(p.Images, imageName(v.Name), unix.O_RDONLY)
	}
	if err != nil {
		return loop.File{}, err
	}
	defer image.Close()
	return loop.FileOf(image)
}

// bury unmounts what is left of a volume after Cut, or after the image could not be
// written, so that it can be mounted again. It is a conflict while somebody has it.
func (e *Engine) bury(ctx context.Context, p engine.Place, v engine.Volume) error {
	target := volumeTarget(p, v)
	info, err := mountAt(target)
	if err != nil || info == nil {
		return err
	}
	down, err := loop.IsCut(info.Source)
	if err == nil && !down {
		down, err = filesystem.IsDown(target)
	}
	if err != nil || !down {
		return err
	}
	image, err := loop.Backing(info.Source)
	if err == nil {
		err = nowhereElse(v, info)
	}
	if err == nil {
		err = unmount(target)
	}
	if err == nil {
		err = loop.Released(ctx, image)
	}
	if err != nil {
		return fmt.Errorf("volume %s was taken off its image, and cannot be mounted again while something uses what is left: stop its containers: %w", v.Name, err)
	}
	return nil
}
