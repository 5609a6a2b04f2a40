package btrfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

// disk is an empty btrfs until the test ends.
func disk(t testing.TB) *rooted.Dir {
	t.Helper()
	return open(t, mounttest.Disk(t, "btrfs", 1<<30))
}

func open(t testing.TB, path string) *rooted.Dir {
	t.Helper()
	dir, err := rooted.Open(path)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = dir.Close() })
	return dir
}

// make makes a tree and gives its path.
func makeTree(t testing.TB, dir *rooted.Dir, name string) string {
	t.Helper()
	assert.NilError(t, Trees{}.Make(dir, name, false))
	return filepath.Join(dir.Path(), name)
}

func duplicate(t testing.TB, dir *rooted.Dir, name, to string, readOnly bool) engine.Copy {
	t.Helper()
	src, err := dir.Dir(name)
	assert.NilError(t, err)
	defer src.Close()
	done, err := Trees{}.Duplicate(t.Context(), src, dir, to, readOnly, nil)
	assert.NilError(t, err)
	return done
}

// idOf is the ID of the subvolume name, 0 for a directory.
func idOf(t testing.TB, dir *rooted.Dir, name string) uint64 {
	t.Helper()
	tree, err := dir.Dir(name)
	assert.NilError(t, err)
	defer tree.Close()
	id, err := subvolumeID(tree)
	assert.NilError(t, err)
	return id
}

func entries(t testing.TB, path string) (names []string) {
	t.Helper()
	list, err := os.ReadDir(path)
	assert.NilError(t, err)
	for _, entry := range list {
		names = append(names, entry.Name())
	}
	return names
}

func TestOtherFileSystemsHaveNoSubvolumes(t *testing.T) {
	_, err := Trees{}.Probe(t.Context(), open(t, mounttest.Tmpfs(t, 1<<20)))
	assert.Error(t, err, "tmpfs has no subvolumes: btrfs is needed")
}

// nest makes subvolumes inside subvolumes and directories, some of them read-only, as
// a container with its own rights can, and returns how many there are.
func nest(t testing.TB, path string) int {
	t.Helper()
	deep := path
	for i := range 5 {
		assert.NilError(t, os.MkdirAll(filepath.Join(deep, "dir/sub dir"), 0o700))
		in := open(t, filepath.Join(deep, "dir/sub dir"))
		assert.NilError(t, createSubvolume(in, fmt.Sprintf("level %d", i)))
		assert.NilError(t, createSubvolume(in, "beside"))
		assert.NilError(t, os.WriteFile(filepath.Join(in.Path(), "beside/f"), []byte("x"), 0o600))
		deep = filepath.Join(in.Path(), fmt.Sprintf("level %d", i))
	}
	for ; deep != path; deep = filepath.Dir(filepath.Dir(filepath.Dir(deep))) {
		assert.NilError(t, setReadOnly(open(t, deep), true))
	}
	return 10
}

func TestSubvolumesInsideGoWithTheTree(t *testing.T) {
	dir := disk(t)
	outside := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(outside, "f"), nil, 0o600))
	for name, build := range map[string]func(name string) string{
		"subvolume": func(name string) string { return makeTree(t, dir, name) },
		"directory": func(name string) string {
			assert.NilError(t, dir.Mkdir(name, 0o700))
			return filepath.Join(dir.Path(), name)
		},
		"sealed": func(name string) string { return makeTree(t, dir, name) },
	} {
		path := build(name)
		made := nest(t, path)
		assert.NilError(t, os.Symlink(outside, filepath.Join(path, "dir/link")))
		if name == "sealed" {
			assert.NilError(t, Trees{}.Seal(dir, name, true))
		}
		assert.NilError(t, Trees{}.Delete(t.Context(), dir, name), name)
		_, err := dir.Stat(name)
		assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%s: %v", name, err)
		left, err := children(dir, 5)
		assert.NilError(t, err)
		assert.Equal(t, len(left), 0, "%s: of %d subvolumes there are %v", name, made, left)
	}
	assert.DeepEqual(t, entries(t, outside), []string{"f"})
	assert.NilError(t, Trees{}.Delete(t.Context(), dir, "none"))
}

// Kernels before 5.7 delete by name alone.
func TestSubvolumesInsideAreFoundByName(t *testing.T) {
	dir := disk(t)
	path := makeTree(t, dir, "web")
	assert.NilError(t, os.MkdirAll(filepath.Join(path, "a/b"), 0o700))
	assert.NilError(t, createSubvolume(open(t, filepath.Join(path, "a/b")), "in"))
	assert.NilError(t, createSubvolume(open(t, path), "top"))
	web := open(t, path)
	id := idOf(t, dir, "web")
	found, err := children(web, id)
	assert.NilError(t, err)
	assert.Equal(t, len(found), 2)
	for _, inner := range found {
		assert.NilError(t, destroyByName(web, id, inner))
	}
	assert.DeepEqual(t, entries(t, path), []string{"a"})
	assert.Equal(t, len(entries(t, filepath.Join(path, "a/b"))), 0)
}

