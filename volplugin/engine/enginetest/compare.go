package enginetest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
)

// A Change is one that a backup would show, to a volume that Settle has filled.
type Change struct {
	Name string
	Make func(path string) error
}

// Settle puts what Changes change into a directory, with as many more files as are asked
// for.
func Settle(t testing.TB, path string, files int) {
	t.Helper()
	for _, dir := range []string{"d", "d/e", "empty"} {
		assert.NilError(t, os.Mkdir(filepath.Join(path, dir), 0o755))
	}
	for i := range files {
		assert.NilError(t, os.WriteFile(filepath.Join(path, "d/e", fmt.Sprint(i)), []byte("one of many"), 0o600))
	}
	big := []byte(strings.Repeat("0123456789abcdef", 32<<10/16))
	for _, file := range []string{"written", "mapped", "punched", "cut", "replaced", "longer", "other"} {
		assert.NilError(t, os.WriteFile(filepath.Join(path, file), big, 0o600))
	}
	for _, file := range []string{"small", "gone", "linked", "moved", "d/moved", "swapped", "d/swapped", "mode", "owner", "time", "labelled"} {
		assert.NilError(t, os.WriteFile(filepath.Join(path, file), []byte(file), 0o600))
	}
	assert.NilError(t, os.Link(filepath.Join(path, "linked"), filepath.Join(path, "d/link")))
	assert.NilError(t, unix.Setxattr(filepath.Join(path, "labelled"), "user.was", []byte("x"), 0))
	flush(t, path)
}

