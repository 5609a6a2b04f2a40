package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/options"
)

// played is an engine that says of itself what a test wants.
type played struct {
	engine.Engine
	name string
	able engine.Abilities
	err  error
}

func (p played) Name() string { return p.name }

func (p played) Probe(context.Context, engine.Place) (engine.Abilities, error) {
	return p.able, p.err
}

// Find of an engine that keeps nothing in directories.
func (p played) Find(place engine.Place, name string) (bool, error) {
	if p.name == imageName {
		_, err := place.Images.Stat(name + ".img")
		return err == nil, nil
	}
	return p.Engine.Find(place, name)
}

func TestTheEngineIsChosen(t *testing.T) {
	limit := engine.Abilities{FileSystem: "btrfs", Limit: true, Instant: true}
	plain := engine.Abilities{FileSystem: "ext4"}
	noBtrfs := played{name: "btrfs", err: errors.New("ext4 has no subvolumes")}
	noReflink := played{name: "reflink", err: errors.New("ext4 shares no data")}
	onDir := played{name: "dir", able: plain}
	image := played{name: "image", able: engine.Abilities{FileSystem: "ext4", Limit: true, Exclusive: true}}
	noImage := played{name: "image", err: errors.New("there are no loop devices")}
	for _, tc := range []struct {
		name    string
		engines []played
		there   string
		spec    options.Spec
		want    string
		reason  string
		refused []string
	}{
		{name: "btrfs first", engines: []played{onDir, {name: "btrfs", able: limit}, image}, want: "btrfs", reason: "the best that btrfs can do"},
		{name: "then reflink", engines: []played{noBtrfs, onDir, {name: "reflink", able: engine.Abilities{FileSystem: "xfs"}}}, want: "reflink", reason: "the best that xfs can do"},
		{name: "then dir", engines: []played{noBtrfs, noReflink, onDir, image}, want: "dir"},
		{name: "nothing", engines: []played{noBtrfs}, refused: []string{"ext4 has no subvolumes"}},
		{name: "a size on btrfs", engines: []played{{name: "btrfs", able: limit}, image}, spec: options.Spec{Size: 1 << 30}, want: "btrfs"},
		{name: "a size on ext4", engines: []played{noBtrfs, noReflink, onDir, image}, spec: options.Spec{Size: 1 << 30}, want: "image", reason: "no size can be enforced for directories on ext4"},
		{name: "a size without images", engines: []played{noBtrfs, onDir, noImage}, spec: options.Spec{Size: 1 << 30}, refused: []string{"size=1G", "ext4", "there are no loop devices", "btrfs"}},
		{name: "a size and no engine image", engines: []played{onDir}, spec: options.Spec{Size: 1 << 30}, refused: []string{"size=1G", "no engine image"}},
		{name: "a size for a directory that is there", engines: []played{onDir, image}, there: "new", spec: options.Spec{Size: 1 << 30}, refused: []string{"is there already"}},
		{name: "a file system", engines: []played{{name: "btrfs", able: limit}, image}, spec: options.Spec{FS: "xfs"}, want: "image", reason: "asked for by option fs or sparse"},
		{name: "a file system without images", engines: []played{onDir}, spec: options.Spec{FS: "xfs"}, refused: []string{"fs and sparse"}},
		{name: "data of an image that was kept", engines: []played{onDir, image}, there: ".berth/images/new.img", want: "image", reason: "its data was there already"},
		{name: "asked for", engines: []played{{name: "btrfs", able: limit}, onDir}, spec: options.Spec{Engine: "dir"}, want: "dir", reason: "asked for"},
		{name: "asked for in vain", engines: []played{noBtrfs, onDir}, spec: options.Spec{Engine: "btrfs"}, refused: []string{"engine=btrfs", "ext4 has no subvolumes"}},
		{name: "asked for and not here", engines: []played{onDir}, spec: options.Spec{Engine: "thin"}, refused: []string{`engine="thin"`, "auto, dir"}},
		{name: "asked for with a size", engines: []played{onDir}, spec: options.Spec{Engine: "dir", Size: 1 << 30}, refused: []string{"size=1G", "dir", "engine=image"}},
		{name: "shared all the same", engines: []played{image}, spec: options.Spec{Engine: "image", Given: map[string]string{"exclusive": "false"}}, refused: []string{"exclusive=false"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := t.TempDir()
			var have Engines
			for _, p := range tc.engines {
				p.Engine = treeengine.New(copying.Dir())
				have = append(have, p)
			}
			r := openRoot(t, Location{Path: path, Engines: have, Host: "a", Now: time.Now})
			if tc.there != "" {
				assert.NilError(t, os.MkdirAll(filepath.Join(path, tc.there), 0o700))
			}
			if tc.spec.Given == nil {
				tc.spec.Given = map[string]string{}
			}
			if tc.spec.Size > 0 {
				tc.spec.Given["size"] = "1G"
			}
			p, err := r.place()
			assert.NilError(t, err)
			rec, _, err := r.plan(t.Context(), p, "new", tc.spec)
			if tc.refused != nil {
				assert.Assert(t, err != nil, "it chose %s", rec.Engine)
				for _, want := range tc.refused {
					assert.ErrorContains(t, err, want)
				}
				assert.Assert(t, fault.Kind(err) != "internal", "%v", err)
				return
			}
			assert.NilError(t, err)
			assert.Equal(t, rec.Engine, tc.want)
			if tc.reason != "" {
				assert.Equal(t, rec.EngineReason, tc.reason)
			}
			assert.Equal(t, rec.Exclusive, rec.Engine == "image")
		})
	}
}

