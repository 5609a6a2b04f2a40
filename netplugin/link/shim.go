package link

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Shim is the host's own link beside those of the containers on a parent, by which
// they reach each other: the kernel carries no frames between a macvlan or ipvlan
// link and its parent.
//
// It is made so that the rest of the LAN does not see it. The host keeps its address
// on the parent. The shim has none, only one route for each container, with the
// host's address as the source. It answers ARP for all addresses of the host, but only
// to those that it has a route to (arp_filter). For IPv6, which has no such filter,
// it is a proxy for the host's addresses (NDP, RFC 4861 section 7.2.8): the answers
// of a proxy do not override the host's own, which a neighbour has before.
type Shim struct {
	// Child is the link itself. Its owner is that of the parent, and it is up.
	Child
	// IPv6 allows IPv6 on it.
	IPv6 bool
	// Addrs are addresses that the host has there and nowhere else.
	Addrs []netip.Prefix
	// Proxied are the IPv6 addresses of the host that it answers for, sorted.
	Proxied []netip.Addr
}

// EnsureShim makes the link or repairs it, but not its routes, which are those of
// AddHostRoute; errors as EnsureChild.
func (h *Handle) EnsureShim(s Shim) (created bool, err error) {
	created, err = h.EnsureChild(s.Child)
	if err != nil {
		return created, err
	}
	if err := h.shimSysctls(s); err != nil {
		return created, err
	}
	l, ok, err := h.Get(s.Name)
	if err == nil && !ok {
		err = fmt.Errorf("link %q is gone again", s.Name)
	}
	if err != nil {
		return created, err
	}
	if err := h.SetAddrs(s.Name, s.Addrs); err != nil {
		return created, err
	}
	if s.IPv6 {
		if err := h.setProxied(l, s.Proxied); err != nil {
			return created, err
		}
	}
	if l.Up {
		return created, nil
	}
	if err := h.change(l.Index, change{up: true}); err != nil && !errors.Is(err, unix.ENETDOWN) {
		return created, fmt.Errorf("bring up link %q: %w", s.Name, err)
	}
	return created, nil
}

// shimSysctls keeps the shim from doing more than it is for.
func (h *Handle) shimSysctls(s Shim) error {
	settings := []struct{ key, value string }{
		{"ipv4/conf/%s/arp_filter", "1"},
		{"ipv4/conf/%s/rp_filter", "1"}, // broadcasts of the LAN come by the parent too
		{"ipv4/conf/%s/send_redirects", "0"},
	}
	if s.IPv6 {
		settings = append(settings, []struct{ key, value string }{
			{"ipv6/conf/%s/accept_ra", "0"},
			{"ipv6/conf/%s/accept_dad", "0"},
			// A proxy answers only on a link that forwards; whether the host does is
			// said by conf/all.
			{"ipv6/conf/%s/forwarding", "1"},
			{"ipv6/conf/%s/proxy_ndp", "1"},
			{"ipv6/neigh/%s/proxy_delay", "0"},
			{"ipv6/conf/%s/disable_ipv6", "0"},
		}...)
	}
	for _, set := range settings {
		err := h.SetSysctl(fmt.Sprintf(set.key, s.Name), set.value)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("access to the host by %q: the kernel has no IPv6, or not this setting: %w", s.Name, err)
		}
		if err != nil {
			return err
		}
	}
	if s.IPv6 {
		return nil
	}
	return h.disableIPv6(s.Name)
}

