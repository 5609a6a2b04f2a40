package tree

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

// disks are the file systems that everything is tried on.
var disks = map[string]int64{"ext4": 1 << 30, "xfs": 1 << 30, "btrfs": 1 << 30}

// onDisks runs a test on each of them.
func onDisks(t *testing.T, test func(t *testing.T, kind, dir string)) {
	for kind, size := range disks {
		t.Run(kind, func(t *testing.T) { test(t, kind, mounttest.Disk(t, kind, size)) })
	}
}

func open(t testing.TB, path ...string) *rooted.Dir {
	t.Helper()
	dir, err := rooted.Open(filepath.Join(path...))
	assert.NilError(t, err)
	t.Cleanup(func() { _ = dir.Close() })
	return dir
}

// mkdir makes a directory and opens it.
func mkdir(t testing.TB, path ...string) *rooted.Dir {
	t.Helper()
	assert.NilError(t, os.Mkdir(filepath.Join(path...), 0o755))
	return open(t, path...)
}

func TestACopyOfANastyTreeIsTheSame(t *testing.T) {
	onDisks(t, func(t *testing.T, kind, dir string) {
		src := filepath.Join(dir, "src")
		assert.NilError(t, os.Mkdir(src, 0o755))
		nastytree.Make(t, src)
		for name, options := range map[string]Options{
			"defaults": {}, "one worker": {Parallel: 1}, "many workers": {Parallel: 16}, "copied": {Reflink: Never}, "old kernel": {old: true},
		} {
			t.Run(name, func(t *testing.T) {
				dst := filepath.Join(dir, "dst "+name)
				stats, err := Copy(t.Context(), open(t, src), mkdir(t, dst), options)
				assert.NilError(t, err)
				nastytree.Compare(t, src, dst)
				assert.Equal(t, stats.Unstable+stats.Mounts+stats.Lost, uint64(0), "%+v", stats)
				assert.Equal(t, stats.Cloned > 0, options.Reflink != Never && kind != "ext4")
			})
		}
	})
}

// The copy does not depend on what its parent hands down, or on the process's umask.
func TestTheParentHandsNothingDown(t *testing.T) {
	onDisks(t, func(t *testing.T, _, dir string) {
		src := mkdir(t, dir, "src")
		nastytree.Make(t, src.Path())
		parent := filepath.Join(dir, "parent")
		assert.NilError(t, os.Mkdir(parent, 0o755))
		assert.NilError(t, os.Chown(parent, 11, 12))
		assert.NilError(t, unix.Chmod(parent, 0o2777))
		out, err := exec.CommandContext(t.Context(), "setfacl", "-m", "d:u:99:rwx,d:g:98:rwx,d:o:rwx", parent).CombinedOutput()
		assert.NilError(t, err, "%s", out)
		for i, mask := range []int{0, 0o777} {
			old := unix.Umask(mask)
			dst := filepath.Join(parent, string(rune('a'+i)))
			_, err := Copy(t.Context(), src, mkdir(t, dst), Options{NoSync: true})
			unix.Umask(old)
			assert.NilError(t, err)
			nastytree.Compare(t, src.Path(), dst)
		}
	})
}

func TestEachFileIsVisitedOnce(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	src := mkdir(t, dir, "src")
	nastytree.Make(t, src.Path())
	assert.NilError(t, os.Symlink(outside, filepath.Join(dir, "src/to outside")))
	assert.NilError(t, os.Mkdir(filepath.Join(dir, "src/mount"), 0o755))
	mounttest.Bind(t, outside, filepath.Join(dir, "src/mount"))
	want := 0
	for path, line := range nastytree.List(t, src.Path()) {
		kind := strings.Fields(line)[1]
		if path != "." && path != "mount" && (kind[:len(kind)-4] == "10" || kind[:len(kind)-4] == "4") {
			want++
		}
	}
	var visits atomic.Int64
	assert.NilError(t, Each(t.Context(), src, func(fd int, isDir bool) error {
		visits.Add(1)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		if isDir != (st.Mode&unix.S_IFMT == unix.S_IFDIR) {
			return unix.EINVAL
		}
		return nil
	}))
	assert.Equal(t, int(visits.Load()), want)
	err := Each(t.Context(), src, func(int, bool) error { return unix.EXFULL })
	assert.ErrorIs(t, err, unix.EXFULL)
}

