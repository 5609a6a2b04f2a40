package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/loop"
)

const mebi = 1 << 20

func volume(name string, kind filesystem.Kind) engine.Volume {
	return engine.Volume{Name: name, UUID: uuid.NewString(), FS: string(kind), Size: size(kind)}
}

func create(t testing.TB, e *Engine, p engine.Place, v engine.Volume) {
	t.Helper()
	created, err := e.Create(t.Context(), p, v, engine.Attributes{})
	assert.NilError(t, err)
	assert.Assert(t, created)
}

// attach attaches until the test ends.
func attach(t testing.TB, e *Engine, p engine.Place, v engine.Volume) {
	t.Helper()
	assert.NilError(t, e.Attach(t.Context(), p, v))
	t.Cleanup(func() { assert.Check(t, e.Detach(context.WithoutCancel(t.Context()), p, v)) })
}

// within runs use with the path of a volume's data.
func within(t testing.TB, e *Engine, p engine.Place, v engine.Volume, use func(path string)) {
	t.Helper()
	data, err := e.Open(p, v)
	assert.NilError(t, err)
	defer data.Close()
	use(data.ProcPath() + "/.")
}

func write(t testing.TB, e *Engine, p engine.Place, v engine.Volume, file, content string) {
	t.Helper()
	within(t, e, p, v, func(path string) {
		assert.NilError(t, os.WriteFile(filepath.Join(path, file), []byte(content), 0o600))
	})
}

func read(t testing.TB, e *Engine, p engine.Place, v engine.Volume, file string) (content string) {
	t.Helper()
	within(t, e, p, v, func(path string) {
		data, err := os.ReadFile(filepath.Join(path, file))
		assert.NilError(t, err)
		content = string(data)
	})
	return content
}

func file(p engine.Place, v engine.Volume) string {
	return filepath.Join(p.Images.Path(), v.Name+".img")
}

// bound tells whether a file has a loop device.
func bound(t testing.TB, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	assert.NilError(t, err)
	defer f.Close()
	id, err := loop.FileOf(f)
	assert.NilError(t, err)
	is, err := loop.Bound(id)
	assert.NilError(t, err)
	return is
}

func each(t *testing.T, test func(t *testing.T, e *Engine, kind filesystem.Kind)) {
	for _, kind := range filesystem.Kinds {
		t.Run(string(kind), func(t *testing.T) { test(t, New(all()), kind) })
	}
}

func TestOptionsInWords(t *testing.T) {
	e, p := New(all()), rootOn(t, "ext4")
	for name, test := range map[string]struct {
		volume engine.Volume
		want   string
	}{
		"no size":       {engine.Volume{}, "option size: engine image cannot do without"},
		"unknown fs":    {engine.Volume{Size: 1 << 30, FS: "zfs"}, `option fs="zfs": want one of btrfs, xfs, ext4`},
		"small xfs":     {engine.Volume{Size: 64 << 20, FS: "xfs"}, "option size=64MiB: xfs needs 300MiB"},
		"small btrfs":   {engine.Volume{Size: 64 << 20, FS: "btrfs"}, "option size=64MiB: btrfs needs 256MiB"},
		"small for all": {engine.Volume{Size: 1 << 20}, "ext4 needs 16MiB"},
	} {
		test.volume.Name, test.volume.UUID = "web", uuid.NewString()
		_, err := e.Create(t.Context(), p, test.volume, engine.Attributes{})
		assert.Equal(t, fault.Kind(err), "invalid", name)
		assert.ErrorContains(t, err, test.want)
	}
	nothingLeft(t, p)
}

// nothingLeft checks that there is nothing of volumes in the place.
func nothingLeft(t testing.TB, p engine.Place) {
	t.Helper()
	for _, dir := range []interface {
		Names() ([]string, error)
		Path() string
	}{p.Images, p.Tmp, p.Snapshots} {
		names, err := dir.Names()
		assert.NilError(t, err)
		assert.Equal(t, len(names), 0, "%s: %v", dir.Path(), names)
	}
	entries, err := os.ReadDir(p.Local)
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 0, "%v", entries)
}