// Changes are those that can be made on any file system, in their order.
func Changes() []Change {
	at := func(path, name string, flags int, change func(file *os.File) error) error {
		file, err := os.OpenFile(filepath.Join(path, name), flags, 0)
		if err != nil {
			return err
		}
		defer file.Close()
		return change(file)
	}
	return []Change{
		{"a byte, with the old time", func(path string) error {
			path = filepath.Join(path, "written")
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			if err := at(path, "", os.O_WRONLY, func(file *os.File) error { _, err := file.WriteAt([]byte("!"), 20000); return err }); err != nil {
				return err
			}
			return os.Chtimes(path, info.ModTime(), info.ModTime())
		}},
		{"a byte of a small file", func(path string) error {
			return at(path, "small", os.O_WRONLY, func(file *os.File) error { _, err := file.WriteAt([]byte("!"), 1); return err })
		}},
		{"a byte through a mapping", func(path string) error {
			return at(path, "mapped", os.O_RDWR, func(file *os.File) error {
				data, err := unix.Mmap(int(file.Fd()), 0, 32<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
				if err != nil {
					return err
				}
				data[10000] = '!'
				return unix.Munmap(data)
			})
		}},
		{"more bytes", func(path string) error {
			return at(path, "longer", os.O_WRONLY|os.O_APPEND, func(file *os.File) error { _, err := file.WriteString("more"); return err })
		}},
		{"fewer bytes", func(path string) error { return os.Truncate(filepath.Join(path, "cut"), 4096) }},
		{"longer by a hole", func(path string) error { return os.Truncate(filepath.Join(path, "cut"), 1<<20) }},
		{"a hole", func(path string) error {
			return at(path, "punched", os.O_RDWR, func(file *os.File) error {
				return unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4096, 8192)
			})
		}},
		{"a new file", func(path string) error { return os.WriteFile(filepath.Join(path, "d/new"), nil, 0o600) }},
		{"a new file without a name at first", func(path string) error {
			fd, err := unix.Open(path, unix.O_TMPFILE|unix.O_RDWR, 0o600)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, filepath.Join(path, "named"), unix.AT_SYMLINK_FOLLOW)
		}},
		{"a new directory", func(path string) error { return os.Mkdir(filepath.Join(path, "d/dir"), 0o755) }},
		{"a symbolic link", func(path string) error { return os.Symlink("small", filepath.Join(path, "sym")) }},
		{"another symbolic link in its place", func(path string) error {
			if err := os.Symlink("large", filepath.Join(path, "sym.new")); err != nil {
				return err
			}
			return os.Rename(filepath.Join(path, "sym.new"), filepath.Join(path, "sym"))
		}},
		{"a pipe", func(path string) error { return unix.Mkfifo(filepath.Join(path, "pipe"), 0o600) }},
		{"a device", func(path string) error {
			return unix.Mknod(filepath.Join(path, "null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3)))
		}},
		{"a file is removed", func(path string) error { return os.Remove(filepath.Join(path, "gone")) }},
		{"a directory is removed", func(path string) error { return os.Remove(filepath.Join(path, "empty")) }},
		{"another name", func(path string) error {
			return os.Rename(filepath.Join(path, "moved"), filepath.Join(path, "renamed"))
		}},
		{"another directory", func(path string) error {
			return os.Rename(filepath.Join(path, "d/moved"), filepath.Join(path, "d/e/moved"))
		}},
		{"two files in one another's place", func(path string) error {
			return unix.Renameat2(unix.AT_FDCWD, filepath.Join(path, "swapped"), unix.AT_FDCWD, filepath.Join(path, "d/swapped"), unix.RENAME_EXCHANGE)
		}},
		{"a file in the place of another", func(path string) error {
			return os.Rename(filepath.Join(path, "other"), filepath.Join(path, "replaced"))
		}},
		{"a hard link", func(path string) error {
			return os.Link(filepath.Join(path, "small"), filepath.Join(path, "d/e/small"))
		}},
		{"a hard link is removed", func(path string) error { return os.Remove(filepath.Join(path, "d/link")) }},
		{"a mode", func(path string) error { return os.Chmod(filepath.Join(path, "mode"), 0o640) }},
		{"an owner", func(path string) error { return os.Lchown(filepath.Join(path, "owner"), 7, 8) }},
		{"a time", func(path string) error {
			return os.Chtimes(filepath.Join(path, "time"), time.Unix(1e9, 0), time.Unix(1e9, 0))
		}},
		{"a new attribute", func(path string) error {
			return unix.Setxattr(filepath.Join(path, "d"), "user.new", []byte("x"), 0)
		}},
		{"an attribute", func(path string) error {
			return unix.Setxattr(filepath.Join(path, "labelled"), "user.was", []byte("y"), 0)
		}},
		{"an attribute is removed", func(path string) error { return unix.Removexattr(filepath.Join(path, "labelled"), "user.was") }},
		{"an attribute of a symbolic link", func(path string) error {
			return unix.Lsetxattr(filepath.Join(path, "sym"), "trusted.new", []byte("x"), 0)
		}},
		{"the mode of the top", func(path string) error { return os.Chmod(path, 0o711) }},
		{"the owner of the top", func(path string) error { return os.Chown(path, 9, 9) }},
		{"an attribute of the top", func(path string) error { return unix.Setxattr(path, "user.top", []byte("x"), 0) }},
	}
}

// sizes of volumes of which file systems keep books in different ways.
func sizes() map[string]int { return map[string]int{"few files": 0, "many files": 500} }

func testCompare(b *bench) {
	comparer, ok := b.engine.(engine.Comparer)
	if !ok {
		return
	}
	for name, files := range sizes() {
		b.t.Run(name, func(t *testing.T) {
			one := *b
			one.t = t
			one.compare(comparer, strings.ReplaceAll(name, " ", "-"), files)
		})
	}
}

func (b *bench) compare(e engine.Comparer, name string, files int) {
	t := b.t
	v := b.create(name)
	b.within(v, func(path string) { Settle(t, path, files) })
	n := 0
	// taken calls use with a new snapshot, which is gone afterwards.
	taken := func(use func(snap string)) {
		n++
		snap := fmt.Sprint("s", n)
		b.snapshot(v, snap)
		use(snap)
		assert.NilError(t, b.engine.RemoveSnapshot(t.Context(), b.place, v, snap))
	}
	mark := func() (mark engine.Mark) {
		taken(func(snap string) {
			var err error
			mark, err = e.Mark(t.Context(), b.place, v, snap)
			assert.NilError(t, err)
		})
		return mark
	}
	unchanged := func(since engine.Mark) (same bool) {
		taken(func(snap string) {
			var err error
			same, err = e.Unchanged(t.Context(), b.place, v, snap, since)
			assert.NilError(t, err)
		})
		return same
	}
	last := mark()
	if last == "" {
		assert.Assert(t, !b.can.Instant, "no mark of a snapshot that is no copy")
		return
	}
	assert.Assert(t, unchanged(last))
	for _, change := range Changes() {
		b.within(v, func(path string) { assert.NilError(t, change.Make(path), change.Name) })
		assert.Check(t, !unchanged(last), change.Name)
		last = mark()
		assert.Check(t, unchanged(last), "after %s", change.Name)
	}
	b.within(v, func(path string) { flush(t, path) })
	assert.Check(t, unchanged(last), "after all was put on disk")
	assert.NilError(t, b.engine.Rename(t.Context(), b.place, v, v.Name+"-too"))
	v.Name += "-too"
	assert.Check(t, unchanged(last), "under another name")
	_, err := e.Unchanged(t.Context(), b.place, v, "none", last)
	assert.Assert(t, err != nil)

	// Of another volume, and of a volume that was rolled back, nothing is known.
	b.snapshot(v, "base")
	base, err := e.Mark(t.Context(), b.place, v, "base")
	assert.NilError(t, err)
	same, err := e.Unchanged(t.Context(), b.place, v, "base", base)
	assert.NilError(t, err)
	assert.Assert(t, !same, "the snapshot itself is no later one")
	other := b.volume(name + "-copy")
	_, err = b.engine.Clone(t.Context(), b.place, v, "base", other, nil)
	assert.NilError(t, err)
	b.attach(other)
	b.snapshot(other, "base")
	same, err = e.Unchanged(t.Context(), b.place, other, "base", base)
	assert.NilError(t, err)
	assert.Assert(t, !same, "a clone is another volume")
	b.write(v, "small", "new")
	_, err = b.engine.Rollback(t.Context(), b.place, v, "base", "kept", nil)
	assert.NilError(t, err)
	b.write(v, "small", "newer")
	assert.Assert(t, !unchanged(base), "rolled back and written")
	for _, damaged := range []engine.Mark{"", "x", "{}"} {
		b.snapshot(v, "again")
		same, _ := e.Unchanged(t.Context(), b.place, v, "again", damaged)
		assert.Assert(t, !same, "mark %q", damaged)
		assert.NilError(t, b.engine.RemoveSnapshot(t.Context(), b.place, v, "again"))
	}
}
