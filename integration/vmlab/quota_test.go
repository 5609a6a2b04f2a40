package vmlab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/quota"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// TestQuota limits directories by the project quotas of xfs and ext4, which the kernels of
// many build machines lack.
func TestQuota(t *testing.T) {
	InGuest(t, Options{Modules: []string{"loop", "xfs"}}, func(t *testing.T) {
		for kind, mkfs := range map[string]string{"xfs": "mkfs.xfs -q ", "ext4": "mkfs.ext4 -q -O quota,project -E quotatype=prjquota "} {
			t.Run(kind, func(t *testing.T) {
				device := disk(t, 320<<20)
				sh(t, mkfs+device)
				t.Run("without prjquota", func(t *testing.T) { quotaOff(t, mountDisk(t, device, "noquota"), kind) })
				root := mountDisk(t, device, "prjquota")
				for name, test := range map[string]func(t *testing.T, root string){
					"an empty directory": quotaEmpty, "a directory with content": quotaContent, "two directories": quotaApart,
					"volumes": quotaVolumes, "cut short": quotaCutShort,
				} {
					t.Run(name, func(t *testing.T) {
						dir := filepath.Join(root, strings.ReplaceAll(name, " ", "-"))
						assert.NilError(t, os.Mkdir(dir, 0o755))
						test(t, dir)
					})
				}
			})
		}
	})
}

const quotaSize = 2 << 20

func openDir(t *testing.T, path ...string) *rooted.Dir {
	t.Helper()
	dir, err := rooted.Open(filepath.Join(path...))
	assert.NilError(t, err)
	t.Cleanup(func() { _ = dir.Close() })
	return dir
}

func quotaOff(t *testing.T, root, kind string) {
	// ext4 with the feature counts whatever the mount's options say.
	dir := openDir(t, root)
	err := quota.Supported(dir)
	if kind == "ext4" && err == nil {
		// This kernel enforces the limits all the same.
		on := filepath.Join(root, "all-the-same")
		assert.NilError(t, os.Mkdir(on, 0o755))
		quotaVolumes(t, on)
		return
	}
	assert.ErrorIs(t, err, quota.ErrUnsupported)
	can, err := copying.Dir().Probe(t.Context(), dir)
	assert.NilError(t, err)
	assert.Assert(t, !can.Limit)
	assert.NilError(t, copying.Dir().Make(dir, "unlimited", false))
	err = copying.Dir().Limit(t.Context(), dir, "unlimited", quotaSize)
	assert.ErrorIs(t, err, engine.ErrNoLimit)
	assert.ErrorContains(t, err, "prjquota")
	_, err = copying.Dir().Usage(t.Context(), dir, "unlimited")
	assert.NilError(t, err)
}

// used checks what a directory is said to use, to the size of some directories.
func used(t *testing.T, dir *rooted.Dir, atLeast, limit uint64) quota.Usage {
	t.Helper()
	usage, known, err := quota.Get(dir)
	assert.NilError(t, err)
	assert.Assert(t, known)
	assert.Equal(t, usage.Limit, limit)
	if usage.Bytes < atLeast || usage.Bytes > atLeast+256<<10 {
		t.Errorf("%d bytes are used, want %d", usage.Bytes, atLeast)
	}
	return usage
}

func quotaEmpty(t *testing.T, root string) {
	assert.NilError(t, os.Mkdir(filepath.Join(root, "v"), 0o755))
	parent, dir := openDir(t, root), openDir(t, root, "v")
	_, known, err := quota.Get(dir)
	assert.NilError(t, err)
	assert.Assert(t, !known)
	assert.NilError(t, quota.Set(t.Context(), parent, dir, 0), "no limit where there is none")
	assert.NilError(t, quota.Set(t.Context(), parent, dir, quotaSize))
	assert.NilError(t, os.Mkdir(filepath.Join(root, "v/below"), 0o777))
	fill(t, dir.Path())
	usage := used(t, dir, quotaSize-64<<10, quotaSize)
	assert.Equal(t, usage.Files, uint64(3))

	// It grows, online.
	assert.NilError(t, quota.Set(t.Context(), parent, dir, 2*quotaSize))
	assert.NilError(t, os.WriteFile(filepath.Join(root, "v/below/more"), make([]byte, quotaSize/2), 0o600))
	used(t, dir, quotaSize+quotaSize/2-64<<10, 2*quotaSize)
	assert.NilError(t, quota.Set(t.Context(), parent, dir, 0))
	assert.NilError(t, os.WriteFile(filepath.Join(root, "v/below/much"), make([]byte, 4*quotaSize), 0o600))
	used(t, dir, 5*quotaSize+quotaSize/2-64<<10, 0)
}

func quotaContent(t *testing.T, root string) {
	parent := openDir(t, root)
	top := filepath.Join(root, "v")
	assert.NilError(t, os.MkdirAll(filepath.Join(top, "a/b/c"), 0o777))
	for i := range 20 {
		assert.NilError(t, os.WriteFile(filepath.Join(top, "a/b", fmt.Sprint(i)), make([]byte, 64<<10), 0o600))
	}
	assert.NilError(t, os.Link(filepath.Join(top, "a/b/1"), filepath.Join(top, "link")))
	assert.NilError(t, os.Symlink("/etc/passwd", filepath.Join(top, "symlink")))
	assert.NilError(t, unix.Mkfifo(filepath.Join(top, "a/fifo"), 0o600))
	dir := openDir(t, top)
	assert.NilError(t, quota.Set(t.Context(), parent, dir, quotaSize))
	usage := used(t, dir, 20*64<<10, quotaSize)
	assert.Equal(t, usage.Files, uint64(20+4), "but the symbolic link and the pipe")
	fill(t, filepath.Join(top, "a/b/c"))
	used(t, dir, quotaSize-64<<10, quotaSize)
}