// What the host has is chosen, by size.
func TestFileSystemIsChosen(t *testing.T) {
	e, p := New(all()), rootOn(t, "ext4")
	for size, want := range map[uint64]filesystem.Kind{20 << 20: filesystem.Ext4, 300 << 20: filesystem.Btrfs} {
		v := engine.Volume{Name: string(want), UUID: uuid.NewString(), Size: size}
		create(t, e, p, v)
		info, err := filesystem.IdentifyFile(file(p, v))
		assert.NilError(t, err)
		assert.Equal(t, info.Kind, want)
		// Afterwards the image says what it is.
		v.FS = "xfs"
		attach(t, e, p, v)
		write(t, e, p, v, "f", "x")
	}
}

// fill writes a file until the file system is full.
func fill(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	assert.NilError(t, err)
	defer f.Close()
	for _, size := range []int{mebi, 4096} {
		chunk := make([]byte, size)
		for err = nil; err == nil; {
			_, err = f.Write(chunk)
		}
		assert.ErrorIs(t, err, unix.ENOSPC)
	}
	_ = f.Sync()
}

func flush(t testing.TB, path string) {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	assert.NilError(t, err)
	defer unix.Close(fd)
	assert.NilError(t, unix.Syncfs(fd))
}

func TestAttachManyTimesLeavesNothing(t *testing.T) {
	rounds := map[filesystem.Kind]int{filesystem.Btrfs: 20, filesystem.XFS: 20, filesystem.Ext4: 200}
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "ext4")
		v := volume("web", kind)
		create(t, e, p, v)
		for range rounds[kind] {
			assert.NilError(t, e.Attach(t.Context(), p, v))
			assert.NilError(t, e.Detach(t.Context(), p, v))
		}
		assert.Assert(t, !bound(t, file(p, v)))
		entries, err := os.ReadDir(p.Local)
		assert.NilError(t, err)
		assert.Equal(t, len(entries), 0)
	})
}

func TestBusyIsNotDetached(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "ext4")
		v := volume("web", kind)
		create(t, e, p, v)
		attach(t, e, p, v)
		write(t, e, p, v, "f", "x")

		open, err := e.Open(p, v)
		assert.NilError(t, err)
		err = e.Detach(t.Context(), p, v)
		assert.Equal(t, fault.Kind(err), "conflict")
		assert.ErrorContains(t, err, "volume web is in use")
		assert.NilError(t, open.Close())

		// A container's mount, that this process sees.
		t.Run("mounted", func(t *testing.T) {
			container := t.TempDir()
			mounttest.Bind(t, filepath.Join(p.Local, v.UUID, "data"), container)
			err := e.Detach(t.Context(), p, v)
			assert.Equal(t, fault.Kind(err), "conflict")
			assert.ErrorContains(t, err, "it is mounted at "+container)
			assert.Equal(t, read(t, e, p, v, "f"), "x")
		})
		// And one that it does not.
		end := inNamespace(t, "mount --bind "+filepath.Join(p.Local, v.UUID, "data")+" "+t.TempDir())
		err = e.Detach(t.Context(), p, v)
		assert.Equal(t, fault.Kind(err), "conflict")
		assert.ErrorContains(t, err, "in use")
		assert.Equal(t, read(t, e, p, v, "f"), "x")
		end()
		assert.NilError(t, e.Detach(t.Context(), p, v))
		assert.Assert(t, !bound(t, file(p, v)))
	})
}

