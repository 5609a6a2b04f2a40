package volplugin

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/notify"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/archive"
	"github.com/berth-plugin/berth/volplugin/keep"
	"github.com/berth-plugin/berth/volplugin/schedule"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// Backups of these tests go to engine archive, which needs no other program; engines
// have a suite of their own.
const (
	testEngine   = backup.Archive
	testPassword = ""
)

func openEngine(_ testing.TB, _ string, target backup.Target) (backup.Engine, error) {
	return archive.New(target)
}

// owner of a file.
func owner(t testing.TB, path string) int {
	t.Helper()
	var st unix.Stat_t
	assert.NilError(t, unix.Lstat(path, &st))
	return int(st.Uid)
}

// A keeper is a host that keeps backups, and whose clock can be set.
type keeper struct {
	*host
	repository string

	mu   sync.Mutex
	now  time.Time
	told []notify.Event
	// wrap, unless nil, changes the engine of targets.
	wrap func(backup.Engine) backup.Engine
}

func newKeeper(t *testing.T, repository string) *keeper {
	t.Helper()
	return newKeeperOf(t, t.TempDir(), repository, func(*Config) {})
}

func newKeeperOf(t *testing.T, root, repository string, change func(*Config)) *keeper {
	t.Helper()
	k := &keeper{repository: repository, now: time.Now()}
	dir := t.TempDir()
	k.host = newHost(t, root, func(c *Config) {
		change(c)
		c.Local = filepath.Join(dir, "local")
		c.Now = k.clock
		c.Tell = func(e notify.Event) {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.told = append(k.told, e)
		}
		c.Backups = &BackupConfig{
			Targets: filepath.Join(dir, "targets"), Scratch: filepath.Join(dir, "scratch"), Version: "test",
			Open: func(target backup.Target) (backup.Engine, error) {
				eng, err := openEngine(t, dir, target)
				k.mu.Lock()
				defer k.mu.Unlock()
				if err == nil && k.wrap != nil {
					eng = k.wrap(eng)
				}
				return eng, err
			},
		}
	})
	return k
}

func (k *keeper) clock() time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.now
}

func (k *keeper) pass(d time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.now = k.now.Add(d)
}

func (k *keeper) wrapped(fn func(backup.Engine) backup.Engine) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.wrap = fn
}

func (k *keeper) target() {
	k.t.Helper()
	report, err := k.AddTarget(k.t.Context(), control.TargetSpec{Name: "nas", Engine: testEngine, Repository: k.repository, Password: testPassword}, quiet)
	assert.NilError(k.t, err)
	assert.Equal(k.t, report.Target.Name, "nas")
}

func (k *keeper) backup(name string) control.Backup {
	k.t.Helper()
	done, err := k.CreateBackup(k.t.Context(), control.BackupRequest{Volume: name}, quiet)
	assert.NilError(k.t, err)
	assert.Assert(k.t, !done.Incomplete, "%v", done.Missing)
	return done
}

// left are the snapshots and stages that a backup should have taken away.
func (k *keeper) left(name string) []string {
	k.t.Helper()
	left := slices.DeleteFunc(k.snapshots(name), func(s string) bool { return !strings.HasPrefix(s, "backup-") })
	entries, err := os.ReadDir(k.backups.stage)
	assert.NilError(k.t, err)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	return left
}

func TestABackupMakesTheSameVolumeOnAnotherHost(t *testing.T) {
	repository := filepath.Join(t.TempDir(), "repository")
	k := newKeeper(t, repository)
	_, err := k.CreateBackup(t.Context(), control.BackupRequest{Volume: "web"}, quiet)
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.NilError(t, k.create("web", "uid=70", "mode=0750", "label.app=shop", "protect=true"))
	_, err = k.CreateBackup(t.Context(), control.BackupRequest{Volume: "web"}, quiet)
	assert.ErrorContains(t, err, "docker berth target add")
	k.target()
	k.put("web", "f", "one")
	first := k.backup("web")
	assert.Equal(t, first.Files, uint64(1))
	assert.DeepEqual(t, k.left("web"), []string{})
	k.pass(time.Minute)
	k.put("web", "f", "two!")
	second := k.backup("web")
	assert.Assert(t, first.ID != second.ID)

	list, err := k.Backups(t.Context(), control.BackupsRequest{}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, len(list.Backups), 2)
	assert.Equal(t, list.Backups[0].Reference, first.Reference)
	assert.Equal(t, list.Backups[1].Reference, second.Reference)
	status := k.status("web")["backup"].(map[string]any)
	assert.Equal(t, status["good"], second.Reference)
	assert.Assert(t, status["error"] == nil)

	other := newKeeper(t, repository)
	other.target()
	assert.NilError(t, other.create("copy", "from-backup="+first.Reference))
	assert.Equal(t, other.content("copy", "f"), "one")
	assert.NilError(t, other.create("newest", "from-backup=nas/web"))
	assert.Equal(t, other.content("newest", "f"), "two!")
	path, err := other.mount("newest", "id")
	assert.NilError(t, err)
	info, err := os.Stat(path)
	assert.NilError(t, err)
	assert.Equal(t, info.Mode().Perm(), os.FileMode(0o750))
	assert.Equal(t, owner(t, path), 70)
	assert.NilError(t, other.unmount("newest", "id"))

	restored, err := other.RestoreBackup(t.Context(), control.RestoreRequest{Reference: "nas/web", Name: "web"}, quiet)
	assert.NilError(t, err)
	assert.Assert(t, restored.Volume.Protect)
	assert.Equal(t, restored.Volume.Labels["app"], "shop")
	assert.Equal(t, restored.Volume.Source.Backup, "nas/web@"+second.ID)
	_, err = other.RestoreBackup(t.Context(), control.RestoreRequest{Reference: "nas/web", Name: "web"}, quiet)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.DeepEqual(t, other.left("web"), []string{})

	shown, err := other.Backup(t.Context(), control.BackupRef{Reference: second.Reference}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, shown.Manifest["volume"], "web")
	assert.Equal(t, shown.Manifest["berth"], "test")
}

