package filesystem

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
)

// newImage makes a sparse file of size bytes.
func newImage(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	assert.NilError(t, os.WriteFile(path, nil, 0o600))
	assert.NilError(t, os.Truncate(path, size))
	return path
}

func TestMakeIsIdentified(t *testing.T) {
	for _, kind := range Kinds {
		t.Run(string(kind), func(t *testing.T) {
			assert.NilError(t, Available(kind))
			size := int64(kind.MinSize())
			path := newImage(t, size)
			_, err := IdentifyFile(path)
			assert.ErrorIs(t, err, ErrUnknown)
			id := uuid.New()
			assert.NilError(t, Make(t.Context(), kind, path, MakeOptions{UUID: id, Label: "a-long-volume-name", Zeroed: true}))
			info, err := IdentifyFile(path)
			assert.NilError(t, err)
			assert.Equal(t, info, Info{Kind: kind, UUID: id, Size: uint64(size)})
		})
	}
}

// The last one that was made counts, whatever was there before.
func TestMakeReplacesOthers(t *testing.T) {
	path := newImage(t, 512<<20)
	for _, kind := range []Kind{Btrfs, XFS, Ext4, Btrfs, Ext4, XFS, Btrfs} {
		assert.NilError(t, Make(t.Context(), kind, path, MakeOptions{}))
		info, err := IdentifyFile(path)
		assert.NilError(t, err)
		assert.Equal(t, info.Kind, kind)
	}
}

func TestMakeSaysWhyNot(t *testing.T) {
	path := newImage(t, 1<<20)
	for _, kind := range Kinds {
		err := Make(t.Context(), kind, filepath.Join(filepath.Dir(path), "missing", "x"), MakeOptions{})
		assert.ErrorContains(t, err, "mkfs."+string(kind))
		said := strings.ToLower(err.Error())
		assert.Assert(t, strings.Contains(said, "no such file") || strings.Contains(said, "does not exist"), "%v", err)
	}
	err := Make(t.Context(), "zfs", path, MakeOptions{})
	assert.Equal(t, fault.Kind(err), "invalid")
	assert.ErrorContains(t, err, `fs="zfs"`)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	assert.ErrorIs(t, Make(ended, Ext4, path, MakeOptions{}), context.Canceled)
}

func TestUnavailableKindInWords(t *testing.T) {
	t.Setenv("PATH", "/nowhere")
	saved := programDirs
	programDirs = nil
	t.Cleanup(func() { programDirs = saved })
	err := Available(XFS)
	assert.Equal(t, fault.Kind(err), "unavailable")
	assert.ErrorContains(t, err, "mkfs.xfs is not installed")
}

func TestIdentifyFileOpensNothingElse(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	assert.NilError(t, os.Symlink("/dev/zero", link))
	_, err := IdentifyFile(link)
	assert.ErrorContains(t, err, "too many levels")
}

func FuzzIdentify(f *testing.F) {
	for _, kind := range Kinds {
		path := newImage(f, int64(kind.MinSize()))
		assert.NilError(f, Make(f.Context(), kind, path, MakeOptions{}))
		file, err := os.Open(path)
		assert.NilError(f, err)
		head, err := readAt(file, 0)
		assert.NilError(f, err)
		super, err := readAt(file, btrfsSuper)
		assert.NilError(f, err)
		f.Add(head, super)
		assert.NilError(f, file.Close())
	}
	f.Add([]byte("XFSB"), []byte{})
	f.Fuzz(func(t *testing.T, head, super []byte) {
		image := make([]byte, btrfsSuper, btrfsSuper+len(super))
		copy(image, head)
		info, err := Identify(bytes.NewReader(append(image, super...)))
		if err != nil {
			assert.ErrorIs(t, err, ErrUnknown)
			return
		}
		assert.NilError(t, knownKind(info.Kind))
	})
}
