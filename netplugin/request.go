package netplugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/probe"
	"github.com/berth-plugin/berth/shared/fault"
)

// conflictTime is for how long an address that somebody on the LAN has is left
// alone.
const conflictTime = time.Hour

// probeBatch is how many addresses are asked for at once when the first choice was
// somebody's: the next ones often are, too.
const probeBatch = 16

// requestAddress gives out an address with the prefix length of its network. On a
// LAN it is one that nobody answers for. name is the container's, where it is known.
func (d *Driver) requestAddress(ctx context.Context, want ipam.AddressRequest, name string) (netip.Prefix, error) {
	// A pool that is not known is refused by hold.
	pool, _ := d.store.leases.pool(want.Pool)
	// Addresses by name before there is a network are not for containers.
	if pool.Options.DHCP && !want.Gateway && (pool.Network != "" || !want.Addr.IsValid()) {
		return d.requestByDHCP(ctx, pool, want, name)
	}
	named := want.Addr.IsValid()
	clear := make(map[netip.Addr]bool)
	for {
		lease, err := d.store.leases.hold(want)
		var inUse *ipam.InUse
		if errors.As(err, &inUse) && named {
			// That was a while ago.
			if err := d.probeAgain(ctx, pool, want.Addr, inUse); err != nil {
				return netip.Prefix{}, err
			}
			want.Probed = true
			clear[want.Addr] = true
			continue
		}
		if err != nil {
			return netip.Prefix{}, err
		}
		conflict := d.askFor(ctx, pool, lease, clear)
		if conflict == nil {
			if err := d.store.leases.commit(ctx, pool.ID, lease); err != nil {
				return netip.Prefix{}, err
			}
			return netip.PrefixFrom(lease.Addr, pool.Prefix.Bits()), nil
		}
		d.store.leases.cancel(pool.ID, lease.Addr)
		if err := d.noteConflict(pool, *conflict); err != nil {
			return netip.Prefix{}, err
		}
		switch {
		case named && pool.Options.Conflict == ipam.ConflictWarn:
			d.log.WithFields(logrus.Fields{"network": pool.Network, "address": lease.Addr, "mac": conflict.MAC}).
				Warn("address is in use by somebody else on the LAN; given out all the same (conflict=warn)")
			want.Probed = true
			clear[want.Addr] = true
		case named:
			return netip.Prefix{}, conflictError(*conflict, pool)
		case ctx.Err() != nil:
			return netip.Prefix{}, fault.Unavailable("no address of pool %s was found in time that nobody on the LAN uses; try again", pool.Prefix)
		default:
			d.askAhead(ctx, pool, clear)
		}
	}
}

// askFor asks on the LAN for an address that is held. nil is that nobody is known to
// have it, or that nobody could be asked.
func (d *Driver) askFor(ctx context.Context, pool ipam.Pool, lease ipam.Lease, clear map[netip.Addr]bool) *probe.Conflict {
	mode := probeMode(pool)
	if mode == probe.Off || lease.Role != ipam.RoleEndpoint || clear[lease.Addr] || d.prober == nil {
		return nil
	}
	if d.spares.Clear(pool.ID, lease.Addr) && mode == probe.Fast {
		return nil
	}
	conflict, err := d.prober.Probe(ctx, d.askedOn(pool), lease.Addr, mode)
	if err != nil && ctx.Err() == nil {
		d.log.WithError(err).WithField("address", lease.Addr).Warn("nobody on the LAN could be asked for an address; given out unasked")
	}
	return conflict
}

// askAhead asks for the addresses that come next, all at once.
func (d *Driver) askAhead(ctx context.Context, pool ipam.Pool, clear map[netip.Addr]bool) {
	next := d.store.leases.peek(pool.ID, probeBatch)
	conflicts, err := d.prober.ProbeAll(ctx, d.askedOn(pool), next, probeMode(pool))
	for _, c := range conflicts {
		if err := d.noteConflict(pool, c); err != nil {
			d.log.WithError(err).Error("conflict could not be recorded")
		}
	}
	if err != nil {
		return
	}
	for _, addr := range next {
		if _, used := conflicts[addr]; !used {
			clear[addr] = true
		}
	}
}

