package treeengine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// New makes an engine of what a file system can do with trees.
func New(trees engine.Trees) engine.Engine {
	if marked, ok := trees.(marker); ok {
		return comparer{trunk{trees}, marked}
	}
	return trunk{trees}
}

// trunk implements engine.Engine.
type trunk struct{ trees engine.Trees }

// A pruner is a kind of trees of which the file system keeps books that rmdir(2)
// leaves behind.
type pruner interface {
	// Prune removes an empty tree. The error is rmdir's.
	Prune(parent *rooted.Dir, name string) error
}

// A marker is a kind of trees of which the file system knows when they were changed.
type marker interface {
	// Mark and Unchanged are those of engine.Comparer, for the top directory of a
	// read-only copy.
	Mark(ctx context.Context, tree *rooted.Dir) (engine.Mark, error)
	Unchanged(ctx context.Context, tree *rooted.Dir, since engine.Mark) (bool, error)
}

// comparer implements engine.Comparer.
type comparer struct {
	trunk
	marker marker
}

func (e comparer) Mark(ctx context.Context, p engine.Place, v engine.Volume, snap string) (engine.Mark, error) {
	dir, err := e.source(p, v, snap)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	return e.marker.Mark(ctx, dir)
}

func (e comparer) Unchanged(ctx context.Context, p engine.Place, v engine.Volume, snap string, since engine.Mark) (bool, error) {
	dir, err := e.source(p, v, snap)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	return e.marker.Unchanged(ctx, dir, since)
}

func (e trunk) Name() string { return e.trees.Name() }

func (e trunk) Probe(ctx context.Context, p engine.Place) (engine.Abilities, error) {
	return e.trees.Probe(ctx, p.Root)
}

func (e trunk) Find(p engine.Place, name string) (bool, error) { return e.present(p.Root, name) }

// present tells whether there is a tree. It errs for what is none.
func (e trunk) present(dir *rooted.Dir, name string) (bool, error) {
	handle, err := dir.Handle(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer handle.Close()
	return true, e.trees.Check(dir, name)
}

func (e trunk) Create(ctx context.Context, p engine.Place, v engine.Volume, attr engine.Attributes) (created bool, err error) {
	if err := p.Before(ctx, "create.make"); err != nil {
		return false, err
	}
	// Until its owner and mode are right nobody but root looks inside.
	err = e.trees.Make(p.Root, v.Name, v.NoCOW)
	created = err == nil
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	if err := e.prepare(ctx, p, v, attr, created); err != nil {
		if created {
			err = errors.Join(err, e.Abandon(p, v))
		}
		return false, err
	}
	return created, nil
}

// prepare sets limit, owner and mode and puts the directory on disk.
func (e trunk) prepare(ctx context.Context, p engine.Place, v engine.Volume, attr engine.Attributes, created bool) error {
	if !created {
		if found, err := e.present(p.Root, v.Name); err != nil || !found {
			return errors.Join(err, missing(p.Root, v.Name, found))
		}
	}
	if v.Size > 0 {
		if err := e.limit(ctx, p, p.Root, v.Name, v.Size); err != nil {
			return err
		}
	}
	asked := attr.UID != nil || attr.GID != nil || attr.Mode != nil
	if !created && !asked {
		return nil
	}
	data, err := p.Root.Dir(v.Name)
	if err != nil {
		return err
	}
	defer data.Close()
	if err := p.Before(ctx, "create.attributes"); err != nil {
		return err
	}
	return errors.Join(attr.Set(data, created), p.Root.Sync())
}

// limit sets a limit on a tree that may have content.
func (e trunk) limit(ctx context.Context, p engine.Place, dir *rooted.Dir, name string, size uint64) error {
	can, err := e.trees.Probe(ctx, dir)
	if err != nil {
		return err
	}
	if can.Limit && size > 0 {
		usage, err := e.trees.Usage(ctx, dir, name)
		if err != nil {
			return err
		}
		if usage.Used > size {
			return fault.Conflict("size %d is less than the %d bytes that are used", size, usage.Used)
		}
	}
	if err := p.Before(ctx, "limit"); err != nil {
		return err
	}
	return e.trees.Limit(ctx, dir, name, size)
}

func (e trunk) Abandon(p engine.Place, v engine.Volume) error {
	ctx := context.Background() // what was begun is to go, however long it takes
	return errors.Join(e.abandonClone(ctx, p, v), e.abandonEmpty(ctx, p, v))
}

func (e trunk) abandonEmpty(ctx context.Context, p engine.Place, v engine.Volume) error {
	if err := p.Before(ctx, "abandon"); err != nil {
		return err
	}
	remove := p.Root.Rmdir
	if trees, ok := e.trees.(pruner); ok {
		remove = func(name string) error { return trees.Prune(p.Root, name) }
	}
	err := remove(v.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTEMPTY), errors.Is(err, fs.ErrExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EBUSY):
		return nil
	case err != nil:
		return err
	}
	return p.Root.Sync()
}

