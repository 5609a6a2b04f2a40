package netplugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/berth-plugin/berth/netplugin/dhcp"
	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/shared/control"
)

// storedDHCP is what is kept of a lease, restoredDHCP the way back.
func storedDHCP(l dhcp.Lease) *ipam.DHCP {
	return &ipam.DHCP{
		ClientID: l.Identity.ClientID, Server: l.Server, ServerMAC: l.ServerMAC, T1: l.T1, T2: l.T2, Expires: l.Expires, Hostname: l.Identity.Hostname,
	}
}

func restoredDHCP(pool ipam.Pool, l ipam.Lease) dhcp.Lease {
	return dhcp.Lease{
		Parent:   pool.Options.Parent,
		Identity: dhcp.Identity{Slot: l.Key, MAC: l.MAC, ClientID: l.DHCP.ClientID, Hostname: l.DHCP.Hostname},
		Addr:     l.Addr, Subnet: pool.Prefix, Prefix: netip.PrefixFrom(l.Addr, pool.Prefix.Bits()),
		Server: l.DHCP.Server, ServerMAC: l.DHCP.ServerMAC, T1: l.DHCP.T1, T2: l.DHCP.T2, Expires: l.DHCP.Expires,
	}
}

// renewed records the new times of a lease and reports whether there is one.
func (s *leaseStore) renewed(l dhcp.Lease) (found bool, _ error) {
	err := s.decide(context.Background(), func(a *ipam.Allocator) error {
		for _, pool := range a.Pools() {
			if !pool.Options.DHCP || pool.Options.Parent != l.Parent || !pool.Prefix.Contains(l.Addr) {
				continue
			}
			// News of another client's are of a lease that has ended.
			lease, ok := a.Lease(pool.ID, l.Addr)
			if ok && lease.DHCP != nil && slices.Equal(lease.MAC, l.Identity.MAC) {
				found = a.SetDHCP(pool.ID, l.Addr, l.Identity.MAC, storedDHCP(l)) || found
			}
		}
		return nil
	}, nil)
	return found, err
}

// macs are the MAC addresses of all leases on a pool's parent.
func (s *leaseStore) macs(pool ipam.Pool) map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	used := make(map[string]bool)
	for _, other := range s.alloc.Pools() {
		if other.Options.Parent != pool.Options.Parent || !other.Options.DHCP {
			continue
		}
		for _, lease := range s.alloc.Leases(other.ID) {
			used[string(lease.MAC)] = true
		}
	}
	return used
}

// previous is the address that a client of a pool had last.
func (s *leaseStore) previous(pool string, mac net.HardwareAddr) netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	var last ipam.Tombstone
	for _, t := range s.alloc.Tombstones(pool) {
		if slices.Equal(t.MAC, mac) && t.Since.After(last.Since) {
			last = t
		}
	}
	return last.Addr
}

// clientBefore is the client without a key that had an address last.
func (s *leaseStore) clientBefore(pool string, addr netip.Addr) (_ dhcp.Identity, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.alloc.Tombstones(pool) {
		if t.Addr == addr && t.Key == "" && t.DHCP != nil {
			return dhcp.Identity{MAC: t.MAC, ClientID: t.DHCP.ClientID}, true
		}
	}
	return dhcp.Identity{}, false
}

