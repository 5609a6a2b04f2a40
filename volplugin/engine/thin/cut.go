package thin

import (
	"context"
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

var _ engine.Cutter = (*Engine)(nil)

// Cut implements engine.Cutter: the volume's device gets a table on which all I/O
// fails. The pool and its other devices go on.
func (e *Engine) Cut(ctx context.Context, p engine.Place, v engine.Volume) error {
	o, ptr, err := e.openVolume(ctx, p, v.Name)
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer o.close()
	release, err := o.turn(ctx)
	if err != nil {
		return err
	}
	defer release()
	name := o.deviceName(ptr.Device)
	table, err := o.client.Table(name)
	if missing(err) {
		return nil
	}
	if err != nil || isCut(table) {
		return err
	}
	if err := o.client.Load(name, false, devmapper.Error(devmapper.Length(table))); err != nil {
		return err
	}
	if err := errors.Join(o.client.SuspendNow(name), o.client.Resume(name)); err != nil {
		return err
	}
	return o.shutdown(ptr.Device)
}

// shutdown makes a file system whose device fails see that at once.
func (o *opened) shutdown(id uint32) error {
	mounted, err := o.isMounted(id)
	if err != nil || !mounted {
		return err
	}
	top, err := rooted.Open(o.target(id))
	if errors.Is(err, unix.EIO) {
		return nil // it has
	}
	if err != nil {
		return err
	}
	defer top.Close()
	if err := filesystem.Shutdown(top.FD()); !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	_ = unix.Syncfs(top.FD()) // a btrfs sees it at the end of its transaction
	return nil
}

// isCut tells whether a table is the one that Cut leaves.
func isCut(table []devmapper.Target) bool {
	return len(table) == 1 && table[0].Kind == devmapper.Error(0).Kind
}

// bury removes a device that was cut, so that it can be made again. It is a conflict
// while somebody has it.
func (o *opened) bury(id uint32) error {
	table, err := o.client.Table(o.deviceName(id))
	if errors.Is(err, fs.ErrNotExist) || err == nil && !isCut(table) {
		return nil
	}
	if err != nil {
		return err
	}
	return o.deactivate(id)
}
