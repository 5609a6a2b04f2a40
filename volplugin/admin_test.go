package volplugin

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/volplugin/schedule"
)

func quiet(control.Progress) {}

// put writes a file into a volume as a container does.
func (h *host) put(name, file, content string) {
	h.t.Helper()
	path, err := h.mount(name, "put")
	assert.NilError(h.t, err)
	write(h.t, filepath.Join(path, file), content)
	assert.NilError(h.t, h.unmount(name, "put"))
}

// content reads it.
func (h *host) content(name, file string) string {
	h.t.Helper()
	path, err := h.mount(name, "content")
	assert.NilError(h.t, err)
	text := read(h.t, filepath.Join(path, file))
	assert.NilError(h.t, h.unmount(name, "content"))
	return text
}

func (h *host) snapshots(name string) []string {
	h.t.Helper()
	list, err := h.Snapshots(h.t.Context(), name)
	assert.NilError(h.t, err)
	names := []string{}
	for _, snap := range list {
		assert.Equal(h.t, snap.Error, "")
		names = append(names, snap.Name)
	}
	return names
}

func TestSnapshotIsAVolumeThatCanBeRead(t *testing.T) {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.create("web"))
	h.put("web", "f", "one")
	snap, err := h.CreateSnapshot(t.Context(), control.SnapshotRequest{Volume: "web", Name: "s1"}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, snap.Consistency, control.ConsistencyNone)
	_, err = h.CreateSnapshot(t.Context(), control.SnapshotRequest{Volume: "web", Name: "s1"}, quiet)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	h.put("web", "f", "two")
	assert.Equal(t, h.status("web")["snapshots"], 1.0)

	assert.DeepEqual(t, h.list(), []string{"web"})
	assert.Equal(t, h.status("web@s1")["snapshot-of"], "web")
	_, err = h.get("web@s2")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	_, err = h.get("none@s1")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	for _, err := range []error{h.create("web@s3"), h.remove("web@s1")} {
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}

	path, err := h.mount("web@s1", "id")
	assert.NilError(t, err)
	assert.Equal(t, read(t, filepath.Join(path, "f")), "one")
	err = os.WriteFile(filepath.Join(path, "g"), nil, 0o600)
	assert.ErrorContains(t, err, "read-only")
	err = h.RemoveSnapshot(t.Context(), control.SnapshotRef{Volume: "web", Name: "s1"}, quiet)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	// What is mounted is whoever's who asks after a restart.
	h.restart()
	assert.Equal(t, read(t, filepath.Join(path, "f")), "one")
	assert.NilError(t, h.unmount("web@s1", "id"))
	assert.DeepEqual(t, h.mountsBelow(), []string(nil))
	assert.NilError(t, h.RemoveSnapshot(t.Context(), control.SnapshotRef{Volume: "web", Name: "s1"}, quiet))
	assert.DeepEqual(t, h.snapshots("web"), []string{})
}

func TestRollbackWantsAVolumeThatNobodyUses(t *testing.T) {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.create("web"))
	h.put("web", "f", "one")
	_, err := h.CreateSnapshot(t.Context(), control.SnapshotRequest{Volume: "web", Name: "s1"}, quiet)
	assert.NilError(t, err)
	h.put("web", "f", "two")
	path, err := h.mount("web", "user")
	assert.NilError(t, err)
	_, err = h.RollbackVolume(t.Context(), control.RollbackRequest{Volume: "web", Snapshot: "s1"}, quiet)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.Equal(t, read(t, filepath.Join(path, "f")), "two")
	assert.NilError(t, h.unmount("web", "user"))
	done, err := h.RollbackVolume(t.Context(), control.RollbackRequest{Volume: "web", Snapshot: "s1"}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, h.content("web", "f"), "one")
	assert.Equal(t, h.content("web@"+done.Kept.Name, "f"), "two")
}

func TestClonesRenamesAndTheTrash(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web", "label.app=shop"))
	h.put("web", "f", "one")
	clone, err := h.CloneVolume(t.Context(), control.CloneRequest{Volume: "web", Name: "copy"}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, clone.State, control.VolumeReady)
	assert.Equal(t, h.content("copy", "f"), "one")
	_, err = h.CloneVolume(t.Context(), control.CloneRequest{Volume: "web", Name: "copy"}, quiet)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	_, err = h.CloneVolume(t.Context(), control.CloneRequest{Volume: "web", Snapshot: "none", Name: "more"}, quiet)
	assert.ErrorContains(t, err, "no snapshot none")
	assert.DeepEqual(t, h.list(), []string{"copy", "web"})

	assert.NilError(t, h.create("third", "from=web"))
	assert.Equal(t, h.content("third", "f"), "one")

	_, err = h.CreateSnapshot(t.Context(), control.SnapshotRequest{Volume: "copy", Name: "s1"}, quiet)
	assert.NilError(t, err)
	_, err = h.RenameVolume(t.Context(), control.RenameRequest{Volume: "copy", Name: "web"})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	_, err = h.RenameVolume(t.Context(), control.RenameRequest{Volume: "copy", Name: "moved"})
	assert.NilError(t, err)
	_, err = h.get("copy")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.Equal(t, h.content("moved@s1", "f"), "one")

	assert.NilError(t, h.remove("moved"))
	entries, err := h.Trash(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 1)
	assert.Equal(t, entries[0].Name, "moved")
	assert.NilError(t, h.create("moved"))
	_, err = h.RestoreTrash(t.Context(), control.RestoreTrashRequest{UUID: entries[0].UUID})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	_, err = h.RestoreTrash(t.Context(), control.RestoreTrashRequest{UUID: entries[0].UUID, Name: "back"})
	assert.NilError(t, err)
	assert.Equal(t, h.content("back", "f"), "one")
	assert.DeepEqual(t, h.snapshots("back"), []string{"s1"})

	assert.NilError(t, h.remove("back"))
	report, err := h.PurgeTrash(t.Context(), control.PurgeTrashRequest{All: true}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, len(report.Purged), 1)
	left, err := filepath.Glob(filepath.Join(root, ".berth", "[st][nr]a*", "*"))
	assert.NilError(t, err)
	assert.DeepEqual(t, left, []string(nil))
}

