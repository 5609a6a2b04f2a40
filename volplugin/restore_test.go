package volplugin

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/volume"
)

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
