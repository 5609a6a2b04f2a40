package volplugin

import (
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/presence"
	"github.com/berth-plugin/berth/volplugin/schedule"
	"github.com/berth-plugin/berth/volplugin/volume"
)

func TestHostsThatShareARootMakeOneScheduledBackup(t *testing.T) {
	root, repository := t.TempDir(), filepath.Join(t.TempDir(), "repository")
	share := func(c *Config) { c.shared = func(*volume.Root) (bool, error) { return true, nil } }
	a, b := newKeeperOf(t, root, repository, share), newKeeperOf(t, root, repository, share)
	a.target()
	b.target()
	assert.NilError(t, a.create("web", "backup.schedule=@daily"))
	a.put("web", "f", "one")
	job := schedule.Job{UUID: a.status("web")["uuid"].(string), Due: a.clock()}
	assert.Equal(t, b.status("web")["uuid"], job.UUID)

	s := slow{begun: make(chan struct{}), goOn: make(chan struct{})}
	a.wrapped(func(eng backup.Engine) backup.Engine {
		s.Engine = eng
		return s
	})
	ended := make(chan error, 1)
	go func() { ended <- a.backupDue(t.Context(), job) }()
	<-s.begun
	err := b.backupDue(t.Context(), job)
	assert.ErrorIs(t, err, schedule.ErrElsewhere)
	// Nothing is cut off for such a lease.
	turn, err := turnOf(job.UUID)
	assert.NilError(t, err)
	a.byKey(homeKey).leaseChanged(turn, presence.Lost, "another host has it")
	assert.Assert(t, a.status("web")["lease"] == nil)
	close(s.goOn)
	assert.NilError(t, <-ended)

	// It is made, and the next one is anybody's.
	made := func() int {
		list, err := b.Backups(t.Context(), control.BackupsRequest{Volume: "web"}, quiet)
		assert.NilError(t, err)
		return len(list.Backups)
	}
	assert.NilError(t, b.backupDue(t.Context(), job))
	assert.Equal(t, made(), 1)
	job.Due = job.Due.AddDate(0, 0, 1)
	assert.NilError(t, b.backupDue(t.Context(), job))
	assert.Equal(t, made(), 2)

	// The other host says soon that it has nothing of the volume open any more.
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if err := a.remove("web"); err != nil {
			return poll.Continue("%v", err)
		}
		return poll.Success()
	})
	_, err = a.PurgeTrash(t.Context(), control.PurgeTrashRequest{All: true}, quiet)
	assert.NilError(t, err)
	left, err := filepath.Glob(filepath.Join(root, ".berth/leases/*"))
	assert.NilError(t, err)
	assert.Equal(t, len(left), 0, "%v", left)
}