// A container goes on with a volume that was retired and destroyed, and its space is
// free after that.
func TestDestroyedUnderAContainer(t *testing.T) {
	e, p := New(all()), rootOn(t, "ext4")
	v := volume("web", filesystem.Ext4)
	create(t, e, p, v)
	attach(t, e, p, v)
	image, err := os.Open(file(p, v))
	assert.NilError(t, err)
	defer image.Close()
	container := t.TempDir()
	assert.NilError(t, unix.Mount(filepath.Join(p.Local, v.UUID, "data"), container, "", unix.MS_BIND, ""))
	assert.NilError(t, e.Retire(t.Context(), p, v))
	assert.NilError(t, os.WriteFile(filepath.Join(container, "f"), []byte("x"), 0o600))
	assert.NilError(t, e.Destroy(t.Context(), p, v))
	assert.NilError(t, os.WriteFile(filepath.Join(container, "g"), []byte("x"), 0o600))
	assert.NilError(t, unix.Unmount(container, 0))
	id, err := loop.FileOf(image)
	assert.NilError(t, err)
	assert.NilError(t, loop.Released(t.Context(), id))
	nothingLeft(t, p)
}

func TestDamagedIsLeftAlone(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "ext4")
		v := volume("web", kind)
		create(t, e, p, v)
		// Neither the superblock nor anything else makes sense.
		f, err := os.OpenFile(file(p, v), os.O_RDWR, 0)
		assert.NilError(t, err)
		defer f.Close()
		_, err = f.WriteAt(make([]byte, mebi), 0)
		assert.NilError(t, err)
		err = e.Attach(t.Context(), p, v)
		assert.Equal(t, fault.Kind(err), "unavailable")
		assert.ErrorContains(t, err, "is damaged or was not made by Berth")
		_, err = e.Open(p, v)
		assert.Assert(t, err != nil)
		_, err = e.Create(t.Context(), p, v, engine.Attributes{})
		assert.ErrorContains(t, err, "is damaged")
		assert.NilError(t, e.Abandon(p, v))
		_, err = os.Stat(file(p, v))
		assert.NilError(t, err)
		assert.Assert(t, !bound(t, file(p, v)))
	})
}

// An image that somebody else made has no data directory, and is not taken for an
// empty volume.
func TestNoDataIsNoVolume(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "ext4")
		v := volume("web", kind)
		assert.NilError(t, os.WriteFile(file(p, v), nil, 0o600))
		assert.NilError(t, os.Truncate(file(p, v), int64(v.Size)))
		assert.NilError(t, filesystem.Make(t.Context(), kind, file(p, v), filesystem.MakeOptions{}))
		assert.NilError(t, e.Abandon(p, v))
		attach(t, e, p, v)
		_, err := e.Open(p, v)
		assert.ErrorIs(t, err, fs.ErrNotExist)
		assert.ErrorContains(t, err, "the image of volume web has no directory data")
	})
}

// The successor of a process that was killed while the file system was frozen thaws
// it, if the watchdog went with it.
func TestLeftFrozen(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "ext4")
		v := volume("web", kind)
		create(t, e, p, v)
		attach(t, e, p, v)
		top, err := os.Open(filepath.Join(p.Local, v.UUID))
		assert.NilError(t, err)
		assert.NilError(t, unix.IoctlSetInt(int(top.Fd()), freeze, 0))
		assert.NilError(t, top.Close())
		// Its mounts are gone, but for a container's.
		container := t.TempDir()
		assert.NilError(t, unix.Mount(filepath.Join(p.Local, v.UUID, "data"), container, "", unix.MS_BIND, ""))
		assert.NilError(t, unix.Unmount(filepath.Join(p.Local, v.UUID), unix.MNT_DETACH))
		assert.NilError(t, e.Attach(t.Context(), p, v))
		write(t, e, p, v, "f", "x")
		assert.NilError(t, unix.Unmount(container, 0))
	})
}

// freeze is FIFREEZE of linux/fs.h.
const freeze = 0xc0045877

