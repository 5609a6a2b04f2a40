package bridge

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"

	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

// A step is one thing to do, as data. String is what it does, for errors.
type step interface{ fmt.Stringer }

type (
	// checkForwarding says early whether containers will be able to get out.
	checkForwarding struct{ network firewall.Network }
	// enableForwarding makes the host a router.
	enableForwarding struct{ network firewall.Network }
	// ensureRules lets packets in and out of the bridge. It comes before the bridge:
	// a network is never open for a moment.
	ensureRules struct{ network firewall.Network }
	// ensureBridge makes the bridge link.
	ensureBridge struct{ link.Bridge }
	// plugUplink makes a link of the host a port of the bridge.
	plugUplink struct{ network options.Network }
	// setAddrs gives the bridge its gateway addresses.
	setAddrs struct {
		link  string
		addrs []netip.Prefix
	}
	// adoptBridge gives a bridge that was there before the addresses that it lacks.
	adoptBridge struct {
		link  string
		addrs []netip.Prefix
	}
	// ensureVeth makes an endpoint's pair of links.
	ensureVeth struct {
		link.Veth
		// addrs are made known to the neighbours of a new endpoint.
		addrs []netip.Addr
	}
)

func (s checkForwarding) String() string  { return "check forwarding" }
func (s enableForwarding) String() string { return "turn on forwarding" }
func (s ensureRules) String() string      { return "set firewall for bridge " + s.network.Bridge }
func (s ensureBridge) String() string     { return "set up bridge " + s.Name }
func (s plugUplink) String() string {
	return "plug uplink " + s.network.Uplink + " into bridge " + s.network.Bridge
}
func (s setAddrs) String() string    { return "address bridge " + s.link }
func (s adoptBridge) String() string { return "use bridge " + s.link }
func (s ensureVeth) String() string  { return "set up link " + s.Host }

// FirewallNetwork is the part of a network that the firewall needs.
func FirewallNetwork(n options.Network) firewall.Network {
	out := firewall.Network{
		Bridge: n.Bridge, Internal: n.Internal, Masquerade: n.Masquerade, IPv4: n.IPv4, IPv6: n.IPv6,
		NoICC: n.NoICC, HostFirewall: n.HostFirewall, Sources: n.Sources, Trusted: n.Trusted,
	}
	for _, s := range n.Subnets {
		out.Subnets = append(out.Subnets, s.Pool)
	}
	if n.Uplink != "" {
		// Frames go between the ports. Through the host nothing goes: it would be a
		// router for all of the LAN. What is kept apart is so by the ports alone, since
		// the rules cannot tell the uplink from a container.
		out.Internal, out.Switched, out.NoICC = true, true, false
	}
	return out
}

// gateways are the addresses of the bridge, in the order of the subnets. An
// internal network keeps its gateway address: the host is reached there, but no
// container gets a route through it.
func gateways(n options.Network) []netip.Prefix {
	var addrs []netip.Prefix
	for _, s := range n.Subnets {
		isolated := n.FamilyOf(s.Pool.Addr()).Mode == options.GatewayIsolated
		if !s.Gateway.IsValid() || isolated || n.InhibitIPv4 && s.Gateway.Is4() {
			continue
		}
		addrs = append(addrs, netip.PrefixFrom(s.Gateway, s.Pool.Bits()))
	}
	return addrs
}

// speaksIPv6 reports whether the host takes part in the network's IPv6.
func speaksIPv6(n options.Network) bool {
	if n.Uplink != "" {
		return false // It would take addresses that routers of the LAN announce.
	}
	for _, s := range n.Subnets {
		if s.Pool.Addr().Is6() && n.IPv6.Mode != options.GatewayIsolated {
			return true
		}
	}
	return false
}

func planNetwork(n options.Network) []step {
	fw := FirewallNetwork(n)
	var steps []step
	if !fw.Internal {
		steps = append(steps, checkForwarding{fw})
	}
	steps = append(steps, ensureRules{fw})
	if n.Adopted {
		return append(steps, adoptBridge{n.Bridge, n.AdoptedAddrs})
	}
	steps = append(steps, ensureBridge{bridgeLink(n)}, setAddrs{n.Bridge, gateways(n)})
	if n.Uplink != "" {
		steps = append(steps, plugUplink{n})
	}
	return steps
}

// bridgeLink is the bridge of a network that makes its own.
func bridgeLink(n options.Network) link.Bridge {
	return link.Bridge{Name: n.Bridge, NetworkID: n.ID, MAC: bridgeMAC(n.ID), MTU: n.MTU, IPv6: speaksIPv6(n)}
}

// port is how the bridge treats an endpoint's link.
//
// Hairpin mode sends a container its own broadcasts back, so it is for those only
// that can need it.
//
// Without communication between containers their ports are isolated. Where
// br_netfilter shows bridged packets to the rules (filtered), which keep containers
// apart as well, a container that publishes ports is not: a packet that one of its
// siblings has sent to a host port is then translated while it is bridged, and
// would be stopped by the isolation.
func port(n options.Network, ep options.Endpoint, filtered bool) link.Port {
	publishes := len(ep.Ports) > 0
	return link.Port{Hairpin: publishes, Isolated: n.NoICC && (!publishes || !filtered)}
}

func planEndpoint(n options.Network, ep options.Endpoint, filtered bool) []step {
	var steps []step
	if fw := FirewallNetwork(n); !fw.Internal {
		steps = append(steps, enableForwarding{fw})
	}
	veth := ensureVeth{Veth: link.Veth{
		Host: ep.HostLink, Container: ep.ContainerLink, EndpointID: ep.ID, Master: n.Bridge, MAC: ep.MAC, MTU: n.MTU,
		Port:   port(n, ep, filtered),
		RateIn: either(ep.RateIn, n.RateIn), RateOut: either(ep.RateOut, n.RateOut),
	}}
	for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
		if p.IsValid() {
			veth.addrs = append(veth.addrs, p.Addr())
		}
	}
	if n.SpoofCheck {
		veth.Guarded, veth.Addrs = true, veth.addrs
	}
	return append(steps, veth)
}

// either is the endpoint's own rate, or the network's where it has none.
func either(own, networks int64) int64 {
	if own != 0 {
		return own
	}
	return networks
}

// bridgeMAC is the same whenever the bridge is made again, so that containers
// that live on find their gateway: locally administered, unicast.
func bridgeMAC(networkID string) net.HardwareAddr {
	sum := sha256.Sum256([]byte("bridge of network " + networkID))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^0x01 | 0x02
	return mac
}
