// Package engine is what `docker berth` asks Docker: which plugins are Berth's and
// where their sockets are, the names of networks and containers, and which containers
// use a volume, all of which Berth itself does not know.
package engine

import (
	"context"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/volume"
)

// An API is the part of Docker's client that is needed.
type API interface {
	PluginList(context.Context, filters.Args) (types.PluginsListResponse, error)
	NetworkList(context.Context, network.ListOptions) ([]network.Summary, error)
	ServerVersion(context.Context) (types.Version, error)
	ContainerList(context.Context, container.ListOptions) ([]container.Summary, error)
	ContainerInspect(ctx context.Context, id string) (container.InspectResponse, error)
	ContainerPause(ctx context.Context, id string) error
	ContainerUnpause(ctx context.Context, id string) error
	VolumeInspect(ctx context.Context, name string) (volume.Volume, error)
	VolumeRemove(ctx context.Context, name string, force bool) error
}
