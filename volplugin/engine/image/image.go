package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/sys/mountinfo"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/keylock"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/loop"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// suffix of image files; their names without it are those of volumes and snapshots.
const suffix = ".img"

// tmpName is the directory for what is on its way in an image.
const tmpName = "tmp"

// Engine implements engine.Engine.
type Engine struct {
	// kinds that volumes can have, the default first.
	kinds []filesystem.Kind
	trees map[filesystem.Kind]engine.Trees
	// freezes and sources have a lock for each volume by UUID: one is held while its
	// file system is frozen, the other while a clone is made of it. Several clones may
	// be made of one volume at a time, and it may be attached meanwhile.
	freezes, sources *keylock.Locker
}

var _ engine.Engine = (*Engine)(nil)

// New makes the engine for the kinds of file systems that trees has, of each what
// it can do with the trees in an image. The main program has to call
// filesystem.Watchdog.
func New(trees map[filesystem.Kind]engine.Trees) *Engine {
	e := &Engine{trees: trees, freezes: keylock.New(), sources: keylock.New()}
	for _, kind := range filesystem.Kinds {
		if trees[kind] != nil {
			e.kinds = append(e.kinds, kind)
		}
	}
	return e
}

// Name returns "image".
func (e *Engine) Name() string { return "image" }

// Probe implements engine.Engine. What it says holds for volumes whose file system the
// engine chooses.
func (e *Engine) Probe(_ context.Context, p engine.Place) (engine.Abilities, error) {
	if err := loop.Available(); err != nil {
		return engine.Abilities{}, err
	}
	kind, err := e.defaultKind(0)
	if err != nil {
		return engine.Abilities{}, err
	}
	root, err := mountOf(p.Root)
	if err != nil {
		return engine.Abilities{}, err
	}
	can := engine.Abilities{FileSystem: root.FSType, Limit: true, Exclusive: true, Consistency: engine.None}
	if kind == filesystem.Btrfs {
		can.Instant, can.Consistency = true, engine.Crash
		return can, nil
	}
	shares, err := reflinks(p)
	if shares {
		can.Instant, can.Consistency = true, engine.Frozen
	}
	return can, err
}

// mountOf finds the mount of a directory in mountinfo.
func mountOf(dir *rooted.Dir) (*mountinfo.Info, error) {
	return mountByID(dir.Path(), dir.MountID())
}

func mountByID(path string, id int) (*mountinfo.Info, error) {
	list, err := mountinfo.GetMounts(func(info *mountinfo.Info) (skip, stop bool) {
		found := info.ID == id
		return !found, found
	})
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("the mount of %s is not in mountinfo", path)
	}
	return list[0], nil
}

// defaultKind is the first kind that this host has and that fits, of all sizes if
// size is 0.
func (e *Engine) defaultKind(size uint64) (filesystem.Kind, error) {
	var reasons []error
	for _, kind := range e.kinds {
		err := filesystem.Available(kind)
		if err == nil && size > 0 {
			err = fits(kind, size)
		}
		if err == nil {
			return kind, nil
		}
		reasons = append(reasons, err)
	}
	return "", fmt.Errorf("no file system can be made in an image: %w", errors.Join(reasons...))
}

func fits(kind filesystem.Kind, size uint64) error {
	if size < kind.MinSize() {
		return fault.Invalid("option size=%s: %s needs %s", units.BytesSize(float64(size)), kind, units.BytesSize(float64(kind.MinSize())))
	}
	return nil
}

// kindFor chooses the file system of a new volume.
func (e *Engine) kindFor(v engine.Volume) (filesystem.Kind, error) {
	if v.Size == 0 {
		return "", fault.Invalid("option size: engine image cannot do without, as in size=10G")
	}
	if v.FS == "" {
		return e.defaultKind(v.Size)
	}
	kind := filesystem.Kind(v.FS)
	if err := e.known(kind); err != nil {
		return "", err
	}
	if err := filesystem.Available(kind); err != nil {
		return "", fmt.Errorf("option fs=%s: %w", v.FS, err)
	}
	return kind, fits(kind, v.Size)
}

func (e *Engine) known(kind filesystem.Kind) error {
	if e.trees[kind] != nil {
		return nil
	}
	words := make([]string, len(e.kinds))
	for i, kind := range e.kinds {
		words[i] = string(kind)
	}
	return fault.Invalid("option fs=%q: want one of %s", kind, strings.Join(words, ", "))
}

// Names of files, and of mount points in Local.
func imageName(name string) string { return name + suffix }

func creation(v engine.Volume) string              { return v.UUID + ".create" }
func clone(v engine.Volume) string                 { return v.UUID + ".clone" }
func cloned(v engine.Volume) string                { return v.UUID + ".cloned" }
func snapshot(v engine.Volume, snap string) string { return v.UUID + ".snapshot." + snap }
func rollback(v engine.Volume) string              { return v.UUID + ".rollback" }
func rollbackPart(v engine.Volume) string          { return v.UUID + ".rollback.part" }

func volumeTarget(p engine.Place, v engine.Volume) string { return filepath.Join(p.Local, v.UUID) }
func workTarget(p engine.Place, v engine.Volume) string {
	return filepath.Join(p.Local, v.UUID+".work")
}
func snapshotTarget(p engine.Place, v engine.Volume, snap string) string {
	return filepath.Join(p.Local, v.UUID+"@"+snap)
}

// insideVolume is the volume as package treeengine sees it in an image: its data is
// the entry data of the top, its snapshots are in the entry snapshots.
func insideVolume(v engine.Volume) engine.Volume {
	return engine.Volume{Name: filesystem.DataName, UUID: filesystem.SnapshotsName, NoCOW: v.NoCOW}
}

// inside runs a call of package treeengine's in an image's file system.
func (e *Engine) inside(p engine.Place, top *rooted.Dir, kind filesystem.Kind, call func(engine.Engine, engine.Place) error) error {
	if err := top.EnsureDir(tmpName, 0o700); err != nil {
		return err
	}
	tmp, err := top.Dir(tmpName)
	if err != nil {
		return err
	}
	defer tmp.Close()
	return call(treeengine.New(e.trees[kind]), engine.Place{Root: top, Snapshots: top, Tmp: tmp, Trash: tmp, Local: p.Local, Step: p.Step})
}

// Find implements engine.Engine.
func (e *Engine) Find(p engine.Place, name string) (bool, error) {
	return present(p.Images, imageName(name))
}

// missing is the error about a file that is not there, unless found.
func missing(dir *rooted.Dir, name string, found bool) error {
	if found {
		return nil
	}
	return fmt.Errorf("%s/%s: %w", dir.Path(), name, fs.ErrNotExist)
}
