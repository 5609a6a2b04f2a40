package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// SetAddrs gives a link of Berth exactly these addresses, each with its prefix
// length. Link-local IPv6 addresses are the kernel's and stay unless wanted.
// Addresses of a link that is not Berth's are never touched: fault.Conflict.
func (h *Handle) SetAddrs(name string, want []netip.Prefix) error {
	l, ok, err := h.Get(name)
	if err != nil {
		return err
	}
	if !ok {
		return fault.NotFound("link %q does not exist", name)
	}
	if !l.Owner.Ours {
		return fault.Conflict("addresses of link %q are not changed: it is not Berth's", name)
	}
	ref := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: l.Name, Index: l.Index}}
	have, err := h.addrs(ref)
	if err != nil {
		return err
	}
	removed := false
	for _, a := range have {
		p := prefixOf(a)
		if slices.Contains(want, p) || p.Addr().IsLinkLocalUnicast() && p.Addr().Is6() {
			continue
		}
		err := do(func() error { return h.nl.AddrDel(ref, &a) })
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s from link %q: %w", p, name, err)
		}
		removed = true
	}
	if removed {
		// With a primary address go all secondary ones of its subnet.
		if have, err = h.addrs(ref); err != nil {
			return err
		}
	}
	for _, p := range want {
		if slices.ContainsFunc(have, func(a netlink.Addr) bool { return prefixOf(a) == p }) {
			continue
		}
		if _, err := h.addAddr(ref, p); err != nil {
			return err
		}
	}
	return nil
}

// addAddr gives a link an address; added is false when it has it already.
func (h *Handle) addAddr(ref netlink.Link, p netip.Prefix) (added bool, err error) {
	addr := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		// The address is ours to give; looking for a duplicate would delay it by
		// a second, and for ever while the bridge has no port.
		addr.Flags = unix.IFA_F_NODAD
	}
	err = do(func() error { return h.nl.AddrAdd(ref, addr) })
	if errors.Is(err, unix.EEXIST) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("give address %s to link %q: %w", p, ref.Attrs().Name, err)
	}
	return true, nil
}

// Addrs returns the addresses of a link, without link-local IPv6 ones.
func (h *Handle) Addrs(name string) ([]netip.Prefix, error) {
	l, ok, err := h.Get(name)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fault.NotFound("link %q does not exist", name)
	}
	list, err := h.addrs(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: l.Index}})
	if err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, a := range list {
		if p := prefixOf(a); p.Addr().Is4() || !p.Addr().IsLinkLocalUnicast() {
			out = append(out, p)
		}
	}
	return out, nil
}

// AllAddrs returns the addresses of all links by the index of the link, without
// link-local IPv6 ones.
func (h *Handle) AllAddrs() (map[int][]netip.Prefix, error) {
	list, err := h.dumpAddrs(0)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	out := map[int][]netip.Prefix{}
	for _, a := range list {
		if p := prefixOf(a); p.Addr().Is4() || !p.Addr().IsLinkLocalUnicast() {
			out[a.LinkIndex] = append(out[a.LinkIndex], p)
		}
	}
	return out, nil
}

func (h *Handle) addrs(l netlink.Link) ([]netlink.Addr, error) {
	list, err := h.dumpAddrs(l.Attrs().Index)
	if err != nil {
		return nil, fmt.Errorf("list addresses of link %q: %w", l.Attrs().Name, err)
	}
	return list, nil
}

// dumpAddrs lists the addresses of one link, 0 for all. Unlike the library it has
// the kernel filter, so that the work does not grow with the links of the host;
// kernels before 4.20 ignore the filter, which is therefore applied again.
func (h *Handle) dumpAddrs(index int) ([]netlink.Addr, error) {
	return dump(func() ([]netlink.Addr, error) {
		req := h.request(unix.RTM_GETADDR, unix.NLM_F_DUMP)
		msg := nl.NewIfAddrmsg(unix.AF_UNSPEC)
		msg.Index = uint32(index)
		req.AddData(msg)
		replies, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWADDR)
		if err != nil {
			return nil, err
		}
		var out []netlink.Addr
		for _, m := range replies {
			addr, err := addrFromMessage(m)
			if err != nil {
				return nil, err
			}
			if addr.IPNet != nil && (index == 0 || addr.LinkIndex == index) {
				out = append(out, addr)
			}
		}
		return out, nil
	})
}

// addrFromMessage reads the address, its prefix length and its link.
func addrFromMessage(m []byte) (netlink.Addr, error) {
	msg := nl.DeserializeIfAddrmsg(m)
	attrs, err := nl.ParseRouteAttr(m[msg.Len():])
	if err != nil {
		return netlink.Addr{}, err
	}
	addr := netlink.Addr{LinkIndex: int(msg.Index)}
	for _, a := range attrs {
		// IFA_LOCAL is the link's own address, where IFA_ADDRESS is that of the peer.
		if a.Attr.Type == unix.IFA_LOCAL || a.Attr.Type == unix.IFA_ADDRESS && addr.IPNet == nil {
			addr.IPNet = &net.IPNet{IP: a.Value, Mask: net.CIDRMask(int(msg.Prefixlen), 8*len(a.Value))}
		}
	}
	return addr, nil
}

func prefixOf(a netlink.Addr) netip.Prefix {
	addr, _ := netip.AddrFromSlice(a.IP)
	bits, _ := a.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), bits)
}