// What is mounted in a tree is left out, told, and not touched.
func TestMountsAreLeftOut(t *testing.T) {
	for _, old := range []bool{false, true} {
		dir, outside := t.TempDir(), t.TempDir()
		assert.NilError(t, os.WriteFile(filepath.Join(outside, "file"), []byte("of another file system"), 0o600))
		src, dst := mkdir(t, dir, "src"), mkdir(t, dir, "dst")
		assert.NilError(t, os.MkdirAll(filepath.Join(dir, "src/a/mount"), 0o755))
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "src/a/mount/below"), nil, 0o600))
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "src/a/file"), nil, 0o600))
		mounttest.Bind(t, outside, filepath.Join(dir, "src/a/mount"))
		mounttest.Bind(t, filepath.Join(outside, "file"), filepath.Join(dir, "src/a/file"))
		stats, err := Copy(t.Context(), src, dst, Options{old: old})
		assert.NilError(t, err)
		assert.Equal(t, stats.Mounts, uint64(2))
		slices.Sort(stats.MountsSome)
		assert.DeepEqual(t, stats.MountsSome, []string{"a/file", "a/mount"})
		list := nastytree.List(t, filepath.Join(dir, "dst"))
		assert.Equal(t, len(list), 2, "%v", list)
		usage, err := Size(t.Context(), src)
		assert.NilError(t, err)
		assert.Equal(t, usage.Files, uint64(2))
	}
}

func TestTheTargetHasToBeEmptyAndElsewhere(t *testing.T) {
	dir := t.TempDir()
	src, dst := mkdir(t, dir, "src"), mkdir(t, dir, "dst")
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "dst/file"), nil, 0o600))
	_, err := Copy(t.Context(), src, dst, Options{})
	assert.ErrorIs(t, err, ErrNotEmpty)
	_, err = Copy(t.Context(), src, mkdir(t, dir, "src/inside"), Options{})
	assert.ErrorContains(t, err, "would be inside")
}

func TestSharingIsRequiredOrRefused(t *testing.T) {
	onDisks(t, func(t *testing.T, kind, dir string) {
		src := mkdir(t, dir, "src")
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "src/file"), make([]byte, 100<<10), 0o600))
		_, err := Copy(t.Context(), src, mkdir(t, dir, "required"), Options{Reflink: Require})
		if kind == "ext4" {
			assert.ErrorIs(t, err, ErrNoReflink)
		} else {
			assert.NilError(t, err)
		}
		stats, err := Copy(t.Context(), src, mkdir(t, dir, "never"), Options{Reflink: Never})
		assert.NilError(t, err)
		assert.Equal(t, stats.Cloned, uint64(0))
	})
}

// A disk that is too small is told, and ends the copy.
func TestAFullDiskEndsTheCopy(t *testing.T) {
	small := mounttest.Tmpfs(t, 1<<20)
	dir := t.TempDir()
	many(t, filepath.Join(dir, "src"), 30, 5)
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "src/large"), make([]byte, 2<<20), 0o600))
	_, err := Copy(t.Context(), open(t, dir, "src"), mkdir(t, small, "dst"), Options{})
	assert.ErrorIs(t, err, unix.ENOSPC)
}

// Data that the kernel has taken and cannot write makes no copy, though every single
// call has succeeded.
func TestBlocksThatCannotBeWrittenAreTold(t *testing.T) {
	run := func(argv ...string) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput()
		assert.NilError(t, err, "%s", out)
	}
	// An image that is larger than what it lies on.
	image, dir := filepath.Join(mounttest.Tmpfs(t, 24<<20), "image"), t.TempDir()
	assert.NilError(t, os.WriteFile(image, nil, 0o600))
	assert.NilError(t, os.Truncate(image, 256<<20))
	run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1", image)
	run("mount", "-o", "loop", image, dir)
	t.Cleanup(func() { assert.NilError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	src := mkdir(t, t.TempDir(), "src")
	assert.NilError(t, os.WriteFile(filepath.Join(src.Path(), "large"), bytes.Repeat([]byte("x"), 64<<20), 0o600))
	dst, err := rooted.Open(dir)
	assert.NilError(t, err)
	defer dst.Close()
	assert.NilError(t, os.RemoveAll(filepath.Join(dir, "lost+found")))
	_, err = Copy(t.Context(), src, dst, Options{NoSync: true})
	assert.NilError(t, err, "the kernel takes it all")
	assert.NilError(t, os.Remove(filepath.Join(dir, "large")))
	_, err = Copy(t.Context(), src, dst, Options{})
	assert.ErrorIs(t, err, unix.EIO)
}

// Attributes that the target does not know are told, and do not end the copy.
func TestAttributesThatCannotBeStored(t *testing.T) {
	target := t.TempDir()
	assert.NilError(t, unix.Mount("ramfs", target, "ramfs", 0, ""))
	t.Cleanup(func() { assert.NilError(t, unix.Unmount(target, unix.MNT_DETACH)) })
	dir := mounttest.Disk(t, "ext4", 1<<30)
	src := mkdir(t, dir, "src")
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "src/file"), []byte("x"), 0o600))
	assert.NilError(t, unix.Setxattr(filepath.Join(dir, "src/file"), "user.name", []byte("x"), 0))
	stats, err := Copy(t.Context(), src, mkdir(t, target, "dst"), Options{})
	assert.NilError(t, err)
	assert.DeepEqual(t, stats.LostSome, []string{"file: user.name"})
	assert.Equal(t, stats.Lost, uint64(1))
}

