// Package enginetest holds the conformance suite of volume engines: what the
// contract in package engine says, as tests that every engine passes.
package enginetest

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
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// bench is one root with a trash for one test.
type bench struct {
	t      *testing.T
	engine engine.Engine
	path   string
	root   *rooted.Dir
	trash  *rooted.Dir
}

// Run runs the suite. newRoot makes an empty directory on a file system that the
// engine works on; the process needs a mount namespace of its own.
func Run(t *testing.T, e engine.Engine, newRoot func(testing.TB) string) {
	for name, test := range map[string]func(*bench){
		"data is made once, empty and open to all":  testCreate,
		"attributes are applied":                    testAttributes,
		"existing data is taken over":               testAdopt,
		"abandon removes only what is empty":        testAbandon,
		"open never makes data":                     testOpenMissing,
		"retired data is whole and can be repeated": testRetire,
		"retire replaces nothing in the trash":      testRetireTaken,
		"links, files and mounts are no data":       testForeign,
		"destroy follows nothing out of the data":   testDestroy,
	} {
		t.Run(name, func(t *testing.T) {
			b := &bench{t: t, engine: e, path: newRoot(t)}
			var err error
			b.root, err = rooted.Open(b.path)
			assert.NilError(t, err)
			t.Cleanup(func() { _ = b.root.Close() })
			assert.NilError(t, b.root.Mkdir(".trash", 0o700))
			b.trash, err = b.root.Dir(".trash")
			assert.NilError(t, err)
			t.Cleanup(func() { _ = b.trash.Close() })
			test(b)
		})
	}
}

// create makes data for a name that must be free.
func (b *bench) create(name string) {
	b.t.Helper()
	created, err := b.engine.Create(b.root, name, engine.Attributes{})
	assert.NilError(b.t, err)
	assert.Assert(b.t, created)
}

// write puts a file into a volume the way a container does.
func (b *bench) write(name, file, content string) {
	b.t.Helper()
	data, err := b.engine.Open(b.root, name)
	assert.NilError(b.t, err)
	defer data.Close()
	assert.NilError(b.t, os.WriteFile(filepath.Join(data.ProcPath(), file), []byte(content), 0o600))
}

func (b *bench) read(dir *rooted.Dir, name, file string) string {
	b.t.Helper()
	data, err := b.engine.Open(dir, name)
	assert.NilError(b.t, err)
	defer data.Close()
	content, err := os.ReadFile(filepath.Join(data.ProcPath(), file))
	assert.NilError(b.t, err)
	return string(content)
}

func (b *bench) found(name string) bool {
	b.t.Helper()
	found, err := b.engine.Find(b.root, name)
	assert.NilError(b.t, err)
	return found
}

func (b *bench) stat(name string) unix.Stat_t {
	b.t.Helper()
	data, err := b.engine.Open(b.root, name)
	assert.NilError(b.t, err)
	defer data.Close()
	var st unix.Stat_t
	assert.NilError(b.t, unix.Fstat(data.FD(), &st))
	return st
}

func testCreate(b *bench) {
	t := b.t
	assert.Assert(t, b.engine.Name() != "")
	assert.Assert(t, !b.found("web"))
	b.create("web")
	assert.Assert(t, b.found("web"))
	st := b.stat("web")
	assert.Equal(t, st.Mode&0o7777, uint32(0o755))
	assert.Equal(t, st.Uid, uint32(0))
	entries, err := b.engine.Open(b.root, "web")
	assert.NilError(t, err)
	defer entries.Close()
	names, err := entries.Names()
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0, "dockerd would not copy an image's content over %v", names)
}

func testAttributes(b *bench) {
	uid, gid, mode := uint32(1000), uint32(2000), uint32(0o3770)
	created, err := b.engine.Create(b.root, "web", engine.Attributes{UID: &uid, GID: &gid, Mode: &mode})
	assert.NilError(b.t, err)
	assert.Assert(b.t, created)
	st := b.stat("web")
	assert.Equal(b.t, st.Uid, uid)
	assert.Equal(b.t, st.Gid, gid)
	assert.Equal(b.t, st.Mode&0o7777, mode)

	created, err = b.engine.Create(b.root, "group", engine.Attributes{GID: &gid})
	assert.NilError(b.t, err)
	assert.Assert(b.t, created)
	st = b.stat("group")
	assert.Equal(b.t, st.Uid, uint32(0))
	assert.Equal(b.t, st.Gid, gid)
	assert.Equal(b.t, st.Mode&0o7777, uint32(0o755))
}

func testAdopt(b *bench) {
	t := b.t
	mode := uint32(0o711)
	_, err := b.engine.Create(b.root, "web", engine.Attributes{Mode: &mode})
	assert.NilError(t, err)
	b.write("web", "f", "x")
	created, err := b.engine.Create(b.root, "web", engine.Attributes{})
	assert.NilError(t, err)
	assert.Assert(t, !created)
	st := b.stat("web")
	assert.Equal(t, st.Mode&0o7777, mode)
	assert.Equal(t, b.read(b.root, "web", "f"), "x")

	mode = 0o750
	created, err = b.engine.Create(b.root, "web", engine.Attributes{Mode: &mode})
	assert.NilError(t, err)
	assert.Assert(t, !created)
	st = b.stat("web")
	assert.Equal(t, st.Mode&0o7777, mode)
	assert.Equal(t, b.read(b.root, "web", "f"), "x")
}

func testAbandon(b *bench) {
	t := b.t
	assert.NilError(t, b.engine.Abandon(b.root, "web"))
	b.create("web")
	assert.NilError(t, b.engine.Abandon(b.root, "web"))
	assert.Assert(t, !b.found("web"))
	b.create("web")
	b.write("web", "f", "x")
	assert.NilError(t, b.engine.Abandon(b.root, "web"))
	assert.Equal(t, b.read(b.root, "web", "f"), "x")
}

