package volplugin

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/keep"
	"github.com/berth-plugin/berth/volplugin/schedule"
	"github.com/berth-plugin/berth/volplugin/volume"
)

func TestOnlyWhatIsDueIsBackedUpAndKept(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web", "backup.schedule=@daily", "backup.keep=2"))
	k.put("web", "f", "one")
	rec := k.ledger.view(k.home.key, "web").Record
	assert.Equal(t, len(k.backupJobs()), 3) // prune and check too
	mine := k.backup("web")
	for range 4 {
		k.pass(24 * time.Hour)
		assert.NilError(t, k.backupDue(t.Context(), schedule.Job{UUID: rec.UUID, Due: k.clock()}))
	}
	list, err := k.Backups(t.Context(), control.BackupsRequest{Volume: "web"}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, len(list.Backups), 3)
	assert.Equal(t, list.Backups[0].Reference, mine.Reference) // nobody's policy is about it
	for _, b := range list.Backups[1:] {
		assert.Assert(t, slices.Contains(b.Tags, tagScheduled))
	}
	assert.NilError(t, k.backupDue(t.Context(), schedule.Job{UUID: pruneJob + "nas"}))
	assert.NilError(t, k.backupDue(t.Context(), schedule.Job{UUID: checkJob + "nas"}))
	assert.NilError(t, k.backupDue(t.Context(), schedule.Job{UUID: verifyJob + "nas"}))
	err = k.backupDue(t.Context(), schedule.Job{UUID: checkJob + "gone"})
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)

	_, err = k.UpdateVolume(t.Context(), control.UpdateRequest{Volume: "web", Set: map[string]string{"backup.target": "nas"}})
	assert.NilError(t, err)
	_, err = k.RemoveTarget(t.Context(), control.TargetRef{Name: "nas"})
	assert.ErrorContains(t, err, "the schedule of web")
	_, err = k.UpdateVolume(t.Context(), control.UpdateRequest{Volume: "web", Set: map[string]string{"backup.target": "", "backup.schedule": ""}})
	assert.NilError(t, err)
	_, err = k.RemoveTarget(t.Context(), control.TargetRef{Name: "nas"})
	assert.NilError(t, err)
}

func TestASecondTargetDoesNotEndTheBackupsOfVolumesThatNameNone(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web", "backup.schedule=@daily"))
	k.put("web", "f", "one")
	second := control.TargetSpec{Name: "offsite", Engine: testEngine, Repository: filepath.Join(t.TempDir(), "second"), Password: testPassword}
	_, err := k.AddTarget(t.Context(), second, quiet)
	assert.NilError(t, err)
	assert.NilError(t, k.create("new", "backup.schedule=@daily"))
	job := func(name string) schedule.Job {
		return schedule.Job{UUID: k.status(name)["uuid"].(string), Due: k.clock()}
	}
	assert.NilError(t, k.backupDue(t.Context(), job("web")))
	assert.Equal(t, k.backup("web").Target, "nas")
	err = k.backupDue(t.Context(), job("new"))
	assert.ErrorContains(t, err, "one has to be named: nas, offsite")
	_, err = k.RemoveTarget(t.Context(), control.TargetRef{Name: "nas"})
	assert.ErrorContains(t, err, "the schedule of web")
	_, err = k.RemoveTarget(t.Context(), control.TargetRef{Name: "offsite"})
	assert.NilError(t, err)
	assert.NilError(t, k.backupDue(t.Context(), job("new")))
}