func TestProgressGrowsToTheEnd(t *testing.T) {
	dir := t.TempDir()
	many(t, filepath.Join(dir, "src"), 100, 10)
	var calls [][2]uint64
	stats, err := Copy(t.Context(), open(t, dir, "src"), mkdir(t, dir, "dst"), Options{Progress: func(files, bytes uint64) {
		calls = append(calls, [2]uint64{files, bytes})
	}})
	assert.NilError(t, err)
	assert.Assert(t, slices.IsSortedFunc(calls, func(a, b [2]uint64) int { return cmp.Or(cmp.Compare(a[0], b[0]), cmp.Compare(a[1], b[1])) }))
	assert.Equal(t, calls[len(calls)-1], [2]uint64{stats.Files, stats.Bytes})
}

func TestTheContextEndsACopy(t *testing.T) {
	dir := t.TempDir()
	many(t, filepath.Join(dir, "src"), 100, 10)
	src := open(t, dir, "src")
	ctx, cancel := context.WithCancel(t.Context())
	before := descriptors(t)
	dst := mkdir(t, dir, "dst")
	stats, err := Copy(ctx, src, dst, Options{Progress: func(files, _ uint64) { cancel() }})
	assert.ErrorIs(t, err, context.Canceled)
	assert.Assert(t, stats.Files < 1201)
	assert.Equal(t, descriptors(t), before+1)
	_, err = Copy(ctx, src, mkdir(t, dir, "dst2"), Options{})
	assert.ErrorIs(t, err, context.Canceled)
}

// A file that changes while it is read is read again, and one that never holds still is in
// the copy all the same, and counted.
func TestFilesThatChangeWhileTheyAreRead(t *testing.T) {
	onDisks(t, func(t *testing.T, _, dir string) {
		src := mkdir(t, dir, "src")
		for name, changes := range map[string]struct {
			times    int
			unstable uint64
		}{"once": {1, 0}, "thrice": {3, 0}, "always": {100, 1}} {
			path := filepath.Join(dir, "src/file")
			size := int64(50_000)
			for change, do := range map[string]func() error{
				"grows":      func() error { return appendTo(path, "more") },
				"shrinks":    func() error { size--; return os.Truncate(path, size) },
				"attributes": func() error { return unix.Setxattr(path, "user.time", []byte(time.Now().String()), 0) },
				"mode":       func() error { return os.Chmod(path, 0o4711) },
			} {
				assert.NilError(t, os.WriteFile(path, bytes.Repeat([]byte("x"), 100_000), 0o600))
				time.Sleep(2 * tick) // what was just written is read twice in any case
				left := changes.times
				name := name + " " + change
				stats, err := Copy(t.Context(), src, mkdir(t, dir, name), Options{Reflink: Never, read: func(string) {
					if left--; left >= 0 {
						assert.NilError(t, do())
					}
				}})
				assert.NilError(t, err)
				assert.Equal(t, stats.Unstable, changes.unstable, name)
				assert.Equal(t, stats.Files, uint64(2))
				if stats.Unstable == 0 {
					nastytree.Compare(t, src.Path(), filepath.Join(dir, name))
				} else {
					assert.DeepEqual(t, stats.UnstableSome, []string{"file"})
					assert.Equal(t, left, 100-rounds)
				}
			}
		}
	})
}

func appendTo(path, text string) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(text)
	return errors.Join(err, file.Close())
}