func TestAVolumeOfAnUnknownEngineIsListedAndRefused(t *testing.T) {
	s := newScene(t, t.TempDir(), "create")
	s.as("a", func(r *Root) {
		_, err := r.Create(t.Context(), "far", options.Spec{Engine: "other"})
		assert.NilError(t, err)
		assert.NilError(t, r.Remove(t.Context(), "bystander"))
	})
	r := openRoot(t, Location{Path: s.order.Root, Engines: Engines{treeengine.New(copying.Dir())}, Host: "a", Now: time.Now})
	entries, err := r.Entries(t.Context(), nil)
	assert.NilError(t, err)
	rec := entries["far"].Record
	assert.Equal(t, rec.Engine, "other")
	ctx := t.Context()
	for call, err := range map[string]error{
		"attach":   r.Attach(ctx, rec),
		"data":     second(r.Data(rec)),
		"usage":    second(r.Usage(ctx, rec)),
		"snapshot": second(r.CreateSnapshot(ctx, "far", SnapshotOptions{}, nil)),
		"rename":   second(r.Rename(ctx, "far", "farther")),
		"resize":   second(r.Resize(ctx, "far", 1)),
		"remove":   r.Remove(ctx, "far"),
		"clone":    second(r.Create(ctx, "clone", options.Spec{From: &options.Source{Volume: "far"}})),
	} {
		assert.Assert(t, errdefs.IsUnavailable(err), "%s: %v", call, err)
		assert.ErrorContains(t, err, `engine "other"`, call)
	}
	now, err := r.Record("far")
	assert.NilError(t, err)
	assert.Equal(t, now.Phase, Ready)
}

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

// full fills a file system until that many bytes are left.
func full(t *testing.T, path string, left uint64) {
	t.Helper()
	file, err := os.Create(filepath.Join(path, "filler"))
	assert.NilError(t, err)
	defer file.Close()
	var st unix.Statfs_t
	assert.NilError(t, unix.Statfs(path, &st))
	assert.NilError(t, unix.Fallocate(int(file.Fd()), 0, 0, int64(st.Bavail*uint64(st.Bsize)-left)))
}

// When there is hardly any room the trash goes first, and no snapshot is made when that
// is not enough. What is there already stays whole.
func TestRoomIsMadeFromTheTrash(t *testing.T) {
	path := mounttest.Disk(t, "ext4", 64<<20, "-m", "0", "-N", "2048")
	r := openRoot(t, location(path, "a"))
	ctx := t.Context()
	clock := time.Now()
	r.Now = func() time.Time { return clock }
	for _, name := range []string{"oldest", "old", "web"} {
		_, err := r.Create(ctx, name, options.Spec{})
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(filepath.Join(path, name, "page"), make([]byte, 4<<20), 0o600))
		if name != "web" {
			assert.NilError(t, r.Remove(ctx, name))
		}
		clock = clock.Add(time.Minute)
	}
	assert.NilError(t, unix.Syncfs(r.top.FD()))
	space, err := r.Space()
	assert.NilError(t, err)
	assert.Equal(t, space.Floor, space.Total/50)
	full(t, path, space.Floor-200<<10)
	assert.NilError(t, r.MakeRoom(ctx))
	entries, err := r.Trash(ctx)
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 1)
	assert.Equal(t, entries[0].Record.Name, "old")

	assert.NilError(t, os.Remove(filepath.Join(path, "filler")))
	full(t, path, 100<<10)
	// A snapshot has the trash emptied by itself.
	_, err = r.CreateSnapshot(ctx, "web", SnapshotOptions{Name: "s"}, nil)
	assert.NilError(t, err)
	entries, err = r.Trash(ctx)
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 0)
	assert.NilError(t, r.RemoveSnapshot(ctx, "web", "s"))

	assert.NilError(t, os.Remove(filepath.Join(path, "filler")))
	full(t, path, 100<<10)
	for call, fn := range map[string]func() error{
		"snapshot": func() error { return second(r.CreateSnapshot(ctx, "web", SnapshotOptions{}, nil)) },
		"clone": func() error {
			return second(r.Create(ctx, "new", options.Spec{From: &options.Source{Volume: "web"}}))
		},
	} {
		err := fn()
		assert.Assert(t, errdefs.IsResourceExhausted(err), "%s: %v", call, err)
		assert.ErrorContains(t, err, "must stay free")
	}
}

