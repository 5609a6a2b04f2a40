package backuptest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
)

func testNasty(b *bench) {
	b.init()
	s := b.source("vol")
	nastytree.Make(b, data(s))
	// A hole of 1 TiB takes too long to read for what knows no holes.
	var st unix.Stat_t
	assert.NilError(b, unix.Stat(filepath.Join(data(s), "files"), &st))
	assert.NilError(b, os.Remove(filepath.Join(data(s), "files/huge")))
	assert.NilError(b, unix.UtimesNano(filepath.Join(data(s), "files"), []unix.Timespec{st.Atim, st.Mtim}))

	result := b.backup(s)
	files, dirs, bytes := count(b, s)
	assert.Equal(b, result.Files, files)
	assert.Equal(b, result.Dirs, dirs)
	assert.Equal(b, result.Bytes, bytes)
	dir := b.TempDir()
	restored, err := b.engine.Restore(b.Context(), backup.Backup{ID: result.ID}, dir, nil, nil)
	assert.NilError(b, err)
	assert.Assert(b, restored.Files >= files, "restored %d files of %d", restored.Files, files)
	b.same(s, dir)
	for _, name := range []string{"hole", "middle", "ends"} {
		assert.NilError(b, unix.Stat(filepath.Join(dir, backup.DataName, "files", name), &st))
		assert.Assert(b, st.Blocks*512 < st.Size*3/4, "the holes of %s were filled: %d blocks", name, st.Blocks)
	}
}

func testMounts(b *bench) {
	b.init()
	s := b.source("vol")
	tree(b, data(s))
	id := b.backup(s).ID
	for name, from := range map[string]string{"tmpfs": mounttest.Tmpfs(b, 16<<20), "ext4": mounttest.Disk(b, "ext4", 64<<20)} {
		dir := b.TempDir()
		at := filepath.Join(dir, backup.DataName)
		assert.NilError(b, os.Mkdir(at, 0o700))
		mounttest.Bind(b, from, at)
		_, err := b.engine.Restore(b.Context(), backup.Backup{ID: id}, dir, nil, nil)
		assert.NilError(b, err, name)
		nastytree.CompareLoosely(b, data(s), at, "lost+found")
		// It is on the mount.
		nastytree.CompareLoosely(b, data(s), from, "lost+found")
	}
	dir := b.TempDir()
	assert.NilError(b, os.Mkdir(filepath.Join(dir, backup.DataName), 0o700))
	_, err := b.engine.Restore(b.Context(), backup.Backup{ID: id}, dir, nil, nil)
	assert.NilError(b, err)
	b.same(s, dir)
}

func testEmpty(b *bench) {
	b.init()
	s := b.source("vol")
	assert.NilError(b, os.Chown(data(s), 999, 998))
	assert.NilError(b, unix.Chmod(data(s), 0o3710))
	assert.NilError(b, unix.Setxattr(data(s), "trusted.top", []byte("x"), 0))
	result := b.backup(s)
	assert.Equal(b, result.Files, uint64(0))
	assert.Equal(b, result.Dirs, uint64(1))
	assert.Equal(b, result.Bytes, uint64(0))
	b.same(s, b.restore(result.ID))
}

func testMany(b *bench) {
	b.init()
	// In memory, where files are made quickly.
	top := mounttest.Tmpfs(b, 256<<20)
	s := b.source("vol")
	s.Dir = filepath.Join(top, "source")
	assert.NilError(b, os.MkdirAll(data(s), 0o755))
	describe(b, s)
	for i := range 100 {
		dir := filepath.Join(data(s), fmt.Sprint("d", i))
		assert.NilError(b, os.Mkdir(dir, 0o755))
		for j := range 100 {
			assert.NilError(b, os.WriteFile(filepath.Join(dir, fmt.Sprint(j)), []byte(fmt.Sprint(i, j%10)), 0o600))
		}
	}
	result := b.backup(s)
	assert.Equal(b, result.Files, uint64(10_000))
	to := filepath.Join(top, "restored")
	assert.NilError(b, os.Mkdir(to, 0o700))
	_, err := b.engine.Restore(b.Context(), backup.Backup{ID: result.ID}, to, nil, nil)
	assert.NilError(b, err)
	b.same(s, to)
}

