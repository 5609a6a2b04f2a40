package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/btrfs"
	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/options"
)

// A size is enforced, goes along with clones, and can be changed.
func TestSizesOnBtrfs(t *testing.T) {
	path := mounttest.Disk(t, "btrfs", 256<<20)
	r := openRoot(t, Location{Path: path, Engines: Engines{treeengine.New(btrfs.Trees{}), treeengine.New(copying.Dir())}, Host: "a", Now: time.Now})
	ctx := t.Context()
	const size = 16 << 20
	given := map[string]string{"size": "16M"}
	rec, err := r.Create(ctx, "web", options.Spec{Size: size, Given: given})
	assert.NilError(t, err)
	assert.Equal(t, rec.Engine, "btrfs")
	assert.Equal(t, rec.Size, uint64(size))
	fill := func(name string, n int) error {
		file, err := os.Create(filepath.Join(path, name, "fill"))
		assert.NilError(t, err)
		defer file.Close()
		for range n {
			// Random enough not to be compressed away; synced, so that the quota speaks.
			if _, err := file.Write(make([]byte, 1<<20)); err != nil {
				return err
			}
			if err := file.Sync(); err != nil {
				return err
			}
		}
		return nil
	}
	assert.ErrorIs(t, fill("web", 32), unix.EDQUOT)
	assert.NilError(t, os.Remove(filepath.Join(path, "web", "fill")))
	assert.NilError(t, fill("web", 4))

	clone, err := r.Create(ctx, "clone", options.Spec{From: &options.Source{Volume: "web"}})
	assert.NilError(t, err)
	assert.Equal(t, clone.Size, uint64(size))
	assert.ErrorContains(t, errors.New(clone.EngineReason), "of volume web")
	usage, err := r.Usage(ctx, clone)
	assert.NilError(t, err)
	assert.Equal(t, usage.Limit, uint64(size))
	assert.Assert(t, usage.Used >= 4<<20, "%+v", usage)

	_, err = r.Resize(ctx, "web", 1<<20)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	rec, err = r.Record("web")
	assert.NilError(t, err)
	assert.Equal(t, rec.Size, uint64(size))
	rec, err = r.Resize(ctx, "web", 64<<20)
	assert.NilError(t, err)
	assert.Equal(t, rec.Size, uint64(64<<20))
	assert.NilError(t, fill("web", 32))

	_, err = r.Create(ctx, "plain", options.Spec{Engine: "dir"})
	assert.NilError(t, err)
	_, err = r.Resize(ctx, "plain", size)
	assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	assert.ErrorContains(t, err, "engine=image")

	// From one engine to another, with the owner that was asked for.
	uid, mode := uint32(1000), uint32(0o750)
	moved, err := r.Create(ctx, "moved", options.Spec{Engine: "dir", From: &options.Source{Volume: "clone"}, UID: &uid, Mode: &mode})
	assert.NilError(t, err)
	assert.Equal(t, moved.Size, uint64(0))
	var st unix.Stat_t
	assert.NilError(t, unix.Stat(filepath.Join(path, "moved"), &st))
	assert.Equal(t, st.Uid, uid)
	assert.Equal(t, st.Mode&0o7777, mode)
	info, err := os.Stat(filepath.Join(path, "moved", "fill"))
	assert.NilError(t, err)
	assert.Equal(t, info.Size(), int64(4<<20))
	list, err := r.Snapshots(ctx, "clone")
	assert.NilError(t, err)
	assert.Equal(t, len(list), 0, "the snapshot that was copied from is still there")
}

// held counts who has a volume attached through the caller's own hold.
type held struct{ now, ever atomic.Int32 }

func (h *held) hold(context.Context, Record) (func() error, error) {
	h.now.Add(1)
	h.ever.Add(1)
	return func() error {
		h.now.Add(-1)
		return nil
	}, nil
}

