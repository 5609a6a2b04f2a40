package link

import (
	"errors"
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

// DefaultMTU is the MTU in bytes of the link by which the host reaches the world
// with IPv4, else with IPv6; 0 if it does not.
//
// The kernel is asked for one address instead of for all routes: that takes its
// rules into account, and does not grow with the number of networks. Nothing is
// sent there.
func (h *Handle) DefaultMTU() (int, error) {
	for _, far := range []string{"1.0.0.0", "2000::"} {
		routes, err := retry(func() ([]netlink.Route, error) { return h.nl.RouteGet(net.ParseIP(far)) })
		switch {
		case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EAFNOSUPPORT):
			continue // No way, or one that is closed on purpose.
		case err != nil:
			return 0, fmt.Errorf("look for the default route: %w", err)
		}
		for _, r := range routes {
			if l, ok, err := h.byIndex(r.LinkIndex); err != nil || ok {
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