func testPaths(b *bench) {
	b.init()
	s := b.source("vol")
	literal := []string{"*", "a?", "[ab]", "{x,y}", `back\slash`, "!not", "-rf", " blank ", "$HOME", "**", "#c", "new\nline", "\xff", "UPPER", "dir*"}
	for _, name := range append(literal, "a", "b", "x", "ab", "upper", "backslash", "not") {
		write(b, filepath.Join(data(s), "in", name, "file"), name)
	}
	write(b, filepath.Join(data(s), "plain/deep/file"), "content")
	write(b, filepath.Join(data(s), "own/deep/file"), "content")
	assert.NilError(b, os.Chown(filepath.Join(data(s), "own"), 70, 71))
	assert.NilError(b, unix.Chmod(filepath.Join(data(s), "own"), 0o2710))
	tree(b, data(s))
	id := b.backup(s).ID
	for _, name := range literal {
		dir := b.restore(id, "in/"+name)
		below := filepath.Join(dir, backup.DataName)
		assert.DeepEqual(b, names(b, below), []string{"in"})
		assert.DeepEqual(b, names(b, filepath.Join(below, "in")), []string{name})
		nastytree.CompareLoosely(b, filepath.Join(data(s), "in", name), filepath.Join(below, "in", name))
	}
	// A file, a directory with all below it, and the directories above them.
	dir := b.restore(id, "in/*/file", "plain", "link")
	below := filepath.Join(dir, backup.DataName)
	assert.DeepEqual(b, names(b, below), []string{"in", "link", "plain"})
	assert.DeepEqual(b, names(b, filepath.Join(below, "in")), []string{"*"})
	nastytree.CompareLoosely(b, filepath.Join(data(s), "plain"), filepath.Join(below, "plain"))
	// What is above has the owner and mode that it had.
	var st unix.Stat_t
	assert.NilError(b, unix.Lstat(filepath.Join(b.restore(id, "own/deep/file"), backup.DataName, "own"), &st))
	assert.DeepEqual(b, []uint32{st.Uid, st.Gid, st.Mode & 0o7777}, []uint32{70, 71, 0o2710})
	// A file with two names comes with its content, whichever is asked for.
	for _, name := range []string{"hard", "dir/deep/file"} {
		content, err := os.ReadFile(filepath.Join(b.restore(id, name), backup.DataName, name))
		assert.NilError(b, err)
		assert.Equal(b, string(content), "content")
	}
}

func testWrongPaths(b *bench) {
	b.init()
	s := b.source("vol")
	tree(b, data(s))
	id := b.backup(s).ID
	for _, path := range []string{
		"missing", "dir/missing", "dir/deep/file/below", "link/below", "../manifest.json", "..", "dir/../hard", "/dir", "", ".", "./dir", "dir//deep", "dir/", "a\x00b", "di",
	} {
		top := b.TempDir()
		dir := filepath.Join(top, "dir")
		assert.NilError(b, os.Mkdir(dir, 0o700))
		_, err := b.engine.Restore(b.Context(), backup.Backup{ID: id}, dir, []string{"hard", path}, nil)
		assert.Assert(b, err != nil, "path %q was restored", path)
		assert.DeepEqual(b, names(b, top), []string{"dir"})
	}
}

func testRestoreCancelled(b *bench) {
	b.init()
	s := b.source("vol")
	random(b, filepath.Join(data(s), "file"), 16<<20)
	id := b.backup(s).ID
	ctx, cancel := context.WithCancel(b.Context())
	cancel()
	_, err := b.engine.Restore(ctx, backup.Backup{ID: id}, b.TempDir(), nil, nil)
	assert.ErrorIs(b, err, context.Canceled)
	ctx, cancel = context.WithCancel(b.Context())
	defer cancel()
	_, err = b.engine.Restore(ctx, backup.Backup{ID: id}, b.TempDir(), nil, func(backup.Progress) { cancel() })
	if ctx.Err() != nil && err != nil {
		assert.ErrorIs(b, err, context.Canceled)
	}
	b.same(s, b.restore(id))
}

