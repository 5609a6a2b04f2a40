package engine

import (
	"context"
	"fmt"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/versions"

	"github.com/berth-plugin/berth/shared/quiesce"
)

// A Container is one that is connected to a network.
type Container struct {
	ID, Name string
}

// A View is what Docker knows at one moment. The zero View knows nothing.
type View struct {
	// Known says that Docker was asked and answered.
	Known bool
	// Networks by ID, of all drivers.
	Networks map[string]network.Summary
	// Containers by the ID of their endpoint, of those that run.
	Containers map[string]Container
	// On is the ID of the network of each of those endpoints.
	On map[string]string
}

// Look asks Docker for networks and running containers, in two calls.
func Look(ctx context.Context, api API) (View, error) {
	networks, err := api.NetworkList(ctx, network.ListOptions{})
	if err != nil {
		return View{}, fmt.Errorf("list Docker's networks: %w", err)
	}
	containers, err := api.ContainerList(ctx, container.ListOptions{})
	if err != nil {
		return View{}, fmt.Errorf("list Docker's containers: %w", err)
	}
	v := View{
		Known:      true,
		Networks:   make(map[string]network.Summary, len(networks)),
		Containers: make(map[string]Container, len(containers)),
		On:         make(map[string]string, len(containers)),
	}
	for _, n := range networks {
		v.Networks[n.ID] = n
	}
	for _, c := range containers {
		if c.NetworkSettings == nil {
			continue
		}
		for _, ep := range c.NetworkSettings.Networks {
			if ep == nil || ep.EndpointID == "" {
				continue
			}
			v.Containers[ep.EndpointID] = Container{ID: c.ID, Name: quiesce.ContainerName(c.Names)}
			v.On[ep.EndpointID] = ep.NetworkID
		}
	}
	return v, nil
}

// Network is the name of a network, "" if Docker does not know it.
func (v View) Network(id string) string { return v.Networks[id].Name }

// Container is the name of an endpoint's container, "" if Docker does not know it.
func (v View) Container(endpoint string) string { return v.Containers[endpoint].Name }

// namesAPI is the API of Engine 29, the first that tells a plugin which container an
// address is for.
const namesAPI = "1.52"

// TellsNames reports whether Docker tells plugins the names of containers that want
// addresses, and its version.
func TellsNames(ctx context.Context, api API) (tells bool, version string, _ error) {
	v, err := api.ServerVersion(ctx)
	if err != nil {
		return false, "", fmt.Errorf("ask for Docker's version: %w", err)
	}
	return versions.GreaterThanOrEqualTo(v.APIVersion, namesAPI), v.Version, nil
}
