package tree_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/nastytree"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/tree"
)

func TestCountCountsNames(t *testing.T) {
	top := t.TempDir()
	nastytree.Make(t, top)
	var want tree.Held
	for _, line := range nastytree.List(t, top) {
		switch {
		case strings.HasPrefix(line, "mode 10") && strings.Contains(line, " content "):
			want.Files++
		case strings.HasPrefix(line, "mode 4"):
			want.Dirs++
		}
	}
	dir, err := rooted.Open(top)
	assert.NilError(t, err)
	defer dir.Close()
	have, err := tree.Count(t.Context(), dir)
	assert.NilError(t, err)
	want.Bytes = have.Bytes
	assert.Equal(t, have, want)

	few := t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(few, "a"), []byte("four"), 0o600))
	assert.NilError(t, os.Link(filepath.Join(few, "a"), filepath.Join(few, "b")))
	assert.NilError(t, os.Symlink("/etc", filepath.Join(few, "link")))
	small, err := rooted.Open(few)
	assert.NilError(t, err)
	defer small.Close()
	have, err = tree.Count(t.Context(), small)
	assert.NilError(t, err)
	assert.Equal(t, have, tree.Held{Files: 2, Dirs: 1, Bytes: 8})
}
