package netplugin

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// ProgramExternalConnectivity answers NetworkDriver.ProgramExternalConnectivity:
// the endpoint publishes these ports and no others. dockerd sends it for the
// endpoint that is its container's gateway, and again, without a revocation in
// between, when that is so for another family only.
func (d *Driver) ProgramExternalConnectivity(ctx context.Context, req *network.ProgramExternalConnectivityRequest) error {
	want, noProxy6to4, err := options.ParsePorts(req.Options)
	if err != nil {
		return err
	}
	err = d.program(ctx, req, want, noProxy6to4)
	if errdefs.IsConflict(err) && d.freePorts(ctx) {
		err = d.program(ctx, req, want, noProxy6to4)
	}
	return err
}

// freePorts removes endpoints that publish ports for containers that are gone. It
// reports whether there were any. The caller has locked no network.
func (d *Driver) freePorts(ctx context.Context) (freed bool) {
	links, err := d.endpointLinks()
	if err != nil {
		return false
	}
	for _, net := range d.store.allNetworks() {
		for _, rec := range d.store.endpoints(net.Spec.ID) {
			if len(rec.Spec.Ports) == 0 || !d.isGone(rec, links) {
				continue
			}
			if err := d.removeGone(ctx, rec); err != nil {
				d.log.WithError(err).WithField("endpoint", rec.Spec.ID).Error("endpoint of a container that is gone could not be removed")
				continue
			}
			freed = true
		}
	}
	return freed
}

func (d *Driver) program(ctx context.Context, req *network.ProgramExternalConnectivityRequest, want []options.PortRequest, noProxy6to4 bool) error {
	unlock, err := d.locks.Lock(ctx, req.NetworkID)
	if err != nil {
		return err
	}
	defer unlock()
	net, ok := d.store.network(req.NetworkID)
	if !ok || net.Phase != phaseReady {
		return unknownNetwork(req.NetworkID)
	}
	rec, ok := d.store.endpoint(req.NetworkID, req.EndpointID)
	if !ok || rec.Phase != phaseReady {
		return fault.NotFound("endpoint %s is not known to Berth; start the container again", short(req.EndpointID))
	}
	if len(want) > 0 && net.Spec.OnLAN() && !net.Spec.WantsGatewayBridge() {
		d.log.WithFields(logrus.Fields{"network": req.NetworkID, "endpoint": req.EndpointID}).
			Warn("ports are not published: on this network the container is reached by its own address")
	}
	if len(want) == 0 || !net.Spec.Publishes() {
		if len(rec.Spec.Ports) == 0 {
			return nil
		}
		return d.removePorts(ctx, net.Spec, rec)
	}
	spec := rec.Spec
	spec.NoProxy6to4 = noProxy6to4
	if err := d.publish(ctx, net.Spec, spec, want); err != nil {
		undo, cancel := undoContext(ctx)
		defer cancel()
		// The record may have the new ports or the old ones; none are wanted.
		rec, _ := d.store.endpoint(req.NetworkID, req.EndpointID)
		return errors.Join(err, during("undo", d.removePorts(undo, net.Spec, rec)))
	}
	return nil
}

// publish reserves, records and then opens ports. The caller has locked the
// network.
func (d *Driver) publish(ctx context.Context, net options.Network, spec options.Endpoint, want []options.PortRequest) error {
	ports, err := d.mode(net).ReservePorts(ctx, net, spec, want)
	if err != nil {
		return err
	}
	spec.Ports = ports
	if err := d.store.setPorts(spec); err != nil {
		return err
	}
	return d.mode(net).EnsurePorts(ctx, net, spec)
}

// removePorts ends what the endpoint publishes, on the host and in the record.
// The caller has locked the network.
func (d *Driver) removePorts(ctx context.Context, net options.Network, rec endpointRecord) error {
	if err := d.mode(net).RemovePorts(ctx, net, rec.Spec); err != nil {
		return err
	}
	if len(rec.Spec.Ports) == 0 {
		return nil
	}
	spec := rec.Spec
	spec.Ports, spec.NoProxy6to4 = nil, false
	return d.store.setPorts(spec)
}

// repairPorts publishes again what an endpoint did before. A port that another
// process has taken meanwhile is logged and tried again by Run, and keeps neither
// the endpoint's other ports nor its network from working. The caller has locked
// the network.
func (d *Driver) repairPorts(ctx context.Context, net options.Network, rec endpointRecord) {
	err := error(nil)
	if len(rec.Spec.Ports) > 0 {
		err = d.mode(net).EnsurePorts(ctx, net, rec.Spec)
	}
	if d.setUnserved(rec.Spec.ID, err != nil) || err == nil {
		return
	}
	d.log.WithError(err).WithField("network", net.ID).WithField("endpoint", rec.Spec.ID).
		Error("not all ports could be published again; they are tried again")
}

// setUnserved notes whether ports of an endpoint are missing and returns what was
// noted before.
func (d *Driver) setUnserved(endpoint string, missing bool) (before bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	before = d.unserved[endpoint]
	if delete(d.unserved, endpoint); missing {
		d.unserved[endpoint] = true
	}
	return before
}

// retryPorts tries those that repairPorts could not have.
func (d *Driver) retryPorts(ctx context.Context, network string) error {
	d.mu.Lock()
	none := len(d.unserved) == 0
	d.mu.Unlock()
	if none {
		return nil
	}
	unlock, err := d.locks.Lock(ctx, network)
	if err != nil {
		return err
	}
	defer unlock()
	net, ok := d.store.network(network)
	if !ok || net.Phase != phaseReady {
		return nil
	}
	for _, rec := range d.store.endpoints(network) {
		d.mu.Lock()
		missing := d.unserved[rec.Spec.ID]
		d.mu.Unlock()
		if missing && rec.Phase == phaseReady {
			d.repairPorts(ctx, net.Spec, rec)
		}
	}
	return nil
}

// RevokeExternalConnectivity answers NetworkDriver.RevokeExternalConnectivity.
// Engines from 29 often leave it out.
func (d *Driver) RevokeExternalConnectivity(ctx context.Context, req *network.RevokeExternalConnectivityRequest) error {
	return d.unpublish(ctx, req.NetworkID, req.EndpointID)
}

// Leave answers NetworkDriver.Leave, which revokes what was not revoked. The link
// is still in the container; dockerd brings it back before DeleteEndpoint, which
// removes it.
func (d *Driver) Leave(ctx context.Context, req *network.LeaveRequest) error {
	return d.unpublish(ctx, req.NetworkID, req.EndpointID)
}

// unpublish ends what an endpoint publishes; an unknown one is success.
func (d *Driver) unpublish(ctx context.Context, networkID, endpointID string) error {
	unlock, err := d.locks.Lock(ctx, networkID)
	if err != nil {
		return err
	}
	defer unlock()
	net, ok := d.store.network(networkID)
	if !ok {
		return nil
	}
	rec, ok := d.store.endpoint(networkID, endpointID)
	if !ok || len(rec.Spec.Ports) == 0 {
		return nil
	}
	return d.removePorts(ctx, net.Spec, rec)
}
