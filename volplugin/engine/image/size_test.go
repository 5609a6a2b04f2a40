package image

import (
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
)

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
		if kind == filesystem.Ext4 && !mounttest.HasSysResource(t) {
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
