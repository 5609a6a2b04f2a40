package tarball_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/tarball"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

func open(t testing.TB, path string) *rooted.Dir {
	t.Helper()
	dir, err := rooted.Open(path)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = dir.Close() })
	return dir
}

// nasty makes a tree without the hole of 1 TiB, whose zeros take minutes.
func nasty(t testing.TB) string {
	t.Helper()
	top := t.TempDir()
	nastytree.Make(t, top)
	files := filepath.Join(top, "files")
	var st unix.Stat_t
	assert.NilError(t, unix.Stat(files, &st))
	assert.NilError(t, os.Remove(filepath.Join(files, "huge")))
	assert.NilError(t, unix.UtimesNano(files, []unix.Timespec{st.Atim, st.Mtim}))
	return top
}

func manifest(t testing.TB) []byte {
	t.Helper()
	text, err := backup.Manifest{Volume: "vol", Time: time.Unix(1, 0)}.Encode()
	assert.NilError(t, err)
	return text
}

func write(t testing.TB, path, content string) {
	t.Helper()
	assert.NilError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	assert.NilError(t, os.WriteFile(path, []byte(content), 0o644))
}

// archive writes the archive of a tree to a file, compressed.
func archive(t testing.TB, top string) (path string, written tarball.Written) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "x.tar.zst")
	file, err := os.Create(path)
	assert.NilError(t, err)
	w, err := tarball.Compress(file)
	assert.NilError(t, err)
	written, err = tarball.Write(t.Context(), w, manifest(t), open(t, top), nil)
	assert.NilError(t, err)
	assert.NilError(t, w.Close())
	assert.NilError(t, file.Close())
	return path, written
}

func extract(t testing.TB, path string, o tarball.Options) (string, tarball.Extracted, error) {
	t.Helper()
	file, err := os.Open(path)
	assert.NilError(t, err)
	defer file.Close()
	r, err := tarball.Decompress(file)
	assert.NilError(t, err)
	defer r.Close()
	to := t.TempDir()
	got, err := tarball.Extract(t.Context(), r, open(t, to), o)
	return to, got, err
}

func run(t testing.TB, argv ...string) {
	t.Helper()
	out, err := exec.CommandContext(context.Background(), argv[0], argv[1:]...).CombinedOutput()
	assert.NilError(t, err, "%q: %s", argv, out)
}

// nameless lets tar find no names for the users in ACLs, which it would write.
func nameless(t *testing.T) {
	for _, names := range []string{"/etc/passwd", "/etc/group"} {
		mounttest.Bind(t, "/dev/null", names)
	}
}

func TestNastyTreeGoesThroughItAndThroughTar(t *testing.T) {
	top := nasty(t)
	path, written := archive(t, top)
	assert.Equal(t, written.MissingCount, uint64(0), "%q", written.Missing)
	to, got, err := extract(t, path, tarball.Options{})
	assert.NilError(t, err)
	assert.Equal(t, string(got.Manifest), string(manifest(t)))
	assert.Equal(t, got.Files, written.Files)
	assert.Equal(t, got.Dirs, written.Dirs)
	assert.Equal(t, got.Bytes, written.Bytes)
	assert.Equal(t, got.Lost, uint64(0))
	nastytree.CompareLoosely(t, top, to)
	// Links of what is no regular file are kept as well.
	same := func(a, b string) bool {
		one, err := os.Lstat(filepath.Join(to, a))
		assert.NilError(t, err)
		two, err := os.Lstat(filepath.Join(to, b))
		assert.NilError(t, err)
		return os.SameFile(one, two)
	}
	assert.Assert(t, same("links/absolute", "links/b/absolute too"))
	assert.Assert(t, same("specials/fifo", "fifo too"))

	nameless(t)
	// GNU tar reads it, and Extract what GNU tar makes of it.
	byTar := t.TempDir()
	run(t, "tar", "-C", byTar, "--zstd", "--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--same-owner", "-p", "-xf", path)
	nastytree.CompareLoosely(t, top, filepath.Join(byTar, "data"))
	again := filepath.Join(t.TempDir(), "again")
	run(t, "tar", "-C", byTar, "--format=posix", "--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--sparse", "--gzip", "-cf", again, "manifest.json", "data")
	to, _, err = extract(t, again, tarball.Options{})
	assert.NilError(t, err)
	nastytree.CompareLoosely(t, top, to)
}

