package rooted

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

// Old and new kernels give the same number.
func TestBothWaysToTheMountIDAgree(t *testing.T) {
	for _, path := range []string{"/", "/proc", t.TempDir()} {
		dir, err := Open(path)
		assert.NilError(t, err)
		defer dir.Close()
		old, err := procMountID(dir.FD())
		assert.NilError(t, err)
		assert.Equal(t, dir.MountID(), old)
	}
}

// Kernels without openat2 enter what others enter, and nothing else.
func TestBothWaysIntoADirectoryAgree(t *testing.T) {
	path := t.TempDir()
	for _, name := range []string{"sub", "mount"} {
		assert.NilError(t, os.Mkdir(filepath.Join(path, name), 0o755))
	}
	mounttest.Bind(t, filepath.Join(path, "sub"), filepath.Join(path, "mount"))
	assert.NilError(t, os.Symlink("sub", filepath.Join(path, "link")))
	assert.NilError(t, os.WriteFile(filepath.Join(path, "file"), nil, 0o600))
	top, err := Open(path)
	assert.NilError(t, err)
	defer top.Close()
	for name, want := range map[string]error{
		"sub": nil, "mount": ErrMountPoint, "link": ErrSymlink, "file": ErrNotDir, "none": fs.ErrNotExist,
	} {
		for way, enter := range map[string]func(string) (*Dir, error){
			"Dir": top.Dir, "dirSlowly": top.dirSlowly, "Handle": top.Handle, "handleSlowly": top.handleSlowly,
		} {
			dir, err := enter(name)
			assert.ErrorIs(t, err, want, "%s %s", way, name)
			if err != nil {
				continue
			}
			same, err := dir.Same(filepath.Join(path, name))
			assert.NilError(t, err)
			assert.Assert(t, same, "%s %s", way, name)
			assert.Equal(t, dir.MountID(), top.MountID())
			assert.Equal(t, dir.Path(), filepath.Join(path, name))
			assert.NilError(t, dir.Close())
		}
	}
}

// The number of a closed handle may be another file's by then.
func TestAHandleIsClosedOnce(t *testing.T) {
	dir, err := Open(t.TempDir())
	assert.NilError(t, err)
	assert.NilError(t, dir.Close())
	assert.ErrorIs(t, dir.Close(), fs.ErrClosed)
	assert.Equal(t, dir.FD(), -1)
	_, err = dir.Dir("sub")
	assert.ErrorContains(t, err, "bad file descriptor")
}
