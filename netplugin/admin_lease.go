package netplugin

import (
	"context"
	"net/netip"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

// Leases lists the addresses of one network or of all that are not simply free.
func (a admin) Leases(_ context.Context, network string) ([]control.Lease, error) {
	if network != "" {
		if _, ok := a.d.store.network(network); !ok {
			return nil, fault.NotFound("network %s is not known to Berth", short(network))
		}
	}
	type addressesOf struct {
		pool  ipam.Pool
		addrs []ipam.Address
	}
	found := view(a.d.store.leases, func(alloc *ipam.Allocator) (found []addressesOf) {
		pools := alloc.Pools()
		if network != "" {
			pools = alloc.PoolsOf(network)
		}
		for _, pool := range pools {
			found = append(found, addressesOf{pool, alloc.Addresses(pool.ID)})
		}
		return found
	})
	leases := []control.Lease{}
	for _, f := range found {
		for _, addr := range f.addrs {
			leases = append(leases, a.lease(f.pool, addr))
		}
	}
	return leases, nil
}

// lease is the wire form of an address.
func (a admin) lease(pool ipam.Pool, addr ipam.Address) control.Lease {
	wire := control.Lease{
		NetworkID: pool.Network, PoolID: pool.ID, Addr: addr.Addr, State: control.LeaseState(addr.State),
		Key: addr.Key, Reserved: addr.Reserved != "", Pinned: addr.Named,
		MAC: addr.MAC.String(), EndpointID: addr.Endpoint, Since: addr.Since, Until: addr.Until,
	}
	if addr.State == ipam.StateActive || addr.State == ipam.StatePending {
		wire.DHCP = a.d.wireDHCP(pool, addr.Addr, addr.DHCP)
	}
	if wire.DHCP != nil && wire.Until.IsZero() {
		wire.Until = wire.DHCP.Expires
	}
	if addr.State == ipam.StateActive {
		if ep, ok := a.d.store.endpoint(pool.Network, addr.Endpoint); ok && ep.Spec.MAC != nil {
			wire.MAC = ep.Spec.MAC.String()
		}
	}
	return wire
}

// Pools lists all pools, the oldest first.
func (a admin) Pools(context.Context) ([]control.Pool, error) {
	return view(a.d.store.leases, func(alloc *ipam.Allocator) []control.Pool {
		pools := []control.Pool{}
		for _, pool := range alloc.Pools() {
			stats, _ := alloc.Stats(pool.ID)
			o := pool.Options
			wire := control.Pool{
				ID: pool.ID, NetworkID: pool.Network, Prefix: pool.Prefix, Parent: o.Parent, Since: pool.Since,
				Sticky: o.Sticky, Quarantine: o.Quarantine, Probe: string(o.ProbeMode()), Conflict: string(o.Conflict), DHCP: o.DHCP,
				Size: stats.Size, Used: stats.Used, Reserved: stats.Reserved, Quarantined: stats.Quarantined,
				Conflicts: stats.Conflicts, Free: stats.Free, Released: stats.Released,
			}
			if pool.Range != pool.Prefix {
				wire.Range = pool.Range
			}
			for _, r := range o.Exclude {
				wire.Exclude = append(wire.Exclude, r.String())
			}
			pools = append(pools, wire)
		}
		return pools
	}), nil
}

// ReserveLease keeps an address for a key.
func (a admin) ReserveLease(ctx context.Context, req control.ReserveRequest) (control.Lease, error) {
	pool, err := a.poolOf(req.Network, req.Addr)
	if err != nil {
		return control.Lease{}, err
	}
	if pool.Options.DHCP {
		return control.Lease{}, fault.Invalid("address %s: the DHCP server of the LAN gives out the addresses of network %s; reserve it there", req.Addr, short(req.Network))
	}
	before := false
	err = a.d.store.leases.decide(ctx, func(alloc *ipam.Allocator) error {
		for _, r := range alloc.Reservations(pool.ID) {
			before = before || r.Addr == req.Addr
		}
		return alloc.Reserve(pool.ID, req.Addr, req.Key)
	}, func(alloc *ipam.Allocator) {
		if !before {
			alloc.Unreserve(pool.ID, req.Addr)
		}
	})
	if err != nil {
		return control.Lease{}, err
	}
	addr := view(a.d.store.leases, func(alloc *ipam.Allocator) ipam.Address {
		addr, _ := alloc.Address(pool.ID, req.Addr)
		return addr
	})
	return a.lease(pool, addr), nil
}

// ReleaseLease makes an address free for all.
func (a admin) ReleaseLease(ctx context.Context, req control.ReleaseRequest) (control.Lease, error) {
	pool, err := a.poolOf(req.Network, req.Addr)
	if err != nil {
		return control.Lease{}, err
	}
	var was ipam.Address
	err = a.d.store.leases.decide(ctx, func(alloc *ipam.Allocator) (err error) {
		was, err = alloc.Forget(pool.ID, req.Addr)
		return err
	}, nil)
	if err != nil {
		return control.Lease{}, err
	}
	wire := a.lease(pool, was)
	a.d.giveBackNow([]endedLease{{pool, was.Lease}})
	return wire, nil
}

// poolOf returns the pool of a network that an address is in.
func (a admin) poolOf(network string, addr netip.Addr) (ipam.Pool, error) {
	rec, ok := a.d.store.network(network)
	if !ok {
		return ipam.Pool{}, fault.NotFound("network %s is not known to Berth", short(network))
	}
	pool, ok := a.d.store.leases.find(network, addr)
	if !ok {
		return ipam.Pool{}, fault.Invalid("address %s: want one of the subnets that Berth's IPAM driver gave network %s (it has %s)", addr, short(network), subnetsOf(rec.Spec))
	}
	return pool, nil
}

func subnetsOf(n options.Network) string {
	text := ""
	for i, s := range n.Subnets {
		if i > 0 {
			text += ", "
		}
		text += s.Pool.String()
	}
	if text == "" {
		return "none"
	}
	return text
}
