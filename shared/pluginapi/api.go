package pluginapi

import (
	"context"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/docker/go-plugins-helpers/volume"
)

// A NetworkDriver answers the NetworkDriver.* calls of dockerd, except
// GetCapabilities, which is asked before there is a driver.
//
// Calls come concurrently and in no order across containers. Every call may be
// repeated: a handler gives the same answer for the same request, and undoing
// what is unknown succeeds. dockerd ignores errors from DeleteNetwork, Leave,
// DeleteEndpoint and RevokeExternalConnectivity and forgets the object; after an
// error from CreateNetwork or CreateEndpoint it sends no delete, so the driver
// undoes its own partial work first.
type NetworkDriver interface {
	GwAllocCheck(context.Context, *GwAllocCheckRequest) (*GwAllocCheckResponse, error)
	AllocateNetwork(context.Context, *network.AllocateNetworkRequest) (*network.AllocateNetworkResponse, error)
	FreeNetwork(context.Context, *network.FreeNetworkRequest) error
	CreateNetwork(context.Context, *network.CreateNetworkRequest) error
	DeleteNetwork(context.Context, *network.DeleteNetworkRequest) error
	CreateEndpoint(context.Context, *network.CreateEndpointRequest) (*network.CreateEndpointResponse, error)
	DeleteEndpoint(context.Context, *network.DeleteEndpointRequest) error
	EndpointInfo(context.Context, *network.InfoRequest) (*EndpointInfoResponse, error)
	Join(context.Context, *network.JoinRequest) (*JoinResponse, error)
	Leave(context.Context, *network.LeaveRequest) error
	ProgramExternalConnectivity(context.Context, *network.ProgramExternalConnectivityRequest) error
	RevokeExternalConnectivity(context.Context, *network.RevokeExternalConnectivityRequest) error
	DiscoverNew(context.Context, *network.DiscoveryNotification) error
	DiscoverDelete(context.Context, *network.DiscoveryNotification) error
}

// An IPAMDriver answers the IpamDriver.* calls of dockerd, except GetCapabilities
// and GetDefaultAddressSpaces, which are asked before there is a driver. dockerd
// ignores errors from the two releases.
type IPAMDriver interface {
	RequestPool(context.Context, *ipam.RequestPoolRequest) (*ipam.RequestPoolResponse, error)
	ReleasePool(context.Context, *ipam.ReleasePoolRequest) error
	RequestAddress(context.Context, *ipam.RequestAddressRequest) (*ipam.RequestAddressResponse, error)
	ReleaseAddress(context.Context, *ipam.ReleaseAddressRequest) error
}

// A VolumeDriver answers the VolumeDriver.* calls of dockerd, except Capabilities.
//
// An error from Get, whatever its kind, makes dockerd forget the volume and
// create an empty local one at the next `docker run`. Get therefore returns an
// error only when the volume certainly does not exist.
type VolumeDriver interface {
	Create(context.Context, *volume.CreateRequest) error
	Remove(context.Context, *volume.RemoveRequest) error
	Mount(context.Context, *volume.MountRequest) (*volume.MountResponse, error)
	Unmount(context.Context, *volume.UnmountRequest) error
	Path(context.Context, *volume.PathRequest) (*volume.PathResponse, error)
	Get(context.Context, *volume.GetRequest) (*volume.GetResponse, error)
	List(context.Context) (*volume.ListResponse, error)
}

// NetworkCapabilities answers NetworkDriver.GetCapabilities. The helpers' type
// lacks GwAllocChecker, which Engine 28.0 and newer read.
type NetworkCapabilities struct {
	network.CapabilitiesResponse
	// GwAllocChecker asks dockerd to send GwAllocCheck before it requests a
	// gateway address.
	GwAllocChecker bool
}

// GwAllocCheckRequest asks whether gateway addresses should be requested for a
// network that is about to be created (Engine 28.0 and newer).
type GwAllocCheckRequest struct {
	// Options is the map that CreateNetwork will carry.
	Options map[string]any
}

// GwAllocCheckResponse tells dockerd for which family to request no gateway.
type GwAllocCheckResponse struct {
	SkipIPv4 bool
	SkipIPv6 bool
}

// InterfaceName names the link that dockerd moves into the sandbox. DstName is
// understood by Engines that carry moby#52866 and ignored by the others.
type InterfaceName struct {
	network.InterfaceName
	DstName string `json:",omitempty"`
}

// JoinResponse answers NetworkDriver.Join. InterfaceName is nil for an endpoint
// without a link. A StaticRoute with an empty Destination crashes Engine 26.
type JoinResponse struct {
	InterfaceName         *InterfaceName `json:",omitempty"`
	Gateway               string
	GatewayIPv6           string
	StaticRoutes          []*network.StaticRoute `json:",omitempty"`
	DisableGatewayService bool
}

// EndpointInfoResponse answers NetworkDriver.EndpointOperInfo. dockerd keeps the
// value as untyped JSON and shows none of it.
type EndpointInfoResponse struct {
	Value map[string]any
}

// IPAMCapabilities answers IpamDriver.GetCapabilities. The helpers' type lacks
// RequiresRequestReplay.
type IPAMCapabilities struct {
	ipam.CapabilitiesResponse
	// RequiresRequestReplay asks dockerd to repeat every request at its start.
	// Berth keeps its own records, so it is false.
	RequiresRequestReplay bool
}
