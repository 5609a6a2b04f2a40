package options

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/shared/fault"
)

// parseRoutes reads `10.9.0.0/16 via 10.1.0.254, 10.8.0.0/16`: prefixes of
// destinations, each with or without a next hop, separated by commas or
// semicolons. Without one the destination is on the link itself.
//
// What needs the network's subnets is left to checkRoutes.
func parseRoutes(g given) ([]Route, error) {
	var routes []Route
	for word := range strings.FieldsFuncSeq(g.value, func(r rune) bool { return r == ',' || r == ';' }) {
		if len(routes) == maxRoutes {
			return nil, fault.Invalid("option %s: want at most %d routes", g.key, maxRoutes)
		}
		route, err := parseRoute(g.key, word)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(routes, func(r Route) bool { return r.Destination == route.Destination }) {
			return nil, fault.Invalid("option %s: route to %s is there twice", g.key, route.Destination)
		}
		routes = append(routes, route)
	}
	if len(routes) == 0 {
		return nil, fault.Invalid("option %s=%s: want routes, as 10.9.0.0/16 via 10.1.0.254,10.8.0.0/16", g.key, shown(g.value))
	}
	return routes, nil
}

func parseRoute(key, word string) (Route, error) {
	fields := strings.Fields(word)
	if len(fields) != 1 && (len(fields) != 3 || fields[1] != "via") {
		return Route{}, fault.Invalid("option %s: route %s: want PREFIX or PREFIX via ADDRESS, as 10.9.0.0/16 via 10.1.0.254", key, shown(word))
	}
	to, ok := parsePrefix(fields[0])
	switch {
	case !ok:
		return Route{}, fault.Invalid("option %s: route %s: want the destination as a prefix, as 10.9.0.0/16 or fd00:9::/64", key, shown(word))
	case to.Bits() == 0:
		return Route{}, fault.Invalid("option %s: route %s: a default route is made with --gateway or, if it is not the bridge, --aux-address DefaultGatewayIPv4=ADDRESS (DefaultGatewayIPv6)", key, shown(word))
	case to != to.Masked():
		return Route{}, fault.Invalid("option %s: route %s: the destination has bits set behind its length, want %s or %s",
			key, shown(word), to.Masked(), netip.PrefixFrom(to.Addr(), to.Addr().BitLen()))
	case to.Addr().IsLoopback(), to.Addr().IsUnspecified() && to.IsSingleIP(), to.Addr().Is6() && to.Addr().IsLinkLocalUnicast():
		return Route{}, fault.Invalid("option %s: route %s: the kernel routes %s itself, want another destination", key, shown(word), to)
	}
	route := Route{Destination: to}
	if len(fields) == 1 {
		return route, nil
	}
	hop, err := netip.ParseAddr(fields[2])
	if err != nil || hop.Zone() != "" || hop.Is4In6() {
		return Route{}, fault.Invalid("option %s: route %s: want the next hop as an address, as 10.1.0.254", key, shown(word))
	}
	if hop.Is4() != to.Addr().Is4() {
		return Route{}, fault.Invalid("option %s: route %s: want destination and next hop of one family", key, shown(word))
	}
	route.NextHop = hop
	return route, nil
}

// checkRoutes refuses what the kernel of a container would refuse, which would
// fail its start, and what changes nothing.
func (n Network) checkRoutes(key string, routes []Route) error {
	for _, r := range routes {
		if err := n.checkRoute(key, r); err != nil {
			return err
		}
	}
	return nil
}

// checkEndpointRoutes is checkRoutes for the routes of one endpoint, which it gets
// beside the network's. Its addresses are set.
func (n Network) checkEndpointRoutes(key string, ep Endpoint) error {
	if err := n.checkRoutes(key, ep.Routes); err != nil {
		return err
	}
	for _, r := range ep.Routes {
		own := ep.addressFor(r)
		switch {
		case slices.ContainsFunc(n.Routes, func(other Route) bool { return other.Destination == r.Destination }):
			return fault.Invalid("option %s: route to %s: the network has one to it, which all of its containers get", key, r.Destination)
		case !own.IsValid() || !r.NextHop.IsValid():
		case r.NextHop == own.Addr():
			return fault.Invalid("option %s: route to %s via %s: it is the container's own address", key, r.Destination, r.NextHop)
		case !own.Contains(r.NextHop):
			return fault.Invalid("option %s: route to %s via %s: want a next hop in the container's own subnet, %s", key, r.Destination, r.NextHop, own.Masked())
		}
	}
	return nil
}

// addressFor is the endpoint's address of the route's family.
func (ep Endpoint) addressFor(r Route) netip.Prefix {
	if r.Destination.Addr().Is6() {
		return ep.IPv6
	}
	return ep.IPv4
}

// RoutesOf are the way out where that is no gateway, the network's routes and then the endpoint's that the kernel of its
// container accepts: in families that it has an address of, and with next hops in
// its own subnet that are not itself. It is the router of the others, then.
func (n Network) RoutesOf(ep Endpoint) []Route {
	var routes []Route
	for _, r := range slices.Concat(n.wayOut(), n.Routes, ep.Routes) {
		own := ep.addressFor(r)
		if own.IsValid() && (!r.NextHop.IsValid() || own.Contains(r.NextHop) && own.Addr() != r.NextHop) {
			routes = append(routes, r)
		}
	}
	return routes
}

func (n Network) checkRoute(key string, r Route) error {
	is6 := r.Destination.Addr().Is6()
	if !slices.ContainsFunc(n.Subnets, func(s Subnet) bool { return s.Pool.Addr().Is6() == is6 }) {
		return fault.Invalid("option %s: route to %s: the network has no subnet of its family", key, r.Destination)
	}
	if slices.ContainsFunc(n.Subnets, func(s Subnet) bool { return s.Pool == r.Destination }) {
		return fault.Invalid("option %s: route to %s: it is a subnet of the network itself", key, r.Destination)
	}
	if !r.NextHop.IsValid() {
		return nil
	}
	subnet, ok := n.SubnetOf(r.NextHop)
	switch {
	case !ok || !ipam.IsHost(subnet.Pool, r.NextHop):
		return fault.Invalid("option %s: route to %s via %s: want the address of a host in a subnet of the network: it has %s",
			key, r.Destination, r.NextHop, subnetList(n))
	case r.NextHop == subnet.DefaultGateway():
		return fault.Invalid("option %s: route to %s via %s: it is the network's gateway, to which all goes that has no other route", key, r.Destination, r.NextHop)
	case r.Destination.Contains(r.NextHop) && r.Destination.Bits() >= subnet.Pool.Bits():
		return fault.Invalid("option %s: route to %s via %s: the next hop is its own destination", key, r.Destination, r.NextHop)
	}
	return nil
}
