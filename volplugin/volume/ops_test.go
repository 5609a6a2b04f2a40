package volume

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/options"
)

func second[T any](_ T, err error) error { return err }

func TestProtectedVolumesStay(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	s.as("a", func(r *Root) {
		set := func(on bool) {
			_, err := r.Update(t.Context(), "web", func(rec *Record) error {
				rec.Protect = on
				return nil
			})
			assert.NilError(t, err)
		}
		set(true)
		before := s.show()
		for _, err := range []error{r.Remove(t.Context(), "web"), second(r.Rollback(t.Context(), "web", "old", nil))} {
			assert.Assert(t, errdefs.IsConflict(err), "%v", err)
			assert.ErrorContains(t, err, "protect=true")
		}
		assert.DeepEqual(t, s.show(), before)
		set(false)
		assert.NilError(t, second(r.Rollback(t.Context(), "web", "old", nil)))
		assert.NilError(t, r.Remove(t.Context(), "web"))
	})
}

func TestWrongSourcesLeaveNothing(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	outside := t.TempDir()
	assert.NilError(t, os.Symlink(outside, s.path("link")))
	assert.NilError(t, os.Mkdir(s.path("mnt"), 0o755))
	mounttest.Bind(t, outside, s.path("mnt"))
	before := s.show()
	s.as("a", func(r *Root) {
		for _, spec := range []options.Spec{
			{From: &options.Source{Volume: "none"}},
			{From: &options.Source{Volume: "web", Snapshot: "none"}},
			{From: &options.Source{Volume: "../web"}},
			{Seed: "none"}, {Seed: "web@none"}, {Seed: "link"}, {Seed: "mnt"}, {Seed: "link/x"},
			{Seed: ".berth"}, {Seed: ".berth/volumes"}, {Seed: ".."}, {Seed: "web/../web"}, {Seed: "/etc"}, {Seed: "web/page"},
		} {
			_, err := r.Create(t.Context(), "new", spec)
			assert.Assert(t, errdefs.IsInvalidArgument(err) || errdefs.IsConflict(err), "%+v: %v", spec, err)
		}
		for path, word := range map[string]string{
			s.path("link"): "symbolic link", s.path("mnt"): "mount point", s.path("web"): "data of volume web", s.order.Root: "own directory",
			s.path(".berth"): "own directory", s.path("web/page"): "directory", s.path("none"): "gone", "relative": "absolute", "/": "absolute",
			s.order.Root + "/web/../src": "absolute", filepath.Join(s.path("link"), "x"): "symbolic link",
		} {
			for _, copied := range []bool{false, true} {
				_, err := r.Adopt(t.Context(), "new", path, copied, options.Spec{}, nil)
				assert.ErrorContains(t, err, word, path)
				assert.Assert(t, fault.Kind(err) != "internal", "%s: %v", path, err)
			}
		}
		_, err := r.Adopt(t.Context(), "web", outside, true, options.Spec{}, nil)
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		_, err = r.Adopt(t.Context(), "new", outside, false, options.Spec{Engine: "other"}, nil)
		assert.ErrorContains(t, err, "only be copied")
	})
	assert.DeepEqual(t, s.show(), before)
}

func TestRenameRefusesWhatIsTaken(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	assert.NilError(t, os.Mkdir(s.path("dirty"), 0o700))
	s.as("a", func(r *Root) {
		before := s.show()
		for _, to := range []string{"bystander", "dirty"} {
			_, err := r.Rename(t.Context(), "web", to)
			assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		}
		_, err := r.Rename(t.Context(), "web", "a@b")
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		_, err = r.Rename(t.Context(), "none", "new")
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
		assert.DeepEqual(t, s.show(), before)
		rec, err := r.Rename(t.Context(), "web", "web")
		assert.NilError(t, err)
		assert.Equal(t, rec.Phase, Ready)
	})
}

// An old root has no directories for snapshots and images.
func TestARootOfAnEarlierVersionWorks(t *testing.T) {
	path := t.TempDir()
	openRoot(t, location(path, "a"))
	for _, name := range []string{imagesName, snapsName} {
		assert.NilError(t, os.Remove(filepath.Join(path, metaName, name)))
	}
	assert.NilError(t, os.Mkdir(filepath.Join(path, "web"), 0o755))
	record := `{"schema":1,"uuid":"11111111-1111-4111-8111-111111111111","name":"web","engine":"dir","phase":"ready","created":"2026-01-02T03:04:05Z","on-remove":"trash","options":{"mode":"0750"}}`
	assert.NilError(t, os.WriteFile(filepath.Join(path, ".berth/volumes/web.json"), []byte(record), 0o600))
	r := openRoot(t, location(path, "a"))
	rec, err := r.Record("web")
	assert.NilError(t, err)
	assert.Equal(t, rec.Schema, 2)
	_, err = r.CreateSnapshot(t.Context(), "web", SnapshotOptions{}, nil)
	assert.NilError(t, err)
	for _, name := range []string{imagesName, snapsName} {
		info, err := os.Stat(filepath.Join(path, metaName, name))
		assert.NilError(t, err)
		assert.Equal(t, info.Mode().Perm(), os.FileMode(0o700))
	}
	assert.NilError(t, r.Remove(t.Context(), "web"))
}

// Data that somebody deleted by hand does not come back, and nothing takes its place.
func TestAVolumeWithoutDataCanBeRemoved(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	assert.NilError(t, os.RemoveAll(s.path("web")))
	s.as("a", func(r *Root) {
		ctx := t.Context()
		rec, err := r.Record("web")
		assert.NilError(t, err)
		_, err = r.Data(rec)
		assert.ErrorContains(t, err, "is missing")
		for _, err := range []error{
			second(r.CreateSnapshot(ctx, "web", SnapshotOptions{}, nil)),
			second(r.Rename(ctx, "web", "site")),
			second(r.Rollback(ctx, "web", "old", nil)),
			second(r.Create(ctx, "new", options.Spec{From: &options.Source{Volume: "web"}})),
		} {
			assert.Assert(t, err != nil)
		}
		_, err = r.Record("new")
		assert.ErrorIs(t, err, ErrNoRecord)
		rec, err = r.Record("web")
		assert.NilError(t, err)
		assert.Equal(t, rec.Phase, Ready)
		_, err = os.Lstat(s.path("web"))
		assert.Assert(t, os.IsNotExist(err))
		clone, err := r.Create(ctx, "saved", options.Spec{From: &options.Source{Volume: "web", Snapshot: "old"}})
		assert.NilError(t, err)
		assert.Equal(t, clone.Phase, Ready)

		assert.NilError(t, r.Remove(ctx, "web"))
		_, err = r.RestoreTrash(ctx, "web", "")
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
		_, err = r.Record("web")
		assert.ErrorIs(t, err, ErrNoRecord)
		_, err = r.PurgeTrash(ctx, "web")
		assert.NilError(t, err)
	})
	assert.DeepEqual(t, s.show(), []string{"volume bystander ready mine", "volume saved ready v1"})
}
