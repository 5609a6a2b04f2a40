package netplugin

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

// dockerd does not always tell that a container is gone: the plugin was away, or
// dockerd was killed at the wrong moment. It shows in the links: that of a
// running container has one end on the bridge and the other in the container, or
// is wholly in the container on a LAN. It is missing after a reboot or when the
// container's namespace died, and is wholly on the host when dockerd took it back
// and could not say so, or never moved it.
const (
	// settleTime is how old an endpoint must be before a link that is still on
	// the host counts: dockerd moves it moments after it has been made.
	settleTime = 2 * time.Minute
	// collectAfter is how long it must last before the endpoint is removed
	// although nobody needs its address.
	collectAfter = 5 * time.Minute
)

// endpointLinks returns the host's ends by endpoint ID, and the links on LANs that
// are in containers. Those come last: a link that moves meanwhile is seen twice
// rather than not at all.
func (d *Driver) endpointLinks() (map[string]link.Link, error) {
	owned, err := d.links.Owned()
	if err != nil {
		return nil, err
	}
	links := make(map[string]link.Link, len(owned))
	for _, l := range owned {
		if l.Owner.Endpoint != "" {
			links[l.Owner.Endpoint] = l
		}
	}
	if !d.store.hasLAN() {
		return links, nil
	}
	moved, err := d.links.Elsewhere()
	if err != nil {
		return nil, err
	}
	for _, l := range moved {
		links[l.Owner.Endpoint] = l
	}
	return links, nil
}

// isGone reports whether the endpoint certainly has no container any more, unless
// it was made after the links were listed: who removes it looks again while the
// network is locked.
func (d *Driver) isGone(rec endpointRecord, links map[string]link.Link) bool {
	if rec.Phase != phaseReady {
		return true
	}
	// The host's end is there before the endpoint is ready and goes with the
	// container's namespace.
	l, ok := links[rec.Spec.ID]
	return !ok || l.Peer != 0 && d.now().Sub(rec.Since) >= settleTime
}

// containerGone is isGone for one endpoint. The caller has locked its network.
func (d *Driver) containerGone(rec endpointRecord) (bool, error) {
	links, err := d.endpointLinks()
	if err != nil {
		return false, err
	}
	return d.isGone(rec, links), nil
}

// removeDead removes an endpoint whose container is gone. The caller has locked the
// network.
func (d *Driver) removeDead(ctx context.Context, net options.Network, rec endpointRecord) error {
	if err := d.removeEndpoint(ctx, net, rec); err != nil {
		return err
	}
	d.collected.Add(1)
	d.log.WithField("network", rec.Spec.NetworkID).WithField("endpoint", rec.Spec.ID).
		Warn("endpoint's container is gone and dockerd did not say so; removed")
	return nil
}

// deadSince notes that an endpoint was found without a container and returns
// when that was first so.
func (d *Driver) deadSince(endpoint string) time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	since, ok := d.dead[endpoint]
	if !ok {
		since = d.now()
		d.dead[endpoint] = since
	}
	return since
}

// alive forgets that an endpoint was found without a container.
func (d *Driver) alive(endpoint string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.dead, endpoint)
}

// collect removes the endpoints of a network whose containers have long been
// gone. Their addresses stay leased until dockerd releases them or they are
// needed (ipam.ForgetAfter).
func (d *Driver) collect(ctx context.Context, network string, links map[string]link.Link) error {
	var errs []error
	for _, rec := range d.store.endpoints(network) {
		if !d.isGone(rec, links) {
			d.alive(rec.Spec.ID)
			continue
		}
		if rec.Phase == phaseReady && d.now().Sub(d.deadSince(rec.Spec.ID)) < collectAfter {
			continue
		}
		errs = append(errs, d.removeGone(ctx, rec))
	}
	return errors.Join(errs...)
}

// removeGone removes an endpoint, after another look under the lock.
func (d *Driver) removeGone(ctx context.Context, rec endpointRecord) error {
	unlock, err := d.locks.Lock(ctx, rec.Spec.NetworkID)
	if err != nil {
		return err
	}
	defer unlock()
	net, ok := d.store.network(rec.Spec.NetworkID)
	if !ok {
		return nil
	}
	rec, ok = d.store.endpoint(rec.Spec.NetworkID, rec.Spec.ID)
	if !ok {
		return nil
	}
	gone, err := d.containerGone(rec)
	if err != nil || !gone {
		return err
	}
	return d.removeDead(ctx, net.Spec, rec)
}

// makeRoom tries to free an address after a request failed with err: that of an
// endpoint whose container is gone. It reports whether to request again.
//
// dockerd believes that an address it asks for by name is free, so the endpoint
// need not be watched for a while first.
func (d *Driver) makeRoom(ctx context.Context, want ipam.AddressRequest, err error) bool {
	var taken *ipam.Taken
	named := errors.As(err, &taken)
	if !named && !errdefs.IsResourceExhausted(err) || named && taken.Lease.Endpoint == "" {
		return false
	}
	pool, ok := d.store.leases.pool(want.Pool)
	if !ok || pool.Network == "" {
		return false
	}
	links, err := d.endpointLinks()
	if err != nil {
		return false
	}
	freed := false
	for _, rec := range d.store.endpoints(pool.Network) {
		if named && rec.Spec.ID != taken.Lease.Endpoint || !d.isGone(rec, links) {
			continue
		}
		if err := d.freeGone(ctx, pool, rec); err != nil {
			d.log.WithError(err).WithField("endpoint", rec.Spec.ID).Error("endpoint of a container that is gone could not be removed")
			continue
		}
		freed = true
	}
	return freed
}

// freeGone removes an endpoint and frees its addresses in the pool.
func (d *Driver) freeGone(ctx context.Context, pool ipam.Pool, rec endpointRecord) error {
	for _, addr := range addresses(rec.Spec) {
		if !pool.Prefix.Contains(addr) {
			continue
		}
		// The lease ends with the endpoint, or else when it is released.
		if _, _, err := d.store.leases.releaseAddress(pool.ID, addr); err != nil {
			return err
		}
	}
	return d.removeGone(ctx, rec)
}

// parentPatience is how long the start of a container waits for the link that its
// network needs: at boot a network card may come later than Docker.
const parentPatience = 10 * time.Second

// repairSoon is repairNetwork for a container that waits for it.
func (d *Driver) repairSoon(ctx context.Context, net options.Network) error {
	const step = 250 * time.Millisecond
	for deadline := d.now().Add(parentPatience); ; {
		err := d.repairNetwork(ctx, net)
		if !errdefs.IsNotFound(err) || !net.OnLAN() || d.now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(step):
		}
	}
}

// repairNetwork makes a network and the endpoints that have a link as they should
// be. The caller has locked the network.
func (d *Driver) repairNetwork(ctx context.Context, net options.Network) error {
	links, err := d.endpointLinks()
	if err != nil {
		return err
	}
	d.setBroken(net.ID, true)
	if err := d.mode(net).EnsureNetwork(ctx, net); err != nil {
		return err
	}
	var errs []error
	for _, rec := range d.store.endpoints(net.ID) {
		// Making a link that is missing would give its container nothing.
		if _, ok := links[rec.Spec.ID]; !ok || rec.Phase != phaseReady {
			continue
		}
		errs = append(errs, during("endpoint "+short(rec.Spec.ID), d.mode(net).EnsureEndpoint(ctx, net, rec.Spec)))
		d.repairPorts(ctx, net, rec)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	d.setBroken(net.ID, false)
	return nil
}
