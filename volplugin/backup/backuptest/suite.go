// Package backuptest holds the conformance suite of the engines of backups: what the
// contract in package backup says, as tests that every engine passes.
//
// What the contract leaves open and the suite wants: Result.Files counts each name of a
// regular file, Dirs counts data itself as well, and Bytes counts a file once for each
// of its names. Restore refuses a path that the backup does not have, or that is not one
// below data. When ctx ends a call, the error wraps ctx's.
package backuptest

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
)

// A Repository is a place for one that the tests make. Functions but Open may be nil,
// when the engine has no such thing.
type Repository struct {
	// Open gives an engine as another host has one: with nothing that another engine
	// keeps on this machine.
	Open func(t testing.TB) backup.Engine
	// Damage changes some of the data of the only backup in the repository, and neither
	// its size nor what List reads.
	Damage func(t testing.TB)
	// Stray puts into the repository what Berth has not made: what plain restic would
	// put there, or other files.
	Stray func(t testing.TB)
	// Plant stores a backup of volume "hostile" that holds the entries, in their order,
	// as somebody would who means harm. A valid manifest is in it.
	Plant func(t testing.TB, entries []Entry) (id string)
}

// An Entry is what Plant stores.
type Entry struct {
	// Name is relative to the top of the backup, "data/file" for example.
	Name string
	// Type is unix.S_IFREG, S_IFDIR or S_IFLNK, or HardLink.
	Type uint32
	// Text is the content of a file, or the target of a link.
	Text string
}

// HardLink is the Type of another name of the file Text, which is relative to the top
// of the backup.
const HardLink = ^uint32(0)

// Run runs the suite. newRepository gives one that is not there yet; nothing else uses it.
// The process needs a mount namespace of its own, the programs that package nastytree
// needs, and btrfs.
func Run(t *testing.T, newRepository func(testing.TB) Repository) {
	for name, test := range map[string]func(*bench){
		"a repository is made once":                   testInit,
		"a backup is listed as it was told":           testListed,
		"a nasty tree comes back":                     testNasty,
		"a backup is restored into an empty mount":    testMounts,
		"single paths are restored, literally":        testPaths,
		"paths stay inside":                           testWrongPaths,
		"filters let through what they say":           testFilters,
		"a file that cannot be read is named":         testIncomplete,
		"a parent that is gone is no error":           testParentGone,
		"a change is seen with a parent":              testChanged,
		"an empty volume has its owner and mode":      testEmpty,
		"many small files come back":                  testMany,
		"what is forgotten is gone":                   testForget,
		"an unknown backup is told apart":             testUnknown,
		"a check finds damage":                        testCheck,
		"what Berth has not made is left alone":       testStray,
		"a cancelled backup leaves nothing":           testBackupCancelled,
		"a cancelled restore harms nothing":           testRestoreCancelled,
		"hosts work at the same time":                 testTogether,
		"hostile content stays inside":                testHostile,
		"progress comes from one goroutine at a time": testProgress,
	} {
		t.Run(name, func(t *testing.T) {
			b := &bench{T: t, repository: newRepository(t)}
			b.engine = b.repository.Open(t)
			test(b)
		})
	}
}

// bench is one repository for one test.
type bench struct {
	*testing.T
	repository Repository
	engine     backup.Engine
}

func (b *bench) init() {
	b.Helper()
	assert.NilError(b, b.engine.Init(b.Context()))
}

// noon is when the first snapshot was made.
var noon = time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)

// source makes the source of a volume, whose data is an empty directory.
func (b *bench) source(volume string) backup.Source {
	b.Helper()
	s := backup.Source{Dir: b.TempDir(), Volume: volume, UUID: uuid.NewString(), Host: "host-a", Time: noon, Tags: []string{"nightly"}}
	assert.NilError(b, os.Mkdir(data(s), 0o755))
	describe(b, s)
	return s
}

// describe writes the manifest of a source.
func describe(t testing.TB, s backup.Source) {
	t.Helper()
	text, err := manifest(s).Encode()
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(s.Dir, backup.ManifestName), text, 0o600))
}

func manifest(s backup.Source) backup.Manifest {
	return backup.Manifest{
		Schema: 1, Berth: "test", Volume: s.Volume, UUID: s.UUID, Options: map[string]string{"size": "1GiB"}, Labels: map[string]string{"l": "ü"},
		Engine: "dir", FileSystem: "ext4", Size: 1 << 30, Snapshot: "backup", Time: s.Time, Consistency: engine.Crash, Host: s.Host,
	}
}

