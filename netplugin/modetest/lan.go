package modetest

import (
	"fmt"
	"net/netip"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// Parent is the link of the host that the networks of LANNetwork are on. Neighbour
// is the other end of it, the one in the namespace of PrepareLAN.
const (
	Parent    = "lan0"
	Neighbour = "lan1"
)

// PrepareLAN gives a host a link to a LAN, with addresses in the subnets of
// LANNetwork 1. The other end is in the same namespace, up, without an address, and
// may be moved.
func PrepareLAN(ns *testkit.Netns) {
	ns.Run("ip", "link", "add", Parent, "address", "02:00:00:00:aa:00", "type", "veth", "peer", "name", Neighbour, "address", "02:00:00:00:aa:01")
	ns.Run("sysctl", "-qw", "net.ipv6.conf."+Neighbour+".disable_ipv6=1")
	ns.Run("ip", "link", "set", Parent, "up")
	ns.Run("ip", "link", "set", Neighbour, "up")
	for _, s := range LANNetwork(options.ModeMacvlan, 1).Subnets {
		ns.Run("ip", "addr", "add", hostOf(s).String(), "dev", Parent, "nodad")
	}
	// The kernel finds out a moment later that the other end is up, too.
	for _, name := range []string{Parent, Neighbour} {
		ns.Run("timeout", "10", "sh", "-c", "until ip -br link show dev "+name+" | grep -q ' UP '; do sleep 0.01; done")
	}
}

// HostAddr is the address of the host in a subnet of LANNetwork 1.
func HostAddr(s options.Subnet) netip.Addr { return hostOf(s).Addr() }

// hostOf is that with the length of the prefix.
func hostOf(s options.Subnet) netip.Prefix {
	if s.Pool.Addr().Is4() {
		a := s.Pool.Addr().As4()
		a[3] = 250
		return netip.PrefixFrom(netip.AddrFrom4(a), s.Pool.Bits())
	}
	a := s.Pool.Addr().As16()
	a[15] = 250
	return netip.PrefixFrom(netip.AddrFrom16(a), s.Pool.Bits())
}

// LANNetwork is spec i of a network of a LAN mode with that parent, in the mode's
// default kind.
func LANNetwork(mode options.Mode, i int) options.Network {
	n := Network(i)
	n.Bridge, n.Masquerade, n.Mode = "", false, mode
	n.LAN = options.LAN{Parent: Parent, Type: options.MacvlanBridge}
	if mode == options.ModeIPvlan {
		n.LAN.Type, n.LAN.Flag = options.IPvlanL2, options.IPvlanBridge
	}
	return n
}

// LANEndpoint is spec i of a network made by LANNetwork.
func LANEndpoint(n options.Network, i int) options.Endpoint {
	ep := Endpoint(n, i)
	ep.HostLink = ""
	if n.SharesMAC() {
		ep.MAC = nil
	}
	return ep
}

// LANSuite is the suite for a LAN mode, without its variants.
func LANSuite(mode options.Mode) Suite {
	return Suite{
		Network:       func(i int) options.Network { return LANNetwork(mode, i) },
		Endpoint:      LANEndpoint,
		NetworkLinks:  func(options.Network) []string { return nil },
		EndpointLinks: func(ep options.Endpoint) []string { return []string{ep.ContainerLink} },
		Prepare:       PrepareLAN,
		NoRules:       true,
	}
}

// LANVariants are those that a LAN mode can make on every kernel that has it.
func LANVariants(mode options.Mode) map[string]func(*options.Network) {
	out := map[string]func(*options.Network){
		"private link": func(n *options.Network) { n.LAN.Parent, n.Internal = "", true },
	}
	if mode == options.ModeMacvlan {
		out["private"] = func(n *options.Network) { n.LAN.Type = options.MacvlanPrivate }
		out["vepa, long queue"] = func(n *options.Network) { n.LAN.Type, n.LAN.BroadcastQueue = options.MacvlanVEPA, 5000 }
		out["host access"] = func(n *options.Network) { n.LAN.HostAccess = true }
		out["host access by own addresses"] = func(n *options.Network) {
			n.LAN.HostAccess = true
			for _, s := range n.Subnets {
				n.LAN.HostAddrs = append(n.LAN.HostAddrs, hostOf(s).Addr().Next())
			}
		}
		return out
	}
	for _, kind := range []string{options.IPvlanL3, options.IPvlanL3S} {
		out[kind] = func(n *options.Network) { n.LAN.Type = kind }
	}
	for _, flag := range []string{options.IPvlanPrivate, options.IPvlanVEPA} {
		out[fmt.Sprint("l2 ", flag)] = func(n *options.Network) { n.LAN.Flag = flag }
	}
	return out
}
