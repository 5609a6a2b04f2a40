package hostport

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// A group is a set of bindings that are to have the same host port.
type group struct {
	proto options.Proto
	// first to last are the host ports to choose from, both 0 for any ephemeral one.
	first, last uint16
	// container is the port in the container.
	container uint16
	bindings  []binding
}

// A binding publishes on one address of the host.
type binding struct {
	// host is the zero Addr when the container is reached without a host port.
	host      netip.Addr
	container netip.Addr
}

func (g group) fixed() bool     { return g.first != 0 && g.first == g.last }
func (g group) ephemeral() bool { return g.first == 0 }

// check refuses requests that mean nothing.
func check(want []options.PortRequest) error {
	for _, r := range want {
		switch r.Proto {
		case options.TCP, options.UDP, options.SCTP:
		default:
			return fault.Invalid("published port %s: protocol %d has no ports: want %d (tcp), %d (udp) or %d (sctp)",
				r, uint8(r.Proto), uint8(options.TCP), uint8(options.UDP), uint8(options.SCTP))
		}
		if r.ContainerPort == 0 {
			return fault.Invalid("published port %s: the container's port is 0: want one from 1 to 65535", r)
		}
		if r.HostPortEnd != 0 && (r.HostPort == 0 || r.HostPortEnd < r.HostPort) {
			return fault.Invalid("published port %s: host ports %d-%d: want the first one from 1, and the last one no lower",
				r, r.HostPort, r.HostPortEnd)
		}
	}
	return nil
}

// expand turns requests into groups, in the order in which ports are to be picked,
// and ports that need no host port. hostIPv6 says that the host has IPv6; without
// it, no binding is made there that nobody asked for by name. impossible are the
// requests that lead to no binding at all.
func expand(t Target, want []options.PortRequest, hostIPv6 bool) (groups []group, direct []options.PublishedPort, impossible []options.PortRequest) {
	type same struct {
		proto                  options.Proto
		first, last, container uint16
	}
	index := map[same]int{}
	for _, r := range want {
		bindings := t.bindings(r.Proto, r.HostIP.Unmap(), hostIPv6)
		if len(bindings) == 0 {
			impossible = append(impossible, r)
			continue
		}
		like := same{r.Proto, r.HostPort, max(r.HostPort, r.HostPortEnd), r.ContainerPort}
		for _, b := range bindings {
			if !b.host.IsValid() {
				direct = append(direct, options.PublishedPort{
					Proto: r.Proto, Container: b.container, ContainerPort: r.ContainerPort, Count: 1,
				})
				continue
			}
			i, ok := index[like]
			if !ok {
				i = len(groups)
				index[like] = i
				groups = append(groups, group{proto: like.proto, first: like.first, last: like.last, container: like.container})
			}
			if !slices.Contains(groups[i].bindings, b) {
				groups[i].bindings = append(groups[i].bindings, b)
			}
		}
	}
	slices.SortStableFunc(groups, compareGroups)
	return groups, direct, impossible
}

// compareGroups puts fixed ports first, then ranges, then ephemeral ports: each is
// chosen from what the ones before leave free. Ranges are ordered by their end.
// When each then takes the lowest port that is free, all of them are satisfied
// whenever that is possible.
func compareGroups(a, b group) int {
	class := func(g group) int {
		switch {
		case g.fixed():
			return 0
		case g.ephemeral():
			return 2
		default:
			return 1
		}
	}
	return cmp.Or(
		cmp.Compare(class(a), class(b)), cmp.Compare(a.last, b.last), cmp.Compare(a.first, b.first),
		cmp.Compare(a.proto, b.proto), cmp.Compare(a.container, b.container),
	)
}

// bindings are those of a request for this host address.
func (t Target) bindings(proto options.Proto, hostIP netip.Addr, hostIPv6 bool) []binding {
	n := t.Network
	if n.Internal {
		return nil
	}
	var out []binding
	if host, _, ok := hostAddr4(n, hostIP); ok && t.Addr4.IsValid() {
		switch n.IPv4.Mode {
		case options.GatewayIsolated:
		case options.GatewayRouted:
			out = append(out, binding{container: t.Addr4})
		default:
			out = append(out, binding{host, t.Addr4})
		}
	}
	host, named, ok := hostAddr6(n, hostIP)
	if !ok {
		return out
	}
	listens := named || hostIPv6
	switch {
	case n.IPv6.Mode == options.GatewayIsolated:
	case t.Addr6.IsValid() && n.IPv6.Routed():
		out = append(out, binding{container: t.Addr6})
	case n.IPv6.Routed() || !listens:
	case t.Addr6.IsValid():
		out = append(out, binding{host, t.Addr6})
	case t.proxies6to4(proto):
		out = append(out, binding{host, t.Addr4})
	}
	return out
}

// hostAddr4 is the IPv4 address that a request for hostIP is published on; ok says
// that there is one, named that the user has chosen it.
//
// A network that is bound to addresses of one family only publishes nothing in the
// other: who has confined his containers to 127.0.0.1 does not want them on [::].
func hostAddr4(n options.Network, hostIP netip.Addr) (host netip.Addr, named, ok bool) {
	switch {
	case hostIP.IsValid():
		return hostIP, true, hostIP.Is4()
	case n.IPv4.Binding.IsValid():
		return n.IPv4.Binding, !n.IPv4.Binding.IsUnspecified(), true
	default:
		return netip.IPv4Unspecified(), false, !n.IPv6.Binding.IsValid()
	}
}

// hostAddr6 is hostAddr4 for IPv6. A binding to 0.0.0.0 is Docker's default and
// confines nothing.
func hostAddr6(n options.Network, hostIP netip.Addr) (host netip.Addr, named, ok bool) {
	switch {
	case hostIP.IsValid():
		return hostIP, true, hostIP.Is6()
	case n.IPv6.Binding.IsValid():
		return n.IPv6.Binding, !n.IPv6.Binding.IsUnspecified(), true
	default:
		confined := n.IPv4.Binding.IsValid() && !n.IPv4.Binding.IsUnspecified()
		return netip.IPv6Unspecified(), false, !confined
	}
}

// proxies6to4 reports whether IPv6 clients are carried to the IPv4 address.
func (t Target) proxies6to4(proto options.Proto) bool {
	return t.Addr4.IsValid() && !t.Network.NoProxy && !t.NoProxy6to4 && proto != options.SCTP &&
		!t.Network.IPv4.Routed() && t.Network.IPv4.Mode != options.GatewayIsolated
}
