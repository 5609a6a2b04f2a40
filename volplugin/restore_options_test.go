package volplugin

import (
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
)

func TestARestoredVolumeHasTheOptionsThatWereSetLater(t *testing.T) {
	repository := filepath.Join(t.TempDir(), "repository")
	k := newKeeper(t, repository)
	k.target()
	assert.NilError(t, k.create("web", "backup.schedule=@daily", "label.tier=gold"))
	k.put("web", "f", "one")
	_, err := k.UpdateVolume(t.Context(), control.UpdateRequest{Volume: "web", Set: map[string]string{
		"backup.schedule": "", "snapshot.schedule": "@hourly", "snapshot.keep": "3", "label.tier": "silver", "protect": "true",
	}})
	assert.NilError(t, err)
	k.backup("web")

	other := newKeeper(t, repository)
	other.target()
	made, err := other.RestoreBackup(t.Context(), control.RestoreRequest{Reference: "nas/web", Name: "web"}, quiet)
	assert.NilError(t, err)
	assert.DeepEqual(t, made.Volume.Labels, map[string]string{"tier": "silver"})
	rec := other.ledger.view(other.home.key, "web").Record
	assert.Assert(t, rec.Schedule == "@hourly" && rec.Keep == "n=3" && rec.BackupSchedule == "" && rec.Protect, "%+v", rec)
	assert.Equal(t, other.content("web", "f"), "one")
}
