package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/enginetest"
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

func TestImageHasAllItsSpace(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "ext4")
		allocated := func(v engine.Volume) uint64 {
			var st unix.Stat_t
			assert.NilError(t, unix.Stat(file(p, v), &st))
			return uint64(st.Blocks) * 512
		}
		thick, sparse := volume("thick", kind), volume("sparse", kind)
		sparse.Sparse = true
		create(t, e, p, thick)
		create(t, e, p, sparse)
		assert.Assert(t, allocated(thick) >= thick.Size)
		assert.Assert(t, allocated(sparse) < sparse.Size/2, "%d", allocated(sparse))
		// By hand, and taken back.
		f, err := os.OpenFile(file(p, thick), os.O_RDWR, 0)
		assert.NilError(t, err)
		defer f.Close()
		assert.NilError(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(thick.Size)-mebi, mebi))
		assert.Assert(t, allocated(thick) < thick.Size)
		attach(t, e, p, thick)
		assert.Assert(t, allocated(thick) >= thick.Size)
	})
}

// What is deleted in a sparse image is given back.
func TestSparseShrinksAgain(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "ext4")
		v := volume("web", kind)
		v.Sparse = true
		create(t, e, p, v)
		attach(t, e, p, v)
		write(t, e, p, v, "f", strings.Repeat("x", 40*mebi))
		var st unix.Stat_t
		assert.NilError(t, unix.Stat(file(p, v), &st))
		within(t, e, p, v, func(path string) { assert.NilError(t, os.Remove(filepath.Join(path, "f"))) })
		assert.NilError(t, e.Detach(t.Context(), p, v))
		assert.NilError(t, unix.Stat(file(p, v), &st))
		assert.Assert(t, st.Blocks*512 < int64(v.Size)/2, "%d", st.Blocks*512)
	})
}

func TestRootIsFull(t *testing.T) {
	p := enginetest.NewPlace(t, mounttest.Disk(t, "ext4", 400<<20))
	e := New(all())
	v := engine.Volume{Name: "web", UUID: uuid.NewString(), Size: 100 << 20, FS: "ext4"}
	create(t, e, p, v)
	attach(t, e, p, v)
	large := engine.Volume{Name: "large", UUID: uuid.NewString(), Size: 1 << 30}
	_, err := e.Create(t.Context(), p, large, engine.Attributes{})
	assert.Equal(t, fault.Kind(err), "exhausted")
	assert.ErrorContains(t, err, "the root has no room for 1GiB")
	err = e.Resize(t.Context(), p, v, 1<<30)
	assert.Equal(t, fault.Kind(err), "exhausted")
	usage, err := e.Usage(t.Context(), p, v)
	assert.NilError(t, err)
	assert.Equal(t, usage.Limit, v.Size)

	// Others fill the root; what has its space can still be written.
	fill(t, filepath.Join(p.Root.Path(), "filler"))
	small := engine.Volume{Name: "small", UUID: uuid.NewString(), Size: 50 << 20, FS: "ext4", Sparse: true}
	_, err = e.Create(t.Context(), p, small, engine.Attributes{})
	assert.Equal(t, fault.Kind(err), "exhausted")
	assert.ErrorContains(t, err, "the root is nearly full")
	write(t, e, p, v, "f", strings.Repeat("x", 60*mebi))
	within(t, e, p, v, func(path string) { flush(t, path) })
	names, err := p.Images.Names()
	assert.NilError(t, err)
	assert.DeepEqual(t, names, []string{"web.img"})
	names, err = p.Tmp.Names()
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0, "%v", names)
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

