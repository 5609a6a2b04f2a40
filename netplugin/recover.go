package netplugin

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

// Recover makes the host agree with the records, once, before the first request
// is answered. What was half made is removed, since dockerd never got the answer;
// what was half removed is removed; every other network is built again where it
// is missing, as after a reboot. Endpoints whose link is gone stay: dockerd will
// delete them, or Run does. Links of Berth that no record knows are removed, unless
// containers use them: then the records are most likely not those of this host, and
// its rules are left as they are as well.
//
// A network that cannot be built does not keep the others from working: it is
// logged, and tried again by Run and before its next endpoint. The error says
// that the host could not be looked at.
func (d *Driver) Recover(ctx context.Context) error {
	used, err := d.removeOrphans()
	if err != nil {
		return err
	}
	recs := d.store.allNetworks()
	var (
		ready     []options.Network
		endpoints []options.Endpoint
	)
	for _, rec := range recs {
		if rec.Phase != phaseReady {
			continue
		}
		ready = append(ready, rec.Spec)
		for _, ep := range d.store.endpoints(rec.Spec.ID) {
			if ep.Phase == phaseReady {
				endpoints = append(endpoints, ep.Spec)
			}
		}
	}
	if used {
		d.log.Error("containers run on networks that the records do not know; is this the state directory they were made with? Their links and rules are left alone")
	} else if err := d.restore(ctx, ready, endpoints); err != nil {
		d.log.WithError(err).Error("rules of all networks could not be set at once; they are set one by one")
	}
	for _, rec := range recs {
		for _, ep := range d.store.endpoints(rec.Spec.ID) {
			d.countMAC(rec.Spec, ep.Spec, 1)
		}
		if rec.Phase == phaseReady {
			for _, pool := range view(d.store.leases, func(a *ipam.Allocator) []ipam.Pool { return a.PoolsOf(rec.Spec.ID) }) {
				d.watchPool(pool)
			}
		}
		if err := d.settle(ctx, rec.Spec.ID, true); err != nil {
			d.log.WithError(err).WithField("network", rec.Spec.ID).Error("network could not be recovered; it is tried again")
		}
		if err := ctx.Err(); err != nil {
			return during("recover networks", err)
		}
	}
	d.restoreDHCP() // when the links that servers are reached by are there again
	return nil
}

// removeOrphans removes links that carry Berth's mark and no record's ID: those of
// state that is gone. used reports that some are left because containers use them.
func (d *Driver) removeOrphans() (used bool, _ error) {
	owned, err := d.links.Owned()
	if err != nil {
		return false, err
	}
	moved, err := d.links.Elsewhere()
	if err != nil {
		return false, err
	}
	inUse := linksInUse(owned)
	known := d.owners()
	for _, l := range moved {
		if !known[l.Owner] {
			used = true
			d.log.WithFields(logrus.Fields{"link": l.Name, "owner": l.Owner.String()}).Warn("link of no network is in use by a container")
		}
	}
	for _, l := range owned {
		if known[l.Owner] {
			continue
		}
		log := d.log.WithFields(logrus.Fields{"link": l.Name, "owner": l.Owner.String()})
		if inUse[l.Index] {
			used = true
			log.Warn("link of no network is in use by a container")
			continue
		}
		if err := d.links.Delete(l.Name, l.Owner); err != nil {
			log.WithError(err).Error("link of no network could not be removed")
			continue
		}
		log.Warn("link of no network removed")
	}
	return used, nil
}

// owners are those that the records know.
func (d *Driver) owners() map[link.Owner]bool {
	known := make(map[link.Owner]bool)
	for _, net := range d.store.allNetworks() {
		known[link.OfNetwork(net.Spec.ID)] = true
		if segment := net.Spec.Segment(); segment != "" {
			known[link.OfParent(segment)] = true
		}
		for _, ep := range d.store.endpoints(net.Spec.ID) {
			known[link.OfEndpoint(ep.Spec.ID)] = true
		}
	}
	return known
}

// linksInUse gives the indices of endpoints whose other end is in a container, and
// of their bridges.
func linksInUse(links []link.Link) map[int]bool {
	used := make(map[int]bool)
	for _, l := range links {
		if l.Owner.Endpoint != "" && l.Peer == 0 {
			used[l.Index], used[l.Master] = true, true
		}
	}
	return used
}

// settle finishes what a request has left half done in a network, and repairs
// the network if it is broken or all is set.
func (d *Driver) settle(ctx context.Context, id string, all bool) error {
	unlock, err := d.locks.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	net, ok := d.store.network(id)
	if !ok {
		return nil
	}
	if net.Phase != phaseReady {
		return during("finish removal", d.removeNetwork(ctx, net))
	}
	var errs []error
	for _, ep := range d.store.endpoints(id) {
		if ep.Phase != phaseReady {
			errs = append(errs, during("finish removal of endpoint "+short(ep.Spec.ID), d.removeEndpoint(ctx, net.Spec, ep)))
		}
	}
	if all || d.isBroken(id) {
		errs = append(errs, d.repairNetwork(ctx, net.Spec))
	}
	return errors.Join(errs...)
}

