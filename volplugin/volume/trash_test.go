package volume

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/options"
)

func TestTheTrashIsListedRestoredAndPurged(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	s.as("a", func(r *Root) {
		ctx := t.Context()
		clock := s.order.Now
		r.Now = func() time.Time { return clock }
		keep := Span(time.Hour)
		_, err := r.Update(ctx, "web", func(rec *Record) error {
			rec.TrashKeep, rec.Labels = &keep, map[string]string{"a": "b"}
			return nil
		})
		assert.NilError(t, err)
		first, err := r.Record("web")
		assert.NilError(t, err)
		assert.NilError(t, r.Remove(ctx, "web"))
		clock = clock.Add(time.Minute)
		s.create(r, "web", "v3")
		assert.NilError(t, r.Remove(ctx, "web"))
		entries, err := r.Trash(ctx)
		assert.NilError(t, err)
		assert.Equal(t, len(entries), 2)
		assert.Equal(t, entries[1].ID, first.UUID)
		assert.Assert(t, entries[1].Expires.Equal(entries[1].Record.RemovedAt.Add(time.Hour)))
		assert.Assert(t, entries[0].Expires.Equal(entries[0].Record.RemovedAt.Add(TrashKeep)))

		rec, err := r.RestoreTrash(ctx, "web", "") // the newest
		assert.NilError(t, err)
		assert.Equal(t, s.content(s.path("web")), "v3")
		assert.Assert(t, rec.Source == nil && rec.RemovedAt == nil && rec.Phase == Ready)
		_, err = r.RestoreTrash(ctx, first.UUID, "")
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.NilError(t, os.Mkdir(s.path("dirty"), 0o700))
		_, err = r.RestoreTrash(ctx, first.UUID, "dirty")
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		rec, err = r.RestoreTrash(ctx, first.UUID, "site")
		assert.NilError(t, err)
		assert.Equal(t, rec.UUID, first.UUID)
		assert.DeepEqual(t, rec.Labels, first.Labels)
		assert.Equal(t, s.content(s.path("site")), "v2")
		_, err = r.Snapshot(ctx, "site", "old")
		assert.NilError(t, err)
		_, err = r.RestoreTrash(ctx, first.UUID, "again")
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)

		// Each is due at its own time.
		assert.NilError(t, r.Remove(ctx, "site"))
		assert.NilError(t, r.Remove(ctx, "bystander"))
		clock = clock.Add(time.Hour)
		names, err := r.Expire(ctx, TrashKeep)
		assert.NilError(t, err)
		assert.DeepEqual(t, names, []string{"site"})
		clock = clock.Add(TrashKeep)
		names, err = r.Expire(ctx, TrashKeep)
		assert.NilError(t, err)
		assert.DeepEqual(t, names, []string{"bystander"})
		_, err = r.PurgeTrash(ctx, "bystander")
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	})
	snaps, err := os.ReadDir(s.path(metaName, snapsName))
	assert.NilError(t, err)
	assert.Equal(t, len(snaps), 0)
}

// A host dies after it has claimed a removal and before it begins. The volume gets
// another name; what the claim would delete one day is not the volume's.
func TestAClaimedRemovalThatNeverBeganCostsNothing(t *testing.T) {
	s := newScene(t, t.TempDir(), "remove")
	for s.order.Die = 0; s.order.run(t); s.order.Die++ {
		if claims, err := filepath.Glob(s.path(".berth/trash/*.json")); err != nil || len(claims) > 0 {
			assert.NilError(t, err)
			break
		}
	}
	s.as("b", func(r *Root) {
		_, err := r.Rename(t.Context(), "web", "site")
		assert.NilError(t, err)
		r.Now = func() time.Time { return time.Now().Add(2 * TrashKeep) }
		names, err := r.Expire(t.Context(), TrashKeep)
		assert.NilError(t, err)
		assert.Equal(t, len(names), 0)
		entries, err := r.Trash(t.Context())
		assert.NilError(t, err)
		assert.Equal(t, len(entries), 0)
	})
	s.recover()
	assert.DeepEqual(t, s.show(), []string{"snapshot site@old ready v1", "volume bystander ready mine", "volume site ready v2"})
}

func TestKeptDataGetsItsSnapshotsBack(t *testing.T) {
	s := newScene(t, t.TempDir(), "remove keep")
	s.as("a", func(r *Root) {
		ctx := t.Context()
		old, err := r.Record("web")
		assert.NilError(t, err)
		assert.NilError(t, r.Remove(ctx, "web"))
		all, err := r.Snapshots(ctx, "")
		assert.NilError(t, err)
		assert.Equal(t, len(all), 1)
		assert.Assert(t, all[0].Kept && all[0].Volume == "web")
		data, done, err := r.OpenSnapshot(ctx, "web", "old")
		assert.NilError(t, err)
		assert.Equal(t, s.content(data.ProcPath()), "v1")
		assert.NilError(t, done())
		rec, err := r.Create(ctx, "web", options.Spec{Engine: "dir"})
		assert.NilError(t, err)
		assert.Equal(t, rec.UUID, old.UUID)
		assert.Assert(t, rec.Adopted)
		_, err = r.Rollback(ctx, "web", "old", nil)
		assert.NilError(t, err)
		assert.NilError(t, r.Remove(ctx, "web"))
		// The last snapshot takes with it what was left of the volume.
		list, err := r.Snapshots(ctx, "web")
		assert.NilError(t, err)
		assert.Equal(t, len(list), 2)
		for _, entry := range list {
			assert.NilError(t, r.RemoveSnapshot(ctx, "web", entry.Name))
		}
		_, err = r.Snapshots(ctx, "web")
		assert.ErrorIs(t, err, ErrNoRecord)
	})
	assert.DeepEqual(t, s.show(), []string{"loose web v1", "volume bystander ready mine"})
}

// The half-made records of a fuzzer's volumes must not reach outside either.
func FuzzTomb(f *testing.F) {
	f.Add([]byte(`{"schema":2,"name":"web"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := decode(data)
		if err != nil {
			return
		}
		assert.NilError(t, CheckName(rec.Name))
		assert.Assert(t, isUUID(rec.UUID))
		if rec.Rollback != nil && rec.Phase == RollingBack {
			assert.NilError(t, errors.Join(CheckSnapshotName(rec.Rollback.Snapshot), CheckSnapshotName(rec.Rollback.Keep)))
		}
		if rec.RenameTo != "" {
			assert.NilError(t, CheckName(rec.RenameTo))
		}
		_, err = rec.Encode()
		assert.NilError(t, err)
	})
}
