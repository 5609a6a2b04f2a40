package btrfs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/enginetest"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestArgumentsHaveTheKernelsSizes(t *testing.T) {
	assert.Equal(t, unsafe.Sizeof(subvolumeInfo{}), uintptr(504))
	assert.Equal(t, unsafe.Sizeof(fileSystemInfo{}), uintptr(1024))
	assert.Equal(t, unsafe.Offsetof(bigSearchArgs{}.buffer), uintptr(112))
}

// withSnapshot calls use with a snapshot of the tree name that is made as engines do.
func withSnapshot(t testing.TB, dir *rooted.Dir, name string, use func(snapshot *rooted.Dir)) {
	t.Helper()
	duplicate(t, dir, name, "snapshot", false)
	defer func() { assert.NilError(t, Trees{}.Delete(t.Context(), dir, "snapshot")) }()
	assert.NilError(t, Trees{}.Seal(dir, "snapshot", true))
	snapshot, err := dir.Dir("snapshot")
	assert.NilError(t, err)
	defer snapshot.Close()
	use(snapshot)
}

func markOf(t testing.TB, dir *rooted.Dir, name string) (mark engine.Mark) {
	t.Helper()
	withSnapshot(t, dir, name, func(snapshot *rooted.Dir) {
		var err error
		mark, err = Trees{}.Mark(t.Context(), snapshot)
		assert.NilError(t, err)
	})
	return mark
}

func unchanged(t testing.TB, dir *rooted.Dir, name string, since engine.Mark) (same bool) {
	t.Helper()
	withSnapshot(t, dir, name, func(snapshot *rooted.Dir) {
		var err error
		same, err = Trees{}.Unchanged(t.Context(), snapshot, since)
		assert.NilError(t, err)
	})
	return same
}

func run(name string, args ...string) error {
	if out, err := exec.CommandContext(context.Background(), name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q: %w: %s", name, args, err, out)
	}
	return nil
}

