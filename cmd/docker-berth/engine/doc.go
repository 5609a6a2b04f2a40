// Package engine is what `docker berth` asks Docker: which plugins are Berth's and
// where their sockets are, and the names of networks and containers, all of which Berth
// itself does not know.
package engine

import (
	"context"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/volume"

	"github.com/berth-plugin/berth/shared/quiesce"
)

// An API is the part of Docker's client that is needed.
type API interface {
	quiesce.API
	PluginList(context.Context, filters.Args) (types.PluginsListResponse, error)
	NetworkList(context.Context, network.ListOptions) ([]network.Summary, error)
	ServerVersion(context.Context) (types.Version, error)
	VolumeInspect(ctx context.Context, name string) (volume.Volume, error)
	VolumeRemove(ctx context.Context, name string, force bool) error
}
