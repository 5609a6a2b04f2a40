package link

import (
	"fmt"
	"net"
	"net/netip"

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

func defaultRoute(family int) *net.IPNet {
	if family == netlink.FAMILY_V4 {
		return ipNet(netip.MustParsePrefix("0.0.0.0/0"))
	}
	return ipNet(netip.MustParsePrefix("::/0"))
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
