package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/options"
)

// full fills a file system until that many bytes are left.
func full(t *testing.T, path string, left uint64) {
	t.Helper()
	file, err := os.Create(filepath.Join(path, "filler"))
	assert.NilError(t, err)
	defer file.Close()
	var st unix.Statfs_t
	assert.NilError(t, unix.Statfs(path, &st))
	assert.NilError(t, unix.Fallocate(int(file.Fd()), 0, 0, int64(st.Bavail*uint64(st.Bsize)-left)))
}

// When there is hardly any room the trash goes first, and no snapshot is made when that
// is not enough. What is there already stays whole.
func TestRoomIsMadeFromTheTrash(t *testing.T) {
	path := mounttest.Disk(t, "ext4", 64<<20, "-m", "0", "-N", "2048")
	r := openRoot(t, location(path, "a"))
	ctx := t.Context()
	clock := time.Now()
	r.Now = func() time.Time { return clock }
	for _, name := range []string{"oldest", "old", "web"} {
		_, err := r.Create(ctx, name, options.Spec{})
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(filepath.Join(path, name, "page"), make([]byte, 4<<20), 0o600))
		if name != "web" {
			assert.NilError(t, r.Remove(ctx, name))
		}
		clock = clock.Add(time.Minute)
	}
	assert.NilError(t, unix.Syncfs(r.top.FD()))
	space, err := r.Space()
	assert.NilError(t, err)
	assert.Equal(t, space.Floor, space.Total/50)
	full(t, path, space.Floor-200<<10)
	assert.NilError(t, r.MakeRoom(ctx))
	entries, err := r.Trash(ctx)
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 1)
	assert.Equal(t, entries[0].Record.Name, "old")

	assert.NilError(t, os.Remove(filepath.Join(path, "filler")))
	full(t, path, 100<<10)
	// A snapshot has the trash emptied by itself.
	_, err = r.CreateSnapshot(ctx, "web", SnapshotOptions{Name: "s"}, nil)
	assert.NilError(t, err)
	entries, err = r.Trash(ctx)
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 0)
	assert.NilError(t, r.RemoveSnapshot(ctx, "web", "s"))

	assert.NilError(t, os.Remove(filepath.Join(path, "filler")))
	full(t, path, 100<<10)
	for call, fn := range map[string]func() error{
		"snapshot": func() error { return second(r.CreateSnapshot(ctx, "web", SnapshotOptions{}, nil)) },
		"clone": func() error {
			return second(r.Create(ctx, "new", options.Spec{From: &options.Source{Volume: "web"}}))
		},
	} {
		err := fn()
		assert.Assert(t, errdefs.IsResourceExhausted(err), "%s: %v", call, err)
		assert.ErrorContains(t, err, "must stay free")
	}
}

// On a full disk nothing is left half made and no record is empty.
func TestAFullDiskLeavesNothingHalfMade(t *testing.T) {
	path := mounttest.Disk(t, "ext4", 64<<20, "-m", "0", "-N", "2048")
	r := openRoot(t, location(path, "a"))
	ctx := t.Context()
	_, err := r.Create(ctx, "web", options.Spec{})
	assert.NilError(t, err)
	for i := range 8 {
		assert.NilError(t, os.WriteFile(filepath.Join(path, "web", fmt.Sprint(i)), make([]byte, 1<<20), 0o600))
	}
	_, err = r.CreateSnapshot(ctx, "web", SnapshotOptions{Name: "old"}, nil)
	assert.NilError(t, err)
	assert.NilError(t, unix.Syncfs(r.top.FD()))
	full(t, path, 3<<20) // above the floor, below the volume's size
	sound := func() {
		t.Helper()
		files, err := filepath.Glob(filepath.Join(path, ".berth/*/*.json"))
		assert.NilError(t, err)
		more, err := filepath.Glob(filepath.Join(path, ".berth/*/*/*.json"))
		assert.NilError(t, err)
		for _, file := range append(files, more...) {
			info, err := os.Stat(file)
			assert.NilError(t, err)
			assert.Assert(t, info.Size() > 0, "%s is empty", file)
		}
		tops, err := os.ReadDir(path)
		assert.NilError(t, err)
		var names []string
		for _, top := range tops {
			names = append(names, top.Name())
		}
		assert.DeepEqual(t, slices.DeleteFunc(names, func(name string) bool { return name == "lost+found" || name == "filler" }), []string{".berth", "web"})
		assert.DeepEqual(t, leftIn(t, path), []string(nil))
		rec, err := r.Record("web")
		assert.NilError(t, err)
		assert.Equal(t, rec.Phase, Ready)
		list, err := r.Snapshots(ctx, "web")
		assert.NilError(t, err)
		assert.Equal(t, len(list), 1)
	}
	for call, fn := range map[string]func() error{
		"snapshot": func() error { return second(r.CreateSnapshot(ctx, "web", SnapshotOptions{}, nil)) },
		"clone": func() error {
			return second(r.Create(ctx, "new", options.Spec{From: &options.Source{Volume: "web"}}))
		},
		"seed": func() error { return second(r.Create(ctx, "new", options.Spec{Seed: "web"})) },
		"adopt": func() error {
			return second(r.Adopt(ctx, "new", filepath.Join(path, "web"), true, options.Spec{}, nil))
		},
		"rollback": func() error { return second(r.Rollback(ctx, "web", "old", nil)) },
	} {
		err := fn()
		if call == "adopt" {
			assert.Assert(t, errdefs.IsConflict(err), "%s: %v", call, err)
			continue
		}
		assert.Assert(t, errdefs.IsResourceExhausted(err), "%s: %v", call, err)
		sound()
	}
	// To the last block.
	var st unix.Statfs_t
	assert.NilError(t, unix.Statfs(path, &st))
	for i := 0; ; i++ {
		file, err := os.Create(filepath.Join(path, "web", fmt.Sprintf("fill%d", i)))
		if err == nil {
			_, err = file.Write(make([]byte, 4096))
			err = errors.Join(err, file.Sync(), file.Close())
		}
		if err != nil {
			break
		}
	}
	for call, fn := range map[string]func() error{
		"create": func() error { return second(r.Create(ctx, "new", options.Spec{})) },
		"update": func() error {
			return second(r.Update(ctx, "web", func(rec *Record) error {
				rec.Labels = map[string]string{"a": strings.Repeat("b", 8192)}
				return nil
			}))
		},
	} {
		if err := fn(); err != nil {
			assert.Assert(t, errdefs.IsResourceExhausted(err), "%s: %v", call, err)
		}
		_ = r.Remove(ctx, "new") // when there was room for it after all
		_, err = r.Record("web")
		assert.NilError(t, err)
	}
	assert.NilError(t, os.Remove(filepath.Join(path, "filler")))
	_, err = r.Rollback(ctx, "web", "old", nil)
	assert.NilError(t, err)
}