// What only btrfs can do to a file.
func TestChangesOfBtrfsAreNoticed(t *testing.T) {
	changes := []enginetest.Change{
		{Name: "a subvolume inside", Make: func(path string) error { return run("btrfs", "subvolume", "create", path+"/inner") }},
		{Name: "a subvolume inside is removed", Make: func(path string) error { return run("btrfs", "subvolume", "delete", path+"/inner") }},
		{Name: "shared blocks", Make: func(path string) error {
			from, err := os.Open(path + "/written")
			if err != nil {
				return err
			}
			defer from.Close()
			to, err := os.OpenFile(path+"/replaced", os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer to.Close()
			return unix.IoctlFileCloneRange(int(to.Fd()), &unix.FileCloneRange{Src_fd: int64(from.Fd()), Src_length: 8192, Dest_offset: 8192})
		}},
		{Name: "a flag", Make: func(path string) error { return run("chattr", "+d", path+"/mode") }},
		{Name: "a flag of the top", Make: func(path string) error { return run("chattr", "+c", path) }},
		{Name: "a property", Make: func(path string) error {
			return run("btrfs", "property", "set", path+"/d", "compression", "zstd")
		}},
		{Name: "a file that is overwritten in place", Make: func(path string) error {
			file, err := os.OpenFile(path+"/inplace", os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer file.Close()
			_, err = file.WriteAt([]byte("!"), 70000)
			return err
		}},
	}
	for name, files := range map[string]int{"few files": 0, "many files": 500} {
		t.Run(name, func(t *testing.T) {
			dir := disk(t)
			path := makeTree(t, dir, "web")
			enginetest.Settle(t, path, files)
			assert.NilError(t, os.WriteFile(path+"/inplace", nil, 0o600))
			assert.NilError(t, run("chattr", "+C", path+"/inplace"))
			assert.NilError(t, os.WriteFile(path+"/inplace", []byte(strings.Repeat("x", 100000)), 0o600))
			last := markOf(t, dir, "web")
			for _, change := range changes {
				assert.NilError(t, change.Make(path))
				assert.Check(t, !unchanged(t, dir, "web", last), change.Name)
				last = markOf(t, dir, "web")
				assert.Check(t, unchanged(t, dir, "web", last), "after %s", change.Name)
			}
			// A second write to blocks that no snapshot shares any more, after a commit.
			for range 2 {
				assert.NilError(t, unix.Syncfs(dir.FD()))
				assert.NilError(t, changes[len(changes)-1].Make(path))
				assert.Check(t, !unchanged(t, dir, "web", last), "again in place")
				last = markOf(t, dir, "web")
			}
			var m moment
			assert.NilError(t, json.Unmarshal([]byte(last), &m))
			assert.Equal(t, m.Items != "", files == 0)
		})
	}
}

// What is written beside a volume is no change of it.
func TestWhatHappensBesideIsNoChange(t *testing.T) {
	for name, files := range map[string]int{"few files": 0, "many files": 500} {
		t.Run(name, func(t *testing.T) {
			dir := disk(t)
			path := makeTree(t, dir, "web")
			other := makeTree(t, dir, "other")
			enginetest.Settle(t, path, files)
			last := markOf(t, dir, "web")
			for _, beside := range []enginetest.Change{
				{Name: "a sync", Make: func(string) error { return unix.Syncfs(dir.FD()) }},
				{Name: "another volume", Make: func(string) error { return os.WriteFile(other+"/f", []byte("x"), 0o600) }},
				{Name: "a limit", Make: func(string) error { return Trees{}.Limit(t.Context(), dir, "web", 1<<29) }},
				{Name: "no limit", Make: func(string) error { return Trees{}.Limit(t.Context(), dir, "web", 0) }},
				{Name: "a look at its use", Make: func(string) error {
					_, err := Trees{}.Usage(t.Context(), dir, "web")
					return err
				}},
				{Name: "read-only and back", Make: func(string) error {
					return errors.Join(Trees{}.Seal(dir, "web", true), Trees{}.Seal(dir, "web", false))
				}},
				{Name: "a clone that is written to", Make: func(string) error {
					duplicate(t, dir, "web", "clone", false)
					return os.WriteFile(dir.Path()+"/clone/small", []byte("x"), 0o600)
				}},
				{Name: "the clone is removed", Make: func(string) error { return Trees{}.Delete(t.Context(), dir, "clone") }},
				{Name: "a file inside a subvolume inside", Make: func(path string) error {
					if err := run("btrfs", "subvolume", "create", path+"/inner"); err != nil {
						return err
					}
					last = markOf(t, dir, "web")
					return os.WriteFile(path+"/inner/f", []byte("x"), 0o600)
				}},
			} {
				assert.NilError(t, beside.Make(path))
				assert.Check(t, unchanged(t, dir, "web", last), "after %s", beside.Name)
			}
			again := remount(t, dir)
			assert.Check(t, unchanged(t, again, "web", last), "after it was mounted again")
			assert.NilError(t, os.WriteFile(path+"/d/late", nil, 0o600))
			assert.Check(t, !unchanged(t, again, "web", last), "a change after that")
		})
	}
}

func TestOnlySnapshotsAsTheyWereMadeHaveMarks(t *testing.T) {
	for name, files := range map[string]int{"few files": 0, "many files": 500} {
		t.Run(name, func(t *testing.T) {
			dir := disk(t)
			path := makeTree(t, dir, "web")
			enginetest.Settle(t, path, files)
			assert.NilError(t, os.Mkdir(dir.Path()+"/directory", 0o755))
			for _, copied := range []string{"writable", "written", "read-only"} {
				duplicate(t, dir, "web", copied, false)
			}
			assert.NilError(t, os.WriteFile(dir.Path()+"/written/small", []byte("x"), 0o600))
			assert.NilError(t, unix.Syncfs(dir.FD()))
			for _, sealed := range []string{"web", "written", "read-only"} {
				assert.NilError(t, Trees{}.Seal(dir, sealed, true))
			}
			for tree, marked := range map[string]bool{"directory": false, "web": false, "writable": false, "written": false, "read-only": true} {
				mark, err := Trees{}.Mark(t.Context(), open(t, dir.Path()+"/"+tree))
				assert.NilError(t, err)
				assert.Equal(t, mark != "", marked, tree)
			}
			assert.NilError(t, Trees{}.Seal(dir, "web", false))

			// The kernel takes what was removed out of a snapshot.
			file, err := os.Create(path + "/removed")
			assert.NilError(t, err)
			defer file.Close()
			assert.NilError(t, os.Remove(path+"/removed"))
			assert.Equal(t, markOf(t, dir, "web"), engine.Mark(""))
			assert.NilError(t, file.Close())
			assert.Assert(t, markOf(t, dir, "web") != "")
		})
	}
}

// remount unmounts a file system, which puts all on disk, and mounts it again.
func remount(t *testing.T, dir *rooted.Dir) *rooted.Dir {
	t.Helper()
	path := dir.Path()
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(path))
	assert.NilError(t, err)
	assert.Equal(t, len(mounts), 1)
	device := mounts[0].Source
	// The loop device would go with its last user.
	held, err := os.Open(device)
	assert.NilError(t, err)
	defer held.Close()
	assert.NilError(t, dir.Close())
	assert.NilError(t, unix.Unmount(path, 0))
	assert.NilError(t, unix.Mount(device, path, "btrfs", 0, ""))
	return open(t, path)
}

// After a power cut the kernel repeats what was put on disk by fsync alone.
func TestWhatAPowerCutLeavesIsNoticed(t *testing.T) {
	for name, change := range map[string]func(path string) (synced string, err error){
		"a byte": func(path string) (string, error) {
			file, err := os.OpenFile(path+"/written", os.O_WRONLY, 0)
			if err != nil {
				return "", err
			}
			defer file.Close()
			_, err = file.WriteAt([]byte("!"), 20000)
			return "written", err
		},
		"the mode of a directory":  func(path string) (string, error) { return "d", os.Chmod(path+"/d", 0o711) },
		"an attribute of the same": func(path string) (string, error) { return "d", unix.Setxattr(path+"/d", "user.new", []byte("x"), 0) },
		"a new file":               func(path string) (string, error) { return "new", os.WriteFile(path+"/new", []byte("x"), 0o600) },
		"another name": func(path string) (string, error) {
			return "renamed", os.Rename(path+"/moved", path+"/renamed")
		},
		"a file is removed": func(path string) (string, error) { return "", os.Remove(path + "/gone") },
	} {
		for size, files := range map[string]int{"few files": 0, "many files": 500} {
			t.Run(name+"/"+size, func(t *testing.T) {
				dir := open(t, mounttest.Disk(t, "btrfs", 128<<20))
				path := makeTree(t, dir, "web")
				enginetest.Settle(t, path, files)
				last := markOf(t, dir, "web")
				assert.NilError(t, unix.Syncfs(dir.FD()))
				synced, err := change(path)
				assert.NilError(t, err)
				file, err := os.Open(path + "/" + synced)
				assert.NilError(t, err)
				assert.NilError(t, file.Sync())
				assert.NilError(t, file.Close())
				after := cutPower(t, dir)
				assert.Check(t, !unchanged(t, after, "web", last))
			})
		}
	}
}

// cutPower mounts what is on the disk at this moment, in another place.
func cutPower(t *testing.T, dir *rooted.Dir) *rooted.Dir {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir.Path()))
	assert.NilError(t, err)
	assert.Equal(t, len(mounts), 1)
	base := t.TempDir()
	image, path := filepath.Join(base, "image"), filepath.Join(base, "mnt")
	// Reads of the device see what was written to it.
	assert.NilError(t, run("cp", "--sparse=always", mounts[0].Source, image))
	// Two file systems of one UUID cannot be mounted at a time.
	name := dir.Path()
	assert.NilError(t, dir.Close())
	assert.NilError(t, unix.Unmount(name, 0))
	t.Cleanup(func() { assert.NilError(t, unix.Mount("tmpfs", name, "tmpfs", 0, "")) }) // for who unmounts it
	assert.NilError(t, os.Mkdir(path, 0o755))
	assert.NilError(t, run("mount", "-o", "loop", image, path))
	t.Cleanup(func() { assert.NilError(t, unix.Unmount(path, 0)) })
	return open(t, path)
}