func TestForeignArchives(t *testing.T) {
	top := t.TempDir()
	write(t, filepath.Join(top, "dbdata/dir/file"), "content")
	assert.NilError(t, os.Link(filepath.Join(top, "dbdata/dir/file"), filepath.Join(top, "dbdata/hard")))
	assert.NilError(t, os.Symlink("/etc", filepath.Join(top, "dbdata/link")))
	assert.NilError(t, os.Chmod(filepath.Join(top, "dbdata"), 0o751))
	assert.NilError(t, os.Chown(filepath.Join(top, "dbdata"), 33, 44))
	nameless(t)
	run(t, "setfacl", "-m", "u:1000:rw,d:u:7:r", filepath.Join(top, "dbdata/dir"))
	for _, name := range []string{"dbdata/dir/file", "dbdata/dir", "dbdata"} {
		assert.NilError(t, os.Chtimes(filepath.Join(top, name), time.Unix(1000, 0), time.Unix(1000, 0)))
	}
	for name, test := range map[string]struct {
		argv  []string
		strip int
	}{
		"as convoy":         {[]string{"-C", filepath.Join(top, "dbdata"), "-czf", "FILE", "."}, 0},
		"the old recipe":    {[]string{"-C", top, "-cf", "FILE", "dbdata"}, 1},
		"with a slash":      {[]string{"-C", top, "--transform", "s,^,/,", "-P", "-cf", "FILE", "dbdata"}, 1},
		"old GNU format":    {[]string{"-C", top, "--format=gnu", "-cf", "FILE", "./dbdata"}, 1},
		"ustar":             {[]string{"-C", top, "--format=ustar", "-czf", "FILE", "dbdata/"}, 1},
		"only what is here": {[]string{"-C", filepath.Join(top, "dbdata"), "--acls", "-cf", "FILE", "dir", "hard", "link"}, 0},
	} {
		path := filepath.Join(t.TempDir(), "x")
		argv := append([]string{"tar"}, test.argv...)
		for i := range argv {
			if argv[i] == "FILE" {
				argv[i] = path
			}
		}
		run(t, argv...)
		to, got, err := extract(t, path, tarball.Options{Strip: test.strip})
		assert.NilError(t, err, name)
		assert.Assert(t, got.Manifest == nil)
		assert.Equal(t, got.Files, uint64(2), name)
		lines, want := nastytree.List(t, to), nastytree.List(t, filepath.Join(top, "dbdata"))
		assert.Equal(t, lines["dir/file"], want["dir/file"], name)
		if name == "only what is here" {
			assert.Equal(t, lines["dir"], want["dir"], "the ACL is lost")
			continue
		}
		assert.Equal(t, lines["."], want["."], name)
	}
}

// A first file that is called as a manifest is, and is none, is a file.
func TestDetectionLosesNothing(t *testing.T) {
	for _, content := range []string{"", "[]", `{"schema":1}x`, strings.Repeat("x", 2<<20)} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		assert.NilError(t, w.WriteHeader(&tar.Header{Name: "manifest.json", Typeflag: tar.TypeReg, Size: int64(len(content)), Mode: 0o600}))
		_, err := io.WriteString(w, content)
		assert.NilError(t, err)
		assert.NilError(t, w.Close())
		to := t.TempDir()
		got, err := tarball.Extract(t.Context(), &b, open(t, to), tarball.Options{})
		assert.NilError(t, err)
		assert.Assert(t, got.Manifest == nil)
		text, err := os.ReadFile(filepath.Join(to, "manifest.json"))
		assert.NilError(t, err)
		assert.Assert(t, string(text) == content)
	}
}

