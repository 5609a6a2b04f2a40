package copying_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/engine/enginetest"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

func TestConformance(t *testing.T) {
	for kind, all := range map[string][]copying.Trees{
		"ext4": {copying.Dir()}, "xfs": {copying.Dir(), copying.Reflink()}, "btrfs": {copying.Reflink()},
	} {
		for _, trees := range all {
			// Package treeengine runs it on the host's own file system.
			if testing.Short() && trees.Name()+kind != "reflinkxfs" {
				continue
			}
			t.Run(trees.Name()+" on "+kind, func(t *testing.T) {
				enginetest.Run(t, treeengine.New(trees), func(t testing.TB) engine.Place {
					return enginetest.NewPlace(t, mounttest.Disk(t, kind, 1<<30))
				})
			})
		}
	}
}

func open(t *testing.T, path ...string) *rooted.Dir {
	t.Helper()
	dir, err := rooted.Open(filepath.Join(path...))
	assert.NilError(t, err)
	t.Cleanup(func() { _ = dir.Close() })
	return dir
}

func TestReflinkIsProbedByDoingIt(t *testing.T) {
	for name, disk := range map[string]struct {
		kind    string
		options []string
		works   bool
	}{
		"ext4": {"ext4", nil, false}, "btrfs": {"btrfs", nil, true}, "xfs": {"xfs", nil, true},
		"xfs without reflink": {"xfs", []string{"-m", "reflink=0"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := open(t, mounttest.Disk(t, disk.kind, 1<<30, disk.options...))
			can, err := copying.Reflink().Probe(t.Context(), dir)
			if disk.works {
				assert.NilError(t, err)
				assert.Equal(t, can.FileSystem, disk.kind)
				assert.Equal(t, can.Consistency, engine.None)
			} else {
				assert.ErrorContains(t, err, "files cannot share data on this "+disk.kind)
			}
			names, err := dir.Names()
			assert.NilError(t, err)
			assert.Assert(t, len(names) == 0 || names[0] == "lost+found", "the probe has left %q", names)
			_, err = copying.Dir().Probe(t.Context(), dir)
			assert.NilError(t, err)
		})
	}
}

// What a kill has left of a copy goes when it is made again, and is never under the
// final name.
func TestACopyThatWasCutShortIsMadeAnew(t *testing.T) {
	path := mounttest.Disk(t, "ext4", 1<<30)
	parent := open(t, path)
	for _, name := range []string{"src/a", "copy.making/old/remains"} {
		assert.NilError(t, os.MkdirAll(filepath.Join(path, name), 0o755))
	}
	trees := copying.Dir()
	done, err := trees.Duplicate(t.Context(), open(t, path, "src"), parent, "copy", true, nil)
	assert.NilError(t, err)
	assert.Equal(t, done.Files, uint64(2))
	nastytree.Compare(t, filepath.Join(path, "src"), filepath.Join(path, "copy"))
	_, err = parent.Stat("copy.making")
	assert.ErrorIs(t, err, fs.ErrNotExist)
	_, err = trees.Duplicate(t.Context(), open(t, path, "src"), parent, "copy", true, nil)
	assert.ErrorIs(t, err, fs.ErrExist)
}

// While a copy is made nothing is under its final name, and nothing at all is left
// of one that was cancelled.
func TestACopyAppearsWhole(t *testing.T) {
	path := mounttest.Disk(t, "ext4", 1<<30)
	parent := open(t, path)
	for i := range 300 {
		assert.NilError(t, os.MkdirAll(filepath.Join(path, "src", string(rune('a'+i))), 0o755))
	}
	ctx, cancel := context.WithCancel(t.Context())
	calls := 0
	_, err := copying.Dir().Duplicate(ctx, open(t, path, "src"), parent, "copy", false, func(engine.Progress) {
		calls++
		_, err := parent.Stat("copy")
		assert.Check(t, errors.Is(err, fs.ErrNotExist))
		cancel()
	})
	assert.ErrorIs(t, err, context.Canceled)
	assert.Assert(t, calls > 0)
	names, err := parent.Names()
	assert.NilError(t, err)
	for _, name := range names {
		assert.Assert(t, name == "src" || name == "lost+found", name)
	}
}

func TestASizeWithoutQuotasIsRefusedInWords(t *testing.T) {
	path := mounttest.Tmpfs(t, 1<<20)
	parent := open(t, path)
	trees := copying.Dir()
	assert.NilError(t, trees.Make(parent, "v", false))
	assert.NilError(t, trees.Limit(t.Context(), parent, "v", 0))
	err := trees.Limit(t.Context(), parent, "v", 1<<20)
	assert.ErrorIs(t, err, engine.ErrNoLimit)
	assert.ErrorContains(t, err, "engine=image")
	assert.ErrorContains(t, err, "prjquota")
	can, err := trees.Probe(t.Context(), parent)
	assert.NilError(t, err)
	assert.DeepEqual(t, can, engine.Abilities{FileSystem: "tmpfs", Consistency: engine.None})
}

// A new tree is root's alone, whatever its parent hands down.
func TestANewTreeInheritsNothing(t *testing.T) {
	path := mounttest.Disk(t, "ext4", 1<<30)
	assert.NilError(t, os.Chown(path, 1000, 2000))
	assert.NilError(t, unix.Chmod(path, 0o2777))
	assert.NilError(t, copying.Dir().Make(open(t, path), "v", true))
	var st unix.Stat_t
	assert.NilError(t, unix.Stat(filepath.Join(path, "v"), &st))
	assert.DeepEqual(t, []uint32{st.Uid, st.Gid, st.Mode & 0o7777}, []uint32{0, 0, 0o700})
}
