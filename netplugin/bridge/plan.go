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
	// setAddrs gives the bridge its gateway addresses.
	setAddrs struct {
		link  string
		addrs []netip.Prefix
	}
	// ensureVeth makes an endpoint's pair of links.
	ensureVeth struct{ link.Veth }
)

func (s checkForwarding) String() string  { return "check forwarding" }
func (s enableForwarding) String() string { return "turn on forwarding" }
func (s ensureRules) String() string      { return "set firewall for bridge " + s.network.Bridge }
func (s ensureBridge) String() string     { return "set up bridge " + s.Name }
func (s setAddrs) String() string         { return "address bridge " + s.link }
func (s ensureVeth) String() string       { return "set up link " + s.Host }

// FirewallNetwork is the part of a network that the firewall needs.
func FirewallNetwork(n options.Network) firewall.Network {
	out := firewall.Network{Bridge: n.Bridge, Internal: n.Internal, Masquerade: n.Masquerade}
	for _, s := range n.Subnets {
		out.Subnets = append(out.Subnets, s.Pool)
	}
	return out
}

func planNetwork(n options.Network) []step {
	fw := FirewallNetwork(n)
	var steps []step
	if !n.Internal {
		steps = append(steps, checkForwarding{fw})
	}
	var (
		addrs []netip.Prefix
		ipv6  bool
	)
	for _, s := range n.Subnets {
		ipv6 = ipv6 || s.Pool.Addr().Is6()
		// An internal network keeps its gateway address: the host is reached there,
		// but no container gets a route through it.
		if s.Gateway.IsValid() {
			addrs = append(addrs, netip.PrefixFrom(s.Gateway, s.Pool.Bits()))
		}
	}
	return append(steps,
		ensureRules{fw},
		ensureBridge{link.Bridge{Name: n.Bridge, NetworkID: n.ID, MAC: bridgeMAC(n.ID), MTU: n.MTU, IPv6: ipv6}},
		setAddrs{n.Bridge, addrs},
	)
}

func planEndpoint(n options.Network, ep options.Endpoint) []step {
	var steps []step
	if !n.Internal {
		steps = append(steps, enableForwarding{FirewallNetwork(n)})
	}
	return append(steps, ensureVeth{link.Veth{
		Host: ep.HostLink, Container: ep.ContainerLink, EndpointID: ep.ID, Master: n.Bridge, MAC: ep.MAC, MTU: n.MTU,
	}})
}

// bridgeMAC is the same whenever the bridge is made again, so that containers
// that live on find their gateway: locally administered, unicast.
func bridgeMAC(networkID string) net.HardwareAddr {
	sum := sha256.Sum256([]byte("bridge of network " + networkID))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^0x01 | 0x02
	return mac
}