func TestLatestOfAnotherHostDoesNotReplaceAVolume(t *testing.T) {
	repository := filepath.Join(t.TempDir(), "repository")
	k, other := newKeeper(t, repository), newKeeper(t, repository)
	k.target()
	other.target()
	for i, h := range []*keeper{k, other} {
		h.pass(time.Duration(i) * time.Minute)
		assert.NilError(t, h.create("web"))
		h.put("web", "f", []string{"first", "other"}[i])
	}
	k.backup("web")
	theirs := other.backup("web")
	_, err := k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: "nas/web", Name: "web", InPlace: true}, quiet)
	assert.ErrorContains(t, err, "is of another volume called web")
	assert.ErrorContains(t, err, theirs.Reference)
	assert.Equal(t, k.content("web", "f"), "first")
	_, err = k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: theirs.Reference, Name: "web", InPlace: true}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, k.content("web", "f"), "other")
}

// Hosts that share a repository may each have a volume of the name: nothing is made of
// either by chance.
func TestLatestOfTwoHostsIsRefused(t *testing.T) {
	repository := filepath.Join(t.TempDir(), "repository")
	named := func(id string) *keeper {
		return newKeeperOf(t, t.TempDir(), repository, func(c *Config) { c.HostID = id })
	}
	k, other := named("alpha/1"), named("beta/1")
	hosts := []*keeper{k, other}
	for i, h := range hosts {
		h.target()
		assert.NilError(t, h.create("web"))
		h.put("web", "f", []string{"mine", "theirs"}[i])
	}
	last := make([]control.Backup, 2)
	for range 2 {
		for i, h := range hosts {
			k.pass(time.Minute)
			other.pass(time.Minute)
			last[i] = h.backup("web")
		}
	}
	for name, do := range map[string]func() error{
		"from-backup": func() error { return k.create("copy", "from-backup=nas/web") },
		"a time":      func() error { return k.create("copy", "from-backup=nas/web@2999-01-01") },
		"restore": func() error {
			_, err := k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: "nas/web", Name: "copy"}, quiet)
			return err
		},
		"in place": func() error {
			_, err := k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: "nas/web", Name: "web", InPlace: true}, quiet)
			return err
		},
	} {
		err := do()
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%s: %v", name, err)
		for _, want := range []string{last[0].Reference, last[1].Reference, "host alpha", "host beta", last[1].Time.Format(time.RFC3339)} {
			assert.ErrorContains(t, err, want)
		}
		assert.DeepEqual(t, k.list(), []string{"web"})
		assert.Equal(t, k.content("web", "f"), "mine")
	}
	assert.NilError(t, k.create("copy", "from-backup="+last[0].Reference))
	assert.Equal(t, k.content("copy", "f"), "mine")
}

func TestABackupThatIsNotThereMakesNoVolume(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	for reference, want := range map[string]string{
		"web": "TARGET/VOLUME", "nas/web": "there is no target nas",
	} {
		err := k.create("copy", "from-backup="+reference)
		assert.ErrorContains(t, err, want)
		assert.DeepEqual(t, k.list(), []string{})
	}
	k.target()
	for _, reference := range []string{"nas/web", "nas/web@2020-01-01", "nas/web@0123456789abcdef"} {
		err := k.create("copy", "from-backup="+reference)
		assert.Assert(t, errdefs.IsNotFound(err), "%s: %v", reference, err)
		assert.DeepEqual(t, k.list(), []string{})
	}
	assert.ErrorContains(t, k.create("copy", "from-backup=nas/web", "seed=x"), "contradict each other")
}