func TestBackupsAreRemovedAndPruned(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web"))
	var made []control.Backup
	for range 3 {
		k.pass(time.Hour)
		made = append(made, k.backup("web"))
	}
	_, err := k.RemoveBackups(t.Context(), control.RemoveBackupsRequest{References: []string{"nas/web@latest"}}, quiet)
	assert.ErrorContains(t, err, "want its ID")
	removed, err := k.RemoveBackups(t.Context(), control.RemoveBackupsRequest{References: []string{made[0].Reference, "nas/web@ffffffffffff", "else/web@ffffffffffff"}}, quiet)
	assert.NilError(t, err)
	assert.DeepEqual(t, removed.Removed, []string{made[0].Reference})
	assert.Equal(t, len(removed.Failed), 2)

	dry, err := k.PruneBackups(t.Context(), control.PruneBackupsRequest{Keep: "1", All: true, DryRun: true}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, len(dry.Removed), 1)
	none, err := k.PruneBackups(t.Context(), control.PruneBackupsRequest{Keep: "1"}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, len(none.Removed), 0)
	pruned, err := k.PruneBackups(t.Context(), control.PruneBackupsRequest{Keep: "1", All: true}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, len(pruned.Failed), 0, "%v", pruned.Failed)
	assert.Equal(t, pruned.Removed[0].ID, made[1].ID)
	report, err := k.VerifyBackups(t.Context(), control.VerifyRequest{Target: "nas", Share: 1}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, len(report.Errors), 0, "%v", report.Errors)
	report, err = k.VerifyBackups(t.Context(), control.VerifyRequest{Reference: "nas/web"}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, len(report.Errors), 0, "%v", report.Errors)
	assert.Equal(t, report.Backup.ID, made[2].ID)
	entries, err := os.ReadDir(k.backups.Scratch)
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 0)
}

// A slow engine says when it backs up, and goes on when it is told to.
type slow struct {
	backup.Engine
	begun, goOn chan struct{}
}

func (s slow) Backup(ctx context.Context, source backup.Source, progress func(backup.Progress)) (backup.Result, error) {
	s.begun <- struct{}{}
	<-s.goOn
	return s.Engine.Backup(ctx, source, progress)
}

func TestContainersAndSnapshotsGoOnDuringABackup(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web"))
	k.put("web", "f", "one")
	s := slow{begun: make(chan struct{}), goOn: make(chan struct{})}
	k.wrapped(func(eng backup.Engine) backup.Engine {
		s.Engine = eng
		return s
	})
	ended := make(chan error, 1)
	go func() {
		_, err := k.CreateBackup(t.Context(), control.BackupRequest{Volume: "web"}, quiet)
		ended <- err
	}()
	<-s.begun
	k.put("web", "f", "two")
	_, err := k.CreateSnapshot(t.Context(), control.SnapshotRequest{Volume: "web", Name: "s1"}, quiet)
	assert.NilError(t, err)
	own := slices.DeleteFunc(k.snapshots("web"), func(s string) bool { return !strings.HasPrefix(s, "backup-") })
	assert.Equal(t, len(own), 1)
	err = k.RemoveSnapshot(t.Context(), control.SnapshotRef{Volume: "web", Name: own[0]}, quiet)
	assert.ErrorContains(t, err, "is being backed up")
	k.tend(t.Context())
	assert.Assert(t, slices.Contains(k.snapshots("web"), own[0]))
	_, err = k.RenameVolume(t.Context(), control.RenameRequest{Volume: "web", Name: "shop"})
	assert.NilError(t, err)
	close(s.goOn)
	assert.NilError(t, <-ended)
	assert.DeepEqual(t, k.left("shop"), []string{})
	assert.NilError(t, k.create("copy", "from-backup=nas/web"))
	assert.Equal(t, k.content("copy", "f"), "one")
}

// A broken engine loses a file, or fails.
type broken struct {
	backup.Engine
	err error
}

func (b broken) Backup(ctx context.Context, source backup.Source, progress func(backup.Progress)) (backup.Result, error) {
	if b.err != nil {
		return backup.Result{}, b.err
	}
	result, err := b.Engine.Backup(ctx, source, progress)
	result.Missing, result.MissingCount = []string{"data/f: input/output error"}, 1
	return result, err
}