func testOpenMissing(b *bench) {
	_, err := b.engine.Open(b.root, "web")
	assert.Assert(b.t, errors.Is(err, fs.ErrNotExist), "%v", err)
	assert.Assert(b.t, !b.found("web"))
}

func testRetire(b *bench) {
	t := b.t
	b.create("web")
	b.write("web", "f", "x")
	container, err := b.engine.Open(b.root, "web")
	assert.NilError(t, err)
	defer container.Close()
	assert.NilError(t, b.engine.Retire(b.root, "web", b.trash, "one"))
	assert.Assert(t, !b.found("web"))
	assert.Equal(t, b.read(b.trash, "one", "f"), "x")
	assert.NilError(t, os.WriteFile(filepath.Join(container.ProcPath(), "g"), []byte("late"), 0o600))
	assert.Equal(t, b.read(b.trash, "one", "g"), "late")
	assert.NilError(t, b.engine.Retire(b.root, "web", b.trash, "two"), "missing data is an error")
	b.create("web")

	assert.NilError(t, b.engine.Destroy(t.Context(), b.trash, "one"))
	assert.NilError(t, b.engine.Destroy(t.Context(), b.trash, "one"))
	_, err = b.engine.Open(b.trash, "one")
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
}

func testRetireTaken(b *bench) {
	t := b.t
	b.create("web")
	assert.NilError(t, b.engine.Retire(b.root, "web", b.trash, "one")) // empty data
	b.create("web")
	b.write("web", "f", "x")
	err := b.engine.Retire(b.root, "web", b.trash, "one")
	assert.Assert(t, errors.Is(err, fs.ErrExist), "%v", err)
	assert.Equal(t, b.read(b.root, "web", "f"), "x")
}

func testForeign(b *bench) {
	t := b.t
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	assert.NilError(t, os.WriteFile(secret, []byte("x"), 0o600))
	mode, uid := uint32(0o777), uint32(99)
	for kind, make := range map[string]func(path string) error{
		"link":     func(path string) error { return os.Symlink(outside, path) },
		"dangling": func(path string) error { return os.Symlink(filepath.Join(outside, "new"), path) },
		"file":     func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"fifo":     func(path string) error { return unix.Mkfifo(path, 0o600) },
		"mount": func(path string) error {
			if err := os.Mkdir(path, 0o755); err != nil {
				return err
			}
			mounttest.Bind(t, outside, path)
			return nil
		},
	} {
		assert.NilError(t, make(filepath.Join(b.path, kind)), kind)
		_, err := b.engine.Find(b.root, kind)
		assert.Assert(t, refused(err), "find %s: %v", kind, err)
		_, err = b.engine.Create(b.root, kind, engine.Attributes{Mode: &mode, UID: &uid})
		assert.Assert(t, refused(err), "create %s: %v", kind, err)
		_, err = b.engine.Create(b.root, kind, engine.Attributes{})
		assert.Assert(t, refused(err), "create %s: %v", kind, err)
		_, err = b.engine.Open(b.root, kind)
		assert.Assert(t, refused(err), "open %s: %v", kind, err)
		assert.Assert(t, refused(b.engine.Retire(b.root, kind, b.trash, kind)), "retire %s", kind)
		assert.NilError(t, b.engine.Abandon(b.root, kind))
		_, err = os.Lstat(filepath.Join(b.path, kind))
		assert.NilError(t, err, "%s was removed", kind)
	}
	for _, path := range []string{secret, outside} {
		info, err := os.Stat(path)
		assert.NilError(t, err)
		assert.Assert(t, info.Mode().Perm() != 0o777)
	}
	_, err := os.Lstat(filepath.Join(outside, "new"))
	assert.Assert(t, os.IsNotExist(err))
}

func refused(err error) bool {
	return errors.Is(err, rooted.ErrSymlink) || errors.Is(err, rooted.ErrNotDir) || errors.Is(err, rooted.ErrMountPoint)
}

func testDestroy(b *bench) {
	t := b.t
	outside := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(outside, "keep"), []byte("x"), 0o600))
	b.create("web")
	data, err := b.engine.Open(b.root, "web")
	assert.NilError(t, err)
	defer data.Close()
	in := func(path string) string { return filepath.Join(data.ProcPath(), path) }
	assert.NilError(t, os.MkdirAll(in("a/b/c"), 0o700))
	assert.NilError(t, os.Symlink(outside, in("a/link")))
	assert.NilError(t, os.Symlink("/", in("a/b/top")))
	hard := filepath.Join(b.path, "hard") // of another volume, on the same file system
	assert.NilError(t, os.WriteFile(hard, []byte("x"), 0o600))
	assert.NilError(t, os.Link(hard, in("a/hard")))
	assert.NilError(t, unix.Mkfifo(in("a/fifo"), 0o600))
	assert.NilError(t, unix.Mknod(in("a/null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	assert.NilError(t, os.Chmod(in("a/b"), 0))
	assert.NilError(t, b.engine.Retire(b.root, "web", b.trash, "one"))

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	assert.ErrorIs(t, b.engine.Destroy(ended, b.trash, "one"), context.Canceled)
	assert.NilError(t, b.engine.Destroy(t.Context(), b.trash, "one"))
	_, err = b.trash.Stat("one")
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
	for _, path := range []string{hard, filepath.Join(outside, "keep")} {
		content, err := os.ReadFile(path)
		assert.NilError(t, err)
		assert.Equal(t, string(content), "x")
	}
}
