package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// An Announcement tells the neighbours of an endpoint which MAC address its
// addresses have from now on.
type Announcement struct {
	Bridge, EndpointID string
	MAC                net.HardwareAddr
	Addrs              []netip.Addr
	// First makes the host forget what it knew itself.
	First bool
}

// Announce sends each announcement once, to every port of its bridge that can
// speak with the endpoint. Bridges and endpoints that are gone are success.
//
// The endpoint itself gets nothing: kernels take an advertisement of an address of
// their own for a conflict. The frames need CAP_NET_RAW; without it the error is
// fs.ErrPermission.
func (h *Handle) Announce(list []Announcement) error {
	if len(list) == 0 {
		return nil
	}
	fd, err := h.packetSocket()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ports := map[string][]Link{}
	var errs []error
	for _, a := range list {
		if _, ok := ports[a.Bridge]; !ok {
			bridge, found, err := h.Get(a.Bridge)
			if err == nil && found {
				ports[a.Bridge], err = h.Ports(bridge)
			}
			if err != nil {
				errs = append(errs, err)
			}
		}
		errs = append(errs, h.announce(fd, a, ports[a.Bridge]))
	}
	return errors.Join(errs...)
}

// AnnounceBy sends an announcement of the addresses once, by one link.
func (h *Handle) AnnounceBy(name string, mac net.HardwareAddr, addrs []netip.Addr) error {
	l, ok, err := h.Get(name)
	if err != nil || !ok || len(mac) != 6 {
		return err
	}
	fd, err := h.packetSocket()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, addr := range addrs {
		if err := announceBy(fd, l, mac, addr); err != nil {
			return err
		}
	}
	return nil
}

// announceBy sends one frame. The link may go or be busy: it is only a hint.
func announceBy(fd int, l Link, mac net.HardwareAddr, addr netip.Addr) error {
	frame, to := gratuitousARP(mac, addr), broadcast()
	if addr.Is6() {
		frame, to = unsolicitedNA(mac, addr), allNodes()
	}
	sa := &unix.SockaddrLinklayer{Ifindex: l.Index, Halen: 6}
	copy(sa.Addr[:], to)
	err := do(func() error { return unix.Sendto(fd, frame, unix.MSG_DONTWAIT, sa) })
	for _, passing := range []error{unix.ENXIO, unix.ENETDOWN, unix.ENODEV, unix.ENOBUFS, unix.EAGAIN} {
		if errors.Is(err, passing) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("announce %s by link %q: %w", addr, l.Name, err)
	}
	return nil
}

// CheckAnnounce says whether Announce may send frames.
func (h *Handle) CheckAnnounce() error {
	fd, err := h.packetSocket()
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// packetSocket is a socket that sends frames and receives none.
func (h *Handle) packetSocket() (fd int, err error) {
	err = h.In(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("open a packet socket: %w", err)
	}
	return fd, nil
}

func (h *Handle) announce(fd int, a Announcement, ports []Link) error {
	owner := OfEndpoint(a.EndpointID)
	at := slices.IndexFunc(ports, func(l Link) bool { return l.Owner == owner })
	if at < 0 || len(a.MAC) != 6 {
		return nil
	}
	own := ports[at]
	for _, addr := range a.Addrs {
		if a.First {
			h.forget(own.Master, addr)
		}
		for _, port := range ports {
			if port.Index == own.Index || !port.Carrier || port.Port.Isolated && own.Port.Isolated {
				continue
			}
			if err := announceBy(fd, port, a.MAC, addr); err != nil {
				return err
			}
		}
	}
	return nil
}

// forget removes the host's own entry for a neighbour. It asks again when it has a
// packet for it.
func (h *Handle) forget(bridge int, addr netip.Addr) {
	family := netlink.FAMILY_V4
	if addr.Is6() {
		family = netlink.FAMILY_V6
	}
	// Mostly there is none, and a stale one is found out by the kernel in time.
	_ = do(func() error {
		return h.nl.NeighDel(&netlink.Neigh{LinkIndex: bridge, Family: family, IP: addr.AsSlice()})
	})
}

func broadcast() net.HardwareAddr { return net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff} }

// allNodes is the MAC address of ff02::1.
func allNodes() net.HardwareAddr { return net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1} }

func ethernet(to, from net.HardwareAddr, protocol uint16) []byte {
	return binary.BigEndian.AppendUint16(slices.Concat(to, from), protocol)
}

// gratuitousARP is an ARP Announcement as in RFC 5227: a request for the sender's
// own address.
func gratuitousARP(mac net.HardwareAddr, addr netip.Addr) []byte {
	const request = 1
	b := ethernet(broadcast(), mac, unix.ETH_P_ARP)
	b = append(b, 0, 1, 8, 0, 6, 4, 0, request) // Ethernet, IPv4, lengths of their addresses
	b = append(append(b, mac...), addr.AsSlice()...)
	return append(append(b, make([]byte, 6)...), addr.AsSlice()...)
}

// unsolicitedNA is a Neighbor Advertisement to all nodes (RFC 4861, 7.2.6) that
// overrides what they know.
func unsolicitedNA(mac net.HardwareAddr, addr netip.Addr) []byte {
	const (
		advertisement = 136
		override      = 0x20
		targetLink    = 2
		length        = 32
	)
	to := netip.MustParseAddr("ff02::1")
	icmp := append([]byte{advertisement, 0, 0, 0, override, 0, 0, 0}, addr.AsSlice()...)
	icmp = append(append(icmp, targetLink, 1), mac...)
	pseudo := slices.Concat(addr.AsSlice(), to.AsSlice(), []byte{0, 0, 0, length, 0, 0, 0, unix.IPPROTO_ICMPV6}, icmp)
	binary.BigEndian.PutUint16(icmp[2:], checksum(pseudo))

	b := ethernet(allNodes(), mac, unix.ETH_P_IPV6)
	b = append(b, 0x60, 0, 0, 0, 0, length, unix.IPPROTO_ICMPV6, 255)
	return slices.Concat(b, addr.AsSlice(), to.AsSlice(), icmp)
}

// checksum is that of RFC 1071 over an even number of bytes.
func checksum(b []byte) uint16 {
	sum := uint32(0)
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
