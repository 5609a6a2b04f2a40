package netplugin

import (
	"context"
	"errors"
	"net/netip"
	"reflect"
	"slices"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/pluginapi"
)

// GwAllocCheck answers NetworkDriver.GwAllocCheck: a bridge wants its address,
// unless it is isolated. It is the first call of `docker network create`, so wrong
// options are refused before any address is taken.
func (d *Driver) GwAllocCheck(_ context.Context, req *pluginapi.GwAllocCheckRequest) (*pluginapi.GwAllocCheckResponse, error) {
	n, _, err := options.ParseNetworkOptions(req.Options)
	if err != nil {
		return nil, err
	}
	return &pluginapi.GwAllocCheckResponse{SkipIPv4: n.SkipGateway4(), SkipIPv6: n.SkipGateway6()}, nil
}

// AllocateNetwork answers NetworkDriver.AllocateNetwork, which dockerd sends to
// drivers of global scope only. The options it returns replace the user's.
func (d *Driver) AllocateNetwork(_ context.Context, req *network.AllocateNetworkRequest) (*network.AllocateNetworkResponse, error) {
	return &network.AllocateNetworkResponse{Options: req.Options}, nil
}

// FreeNetwork answers NetworkDriver.FreeNetwork.
func (d *Driver) FreeNetwork(context.Context, *network.FreeNetworkRequest) error { return nil }

// CreateNetwork answers NetworkDriver.CreateNetwork. The same network again is
// success; another one with its ID is a conflict.
func (d *Driver) CreateNetwork(ctx context.Context, req *network.CreateNetworkRequest) error {
	spec, warnings, err := options.ParseNetwork(req.NetworkID, req.Options, req.IPv4Data, req.IPv6Data)
	if err != nil {
		return err
	}
	unlock, err := d.locks.Lock(ctx, spec.ID)
	if err != nil {
		return err
	}
	defer unlock()

	if rec, ok := d.store.network(spec.ID); ok {
		if rec.Phase == phaseReady {
			return sameNetwork(rec, spec)
		}
		// An earlier request was cut short, and dockerd knows nothing of it.
		if err := d.removeNetwork(ctx, rec); err != nil {
			return during("undo an earlier try", err)
		}
	}
	d.warn(warnings, logrus.Fields{"network": spec.ID})

	// What is known about links of Berth's own says more than a look at the host.
	if err := d.store.checkUplink(spec); err != nil {
		return err
	}
	if spec, err = d.mode(spec).Adopt(ctx, spec); err != nil {
		return err
	}
	rec, err := d.addNetwork(ctx, spec, req)
	if err != nil {
		return err
	}
	err = d.mode(spec).EnsureNetwork(ctx, rec.Spec)
	if err == nil {
		err = d.store.setNetworkPhase(spec.ID, phaseReady)
	}
	if err == nil {
		for _, pool := range rec.Pools {
			d.watchPool(pool)
		}
		return nil
	}
	undo, cancel := undoContext(ctx)
	defer cancel()
	return errors.Join(err, during("undo", d.removeNetwork(undo, rec)))
}

// addNetwork records the network, in the place of networks that dockerd must have
// removed: one IPAM driver does not give out an address twice, except on LANs.
func (d *Driver) addNetwork(ctx context.Context, spec options.Network, req *network.CreateNetworkRequest) (networkRecord, error) {
	space := ""
	if data := slices.Concat(req.IPv4Data, req.IPv6Data); len(spec.Subnets) > 0 {
		space = data[0].AddressSpace
	}
	for {
		pools, err := d.poolsOf(spec, req)
		if err != nil {
			return networkRecord{}, err
		}
		rec, err := d.store.addNetwork(spec, space, pools)
		var overlap *overlapError
		if !errors.As(err, &overlap) {
			return rec, err
		}
		if other, ok := d.store.network(overlap.network); spec.OnLAN() || ok && other.Spec.OnLAN() {
			return networkRecord{}, err
		}
		removed, removeErr := d.removeForgotten(ctx, overlap.network, space)
		if !removed || removeErr != nil {
			return networkRecord{}, errors.Join(err, during("remove network "+short(overlap.network), removeErr))
		}
	}
}

// removeForgotten removes a network of this address space if no container is on
// it. dockerd does not tell of a removal while the plugin is disabled.
//
// The caller has locked a network that is not recorded yet, so nobody who holds
// the lock of a complete one waits for it.
func (d *Driver) removeForgotten(ctx context.Context, id, space string) (removed bool, _ error) {
	if rec, ok := d.store.network(id); ok && rec.Phase == phaseCreating {
		return false, nil
	}
	unlock, err := d.locks.Lock(ctx, id)
	if err != nil {
		return false, err
	}
	defer unlock()
	rec, ok := d.store.network(id)
	if !ok {
		return true, nil
	}
	if rec.Phase == phaseReady && (rec.Space != space || space == "") {
		return false, nil
	}
	links, err := d.endpointLinks()
	if err != nil {
		return false, err
	}
	for _, ep := range d.store.endpoints(id) {
		if !d.isGone(ep, links) {
			return false, nil
		}
	}
	d.log.WithField("network", id).Warn("network's addresses were given to another one, so dockerd has removed it; removed")
	return true, d.removeNetwork(ctx, rec)
}

