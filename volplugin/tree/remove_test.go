package tree

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestANastyTreeIsRemovedWhole(t *testing.T) {
	onDisks(t, func(t *testing.T, _, dir string) {
		assert.NilError(t, os.Mkdir(filepath.Join(dir, "src"), 0o755))
		nastytree.Make(t, filepath.Join(dir, "src"))
		outside := filepath.Join(dir, "outside")
		assert.NilError(t, os.MkdirAll(outside, 0o755))
		assert.NilError(t, os.WriteFile(filepath.Join(outside, "keep"), nil, 0o644))
		assert.NilError(t, os.Symlink(outside, filepath.Join(dir, "src/to outside")))
		top := open(t, dir)
		assert.NilError(t, Remove(t.Context(), top, "src"))
		_, err := top.Stat("src")
		assert.ErrorIs(t, err, fs.ErrNotExist)
		assert.NilError(t, Remove(t.Context(), top, "src"))
		_, err = os.Stat(filepath.Join(outside, "keep"))
		assert.NilError(t, err)
	})
}

func TestWhatIsNoDirectoryIsRemovedToo(t *testing.T) {
	path := t.TempDir()
	outside := t.TempDir()
	top := open(t, path)
	assert.NilError(t, os.Symlink(outside, filepath.Join(path, "link")))
	assert.NilError(t, unix.Mkfifo(filepath.Join(path, "fifo"), 0o600))
	for _, name := range []string{"link", "fifo", "none"} {
		assert.NilError(t, Remove(t.Context(), top, name))
	}
	empty, err := top.Empty()
	assert.NilError(t, err)
	assert.Assert(t, empty)
	_, err = os.Stat(outside)
	assert.NilError(t, err)
	for _, name := range []string{"", ".", "..", "a/b", "/"} {
		assert.ErrorContains(t, Remove(t.Context(), top, name), "is not the name of a directory entry")
	}
}

// Whatever is mounted in the tree, and on whatever, nothing is removed through it.
func TestRemovingStopsAtMounts(t *testing.T) {
	for _, where := range []string{"tree", "tree/dir", "tree/a/b/dir"} {
		path, outside := t.TempDir(), t.TempDir()
		assert.NilError(t, os.WriteFile(filepath.Join(outside, "keep"), nil, 0o600))
		assert.NilError(t, os.MkdirAll(filepath.Join(path, where), 0o755))
		mounttest.Bind(t, outside, filepath.Join(path, where))
		assert.ErrorIs(t, Remove(t.Context(), open(t, path), "tree"), rooted.ErrMountPoint, where)
		_, err := os.Stat(filepath.Join(outside, "keep"))
		assert.NilError(t, err)
	}
	path, outside := t.TempDir(), filepath.Join(t.TempDir(), "keep")
	assert.NilError(t, os.WriteFile(outside, nil, 0o600))
	assert.NilError(t, os.Mkdir(filepath.Join(path, "tree"), 0o755))
	assert.NilError(t, os.WriteFile(filepath.Join(path, "tree/file"), nil, 0o755))
	mounttest.Bind(t, outside, filepath.Join(path, "tree/file"))
	assert.ErrorIs(t, Remove(t.Context(), open(t, path), "tree"), rooted.ErrMountPoint)
}

func TestARemovalThatWasStoppedGoesOn(t *testing.T) {
	path := t.TempDir()
	top := open(t, path)
	many(t, filepath.Join(path, "tree"), 200, 20)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	assert.ErrorIs(t, Remove(ctx, top, "tree"), context.Canceled)
	ctx, cancel = context.WithCancel(t.Context())
	context.AfterFunc(ctx, func() {})
	go func() {
		for ctx.Err() == nil {
			names, err := os.ReadDir(filepath.Join(path, "tree"))
			if err != nil || len(names) < 190 {
				cancel()
			}
		}
	}()
	if err := Remove(ctx, top, "tree"); err != nil {
		assert.Assert(t, errors.Is(err, context.Canceled), "%v", err)
	}
	cancel()
	assert.NilError(t, Remove(t.Context(), top, "tree"))
	empty, err := top.Empty()
	assert.NilError(t, err)
	assert.Assert(t, empty)
}

// Several removals of one tree, as by several hosts, all succeed.
func TestRemovalsAtTheSameTime(t *testing.T) {
	path := t.TempDir()
	top := open(t, path)
	for range 20 {
		many(t, filepath.Join(path, "tree"), 20, 5)
		errs := make(chan error)
		for range 3 {
			go func() { errs <- Remove(t.Context(), top, "tree") }()
		}
		for range 3 {
			assert.NilError(t, <-errs)
		}
		empty, err := top.Empty()
		assert.NilError(t, err)
		assert.Assert(t, empty)
	}
}

// many makes dirs directories with files each, and one in each of them.
func many(t testing.TB, top string, dirs, files int) {
	t.Helper()
	for i := range dirs {
		dir := filepath.Join(top, "dir"+string(rune('a'+i%26))+string(rune('a'+i/26)), "below")
		assert.NilError(t, os.MkdirAll(dir, 0o755))
		for j := range files {
			assert.NilError(t, os.WriteFile(filepath.Join(filepath.Dir(dir), string(rune('a'+j))), []byte("content"), 0o644))
		}
	}
}
