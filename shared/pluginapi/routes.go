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

// done makes a serve function of a method that has no result.
func done[D, Req any](fn func(D, context.Context, *Req) error) func(D, context.Context, *Req) (*empty, error) {
	return func(d D, ctx context.Context, req *Req) (*empty, error) {
		return &empty{}, fn(d, ctx, req)
	}
}

// constant adds a call whose answer needs no driver. It is quiet, because some of
// them come before and after every other call.
func constant[Resp any](s *Server, method string, answer Resp) {
	service := NewService[empty]()
	service.Set(empty{})
	register(s, service, route[empty, empty, Resp]{
		method: method, bare: true, quiet: true,
		serve: func(empty, context.Context, *empty) (*Resp, error) { return &answer, nil },
	})
}

func endpointFields(networkID, endpointID string) logrus.Fields {
	return logrus.Fields{"network": networkID, "endpoint": endpointID}
}

// routeNetwork adds NetworkDriver.
func (s *Server) routeNetwork(d *Service[NetworkDriver], capabilities NetworkCapabilities) {
	constant(s, "NetworkDriver.GetCapabilities", capabilities)
	register(s, d, route[NetworkDriver, GwAllocCheckRequest, GwAllocCheckResponse]{
		method: "NetworkDriver.GwAllocCheck", serve: NetworkDriver.GwAllocCheck,
	})
	register(s, d, route[NetworkDriver, network.AllocateNetworkRequest, network.AllocateNetworkResponse]{
		method: "NetworkDriver.AllocateNetwork", serve: NetworkDriver.AllocateNetwork,
		fields: func(r *network.AllocateNetworkRequest) logrus.Fields {
			return logrus.Fields{"network": r.NetworkID}
		},
	})
	register(s, d, route[NetworkDriver, network.FreeNetworkRequest, empty]{
		method: "NetworkDriver.FreeNetwork", serve: done(NetworkDriver.FreeNetwork),
		fields: func(r *network.FreeNetworkRequest) logrus.Fields { return logrus.Fields{"network": r.NetworkID} },
	})
	register(s, d, route[NetworkDriver, network.CreateNetworkRequest, empty]{
		method: "NetworkDriver.CreateNetwork", serve: done(NetworkDriver.CreateNetwork),
		fields: func(r *network.CreateNetworkRequest) logrus.Fields { return logrus.Fields{"network": r.NetworkID} },
	})
	register(s, d, route[NetworkDriver, network.DeleteNetworkRequest, empty]{
		method: "NetworkDriver.DeleteNetwork", serve: done(NetworkDriver.DeleteNetwork),
		fields: func(r *network.DeleteNetworkRequest) logrus.Fields { return logrus.Fields{"network": r.NetworkID} },
	})
	register(s, d, route[NetworkDriver, network.CreateEndpointRequest, network.CreateEndpointResponse]{
		method: "NetworkDriver.CreateEndpoint", serve: NetworkDriver.CreateEndpoint,
		fields: func(r *network.CreateEndpointRequest) logrus.Fields {
			fields := endpointFields(r.NetworkID, r.EndpointID)
			if r.Interface != nil {
				fields["address"], fields["address6"] = r.Interface.Address, r.Interface.AddressIPv6
			}
			return fields
		},
	})
	register(s, d, route[NetworkDriver, network.DeleteEndpointRequest, empty]{
		method: "NetworkDriver.DeleteEndpoint", serve: done(NetworkDriver.DeleteEndpoint),
		fields: func(r *network.DeleteEndpointRequest) logrus.Fields {
			return endpointFields(r.NetworkID, r.EndpointID)
		},
	})
	register(s, d, route[NetworkDriver, network.InfoRequest, EndpointInfoResponse]{
		method: "NetworkDriver.EndpointOperInfo", quiet: true, serve: NetworkDriver.EndpointInfo,
		fields: func(r *network.InfoRequest) logrus.Fields { return endpointFields(r.NetworkID, r.EndpointID) },
	})
	register(s, d, route[NetworkDriver, network.JoinRequest, JoinResponse]{
		method: "NetworkDriver.Join", serve: NetworkDriver.Join,
		fields: func(r *network.JoinRequest) logrus.Fields { return endpointFields(r.NetworkID, r.EndpointID) },
	})
	register(s, d, route[NetworkDriver, network.LeaveRequest, empty]{
		method: "NetworkDriver.Leave", serve: done(NetworkDriver.Leave),
		fields: func(r *network.LeaveRequest) logrus.Fields { return endpointFields(r.NetworkID, r.EndpointID) },
	})
	register(s, d, route[NetworkDriver, network.ProgramExternalConnectivityRequest, empty]{
		method: "NetworkDriver.ProgramExternalConnectivity", serve: done(NetworkDriver.ProgramExternalConnectivity),
		fields: func(r *network.ProgramExternalConnectivityRequest) logrus.Fields {
			return endpointFields(r.NetworkID, r.EndpointID)
		},
	})
	register(s, d, route[NetworkDriver, network.RevokeExternalConnectivityRequest, empty]{
		method: "NetworkDriver.RevokeExternalConnectivity", serve: done(NetworkDriver.RevokeExternalConnectivity),
		fields: func(r *network.RevokeExternalConnectivityRequest) logrus.Fields {
			return endpointFields(r.NetworkID, r.EndpointID)
		},
	})
	register(s, d, route[NetworkDriver, network.DiscoveryNotification, empty]{
		method: "NetworkDriver.DiscoverNew", quiet: true, serve: done(NetworkDriver.DiscoverNew),
	})
	register(s, d, route[NetworkDriver, network.DiscoveryNotification, empty]{
		method: "NetworkDriver.DiscoverDelete", quiet: true, serve: done(NetworkDriver.DiscoverDelete),
	})
}

