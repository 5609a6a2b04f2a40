package netplugin

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"reflect"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/pluginapi"
)

// CreateEndpoint answers NetworkDriver.CreateEndpoint. The same endpoint again
// gets the same answer; another one with its ID is a conflict.
func (d *Driver) CreateEndpoint(ctx context.Context, req *network.CreateEndpointRequest) (*network.CreateEndpointResponse, error) {
	unlock, err := d.locks.Lock(ctx, req.NetworkID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	net, ok := d.store.network(req.NetworkID)
	if !ok || net.Phase != phaseReady {
		return nil, unknownNetwork(req.NetworkID)
	}
	spec, warnings, err := options.ParseEndpoint(net.Spec, req.EndpointID, req.Interface, req.Options)
	if err != nil {
		return nil, err
	}
	d.chooseMAC(net.Spec, &spec)
	if err := d.createEndpoint(ctx, net.Spec, spec, warnings); err != nil {
		return nil, err
	}
	// dockerd takes it for an error when a field that it gave comes back.
	if spec.MAC == nil || req.Interface != nil && req.Interface.MacAddress != "" {
		return &network.CreateEndpointResponse{}, nil
	}
	return &network.CreateEndpointResponse{
		Interface: &network.EndpointInterface{MacAddress: spec.MAC.String()},
	}, nil
}

func (d *Driver) createEndpoint(ctx context.Context, net options.Network, spec options.Endpoint, warnings []string) error {
	if rec, ok := d.store.endpoint(net.ID, spec.ID); ok {
		if rec.Phase == phaseReady {
			return sameEndpoint(rec, spec)
		}
		if err := d.removeEndpoint(ctx, net, rec); err != nil {
			return during("undo an earlier try", err)
		}
	}
	d.warn(warnings, logrus.Fields{"network": net.ID, "endpoint": spec.ID})
	if err := d.freeAddresses(ctx, net, spec); err != nil {
		return err
	}
	if d.isBroken(net.ID) {
		if err := d.repairSoon(ctx, net); err != nil {
			return err
		}
	}
	rec, err := d.store.addEndpoint(spec)
	if err != nil {
		return err
	}
	d.countMAC(net, rec.Spec, 1)
	err = d.mode(net).EnsureEndpoint(ctx, net, rec.Spec)
	if err == nil {
		err = d.store.setEndpointPhase(rec.Spec, phaseReady)
	}
	if err == nil {
		return nil
	}
	undo, cancel := undoContext(ctx)
	defer cancel()
	return errors.Join(err, during("undo", d.removeEndpoint(undo, net, rec)))
}

// chooseMAC gives an endpoint the MAC address that its address was leased for, or one
// that depends on nothing but its network and address, if it needs one.
func (d *Driver) chooseMAC(net options.Network, spec *options.Endpoint) {
	var leased ipam.Lease
	for _, addr := range addresses(*spec) {
		if lease, ok := d.store.leases.leaseOf(net.ID, addr); ok && lease.MAC != nil {
			leased = lease
		}
	}
	switch {
	case spec.MAC != nil && leased.MAC != nil && !bytes.Equal(spec.MAC, leased.MAC):
		d.log.WithFields(logrus.Fields{"network": net.ID, "address": leased.Addr, "mac": leased.MAC}).
			Warn("the DHCP server knows the address by another MAC address than the container's: BERTH_IPAM_KEY=mac lets it know the container's")
	case spec.MAC != nil || net.SharesMAC():
	case leased.MAC != nil:
		spec.MAC = leased.MAC
	default:
		spec.MAC = options.GenerateMAC(*spec)
	}
}

// countMAC notes that there is an endpoint more or less on a LAN.
func (d *Driver) countMAC(net options.Network, spec options.Endpoint, by int) {
	if !net.OnLAN() || spec.MAC == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.macs[string(spec.MAC)] += by; d.macs[string(spec.MAC)] <= 0 {
		delete(d.macs, string(spec.MAC))
	}
}

// sameEndpoint compares a repeated request with what was recorded.
func sameEndpoint(rec endpointRecord, spec options.Endpoint) error {
	spec.HostLink, spec.ContainerLink = rec.Spec.HostLink, rec.Spec.ContainerLink
	spec.Ports, spec.NoProxy6to4 = rec.Spec.Ports, rec.Spec.NoProxy6to4
	if !reflect.DeepEqual(rec.Spec, spec) {
		return fault.Conflict("endpoint %s exists with another address, MAC address or name", short(spec.ID))
	}
	return nil
}

// freeAddresses makes sure that no other endpoint of the network has the
// addresses, whichever IPAM driver gave them out. One whose container is gone,
// unbeknown to Berth, is removed.
func (d *Driver) freeAddresses(ctx context.Context, net options.Network, spec options.Endpoint) error {
	for _, other := range d.store.endpoints(net.ID) {
		if other.Spec.ID == spec.ID {
			continue
		}
		for _, addr := range addresses(spec) {
			if !hasAddress(other.Spec, addr) {
				continue
			}
			gone, err := d.containerGone(other)
			if err != nil {
				return err
			}
			if !gone {
				return fault.Conflict("address %s is in use by endpoint %s", addr, short(other.Spec.ID))
			}
			if err := d.removeDead(ctx, net, other); err != nil {
				return during("remove endpoint "+short(other.Spec.ID)+" of a container that is gone", err)
			}
			break
		}
	}
	return nil
}

// addresses are those that the endpoint has.
func addresses(spec options.Endpoint) []netip.Addr {
	var addrs []netip.Addr
	for _, p := range []netip.Prefix{spec.IPv4, spec.IPv6} {
		if p.IsValid() {
			addrs = append(addrs, p.Addr())
		}
	}
	return addrs
}

func hasAddress(spec options.Endpoint, addr netip.Addr) bool {
	return spec.IPv4.IsValid() && spec.IPv4.Addr() == addr || spec.IPv6.IsValid() && spec.IPv6.Addr() == addr
}

// DeleteEndpoint answers NetworkDriver.DeleteEndpoint. dockerd ignores the error
// and forgets the endpoint; what could not be removed is tried again by Run.
func (d *Driver) DeleteEndpoint(ctx context.Context, req *network.DeleteEndpointRequest) error {
	unlock, err := d.locks.Lock(ctx, req.NetworkID)
	if err != nil {
		return err
	}
	defer unlock()
	net, ok := d.store.network(req.NetworkID)
	if !ok {
		return nil
	}
	rec, ok := d.store.endpoint(req.NetworkID, req.EndpointID)
	if !ok {
		return nil
	}
	return d.removeEndpoint(ctx, net.Spec, rec)
}

// removeEndpoint removes an endpoint and its record. The caller has locked the
// network.
func (d *Driver) removeEndpoint(ctx context.Context, net options.Network, rec endpointRecord) error {
	if rec.Phase == phaseReady {
		if err := d.store.setEndpointPhase(rec.Spec, phaseRemoving); err != nil {
			return err
		}
	}
	if err := d.removed(d.mode(net).RemoveEndpoint(ctx, net, rec.Spec)); err != nil {
		return err
	}
	d.alive(rec.Spec.ID)
	d.setUnserved(rec.Spec.ID, false)
	d.countMAC(net, rec.Spec, -1)
	ended, err := d.store.dropEndpoint(rec.Spec)
	d.giveBack(ended)
	return err
}

// EndpointInfo answers NetworkDriver.EndpointOperInfo. Engines before 28.0.2 fail
// the start of a container on an error, and none shows anything of the value.
func (d *Driver) EndpointInfo(context.Context, *network.InfoRequest) (*pluginapi.EndpointInfoResponse, error) {
	return &pluginapi.EndpointInfoResponse{Value: map[string]any{}}, nil
}

// Join answers NetworkDriver.Join with the link to move into the container and
// its gateways. Up to Engine 27 the container's namespace does not exist yet.
func (d *Driver) Join(ctx context.Context, req *network.JoinRequest) (*pluginapi.JoinResponse, error) {
	unlock, err := d.locks.Lock(ctx, req.NetworkID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	net, ok := d.store.network(req.NetworkID)
	if !ok || net.Phase != phaseReady {
		return nil, unknownNetwork(req.NetworkID)
	}
	rec, ok := d.store.endpoint(req.NetworkID, req.EndpointID)
	if !ok || rec.Phase != phaseReady {
		return nil, fault.NotFound("endpoint %s is not known to Berth; start the container again", short(req.EndpointID))
	}
	resp := &pluginapi.JoinResponse{
		InterfaceName: &pluginapi.InterfaceName{
			InterfaceName: network.InterfaceName{
				SrcName:   rec.Spec.ContainerLink,
				DstPrefix: net.Spec.ContainerPrefix,
			},
			DstName: rec.Spec.ContainerName,
		},
		Gateway:      gateway(net.Spec, rec.Spec.IPv4),
		GatewayIPv6:  gateway(net.Spec, rec.Spec.IPv6),
		StaticRoutes: staticRoutes(net.Spec, rec.Spec),
	}
	// Without this dockerd connects the container to its docker_gwbridge.
	resp.DisableGatewayService = resp.Gateway == "" && resp.GatewayIPv6 == "" && !net.Spec.WantsGatewayBridge()
	return resp, nil
}

// gateway is the gateway for an address, "" for none. dockerd installs one on
// internal networks too, if it is told one.
func gateway(net options.Network, addr netip.Prefix) string {
	if gw := net.GatewayOf(addr.Addr()); gw.IsValid() {
		return gw.String()
	}
	return ""
}

// staticRoutes are the routes that the endpoint gets beside its gateway. Engine 26
// crashes on an empty destination, which options refuses.
func staticRoutes(net options.Network, ep options.Endpoint) []*network.StaticRoute {
	// As dockerd numbers them.
	const viaNextHop, onLink = 0, 1
	var routes []*network.StaticRoute
	for _, r := range net.RoutesOf(ep) {
		route := &network.StaticRoute{Destination: r.Destination.String(), RouteType: onLink}
		if r.NextHop.IsValid() {
			route.RouteType, route.NextHop = viaNextHop, r.NextHop.String()
		}
		routes = append(routes, route)
	}
	return routes
}
