package enginetest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
)

const mebi = 1 << 20

// flush puts what was written on disk, where file systems count it.
func flush(t testing.TB, path string) {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	assert.NilError(t, err)
	defer unix.Close(fd)
	assert.NilError(t, unix.Syncfs(fd))
}

func testUsage(b *bench) {
	t := b.t
	v := b.create("web")
	b.write(v, "f", strings.Repeat("x", 4*mebi))
	b.within(v, func(path string) { flush(t, path) })
	usage, err := b.engine.Usage(t.Context(), b.place, v)
	assert.NilError(t, err)
	assert.Assert(t, usage.Used >= 4*mebi && usage.Used < 64*mebi, "%+v", usage)
	assert.Assert(t, usage.Free > 0, "%+v", usage)
	assert.Equal(t, usage.Limit, v.Size)
	_, err = b.engine.Usage(t.Context(), b.place, b.volume("none"))
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
}

// writeUpTo writes a file until it has size bytes or the volume is full, and tells
// how many there are.
func writeUpTo(t testing.TB, path string, size int) (written int, full bool) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOSPC) {
		return 0, true
	}
	assert.NilError(t, err)
	defer file.Close()
	chunk := make([]byte, mebi)
	for i := range chunk {
		chunk[i] = byte(i * 7)
	}
	for written < size {
		n, err := file.Write(chunk)
		written += n
		if err == nil && written%(8*mebi) == 0 {
			err = file.Sync()
		}
		if errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOSPC) {
			return written, true
		}
		assert.NilError(t, err)
	}
	if err := file.Sync(); !errors.Is(err, unix.EDQUOT) && !errors.Is(err, unix.ENOSPC) {
		assert.NilError(t, err)
	}
	return written, false
}

func testLimit(b *bench) {
	t := b.t
	v := b.volume("web")
	v.Size = 64 * mebi
	if b.template.Size > 0 {
		v.Size = b.template.Size
	}
	created, err := b.engine.Create(t.Context(), b.place, v, engine.Attributes{})
	if !b.can.Limit {
		assert.ErrorIs(t, err, engine.ErrNoLimit)
		assert.Assert(t, !b.found("web"))
		v.Size = 0
		_, err = b.engine.Create(t.Context(), b.place, v, engine.Attributes{})
		assert.NilError(t, err)
		b.attach(v)
		assert.ErrorIs(t, b.engine.Resize(t.Context(), b.place, v, 64*mebi), engine.ErrNoLimit)
		return
	}
	assert.NilError(t, err)
	assert.Assert(t, created)
	b.attach(v)
	usage, err := b.engine.Usage(t.Context(), b.place, v)
	assert.NilError(t, err)
	assert.Equal(t, usage.Limit, v.Size)
	assert.Assert(t, usage.Free <= v.Size, "%+v", usage)
	var first int
	b.within(v, func(path string) {
		var full bool
		first, full = writeUpTo(t, filepath.Join(path, "f"), 2*int(v.Size))
		assert.Assert(t, full, "%d bytes were written, %d are allowed", first, v.Size)
		assert.Assert(t, uint64(first) <= v.Size && uint64(first) > v.Size/4, "%d bytes were written, %d are allowed", first, v.Size)
	})

	grown := v.Size + 64*mebi
	if b.fixed {
		assert.Assert(t, b.engine.Resize(t.Context(), b.place, v, grown) != nil)
		usage, err := b.engine.Usage(t.Context(), b.place, v)
		assert.NilError(t, err)
		assert.Equal(t, usage.Limit, v.Size)
		return
	}
	b.within(v, func(path string) { // somebody uses it
		assert.NilError(t, b.engine.Resize(t.Context(), b.place, v, grown))
		second, _ := writeUpTo(t, filepath.Join(path, "g"), 32*mebi)
		assert.Assert(t, second == 32*mebi, "only %d bytes could be written", second)
		flush(t, path)
	})
	usage, err = b.engine.Usage(t.Context(), b.place, v)
	assert.NilError(t, err)
	assert.Equal(t, usage.Limit, grown)

	// Less than is used: refused, or nothing more can be written.
	err = b.engine.Resize(t.Context(), b.place, v, 16*mebi)
	usage, errUsage := b.engine.Usage(t.Context(), b.place, v)
	assert.NilError(t, errUsage)
	if err != nil {
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.Equal(t, usage.Limit, grown)
	} else {
		assert.Equal(t, usage.Limit, uint64(16*mebi))
		b.within(v, func(path string) {
			_, full := writeUpTo(t, filepath.Join(path, "h"), 8*mebi)
			assert.Assert(t, full)
		})
	}

	// The content goes, also when the volume is full.
	b.within(v, func(path string) {
		assert.NilError(t, os.Remove(filepath.Join(path, "f")))
		assert.NilError(t, os.Remove(filepath.Join(path, "g")))
	})
	err = b.engine.Resize(t.Context(), b.place, v, v.Size)
	if err != nil { // xfs cannot shrink
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	}
}

