package pluginapi

import (
	"context"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/docker/go-plugins-helpers/volume"
	"github.com/sirupsen/logrus"
)

// empty is the request of a call without parameters and the answer of one
// without a result.
type empty struct{}

// done makes a serve function of one that has no result.
func done[Req any](fn func(context.Context, *Req) error) func(context.Context, *Req) (*empty, error) {
	return func(ctx context.Context, req *Req) (*empty, error) {
		return &empty{}, fn(ctx, req)
	}
}

// noParams makes a serve function of one that takes no request.
func noParams[Resp any](fn func(context.Context) (*Resp, error)) func(context.Context, *empty) (*Resp, error) {
	return func(ctx context.Context, _ *empty) (*Resp, error) {
		return fn(ctx)
	}
}

func endpointFields(networkID, endpointID string) logrus.Fields {
	return logrus.Fields{"network": networkID, "endpoint": endpointID}
}

// routeNetwork adds NetworkDriver. The capabilities are not gated: a driver that
// does not tell them while dockerd starts is not registered until the next start.
func (s *Server) routeNetwork(d NetworkDriver, ready *Ready) {
	register(s, route[empty, NetworkCapabilities]{
		method: "NetworkDriver.GetCapabilities", bare: true, serve: noParams(d.GetCapabilities),
	})
	register(s, route[GwAllocCheckRequest, GwAllocCheckResponse]{
		method: "NetworkDriver.GwAllocCheck", serve: d.GwAllocCheck,
	})
	register(s, route[network.AllocateNetworkRequest, network.AllocateNetworkResponse]{
		method: "NetworkDriver.AllocateNetwork", ready: ready, serve: d.AllocateNetwork,
		fields: func(r *network.AllocateNetworkRequest) logrus.Fields {
			return logrus.Fields{"network": r.NetworkID}
		},
	})
	register(s, route[network.FreeNetworkRequest, empty]{
		method: "NetworkDriver.FreeNetwork", ready: ready, serve: done(d.FreeNetwork),
		fields: func(r *network.FreeNetworkRequest) logrus.Fields { return logrus.Fields{"network": r.NetworkID} },
	})
	register(s, route[network.CreateNetworkRequest, empty]{
		method: "NetworkDriver.CreateNetwork", ready: ready, serve: done(d.CreateNetwork),
		fields: func(r *network.CreateNetworkRequest) logrus.Fields { return logrus.Fields{"network": r.NetworkID} },
	})
	register(s, route[network.DeleteNetworkRequest, empty]{
		method: "NetworkDriver.DeleteNetwork", ready: ready, serve: done(d.DeleteNetwork),
		fields: func(r *network.DeleteNetworkRequest) logrus.Fields { return logrus.Fields{"network": r.NetworkID} },
	})
	register(s, route[network.CreateEndpointRequest, network.CreateEndpointResponse]{
		method: "NetworkDriver.CreateEndpoint", ready: ready, serve: d.CreateEndpoint,
		fields: func(r *network.CreateEndpointRequest) logrus.Fields {
			return endpointFields(r.NetworkID, r.EndpointID)
		},
	})
	register(s, route[network.DeleteEndpointRequest, empty]{
		method: "NetworkDriver.DeleteEndpoint", ready: ready, serve: done(d.DeleteEndpoint),
		fields: func(r *network.DeleteEndpointRequest) logrus.Fields {
			return endpointFields(r.NetworkID, r.EndpointID)
		},
	})
	register(s, route[network.InfoRequest, EndpointInfoResponse]{
		method: "NetworkDriver.EndpointOperInfo", quiet: true, ready: ready, serve: d.EndpointInfo,
		fields: func(r *network.InfoRequest) logrus.Fields { return endpointFields(r.NetworkID, r.EndpointID) },
	})
	register(s, route[network.JoinRequest, JoinResponse]{
		method: "NetworkDriver.Join", ready: ready, serve: d.Join,
		fields: func(r *network.JoinRequest) logrus.Fields { return endpointFields(r.NetworkID, r.EndpointID) },
	})
	register(s, route[network.LeaveRequest, empty]{
		method: "NetworkDriver.Leave", ready: ready, serve: done(d.Leave),
		fields: func(r *network.LeaveRequest) logrus.Fields { return endpointFields(r.NetworkID, r.EndpointID) },
	})
	register(s, route[network.ProgramExternalConnectivityRequest, empty]{
		method: "NetworkDriver.ProgramExternalConnectivity", ready: ready, serve: done(d.ProgramExternalConnectivity),
		fields: func(r *network.ProgramExternalConnectivityRequest) logrus.Fields {
			return endpointFields(r.NetworkID, r.EndpointID)
		},
	})
	register(s, route[network.RevokeExternalConnectivityRequest, empty]{
		method: "NetworkDriver.RevokeExternalConnectivity", ready: ready, serve: done(d.RevokeExternalConnectivity),
		fields: func(r *network.RevokeExternalConnectivityRequest) logrus.Fields {
			return endpointFields(r.NetworkID, r.EndpointID)
		},
	})
	register(s, route[network.DiscoveryNotification, empty]{
		method: "NetworkDriver.DiscoverNew", quiet: true, serve: done(d.DiscoverNew),
	})
	register(s, route[network.DiscoveryNotification, empty]{
		method: "NetworkDriver.DiscoverDelete", quiet: true, serve: done(d.DiscoverDelete),
	})
}

