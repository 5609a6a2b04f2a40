package enginetest

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func testProbe(b *bench) {
	t := b.t
	assert.Assert(t, b.engine.Name() != "")
	assert.Assert(t, b.can.FileSystem != "")
	switch b.can.Consistency {
	case engine.None, engine.Crash, engine.Frozen:
	default:
		t.Fatalf("consistency %q", b.can.Consistency)
	}
}

func testCreate(b *bench) {
	t := b.t
	assert.Assert(t, !b.found("web"))
	v := b.create("web")
	assert.Assert(t, b.found("web"))
	st := b.stat(v)
	assert.Equal(t, st.Mode&0o7777, uint32(0o755))
	assert.Equal(t, st.Uid, uint32(0))
	entries, err := b.engine.Open(b.place, v)
	assert.NilError(t, err)
	defer entries.Close()
	names, err := entries.Names()
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0, "dockerd would not copy an image's content over %v", names)
	b.clean()
}

func testAttributes(b *bench) {
	uid, gid, mode := uint32(1000), uint32(2000), uint32(0o3770)
	v := b.volume("web")
	created, err := b.engine.Create(b.t.Context(), b.place, v, engine.Attributes{UID: &uid, GID: &gid, Mode: &mode})
	assert.NilError(b.t, err)
	assert.Assert(b.t, created)
	b.attach(v)
	st := b.stat(v)
	assert.Equal(b.t, st.Uid, uid)
	assert.Equal(b.t, st.Gid, gid)
	assert.Equal(b.t, st.Mode&0o7777, mode)

	v = b.volume("group")
	created, err = b.engine.Create(b.t.Context(), b.place, v, engine.Attributes{GID: &gid})
	assert.NilError(b.t, err)
	assert.Assert(b.t, created)
	b.attach(v)
	st = b.stat(v)
	assert.Equal(b.t, st.Uid, uint32(0))
	assert.Equal(b.t, st.Gid, gid)
	assert.Equal(b.t, st.Mode&0o7777, uint32(0o755))
}

func testAdopt(b *bench) {
	t := b.t
	mode := uint32(0o711)
	v := b.volume("web")
	_, err := b.engine.Create(t.Context(), b.place, v, engine.Attributes{Mode: &mode})
	assert.NilError(t, err)
	b.attach(v)
	b.write(v, "f", "x")
	b.detach(v)
	created, err := b.engine.Create(t.Context(), b.place, v, engine.Attributes{})
	assert.NilError(t, err)
	assert.Assert(t, !created)
	b.attach(v)
	st := b.stat(v)
	assert.Equal(t, st.Mode&0o7777, mode)
	assert.Equal(t, b.read(v, "f"), "x")
	b.detach(v)

	mode = 0o750
	created, err = b.engine.Create(t.Context(), b.place, v, engine.Attributes{Mode: &mode})
	assert.NilError(t, err)
	assert.Assert(t, !created)
	b.attach(v)
	st = b.stat(v)
	assert.Equal(t, st.Mode&0o7777, mode)
	assert.Equal(t, b.read(v, "f"), "x")
}

func testAbandon(b *bench) {
	t := b.t
	v := b.volume("web")
	assert.NilError(t, b.engine.Abandon(b.place, v))
	_, err := b.engine.Create(t.Context(), b.place, v, engine.Attributes{})
	assert.NilError(t, err)
	assert.NilError(t, b.engine.Abandon(b.place, v))
	assert.Assert(t, !b.found("web"))
	v = b.create("web")
	b.write(v, "f", "x")
	b.detach(v)
	assert.NilError(t, b.engine.Abandon(b.place, v))
	b.attach(v)
	assert.Equal(t, b.read(v, "f"), "x")
	b.clean()
}

func testOpenMissing(b *bench) {
	_, err := b.engine.Open(b.place, b.volume("web"))
	assert.Assert(b.t, errors.Is(err, fs.ErrNotExist), "%v", err)
	assert.Assert(b.t, !b.found("web"))
}

func testAttach(b *bench) {
	t := b.t
	v := b.create("web")
	b.attach(v)
	b.write(v, "f", "x")
	b.detach(v)
	b.detach(v)
	b.attach(v)
	assert.Equal(t, b.read(v, "f"), "x")
}

// A new process finds Local empty, while containers have the data mounted.
func testLocalLost(b *bench) {
	t := b.t
	v := b.create("web")
	container, err := b.engine.Open(b.place, v)
	assert.NilError(t, err)
	defer func() {
		_ = container.Close()
	}()
	detachBelow(t, b.place.Local)
	b.place.Local = t.TempDir()
	b.attach(v)
	assert.NilError(t, os.WriteFile(filepath.Join(container.ProcPath(), "f"), []byte("of the old mount"), 0o600))
	assert.Equal(t, b.read(v, "f"), "of the old mount")
	assert.NilError(t, container.Close())
	b.detach(v)
	b.attach(v)
	assert.Equal(t, b.read(v, "f"), "of the old mount")
}