func testSnapshot(b *bench) {
	t := b.t
	v := b.create("web")
	b.within(v, func(path string) { fill(t, path) })
	var last engine.Progress
	done, err := b.engine.Snapshot(t.Context(), b.place, v, "before", func(p engine.Progress) { last = p })
	assert.NilError(t, err)
	assert.Equal(t, done.Consistency, b.can.Consistency)
	assert.Equal(t, done.Unstable, uint64(0))
	assert.Assert(t, last.TotalFiles == 0 || last.Files <= last.TotalFiles, "%+v", last)
	b.withinSnapshot(v, "before", func(snap string) {
		b.within(v, func(path string) { same(t, path, snap) })
		if b.can.Instant {
			assert.ErrorIs(t, os.WriteFile(filepath.Join(snap, "new"), nil, 0o600), unix.EROFS)
			assert.ErrorIs(t, os.Remove(filepath.Join(snap, "file")), unix.EROFS)
		}
	})
	// What happens to the data does not happen to the snapshot.
	b.write(v, "file", "changed")
	b.within(v, func(path string) { assert.NilError(t, os.Remove(filepath.Join(path, "dir/hard"))) })
	content := b.readSnapshot(v, "before", "file")
	assert.Assert(t, strings.HasPrefix(content, "content\n"))
	assert.Equal(t, b.readSnapshot(v, "before", "dir/hard"), content)
	assert.Equal(t, b.read(v, "file"), "changed")
	_, err = b.engine.OpenSnapshot(t.Context(), b.place, v, "none")
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
	b.clean()
}

// A tree with all that there is in the way of files goes through all copies.
func testNasty(b *bench) {
	t := b.t
	v, clone := b.create("web"), b.volume("clone")
	b.within(v, func(path string) { nastytree.Make(t, path) })
	b.snapshot(v, "s")
	_, err := b.engine.Clone(t.Context(), b.place, v, "s", clone, nil)
	assert.NilError(t, err)
	b.attach(clone)
	b.within(v, func(path string) {
		b.within(clone, func(copied string) { nastytree.Compare(t, path, copied) })
	})
	_, err = b.engine.Rollback(t.Context(), b.place, v, "s", "kept", nil)
	assert.NilError(t, err)
	b.within(v, func(path string) {
		b.withinSnapshot(v, "kept", func(kept string) { nastytree.Compare(t, kept, path) })
	})
	for _, v := range []engine.Volume{v, clone} {
		b.detach(v)
		assert.NilError(t, b.engine.Retire(t.Context(), b.place, v))
		assert.NilError(t, b.engine.Destroy(t.Context(), b.place, v))
	}
	b.clean()
}