// A device that was set back has other transactions of the same numbers.
func TestAnotherHistoryIsNoticed(t *testing.T) {
	for name, files := range map[string]int{"few files": 0, "many files": 500} {
		t.Run(name, func(t *testing.T) {
			dir := open(t, mounttest.Disk(t, "btrfs", 128<<20))
			path := makeTree(t, dir, "web")
			enginetest.Settle(t, path, files)
			assert.NilError(t, unix.Syncfs(dir.FD()))
			mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir.Path()))
			assert.NilError(t, err)
			image := filepath.Join(t.TempDir(), "image")
			assert.NilError(t, run("cp", "--sparse=always", mounts[0].Source, image))
			assert.NilError(t, os.WriteFile(path+"/small", []byte("one"), 0o600))
			last := markOf(t, dir, "web")
			assert.Assert(t, unchanged(t, dir, "web", last))

			assert.NilError(t, dir.Close())
			assert.NilError(t, unix.Unmount(dir.Path(), 0))
			assert.NilError(t, run("mount", "-o", "loop", image, dir.Path()))
			dir = open(t, dir.Path())
			assert.NilError(t, os.WriteFile(path+"/small", []byte("two"), 0o600))
			for range 5 { // beyond the transaction of the mark
				assert.Assert(t, !unchanged(t, dir, "web", last))
			}
			assert.Assert(t, unchanged(t, dir, "web", markOf(t, dir, "web")))
		})
	}
}