func testRetire(b *bench) {
	t := b.t
	v := b.create("web")
	b.write(v, "f", "x")
	container, err := b.engine.Open(b.place, v)
	assert.NilError(t, err)
	defer container.Close()
	assert.NilError(t, b.engine.Retire(t.Context(), b.place, v))
	assert.Assert(t, !b.found("web"))
	assert.NilError(t, os.WriteFile(filepath.Join(container.ProcPath(), "g"), []byte("late"), 0o600))
	assert.NilError(t, container.Close())
	assert.NilError(t, b.engine.Retire(t.Context(), b.place, v), "missing data is an error")
	assert.NilError(t, b.engine.Detach(t.Context(), b.place, v))
	other := b.create("web") // the name is free
	b.write(other, "f", "other")

	v.Name = "back"
	assert.NilError(t, b.engine.Reinstate(t.Context(), b.place, v))
	b.attach(v)
	assert.Equal(t, b.read(v, "f"), "x")
	assert.Equal(t, b.read(v, "g"), "late")
	b.detach(v)
	assert.NilError(t, b.engine.Retire(t.Context(), b.place, v))

	assert.NilError(t, b.engine.Destroy(t.Context(), b.place, v))
	assert.NilError(t, b.engine.Destroy(t.Context(), b.place, v))
	names, err := b.place.Trash.Names()
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0, "%v", names)
	assert.Equal(t, b.read(other, "f"), "other")
	b.clean()
}

func testRetireTaken(b *bench) {
	t := b.t
	v := b.create("web")
	b.detach(v)
	assert.NilError(t, b.engine.Retire(t.Context(), b.place, v)) // empty data
	_, err := b.engine.Create(t.Context(), b.place, v, engine.Attributes{})
	assert.NilError(t, err)
	b.attach(v)
	b.write(v, "f", "x")
	b.detach(v)
	err = b.engine.Retire(t.Context(), b.place, v)
	assert.Assert(t, errors.Is(err, fs.ErrExist), "%v", err)
	b.attach(v)
	assert.Equal(t, b.read(v, "f"), "x")
}

func testReinstate(b *bench) {
	t := b.t
	v := b.create("web")
	b.write(v, "f", "x")
	b.detach(v)
	assert.NilError(t, b.engine.Retire(t.Context(), b.place, v))
	other := b.create("web") // empty, so that rename(2) would replace it
	b.detach(other)
	err := b.engine.Reinstate(t.Context(), b.place, v)
	assert.Assert(t, errors.Is(err, fs.ErrExist), "%v", err)
	assert.NilError(t, b.engine.Abandon(b.place, other))
	assert.NilError(t, b.engine.Reinstate(t.Context(), b.place, v))
	assert.NilError(t, b.engine.Reinstate(t.Context(), b.place, v), "data that is back is an error")
	b.attach(v)
	assert.Equal(t, b.read(v, "f"), "x")

	err = b.engine.Reinstate(t.Context(), b.place, b.volume("none"))
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
}

func testRename(b *bench) {
	t := b.t
	v, other := b.create("web"), b.create("db")
	b.write(v, "f", "x")
	b.snapshot(v, "s")
	b.detach(v)
	b.detach(other)
	err := b.engine.Rename(t.Context(), b.place, v, "db")
	assert.Assert(t, errors.Is(err, fs.ErrExist), "%v", err)
	assert.NilError(t, b.engine.Rename(t.Context(), b.place, v, "new"))
	assert.Assert(t, !b.found("web"))
	v.Name = "new"
	b.attach(v)
	assert.Equal(t, b.read(v, "f"), "x")
	assert.Equal(t, b.readSnapshot(v, "s", "f"), "x")
	b.attach(other)
	b.within(other, func(path string) {
		entries, err := os.ReadDir(path)
		assert.NilError(t, err)
		assert.Equal(t, len(entries), 0)
	})
	err = b.engine.Rename(t.Context(), b.place, b.volume("none"), "nothing")
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
}

