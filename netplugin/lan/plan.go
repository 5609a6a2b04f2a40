package lan

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

// A step is one thing to do, as data. String is what it does, for errors.
type step interface{ fmt.Stringer }

type (
	// ensurePrivate makes the link that a network has in the place of a parent.
	ensurePrivate struct {
		name, peer, networkID string
		mac                   net.HardwareAddr
		mtu                   int
	}
	// ensureVLAN makes the parent, unless somebody else has.
	ensureVLAN struct {
		name, base string
		id         int
	}
	// checkParent says early whether endpoints can be made on the parent.
	checkParent struct{ network options.Network }
	// ensureShim makes the host's own link on the parent, as all networks want it.
	ensureShim struct{ parent string }
	// ensureLink makes an endpoint's link, on a parent that may yet come.
	ensureLink struct {
		link.Child
		networkID string
		addrs     []netip.Addr
	}
	// ensureRoutes leads the host to an endpoint.
	ensureRoutes struct {
		network  options.Network
		endpoint options.Endpoint
	}
)

func (s ensurePrivate) String() string { return "set up private link " + s.name }
func (s ensureVLAN) String() string    { return "set up VLAN " + s.name }
func (s checkParent) String() string   { return "use parent " + s.network.LAN.Parent }
func (s ensureShim) String() string    { return "set up access to the host on parent " + s.parent }
func (s ensureLink) String() string    { return "set up link " + s.Name }
func (s ensureRoutes) String() string {
	return "set up access of the host to link " + s.endpoint.ContainerLink
}

func planNetwork(n options.Network) []step {
	if n.LAN.Parent == "" {
		name, peer := options.PrivateLinks(n.ID)
		return []step{ensurePrivate{name, peer, n.ID, macOf("private link of network " + n.ID), n.MTU}}
	}
	var steps []step
	if base, id, ok := n.LAN.VLAN(); ok {
		steps = append(steps, ensureVLAN{n.LAN.Parent, base, id})
	}
	steps = append(steps, checkParent{n})
	if n.LAN.HostAccess {
		steps = append(steps, ensureShim{n.LAN.Parent})
	}
	return steps
}

func planEndpoint(n options.Network, ep options.Endpoint) []step {
	steps := []step{
		ensureLink{networkID: n.ID, addrs: addresses(ep), Child: link.Child{
			Name: ep.ContainerLink, Owner: link.OfEndpoint(ep.ID), Parent: parentOf(n),
			Kind: string(n.Mode), Mode: n.LAN.Type, Flag: n.LAN.Flag, MAC: ep.MAC, MTU: n.MTU, BroadcastQueue: n.LAN.BroadcastQueue,
		}},
	}
	if n.LAN.HostAccess {
		steps = append(steps, ensureRoutes{n, ep})
	}
	return steps
}

// parentOf is the link that the endpoints' links are on.
func parentOf(n options.Network) string {
	if n.LAN.Parent == "" {
		name, _ := options.PrivateLinks(n.ID)
		return name
	}
	return n.LAN.Parent
}

// Parents are the names of the links that the networks depend on: events of these
// are of interest, those of other links are not.
func Parents(networks []options.Network) map[string]bool {
	names := map[string]bool{}
	for _, n := range networks {
		if !n.IsLAN() {
			continue
		}
		names[parentOf(n)] = true
		if base, _, ok := n.LAN.VLAN(); ok {
			names[base] = true
		}
		if n.LAN.HostAccess {
			names[options.ShimName(n.LAN.Parent)] = true
		}
	}
	return names
}

// planShim is the host's link for these networks of one parent, which all want it,
// where the parent has these addresses.
func planShim(parent string, networks []options.Network, addrs []netip.Prefix) link.Shim {
	first := networks[0]
	s := link.Shim{Child: link.Child{
		Name: options.ShimName(parent), Owner: link.OfParent(parent), Parent: parent,
		Kind: string(first.Mode), Mode: first.LAN.Type, Flag: first.LAN.Flag,
	}}
	if first.Mode == options.ModeMacvlan {
		s.Mode, s.MAC = options.MacvlanBridge, macOf("host beside parent "+parent)
	}
	for _, n := range networks {
		for _, subnet := range n.Subnets {
			s.IPv6 = s.IPv6 || subnet.Pool.Addr().Is6()
			if own := n.LAN.HostAddrIn(subnet); own.IsValid() {
				s.Addrs = appendNew(s.Addrs, netip.PrefixFrom(own, own.BitLen()))
				continue
			}
			for _, p := range addrs {
				if first.Mode == options.ModeMacvlan && p.Addr().Is6() && subnet.Pool.Contains(p.Addr()) {
					s.Proxied = appendNew(s.Proxied, p.Addr())
				}
			}
		}
	}
	slices.SortFunc(s.Proxied, netip.Addr.Compare)
	return s
}

func appendNew[T comparable](list []T, v T) []T {
	if slices.Contains(list, v) {
		return list
	}
	return append(list, v)
}

// macOf is the same whenever the link is made again, so that containers that live
// on find the host: locally administered, unicast.
func macOf(what string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(what))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^0x01 | 0x02
	return mac
}

// hostAddr is the address by which containers of a subnet reach the host: its own
// there, or that of the parent; the zero Addr is none. In an l3 mode the host routes
// for the containers, and any address of the parent will do; in l2 the kernel gives
// packets for the parent's address to the parent, where they look out of place.
func hostAddr(n options.Network, subnet options.Subnet, parent []netip.Prefix) netip.Addr {
	if own := n.LAN.HostAddrIn(subnet); own.IsValid() || n.LAN.Type == options.IPvlanL2 {
		return own
	}
	for _, p := range parent {
		if subnet.Pool.Contains(p.Addr()) {
			return p.Addr()
		}
	}
	if n.Mode == options.ModeIPvlan {
		for _, p := range parent {
			if p.Addr().Is6() == subnet.Pool.Addr().Is6() {
				return p.Addr()
			}
		}
	}
	return netip.Addr{}
}

// hostRoutes lead the host to an endpoint. Subnets in which it has no address for
// that are left out.
func hostRoutes(n options.Network, ep options.Endpoint, parent []netip.Prefix) []link.HostRoute {
	var routes []link.HostRoute
	for _, addr := range addresses(ep) {
		subnet, ok := n.SubnetOf(addr)
		if !ok {
			continue
		}
		if from := hostAddr(n, subnet, parent); from.IsValid() {
			routes = append(routes, link.HostRoute{To: addr, From: from})
		}
	}
	return routes
}

func addresses(ep options.Endpoint) []netip.Addr {
	var addrs []netip.Addr
	for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
		if p.IsValid() {
			addrs = append(addrs, p.Addr())
		}
	}
	return addrs
}
