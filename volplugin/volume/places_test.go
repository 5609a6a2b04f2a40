package volume

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestOutermostPaths(t *testing.T) {
	assert.DeepEqual(t, outermost([]string{"b/c", "a", "b", "a", "bc", "b/c/d", "a.b"}), []string{"a", "a.b", "b", "bc"})
	assert.Equal(t, len(outermost(nil)), 0)
}

// A pair of directories: a volume, and what was restored for it.
func pair(t *testing.T) (dir string, top, work *rooted.Dir) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"volume/in", "work/in"} {
		assert.NilError(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
	}
	var err error
	if top, err = rooted.Open(filepath.Join(dir, "volume")); err == nil {
		work, err = rooted.Open(filepath.Join(dir, "work"))
	}
	assert.NilError(t, err)
	t.Cleanup(func() {
		assert.Check(t, top.Close())
		assert.Check(t, work.Close())
	})
	return dir, top, work
}

// Where entries cannot be exchanged, what was there is put aside, whatever is there already.
func TestPlacesWhereNothingCanBeExchanged(t *testing.T) {
	dir, top, work := pair(t)
	for name, text := range map[string]string{"volume/f": "there", "work/f": "restored", "work/.old-0": "restored too"} {
		assert.NilError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	assert.NilError(t, exchangeSlowly(descent{top, work}, "f", work))
	for name, want := range map[string]string{"volume/f": "restored", "work/.old-0": "restored too", "work/.old-1": "there"} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		assert.NilError(t, err)
		assert.Equal(t, string(text), want, name)
	}
	_, err := work.Stat("f")
	assert.ErrorIs(t, err, fs.ErrNotExist)
}

// What an engine has not restored is no reason to say that it is in its place.
func TestAPathThatWasNotRestoredHasNoPlace(t *testing.T) {
	_, top, work := pair(t)
	assert.ErrorIs(t, placeable(top, work, "in/f"), fs.ErrNotExist)
	assert.ErrorIs(t, place(top, work, "in/f"), fs.ErrNotExist)
}
