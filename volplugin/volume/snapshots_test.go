package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/options"
)

func TestSnapshotsAreNamedListedAndRead(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	s.order.Now = time.Date(2026, 11, 28, 17, 30, 0, 5, time.UTC)
	s.as("a", func(r *Root) {
		ctx := t.Context()
		var names []string
		for range 3 {
			snap, err := r.CreateSnapshot(ctx, "web", SnapshotOptions{Trigger: Scheduled, Labels: map[string]string{"a": "b"}}, nil)
			assert.NilError(t, err)
			names = append(names, snap.Name)
		}
		assert.DeepEqual(t, names, []string{"20261128T173000Z", "20261128T173000Z-2", "20261128T173000Z-3"})
		snap, err := r.Snapshot(ctx, "web", names[1])
		assert.NilError(t, err)
		assert.Equal(t, snap.Trigger, Scheduled)
		assert.Equal(t, snap.Consistency, engine.None)
		assert.Assert(t, snap.Files > 0 && snap.Bytes > 0)
		assert.DeepEqual(t, snap.Labels, map[string]string{"a": "b"})
		paused, err := r.CreateSnapshot(ctx, "web", SnapshotOptions{Name: "paused", Consistency: engine.Paused}, nil)
		assert.NilError(t, err)
		assert.Equal(t, paused.Consistency, engine.Paused)

		_, err = r.CreateSnapshot(ctx, "web", SnapshotOptions{Name: "old"}, nil)
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.ErrorContains(t, err, "there is a snapshot old already")
		for _, name := range []string{"../x", "a@b", ".volume", strings.Repeat("n", 101)} {
			assert.Assert(t, errdefs.IsInvalidArgument(second(r.CreateSnapshot(ctx, "web", SnapshotOptions{Name: name}, nil))), name)
			assert.Assert(t, errdefs.IsInvalidArgument(second(r.Snapshot(ctx, "web", name))), name)
		}
		_, err = r.Snapshot(ctx, "web", "none")
		assert.Assert(t, errdefs.IsNotFound(err) && errors.Is(err, ErrNoSnapshot), "%v", err)
		_, err = r.Snapshot(ctx, "none", "none")
		assert.Assert(t, errdefs.IsNotFound(err) && errors.Is(err, ErrNoRecord), "%v", err)

		_, err = r.CreateSnapshot(ctx, "bystander", SnapshotOptions{Name: "b"}, nil)
		assert.NilError(t, err)
		all, err := r.Snapshots(ctx, "")
		assert.NilError(t, err)
		assert.Equal(t, len(all), 6)
		assert.Equal(t, all[0].Volume, "bystander")
		of, err := r.Snapshots(ctx, "web")
		assert.NilError(t, err)
		assert.Equal(t, len(of), 5)

		data, done, err := r.OpenSnapshot(ctx, "web", "old")
		assert.NilError(t, err)
		assert.Equal(t, s.content(data.ProcPath()), "v1")
		assert.NilError(t, done())

		// A record that is damaged harms its snapshot alone.
		rec, err := r.Record("web")
		assert.NilError(t, err)
		s.write(".berth/snapshots/"+rec.UUID+"/old.json", "{")
		of, err = r.Snapshots(ctx, "web")
		assert.NilError(t, err)
		assert.Equal(t, len(of), 5)
		_, err = r.Snapshot(ctx, "web", "old")
		assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
		assert.Assert(t, errdefs.IsUnavailable(r.RemoveSnapshot(ctx, "web", "old")))
		assert.NilError(t, r.SettleSnapshots(ctx, "web"))
		assert.NilError(t, r.RemoveSnapshot(ctx, "web", names[0]))
	})
}

// Data without a record, as somebody may have put there, is nobody's to remove.
func TestASnapshotReplacesNothing(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	s.as("a", func(r *Root) {
		rec, err := r.Record("web")
		assert.NilError(t, err)
		foreign := s.path(metaName, snapsName, rec.UUID, "mine")
		assert.NilError(t, os.Mkdir(foreign, 0o700))
		assert.NilError(t, os.WriteFile(filepath.Join(foreign, "page"), []byte("mine"), 0o600))
		_, err = r.CreateSnapshot(t.Context(), "web", SnapshotOptions{Name: "mine"}, nil)
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.Equal(t, s.content(foreign), "mine")
		_, err = r.Snapshot(t.Context(), "web", "mine")
		assert.ErrorIs(t, err, ErrNoSnapshot)
	})
}