func TestABackupThatIsNotGoodIsTold(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web"))
	k.backup("web")
	k.wrapped(func(eng backup.Engine) backup.Engine { return broken{eng, errors.New("connection refused")} })
	_, err := k.CreateBackup(t.Context(), control.BackupRequest{Volume: "web"}, quiet)
	assert.ErrorContains(t, err, "back up volume web to nas: connection refused")
	assert.DeepEqual(t, k.left("web"), []string{})
	k.wrapped(func(eng backup.Engine) backup.Engine { return broken{Engine: eng} })
	done, err := k.CreateBackup(t.Context(), control.BackupRequest{Volume: "web"}, quiet)
	assert.NilError(t, err)
	assert.Assert(t, done.Incomplete)

	shown, err := k.Volume(t.Context(), "web")
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(shown.Backup.LastError, "input/output error"), "%s", shown.Backup.LastError)
	assert.NilError(t, testutil.CollectAndCompare(k.Metrics(), strings.NewReader(`
# HELP berth_volume_backup_failures Backups that have failed or were incomplete in a row, of volumes with a schedule or a backup.
# TYPE berth_volume_backup_failures gauge
berth_volume_backup_failures{volume="web"} 2
`), "berth_volume_backup_failures"))
	findings := k.backupFindings()
	assert.Equal(t, len(findings), 1)
	assert.Equal(t, findings[0].ID, "backup-failed")
	assert.Assert(t, strings.Contains(findings[0].Summary, "the last good one is nas/web@"), "%s", findings[0].Summary)
	failed := []bool{}
	for _, e := range k.told {
		failed = append(failed, e.Failed)
	}
	assert.DeepEqual(t, failed, []bool{false, true, true})

	// A slip of somebody's is no failure of the backups.
	_, err = k.CreateBackup(t.Context(), control.BackupRequest{Volume: "web", Snapshot: "nosnap"}, quiet)
	assert.ErrorContains(t, err, "volume web has no snapshot nosnap")
	after, err := k.Volume(t.Context(), "web")
	assert.NilError(t, err)
	assert.DeepEqual(t, after.Backup, shown.Backup)
	assert.Equal(t, len(k.told), 3)
}

func TestASchedulesTargetThatIsNotThereIsFound(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web", "backup.schedule=@daily"))
	assert.Equal(t, len(k.backupFindings()), 0)
	assert.NilError(t, k.create("db", "backup.schedule=@daily", "backup.target=nsa"))
	findings := k.backupFindings()
	assert.Equal(t, len(findings), 1)
	assert.Equal(t, findings[0].ID, "backup-target")
	assert.ErrorContains(t, errors.New(findings[0].Summary), "volume db has a schedule for backups that cannot be kept: there is no target nsa")
	// web goes on with what it has, and no repository is asked: each may take a while.
	second := control.TargetSpec{Name: "offsite", Engine: testEngine, Repository: filepath.Join(t.TempDir(), "second"), Password: testPassword}
	_, err := k.AddTarget(t.Context(), second, quiet)
	assert.NilError(t, err)
	k.wrapped(func(backup.Engine) backup.Engine {
		t.Error("a target was opened")
		return nil
	})
	findings = k.backupFindings()
	assert.Equal(t, len(findings), 1, "%v", findings)
}