func TestCutAndDamagedArchivesAreSeen(t *testing.T) {
	top := t.TempDir()
	for i := range 20 {
		write(t, filepath.Join(top, fmt.Sprint(i)), strings.Repeat(fmt.Sprint(i), 1000))
	}
	path, _ := archive(t, top)
	whole, err := os.ReadFile(path)
	assert.NilError(t, err)
	try := func(data []byte) error {
		r, err := tarball.Decompress(bytes.NewReader(data))
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = tarball.Extract(t.Context(), r, open(t, t.TempDir()), tarball.Options{})
		return err
	}
	assert.NilError(t, try(whole))
	for _, cut := range []int{1, 4, 100, len(whole) / 2} {
		assert.Assert(t, try(whole[:len(whole)-cut]) != nil, "%d bytes less", cut)
	}
	damaged := bytes.Clone(whole)
	damaged[len(whole)/2] ^= 0x10
	assert.Assert(t, try(damaged) != nil)

	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err = tarball.Write(t.Context(), z, nil, open(t, top), nil)
	assert.NilError(t, err)
	assert.NilError(t, z.Close())
	assert.NilError(t, try(b.Bytes()))
	assert.Assert(t, try(b.Bytes()[:b.Len()-4]) != nil, "the sum of gzip is not looked at")
	for name, begin := range map[string]string{"xz": "\xfd7zXZ\x00", "bzip2": "BZh91AY", "zip": "PK\x03\x04xxx"} {
		assert.ErrorContains(t, try([]byte(begin)), name)
	}
}

func TestPathsWithTheirContentElsewhere(t *testing.T) {
	top := t.TempDir()
	write(t, filepath.Join(top, "a/first"), "content")
	for _, name := range []string{"b", "c"} {
		assert.NilError(t, os.Mkdir(filepath.Join(top, name), 0o755))
		assert.NilError(t, os.Link(filepath.Join(top, "a/first"), filepath.Join(top, name, "other")))
	}
	path, _ := archive(t, top)
	again := func() (io.ReadCloser, error) {
		file, err := os.Open(path)
		assert.NilError(t, err)
		t.Cleanup(func() { _ = file.Close() })
		return tarball.Decompress(file)
	}
	to, got, err := extract(t, path, tarball.Options{Paths: []string{"b", "c/other"}, Again: again})
	assert.NilError(t, err)
	assert.Equal(t, got.Files, uint64(2))
	one, err := os.Stat(filepath.Join(to, "b/other"))
	assert.NilError(t, err)
	two, err := os.Stat(filepath.Join(to, "c/other"))
	assert.NilError(t, err)
	assert.Assert(t, os.SameFile(one, two))
	_, err = os.Lstat(filepath.Join(to, "a"))
	assert.ErrorIs(t, err, fs.ErrNotExist)
	_, _, err = extract(t, path, tarball.Options{Paths: []string{"b", "nowhere"}, Again: again})
	assert.ErrorIs(t, err, fs.ErrNotExist)
	assert.ErrorContains(t, err, `"nowhere"`)
}

// What a directory hands down to new files is no part of what is extracted.
func TestNothingIsInherited(t *testing.T) {
	top := t.TempDir()
	write(t, filepath.Join(top, "d/file"), "x")
	run(t, "setfacl", "-d", "-m", "u:1000:rwx", filepath.Join(top, "d"))
	path, _ := archive(t, top)
	file, err := os.Open(path)
	assert.NilError(t, err)
	defer file.Close()
	r, err := tarball.Decompress(file)
	assert.NilError(t, err)
	defer r.Close()
	to := t.TempDir()
	run(t, "setfacl", "-m", "u:1:r,d:u:2000:rwx", to)
	_, err = tarball.Extract(t.Context(), r, open(t, to), tarball.Options{})
	assert.NilError(t, err)
	nastytree.CompareLoosely(t, top, to)
}

func TestDeepTrees(t *testing.T) {
	top := t.TempDir()
	nastytree.MakeDeep(t, top, 400)
	path, written := archive(t, top)
	assert.Equal(t, written.MissingCount, uint64(0))
	_, got, err := extract(t, path, tarball.Options{})
	assert.NilError(t, err)
	assert.Equal(t, got.Dirs, uint64(401))
	assert.Equal(t, got.Files, uint64(1))
}
