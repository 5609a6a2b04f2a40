package bridge

import (
	"context"
	"net/netip"
	"slices"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// Adopt completes the spec of a new network by what is on the host. When its bridge
// exists and is not Berth's, the network is made on it: Adopted is set, and
// AdoptedAddrs to the gateway addresses that the bridge lacks. An MTU of 0 becomes
// that of the adopted bridge, or else of the link of the host's default route; it
// stays 0 where there is none.
//
// A link of that name that cannot be used is a fault.Conflict: one that is no
// bridge, the bridge of another network of Berth's or of Docker's, or one that has
// another IPv4 address in the subnet than the gateway's. So is an uplink that the host
// uses itself. Nothing is changed.
func (m *Mode) Adopt(ctx context.Context, n options.Network) (options.Network, error) {
	if err := ctx.Err(); err != nil {
		return n, err
	}
	n.Adopted, n.AdoptedAddrs = false, nil
	if n.Uplink != "" {
		return m.adoptUplink(n)
	}
	if n.Bridge != "" {
		l, ok, err := m.links.Get(n.Bridge)
		if err != nil {
			return n, err
		}
		if ok && (!l.Owner.Ours || l.Owner.Network != "" && l.Owner.Network != n.ID) {
			have, err := m.usable(l, n)
			if err != nil {
				return n, err
			}
			n.Adopted, n.AdoptedAddrs = true, lacking(have, gateways(n))
			if n.MTU == 0 {
				n.MTU = l.MTU
			}
		}
	}
	if n.MTU != 0 {
		return n, nil
	}
	mtu, err := m.links.DefaultMTU()
	n.MTU = mtu
	return n, err
}

// usable says whether the network can be made on the link, and returns the
// addresses of the link.
func (m *Mode) usable(l link.Link, n options.Network) ([]netip.Prefix, error) {
	switch {
	case l.Owner.Ours:
		return nil, fault.Conflict("bridge %q is that of another network of Berth (%s): choose another name", l.Name, l.Owner)
	case l.Kind != "bridge":
		return nil, fault.Conflict("link %q exists and is a %s, not a bridge: choose another name for the bridge", l.Name, l.Kind)
	case link.IsDocker(l.Name):
		return nil, fault.Conflict("bridge %q is that of a network of Docker's own: choose another name", l.Name)
	}
	have, err := m.links.Addrs(l.Name)
	if err != nil {
		return nil, err
	}
	return have, fits(l.Name, have, n)
}

// fits says whether a bridge with these addresses can be the gateway that the
// network wants.
func fits(bridge string, have []netip.Prefix, n options.Network) error {
	for _, want := range gateways(n) {
		if !want.Addr().Is4() {
			continue // A link has many IPv6 addresses.
		}
		other := slices.IndexFunc(have, func(p netip.Prefix) bool { return want.Masked().Contains(p.Addr()) && p.Addr() != want.Addr() })
		if other >= 0 && len(lacking(have, []netip.Prefix{want})) > 0 {
			return fault.Conflict("bridge %q has the address %s, but the gateway of subnet %s is %s: create the network with --gateway %s, or give the bridge that address",
				bridge, have[other].Addr(), want.Masked(), want.Addr(), have[other].Addr())
		}
	}
	return nil
}

// lacking are the wanted addresses that are not there, whatever the length of
// their prefix.
func lacking(have, want []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(want), func(p netip.Prefix) bool {
		return slices.ContainsFunc(have, func(h netip.Prefix) bool { return h.Addr() == p.Addr() })
	})
}
