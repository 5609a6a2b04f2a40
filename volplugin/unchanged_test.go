package volplugin

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/notify"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/schedule"
)

// newBtrfsKeeper has its volumes on btrfs, and a backup of its volume web.
func newBtrfsKeeper(t *testing.T) (*keeper, control.Backup) {
	t.Helper()
	k := newKeeperOf(t, mounttest.Disk(t, "btrfs", 256<<20), filepath.Join(t.TempDir(), "repository"), func(*Config) {})
	k.target()
	assert.NilError(t, k.create("web"))
	k.put("web", "f", "one")
	return k, k.backup("web")
}

func (k *keeper) again(req control.BackupRequest) control.Backup {
	k.t.Helper()
	req.Volume = "web"
	k.pass(time.Minute) // times in repositories have whole seconds
	done, err := k.CreateBackup(k.t.Context(), req, quiet)
	assert.NilError(k.t, err)
	assert.DeepEqual(k.t, k.left("web"), []string{})
	return done
}

func TestWhatHasNotChangedIsNotBackedUpAgain(t *testing.T) {
	k, first := newBtrfsKeeper(t)
	assert.Assert(t, !first.Unchanged)
	before := k.backups.state(first.UUID)
	k.restart()
	same := k.again(control.BackupRequest{})
	assert.Assert(t, same.Unchanged)
	assert.Equal(t, same.Reference, first.Reference)
	assert.Equal(t, same.Files, first.Files)
	assert.Assert(t, same.Time.Equal(first.Time.Truncate(time.Second)), "%s, not %s", same.Time, first.Time)
	list, err := k.Backups(t.Context(), control.BackupsRequest{}, quiet)
	assert.NilError(t, err)
	assert.Equal(t, len(list.Backups), 1)

	// The volume is known to be backed up as it was then.
	st := k.backups.state(first.UUID)
	assert.Equal(t, st.Error, "")
	assert.Equal(t, st.Failures, 0)
	assert.Equal(t, st.Good, first.Reference)
	assert.Assert(t, st.GoodTime.Sub(first.Time) >= time.Minute-time.Second, "%s, and the first %s", st.GoodTime, first.Time)
	assert.DeepEqual(t, st.Targets, before.Targets)
	k.mu.Lock()
	told := k.told[len(k.told)-1]
	k.mu.Unlock()
	assert.DeepEqual(t, told, notify.Event{
		Key: "backup web", Title: "Volume web is backed up to nas",
		Text: first.Reference + ": nothing has changed since it was made at " + same.Time.Format(time.RFC3339),
	})
	assert.NilError(t, testutil.CollectAndCompare(k.Metrics(), strings.NewReader(fmt.Sprintf(`
# HELP berth_volume_backup_last_success_timestamp_seconds When a volume last had the data in the last complete backup that this host made, of volumes with a schedule or a backup; 0 is never.
# TYPE berth_volume_backup_last_success_timestamp_seconds gauge
berth_volume_backup_last_success_timestamp_seconds{volume="web"} %d
`, st.GoodTime.Unix())), "berth_volume_backup_last_success_timestamp_seconds"))

	k.put("web", "f", "two")
	second := k.again(control.BackupRequest{})
	assert.Assert(t, !second.Unchanged && second.ID != first.ID)
	assert.NilError(t, k.create("copy", "from-backup="+second.Reference))
	assert.Equal(t, k.content("copy", "f"), "two")
	same = k.again(control.BackupRequest{})
	assert.Assert(t, same.Unchanged)
	assert.Equal(t, same.Reference, second.Reference)
}