// probeAgain asks once more for an address that somebody on the LAN had and that a
// user wants by name. The error says who has it, known as what was found before.
func (d *Driver) probeAgain(ctx context.Context, pool ipam.Pool, addr netip.Addr, known error) error {
	if pool.Options.Conflict == ipam.ConflictWarn || d.prober == nil || probeMode(pool) == probe.Off {
		d.log.WithFields(logrus.Fields{"network": pool.Network, "address": addr}).
			Warn("address was in use by somebody else on the LAN; given out all the same")
		return nil
	}
	conflict, err := d.prober.Probe(ctx, d.askedOn(pool), addr, probeMode(pool))
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("%w; %w", known, err)
	}
	if err != nil {
		return err
	}
	if conflict == nil {
		d.store.leases.clearConflict(pool.ID, addr)
		return nil
	}
	return errors.Join(conflictError(*conflict, pool), d.noteConflict(pool, *conflict))
}

// noteConflict records that somebody on the LAN has an address.
func (d *Driver) noteConflict(pool ipam.Pool, c probe.Conflict) error {
	d.conflicts.Add(1)
	d.log.WithFields(logrus.Fields{"network": pool.Network, "address": c.Addr, "mac": c.MAC}).
		Warn("address is in use by somebody else on the LAN")
	return d.store.leases.markConflict(pool.ID, ipam.Conflict{Addr: c.Addr, MAC: c.MAC, Until: d.now().Add(conflictTime)})
}

func conflictError(c probe.Conflict, pool ipam.Pool) error {
	who := c.MAC.String()
	if c.Host {
		who = "this host"
	}
	return fault.Conflict("address %s of subnet %s is in use on the LAN by %s; choose another one, or give --ipam-opt conflict=warn with the network", c.Addr, pool.Prefix, who)
}

// askedOn is the link by which the pool's LAN is asked. An uplink is a port of its
// bridge, which takes what comes in there; the bridge is heard by both sides, the LAN
// and the containers.
func (d *Driver) askedOn(pool ipam.Pool) string {
	if rec, ok := d.store.network(pool.Network); ok && rec.Spec.Uplink != "" {
		return rec.Spec.Bridge
	}
	return pool.Options.Parent
}

// probeMode is how the pool's addresses are asked for.
func probeMode(pool ipam.Pool) probe.Mode {
	if pool.Options.Parent == "" {
		return probe.Off
	}
	switch pool.Options.ProbeMode() {
	case ipam.ProbeFast:
		return probe.Fast
	case ipam.ProbeFull:
		return probe.Full
	default:
		return probe.Off
	}
}

// watchPool keeps spares of a pool that a network uses ready, and listens for
// strangers who use an address of its containers. It does nothing for a pool that
// is on no LAN.
func (d *Driver) watchPool(pool ipam.Pool) {
	if d.prober == nil || pool.Options.Parent == "" || probeMode(pool) == probe.Off {
		return
	}
	if !pool.Options.DHCP && probeMode(pool) == probe.Fast {
		d.spares.Set(pool.ID, probe.Pool{
			Parent: d.askedOn(pool),
			Peek:   func(n int) []netip.Addr { return d.store.leases.peek(pool.ID, n) },
			Conflict: func(c probe.Conflict) {
				if err := d.noteConflict(pool, c); err != nil {
					d.log.WithError(err).Error("conflict could not be recorded")
				}
			},
			Bound: true,
		})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.watched[pool.ID] != nil {
		return
	}
	stop, err := d.prober.Watch(d.askedOn(pool), func(addr netip.Addr) bool {
		lease, ok := d.store.leases.lease(pool.ID, addr)
		return ok && lease.Endpoint != ""
	}, func(c probe.Conflict) {
		d.conflicts.Add(1)
		d.log.WithFields(logrus.Fields{"network": pool.Network, "address": c.Addr, "mac": c.MAC}).
			Error("somebody else on the LAN uses the address of a container")
	})
	if err != nil {
		d.log.WithError(err).WithField("network", pool.Network).Error("LAN is not watched for strangers that use addresses of containers")
		return
	}
	d.watched[pool.ID] = stop
}

// unwatchPool ends watchPool; an unknown pool is success.
func (d *Driver) unwatchPool(id string) {
	if d.prober == nil {
		return
	}
	d.spares.Drop(id)
	d.mu.Lock()
	stop := d.watched[id]
	delete(d.watched, id)
	d.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// OwnMAC reports whether a MAC address on a parent is that of a container that the
// records know. It is what a Prober asks, and does not wait.
func (d *Driver) OwnMAC(_ string, mac net.HardwareAddr) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.macs[string(mac)] > 0
}