// Whatever needs a volume's data holds it for that time, also when it fails.
func TestVolumesAreHeldWhileTheyAreNeeded(t *testing.T) {
	memory := mounttest.Tmpfs(t, 64<<20)
	for _, name := range []string{"snapshot", "remove snapshot", "rollback", "clone", "copy moment", "copy"} {
		for fail := range 40 {
			s := newScene(t, memory, name)
			var h held
			steps := 0
			o := s.order
			l := Location{Path: o.Root, Engines: o.engines(), Host: "a", Now: time.Now, Hold: h.hold, Step: func(string, string) error {
				steps++
				if steps > fail {
					return unix.EIO
				}
				return nil
			}}
			r, err := l.Open("")
			assert.NilError(t, err)
			_ = operations()[name].do(t.Context(), r) // whether it fails or not
			assert.NilError(t, r.Close())
			assert.Equal(t, h.now.Load(), int32(0), "%s failed at step %d", name, fail)
			if fail == 39 {
				assert.Assert(t, h.ever.Load() > 0, name)
			}
		}
	}
}

func TestFillTellsItsProgressAndCanBeAborted(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	s.as("a", func(r *Root) {
		ctx := t.Context()
		spec := options.Spec{Engine: "other", From: &options.Source{Volume: "web"}}
		_, begun, err := r.CreateBegin(ctx, "new", spec)
		assert.NilError(t, err)
		assert.Assert(t, begun)
		var last engine.Progress
		rec, err := r.CreateFill(ctx, "new", func(p engine.Progress) { last = p })
		assert.NilError(t, err)
		assert.Equal(t, rec.Phase, Ready)
		assert.Equal(t, last.Files, uint64(2))
		assert.Equal(t, last.Bytes, uint64(2))
		rec, err = r.CreateFill(ctx, "new", nil)
		assert.NilError(t, err)
		assert.Equal(t, rec.Phase, Ready)
		assert.Assert(t, errdefs.IsNotFound(second(r.CreateFill(ctx, "none", nil))))
		assert.NilError(t, r.CreateAbort(ctx, "none"))
		assert.NilError(t, r.CreateAbort(ctx, "new"))
		assert.Equal(t, s.content(s.path("new")), "v2", "a whole volume was aborted")
	})
	s.as("a", func(r *Root) {
		_, _, err := r.CreateBegin(t.Context(), "again", options.Spec{From: &options.Source{Volume: "web"}})
		assert.NilError(t, err)
	})
	s.as("b", func(r *Root) {
		ctx := t.Context()
		for _, err := range []error{r.CreateAbort(ctx, "again"), r.Remove(ctx, "again"), second(r.CreateFill(ctx, "again", nil))} {
			assert.Assert(t, errdefs.IsConflict(err), "%v", err)
			assert.ErrorContains(t, err, "again: host a is restoring it")
		}
		age(t, s.path(".berth/volumes/again.json"), staleAfter+time.Minute)
		assert.NilError(t, r.Remove(ctx, "again"))
		_, err := r.Record("again")
		assert.ErrorIs(t, err, ErrNoRecord)
	})
}

// What takes long keeps its record young.
func TestARecordIsKeptFresh(t *testing.T) {
	path := t.TempDir()
	r := openRoot(t, location(path, "a"))
	_, err := r.Create(t.Context(), "web", options.Spec{})
	assert.NilError(t, err)
	file := filepath.Join(path, ".berth/volumes/web.json")
	age(t, file, time.Hour)
	stop := r.keepFreshEvery(t.Context(), r.volumes, "web.json", time.Millisecond)
	for {
		info, err := os.Stat(file)
		assert.NilError(t, err)
		if time.Since(info.ModTime()) < time.Minute {
			break
		}
		time.Sleep(time.Millisecond)
	}
	stop()
	stop = r.keepFreshEvery(t.Context(), r.volumes, "none.json", time.Millisecond)
	time.Sleep(5 * time.Millisecond)
	stop()
	_, err = os.Stat(filepath.Join(path, ".berth/volumes/none.json"))
	assert.Assert(t, os.IsNotExist(err))
}
