package rooted

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"
)

func TestRenameNewReplacesNothing(t *testing.T) {
	path := t.TempDir()
	dir, err := Open(path)
	assert.NilError(t, err)
	defer dir.Close()
	for _, name := range []string{"a", "b", "sub"} {
		assert.NilError(t, os.Mkdir(filepath.Join(path, name), 0o755))
	}
	sub, err := dir.Dir("sub")
	assert.NilError(t, err)
	defer sub.Close()
	// rename(2) would replace the empty directory.
	err = dir.lookAndRename("a", dir, "b")
	assert.Assert(t, errors.Is(err, fs.ErrExist), "%v", err)
	assert.NilError(t, dir.lookAndRename("a", dir, "new"))
	assert.NilError(t, dir.lookAndRename("new", dir, "a"))
	err = dir.RenameNew("a", dir, "b")
	assert.Assert(t, errors.Is(err, fs.ErrExist), "%v", err)
	assert.NilError(t, dir.RenameNew("a", sub, "a"))
	names, err := sub.Names()
	assert.NilError(t, err)
	assert.DeepEqual(t, names, []string{"a"})
	err = dir.RenameNew("a", sub, "c")
	assert.Assert(t, errors.Is(err, fs.ErrNotExist), "%v", err)
	for _, name := range []string{"", "..", "sub/a", "/etc"} {
		assert.ErrorContains(t, dir.RenameNew(name, dir, "new"), "is not the name")
		assert.ErrorContains(t, dir.RenameNew("b", dir, name), "is not the name")
	}
}

func TestExchange(t *testing.T) {
	dir := t.TempDir()
	top, err := Open(dir)
	assert.NilError(t, err)
	defer top.Close()
	assert.NilError(t, top.Mkdir("d", 0o700))
	sub, err := top.Dir("d")
	assert.NilError(t, err)
	defer sub.Close()
	assert.NilError(t, top.WriteNew("f", []byte("file"), 0o600))
	assert.NilError(t, os.Symlink("/etc", filepath.Join(dir, "d/link")))
	assert.NilError(t, top.Exchange("f", sub, "link"))
	target, err := os.Readlink(filepath.Join(dir, "f"))
	assert.NilError(t, err)
	assert.Equal(t, target, "/etc")
	text, err := sub.ReadFile("link", 10)
	assert.NilError(t, err)
	assert.Equal(t, string(text), "file")
	assert.ErrorIs(t, top.Exchange("f", sub, "none"), fs.ErrNotExist)
	assert.ErrorContains(t, top.Exchange("f", sub, ".."), "is not the name")
	assert.ErrorContains(t, top.Exchange("d/link", sub, "link"), "is not the name")
}