// Each of these asks for a new backup, or leaves it in doubt whether there is one.
func TestWhatHasNotChangedIsBackedUpAgainAllTheSame(t *testing.T) {
	plain := control.BackupRequest{}
	for name, again := range map[string]func(k *keeper, first control.Backup) control.BackupRequest{
		"--full": func(*keeper, control.Backup) control.BackupRequest { return control.BackupRequest{Full: true} },
		"--tag": func(*keeper, control.Backup) control.BackupRequest {
			return control.BackupRequest{Tags: []string{"upgrade"}}
		},
		"the last has a tag": func(k *keeper, _ control.Backup) control.BackupRequest {
			k.again(control.BackupRequest{Tags: []string{"upgrade"}})
			return plain
		},
		"a snapshot": func(k *keeper, _ control.Backup) control.BackupRequest {
			_, err := k.CreateSnapshot(k.t.Context(), control.SnapshotRequest{Volume: "web", Name: "s"}, quiet)
			assert.NilError(k.t, err)
			return control.BackupRequest{Snapshot: "s"}
		},
		"the last is of a snapshot": func(k *keeper, _ control.Backup) control.BackupRequest {
			_, err := k.CreateSnapshot(k.t.Context(), control.SnapshotRequest{Volume: "web", Name: "s"}, quiet)
			assert.NilError(k.t, err)
			k.again(control.BackupRequest{Snapshot: "s"})
			return plain
		},
		"a label": func(k *keeper, _ control.Backup) control.BackupRequest {
			_, err := k.UpdateVolume(k.t.Context(), control.UpdateRequest{Volume: "web", Set: map[string]string{"label.tier": "gold"}})
			assert.NilError(k.t, err)
			return plain
		},
		"a size": func(k *keeper, _ control.Backup) control.BackupRequest {
			_, err := k.ResizeVolume(k.t.Context(), control.ResizeRequest{Volume: "web", Size: 64 << 20}, quiet)
			assert.NilError(k.t, err)
			return plain
		},
		"another name": func(k *keeper, _ control.Backup) control.BackupRequest {
			_, err := k.RenameVolume(k.t.Context(), control.RenameRequest{Volume: "web", Name: "shop"})
			assert.NilError(k.t, err)
			_, err = k.CreateBackup(k.t.Context(), control.BackupRequest{Volume: "shop"}, quiet)
			assert.NilError(k.t, err)
			_, err = k.RenameVolume(k.t.Context(), control.RenameRequest{Volume: "shop", Name: "web"})
			assert.NilError(k.t, err)
			return plain
		},
		"the last is gone": func(k *keeper, first control.Backup) control.BackupRequest {
			_, err := k.RemoveBackups(k.t.Context(), control.RemoveBackupsRequest{References: []string{first.Reference}}, quiet)
			assert.NilError(k.t, err)
			return plain
		},
		"it is old": func(k *keeper, _ control.Backup) control.BackupRequest {
			k.pass(standsFor)
			return plain
		},
		"it is of the future": func(k *keeper, _ control.Backup) control.BackupRequest {
			k.pass(-time.Hour)
			return plain
		},
		"another target": func(k *keeper, _ control.Backup) control.BackupRequest {
			_, err := k.AddTarget(k.t.Context(), control.TargetSpec{Name: "two", Engine: testEngine, Repository: k.t.TempDir() + "/two"}, quiet)
			assert.NilError(k.t, err)
			return control.BackupRequest{Target: "two"}
		},
		"another repository": func(k *keeper, _ control.Backup) control.BackupRequest {
			_, err := k.AddTarget(k.t.Context(), control.TargetSpec{Name: "nas", Engine: testEngine, Repository: k.t.TempDir() + "/two", Replace: true}, quiet)
			assert.NilError(k.t, err)
			return plain
		},
		"the last one failed": func(k *keeper, _ control.Backup) control.BackupRequest {
			k.wrapped(func(eng backup.Engine) backup.Engine { return broken{eng, backup.ErrPassword} })
			_, err := k.CreateBackup(k.t.Context(), control.BackupRequest{Volume: "web", Full: true}, quiet)
			assert.ErrorIs(k.t, err, backup.ErrPassword)
			k.wrapped(nil)
			return plain
		},
		"the repository cannot be listed": func(k *keeper, _ control.Backup) control.BackupRequest {
			k.wrapped(func(eng backup.Engine) backup.Engine { return unlisted{eng} })
			return plain
		},
		"an incomplete one": func(k *keeper, _ control.Backup) control.BackupRequest {
			k.wrapped(func(eng backup.Engine) backup.Engine { return broken{Engine: eng} })
			k.again(control.BackupRequest{Full: true})
			k.wrapped(nil)
			return plain
		},
		"another host": func(k *keeper, first control.Backup) control.BackupRequest {
			// It had the volume for a while.
			k.again(control.BackupRequest{Full: true})
			assert.NilError(k.t, k.backups.change(first.UUID, func(st *backupState) {
				last := st.Targets["nas"]
				last.ID = first.ID
				st.Targets["nas"] = last
			}))
			return plain
		},
		"a rollback": func(k *keeper, _ control.Backup) control.BackupRequest {
			_, err := k.CreateSnapshot(k.t.Context(), control.SnapshotRequest{Volume: "web", Name: "s"}, quiet)
			assert.NilError(k.t, err)
			_, err = k.RollbackVolume(k.t.Context(), control.RollbackRequest{Volume: "web", Snapshot: "s"}, quiet)
			assert.NilError(k.t, err)
			return plain
		},
		"a restore in place": func(k *keeper, first control.Backup) control.BackupRequest {
			_, err := k.RestoreBackup(k.t.Context(), control.RestoreRequest{Reference: first.Reference, Name: "web", InPlace: true}, quiet)
			assert.NilError(k.t, err)
			return plain
		},
		"other data in the same place": func(k *keeper, _ control.Backup) control.BackupRequest {
			path := filepath.Join(k.cfg.Root, "web")
			assert.NilError(k.t, os.Rename(path, path+".old"))
			assert.NilError(k.t, os.Mkdir(path, 0o755))
			return plain
		},
	} {
		t.Run(name, func(t *testing.T) {
			k, first := newBtrfsKeeper(t)
			req := again(k, first)
			done := k.again(req)
			assert.Assert(t, !done.Unchanged)
			assert.Assert(t, done.ID != first.ID)
		})
	}
}