func TestASnapshotEndsAtSubvolumes(t *testing.T) {
	dir := disk(t)
	path := makeTree(t, dir, "web")
	assert.NilError(t, createSubvolume(open(t, path), "inner"))
	assert.NilError(t, os.WriteFile(filepath.Join(path, "inner/f"), []byte("x"), 0o600))
	done := duplicate(t, dir, "web", "snap", true)
	assert.Equal(t, done.Consistency, engine.Crash)
	assert.Equal(t, len(entries(t, filepath.Join(dir.Path(), "snap/inner"))), 0)
	// Also a copy that is written to, which is then deleted like any other.
	duplicate(t, dir, "web", "clone", false)
	assert.NilError(t, os.WriteFile(filepath.Join(dir.Path(), "clone/g"), []byte("x"), 0o600))
	for _, name := range []string{"clone", "snap"} {
		assert.NilError(t, Trees{}.Delete(t.Context(), dir, name))
	}
	assert.DeepEqual(t, entries(t, path), []string{"inner"})
	assert.DeepEqual(t, entries(t, filepath.Join(path, "inner")), []string{"f"})
}

// A root can be mounted from a subvolume, so that the top of the file system is not seen.
func TestARootThatIsASubvolumeItself(t *testing.T) {
	dir := disk(t)
	makeTree(t, dir, "roots")
	source := makeTree(t, open(t, filepath.Join(dir.Path(), "roots")), "root")
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir.Path()))
	assert.NilError(t, err)
	target := t.TempDir()
	assert.NilError(t, unix.Mount(mounts[0].Source, target, "btrfs", 0, "subvol=roots/root"))
	t.Cleanup(func() { assert.NilError(t, unix.Unmount(target, unix.MNT_DETACH)) })
	root := open(t, target)
	path := makeTree(t, root, "web")
	nest(t, path)
	assert.NilError(t, Trees{}.Limit(t.Context(), root, "web", 1<<30))
	duplicate(t, root, "web", "snap", true)
	for _, name := range []string{"web", "snap"} {
		_, err := Trees{}.Usage(t.Context(), root, name)
		assert.NilError(t, err)
		assert.NilError(t, Trees{}.Delete(t.Context(), root, name))
	}
	assert.Equal(t, len(entries(t, source)), 0)
	// The root itself, which has inode number 256 and is a mount point, is no volume.
	assert.ErrorIs(t, Trees{}.Check(open(t, filepath.Dir(target)), filepath.Base(target)), rooted.ErrMountPoint)
}

func TestDeletionStopsWithItsContext(t *testing.T) {
	dir := disk(t)
	nest(t, makeTree(t, dir, "web"))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	assert.ErrorIs(t, Trees{}.Delete(ended, dir, "web"), context.Canceled)
	assert.NilError(t, Trees{}.Delete(t.Context(), dir, "web"))
}

func TestNewFilesOfANoCOWTreeAreOverwrittenInPlace(t *testing.T) {
	dir := disk(t)
	for _, noCOW := range []bool{false, true} {
		name := fmt.Sprint(noCOW)
		assert.NilError(t, Trees{}.Make(dir, name, noCOW))
		file, err := os.Create(filepath.Join(dir.Path(), name, "f"))
		assert.NilError(t, err)
		flags, err := unix.IoctlGetInt(int(file.Fd()), unix.FS_IOC_GETFLAGS)
		assert.NilError(t, errors.Join(err, file.Close()))
		assert.Equal(t, flags&noCOWFlag != 0, noCOW)
	}
}

func TestAReadOnlyCopyCanBeOpenedForWriting(t *testing.T) {
	dir := disk(t)
	path := makeTree(t, dir, "web")
	assert.NilError(t, os.WriteFile(filepath.Join(path, "f"), []byte("x"), 0o600))
	duplicate(t, dir, "web", "snap", true)
	file := filepath.Join(dir.Path(), "snap/f")
	assert.ErrorIs(t, os.WriteFile(file, nil, 0o600), unix.EROFS)
	assert.NilError(t, Trees{}.Seal(dir, "snap", true))
	assert.ErrorIs(t, os.WriteFile(file, nil, 0o600), unix.EROFS)
	assert.NilError(t, Trees{}.Seal(dir, "snap", false))
	assert.NilError(t, os.WriteFile(file, nil, 0o600))
}