func TestABackupThatIsCancelledIsNoFailure(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web"))
	k.put("web", "f", "one")
	s := slow{begun: make(chan struct{}), goOn: make(chan struct{})}
	k.wrapped(func(eng backup.Engine) backup.Engine {
		s.Engine = eng
		return s
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := k.CreateBackup(ctx, control.BackupRequest{Volume: "web"}, quiet)
		ended <- err
	}()
	<-s.begun
	cancel()
	close(s.goOn)
	assert.ErrorIs(t, <-ended, context.Canceled)
	st := k.backups.state(k.status("web")["uuid"].(string))
	assert.Assert(t, st.Error == "it was cancelled" && st.Failures == 0, "%+v", st)
	assert.Equal(t, len(k.told), 0, "%v", k.told)
	assert.DeepEqual(t, k.left("web"), []string{})
}

func TestPoliciesCountCompleteBackupsOnly(t *testing.T) {
	day := func(n int) time.Time { return time.Date(2026, 1, n, 0, 0, 0, 0, time.UTC) }
	list := []backup.Backup{
		{ID: "1", Time: day(1)}, {ID: "2", Time: day(2), Incomplete: true}, {ID: "3", Time: day(3)},
		{ID: "4", Time: day(4)}, {ID: "5", Time: day(5), Incomplete: true},
	}
	for policy, want := range map[string][]string{"1": {"2", "1", "3"}, "2": {"2", "1"}, "7d": {"2"}} {
		p, err := keep.Parse(policy)
		assert.NilError(t, err)
		got := idsOf(droppedBackups(list, p, day(6)))
		slices.Sort(got)
		slices.Sort(want)
		assert.DeepEqual(t, got, want)
	}
	assert.Equal(t, len(droppedBackups(list[1:2], keep.Policy{Last: 1}, day(6))), 0)
}

// What is known of a volume's backups goes with the volume, not while it is in the trash.
func TestBackupsOfVolumesThatAreGoneAreForgotten(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	ids := map[string]string{}
	for _, name := range []string{"stays", "purged", "removed"} {
		assert.NilError(t, k.create(name))
		ids[name] = k.backup(name).UUID
	}
	known := func() (names []string) {
		for name, id := range ids {
			if k.backups.state(id).Good != "" {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		return names
	}
	assert.NilError(t, k.remove("purged"))
	assert.NilError(t, k.remove("removed"))
	assert.NilError(t, k.forgetBackups())
	assert.DeepEqual(t, known(), []string{"purged", "removed", "stays"})
	_, err := k.PurgeTrash(t.Context(), control.PurgeTrashRequest{UUIDs: []string{ids["purged"]}}, quiet)
	assert.NilError(t, err)
	assert.DeepEqual(t, known(), []string{"removed", "stays"})
	k.pass(volume.TrashKeep + time.Hour)
	assert.NilError(t, k.forgetBackups())
	assert.DeepEqual(t, known(), []string{"stays"})
}

func TestAVolumeThatIsNotThereIsNotBackedUp(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	_, err := k.CreateBackup(t.Context(), control.BackupRequest{Volume: "nothing"}, quiet)
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.ErrorContains(t, err, "volume nothing does not exist")
}

func TestTagsThatAreBerthsOwnAreRefused(t *testing.T) {
	for _, tag := range []string{"", "a b", "a,b", "schedule", "due=x", strings.Repeat("x", 101), "a\n"} {
		assert.Assert(t, errdefs.IsInvalidArgument(checkTag(tag)), "%q", tag)
	}
	assert.NilError(t, checkTag("before-upgrade"))
}

// within tries for a while.
func within(t *testing.T, fn func() error) {
	t.Helper()
	var err error
	for range 100 {
		if err = fn(); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal(err)
}

// A snapshot that a process has left which was killed during a backup goes.
func TestASnapshotForABackupDoesNotOutliveItsProcess(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	assert.NilError(t, k.create("web"))
	_, err := k.createSnapshot(t.Context(), "web", volume.SnapshotOptions{Name: "backup-1", Trigger: volume.ForBackup}, quiet)
	assert.NilError(t, err)
	done := k.backups.using(k.ledger.view(k.home.key, "web").Record.UUID, "backup-1")
	k.tend(t.Context())
	assert.DeepEqual(t, k.snapshots("web"), []string{"backup-1"})
	done()
	k.restart()
	k.tend(t.Context())
	assert.DeepEqual(t, k.snapshots("web"), []string{})
}

// One that a command has made goes too, when the command has not come back for it.
func TestASnapshotThatNobodyBacksUpGoes(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web"))
	made, err := k.CreateSnapshot(t.Context(), control.SnapshotRequest{Volume: "web", Name: "backup-1", Paused: true, ForBackup: true}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, made.Origin, control.SnapshotOrigin("backup"))
	k.pass(backupWait - time.Minute)
	k.restart()
	k.tend(t.Context())
	assert.DeepEqual(t, k.snapshots("web"), []string{"backup-1"})
	done, err := k.CreateBackup(t.Context(), control.BackupRequest{Volume: "web", Snapshot: "backup-1"}, quiet)
	assert.NilError(t, err)
	shown, err := k.Backup(t.Context(), control.BackupRef{Reference: done.Reference}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, shown.Consistency, control.Consistency("paused"))
	assert.Assert(t, shown.Manifest["snapshot-kept"] == nil)
	using := k.backups.using(k.ledger.view(k.home.key, "web").Record.UUID, "backup-1")
	k.pass(2 * time.Minute)
	k.tend(t.Context())
	assert.DeepEqual(t, k.snapshots("web"), []string{"backup-1"})
	using()
	k.tend(t.Context())
	assert.DeepEqual(t, k.snapshots("web"), []string{})
}