func TestCloneOfWhatIsGoneIsBrokenAndNeverEmpty(t *testing.T) {
	for _, from := range []string{"web", "web@old", "seed", "adopt"} {
		t.Run(from, func(t *testing.T) {
			s := newScene(t, t.TempDir(), "create")
			assert.NilError(t, os.Mkdir(s.path("src"), 0o755))
			s.write("src/page", "src")
			s.as("a", func(r *Root) {
				ctx := t.Context()
				spec := options.Spec{}
				switch from {
				case "seed":
					spec.Seed = "src"
				default:
					ref, err := ParseReference(from)
					assert.NilError(t, err)
					spec.From = &options.Source{Volume: ref.Volume, Snapshot: ref.Snapshot}
				}
				var rec Record
				var err error
				if from == "adopt" {
					rec, err = r.AdoptBegin(ctx, "new", s.path("src"), false, options.Spec{})
				} else {
					rec, _, err = r.CreateBegin(ctx, "new", spec)
				}
				assert.NilError(t, err)
				assert.Equal(t, rec.Phase, Restoring)
				assert.Assert(t, rec.Visible() && rec.Unfinished("a"))
				_, err = r.CreateSnapshot(ctx, "new", SnapshotOptions{}, nil)
				assert.Assert(t, errdefs.IsConflict(err), "%v", err)
				again, begun, err := r.CreateBegin(ctx, "new", options.Spec{})
				assert.NilError(t, err)
				assert.Equal(t, again.UUID, rec.UUID)
				assert.Assert(t, !begun)

				switch from {
				case "web":
					assert.NilError(t, r.Remove(ctx, "web"))
				case "web@old":
					assert.NilError(t, r.RemoveSnapshot(ctx, "web", "old"))
				default:
					assert.NilError(t, os.RemoveAll(s.path("src")))
				}
				// Ended, it is still restoring.
				ended, cancel := context.WithCancel(ctx)
				cancel()
				_, err = r.CreateFill(ended, "new", nil)
				assert.ErrorIs(t, err, context.Canceled)
				now, err := r.Record("new")
				assert.NilError(t, err)
				assert.Equal(t, now.Phase, Restoring)

				_, err = r.CreateFill(ctx, "new", nil)
				assert.ErrorContains(t, err, "gone")
				now, err = r.Record("new")
				assert.NilError(t, err)
				assert.Equal(t, now.Phase, Broken)
				assert.Assert(t, now.Visible() && strings.Contains(now.Reason, "gone"), now.Reason)
				for _, err := range []error{
					second(r.Create(ctx, "new", options.Spec{})),
					second(r.CreateFill(ctx, "new", nil)),
					second(r.Rename(ctx, "new", "newer")),
				} {
					assert.Assert(t, errdefs.IsConflict(err), "%v", err)
					assert.ErrorContains(t, err, "is broken: ")
				}
				assert.NilError(t, r.Settle(ctx, "new"))
				assert.NilError(t, r.Remove(ctx, "new"))
				_, err = r.Record("new")
				assert.ErrorIs(t, err, ErrNoRecord)
				_, err = os.Lstat(s.path("new"))
				assert.Assert(t, os.IsNotExist(err))
				assert.NilError(t, second(r.Create(ctx, "new", options.Spec{})))
			})
		})
	}
}

func TestPruneKeepsWhatUsersMade(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	s.as("a", func(r *Root) {
		ctx := t.Context()
		// After any clock that this test is run by, which has made the snapshot called old.
		clock := time.Date(2126, 11, 28, 17, 30, 0, 0, time.UTC)
		r.Now = func() time.Time { return clock }
		for range 4 {
			clock = clock.Add(time.Hour)
			_, err := r.CreateSnapshot(ctx, "web", SnapshotOptions{Trigger: Scheduled}, nil)
			assert.NilError(t, err)
		}
		_, err := r.Update(ctx, "web", func(rec *Record) error {
			rec.Keep = "2h"
			return nil
		})
		assert.NilError(t, err)
		rec, err := r.Record("web")
		assert.NilError(t, err)
		policy, err := rec.KeepPolicy()
		assert.NilError(t, err)
		names, err := r.PruneSnapshots(ctx, "web", policy, func(snap string) bool { return snap == "21261128T183000Z" })
		assert.NilError(t, err)
		assert.DeepEqual(t, names, []string{"21261128T193000Z"})
		list, err := r.Snapshots(ctx, "web")
		assert.NilError(t, err)
		assert.Equal(t, len(list), 4)
		assert.Equal(t, list[len(list)-1].Name, "21261128T213000Z")
		_, err = r.Snapshot(ctx, "web", "old")
		assert.NilError(t, err)
	})
}

func TestReferences(t *testing.T) {
	for in, want := range map[string]Reference{"web": {"web", ""}, "web@s": {"web", "s"}, "a.b@2026-1": {"a.b", "2026-1"}} {
		ref, err := ParseReference(in)
		assert.NilError(t, err)
		assert.Equal(t, ref, want)
		assert.Equal(t, ref.String(), in)
		assert.NilError(t, CheckReference(in))
	}
	for _, in := range []string{"", "@", "web@", "@s", "web@s@t", "web@.s", "web@" + strings.Repeat("n", 101), "../web@s", "web@../s"} {
		assert.Assert(t, errdefs.IsInvalidArgument(CheckReference(in)), in)
	}
	assert.Assert(t, errdefs.IsInvalidArgument(CheckName("web@s")))
}

func FuzzDecodeSnapshot(f *testing.F) {
	const id = "11111111-1111-4111-8111-111111111111"
	good, err := Snapshot{Schema: 1, Name: "s", UUID: id, Volume: "web", Engine: "dir", CreatedAt: time.Unix(1e9, 0), Phase: Ready, Host: "a", Trigger: Manual}.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte(`{"schema":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		snap, err := DecodeSnapshot(id, "s", data)
		if err != nil {
			assert.Assert(t, errors.Is(err, ErrDamaged) || errors.Is(err, ErrNewer), "%v", err)
			return
		}
		assert.Equal(t, snap.Name+snap.UUID, "s"+id)
		again, err := snap.Encode()
		assert.NilError(t, err)
		_, err = DecodeSnapshot(id, "s", again)
		assert.NilError(t, err)
	})
}

func FuzzParseReference(f *testing.F) {
	for _, seed := range []string{"web", "web@s", "@", "a@b@c", "", "../x@y"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := ParseReference(s)
		if err != nil {
			assert.Assert(t, errdefs.IsInvalidArgument(err))
			return
		}
		assert.Equal(t, ref.String(), s)
		assert.Equal(t, filepath.Join("/r", ref.Volume, ref.Snapshot+"x"), "/r/"+ref.Volume+"/"+ref.Snapshot+"x")
	})
}