func (e trunk) Attach(ctx context.Context, p engine.Place, v engine.Volume) error {
	// From now on somebody may write, and the data is nobody's to abandon.
	if _, err := p.Tmp.Stat(cloned(v)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := p.Before(ctx, "attach.forget"); err != nil {
		return err
	}
	return forget(p, cloned(v))
}

func (e trunk) Detach(context.Context, engine.Place, engine.Volume) error { return nil }

func (e trunk) Open(p engine.Place, v engine.Volume) (*rooted.Dir, error) {
	return p.Root.Handle(v.Name)
}

func (e trunk) Retire(ctx context.Context, p engine.Place, v engine.Volume) error {
	if found, err := e.present(p.Root, v.Name); err != nil || !found {
		return err
	}
	if err := p.Before(ctx, "retire.move"); err != nil {
		return err
	}
	return move(p.Root, v.Name, p.Trash, v.UUID)
}

func (e trunk) Reinstate(ctx context.Context, p engine.Place, v engine.Volume) error {
	retired, err := e.present(p.Trash, v.UUID)
	if err != nil {
		return err
	}
	if !retired {
		found, err := e.present(p.Root, v.Name)
		return errors.Join(err, missing(p.Trash, v.UUID, found))
	}
	if err := p.Before(ctx, "reinstate.move"); err != nil {
		return err
	}
	return move(p.Trash, v.UUID, p.Root, v.Name)
}

func (e trunk) Rename(ctx context.Context, p engine.Place, v engine.Volume, to string) error {
	found, err := e.present(p.Root, v.Name)
	if err != nil {
		return err
	}
	if !found {
		moved, err := e.present(p.Root, to)
		return errors.Join(err, missing(p.Root, v.Name, moved))
	}
	if err := p.Before(ctx, "rename.move"); err != nil {
		return err
	}
	return move(p.Root, v.Name, p.Root, to)
}

func (e trunk) Resize(ctx context.Context, p engine.Place, v engine.Volume, size uint64) error {
	if found, err := e.present(p.Root, v.Name); err != nil || !found {
		return errors.Join(err, missing(p.Root, v.Name, found))
	}
	return e.limit(ctx, p, p.Root, v.Name, size)
}

func (e trunk) Usage(ctx context.Context, p engine.Place, v engine.Volume) (engine.Usage, error) {
	if found, err := e.present(p.Root, v.Name); err != nil || !found {
		return engine.Usage{}, errors.Join(err, missing(p.Root, v.Name, found))
	}
	usage, err := e.trees.Usage(ctx, p.Root, v.Name)
	if err != nil || usage.Exclusive == 0 {
		return usage, err
	}
	// What the tree shares with its own snapshots goes with them, and is not known.
	snaps, err := e.snapshotNames(p, v)
	if len(snaps) > 0 {
		usage.Exclusive = 0
	}
	return usage, err
}

// Destroy moves what it deletes out of the trash first, so that nobody takes half of
// it back.
func (e trunk) Destroy(ctx context.Context, p engine.Place, v engine.Volume) error {
	retired, err := e.present(p.Trash, v.UUID)
	if err != nil {
		return err
	}
	if retired {
		if err := e.discard(ctx, p, p.Trash, v.UUID, destroyed(v)); err != nil {
			return err
		}
	}
	if err := e.destroySnapshots(ctx, p, v); err != nil {
		return err
	}
	names, err := p.Tmp.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, v.UUID+".") {
			continue
		}
		if err := p.Before(ctx, "destroy.tmp"); err != nil {
			return err
		}
		remove := e.trees.Delete
		if name == cloned(v) {
			remove = func(_ context.Context, dir *rooted.Dir, name string) error { return dir.Remove(name) }
		}
		if err := remove(ctx, p.Tmp, name); err != nil {
			return err
		}
	}
	return p.Tmp.Sync()
}

