package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/filesystem"
)

// refused tells the errors that a program gets in a volume that was cut off. A
// directory entry may still be made in the memory of a btrfs, until it has seen that
// it cannot write.
func refused(err error) bool { return errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS) }

// sum reads a whole image.
func sum(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	assert.NilError(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	assert.NilError(t, err)
	return string(h.Sum(nil))
}

// Nothing gets into an image that was cut off, whatever was dirty and whatever
// programs do, and the image can be mounted again when they have gone.
func TestCut(t *testing.T) {
	each(t, func(t *testing.T, e *Engine, kind filesystem.Kind) {
		p, v := rootOn(t, "ext4"), volume("web", kind)
		create(t, e, p, v)
		assert.NilError(t, e.Cut(t.Context(), p, v), "not attached")
		attach(t, e, p, v)
		var program *os.File // as in a container
		within(t, e, p, v, func(path string) {
			assert.NilError(t, os.WriteFile(filepath.Join(path, "kept"), []byte("kept"), 0o600))
			var err error
			program, err = os.Create(filepath.Join(path, "open"))
			assert.NilError(t, err)
			assert.NilError(t, unix.Syncfs(int(program.Fd())))
		})
		defer program.Close()
		mark := bytes.Repeat([]byte("must not reach the image "), 100_000)
		_, err := program.Write(mark)
		assert.NilError(t, err)

		assert.NilError(t, e.Cut(t.Context(), p, v))
		assert.NilError(t, e.Cut(t.Context(), p, v), "again")
		before := sum(t, file(p, v))
		_, err = program.WriteAt(mark, 1<<20)
		assert.Assert(t, err == nil || refused(err), "%v", err)
		assert.Assert(t, refused(program.Sync()))
		_ = unix.Syncfs(int(program.Fd()))
		_, err = program.WriteAt(mark, 8<<20)
		if err == nil {
			err = program.Sync()
		}
		assert.Assert(t, refused(err), "%v", err)
		assert.Equal(t, sum(t, file(p, v)), before, "written after the cut")
		content, err := os.ReadFile(file(p, v))
		assert.NilError(t, err)
		assert.Assert(t, !bytes.Contains(content, mark[:1000]), "what was dirty is in the image")

		err = e.Attach(t.Context(), p, v)
		assert.Equal(t, fault.Kind(err), "conflict", "%v", err)
		assert.ErrorContains(t, err, "stop its containers")
		assert.NilError(t, program.Close())
		assert.NilError(t, e.Attach(t.Context(), p, v))
		assert.Equal(t, read(t, e, p, v, "kept"), "kept")
		write(t, e, p, v, "new", "new")

		assert.NilError(t, e.Cut(t.Context(), p, v))
		assert.NilError(t, e.Detach(t.Context(), p, v))
		assert.NilError(t, e.Attach(t.Context(), p, v))
		assert.Equal(t, read(t, e, p, v, "kept"), "kept")
		write(t, e, p, v, "newer", "newer")
	})
}

// A container of another mount namespace keeps what is left of a volume.
func TestCutWhileSomebodyUnseenHasIt(t *testing.T) {
	t.Parallel() // most of it waits for the kernel
	e, p, v := New(all()), rootOn(t, "ext4"), volume("web", filesystem.XFS)
	create(t, e, p, v)
	attach(t, e, p, v)
	end := inNamespace(t, "mount --bind "+filepath.Join(p.Local, v.UUID, filesystem.DataName)+" "+t.TempDir())
	assert.NilError(t, e.Cut(t.Context(), p, v))
	err := e.Attach(t.Context(), p, v)
	assert.Equal(t, fault.Kind(err), "conflict", "%v", err)
	err = e.Attach(t.Context(), p, v)
	assert.ErrorContains(t, err, "cut off", "%v", err)
	end()
	assert.NilError(t, e.Attach(context.WithoutCancel(t.Context()), p, v))
	write(t, e, p, v, "f", "x")
}
