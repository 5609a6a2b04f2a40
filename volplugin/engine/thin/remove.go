package thin

import (
	"context"
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

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
