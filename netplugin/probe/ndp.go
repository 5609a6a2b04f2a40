package probe

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	ipv6Len    = 40
	hopLimit   = 255
	icmpType   = ethernetLen + ipv6Len
	neighbour  = 24 // bytes of a solicitation or advertisement before its options
	solicit    = 135
	advertise  = 136
	sourceLink = 1
	targetLink = 2
	nonceType  = 14
)

// solicitedNode is the group of all nodes that may have the address (RFC 4291,
// 2.7.1).
func solicitedNode(addr netip.Addr) netip.Addr {
	a := addr.As16()
	return netip.AddrFrom16([16]byte{0: 0xff, 1: 0x02, 11: 1, 12: 0xff, 13: a[13], 14: a[14], 15: a[15]})
}

// allNodes is the group that an answer to somebody without address is sent to.
var allNodes = netip.AddrFrom16([16]byte{0: 0xff, 1: 0x02, 15: 1})

// groupMAC is the MAC address of an IPv6 multicast group (RFC 2464, 7).
func groupMAC(group netip.Addr) mac {
	a := group.As16()
	return mac{0x33, 0x33, a[12], a[13], a[14], a[15]}
}

// parseNDP reads a Neighbor Solicitation or Advertisement. As RFC 4861, 7.1 says,
// it must come from this link (hop limit 255) and its options must fit. Checksums
// are not looked at: those of frames that the host itself sends may not be filled in
// yet. Extension headers are not part of what hosts send (RFC 6980).
func parseNDP(from mac, b []byte) (c claim, ok bool) {
	if len(b) < ipv6Len+neighbour || b[0]>>4 != 6 || b[6] != unix.IPPROTO_ICMPV6 || b[7] != hopLimit {
		return claim{}, false
	}
	length := int(binary.BigEndian.Uint16(b[4:]))
	if length < neighbour || length > len(b)-ipv6Len {
		return claim{}, false
	}
	source, icmp := netip.AddrFrom16([16]byte(b[8:])), b[ipv6Len:ipv6Len+length]
	target := netip.AddrFrom16([16]byte(icmp[8:]))
	c = claim{addr: target, mac: from}
	var at byte
	switch {
	case icmp[1] != 0 || target.IsMulticast():
		return claim{}, false
	case icmp[0] == advertise:
		at = targetLink
	case icmp[0] == solicit && source.IsUnspecified():
		c.probing = true
	case icmp[0] == solicit:
		c.addr, at = source, sourceLink
	default:
		return claim{}, false
	}
	for options := icmp[neighbour:]; len(options) > 0; {
		if len(options) < 8 {
			return claim{}, false
		}
		size := 8 * int(options[1])
		if size == 0 || size > len(options) {
			return claim{}, false
		}
		switch {
		case at != 0 && options[0] == at:
			c.mac = mac(options[2:8])
		case c.probing && options[0] == nonceType:
			c.nonce = nonce(options[2:8])
		}
		options = options[size:]
	}
	return c, c.mac.single() && !c.addr.IsUnspecified() && !c.addr.IsMulticast() && !c.addr.Is4In6()
}

// solicitation asks for an address as duplicate address detection does (RFC 4862,
// 5.4.2).
func solicitation(from mac, addr netip.Addr, n nonce) []byte {
	const length = neighbour + 8
	to := solicitedNode(addr)
	b := make([]byte, 0, icmpType+length)
	b = header(b, groupMAC(to), from, unix.ETH_P_IPV6)
	b = append(b, 0x60, 0, 0, 0, 0, length, unix.IPPROTO_ICMPV6, hopLimit)
	b = append(append(b, make([]byte, 16)...), to.AsSlice()...)
	b = append(append(b, solicit, 0, 0, 0, 0, 0, 0, 0), addr.AsSlice()...)
	b = append(append(b, nonceType, 1), n[:]...)
	binary.BigEndian.PutUint16(b[icmpType+2:], checksum(b[ethernetLen:]))
	return b
}

// checksum is that of the ICMPv6 message in an IPv6 packet whose own is zero.
func checksum(packet []byte) uint16 {
	sum := uint32(len(packet)-ipv6Len) + unix.IPPROTO_ICMPV6
	for b := packet[8:]; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
