// Package modetest holds the contract of the packages that attach containers to
// networks, one per mode, and a suite that tells whether a package keeps it. The
// suite works in real network namespaces and needs root.
package modetest

import (
	"context"
	"net"
	"net/netip"
	"testing"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// A Mode makes and removes networks and endpoints on the host.
//
// Each call may be repeated with the same specs at any time, also after a crash
// in the middle of one, by another process, and after a reboot: what is missing
// is made, what is there is kept, so that containers do not notice. The specs are
// all a mode knows.
//
// A network whose Adopted is set is made on a bridge that somebody else has made.
// It keeps all it had, is given AdoptedAddrs, and outlives the network without them;
// a network whose bridge is gone is fault.NotFound.
//
// A failed Ensure leaves nothing behind that it has made, and all that was there
// before. A link that is in the way and not Berth's is left alone: fault.Conflict
// that names it. Removing what is not there succeeds. Calls for one network come
// one after the other, those for different networks at the same time.
type Mode interface {
	// EnsureNetwork makes everything that the network's endpoints share.
	EnsureNetwork(context.Context, options.Network) error
	// RemoveNetwork removes it, with what is left of endpoints.
	RemoveNetwork(context.Context, options.Network) error
	// EnsureEndpoint makes the link that dockerd will move into the container:
	// ContainerLink, down, with the wanted MAC and MTU and no address. It repairs
	// the host's side only when the link has moved already.
	EnsureEndpoint(context.Context, options.Network, options.Endpoint) error
	// RemoveEndpoint removes the endpoint's links, wherever dockerd has put the
	// container's end, and whether or not it still exists. The network may be gone.
	RemoveEndpoint(context.Context, options.Network, options.Endpoint) error
}

// A Suite describes the mode under test.
type Suite struct {
	// New makes a Mode in the namespace, as each start of Berth does.
	New func(testing.TB, *testkit.Netns) Mode
	// Network returns network i with a v4 and a v6 subnet, Endpoint an endpoint of
	// it; different ones for each number. Networks are not internal.
	Network  func(i int) options.Network
	Endpoint func(n options.Network, i int) options.Endpoint
	// NetworkLinks and EndpointLinks are the names that a foreign link may have
	// taken.
	NetworkLinks  func(options.Network) []string
	EndpointLinks func(options.Endpoint) []string
	// Variants are other networks that the mode can make, by name: each changes one
	// of Network. What is made and repaired differs; who reaches whom is for the
	// mode's own tests.
	Variants map[string]func(*options.Network)
	// Adopts says that the mode can make a network on a bridge that is there.
	Adopts bool
	// Prepare makes in the host's namespace what was there before Berth; nil for
	// nothing.
	Prepare func(*testkit.Netns)
	// NoRules says that the mode has no firewall rules.
	NoRules bool
}

// Variants are those that a mode with a bridge can make.
func Variants() map[string]func(*options.Network) {
	return map[string]func(*options.Network){
		"apart and limited": func(n *options.Network) { n.NoICC, n.RateIn, n.RateOut = true, 1_000_000, 2_000_000 },
		"isolated": func(n *options.Network) {
			n.Internal, n.IPv4.Mode, n.IPv6.Mode = true, options.GatewayIsolated, options.GatewayIsolated
		},
		"inhibited": func(n *options.Network) { n.InhibitIPv4 = true },
		"more subnets": func(n *options.Network) {
			first := n.Subnets[0].Pool.Addr().As4()
			first[0] = 11
			n.Subnets = append(n.Subnets, options.Subnet{Pool: netip.PrefixFrom(netip.AddrFrom4(first), 24), Gateway: netip.AddrFrom4(first).Next()})
		},
	}
}

// Network is spec i for a mode that uses the bridge's fields.
func Network(i int) options.Network {
	b := byte(i)
	v6 := netip.AddrFrom16([16]byte{0: 0xfd, 7: b, 15: 0})
	return options.Network{
		ID:              hexID('a', i),
		Bridge:          options.BridgeName(hexID('a', i), 0),
		MTU:             1400,
		Masquerade:      true,
		ContainerPrefix: "eth",
		Subnets: []options.Subnet{
			{Pool: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, b, 0}), 24), Gateway: netip.AddrFrom4([4]byte{10, 0, b, 1})},
			{Pool: netip.PrefixFrom(v6, 64), Gateway: v6.Next()},
		},
	}
}

// Endpoint is spec i of a network made by Network.
func Endpoint(n options.Network, i int) options.Endpoint {
	id := hexID('e', int(n.Subnets[0].Pool.Addr().As4()[2])<<8|i)
	ep := options.Endpoint{ID: id, NetworkID: n.ID, MAC: net.HardwareAddr{2, 0, 0, 0, n.Subnets[0].Pool.Addr().As4()[2], byte(i)}}
	ep.HostLink, ep.ContainerLink = options.EndpointLinks(id, 0)
	at := func(s options.Subnet) netip.Prefix {
		addr := s.Gateway
		for range i {
			addr = addr.Next()
		}
		return netip.PrefixFrom(addr, s.Pool.Bits())
	}
	ep.IPv4, ep.IPv6 = at(n.Subnets[0]), at(n.Subnets[1])
	return ep
}

// hexID is an ID like dockerd's, with its number where names are cut from it.
func hexID(kind byte, i int) string {
	const digits = "0123456789abcdef"
	id := make([]byte, 64)
	for at := range id {
		id[at] = kind
	}
	for at := 11; at >= 4; at-- {
		id[at] = digits[i%16]
		i /= 16
	}
	return string(id)
}