func testForeign(b *bench) {
	t := b.t
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	assert.NilError(t, os.WriteFile(secret, []byte("x"), 0o600))
	mode, uid := uint32(0o777), uint32(99)
	kinds := map[string]func(path string) error{
		"link":     func(path string) error { return os.Symlink(outside, path) },
		"linkfile": func(path string) error { return os.Symlink(secret, path) },
		"dangling": func(path string) error { return os.Symlink(filepath.Join(outside, "new"), path) },
		"fifo":     func(path string) error { return unix.Mkfifo(path, 0o600) },
		"mount": func(path string) error {
			if err := os.Mkdir(path, 0o755); err != nil {
				return err
			}
			mounttest.Bind(t, outside, path)
			return nil
		},
	}
	if b.files {
		kinds["directory"] = func(path string) error { return os.Mkdir(path, 0o755) }
	} else {
		kinds["file"] = func(path string) error { return os.WriteFile(path, nil, 0o600) }
	}
	for kind, make := range kinds {
		v := b.volume(kind)
		path := b.data(b.place, kind)
		assert.NilError(t, make(path), kind)
		_, err := b.engine.Find(b.place, kind)
		assert.Assert(t, refused(err), "find %s: %v", kind, err)
		_, err = b.engine.Create(t.Context(), b.place, v, engine.Attributes{Mode: &mode, UID: &uid})
		assert.Assert(t, refused(err), "create %s: %v", kind, err)
		_, err = b.engine.Create(t.Context(), b.place, v, engine.Attributes{})
		assert.Assert(t, refused(err), "create %s: %v", kind, err)
		_, err = b.engine.Open(b.place, v)
		assert.Assert(t, err != nil, "open %s", kind)
		if !b.files {
			assert.Assert(t, refused(err), "open %s: %v", kind, err)
			_, err = b.engine.Snapshot(t.Context(), b.place, v, "s", nil)
			assert.Assert(t, refused(err), "snapshot %s: %v", kind, err)
			_, err = b.engine.Clone(t.Context(), b.place, v, "", b.volume("clone"), nil)
			assert.Assert(t, refused(err), "clone %s: %v", kind, err)
			_, err = b.engine.Usage(t.Context(), b.place, v)
			assert.Assert(t, refused(err), "usage %s: %v", kind, err)
		}
		assert.Assert(t, refused(b.engine.Retire(t.Context(), b.place, v)), "retire %s", kind)
		assert.Assert(t, refused(b.engine.Rename(t.Context(), b.place, v, "renamed")), "rename %s", kind)
		assert.NilError(t, b.engine.Abandon(b.place, v))
		_, err = os.Lstat(path)
		assert.NilError(t, err, "%s was removed", kind)
	}
	for _, path := range []string{secret, outside} {
		info, err := os.Stat(path)
		assert.NilError(t, err)
		assert.Assert(t, info.Mode().Perm() != 0o777)
	}
	_, err := os.Lstat(filepath.Join(outside, "new"))
	assert.Assert(t, os.IsNotExist(err))
	b.clean()
}

func refused(err error) bool {
	return errors.Is(err, rooted.ErrSymlink) || errors.Is(err, rooted.ErrNotDir) || errors.Is(err, rooted.ErrMountPoint) || errors.Is(err, rooted.ErrNotFile)
}

func testDestroy(b *bench) {
	t := b.t
	outside := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(outside, "keep"), []byte("x"), 0o600))
	v := b.create("web")
	b.within(v, func(path string) {
		in := func(name string) string { return filepath.Join(path, name) }
		assert.NilError(t, os.MkdirAll(in("a/b/c"), 0o700))
		assert.NilError(t, os.Symlink(outside, in("a/link")))
		assert.NilError(t, os.Symlink("/", in("a/b/top")))
		assert.NilError(t, unix.Mkfifo(in("a/fifo"), 0o600))
		assert.NilError(t, unix.Mknod(in("a/null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		assert.NilError(t, os.Chmod(in("a/b"), 0))
	})
	hard := filepath.Join(b.place.Root.Path(), "hard")
	assert.NilError(t, os.WriteFile(hard, []byte("x"), 0o600))
	b.within(v, func(path string) {
		// Of another volume, where the data is on the same file system.
		if err := os.Link(hard, filepath.Join(path, "a/hard")); !errors.Is(err, unix.EXDEV) {
			assert.NilError(t, err)
		}
	})
	b.detach(v)
	assert.NilError(t, b.engine.Retire(t.Context(), b.place, v))

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	assert.ErrorIs(t, b.engine.Destroy(ended, b.place, v), context.Canceled)
	assert.NilError(t, b.engine.Destroy(t.Context(), b.place, v))
	names, err := b.place.Trash.Names()
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0, "%v", names)
	for _, path := range []string{hard, filepath.Join(outside, "keep")} {
		content, err := os.ReadFile(path)
		assert.NilError(t, err)
		assert.Equal(t, string(content), "x")
	}
	b.clean()
}

func testDestroySnapshots(b *bench) {
	t := b.t
	v, other := b.create("web"), b.create("other")
	b.write(v, "f", "x")
	b.write(other, "f", "other")
	b.snapshot(v, "one")
	b.snapshot(v, "two")
	b.snapshot(other, "one")
	assert.NilError(t, b.place.Snapshots.EnsureDir(v.UUID, 0o700))
	dir, err := b.place.Snapshots.Dir(v.UUID)
	assert.NilError(t, err)
	defer dir.Close()
	assert.NilError(t, dir.WriteNew("one.json", []byte("{}"), 0o600))
	b.detach(v)
	assert.NilError(t, b.engine.Retire(t.Context(), b.place, v))
	assert.NilError(t, b.engine.Destroy(t.Context(), b.place, v))
	names, err := dir.Names()
	assert.NilError(t, err)
	assert.DeepEqual(t, names, []string{"one.json"})
	assert.NilError(t, dir.Remove("one.json"))
	assert.NilError(t, b.engine.Destroy(t.Context(), b.place, v))
	assert.Equal(t, b.readSnapshot(other, "one", "f"), "other")
	b.clean()
}
