package tree

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// visited notes what a walk comes to.
type visited struct{ items, failed []string }

func (v *visited) Visit(item *Item) error {
	v.items = append(v.items, item.Path)
	return nil
}

func (v *visited) Failed(path string, err error) error {
	v.failed = append(v.failed, path+": "+err.Error())
	return nil
}

func hostile(t *testing.T) *rooted.Dir {
	t.Helper()
	top := t.TempDir()
	for _, name := range []string{"b/deep", "a", "mnt"} {
		assert.NilError(t, os.MkdirAll(filepath.Join(top, name), 0o755))
	}
	for _, name := range []string{"b/deep/file", "z", "b/0"} {
		assert.NilError(t, os.WriteFile(filepath.Join(top, name), []byte("x"), 0o600))
	}
	assert.NilError(t, os.Symlink("/etc", filepath.Join(top, "link")))
	assert.NilError(t, unix.Mkfifo(filepath.Join(top, "fifo"), 0o600))
	mounttest.Bind(t, mounttest.Tmpfs(t, 1<<20), filepath.Join(top, "mnt"))
	dir, err := rooted.Open(top)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = dir.Close() })
	return dir
}

func TestWalkIsInOrderAndStaysInside(t *testing.T) {
	v := &visited{}
	assert.NilError(t, Walk(t.Context(), hostile(t), v))
	assert.DeepEqual(t, v.items, []string{"", "fifo", "link", "z", "a", "b", "b/0", "b/deep", "b/deep/file"})
	assert.DeepEqual(t, v.failed, []string{"mnt: " + rooted.ErrMountPoint.Error()})
}

func TestWalkHoldsFewDescriptors(t *testing.T) {
	top := t.TempDir()
	nastytree.MakeDeep(t, top, 300)
	dir, err := rooted.Open(top)
	assert.NilError(t, err)
	defer dir.Close()
	v := &counting{}
	assert.NilError(t, Walk(t.Context(), dir, v))
	assert.Assert(t, slices.ContainsFunc(v.items, func(path string) bool { return strings.HasSuffix(path, "/bottom") }))
	assert.Assert(t, v.most < 50, "%d descriptors", v.most)
}

type counting struct {
	visited
	most int
}

func (d *counting) Visit(item *Item) error {
	entries, err := os.ReadDir("/proc/self/fd")
	d.most = max(d.most, len(entries))
	return errors.Join(err, d.visited.Visit(item))
}

func TestBelowLeadsNowhereElse(t *testing.T) {
	b := NewBelow(hostile(t))
	defer b.Close()
	for path, want := range map[string]error{
		"link": unix.ENOTDIR, "mnt": unix.EXDEV, "z": unix.ENOTDIR, "fifo": unix.ENOTDIR, "missing": unix.ENOENT, "..": unix.EXDEV, "b/../..": unix.EXDEV,
		"link/ssh": unix.ELOOP,
	} {
		_, err := b.Dir(path)
		assert.ErrorIs(t, err, want, path)
	}
	for _, path := range []string{"", "b", "b/deep", "a", "b/deep"} {
		fd, err := b.Dir(path)
		assert.NilError(t, err)
		link, err := os.Readlink(procFD(fd))
		assert.NilError(t, err)
		assert.Equal(t, link, filepath.Join(b.top.Path(), path))
	}
}
