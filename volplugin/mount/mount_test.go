package mount_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"pgregory.net/rapid"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/mount"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

func data(t *testing.T) *rooted.Dir { return open(t, t.TempDir()) }

func open(t *testing.T, path string) *rooted.Dir {
	t.Helper()
	dir, err := rooted.Open(path)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = dir.Close() })
	return dir
}

func TestBindIsMadeOnceAndTakenAwayWhole(t *testing.T) {
	base := filepath.Join(t.TempDir(), "x", "mnt")
	b, err := mount.NewBinder(base)
	assert.NilError(t, err)
	assert.NilError(t, b.Unbind("web"))
	one, two := data(t), data(t)
	made, err := b.Bind(one, "web", mount.Flags{})
	assert.NilError(t, err)
	assert.Assert(t, made)
	t.Cleanup(func() { _ = unix.Unmount(b.Path("web"), unix.MNT_DETACH) })
	made, err = b.Bind(one, "web", mount.Flags{})
	assert.NilError(t, err)
	assert.Assert(t, !made)
	_, err = b.Bind(two, "web", mount.Flags{})
	assert.ErrorIs(t, err, mount.ErrOther)

	// A name that is the beginning of another one is not taken for it.
	mounted, err := b.Mounted("we")
	assert.NilError(t, err)
	assert.Assert(t, !mounted)
	list, err := b.List()
	assert.NilError(t, err)
	assert.DeepEqual(t, list, map[string]bool{"web": true})

	file, err := os.Create(filepath.Join(b.Path("web"), "f"))
	assert.NilError(t, err)
	assert.Assert(t, errdefs.IsConflict(b.Unbind("web")))
	assert.NilError(t, file.Close())
	assert.NilError(t, b.Unbind("web"))
	_, err = os.Lstat(b.Path("web"))
	assert.Assert(t, os.IsNotExist(err))
	_, err = os.Stat(filepath.Join(one.Path(), "f"))
	assert.NilError(t, err)
}

func TestTheMountPointIsClosedWhileNotMounted(t *testing.T) {
	b, err := mount.NewBinder(t.TempDir())
	assert.NilError(t, err)
	_, err = b.Bind(data(t), "web", mount.Flags{})
	assert.NilError(t, err)
	assert.NilError(t, unix.Unmount(b.Path("web"), unix.MNT_DETACH))
	info, err := os.Stat(b.Path("web"))
	assert.NilError(t, err)
	assert.Equal(t, info.Mode().Perm(), os.FileMode(0))
}

func TestALinkInPlaceOfTheMountPointIsNotFollowed(t *testing.T) {
	b, err := mount.NewBinder(t.TempDir())
	assert.NilError(t, err)
	outside := t.TempDir()
	assert.NilError(t, os.Symlink(outside, b.Path("web")))
	_, err = b.Bind(data(t), "web", mount.Flags{})
	assert.ErrorIs(t, err, rooted.ErrSymlink)
}

func TestABaseBehindALinkIsFoundInMountinfo(t *testing.T) {
	real := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	assert.NilError(t, os.Symlink(real, link))
	b, err := mount.NewBinder(link)
	assert.NilError(t, err)
	_, err = b.Bind(data(t), "web", mount.Flags{})
	assert.NilError(t, err)
	mounted, err := b.Mounted("web")
	assert.NilError(t, err)
	assert.Assert(t, mounted)
	assert.NilError(t, b.Unbind("web"))
}

// References agree with counting by hand, and no value is changed afterwards.
func TestReferencesAreAMultiset(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var refs mount.References
		model := map[string]int{}
		for range rapid.IntRange(0, 40).Draw(t, "calls") {
			id := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "id")
			before, total := refs, refs.Total()
			if rapid.Bool().Draw(t, "mount") {
				refs = refs.Add(id)
				model[id]++
			} else {
				refs = refs.Drop(id)
				model[id] = max(model[id]-1, 0)
			}
			if before.Total() != total {
				t.Fatal("an earlier value has changed")
			}
			sum := 0
			for id, n := range model {
				sum += n
				if refs[id] != n {
					t.Fatalf("%s: %d, want %d", id, refs[id], n)
				}
			}
			if refs.Total() != sum {
				t.Fatalf("total %d, want %d", refs.Total(), sum)
			}
		}
	})
}
