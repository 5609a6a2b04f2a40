package netplugin

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/dhcp"
	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/netplugin/probe"
	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// dhcpTries is how many addresses of a server are tried that somebody on the LAN
	// has already.
	dhcpTries = 3
	// dhcpTime bounds a request in all, with what comes before and after the server's
	// answer.
	dhcpTime = 20 * time.Second
)

// checkDHCP refuses networks whose containers a DHCP server could not tell apart, or
// would not reach.
func checkDHCP(n options.Network, pool ipam.Pool) error {
	switch {
	case !pool.Options.DHCP:
		return nil
	case n.SharesMAC():
		return fault.Invalid("IPAM option dhcp=true: containers of mode %s %s have the MAC address of the parent, by which a DHCP server tells its clients apart; use mode macvlan (bridge, private or vepa)", n.Mode, n.LAN.Type)
	case !n.OnLAN():
		return fault.Invalid("IPAM option dhcp=true: the network has mode %s and is not on the LAN of %s, want mode=macvlan with that parent, or uplink=%s", n.Mode, pool.Options.Parent, pool.Options.Parent)
	}
	return nil
}

// requestByDHCP takes an address from the LAN's DHCP server and gives it out. The
// client that the server sees is one of Berth's making, whose MAC address the
// endpoint then gets. name is the container's, "" where dockerd does not send it.
func (d *Driver) requestByDHCP(ctx context.Context, pool ipam.Pool, want ipam.AddressRequest, name string) (netip.Prefix, error) {
	if d.dhcp == nil {
		return netip.Prefix{}, fault.Unavailable("this Berth takes no addresses from DHCP servers")
	}
	if pool.Network == "" && !want.Addr.IsValid() {
		return netip.Prefix{}, fault.Invalid("IPAM option dhcp=true: it works with networks of Berth only, give --driver too")
	}
	ctx, cancel := context.WithTimeout(ctx, dhcpTime)
	defer cancel()
	named := want.Addr.IsValid()
	if named {
		// What is known here need not be asked for on the LAN.
		if err := d.store.leases.available(want); err != nil {
			return netip.Prefix{}, err
		}
	}
	identity, done, err := d.clientFor(ctx, pool, want, name)
	if err != nil {
		return netip.Prefix{}, err
	}
	defer done()
	request := dhcp.Request{
		Parent: pool.Options.Parent, Identity: identity, Subnet: pool.Prefix, Want: want.Addr,
		Previous: d.store.leases.previous(pool.ID, identity.MAC),
		Accept:   func(addr netip.Addr) error { return d.store.leases.acceptable(pool, addr, want.Key) },
	}
	parted, again := d.partings.take(request.Parent, identity.MAC)
	switch held, ok := d.store.leases.loose(pool, want.Key); {
	case again && named && parted.Addr != want.Addr:
		again = false
		d.release(parted)
	case again:
		request.Previous, request.Resume, request.Held = parted.Addr, true, &parted
	case ok:
		request.Previous, request.Resume, request.Held = held.Addr, true, &held
	}
	for range dhcpTries {
		lease, conflict, err := d.takeByDHCP(ctx, pool, want, request)
		switch {
		case err != nil:
			if again && conflict == nil {
				d.partings.add(parting{Lease: parted, key: want.Key, named: named})
			}
			return netip.Prefix{}, err
		case conflict == nil:
			d.dhcp.Track(lease)
			d.compareDHCP(pool, lease)
			return netip.PrefixFrom(lease.Addr, pool.Prefix.Bits()), nil
		case named:
			return netip.Prefix{}, conflictError(*conflict, pool)
		}
		again = false
		request.Previous, request.Resume, request.Held = netip.Addr{}, false, nil
	}
	return netip.Prefix{}, fault.Conflict("the DHCP server on %s gives out addresses that others on the LAN use", pool.Options.Parent)
}