// Snapshots that are files and such that are inside do not meet unnoticed.
func TestRootWasMoved(t *testing.T) {
	e := New(all())
	p := rootOn(t, "xfs")
	v := volume("web", filesystem.Ext4)
	create(t, e, p, v)
	attach(t, e, p, v)
	write(t, e, p, v, "f", "one")
	_, err := e.Snapshot(t.Context(), p, v, "file", nil)
	assert.NilError(t, err)
	// What ext4 as a root would have made.
	top, kind, err := e.top(p, v)
	assert.NilError(t, err)
	defer top.Close()
	err = e.inside(p, top, kind, func(trees engine.Engine, in engine.Place) error {
		_, err := trees.Snapshot(t.Context(), in, insideVolume(v), "inside", nil)
		return err
	})
	assert.NilError(t, err)
	_, err = e.Rollback(t.Context(), p, v, "file", "kept", nil)
	assert.Equal(t, fault.Kind(err), "conflict")
	assert.ErrorContains(t, err, "snapshots of two sorts")
	write(t, e, p, v, "f", "two")
	_, err = e.Rollback(t.Context(), p, v, "inside", "kept", nil)
	assert.NilError(t, err)
	assert.Equal(t, read(t, e, p, v, "f"), "one")
	// A clone has neither.
	for _, snap := range []string{"", "file", "inside", "kept"} {
		clone := volume("clone-"+snap, filesystem.Ext4)
		_, err := e.Clone(t.Context(), p, v, snap, clone, nil)
		assert.NilError(t, err)
		attach(t, e, p, clone)
		want := "one"
		if snap == "kept" {
			want = "two"
		}
		assert.Equal(t, read(t, e, p, clone, "f"), want)
		for _, none := range []string{"file", "inside", "kept"} {
			_, err = e.OpenSnapshot(t.Context(), p, clone, none)
			assert.ErrorIs(t, err, fs.ErrNotExist)
		}
	}
}

// A clone can be larger, smaller, and of another kind.
func TestCloneIntoAnother(t *testing.T) {
	for root, newPlace := range roots {
		t.Run(root, func(t *testing.T) {
			e, p := New(all()), newPlace(t)
			v := volume("web", filesystem.XFS)
			v.Size = 400 << 20
			create(t, e, p, v)
			attach(t, e, p, v)
			write(t, e, p, v, "f", "x")
			for i, to := range []engine.Volume{
				{FS: "xfs", Size: 600 << 20},
				{FS: "xfs", Size: 310 << 20},
				{FS: "btrfs", Size: 300 << 20},
				{FS: "ext4", Size: 100 << 20},
				{}, // as the origin
			} {
				to.Name, to.UUID = fmt.Sprintf("to%d", i), uuid.NewString()
				_, err := e.Clone(t.Context(), p, v, "", to, nil)
				assert.NilError(t, err)
				attach(t, e, p, to)
				assert.Equal(t, read(t, e, p, to, "f"), "x")
				info, err := filesystem.IdentifyFile(file(p, to))
				assert.NilError(t, err)
				if to.FS == "" {
					to.FS, to.Size = "xfs", v.Size
				}
				assert.Equal(t, string(info.Kind), to.FS)
				usage, err := e.Usage(t.Context(), p, to)
				assert.NilError(t, err)
				assert.Equal(t, usage.Limit, to.Size)
				assert.Assert(t, usage.Free > to.Size/2, "%+v", usage)
			}
		})
	}
}

// Of two file systems with one UUID the kernel would mount the wrong one.
func TestClonesHaveTheirOwnUUIDs(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "xfs")
		v := volume("web", kind)
		create(t, e, p, v)
		seen := map[string]bool{}
		for i := range 3 {
			clone := volume(fmt.Sprintf("clone%d", i), kind)
			_, err := e.Clone(t.Context(), p, v, "", clone, nil)
			assert.NilError(t, err)
			info, err := filesystem.IdentifyFile(file(p, clone))
			assert.NilError(t, err)
			seen[info.UUID.String()] = true
			attach(t, e, p, clone)
			write(t, e, p, clone, "f", clone.Name)
		}
		if kind != filesystem.XFS { // mounted with nouuid
			assert.Equal(t, len(seen), 3)
		}
		attach(t, e, p, v)
		within(t, e, p, v, func(path string) {
			_, err := os.Stat(filepath.Join(path, "f"))
			assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
		})
	})
}