// On a full disk nothing is left half made and no record is empty.
func TestAFullDiskLeavesNothingHalfMade(t *testing.T) {
	path := mounttest.Disk(t, "ext4", 64<<20, "-m", "0", "-N", "2048")
	r := openRoot(t, location(path, "a"))
	ctx := t.Context()
	_, err := r.Create(ctx, "web", options.Spec{})
	assert.NilError(t, err)
	for i := range 8 {
		assert.NilError(t, os.WriteFile(filepath.Join(path, "web", fmt.Sprint(i)), make([]byte, 1<<20), 0o600))
	}
	_, err = r.CreateSnapshot(ctx, "web", SnapshotOptions{Name: "old"}, nil)
	assert.NilError(t, err)
	assert.NilError(t, unix.Syncfs(r.top.FD()))
	full(t, path, 3<<20) // above the floor, below the volume's size
	sound := func() {
		t.Helper()
		files, err := filepath.Glob(filepath.Join(path, ".berth/*/*.json"))
		assert.NilError(t, err)
		more, err := filepath.Glob(filepath.Join(path, ".berth/*/*/*.json"))
		assert.NilError(t, err)
		for _, file := range append(files, more...) {
			info, err := os.Stat(file)
			assert.NilError(t, err)
			assert.Assert(t, info.Size() > 0, "%s is empty", file)
		}
		tops, err := os.ReadDir(path)
		assert.NilError(t, err)
		var names []string
		for _, top := range tops {
			names = append(names, top.Name())
		}
		assert.DeepEqual(t, slices.DeleteFunc(names, func(name string) bool { return name == "lost+found" || name == "filler" }), []string{".berth", "web"})
		assert.DeepEqual(t, leftIn(t, path), []string(nil))
		rec, err := r.Record("web")
		assert.NilError(t, err)
		assert.Equal(t, rec.Phase, Ready)
		list, err := r.Snapshots(ctx, "web")
		assert.NilError(t, err)
		assert.Equal(t, len(list), 1)
	}
	for call, fn := range map[string]func() error{
		"snapshot": func() error { return second(r.CreateSnapshot(ctx, "web", SnapshotOptions{}, nil)) },
		"clone": func() error {
			return second(r.Create(ctx, "new", options.Spec{From: &options.Source{Volume: "web"}}))
		},
		"seed": func() error { return second(r.Create(ctx, "new", options.Spec{Seed: "web"})) },
		"adopt": func() error {
			return second(r.Adopt(ctx, "new", filepath.Join(path, "web"), true, options.Spec{}, nil))
		},
		"rollback": func() error { return second(r.Rollback(ctx, "web", "old", nil)) },
	} {
		err := fn()
		if call == "adopt" {
			assert.Assert(t, errdefs.IsConflict(err), "%s: %v", call, err)
			continue
		}
		assert.Assert(t, errdefs.IsResourceExhausted(err), "%s: %v", call, err)
		sound()
	}
	// To the last block.
	var st unix.Statfs_t
	assert.NilError(t, unix.Statfs(path, &st))
	for i := 0; ; i++ {
		file, err := os.Create(filepath.Join(path, "web", fmt.Sprintf("fill%d", i)))
		if err == nil {
			_, err = file.Write(make([]byte, 4096))
			err = errors.Join(err, file.Sync(), file.Close())
		}
		if err != nil {
			break
		}
	}
	for call, fn := range map[string]func() error{
		"create": func() error { return second(r.Create(ctx, "new", options.Spec{})) },
		"update": func() error {
			return second(r.Update(ctx, "web", func(rec *Record) error {
				rec.Labels = map[string]string{"a": strings.Repeat("b", 8192)}
				return nil
			}))
		},
	} {
		if err := fn(); err != nil {
			assert.Assert(t, errdefs.IsResourceExhausted(err), "%s: %v", call, err)
		}
		_ = r.Remove(ctx, "new") // when there was room for it after all
		_, err = r.Record("web")
		assert.NilError(t, err)
	}
	assert.NilError(t, os.Remove(filepath.Join(path, "filler")))
	_, err = r.Rollback(ctx, "web", "old", nil)
	assert.NilError(t, err)
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