// A full volume is full for its own programs, and for nobody else. What has to copy
// files inside leaves nothing of a copy that finds no room.
func TestVolumeIsFull(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "ext4")
		v, other := volume("web", kind), volume("other", kind)
		create(t, e, p, v)
		create(t, e, p, other)
		attach(t, e, p, v)
		attach(t, e, p, other)
		write(t, e, p, v, "first", "x")
		within(t, e, p, v, func(path string) { fill(t, filepath.Join(path, "f")) })
		write(t, e, p, other, "f", strings.Repeat("y", 20*mebi))
		_, err := e.Snapshot(t.Context(), p, v, "s", nil)
		if err != nil {
			assert.ErrorIs(t, err, unix.ENOSPC)
			_, err = e.OpenSnapshot(t.Context(), p, v, "s")
			assert.ErrorIs(t, err, fs.ErrNotExist)
		}
		assert.NilError(t, e.RemoveSnapshot(t.Context(), p, v, "s"))
		assert.Equal(t, read(t, e, p, v, "first"), "x")
		// A clone that is too small says so.
		small := volume("small", filesystem.Ext4)
		small.Size = 20 << 20
		_, err = e.Clone(t.Context(), p, v, "", small, nil)
		assert.Equal(t, fault.Kind(err), "exhausted", "%v", err)
		assert.ErrorContains(t, err, "a volume of 20MiB does not hold")
		found, err := e.Find(p, "small")
		assert.NilError(t, err)
		assert.Assert(t, !found)
		within(t, e, p, v, func(path string) {
			assert.NilError(t, os.Remove(filepath.Join(path, "f")))
			flush(t, path)
		})
		// btrfs frees what a snapshot had in the background.
		poll.WaitOn(t, func(poll.LogT) poll.Result {
			within(t, e, p, v, func(path string) { flush(t, path) })
			usage, err := e.Usage(t.Context(), p, v)
			if err != nil {
				return poll.Error(err)
			}
			if usage.Free < 20*mebi {
				return poll.Continue("%+v", usage)
			}
			return poll.Success()
		}, poll.WithTimeout(time.Minute))
		write(t, e, p, v, "g", "z")
		assert.Equal(t, len(read(t, e, p, other, "f")), 20*mebi)
	})
}

func TestGrowWhileWritten(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "ext4")
		v := volume("web", kind)
		create(t, e, p, v)
		attach(t, e, p, v)
		data, err := e.Open(p, v)
		assert.NilError(t, err)
		defer data.Close()
		var stop atomic.Bool
		var writer sync.WaitGroup
		writer.Go(func() {
			for i := 0; !stop.Load(); i++ {
				path := filepath.Join(data.ProcPath(), "f"+strconv.Itoa(i%20))
				assert.Check(t, os.WriteFile(path, make([]byte, 100_000), 0o600))
			}
		})
		err = e.Resize(t.Context(), p, v, v.Size+200*mebi)
		if kind == filesystem.Ext4 && !hasSysResource(t) {
			assert.ErrorContains(t, err, "CAP_SYS_RESOURCE")
			err = nil
		}
		stop.Store(true)
		writer.Wait()
		assert.NilError(t, err)
		if kind != filesystem.Ext4 {
			usage, err := e.Usage(t.Context(), p, v)
			assert.NilError(t, err)
			assert.Equal(t, usage.Limit, v.Size+200*mebi)
			assert.Assert(t, usage.Free > 150*mebi, "%+v", usage)
			assert.NilError(t, data.Close())
			// The caller was killed before it wrote the new size down.
			assert.NilError(t, e.Detach(t.Context(), p, v))
			assert.NilError(t, e.Attach(t.Context(), p, v))
			assert.NilError(t, e.Resize(t.Context(), p, v, v.Size+200*mebi))
		}
	})
}

func TestShrink(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p := rootOn(t, "ext4")
		v := volume("web", kind)
		v.Size = 512 << 20
		create(t, e, p, v)
		attach(t, e, p, v)
		write(t, e, p, v, "f", strings.Repeat("x", 10*mebi))
		err := e.Resize(t.Context(), p, v, 400<<20)
		info, failure := os.Stat(file(p, v))
		assert.NilError(t, failure)
		if kind == filesystem.Btrfs {
			assert.NilError(t, err)
			assert.Equal(t, info.Size(), int64(400<<20))
			assert.NilError(t, e.Detach(t.Context(), p, v))
			assert.NilError(t, e.Attach(t.Context(), p, v))
		} else {
			assert.Equal(t, fault.Kind(err), "conflict")
			assert.Equal(t, info.Size(), int64(v.Size))
		}
		assert.Equal(t, len(read(t, e, p, v, "f")), 10*mebi)
	})
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