// testHostile restores what tries to leave. An engine may refuse it or keep it inside.
func testHostile(b *bench) {
	if b.repository.Plant == nil {
		return
	}
	b.init()
	away, untouched := outside(b)
	dir, file := uint32(unix.S_IFDIR), uint32(unix.S_IFREG)
	link := uint32(unix.S_IFLNK)
	up := strings.Repeat("../", 30)
	for name, entries := range map[string][]Entry{
		"up":                     {{"data", dir, ""}, {"data/" + up + away[1:] + "/new", file, "x"}},
		"up at the top":          {{"../new", file, "x"}},
		"absolute":               {{away + "/new", file, "x"}},
		"through a link":         {{"data", dir, ""}, {"data/l", link, away}, {"data/l/new", file, "x"}},
		"through a relative one": {{"data", dir, ""}, {"data/l", link, up + away[1:]}, {"data/l/new", file, "x"}},
		"a directory on a link":  {{"data", dir, ""}, {"data/l", link, away}, {"data/l", dir, ""}, {"data/l/new", file, "x"}},
		"a file on a link":       {{"data", dir, ""}, {"data/l", link, away + "/file"}, {"data/l", file, "changed"}},
		"a link as the data":     {{"data", link, away}, {"data/new", file, "x"}},
		"a link as the manifest": {{"manifest.json", link, away + "/new"}, {"data", dir, ""}},
		"hard link to outside":   {{"data", dir, ""}, {"data/h", HardLink, up + away[1:] + "/file"}, {"data/h", file, "changed"}},
		"hard link, absolute":    {{"data", dir, ""}, {"data/h", HardLink, away + "/file"}, {"data/h", file, "changed"}},
		"hard link by a link":    {{"data", dir, ""}, {"data/l", link, away}, {"data/h", HardLink, "data/l/file"}, {"data/h", file, "changed"}},
		"beside the two entries": {{"data", dir, ""}, {"other", file, "x"}},
		"odd names":              {{"data", dir, ""}, {"data/a//b/./c", file, "x"}, {"data/..", dir, ""}, {"data/.", file, "x"}, {"data/x/../../y", file, "x"}},
		"file, then below it":    {{"data", dir, ""}, {"data/f", file, "x"}, {"data/f/g", file, "x"}},
		"directory, then a file": {{"data", dir, ""}, {"data/d", dir, ""}, {"data/d/e", file, "x"}, {"data/d", file, "x"}},
		"a long name":            {{"data", dir, ""}, {"data/" + strings.Repeat("n", 300), file, "x"}},
		"a long path":            {{"data", dir, ""}, {"data/" + strings.Repeat("dd/", 2000) + "f", file, "x"}},
	} {
		b.Run(name, func(t *testing.T) {
			top := t.TempDir()
			to := filepath.Join(top, "dir")
			assert.NilError(t, os.Mkdir(to, 0o700))
			id := b.repository.Plant(t, entries)
			_, err := b.engine.Restore(t.Context(), backup.Backup{ID: id}, to, nil, nil)
			t.Logf("restore: %.300v", err)
			assert.DeepEqual(t, names(t, top), []string{"dir"})
			for _, name := range names(t, to) {
				info, err := os.Lstat(filepath.Join(to, name))
				assert.NilError(t, err)
				switch name {
				case backup.DataName:
					assert.Assert(t, info.IsDir(), "data is %v", info.Mode())
				case backup.ManifestName:
					assert.Assert(t, info.Mode().IsRegular(), "the manifest is %v", info.Mode())
				default:
					t.Errorf("%s was restored", name)
				}
			}
			untouched()
		})
	}
}
