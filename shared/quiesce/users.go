package quiesce

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
	ID, Name string
	// State is Docker's word for it: "running", "paused", "exited".
	State  string
	Labels map[string]string
	// Driver is Docker's name for the volume's driver.
	Driver string
	// ReadOnly: the container cannot write to the volume.
	ReadOnly bool
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
		for _, m := range c.Mounts {
			if m.Type != mount.TypeVolume || m.Name == "" {
				continue
			}
			list := users[m.Name]
			// One container may have a volume at several places.
			if i := slices.IndexFunc(list, func(u User) bool { return u.ID == c.ID }); i >= 0 {
				list[i].ReadOnly = list[i].ReadOnly && !m.RW
				continue
			}
			users[m.Name] = append(list, User{
				ID: c.ID, Name: ContainerName(c.Names), State: c.State, Labels: c.Labels, Driver: m.Driver, ReadOnly: !m.RW,
			})
		}
	}
	for _, list := range users {
		slices.SortFunc(list, func(x, y User) int { return strings.Compare(x.Name, y.Name) })
	}
	return users, nil
}

// ContainerName is the container's own name: the others are what links call it.
func ContainerName(names []string) string {
	for _, name := range names {
		if name = strings.TrimPrefix(name, "/"); !strings.Contains(name, "/") {
			return name
		}
	}
	return ""
}