// A cut is an engine whose network goes in the middle of restoring.
type cut struct {
	backup.Engine
	err error
}

func (c cut) Restore(_ context.Context, _ backup.Backup, dir string, _ []string, _ func(backup.Progress)) (backup.Restored, error) {
	_ = os.WriteFile(filepath.Join(dir, backup.DataName, "half"), nil, 0o600)
	return backup.Restored{}, c.err
}

func TestARestoreThatFailsLeavesTheVolumeAsItWas(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web"))
	k.put("web", "f", "one")
	done := k.backup("web")
	k.put("web", "f", "two")
	for _, cause := range []error{errors.New("connection reset"), backup.ErrPassword} {
		k.wrapped(func(eng backup.Engine) backup.Engine { return cut{eng, cause} })
		_, err := k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: done.Reference, Name: "web", InPlace: true}, quiet)
		assert.ErrorContains(t, err, cause.Error())
		assert.Equal(t, k.content("web", "f"), "two")
		path, err := k.mount("web", "id")
		assert.NilError(t, err)
		assert.Assert(t, !exists(filepath.Join(path, "half")))
		assert.NilError(t, k.unmount("web", "id"))
		_, err = k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: done.Reference, Name: "copy"}, quiet)
		assert.ErrorContains(t, err, cause.Error())
		assert.DeepEqual(t, k.list(), []string{"web"})
	}
	k.wrapped(nil)

	path, err := k.mount("web", "user")
	assert.NilError(t, err)
	_, err = k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: done.Reference, Name: "web", InPlace: true}, quiet)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.Equal(t, read(t, filepath.Join(path, "f")), "two")
	assert.NilError(t, k.unmount("web", "user"))
	restored, err := k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: done.Reference, Name: "web", InPlace: true}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, k.content("web", "f"), "one")
	assert.Equal(t, k.content("web@"+restored.Kept.Name, "f"), "two")
	assert.DeepEqual(t, k.left("web"), []string{})
}

// A volume is never ready with half of its data, wherever this process dies.
func TestARestoreInPlaceThatIsKilledGoesOn(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web"))
	k.put("web", "f", "one")
	done := k.backup("web")
	k.put("web", "f", "two")
	for _, stop := range []string{"restore.begin", "restore.empty", "restore.data", "restore.ready"} {
		dead := errors.New("killed")
		k.cfg.step = func(step, _ string) error {
			if step == stop {
				k.endTasks() // nothing is undone by a process that is gone
				return dead
			}
			return nil
		}
		k.restart()
		_, err := k.RestoreBackup(k.tasks, control.RestoreRequest{Reference: done.Reference, Name: "web", InPlace: true}, quiet)
		assert.Assert(t, err != nil, stop)
		k.cfg.step = nil
		k.restart()
		within(t, func() error {
			k.tend(t.Context())
			_, err := k.mount("web", "id")
			return err
		})
		assert.NilError(t, k.unmount("web", "id"))
		got := k.content("web", "f")
		assert.Assert(t, got == "one" || got == "two", "%s: %q", stop, got)
		k.put("web", "f", "two")
	}
}

// What latest means is looked up once: a volume is made of that backup, however often its
// making is interrupted.
func TestAVolumeOfLatestIsMadeOfOneBackup(t *testing.T) {
	repository := filepath.Join(t.TempDir(), "repository")
	k, other := newKeeper(t, repository), newKeeper(t, repository)
	k.target()
	other.target()
	assert.NilError(t, k.create("web"))
	for _, tc := range []struct{ stop, want string }{
		{"fill.found", "newer"}, {"fill.begin", "older"}, {"fill.create", "older"}, {"fill.copy", "older"}, {"fill.ready", "older"},
	} {
		k.pass(time.Hour)
		k.put("web", "f", "older")
		older := k.backup("web")
		assert.NilError(t, other.create("web", "from-backup="+older.Reference))
		other.put("web", "f", "newer")
		var dead atomic.Bool
		k.cfg.step = func(step, _ string) error {
			if step == tc.stop {
				dead.Store(true)
				k.endTasks()
			}
			if dead.Load() {
				return errors.New("killed")
			}
			return nil
		}
		k.restart()
		assert.ErrorContains(t, k.create("copy", "from-backup=nas/web"), "killed")
		other.pass(k.clock().Add(time.Minute).Sub(other.clock()))
		newer := other.backup("web")
		k.cfg.step = nil
		k.restart()
		within(t, func() error {
			k.tend(t.Context())
			_, err := k.mount("copy", "id")
			return err
		})
		assert.NilError(t, k.unmount("copy", "id"))
		assert.Equal(t, k.content("copy", "f"), tc.want, tc.stop)
		from := map[string]control.Backup{"older": older, "newer": newer}[tc.want]
		assert.Equal(t, k.status("copy")["source"], "backup "+from.Reference)
		found := k.ledger.view(k.home.key, "copy").Record.Source.Found
		assert.Equal(t, found.ID, from.ID)
		assert.Equal(t, found.Files, uint64(1))
		// Whoever asks for it again gets it.
		assert.NilError(t, k.create("copy", "from-backup=nas/web"))
		assert.Assert(t, !k.ledger.view(k.home.key, "copy").Differs)
		for _, h := range []struct {
			host *keeper
			name string
		}{{k, "copy"}, {other, "web"}} {
			assert.NilError(t, h.host.remove(h.name))
		}
	}
}

