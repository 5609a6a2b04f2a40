package quiesce

import (
	"context"
	"errors"
	"testing"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
	"gotest.tools/v3/assert"
)

// list is a Docker engine that lists containers.
type list struct {
	API        // what no test here needs
	containers []container.Summary
	err        error
}

func (l list) ContainerList(context.Context, container.ListOptions) ([]container.Summary, error) {
	return l.containers, l.err
}

func TestUsers(t *testing.T) {
	api := list{containers: []container.Summary{
		{ID: "c2", Names: []string{"/other/alias", "/web"}, State: container.StateRunning, Mounts: []container.MountPoint{
			{Type: mount.TypeVolume, Name: "v"}, {Type: mount.TypeVolume, Name: "v", RW: true}, {Type: mount.TypeVolume, Name: "w", Driver: "local"}, {Type: mount.TypeBind, Source: "/x"},
		}},
		{ID: "c1", Names: []string{"/db"}, State: container.StateExited, Mounts: []container.MountPoint{{Type: mount.TypeVolume, Name: "v", RW: true}}},
	}}
	users, err := Users(t.Context(), api)
	assert.NilError(t, err)
	assert.DeepEqual(t, users, map[string][]User{
		"v": {{ID: "c1", Name: "db", State: "exited"}, {ID: "c2", Name: "web", State: "running"}},
		"w": {{ID: "c2", Name: "web", State: "running", Driver: "local", ReadOnly: true}},
	})
	assert.Assert(t, users["w"][0].Running() && !users["v"][0].Running() && User{State: "paused"}.Running())
	api.err = errors.New("down")
	_, err = Users(t.Context(), api)
	assert.ErrorContains(t, err, "down")
}