// routeIPAM adds IpamDriver.
func (s *Server) routeIPAM(d IPAMDriver, ready *Ready) {
	register(s, route[empty, IPAMCapabilities]{
		method: "IpamDriver.GetCapabilities", bare: true, serve: noParams(d.GetCapabilities),
	})
	register(s, route[empty, ipam.AddressSpacesResponse]{
		method: "IpamDriver.GetDefaultAddressSpaces", bare: true, quiet: true, serve: noParams(d.GetDefaultAddressSpaces),
	})
	register(s, route[ipam.RequestPoolRequest, ipam.RequestPoolResponse]{
		method: "IpamDriver.RequestPool", ready: ready, serve: d.RequestPool,
		fields: func(r *ipam.RequestPoolRequest) logrus.Fields {
			return logrus.Fields{"subnet": r.Pool, "range": r.SubPool}
		},
	})
	register(s, route[ipam.ReleasePoolRequest, empty]{
		method: "IpamDriver.ReleasePool", ready: ready, serve: done(d.ReleasePool),
		fields: func(r *ipam.ReleasePoolRequest) logrus.Fields { return logrus.Fields{"pool": r.PoolID} },
	})
	register(s, route[ipam.RequestAddressRequest, ipam.RequestAddressResponse]{
		method: "IpamDriver.RequestAddress", ready: ready, serve: d.RequestAddress,
		fields: func(r *ipam.RequestAddressRequest) logrus.Fields {
			return logrus.Fields{"pool": r.PoolID, "address": r.Address}
		},
	})
	register(s, route[ipam.ReleaseAddressRequest, empty]{
		method: "IpamDriver.ReleaseAddress", ready: ready, serve: done(d.ReleaseAddress),
		fields: func(r *ipam.ReleaseAddressRequest) logrus.Fields {
			return logrus.Fields{"pool": r.PoolID, "address": r.Address}
		},
	})
}

// routeVolume adds VolumeDriver.
func (s *Server) routeVolume(d VolumeDriver, ready *Ready) {
	register(s, route[empty, volume.CapabilitiesResponse]{
		method: "VolumeDriver.Capabilities", bare: true, quiet: true, refuse: refuseInBody, serve: noParams(d.Capabilities),
	})
	register(s, route[volume.CreateRequest, empty]{
		method: "VolumeDriver.Create", ready: ready, refuse: refuseInBody, serve: done(d.Create),
		fields: func(r *volume.CreateRequest) logrus.Fields { return logrus.Fields{"volume": r.Name} },
	})
	register(s, route[volume.RemoveRequest, empty]{
		method: "VolumeDriver.Remove", ready: ready, refuse: refuseInBody, serve: done(d.Remove),
		fields: func(r *volume.RemoveRequest) logrus.Fields { return logrus.Fields{"volume": r.Name} },
	})
	register(s, route[volume.MountRequest, volume.MountResponse]{
		method: "VolumeDriver.Mount", ready: ready, refuse: refuseInBody, serve: d.Mount,
		fields: func(r *volume.MountRequest) logrus.Fields { return logrus.Fields{"volume": r.Name, "mount": r.ID} },
	})
	register(s, route[volume.UnmountRequest, empty]{
		method: "VolumeDriver.Unmount", ready: ready, refuse: refuseInBody, serve: done(d.Unmount),
		fields: func(r *volume.UnmountRequest) logrus.Fields { return logrus.Fields{"volume": r.Name, "mount": r.ID} },
	})
	register(s, route[volume.PathRequest, volume.PathResponse]{
		method: "VolumeDriver.Path", quiet: true, ready: ready, refuse: refuseInBody, serve: d.Path,
		fields: func(r *volume.PathRequest) logrus.Fields { return logrus.Fields{"volume": r.Name} },
	})
	register(s, route[volume.GetRequest, volume.GetResponse]{
		method: "VolumeDriver.Get", quiet: true, ready: ready, refuse: refuseOnlyMissing, serve: d.Get,
		fields: func(r *volume.GetRequest) logrus.Fields { return logrus.Fields{"volume": r.Name} },
	})
	register(s, route[empty, volume.ListResponse]{
		method: "VolumeDriver.List", bare: true, quiet: true, ready: ready, refuse: refuseInBody, serve: noParams(d.List),
	})
}