// loose is the lease that the key has in a pool and does not use.
func (s *leaseStore) loose(pool ipam.Pool, key string) (_ dhcp.Lease, ok bool) {
	if key == "" {
		return dhcp.Lease{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.alloc.Leases(pool.ID) {
		if l.Key == key && l.Endpoint == "" && l.DHCP != nil {
			return restoredDHCP(pool, l), true
		}
	}
	return dhcp.Lease{}, false
}

// available says why a request could not be answered; nothing is held.
func (s *leaseStore) available(want ipam.AddressRequest) error {
	want.Probed = true
	lease, err := s.hold(want)
	if err == nil {
		s.cancel(want.Pool, lease.Addr)
	}
	return err
}

// acceptable says why an address that a server offers to the key cannot be used: what
// has it may be on another network of the parent.
func (s *leaseStore) acceptable(pool ipam.Pool, addr netip.Addr, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.alloc.Pools() {
		if other.Options.Parent != pool.Options.Parent {
			continue
		}
		lease, ok := s.alloc.Lease(other.ID, addr)
		switch {
		case !ok, other.ID == pool.ID && key != "" && lease.Key == key && lease.Endpoint == "":
		case lease.Role == ipam.RoleEndpoint:
			return errors.New("a container of this host has it")
		default:
			return fmt.Errorf("it is in use as %s address", lease.Role)
		}
	}
	return nil
}

// elsewhere reports whether a client has a lease in another pool of the parent.
func (s *leaseStore) elsewhere(pool ipam.Pool, mac net.HardwareAddr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.alloc.Pools() {
		if other.ID == pool.ID || other.Options.Parent != pool.Options.Parent || !other.Options.DHCP {
			continue
		}
		for _, lease := range s.alloc.Leases(other.ID) {
			if slices.Equal(lease.MAC, mac) {
				return true
			}
		}
	}
	return false
}

// untoldTime is how long after the end of a lease its server is told once more that it
// is free, when berthd has ended and begun again.
const untoldTime = time.Hour

// recordedDHCP are the leases that containers have, and those that had ended so
// shortly before berthd that their servers may not have been told. The last thing on
// record is from when berthd was there.
func (s *leaseStore) recordedDHCP(now time.Time) (active []dhcp.Lease, untold []parting) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var last time.Time
	used := make(map[string]bool)
	for _, pool := range s.alloc.Pools() {
		if !pool.Options.DHCP {
			continue
		}
		for _, lease := range s.alloc.Leases(pool.ID) {
			if lease.Since.After(last) {
				last = lease.Since
			}
			if lease.DHCP != nil {
				active = append(active, restoredDHCP(pool, lease))
				used[clientOf(pool.Options.Parent, lease.MAC)] = true
			}
		}
		for _, t := range s.alloc.Tombstones(pool.ID) {
			if t.Since.After(last) {
				last = t.Since
			}
			if t.DHCP == nil || now.Sub(t.Since) > untoldTime {
				continue
			}
			lease := restoredDHCP(pool, ipam.Lease{Addr: t.Addr, Key: t.Key, MAC: t.MAC, DHCP: t.DHCP})
			untold = append(untold, parting{Lease: lease, key: t.Key, named: t.Named, since: t.Since, maybe: true})
		}
	}
	untold = slices.DeleteFunc(untold, func(p parting) bool {
		return last.Sub(p.since) > partingTime || p.Expired(now) || used[clientOf(p.Parent, p.Identity.MAC)]
	})
	// A client that has come and gone meanwhile is told of as it went.
	slices.SortFunc(untold, func(a, b parting) int { return a.since.Compare(b.since) })
	return active, untold
}

// forgetDHCP ends the leases of DHCP servers that nothing has used for a long time.
func (s *leaseStore) forgetDHCP(now time.Time) (ended []endedLease, _ error) {
	return ended, s.decide(context.Background(), func(a *ipam.Allocator) error {
		for _, pool := range a.Pools() {
			if !pool.Options.DHCP {
				continue
			}
			for _, l := range a.Leases(pool.ID) {
				if l.DHCP == nil || l.Endpoint != "" || now.Sub(l.Since) < ipam.ForgetAfter {
					continue
				}
				if _, kept := a.Release(pool.ID, l.Addr); !kept {
					ended = append(ended, endedLease{pool, l})
				}
			}
		}
		return nil
	}, nil)
}

// wireDHCP is a DHCP lease for an operator.
func (d *Driver) wireDHCP(pool ipam.Pool, addr netip.Addr, l *ipam.DHCP) *control.DHCPLease {
	if l == nil {
		return nil
	}
	wire := &control.DHCPLease{Server: l.Server, ClientID: fmt.Sprintf("%x", l.ClientID), Hostname: l.Hostname, State: control.DHCPBound, Renews: l.T1, Expires: l.Expires}
	if d.dhcp == nil {
		return wire
	}
	for _, status := range d.dhcp.Status() {
		if status.Lease.Parent != pool.Options.Parent || status.Lease.Addr != addr {
			continue
		}
		wire.Renews, wire.Expires = status.Next, status.Lease.Expires
		wire.State = wireState(status.State)
	}
	return wire
}

func wireState(s dhcp.State) control.DHCPState {
	switch s {
	case dhcp.Renewing:
		return control.DHCPRenewing
	case dhcp.Rebinding:
		return control.DHCPRebinding
	case dhcp.Lost:
		return control.DHCPExpired
	case dhcp.Bound:
	}
	return control.DHCPBound
}