// takeByDHCP asks once. A conflict is that somebody on the LAN has the address, which
// the server has been told.
func (d *Driver) takeByDHCP(ctx context.Context, pool ipam.Pool, want ipam.AddressRequest, request dhcp.Request) (dhcp.Lease, *probe.Conflict, error) {
	lease, err := d.dhcp.Acquire(ctx, request)
	if err != nil {
		return dhcp.Lease{}, nil, err
	}
	named := want.Addr.IsValid()
	want.Addr, want.MAC, want.DHCP, want.Probed = lease.Addr, lease.Identity.MAC, storedDHCP(lease), true
	held, err := d.store.leases.hold(want)
	if err != nil {
		d.release(lease)
		return dhcp.Lease{}, nil, err
	}
	held.Named = named
	if conflict := d.askFor(ctx, pool, held, nil); conflict != nil {
		if err := d.noteConflict(pool, *conflict); err != nil || !named || pool.Options.Conflict != ipam.ConflictWarn {
			d.store.leases.cancel(pool.ID, held.Addr)
			return dhcp.Lease{}, conflict, errors.Join(err, d.dhcp.Decline(ctx, lease))
		}
	}
	if err := d.store.leases.commit(ctx, pool.ID, held); err != nil {
		d.release(lease)
		return dhcp.Lease{}, nil, err
	}
	return lease, nil, nil
}

// clientFor chooses the client that the server is to see: that of the key or, for a
// container without, one that no lease has, best of all one that has ended a moment
// ago. done ends the choice: until then nobody else gets the same.
func (d *Driver) clientFor(ctx context.Context, pool ipam.Pool, want ipam.AddressRequest, name string) (identity dhcp.Identity, done func(), err error) {
	if err := ctx.Err(); err != nil {
		return dhcp.Identity{}, nil, err
	}
	space := dhcp.Space{Host: d.host, Parent: pool.Options.Parent, Subnet: pool.Prefix}
	if mac, err := net.ParseMAC(want.Key); err == nil {
		if identity, err = space.MAC(mac); err != nil {
			return dhcp.Identity{}, nil, err
		}
	} else if want.Key != "" {
		identity = space.Key(want.Key)
		if d.store.leases.elsewhere(pool, identity.MAC) {
			// The container is on this LAN twice, and is two clients there.
			second := space.Key(want.Key + " on " + pool.Network)
			identity.MAC, identity.ClientID = second.MAC, second.ClientID
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if identity.MAC == nil {
		identity = d.anonymousLocked(space, pool, want.Addr)
	}
	identity.Hostname = name
	who := clientOf(pool.Options.Parent, identity.MAC)
	if d.requesting[who] {
		return dhcp.Identity{}, nil, fault.Conflict("an address for %s is being taken from the DHCP server already", identity.Slot)
	}
	d.requesting[who] = true
	return identity, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.requesting, who)
	}, nil
}

// anonymousLocked chooses among the slots. d.mu is held.
func (d *Driver) anonymousLocked(space dhcp.Space, pool ipam.Pool, addr netip.Addr) dhcp.Identity {
	used := d.store.leases.macs(pool)
	busy := func(mac net.HardwareAddr) bool {
		return used[string(mac)] || d.requesting[clientOf(pool.Options.Parent, mac)]
	}
	if identity, ok := d.partings.latest(pool, addr, busy); ok {
		return identity
	}
	if addr.IsValid() {
		// Servers keep an address for the client that had it.
		if identity, ok := d.store.leases.clientBefore(pool.ID, addr); ok && !busy(identity.MAC) {
			return identity
		}
	}
	return space.Slot(dhcp.FreeSlot(func(n int) bool {
		mac := space.Slot(n).MAC
		return busy(mac) || d.partings.has(pool.Options.Parent, mac)
	}))
}

// giveBack lets leases of DHCP servers part, those of containers that have ended.
// Those of other pools have no server.
func (d *Driver) giveBack(ended []endedLease) {
	for _, e := range ended {
		if e.lease.DHCP == nil || d.dhcp == nil {
			continue
		}
		d.dhcp.Untrack(e.pool.Options.Parent, e.lease.Addr)
		d.partings.add(parting{Lease: restoredDHCP(e.pool, e.lease), key: e.lease.Key, named: e.lease.Named})
	}
}

