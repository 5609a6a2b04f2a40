package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/loop"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Create implements engine.Engine.
func (e *Engine) Create(ctx context.Context, p engine.Place, v engine.Volume, attr engine.Attributes) (created bool, err error) {
	image, err := openFile(p.Images, imageName(v.Name), unix.O_RDWR)
	if err == nil {
		defer image.Close()
		return false, e.adopt(ctx, p, v, image, attr)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	kind, err := e.kindFor(v)
	if err != nil {
		return false, err
	}
	if err := e.build(ctx, p, creation(v), v, kind, func(top *rooted.Dir) error { return setAttributes(top, attr, true) }); err != nil {
		return false, err
	}
	err = p.Before(ctx, "create.move")
	if err == nil {
		err = move(p.Tmp, creation(v), p.Images, imageName(v.Name))
	}
	if err != nil {
		return false, errors.Join(err, clear(context.WithoutCancel(ctx), p, creation(v)))
	}
	return true, nil
}

// adopt takes over an image that is there.
func (e *Engine) adopt(ctx context.Context, p engine.Place, v engine.Volume, image *os.File, attr engine.Attributes) error {
	if attr == (engine.Attributes{}) {
		_, err := e.identify(image)
		return err
	}
	return e.reach(ctx, p, v, image, func(top *rooted.Dir, _ filesystem.Kind) error {
		if err := p.Before(ctx, "create.attributes"); err != nil {
			return err
		}
		return setAttributes(top, attr, false)
	})
}

// setAttributes sets owner and mode of the data and puts them on disk.
func setAttributes(top *rooted.Dir, attr engine.Attributes, created bool) error {
	data, err := top.Dir(filesystem.DataName)
	if err != nil {
		return err
	}
	defer data.Close()
	return attr.Set(data, created)
}

// build makes an image in Tmp with an empty data directory, and lets fill put
// something into it. It is on disk when build returns, and nothing is left of
// it after an error.
func (e *Engine) build(ctx context.Context, p engine.Place, temp string, v engine.Volume, kind filesystem.Kind, fill func(top *rooted.Dir) error) (err error) {
	if err := clear(ctx, p, temp); err != nil {
		return err
	}
	if err := p.Before(ctx, "image.file"); err != nil {
		return err
	}
	image, err := newFile(p, temp)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, image.Close())
		if err != nil {
			err = errors.Join(err, clear(context.WithoutCancel(ctx), p, temp))
		}
	}()
	if v.NoCOW {
		if err := setNoCOW(image); err != nil {
			return err
		}
	}
	if err := extend(ctx, p, image, v.Size, v.Sparse); err != nil {
		return err
	}
	if err := p.Before(ctx, "image.format"); err != nil {
		return err
	}
	if err := filesystem.Make(ctx, kind, childPath(image), filesystem.MakeOptions{Label: v.Name, Zeroed: true}); err != nil {
		return fmt.Errorf("volume %s: %w", v.Name, err)
	}
	if !v.Sparse {
		// mkfs gives space back where the root's file system cannot write zeros fast.
		if err := reserve(ctx, p, image, 0, v.Size); err != nil {
			return err
		}
	}
	err = e.work(ctx, p, v, image, func(top *rooted.Dir, kind filesystem.Kind) error {
		if err := p.Before(ctx, "image.fill"); err != nil {
			return err
		}
		// Nobody but root gets beside the data, whatever that is opened to.
		if err := top.SetMode(0o700); err != nil {
			return err
		}
		for _, name := range []string{filesystem.SnapshotsName, tmpName} {
			if err := top.Mkdir(name, 0o700); err != nil {
				return err
			}
		}
		if err := e.trees[kind].Make(top, filesystem.DataName, v.NoCOW); err != nil {
			return err
		}
		return fill(top)
	})
	if err != nil {
		return err
	}
	return image.Sync()
}

// Abandon implements engine.Engine.
func (e *Engine) Abandon(p engine.Place, v engine.Volume) error {
	ctx := context.Background() // what was begun is to go, however long it takes
	return errors.Join(unmount(workTarget(p, v)), clear(ctx, p, creation(v)), e.abandonClone(ctx, p, v), e.abandonEmpty(ctx, p, v))
}

// abandonEmpty removes an image that nobody wrote to.
func (e *Engine) abandonEmpty(ctx context.Context, p engine.Place, v engine.Volume) error {
	image, err := openFile(p.Images, imageName(v.Name), unix.O_RDWR)
	if errors.Is(err, fs.ErrNotExist) || isForeign(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer image.Close()
	id, err := loop.FileOf(image)
	if err != nil {
		return err
	}
	if bound, err := loop.Bound(id); err != nil || bound { // in use
		return err
	}
	if _, err := filesystem.Identify(image); errors.Is(err, filesystem.ErrUnknown) {
		return nil
	}
	empty := false
	err = e.work(ctx, p, v, image, func(top *rooted.Dir, _ filesystem.Kind) (err error) {
		empty, err = unused(top)
		return err
	})
	if err != nil || !empty {
		return err
	}
	if err := p.Before(ctx, "abandon"); err != nil {
		return err
	}
	return errors.Join(p.Images.Remove(imageName(v.Name)), p.Images.Sync())
}

// unused tells whether an image's data is empty, and there are no snapshots. An
// image without these directories is somebody else's.
func unused(top *rooted.Dir) (bool, error) {
	for _, name := range []string{filesystem.DataName, filesystem.SnapshotsName} {
		dir, err := top.Dir(name)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		empty, err := dir.Empty()
		if err := errors.Join(err, dir.Close()); err != nil || !empty {
			return false, err
		}
	}
	return true, nil
}

// isForeign tells whether something that is no image has an image's name.
func isForeign(err error) bool {
	return errors.Is(err, rooted.ErrSymlink) || errors.Is(err, rooted.ErrNotFile) || errors.Is(err, rooted.ErrMountPoint)
}
