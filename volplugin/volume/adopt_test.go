package volume

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/options"
)

// Somebody makes a directory of the name at the last moment. It stays theirs.
func TestADirectoryThatComesUpIsNobodysToDelete(t *testing.T) {
	for _, spec := range []options.Spec{{From: &options.Source{Volume: "web"}}, {Engine: "other", From: &options.Source{Volume: "web"}}} {
		for _, waits := range []bool{true, false} {
			s := newScene(t, t.TempDir(), "create")
			o := s.order
			assert.NilError(t, o.with(func(step, _ string) error {
				if step == "fill.clone" || step == "fill.create" {
					assert.NilError(t, os.Mkdir(s.path("new"), 0o755))
					s.write("new/page", "theirs")
				}
				return nil
			}, func(r *Root) error {
				var err error
				if waits {
					_, err = r.Create(t.Context(), "new", spec)
				} else {
					_, _, err = r.CreateBegin(t.Context(), "new", spec)
					assert.NilError(t, err)
					_, err = r.CreateFill(t.Context(), "new", nil)
				}
				assert.Assert(t, errdefs.IsConflict(err), "%v", err)
				if !waits {
					rec, err := r.Record("new")
					assert.NilError(t, err)
					assert.Equal(t, rec.Phase, Broken)
				}
				return r.Remove(t.Context(), "new")
			}))
			assert.DeepEqual(t, s.show(), []string{"loose new theirs", "snapshot web@old ready v1", "volume bystander ready mine", "volume web ready v2"})
		}
	}
}

// A directory on another file system can be copied, not moved.
func TestAdoptFromAnotherFileSystem(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	far := filepath.Join(mounttest.Tmpfs(t, 1<<20), "data")
	assert.NilError(t, os.Mkdir(far, 0o751))
	assert.NilError(t, os.WriteFile(filepath.Join(far, "page"), []byte("far"), 0o600))
	before := s.show()
	s.as("a", func(r *Root) {
		_, err := r.Adopt(t.Context(), "new", far, false, options.Spec{}, nil)
		assert.ErrorContains(t, err, "can only be copied")
		assert.DeepEqual(t, s.show(), before)
		rec, err := r.Adopt(t.Context(), "new", far, true, options.Spec{}, nil)
		assert.NilError(t, err)
		assert.Assert(t, !rec.Adopted)
		assert.Equal(t, rec.OnRemove, options.Trash)
		assert.Equal(t, s.content(s.path("new")), "far")
		info, err := os.Stat(s.path("new"))
		assert.NilError(t, err)
		assert.Equal(t, info.Mode().Perm(), os.FileMode(0o751))
	})
	assert.Equal(t, s.content(far), "far")
}

// Another host's volume goes away between the look at its directory and the record of
// the new one: then nothing is taken over.
func TestADirectoryThatGoesIsNotAdopted(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	assert.NilError(t, os.Mkdir(s.path("new"), 0o755))
	assert.NilError(t, s.order.with(func(step, _ string) error {
		if step == "create.claim" {
			return os.Remove(s.path("new"))
		}
		return nil
	}, func(r *Root) error {
		rec, err := r.Create(t.Context(), "new", options.Spec{})
		assert.NilError(t, err)
		assert.Assert(t, !rec.Adopted)
		assert.Equal(t, rec.OnRemove, options.Trash)
		return nil
	}))
}