// data is the path of a source's volume.
func data(s backup.Source) string { return filepath.Join(s.Dir, backup.DataName) }

func write(t testing.TB, path, content string) {
	t.Helper()
	assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	assert.NilError(t, os.WriteFile(path, []byte(content), 0o644))
}

// backup makes a complete backup.
func (b *bench) backup(s backup.Source) backup.Result {
	b.Helper()
	result, err := b.engine.Backup(b.Context(), s, nil)
	assert.NilError(b, err)
	assert.Assert(b, result.Complete(), "missing: %q", result.Missing)
	assert.Assert(b, len(result.ID) >= 8, "ID %q", result.ID)
	return result
}

// restore restores a backup, or some of it, into a new directory.
func (b *bench) restore(id string, paths ...string) (dir string) {
	b.Helper()
	dir = b.TempDir()
	_, err := b.engine.Restore(b.Context(), backup.Backup{ID: id}, dir, paths, nil)
	assert.NilError(b, err)
	return dir
}

// same checks that a restored directory is what was backed up.
func (b *bench) same(s backup.Source, dir string) {
	b.Helper()
	nastytree.CompareLoosely(b, data(s), filepath.Join(dir, backup.DataName))
	want, err := os.ReadFile(filepath.Join(s.Dir, backup.ManifestName))
	assert.NilError(b, err)
	got, err := os.ReadFile(filepath.Join(dir, backup.ManifestName))
	assert.NilError(b, err)
	assert.Equal(b, string(got), string(want))
	assert.DeepEqual(b, names(b, dir), []string{backup.DataName, backup.ManifestName})
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	assert.NilError(t, err)
	all := []string{}
	for _, entry := range entries {
		all = append(all, entry.Name())
	}
	return all
}

// list gives the IDs that a filter lets through.
func (b *bench) list(filter backup.Filter) []string {
	b.Helper()
	return listed(b, b.engine, filter)
}

func listed(t testing.TB, e backup.Engine, filter backup.Filter) []string {
	t.Helper()
	all, err := e.List(t.Context(), filter)
	assert.NilError(t, err)
	got := []string{}
	for _, one := range all {
		got = append(got, one.ID)
	}
	return got
}

// count adds up a source as Result does.
func count(t testing.TB, s backup.Source) (files, dirs, bytes uint64) {
	t.Helper()
	assert.NilError(t, filepath.WalkDir(data(s), func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir():
			dirs++
		case entry.Type().IsRegular():
			info, err := entry.Info()
			if err != nil {
				return err
			}
			files++
			bytes += uint64(info.Size())
		}
		return nil
	}))
	return files, dirs, bytes
}

// tree makes a small tree that every file system can hold, tmpfs as well.
func tree(t testing.TB, top string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(top, name) }
	write(t, in("dir/deep/file"), "content")
	write(t, in("new\nline \xff"), "x")
	assert.NilError(t, os.Link(in("dir/deep/file"), in("hard")))
	assert.NilError(t, os.Symlink("/etc/passwd", in("link")))
	assert.NilError(t, unix.Mkfifo(in("fifo"), 0o600))
	assert.NilError(t, unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	assert.NilError(t, unix.Setxattr(in("dir"), "trusted.name", []byte{0, 1, 2}, 0))
	assert.NilError(t, os.Chown(in("hard"), 1000, 2000))
	assert.NilError(t, unix.Chmod(in("hard"), 0o6755))
	old := time.Unix(987654321, 123456789)
	for _, name := range []string{"dir/deep/file", "dir/deep", "dir", "fifo"} {
		assert.NilError(t, os.Chtimes(in(name), old, old))
	}
	assert.NilError(t, os.Chown(top, 33, 44))
	assert.NilError(t, unix.Chmod(top, 0o2751))
	assert.NilError(t, os.Chtimes(top, old, old))
}

// sorted is a copy in order.
func sorted(all []string) []string { return slices.Sorted(slices.Values(all)) }

// outside makes a directory with a file that nobody may touch, and returns a check of
// that.
func outside(t testing.TB) (dir string, untouched func()) {
	t.Helper()
	dir = t.TempDir()
	write(t, filepath.Join(dir, "file"), "outside")
	before := fmt.Sprint(nastytree.List(t, dir))
	return dir, func() {
		t.Helper()
		assert.Equal(t, fmt.Sprint(nastytree.List(t, dir)), before, "something outside was changed")
	}
}