// An unlisted repository takes backups, and does not show them.
type unlisted struct{ backup.Engine }

func (unlisted) List(context.Context, backup.Filter) ([]backup.Backup, error) {
	return nil, backup.ErrLocked
}

func TestASchedulesBackupStandsForLaterOnesOfTheSchedule(t *testing.T) {
	k, asked := newBtrfsKeeper(t)
	_, err := k.UpdateVolume(t.Context(), control.UpdateRequest{Volume: "web", Set: map[string]string{"backup.schedule": "@hourly", "backup.keep": "2d"}})
	assert.NilError(t, err)
	due := func() []control.Backup {
		k.pass(time.Hour)
		assert.NilError(t, k.backupDue(t.Context(), schedule.Job{UUID: asked.UUID, Due: k.clock()}))
		list, err := k.Backups(t.Context(), control.BackupsRequest{Volume: "web"}, quiet)
		assert.NilError(t, err)
		return list.Backups
	}
	// One that somebody has asked for may be removed by them.
	list := due()
	assert.Equal(t, len(list), 2)
	assert.Equal(t, list[0].ID, asked.ID)
	scheduled := list[1]
	assert.Assert(t, slices.Contains(scheduled.Tags, tagScheduled))
	for hour := 2; hour < 21; hour++ {
		list = due()
		assert.Equal(t, len(list), 2, "hour %d", hour)
		assert.Assert(t, k.backups.state(asked.UUID).GoodTime.After(k.clock().Add(-time.Minute)))
	}
	assert.Equal(t, list[1].ID, scheduled.ID)
	// After 20 hours there is a new entry, and policies count it.
	list = due()
	newest := list[len(list)-1]
	assert.Assert(t, newest.ID != scheduled.ID)

	// One of a schedule goes by a policy; who asks for a backup gets one that stays.
	done := k.again(control.BackupRequest{})
	assert.Assert(t, !done.Unchanged)
	assert.Assert(t, k.again(control.BackupRequest{}).Unchanged)
}

func TestCopiesAreBackedUpWithoutAWordOfTheEngine(t *testing.T) {
	k := newKeeper(t, filepath.Join(t.TempDir(), "repository"))
	k.target()
	assert.NilError(t, k.create("web", "engine=dir"))
	first := k.backup("web")
	second := k.again(control.BackupRequest{})
	assert.Assert(t, !second.Unchanged && second.ID != first.ID)
	assert.DeepEqual(t, k.backups.state(first.UUID).Targets["nas"].Seen, sight{})
}