// routeIPAM adds IpamDriver.
func (s *Server) routeIPAM(d *Service[IPAMDriver], capabilities IPAMCapabilities, spaces ipam.AddressSpacesResponse) {
	constant(s, "IpamDriver.GetCapabilities", capabilities)
	constant(s, "IpamDriver.GetDefaultAddressSpaces", spaces)
	register(s, d, route[IPAMDriver, ipam.RequestPoolRequest, ipam.RequestPoolResponse]{
		method: "IpamDriver.RequestPool", serve: IPAMDriver.RequestPool,
		fields: func(r *ipam.RequestPoolRequest) logrus.Fields {
			return logrus.Fields{"subnet": r.Pool, "range": r.SubPool}
		},
	})
	register(s, d, route[IPAMDriver, ipam.ReleasePoolRequest, empty]{
		method: "IpamDriver.ReleasePool", serve: done(IPAMDriver.ReleasePool),
		fields: func(r *ipam.ReleasePoolRequest) logrus.Fields { return logrus.Fields{"pool": r.PoolID} },
	})
	register(s, d, route[IPAMDriver, ipam.RequestAddressRequest, ipam.RequestAddressResponse]{
		method: "IpamDriver.RequestAddress", quiet: true, serve: IPAMDriver.RequestAddress,
		fields: func(r *ipam.RequestAddressRequest) logrus.Fields {
			return logrus.Fields{"pool": r.PoolID, "address": r.Address}
		},
	})
	register(s, d, route[IPAMDriver, ipam.ReleaseAddressRequest, empty]{
		method: "IpamDriver.ReleaseAddress", quiet: true, serve: done(IPAMDriver.ReleaseAddress),
		fields: func(r *ipam.ReleaseAddressRequest) logrus.Fields {
			return logrus.Fields{"pool": r.PoolID, "address": r.Address}
		},
	})
}

// routeVolume adds VolumeDriver.
func (s *Server) routeVolume(d *Service[VolumeDriver], capability volume.Capability) {
	constant(s, "VolumeDriver.Capabilities", volume.CapabilitiesResponse{Capabilities: capability})
	register(s, d, route[VolumeDriver, volume.CreateRequest, empty]{
		method: "VolumeDriver.Create", refuse: refuseInBody, serve: done(VolumeDriver.Create),
		fields: func(r *volume.CreateRequest) logrus.Fields { return logrus.Fields{"volume": r.Name} },
	})
	register(s, d, route[VolumeDriver, volume.RemoveRequest, empty]{
		method: "VolumeDriver.Remove", refuse: refuseInBody, serve: done(VolumeDriver.Remove),
		fields: func(r *volume.RemoveRequest) logrus.Fields { return logrus.Fields{"volume": r.Name} },
	})
	register(s, d, route[VolumeDriver, volume.MountRequest, volume.MountResponse]{
		method: "VolumeDriver.Mount", refuse: refuseInBody, serve: VolumeDriver.Mount,
		fields: func(r *volume.MountRequest) logrus.Fields { return logrus.Fields{"volume": r.Name, "mount": r.ID} },
	})
	register(s, d, route[VolumeDriver, volume.UnmountRequest, empty]{
		method: "VolumeDriver.Unmount", refuse: refuseInBody, serve: done(VolumeDriver.Unmount),
		fields: func(r *volume.UnmountRequest) logrus.Fields { return logrus.Fields{"volume": r.Name, "mount": r.ID} },
	})
	register(s, d, route[VolumeDriver, volume.PathRequest, volume.PathResponse]{
		method: "VolumeDriver.Path", quiet: true, refuse: refuseInBody, serve: VolumeDriver.Path,
		fields: func(r *volume.PathRequest) logrus.Fields { return logrus.Fields{"volume": r.Name} },
	})
	register(s, d, route[VolumeDriver, volume.GetRequest, volume.GetResponse]{
		method: "VolumeDriver.Get", quiet: true, refuse: refuseOnlyMissing, serve: VolumeDriver.Get,
		fields: func(r *volume.GetRequest) logrus.Fields { return logrus.Fields{"volume": r.Name} },
	})
	register(s, d, route[VolumeDriver, empty, volume.ListResponse]{
		method: "VolumeDriver.List", bare: true, quiet: true, refuse: refuseInBody, serve: func(d VolumeDriver, ctx context.Context, _ *empty) (*volume.ListResponse, error) { return d.List(ctx) },
	})
}