// Proxied returns the IPv6 addresses that a link is a proxy for, sorted.
func (h *Handle) Proxied(l Link) ([]netip.Addr, error) {
	entries, err := dump(func() ([]netlink.Neigh, error) { return h.nl.NeighProxyList(l.Index, unix.AF_INET6) })
	if err != nil {
		return nil, fmt.Errorf("list proxied addresses of link %q: %w", l.Name, err)
	}
	var out []netip.Addr
	for _, e := range entries {
		if addr, ok := netip.AddrFromSlice(e.IP); ok && e.LinkIndex == l.Index {
			out = append(out, addr)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out, nil
}

func (h *Handle) setProxied(l Link, want []netip.Addr) error {
	have, err := h.Proxied(l)
	if err != nil {
		return err
	}
	entry := func(addr netip.Addr) *netlink.Neigh {
		return &netlink.Neigh{LinkIndex: l.Index, Family: unix.AF_INET6, Flags: netlink.NTF_PROXY, IP: addr.AsSlice()}
	}
	for _, addr := range have {
		if slices.Contains(want, addr) {
			continue
		}
		if err := do(func() error { return h.nl.NeighDel(entry(addr)) }); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("link %q answers for address %s no more: %w", l.Name, addr, err)
		}
	}
	for _, addr := range want {
		if slices.Contains(have, addr) {
			continue
		}
		if err := do(func() error { return h.nl.NeighSet(entry(addr)) }); err != nil {
			return fmt.Errorf("link %q answers for address %s: %w", l.Name, addr, err)
		}
	}
	return nil
}

// A HostRoute leads from the host to one address on a shim.
type HostRoute struct {
	To netip.Addr
	// From is the source of what the host sends there, the zero Addr leaves it to the
	// kernel.
	From netip.Addr
}

// hostRouteProtocol marks Berth's routes among those of routing daemons ("berth" has
// no number; this one is in the range for the administrator's use).
const hostRouteProtocol = 184

func (r HostRoute) netlink(index int) *netlink.Route {
	route := &netlink.Route{
		LinkIndex: index, Dst: ipNet(netip.PrefixFrom(r.To, r.To.BitLen())), Protocol: hostRouteProtocol, Scope: netlink.SCOPE_LINK,
	}
	if r.To.Is6() {
		route.Scope = netlink.SCOPE_UNIVERSE
	}
	if r.From.IsValid() {
		route.Src = net.IP(r.From.AsSlice())
	}
	return route
}

// SetHostRoute adds the route to a shim, in the place of one that Berth has added to
// the same address before. changed is false when it was there.
func (h *Handle) SetHostRoute(shim string, r HostRoute) (changed bool, err error) {
	l, ok, err := h.Get(shim)
	if err != nil {
		return false, err
	}
	if !ok {
		return false, fmt.Errorf("link %q does not exist", shim)
	}
	have, err := h.HostRoutes(l)
	if err != nil || slices.Contains(have, r) {
		return false, err
	}
	if err := do(func() error { return h.nl.RouteReplace(r.netlink(l.Index)) }); err != nil {
		return false, fmt.Errorf("route to %s by link %q: %w", r.To, shim, err)
	}
	return true, nil
}

// DeleteHostRoute removes the route to an address from a shim; one that is not there
// is success.
func (h *Handle) DeleteHostRoute(shim string, to netip.Addr) error {
	l, ok, err := h.Get(shim)
	if err != nil || !ok {
		return err
	}
	err = do(func() error { return h.nl.RouteDel(HostRoute{To: to}.netlink(l.Index)) })
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove route to %s from link %q: %w", to, shim, err)
	}
	return nil
}

// HostRoutes lists the routes that SetHostRoute has added to a shim.
func (h *Handle) HostRoutes(l Link) ([]HostRoute, error) {
	list, err := dump(func() ([]netlink.Route, error) {
		var all []netlink.Route
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := h.nl.RouteListFiltered(family, &netlink.Route{LinkIndex: l.Index, Protocol: hostRouteProtocol}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
			if err != nil {
				return nil, err
			}
			all = append(all, routes...)
		}
		return all, nil
	})
	if err != nil {
		return nil, fmt.Errorf("list routes of link %q: %w", l.Name, err)
	}
	var out []HostRoute
	for _, r := range list {
		if r.Dst == nil {
			continue
		}
		to, ok := netip.AddrFromSlice(r.Dst.IP)
		if !ok {
			continue
		}
		route := HostRoute{To: to}
		if len(r.Dst.Mask) == 4 {
			route.To = to.Unmap()
		}
		if from, ok := netip.AddrFromSlice(r.Src); ok {
			route.From = from.Unmap()
		}
		out = append(out, route)
	}
	return out, nil
}
