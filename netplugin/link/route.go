package link

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Route is a destination that the host already knows a way to.
type Route struct {
	// Dst is masked; of length 0 for a default route.
	Dst netip.Prefix
	// Link is the index of the link the route leaves by, 0 for blackholes and
	// routes with several ways.
	Link int
	// OnLink routes have no next hop: the addresses are on the link itself.
	OnLink bool
}

// Routes lists the routes of all tables but the kernel's own (local), without
// multicast ones.
func (h *Handle) Routes() ([]Route, error) {
	list, err := dump(func() ([]netlink.Route, error) {
		var all []netlink.Route
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return nil, err
			}
			for _, r := range routes {
				if r.Dst == nil {
					r.Dst = defaultRoute(family)
				}
				all = append(all, r)
			}
		}
		return all, nil
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []Route
	for _, r := range list {
		if r.Table == unix.RT_TABLE_LOCAL || r.Type == unix.RTN_MULTICAST || r.Type == unix.RTN_BROADCAST {
			continue
		}
		addr, ok := netip.AddrFromSlice(r.Dst.IP)
		if !ok {
			continue
		}
		bits, size := r.Dst.Mask.Size()
		if size == 32 {
			addr = addr.Unmap()
		}
		out = append(out, Route{
			Dst:    netip.PrefixFrom(addr, bits).Masked(),
			Link:   r.LinkIndex,
			OnLink: r.LinkIndex != 0 && r.Gw == nil && r.Via == nil,
		})
	}
	return out, nil
}

// DefaultMTU is the MTU in bytes of the link by which the host reaches the world:
// that of the best default route of IPv4, else of IPv6; 0 if there is none.
func (h *Handle) DefaultMTU() (int, error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			filter := &netlink.Route{Table: unix.RT_TABLE_MAIN, Dst: defaultRoute(family), Type: unix.RTN_UNICAST}
			return h.nl.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST|netlink.RT_FILTER_TYPE)
		})
		if err != nil {
			return 0, fmt.Errorf("list default routes: %w", err)
		}
		slices.SortStableFunc(routes, func(a, b netlink.Route) int { return cmp.Compare(a.Priority, b.Priority) })
		for _, r := range routes {
			index := r.LinkIndex
			if index == 0 && len(r.MultiPath) > 0 {
				index = r.MultiPath[0].LinkIndex
			}
			if index == 0 {
				continue
			}
			if l, ok, err := h.byIndex(index); err != nil || ok {
				return l.MTU, err
			}
		}
	}
	return 0, nil
}

func defaultRoute(family int) *net.IPNet {
	if family == netlink.FAMILY_V4 {
		return ipNet(netip.MustParsePrefix("0.0.0.0/0"))
	}
	return ipNet(netip.MustParsePrefix("::/0"))
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