const (
	// tickTime is how often Run looks for work that was left over.
	tickTime = time.Minute
	// lookTime is how often it looks at networks whose containers are kept apart,
	// which depends on a sysctl of the host, of which there are no events.
	lookTime = 2 * time.Second
)

// Run keeps networks in order until ctx ends: a bridge that somebody removed, took
// down or took addresses from is made whole again, failed removals are tried again,
// endpoints of containers that are gone are removed. It returns when all its work
// has ended.
func (d *Driver) Run(ctx context.Context) {
	changed := make(chan struct{}, 1)
	var wg sync.WaitGroup
	wg.Go(func() { d.watchLinks(ctx, changed) })
	defer wg.Wait()
	ticker, look := time.NewTicker(tickTime), time.NewTicker(lookTime)
	defer ticker.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			d.repairDrift(ctx, anyNetwork)
			d.tick(ctx)
		case <-look.C:
			d.repairDrift(ctx, func(n options.Network) bool { return n.NoICC || n.LAN.HostAccess })
		case <-changed:
			d.repairDrift(ctx, anyNetwork)
			d.retryLANs(ctx)
		}
	}
}

// concerns reports whether something has happened to a bridge that Berth would not
// have done to a network that stays, or anything to the link that leads to a LAN.
func (d *Driver) concerns(e link.Event) bool {
	if e.Link.Kind == "bridge" && !e.Removed && !e.AddressLost && e.Link.Up {
		return false
	}
	return d.store.hasReady(e.Link.Name)
}

// watchLinks sends when something has happened to the links of networks.
func (d *Driver) watchLinks(ctx context.Context, changed chan<- struct{}) {
	err := d.links.Watch(ctx, func(e link.Event) {
		if !e.Lost && !d.concerns(e) {
			return
		}
		select {
		case changed <- struct{}{}:
		default: // One is waiting; it will see this too.
		}
	})
	if err != nil && ctx.Err() == nil {
		d.log.WithError(err).Error("links are not watched: what somebody does to a bridge or a parent is only noticed every minute")
	}
}

func anyNetwork(options.Network) bool { return true }

// retryLANs tries to repair networks that are broken, perhaps for want of a parent or
// an uplink.
func (d *Driver) retryLANs(ctx context.Context) {
	for _, rec := range d.store.allNetworks() {
		if !rec.Spec.OnLAN() || rec.Phase != phaseReady || !d.isBroken(rec.Spec.ID) {
			continue
		}
		log := d.log.WithField("network", rec.Spec.ID)
		if err := d.settle(ctx, rec.Spec.ID, true); err != nil {
			log.WithError(err).Debug("network is still broken")
			continue
		}
		log.Info("network is whole again")
	}
}

// repairDrift makes networks of a kind whole that somebody has changed.
func (d *Driver) repairDrift(ctx context.Context, kind func(options.Network) bool) {
	for id, found := range d.drift(kind) {
		log := d.log.WithField("network", id).WithField("found", found)
		if err := d.settle(ctx, id, true); err != nil {
			if ctx.Err() == nil {
				log.WithError(err).Error("network was changed by somebody and could not be repaired")
			}
			continue
		}
		log.Warn("network was changed by somebody; repaired")
	}
}

// drift says what of the complete networks of a kind is not as it should be.
func (d *Driver) drift(kind func(options.Network) bool) map[string]string {
	var ready []options.Network
	for _, rec := range d.store.allNetworks() {
		// Berth's own removals have moved the record on before.
		if rec.Phase == phaseReady && !d.isBroken(rec.Spec.ID) && kind(rec.Spec) {
			ready = append(ready, rec.Spec)
		}
	}
	if len(ready) == 0 {
		return nil
	}
	found, err := d.driftOf(ready)
	if err != nil {
		d.log.WithError(err).Error("links of networks could not be looked at")
	}
	return found
}

// tick does what is due.
func (d *Driver) tick(ctx context.Context) {
	links, err := d.endpointLinks()
	if err != nil {
		d.log.WithError(err).Error("links could not be listed")
		return
	}
	if err := d.forgetDHCP(); err != nil {
		d.log.WithError(err).Error("leases of DHCP servers that nobody uses could not be given up")
	}
	for _, rec := range d.store.allNetworks() {
		err := errors.Join(
			d.settle(ctx, rec.Spec.ID, false),
			d.collect(ctx, rec.Spec.ID, links),
			d.retryPorts(ctx, rec.Spec.ID),
		)
		if err != nil && ctx.Err() == nil {
			d.log.WithError(err).WithField("network", rec.Spec.ID).Error("network is not in order; it is tried again")
		}
	}
}