func testSnapshotTaken(b *bench) {
	t := b.t
	v := b.create("web")
	b.write(v, "f", "one")
	b.snapshot(v, "s")
	b.write(v, "f", "two")
	_, err := b.engine.Snapshot(t.Context(), b.place, v, "s", nil)
	assert.Assert(t, errors.Is(err, fs.ErrExist), "%v", err)
	assert.Equal(t, b.readSnapshot(v, "s", "f"), "one")
	// Another volume's snapshots have names of their own.
	other := b.create("other")
	b.write(other, "f", "three")
	b.snapshot(other, "s")
	assert.Equal(t, b.readSnapshot(other, "s", "f"), "three")
	assert.Equal(t, b.readSnapshot(v, "s", "f"), "one")
	b.clean()
}

func testSnapshotRemove(b *bench) {
	t := b.t
	v := b.create("web")
	assert.NilError(t, b.engine.RemoveSnapshot(t.Context(), b.place, v, "none"))
	b.within(v, func(path string) { fill(t, path) })
	b.snapshot(v, "s")
	b.snapshot(v, "other")
	assert.NilError(t, b.engine.RemoveSnapshot(t.Context(), b.place, v, "s"))
	assert.NilError(t, b.engine.RemoveSnapshot(t.Context(), b.place, v, "s"))
	assert.Assert(t, !b.hasSnapshot(v, "s"))
	assert.Assert(t, b.hasSnapshot(v, "other"))
	b.snapshot(v, "s")
	assert.Assert(t, b.hasSnapshot(v, "s"))
	b.clean()
}

func testSnapshotCancelled(b *bench) {
	t := b.t
	v := b.create("web")
	b.within(v, func(path string) { fill(t, path) })
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := b.engine.Snapshot(ended, b.place, v, "s", nil)
	assert.ErrorIs(t, err, context.Canceled)
	assert.Assert(t, !b.hasSnapshot(v, "s"))
	_, err = b.engine.Clone(ended, b.place, v, "", b.volume("clone"), nil)
	assert.ErrorIs(t, err, context.Canceled)
	assert.Assert(t, !b.found("clone"))
	b.clean()
	// In the middle, where progress is told.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err = b.engine.Snapshot(ctx, b.place, v, "s", func(engine.Progress) { cancel() })
	if err != nil {
		assert.ErrorIs(t, err, context.Canceled)
	}
	assert.Equal(t, b.hasSnapshot(v, "s"), err == nil)
	b.clean()
}

// A file per round grows, is replaced and goes, while snapshots are made.
func testSnapshotWhileWritten(b *bench) {
	t := b.t
	v := b.create("web")
	b.write(v, "stays", "x")
	data, err := b.engine.Open(b.place, v)
	assert.NilError(t, err)
	defer data.Close()
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Add(1)
	go func() {
		defer writer.Done()
		in := func(format string, i int) string { return filepath.Join(procPath(data), fmt.Sprintf(format, i)) }
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			_ = os.WriteFile(in("f%d", i%7), make([]byte, (i%13)*10_000), 0o600)
			_ = os.Mkdir(in("d%d", i%5), 0o700)
			_ = os.WriteFile(in("d%d/in", i%5), nil, 0o600)
			_ = os.Rename(in("f%d", (i+3)%7), in("moved%d", i%3))
			_ = os.Truncate(in("f%d", (i+2)%7), 3)
			_ = os.Remove(in("d%d/in", (i+1)%5))
			_ = os.Remove(in("d%d", (i+1)%5))
			_ = os.Remove(in("f%d", (i+4)%7))
		}
	}()
	defer writer.Wait()
	defer close(stop)
	for i := range 10 {
		snap := fmt.Sprintf("s%d", i)
		_, err := b.engine.Snapshot(t.Context(), b.place, v, snap, nil)
		assert.NilError(t, err)
		assert.Equal(t, b.readSnapshot(v, snap, "stays"), "x")
		assert.NilError(t, b.engine.RemoveSnapshot(t.Context(), b.place, v, snap))
	}
	b.clean()
}