// poolsOf returns Berth's pools that the network was given, with the options that they
// are to have for it.
func (d *Driver) poolsOf(spec options.Network, req *network.CreateNetworkRequest) ([]ipam.Pool, error) {
	ours := make(map[netip.Prefix]bool)
	for _, list := range [][]*network.IPAMData{req.IPv4Data, req.IPv6Data} {
		for _, data := range list {
			// Parsed before; a subnet of another IPAM driver is not ours
			// even when it looks the same.
			if prefix, err := netip.ParsePrefix(data.Pool); err == nil && data.AddressSpace == localSpace {
				ours[prefix.Masked()] = true
			}
		}
	}
	var pools []ipam.Pool
	for _, subnet := range spec.Subnets {
		var pool ipam.Pool
		ok := ours[subnet.Pool]
		if ok {
			var err error
			if pool, ok, err = d.store.leases.unboundPool(spec, subnet.Pool); err != nil {
				return nil, err
			}
		}
		var err error
		switch pool.Options, err = spec.PoolOptions(pool.Options); {
		case err != nil:
			return nil, err
		case !ok && len(spec.IPAM) > 0:
			return nil, fault.Invalid("options ipam.*: the addresses of subnet %s come from another IPAM driver, want Berth's (--ipam-driver)", subnet.Pool)
		case !ok:
			continue
		}
		if err := checkDHCP(spec, pool); err != nil {
			return nil, err
		}
		pools = append(pools, pool)
	}
	return pools, nil
}

// sameNetwork compares a repeated request with what was recorded.
func sameNetwork(rec networkRecord, spec options.Network) error {
	if spec.Bridge == "" && !rec.NamedBridge {
		spec.Bridge = rec.Spec.Bridge
	}
	// What Adopt has added, which depends on the host at that time.
	spec.Adopted, spec.AdoptedAddrs, spec.UplinkUp = rec.Spec.Adopted, rec.Spec.AdoptedAddrs, rec.Spec.UplinkUp
	if spec.MTU == 0 {
		spec.MTU = rec.Spec.MTU
	}
	if !reflect.DeepEqual(rec.Spec, spec) {
		return fault.Conflict("network %s exists with other options or subnets", short(spec.ID))
	}
	return nil
}

// DeleteNetwork answers NetworkDriver.DeleteNetwork. dockerd ignores the error
// and forgets the network; what could not be removed is tried again by Run.
func (d *Driver) DeleteNetwork(ctx context.Context, req *network.DeleteNetworkRequest) error {
	unlock, err := d.locks.Lock(ctx, req.NetworkID)
	if err != nil {
		return err
	}
	defer unlock()
	rec, ok := d.store.network(req.NetworkID)
	if !ok {
		return nil
	}
	return d.removeNetwork(ctx, rec)
}

// removeNetwork removes a network with what is left of its endpoints, and its
// record. The caller has locked the network.
func (d *Driver) removeNetwork(ctx context.Context, rec networkRecord) error {
	complete := rec.Phase != phaseCreating
	if rec.Phase == phaseReady {
		if err := d.store.setNetworkPhase(rec.Spec.ID, phaseRemoving); err != nil {
			return err
		}
	}
	for _, ep := range d.store.endpoints(rec.Spec.ID) {
		if err := d.removeEndpoint(ctx, rec.Spec, ep); err != nil {
			return err
		}
	}
	d.lastWords(rec.Pools)
	if err := d.removed(d.mode(rec.Spec).RemoveNetwork(ctx, rec.Spec)); err != nil {
		return err
	}
	d.setBroken(rec.Spec.ID, false)
	for _, pool := range rec.Pools {
		d.unwatchPool(pool.ID)
	}
	ended, err := d.store.dropNetwork(rec.Spec.ID, complete)
	d.giveBackNow(ended)
	return err
}

// DiscoverNew answers NetworkDriver.DiscoverNew: other nodes are of no interest
// to networks of one host.
func (d *Driver) DiscoverNew(context.Context, *network.DiscoveryNotification) error { return nil }

// DiscoverDelete answers NetworkDriver.DiscoverDelete.
func (d *Driver) DiscoverDelete(context.Context, *network.DiscoveryNotification) error { return nil }