// giveBackNow is giveBack for what nobody comes back to. It waits until the servers
// are told.
func (d *Driver) giveBackNow(ended []endedLease) {
	d.giveBack(ended)
	d.partings.tell(func(l dhcp.Lease) bool {
		for _, e := range ended {
			if l.Parent == e.pool.Options.Parent && l.Addr == e.lease.Addr {
				return true
			}
		}
		return false
	})
}

// lastWords tells the servers of all that has ended in the pools, while their link is
// there.
func (d *Driver) lastWords(pools []ipam.Pool) {
	d.partings.tell(func(l dhcp.Lease) bool {
		for _, pool := range pools {
			if l.Parent == pool.Options.Parent && l.Subnet == pool.Prefix {
				return true
			}
		}
		return false
	})
}

// release tells a server that an address is free.
func (d *Driver) release(lease dhcp.Lease) {
	ctx, cancel := undoContext(context.Background())
	defer cancel()
	if err := d.dhcp.Release(ctx, lease); err != nil {
		d.log.WithError(err).WithField("address", lease.Addr).Warn("DHCP server was not told that an address is free; it is when its lease ends")
	}
}

// forgetDHCP gives back what dockerd asked for and did not use, as when it was killed
// between the two: else it would be renewed for ever.
func (d *Driver) forgetDHCP() error {
	if d.dhcp == nil {
		return nil
	}
	ended, err := d.store.leases.forgetDHCP(d.now())
	d.giveBackNow(ended)
	return err
}

// restoreDHCP goes on renewing the leases that are on record, and has the servers told
// of those that ended when berthd did.
func (d *Driver) restoreDHCP() {
	if d.dhcp == nil {
		return
	}
	active, untold := d.store.leases.recordedDHCP(d.now())
	d.dhcp.Restore(active)
	for _, p := range untold {
		if !d.partings.has(p.Parent, p.Identity.MAC) {
			d.partings.add(p)
		}
	}
}

// compareDHCP warns, once for each pool, when the network was described to Docker
// otherwise than the server knows it.
func (d *Driver) compareDHCP(pool ipam.Pool, lease dhcp.Lease) {
	log := d.log.WithFields(logrus.Fields{"network": pool.Network, "server": lease.Server})
	first := func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		known := d.compared[pool.ID]
		d.compared[pool.ID] = true
		return !known
	}
	rec, _ := d.store.network(pool.Network)
	var gateway netip.Addr
	for _, subnet := range rec.Spec.Subnets {
		if subnet.Pool == pool.Prefix {
			gateway = subnet.DefaultGateway()
		}
	}
	differs := gateway.IsValid() && lease.Router.IsValid() && gateway != lease.Router
	if lease.Prefix.Bits() == pool.Prefix.Bits() && !differs || !first() {
		return
	}
	if differs {
		log.Warnf("DHCP server names %s as router, containers of the network use %s, which was given with --gateway or chosen", lease.Router, gateway)
	}
	if lease.Prefix.Bits() != pool.Prefix.Bits() {
		log.Warnf("DHCP server says that the LAN's subnet is %s, that of the network is %s", lease.Prefix.Masked(), pool.Prefix)
	}
}

// HearDHCP takes the news of a tracked lease; it is what a dhcp.Manager notifies.
func (d *Driver) HearDHCP(e dhcp.Event) {
	log := d.log.WithFields(logrus.Fields{"address": e.Lease.Addr, "parent": e.Lease.Parent, "server": e.Lease.Server})
	if e.Kind == dhcp.EventLost {
		log.WithField("reason", e.Reason).Error("DHCP server has taken back the address of a container, which goes on using it; it is asked for again")
		return
	}
	found, err := d.store.leases.renewed(e.Lease)
	switch {
	case err != nil:
		log.WithError(err).Error("renewed lease could not be recorded")
	case !found:
		// It has ended meanwhile, which has ended its renewals too.
	case e.Kind == dhcp.EventRegained:
		log.Warn("address of a container was leased from the DHCP server again")
	}
}