func TestAnOrdinaryDirectoryIsATree(t *testing.T) {
	dir := disk(t)
	assert.NilError(t, dir.Mkdir("web", 0o750))
	path := filepath.Join(dir.Path(), "web")
	assert.NilError(t, os.WriteFile(filepath.Join(path, "f"), []byte(strings.Repeat("x", 5<<20)), 0o640))
	assert.NilError(t, os.Chown(path, 10, 20))
	assert.NilError(t, Trees{}.Check(dir, "web"))
	err := Trees{}.Limit(t.Context(), dir, "web", 1<<30)
	assert.ErrorIs(t, err, engine.ErrNoLimit)
	assert.ErrorContains(t, err, "is an ordinary directory, not a btrfs subvolume")
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "web", 0))
	assert.NilError(t, Trees{}.Seal(dir, "web", true))
	assert.NilError(t, os.WriteFile(filepath.Join(path, "g"), nil, 0o640))

	done := duplicate(t, dir, "web", "snap", true)
	assert.Equal(t, done.Consistency, engine.None)
	assert.Assert(t, done.Files >= 2 && done.Bytes >= 5<<20, "%+v", done)
	assert.Assert(t, idOf(t, dir, "snap") != 0)
	assert.DeepEqual(t, entries(t, filepath.Join(dir.Path(), "snap")), []string{"f", "g"})
	assert.ErrorIs(t, os.WriteFile(filepath.Join(dir.Path(), "snap/f"), nil, 0o600), unix.EROFS)
	var st unix.Stat_t
	assert.NilError(t, unix.Stat(filepath.Join(dir.Path(), "snap"), &st))
	assert.Equal(t, st.Mode&0o7777, uint32(0o750))
	assert.Equal(t, st.Uid, uint32(10))
	usage, err := Trees{}.Usage(t.Context(), dir, "web")
	assert.NilError(t, err)
	assert.Assert(t, usage.Used >= 5<<20 && usage.Files == 3 && usage.Limit == 0, "%+v", usage)
	// The copy shares its blocks: both are there, and the space is taken once.
	duplicate(t, dir, "web", "clone", false)
	assert.NilError(t, Trees{}.Limit(t.Context(), dir, "clone", 1<<30))
	assert.NilError(t, unix.Syncfs(dir.FD()))
	usage, err = Trees{}.Usage(t.Context(), dir, "clone")
	assert.NilError(t, err)
	assert.Assert(t, usage.Used >= 5<<20 && usage.Exclusive < 1<<20, "%+v", usage)
	assert.NilError(t, Trees{}.Delete(t.Context(), dir, "web"))
	assert.DeepEqual(t, entries(t, dir.Path()), []string{"clone", "snap"})
}

// What does not fit leaves nothing behind.
func TestAFullDiskLeavesNoHalfCopy(t *testing.T) {
	dir := open(t, mounttest.Disk(t, "btrfs", 128<<20))
	assert.NilError(t, dir.Mkdir("web", 0o700))
	// Random names and no sharing of small files, which are stored in the metadata.
	for i := range 3000 {
		err := os.WriteFile(filepath.Join(dir.Path(), "web", fmt.Sprintf("%0200d", i)), make([]byte, 2000), 0o600)
		if errors.Is(err, unix.ENOSPC) {
			break
		}
		assert.NilError(t, err)
	}
	assert.NilError(t, unix.Syncfs(dir.FD()))
	src, err := dir.Dir("web")
	assert.NilError(t, err)
	defer src.Close()
	made := 0
	for ; made < 100; made++ {
		_, err = Trees{}.Duplicate(t.Context(), src, dir, fmt.Sprintf("copy%02d", made), false, nil)
		if err != nil {
			break
		}
	}
	assert.ErrorIs(t, err, unix.ENOSPC)
	assert.Equal(t, len(entries(t, dir.Path())), made+1)
}

func FuzzItems(f *testing.F) {
	valid := make([]byte, 32+20)
	valid[28] = 20
	valid[32+16] = 2
	f.Add(valid, uint32(1))
	f.Add(valid[:40], uint32(1))
	f.Add([]byte{}, uint32(3))
	f.Fuzz(func(t *testing.T, buffer []byte, n uint32) {
		items, err := parseItems(buffer, n)
		if err == nil && len(items) != int(n) {
			t.Fatalf("%d items instead of %d", len(items), n)
		}
		for _, item := range items {
			if len(item.data) > len(buffer) {
				t.Fatal("more than there is")
			}
			if ref, err := parseRef(item); err == nil && len(ref.name)+18 > len(item.data) {
				t.Fatal("a name longer than its item")
			}
			if _, err := parseLimit(item.data); err == nil && len(item.data) < 40 {
				t.Fatal("a limit of half an item")
			}
		}
	})
}

// commitOften wakes what frees subvolumes every second instead of every half minute.
func commitOften(t testing.TB, dir *rooted.Dir) {
	t.Helper()
	assert.NilError(t, unix.Mount("", dir.Path(), "", unix.MS_REMOUNT, "commit=1"))
}

// gone waits until the kernel has freed a subvolume.
func gone(t testing.TB, dir *rooted.Dir, id uint64) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		// The cleaner runs after a commit.
		if err := unix.Syncfs(dir.FD()); err != nil {
			return poll.Error(err)
		}
		items, err := search(dir.FD(), rootTree, id, rootItemKind, 0, ^uint64(0))
		if err != nil {
			return poll.Error(err)
		}
		if len(items) == 0 {
			return poll.Success()
		}
		return poll.Continue("subvolume %d is still there", id)
	}, poll.WithTimeout(time.Minute), poll.WithDelay(20*time.Millisecond))
}

// request makes an ioctl that is none of the package's.
func request(t testing.TB, dir *rooted.Dir, number uintptr, args *[2]uint64) {
	t.Helper()
	assert.NilError(t, ioctl(dir.FD(), number, unsafe.Pointer(args)))
}