// Files that vanish, or are replaced, while they are read are in the copy as they
// were.
func TestFilesThatAreReplacedWhileTheyAreRead(t *testing.T) {
	dir := t.TempDir()
	src := mkdir(t, dir, "src")
	path := filepath.Join(dir, "src/file")
	assert.NilError(t, os.WriteFile(path, []byte("before"), 0o600))
	assert.NilError(t, os.Link(path, filepath.Join(dir, "src/other")))
	stats, err := Copy(t.Context(), src, mkdir(t, dir, "dst"), Options{Parallel: 1, read: func(name string) {
		path := filepath.Join(dir, "src", name)
		assert.NilError(t, os.WriteFile(path+".new", []byte("after"), 0o600))
		assert.NilError(t, os.Rename(path+".new", path))
	}})
	assert.NilError(t, err)
	// What was read first had no second name any more when the other's turn came.
	assert.Equal(t, stats.Files, uint64(3))
	for _, name := range []string{"file", "other"} {
		data, err := os.ReadFile(filepath.Join(dir, "dst", name))
		assert.NilError(t, err)
		assert.Equal(t, string(data), "before", name)
	}
}

// A file that is held by a lease is copied when its holder lets go.
func TestALeaseOnlyDelays(t *testing.T) {
	dir := t.TempDir()
	src := mkdir(t, dir, "src")
	path := filepath.Join(dir, "src/file")
	assert.NilError(t, os.WriteFile(path, []byte("leased"), 0o600))
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	assert.NilError(t, err)
	defer file.Close()
	// Whoever has a lease gets SIGIO when somebody else wants the file.
	asked := make(chan os.Signal, 10)
	signal.Notify(asked, unix.SIGIO)
	defer signal.Stop(asked)
	_, err = unix.FcntlInt(file.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	assert.NilError(t, err)
	given := make(chan struct{})
	go func() {
		defer close(given)
		<-asked
		_, _ = unix.FcntlInt(file.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	}()
	_, err = Copy(t.Context(), src, mkdir(t, dir, "dst"), Options{})
	<-given
	assert.NilError(t, err)
	data, err := os.ReadFile(filepath.Join(dir, "dst/file"))
	assert.NilError(t, err)
	assert.Equal(t, string(data), "leased")
}

// btrfs keeps data where it is for files that say so, and shares it only between
// two that do.
func TestNoCopyOnWriteIsKept(t *testing.T) {
	dir := mounttest.Disk(t, "btrfs", 1<<30)
	assert.NilError(t, os.MkdirAll(filepath.Join(dir, "src/nocow"), 0o755))
	run := func(argv ...string) string {
		out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput()
		assert.NilError(t, err, "%s", out)
		return string(out)
	}
	run("chattr", "+C", filepath.Join(dir, "src/nocow"))
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "src/nocow/file"), make([]byte, 100<<10), 0o600))
	assert.NilError(t, os.Link(filepath.Join(dir, "src/nocow/file"), filepath.Join(dir, "src/also")))
	stats, err := Copy(t.Context(), open(t, dir, "src"), mkdir(t, dir, "dst"), Options{Reflink: Require, Parallel: 1})
	assert.NilError(t, err)
	assert.Equal(t, stats.Cloned, uint64(1))
	for _, name := range []string{"nocow", "also"} {
		assert.Assert(t, strings.Contains(strings.Fields(run("lsattr", "-d", filepath.Join(dir, "dst", name)))[0], "C"), name)
	}
}

func FuzzDirents(f *testing.F) {
	dir, err := os.Open("/etc")
	assert.NilError(f, err)
	defer dir.Close()
	buf := make([]byte, 4096)
	n, err := unix.Getdents(int(dir.Fd()), buf)
	assert.NilError(f, err)
	// The same as another parser says.
	entries, err := parseDirents(buf[:n], nil)
	assert.NilError(f, err)
	_, _, want := unix.ParseDirent(buf[:n], -1, nil)
	for i, e := range entries {
		assert.Equal(f, e.name, want[i])
	}
	assert.Equal(f, len(entries), len(want))
	f.Add(buf[:n])
	f.Add(buf[:n-1])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, _ := parseDirents(data, nil)
		for _, e := range entries {
			if e.name == "" || e.name == "." || e.name == ".." || strings.ContainsAny(e.name, "/\x00") {
				t.Fatalf("%q", e.name)
			}
		}
	})
}
