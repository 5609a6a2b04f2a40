package main

import (
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/backup"
)

func TestRepositoriesAreWhereTheyLast(t *testing.T) {
	managed := &daemon{dataDir: "/proc/volumes", hostMounts: "/proc/1/mountinfo"}
	beside := &daemon{dataDir: "/proc/volumes"}
	for _, c := range []struct {
		d          *daemon
		repository string
		want       string // "" for no error
	}{
		{managed, "/restic", "inside the plugin"},
		{managed, "/", "inside the plugin"},
		{managed, "local:/usr/lib/nowhere/restic", "inside the plugin"},
		{managed, "/proc/restic", ""}, // a mount of its own
		{managed, "/proc/not/there", ""},
		{managed, "/proc/volumes/web", "where the volumes are"},
		{managed, "/proc/volumes", "where the volumes are"},
		{managed, "/proc/volumes-restic", ""},
		{managed, "s3:https://s3.example.org/restic", ""},
		{beside, "/restic", ""},
		{beside, "/proc/volumes/web", "where the volumes are"},
	} {
		t.Run(c.repository, func(t *testing.T) {
			err := c.d.checkPlace(backup.Target{Name: "nas", Repository: c.repository})
			if c.want == "" {
				assert.NilError(t, err)
				return
			}
			assert.ErrorContains(t, err, c.want)
			assert.ErrorContains(t, err, "target nas: repository ")
		})
	}
}