// A container exchanges a directory for a link to what is none of its business.
func testSwaps(b *bench) {
	t := b.t
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	assert.NilError(t, os.WriteFile(secret, []byte("secret"), 0o600))
	assert.NilError(t, os.Chmod(outside, 0o700))
	v := b.create("web")
	data, err := b.engine.Open(b.place, v)
	assert.NilError(t, err)
	defer data.Close()
	in := func(name string) string { return filepath.Join(procPath(data), name) }
	for i := range 20 {
		assert.NilError(t, os.MkdirAll(in(fmt.Sprintf("d%d/sub", i)), 0o755))
		assert.NilError(t, os.WriteFile(in(fmt.Sprintf("d%d/secret", i)), []byte("mine"), 0o600))
		assert.NilError(t, os.Symlink(outside, in(fmt.Sprintf("l%d", i))))
	}
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Add(1)
	go func() {
		defer swapper.Done()
		for i := 0; ; i = (i + 1) % 20 {
			select {
			case <-stop:
				return
			default:
			}
			_ = unix.Renameat2(unix.AT_FDCWD, in(fmt.Sprintf("d%d", i)), unix.AT_FDCWD, in(fmt.Sprintf("l%d", i)), unix.RENAME_EXCHANGE)
		}
	}()
	end := sync.OnceFunc(func() { close(stop); swapper.Wait() })
	defer end()
	for i := range 5 {
		snap := fmt.Sprintf("s%d", i)
		b.snapshot(v, snap)
		b.withinSnapshot(v, snap, func(path string) {
			assert.NilError(t, filepath.WalkDir(path, func(name string, d fs.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return err
				}
				content, err := os.ReadFile(name)
				assert.Equal(t, string(content), "mine", name)
				return err
			}))
		})
	}
	_, err = b.engine.Usage(t.Context(), b.place, v)
	assert.NilError(t, err)
	assert.NilError(t, b.engine.Retire(t.Context(), b.place, v))
	err = b.engine.Destroy(t.Context(), b.place, v)
	end()
	assert.NilError(t, data.Close())
	if err != nil { // somebody wrote
		b.detach(v)
	}
	assert.NilError(t, b.engine.Destroy(t.Context(), b.place, v))
	info, err := os.Stat(outside)
	assert.NilError(t, err)
	assert.Equal(t, info.Mode().Perm(), fs.FileMode(0o700))
	content, err := os.ReadFile(secret)
	assert.NilError(t, err)
	assert.Equal(t, string(content), "secret")
	b.clean()
}

func testClone(b *bench) {
	t := b.t
	v := b.create("web")
	b.within(v, func(path string) { fill(t, path) })
	b.snapshot(v, "s")
	for target, snap := range map[string]string{"live": "", "snapped": "s"} {
		clone := b.volume(target)
		_, err := b.engine.Clone(t.Context(), b.place, v, snap, clone, nil)
		assert.NilError(t, err)
		b.attach(clone)
		b.within(v, func(path string) { b.within(clone, func(copied string) { same(t, path, copied) }) })
		b.write(clone, "new", target) // writable
		b.write(clone, "file", target)
		usage, err := b.engine.Usage(t.Context(), b.place, clone)
		assert.NilError(t, err)
		assert.Equal(t, usage.Limit, clone.Size)
		b.within(v, func(path string) {
			_, err := os.Lstat(filepath.Join(path, "new"))
			assert.Assert(t, os.IsNotExist(err))
		})
		again := b.volume(target)
		_, err = b.engine.Clone(t.Context(), b.place, v, snap, again, nil)
		assert.Assert(t, errors.Is(err, fs.ErrExist), "%v", err)
		assert.Equal(t, b.read(clone, "new"), target)
		// A clone is a volume like others, with snapshots of its own.
		assert.Assert(t, !b.hasSnapshot(clone, "s"))
		b.snapshot(clone, "s")
		assert.Equal(t, b.readSnapshot(clone, "s", "new"), target)
	}
	assert.Assert(t, strings.HasPrefix(b.read(v, "file"), "content"))
	assert.Assert(t, strings.HasPrefix(b.readSnapshot(v, "s", "file"), "content"))
	_, err := b.engine.Clone(t.Context(), b.place, v, "none", b.volume("x"), nil)
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
	_, err = b.engine.Clone(t.Context(), b.place, b.volume("none"), "", b.volume("x"), nil)
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
	assert.Assert(t, !b.found("x"))
	b.clean()
}

