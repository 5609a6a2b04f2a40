package volume

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/btrfs"
	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/engine/image"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/options"
)

// pages reads and writes files of volumes through their engine, as a container would.
type pages struct {
	t *testing.T
	*Root
}

func (p pages) within(name string, fn func(path string)) {
	p.t.Helper()
	rec, err := p.Record(name)
	assert.NilError(p.t, err)
	release, err := p.hold(p.t.Context(), rec)
	assert.NilError(p.t, err)
	data, err := p.Data(rec)
	assert.NilError(p.t, err)
	fn(filepath.Join(data.ProcPath(), "page"))
	assert.NilError(p.t, data.Close())
	assert.NilError(p.t, release())
}

func (p pages) write(name, content string) {
	p.t.Helper()
	p.within(name, func(path string) { assert.NilError(p.t, os.WriteFile(path, []byte(content), 0o600)) })
}

func (p pages) is(name, content string) {
	p.t.Helper()
	p.within(name, func(path string) {
		got, err := os.ReadFile(path)
		assert.NilError(p.t, err)
		assert.Equal(p.t, string(got), content, name)
	})
}

// A volume in an image goes through the same life as a directory, on a file system that
// knows neither limits nor snapshots.
func TestTheLifeOfAnImage(t *testing.T) {
	path := t.TempDir()
	kinds := map[filesystem.Kind]engine.Trees{filesystem.Btrfs: btrfs.Trees{}, filesystem.Ext4: copying.Dir()}
	r := openRoot(t, Location{Path: path, Engines: Engines{treeengine.New(copying.Dir()), image.New(kinds)}, Local: t.TempDir(), Host: "a", Now: time.Now})
	ctx := t.Context()
	for _, fs := range []string{"btrfs", "ext4"} {
		t.Run(fs, func(t *testing.T) {
			p := pages{t, r}
			const size = 256 << 20
			spec := options.Spec{Size: size, FS: fs, Sparse: true, Given: map[string]string{"size": "256M"}}
			rec, err := r.Create(ctx, "web", spec)
			assert.NilError(t, err)
			assert.Equal(t, rec.Engine, "image")
			assert.Assert(t, rec.Exclusive)
			p.write("web", "v1")
			_, err = r.CreateSnapshot(ctx, "web", SnapshotOptions{Name: "old"}, nil)
			assert.NilError(t, err)
			p.write("web", "v2")

			clone, err := r.Create(ctx, "clone", options.Spec{From: &options.Source{Volume: "web", Snapshot: "old"}})
			assert.NilError(t, err)
			assert.Equal(t, clone.Engine, "image")
			assert.Equal(t, clone.Size, uint64(size))
			p.is("clone", "v1")
			plain, err := r.Create(ctx, "plain", options.Spec{Engine: "dir", From: &options.Source{Volume: "web"}})
			assert.NilError(t, err)
			assert.Equal(t, plain.Engine, "dir")
			p.is("plain", "v2")
			uid := uint32(1000)
			back, err := r.Create(ctx, "back", options.Spec{Engine: "image", Size: size, FS: fs, Sparse: true, UID: &uid, From: &options.Source{Volume: "plain"}})
			assert.NilError(t, err)
			assert.Equal(t, back.Engine, "image")
			p.is("back", "v2")

			done, err := r.Rollback(ctx, "web", "old", nil)
			assert.NilError(t, err)
			p.is("web", "v1")
			_, err = r.Rollback(ctx, "web", done.Kept.Name, nil)
			assert.NilError(t, err)
			p.is("web", "v2")
			data, end, err := r.OpenSnapshot(ctx, "web", "old")
			assert.NilError(t, err)
			got, err := os.ReadFile(filepath.Join(data.ProcPath(), "page"))
			assert.NilError(t, err)
			assert.Equal(t, string(got), "v1")
			assert.NilError(t, end())

			_, err = r.Rename(ctx, "web", "site")
			assert.NilError(t, err)
			p.is("site", "v2")
			rec, err = r.Record("site")
			assert.NilError(t, err)
			if fs == "btrfs" { // growing ext4 takes CAP_SYS_RESOURCE, which not every machine gives
				rec, err = r.Resize(ctx, "site", 2*size)
				assert.NilError(t, err)
				usage, err := r.Usage(ctx, rec)
				assert.NilError(t, err)
				assert.Assert(t, usage.Limit > size, "%+v", usage)
			}

			assert.NilError(t, r.Remove(ctx, "site"))
			_, err = r.RestoreTrash(ctx, "site", "web")
			assert.NilError(t, err)
			p.is("web", "v2")
			list, err := r.Snapshots(ctx, "web")
			assert.NilError(t, err)
			assert.Equal(t, len(list), 3)
			assert.NilError(t, r.RemoveSnapshot(ctx, "web", "old"))

			// Kept, it is found again and with its snapshots.
			_, err = r.Update(ctx, "web", func(rec *Record) error {
				rec.OnRemove = options.Keep
				return nil
			})
			assert.NilError(t, err)
			assert.NilError(t, r.Remove(ctx, "web"))
			again, err := r.Create(ctx, "web", options.Spec{OnRemove: &purge})
			assert.NilError(t, err)
			assert.Equal(t, again.Engine, "image")
			assert.Equal(t, again.UUID, rec.UUID)
			p.is("web", "v2")

			for _, name := range []string{"web", "clone", "plain", "back"} {
				assert.NilError(t, r.Remove(ctx, name))
				_, err := r.PurgeTrash(ctx, name)
				assert.Assert(t, err == nil || errdefs.IsNotFound(err), "%v", err)
			}
			for _, dir := range []string{imagesName, snapsName, trashName, volumesName} {
				left, err := os.ReadDir(filepath.Join(path, metaName, dir))
				assert.NilError(t, err)
				assert.Equal(t, len(left), 0, "%s: %v", dir, left)
			}
			local, err := os.ReadDir(r.Local)
			assert.NilError(t, err)
			assert.Equal(t, len(local), 0, "%v", local)
		})
	}
}

var purge = options.Purge