// A meter is an engine that counts what it is asked for.
type meter struct {
	backup.Engine
	calls map[string]int
}

func (c meter) List(ctx context.Context, filter backup.Filter) ([]backup.Backup, error) {
	c.calls["list"]++
	return c.Engine.List(ctx, filter)
}

func (c meter) Manifest(ctx context.Context, id string) (backup.Manifest, error) {
	c.calls["manifest"]++
	return c.Engine.Manifest(ctx, id)
}

func (c meter) Restore(ctx context.Context, b backup.Backup, dir string, paths []string, progress func(backup.Progress)) (backup.Restored, error) {
	c.calls["restore"]++
	if b.Files != 1 || b.Time.IsZero() {
		return backup.Restored{}, errors.New("it has to be looked up again")
	}
	return c.Engine.Restore(ctx, b, dir, paths, progress)
}

// Each call of restic takes about half a second.
func TestARestoreAsksTheRepositoryNoMoreThanItMust(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web"))
	k.put("web", "f", "one")
	earlier := k.backup("web").Reference
	k.pass(time.Minute)
	k.backup("web")
	c := meter{calls: map[string]int{}}
	k.wrapped(func(eng backup.Engine) backup.Engine {
		c.Engine = eng
		return c
	})
	for _, tc := range []struct {
		do   func() error
		want map[string]int
	}{
		{func() error { return k.create("copy", "from-backup=nas/web") }, map[string]int{"list": 1, "restore": 1}},
		{func() error {
			_, err := k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: "nas/web", Name: "copy2"}, quiet)
			return err
		}, map[string]int{"list": 1, "restore": 1}},
		{func() error {
			_, err := k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: earlier, Name: "copy3"}, quiet)
			return err
		}, map[string]int{"list": 1, "manifest": 1, "restore": 1}},
		{func() error {
			_, err := k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: "nas/web", Name: "web", InPlace: true}, quiet)
			return err
		}, map[string]int{"list": 1, "restore": 1}},
	} {
		clear(c.calls)
		assert.NilError(t, tc.do())
		assert.DeepEqual(t, c.calls, tc.want)
	}
}

func TestARollbackTellsWhatTheDataWasMadeFrom(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web"))
	first := k.backup("web")
	k.pass(time.Minute)
	second := k.backup("web")
	inPlace := func(name string, b control.Backup) (string, error) {
		k.pass(time.Minute)
		done, err := k.RestoreBackup(t.Context(), control.RestoreRequest{Reference: b.Reference, Name: name, InPlace: true}, quiet)
		if err != nil {
			return "", err
		}
		return done.Kept.Name, nil
	}
	back := func(name, snapshot string) string {
		k.pass(time.Minute)
		done, err := k.RollbackVolume(t.Context(), control.RollbackRequest{Volume: name, Snapshot: snapshot}, quiet)
		assert.NilError(t, err)
		return done.Kept.Name
	}
	assert.NilError(t, k.create("copy", "from-backup="+first.Reference))
	for name, before := range map[string]any{"web": nil, "copy": "backup " + first.Reference} {
		assert.Equal(t, k.status(name)["source"], before)
		kept, err := inPlace(name, second)
		assert.NilError(t, err)
		assert.Equal(t, k.status(name)["source"], "backup "+second.Reference)
		restored := back(name, kept)
		assert.Equal(t, k.status(name)["source"], before, name)
		assert.Equal(t, k.ledger.view(k.home.key, name).Record.Phase, volume.Ready)
		back(name, restored)
		assert.Equal(t, k.status(name)["source"], "backup "+second.Reference, name)
		back(name, kept)

		k.wrapped(func(eng backup.Engine) backup.Engine { return cut{eng, backup.ErrPassword} })
		_, err = inPlace(name, second)
		assert.ErrorIs(t, err, backup.ErrPassword)
		k.wrapped(nil)
		assert.Equal(t, k.status(name)["source"], before, name)
	}
}

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