func quotaApart(t *testing.T, root string) {
	parent := openDir(t, root)
	projects := map[uint32]bool{}
	for _, name := range []string{"one", "two", "three"} {
		assert.NilError(t, os.Mkdir(filepath.Join(root, name), 0o755))
		dir := openDir(t, root, name)
		assert.NilError(t, quota.Set(t.Context(), parent, dir, quotaSize))
		project, err := quota.Project(dir)
		assert.NilError(t, err)
		assert.Assert(t, project != 0 && !projects[project])
		projects[project] = true
		assert.NilError(t, os.WriteFile(filepath.Join(root, name, "file"), make([]byte, quotaSize/2), 0o600))
		used(t, dir, quotaSize/2, quotaSize)
	}
	// A directory in a limited one is limited with it, and gets a project of its own when
	// it is asked for.
	assert.NilError(t, os.Mkdir(filepath.Join(root, "one/inner"), 0o755))
	outer, inner := openDir(t, root, "one"), openDir(t, root, "one/inner")
	assert.NilError(t, quota.Set(t.Context(), outer, inner, quotaSize/4))
	used(t, outer, quotaSize/2, quotaSize)
	used(t, inner, 0, quotaSize/4)
}

// A call that was killed has left files of the project in a directory that is not.
func quotaCutShort(t *testing.T, root string) {
	parent := openDir(t, root)
	for _, name := range []string{"donor", "v", "v/a"} {
		assert.NilError(t, os.Mkdir(filepath.Join(root, name), 0o755))
	}
	donor := openDir(t, root, "donor")
	assert.NilError(t, quota.Set(t.Context(), parent, donor, quotaSize))
	assert.NilError(t, os.WriteFile(filepath.Join(root, "donor/file"), make([]byte, 512<<10), 0o600))
	assert.NilError(t, os.Rename(filepath.Join(root, "donor/file"), filepath.Join(root, "v/a/file")))
	dir := openDir(t, root, "v")
	assert.NilError(t, quota.Set(t.Context(), parent, dir, quotaSize))
	used(t, dir, 512<<10, quotaSize)
	used(t, donor, 0, quotaSize)
}

// The engine's trees: made, limited, copied, moved, deleted.
func quotaVolumes(t *testing.T, root string) {
	parent := openDir(t, root)
	assert.NilError(t, os.Mkdir(filepath.Join(root, "tmp"), 0o700))
	tmp := openDir(t, root, "tmp")
	trees := copying.Dir()
	can, err := trees.Probe(t.Context(), parent)
	assert.NilError(t, err)
	assert.Assert(t, can.Limit)
	assert.NilError(t, trees.Make(parent, "v", false))
	assert.NilError(t, trees.Limit(t.Context(), parent, "v", quotaSize))
	fill(t, filepath.Join(root, "v"))

	src := openDir(t, root, "v")
	before := used(t, src, quotaSize-64<<10, quotaSize)
	_, err = trees.Duplicate(t.Context(), src, tmp, "copy", false, nil)
	assert.NilError(t, err, "a copy of a full volume has no limit")
	usage, err := trees.Usage(t.Context(), tmp, "copy")
	assert.NilError(t, err)
	assert.Equal(t, usage.Limit, uint64(0))
	assert.NilError(t, trees.Limit(t.Context(), tmp, "copy", 2*quotaSize))
	assert.NilError(t, tmp.Rename("copy", parent, "w"))
	usage, err = trees.Usage(t.Context(), parent, "w")
	assert.NilError(t, err)
	assert.Equal(t, usage.Limit, uint64(2*quotaSize))
	if usage.Free > quotaSize+128<<10 || usage.Free < quotaSize-128<<10 {
		t.Errorf("%d bytes are said to be free", usage.Free)
	}
	used(t, src, before.Bytes, quotaSize)
	fill(t, filepath.Join(root, "v"))

	// The snapshot that has another parent is in no project, and so can be moved.
	assert.NilError(t, parent.Rename("v", tmp, "trash"))
	assert.NilError(t, tmp.Rename("trash", parent, "v"))
	project, err := quota.Project(src)
	assert.NilError(t, err)
	assert.NilError(t, trees.Delete(t.Context(), parent, "v"))
	_ = src.Close()
	for line := range strings.Lines(sh(t, "repquota -P -n -v "+filepath.Dir(root))) {
		// Number, state, used, soft and hard limit.
		if fields := strings.Fields(line); len(fields) > 4 && fields[0] == fmt.Sprint("#", project) {
			assert.Equal(t, fields[4], "0", "the limit of a deleted volume is still there: %s", line)
		}
	}
	_, err = os.Stat(filepath.Join(root, "v"))
	assert.Assert(t, errors.Is(err, os.ErrNotExist))
}
