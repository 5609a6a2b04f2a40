package engine

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
)

// A User is a container that has a volume, whether or not it runs.
type User struct {
	Container
	// State is Docker's word for it: "running", "paused", "exited".
	State string
}

// Running reports whether the container has processes, paused ones included.
func (u User) Running() bool {
	switch u.State {
	case container.StateRunning, container.StatePaused, container.StateRestarting:
		return true
	default:
		return false
	}
}

// Users asks Docker for the containers that have volumes, by the names of these. Users
// of one volume are in the order of their names.
func Users(ctx context.Context, api API) (map[string][]User, error) {
	containers, err := api.ContainerList(ctx, container.ListOptions{All: true})
	if err != nil {
		return nil, fmt.Errorf("list Docker's containers: %w", err)
	}
	users := make(map[string][]User)
	for _, c := range containers {
		u := User{Container: Container{ID: c.ID, Name: containerName(c.Names)}, State: c.State}
		var named []string
		for _, m := range c.Mounts {
			// One container may have a volume at several places.
			if m.Type == mount.TypeVolume && m.Name != "" && !slices.Contains(named, m.Name) {
				named = append(named, m.Name)
				users[m.Name] = append(users[m.Name], u)
			}
		}
	}
	for _, list := range users {
		slices.SortFunc(list, func(x, y User) int { return strings.Compare(x.Name, y.Name) })
	}
	return users, nil
}