func TestProtectionAndLabelsCanBeChanged(t *testing.T) {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.create("web", "protect=true"))
	assert.ErrorContains(t, h.remove("web"), "protect")
	for _, wrong := range []map[string]string{{"size": "1G"}, {"protect": "perhaps"}, {"snapshot.schedule": "now"}, {}} {
		_, err := h.UpdateVolume(t.Context(), control.UpdateRequest{Volume: "web", Set: wrong})
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v: %v", wrong, err)
	}
	v, err := h.UpdateVolume(t.Context(), control.UpdateRequest{Volume: "web", Set: map[string]string{"protect": "", "label.app": "shop"}})
	assert.NilError(t, err)
	assert.DeepEqual(t, v.Labels, map[string]string{"app": "shop"})
	assert.NilError(t, h.remove("web"))
}

// A clone whose caller hangs up leaves nothing.
func TestCloneThatIsGivenUpLeavesNothing(t *testing.T) {
	var once sync.Once
	ctx, hangUp := context.WithCancel(t.Context())
	defer hangUp()
	root := t.TempDir()
	h := newHost(t, root, func(c *Config) {
		c.step = func(step, volume string) error {
			if step == "fill.clone" {
				once.Do(func() {
					hangUp()
					time.Sleep(500 * time.Millisecond) // for the caller to give it up
				})
			}
			return nil
		}
	})
	assert.NilError(t, h.create("web"))
	for i := range 200 {
		write(t, filepath.Join(root, "web", fmt.Sprint(i)), "x")
	}
	_, err := h.CloneVolume(ctx, control.CloneRequest{Volume: "web", Name: "copy"}, quiet)
	assert.ErrorIs(t, err, context.Canceled)
	assert.DeepEqual(t, h.list(), []string{"web"})
	_, err = os.Stat(filepath.Join(root, "copy"))
	assert.Assert(t, os.IsNotExist(err), "%v", err)
	assert.NilError(t, h.create("copy"))
}

// Two scheduled runs of one moment are one snapshot, as those of two hosts are.
func TestScheduledSnapshotsAreMadeOnceAndPruned(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	h := newHost(t, t.TempDir(), func(c *Config) { c.Now = func() time.Time { return now } })
	assert.NilError(t, h.create("web", "snapshot.schedule=@hourly", "snapshot.keep=2"))
	rec := h.ledger.view(homeKey, "web").Record
	assert.Equal(t, len(h.jobs()), 1)
	_, err := h.CreateSnapshot(t.Context(), control.SnapshotRequest{Volume: "web", Name: "mine"}, quiet)
	assert.NilError(t, err)
	for range 4 {
		now = now.Add(time.Hour)
		for range 2 {
			assert.NilError(t, h.snapshotDue(t.Context(), schedule.Job{UUID: rec.UUID, Due: now}))
		}
	}
	assert.DeepEqual(t, h.snapshots("web"), []string{"mine", "20260501T150000Z", "20260501T160000Z"})
	assert.NilError(t, h.remove("web"))
	assert.Equal(t, len(h.jobs()), 0)
	assert.NilError(t, h.snapshotDue(t.Context(), schedule.Job{UUID: rec.UUID, Due: now}))
}

func TestUsageIsMeasured(t *testing.T) {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.create("web"))
	h.put("web", "f", "some text")
	report, err := h.VolumeUsage(t.Context(), control.UsageRequest{}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, len(report.Volumes), 1)
	assert.Equal(t, report.Volumes[0].Error, "")
	assert.Assert(t, report.Volumes[0].Used >= 4096 && report.Volumes[0].Files >= 1, "%+v", report.Volumes[0])
	assert.Assert(t, report.Roots[0].Size > report.Roots[0].Free && report.Roots[0].Free > 0, "%+v", report.Roots)
	shown, err := h.Volume(t.Context(), "web")
	assert.NilError(t, err)
	assert.Equal(t, shown.Used, report.Volumes[0].Used)
}

func TestMetricsCountWhatIsThere(t *testing.T) {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.create("web", "snapshot.schedule=@hourly"))
	assert.NilError(t, h.create("db"))
	_, err := h.mount("db", "id")
	assert.NilError(t, err)
	const want = `# HELP berth_volumes_mounted Volumes and snapshots that containers of this host have.
# TYPE berth_volumes_mounted gauge
berth_volumes_mounted 1
# HELP berth_volume_snapshot_failures Scheduled snapshots that have failed in a row, of volumes with a schedule.
# TYPE berth_volume_snapshot_failures gauge
berth_volume_snapshot_failures{volume="web"} 0
`
	assert.NilError(t, testutil.CollectAndCompare(h.Metrics(), strings.NewReader(want), "berth_volumes_mounted", "berth_volume_snapshot_failures"))
	problems, err := testutil.CollectAndLint(h.Metrics())
	assert.NilError(t, err)
	assert.Equal(t, len(problems), 0, "%v", problems)
}
