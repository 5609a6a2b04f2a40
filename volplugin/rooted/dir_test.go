package rooted_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

func open(t *testing.T, path string) *rooted.Dir {
	t.Helper()
	dir, err := rooted.Open(path)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = dir.Close() })
	return dir
}

// Whatever the name, no call reaches anything outside the directory.
func TestNamesLeadNowhereElse(t *testing.T) {
	parent := t.TempDir()
	path := filepath.Join(parent, "root")
	assert.NilError(t, os.MkdirAll(filepath.Join(path, "sub"), 0o755))
	assert.NilError(t, os.WriteFile(filepath.Join(parent, "file"), []byte("x"), 0o600))
	dir := open(t, path)
	for _, name := range []string{"", ".", "..", "../file", "sub/..", "sub/../../file", "/etc", filepath.Join(parent, "file"), "a\x00b"} {
		for call, err := range map[string]error{
			"Dir":      second(dir.Dir(name)),
			"Handle":   second(dir.Handle(name)),
			"Mkdir":    dir.Mkdir(name, 0o700),
			"Rmdir":    dir.Rmdir(name),
			"Remove":   dir.Remove(name),
			"Link":     dir.Link(name, dir, "new"),
			"Link to":  dir.Link("sub", dir, name),
			"Rename":   dir.Rename(name, dir, "new"),
			"Rename2":  dir.Rename("sub", dir, name),
			"ReadFile": second(dir.ReadFile(name, 10)),
			"WriteNew": dir.WriteNew(name, nil, 0o600),
			"Stat":     second(dir.Stat(name)),
			"Tree":     dir.RemoveTree(t.Context(), name),
		} {
			assert.ErrorContains(t, err, "is not the name of a directory entry", "%s %q", call, name)
		}
	}
	names, err := dir.Names()
	assert.NilError(t, err)
	assert.DeepEqual(t, names, []string{"sub"})
}

func TestNothingButDirectoriesIsEntered(t *testing.T) {
	path, outside := t.TempDir(), t.TempDir()
	dir := open(t, path)
	assert.NilError(t, os.Mkdir(filepath.Join(path, "mount"), 0o755))
	mounttest.Bind(t, outside, filepath.Join(path, "mount"))
	assert.NilError(t, os.Symlink(outside, filepath.Join(path, "link")))
	assert.NilError(t, os.WriteFile(filepath.Join(path, "file"), nil, 0o600))
	assert.NilError(t, unix.Mkfifo(filepath.Join(path, "fifo"), 0o600))
	for name, want := range map[string]error{
		"mount": rooted.ErrMountPoint, "link": rooted.ErrSymlink, "file": rooted.ErrNotDir, "fifo": rooted.ErrNotDir, "none": fs.ErrNotExist,
	} {
		_, err := dir.Dir(name)
		assert.ErrorIs(t, err, want, name)
		_, err = dir.Handle(name)
		assert.ErrorIs(t, err, want, name)
	}
	// A bind mount of the same file system is one too.
	assert.NilError(t, os.Mkdir(filepath.Join(path, "same"), 0o755))
	assert.NilError(t, os.Mkdir(filepath.Join(path, "source"), 0o755))
	mounttest.Bind(t, filepath.Join(path, "source"), filepath.Join(path, "same"))
	assert.ErrorIs(t, second(dir.Dir("same")), rooted.ErrMountPoint)
}

func TestOnlyRegularFilesAreRead(t *testing.T) {
	path := t.TempDir()
	dir := open(t, path)
	assert.NilError(t, dir.WriteNew("file", []byte("content"), 0o600))
	assert.ErrorIs(t, dir.WriteNew("file", []byte("other"), 0o600), fs.ErrExist)
	data, err := dir.ReadFile("file", 7)
	assert.NilError(t, err)
	assert.Equal(t, string(data), "content")
	assert.ErrorIs(t, second(dir.ReadFile("file", 6)), rooted.ErrTooLarge)
	assert.NilError(t, dir.WriteNew("empty", nil, 0o600))
	data, err = dir.ReadFile("empty", 0)
	assert.NilError(t, err)
	assert.Equal(t, len(data), 0)
	// Its size is told as 0.
	data, err = open(t, "/proc/self").ReadFile("status", 64<<10)
	assert.NilError(t, err)
	assert.Assert(t, strings.HasSuffix(string(data), "\n"), "%q", data)

	assert.NilError(t, os.Symlink("file", filepath.Join(path, "link")))
	assert.NilError(t, unix.Mkfifo(filepath.Join(path, "fifo"), 0o600))
	assert.NilError(t, unix.Mknod(filepath.Join(path, "zero"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))))
	assert.NilError(t, os.Mkdir(filepath.Join(path, "dir"), 0o755))
	assert.ErrorIs(t, second(dir.ReadFile("link", 10)), rooted.ErrSymlink)
	for _, name := range []string{"fifo", "zero", "dir"} {
		assert.ErrorIs(t, second(dir.ReadFile(name, 10)), rooted.ErrNotFile, name)
	}
	assert.ErrorIs(t, second(dir.ReadFile("none", 10)), fs.ErrNotExist)
	assert.NilError(t, os.Symlink("target", filepath.Join(path, "dangling")))
	assert.ErrorIs(t, dir.WriteNew("dangling", nil, 0o600), fs.ErrExist)
}

func TestAFailedWriteLeavesNoFile(t *testing.T) {
	path := mounttest.Tmpfs(t, 64<<10)
	dir := open(t, path)
	err := dir.WriteNew("big", make([]byte, 1<<20), 0o600)
	assert.ErrorIs(t, err, unix.ENOSPC)
	empty, err := dir.Empty()
	assert.NilError(t, err)
	assert.Assert(t, empty)
}

func TestStampsTellVersionsApart(t *testing.T) {
	dir := open(t, t.TempDir())
	seen := map[rooted.Stamp]bool{}
	for i := range 20 {
		assert.NilError(t, dir.WriteNew("temp", []byte(strings.Repeat("x", i%3)), 0o600))
		assert.NilError(t, dir.Rename("temp", dir, "file"))
		stamp, err := dir.Stat("file")
		assert.NilError(t, err)
		assert.Assert(t, !seen[stamp])
		seen[stamp] = true
	}
}

func TestRemoveTreeStopsAtMounts(t *testing.T) {
	path, outside := t.TempDir(), t.TempDir()
	keep := filepath.Join(outside, "keep")
	assert.NilError(t, os.WriteFile(keep, nil, 0o600))
	assert.NilError(t, os.MkdirAll(filepath.Join(path, "tree/a/mount"), 0o755))
	assert.NilError(t, os.Symlink(outside, filepath.Join(path, "tree/a/link")))
	assert.NilError(t, unix.Mount(outside, filepath.Join(path, "tree/a/mount"), "", unix.MS_BIND, ""))
	dir := open(t, path)
	assert.ErrorIs(t, dir.RemoveTree(t.Context(), "tree"), rooted.ErrMountPoint)
	assert.NilError(t, unix.Unmount(filepath.Join(path, "tree/a/mount"), 0))
	assert.NilError(t, dir.RemoveTree(t.Context(), "tree"))
	assert.NilError(t, dir.RemoveTree(t.Context(), "tree"))
	_, err := os.Stat(keep)
	assert.NilError(t, err)
	_, err = dir.Stat("tree")
	assert.Assert(t, errors.Is(err, fs.ErrNotExist))
}

func second[T any](_ T, err error) error { return err }