func (e trunk) destroySnapshots(ctx context.Context, p engine.Place, v engine.Volume) error {
	names, err := e.snapshotNames(p, v)
	if err != nil {
		return err
	}
	if len(names) > 0 {
		dir, err := p.Snapshots.Dir(v.UUID)
		if err != nil {
			return err
		}
		defer dir.Close()
		for _, name := range names {
			if err := e.discard(ctx, p, dir, name, removed(v, name)); err != nil {
				return err
			}
		}
	}
	if err := p.Before(ctx, "destroy.directory"); err != nil {
		return err
	}
	err = p.Snapshots.Rmdir(v.UUID)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return p.Snapshots.Sync()
}

// snapshotNames lists a volume's snapshots. Their records are files, and the caller's.
func (e trunk) snapshotNames(p engine.Place, v engine.Volume) ([]string, error) {
	dir, err := p.Snapshots.Dir(v.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	entries, err := dir.Names()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, name := range entries {
		_, err := e.present(dir, name)
		if errors.Is(err, rooted.ErrNotDir) || errors.Is(err, rooted.ErrSymlink) {
			continue
		}
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, nil
}

// discard deletes a tree: first its name goes, in one step, then what is in it.
func (e trunk) discard(ctx context.Context, p engine.Place, dir *rooted.Dir, name, temp string) error {
	if err := e.clear(ctx, p, temp); err != nil {
		return err
	}
	if err := p.Before(ctx, "discard.move"); err != nil {
		return err
	}
	err := move(dir, name, p.Tmp, temp)
	if errors.Is(err, unix.EROFS) {
		// A sealed tree cannot get another parent. Its deletion is one step of the
		// file system's.
		if err := p.Before(ctx, "discard.sealed"); err != nil {
			return err
		}
		return errors.Join(e.trees.Delete(ctx, dir, name), dir.Sync())
	}
	if err != nil {
		return err
	}
	return e.clear(ctx, p, temp)
}

// making is what Trees may call a copy beside its name as long as it is not complete.
const making = ".making"

// clear deletes what is left in Tmp under a name.
func (e trunk) clear(ctx context.Context, p engine.Place, temp string) error {
	for _, name := range []string{temp, temp + making} {
		if _, err := p.Tmp.Stat(name); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := p.Before(ctx, "clear"); err != nil {
			return err
		}
		if err := errors.Join(e.trees.Delete(ctx, p.Tmp, name), p.Tmp.Sync()); err != nil {
			return err
		}
	}
	return nil
}

// move renames a tree in one step. The error wraps fs.ErrExist when the new name is
// taken.
func move(from *rooted.Dir, name string, to *rooted.Dir, newName string) error {
	err := from.RenameNew(name, to, newName)
	if err != nil {
		return err
	}
	if from == to {
		return to.Sync()
	}
	// The new name first: a tree that is seen twice is better than none.
	return errors.Join(to.Sync(), from.Sync())
}

// forget removes a file in Tmp.
func forget(p engine.Place, name string) error {
	if err := p.Tmp.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return p.Tmp.Sync()
}

// missing is the error about a tree that is not there.
func missing(dir *rooted.Dir, name string, found bool) error {
	if found {
		return nil
	}
	return fmt.Errorf("%s/%s: %w", dir.Path(), name, fs.ErrNotExist)
}