// Who is killed after Clone and before the record was written gives it up.
func testCloneAbandoned(b *bench) {
	t := b.t
	v := b.create("web")
	b.write(v, "f", "x")
	clone := b.volume("clone")
	_, err := b.engine.Clone(t.Context(), b.place, v, "", clone, nil)
	assert.NilError(t, err)
	assert.NilError(t, b.engine.Abandon(b.place, clone))
	assert.Assert(t, !b.found("clone"))
	assert.NilError(t, b.engine.Abandon(b.place, clone))
	b.clean()
	// One that was attached is somebody's.
	_, err = b.engine.Clone(t.Context(), b.place, v, "", clone, nil)
	assert.NilError(t, err)
	b.attach(clone)
	b.detach(clone)
	assert.NilError(t, b.engine.Abandon(b.place, clone))
	b.attach(clone)
	assert.Equal(t, b.read(clone, "f"), "x")
	assert.Equal(t, b.read(v, "f"), "x")
	b.clean()
}

func testRollback(b *bench) {
	t := b.t
	v := b.create("web")
	b.within(v, func(path string) { fill(t, path) })
	b.snapshot(v, "s")
	b.write(v, "file", "changed")
	b.write(v, "new", "x")
	_, err := b.engine.Rollback(t.Context(), b.place, v, "s", "kept", nil)
	assert.NilError(t, err)
	b.withinSnapshot(v, "s", func(snap string) { b.within(v, func(path string) { same(t, snap, path) }) })
	assert.Equal(t, b.readSnapshot(v, "kept", "file"), "changed")
	assert.Equal(t, b.readSnapshot(v, "kept", "new"), "x")
	if b.can.Instant {
		b.withinSnapshot(v, "kept", func(snap string) {
			assert.ErrorIs(t, os.WriteFile(filepath.Join(snap, "n"), nil, 0o600), unix.EROFS)
		})
	}
	usage, err := b.engine.Usage(t.Context(), b.place, v)
	assert.NilError(t, err)
	assert.Equal(t, usage.Limit, v.Size)
	// Complete: the same again does nothing.
	b.write(v, "file", "later")
	_, err = b.engine.Rollback(t.Context(), b.place, v, "s", "kept", nil)
	assert.NilError(t, err)
	assert.Equal(t, b.read(v, "file"), "later")
	// And back.
	_, err = b.engine.Rollback(t.Context(), b.place, v, "kept", "kept2", nil)
	assert.NilError(t, err)
	assert.Equal(t, b.read(v, "file"), "changed")
	assert.Equal(t, b.readSnapshot(v, "kept2", "file"), "later")
	for _, snap := range []string{"s", "kept", "kept2"} {
		assert.NilError(t, b.engine.RemoveSnapshot(t.Context(), b.place, v, snap))
	}
	assert.Equal(t, b.read(v, "file"), "changed")
	b.clean()
}

func testRollbackMissing(b *bench) {
	t := b.t
	v := b.create("web")
	b.write(v, "f", "x")
	_, err := b.engine.Rollback(t.Context(), b.place, v, "none", "kept", nil)
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
	b.snapshot(v, "s")
	_, err = b.engine.Rollback(t.Context(), b.place, v, "none", "kept", nil)
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
	assert.Equal(t, b.read(v, "f"), "x")
	assert.Assert(t, !b.hasSnapshot(v, "kept"))
	_, err = b.engine.Rollback(t.Context(), b.place, v, "s", "s", nil)
	assert.Assert(t, err != nil)
	assert.Equal(t, b.read(v, "f"), "x")
	b.clean()
}
