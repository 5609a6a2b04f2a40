package probe

import (
	"encoding/binary"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// A mac is a MAC address that can be compared.
type mac [6]byte

func (m mac) hardware() net.HardwareAddr { return net.HardwareAddr(m[:]) }

// single says that the address can be that of one host.
func (m mac) single() bool { return m != mac{} && m[0]&1 == 0 }

// A nonce is that of RFC 7527.
type nonce [6]byte

// A claim is what a frame says about one address.
type claim struct {
	addr netip.Addr
	mac  mac
	// probing: the sender wants to know whether anybody has the address. Otherwise it
	// says that it has it.
	probing bool
	// nonce is that of a solicitation, zero if it has none.
	nonce nonce
}

const (
	ethernetLen = 14
	arpLen      = 28
	arpRequest  = 1
	arpReply    = 2
)

var broadcast = mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// parse reads an Ethernet frame without VLAN tag; ok is false when it is not one
// that claims an address, or is malformed.
func parse(frame []byte) (c claim, ok bool) {
	if len(frame) < ethernetLen {
		return claim{}, false
	}
	from, data := mac(frame[6:12]), frame[ethernetLen:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_ARP:
		return parseARP(data)
	case unix.ETH_P_IPV6:
		return parseNDP(from, data)
	default:
		return claim{}, false
	}
}

// parseARP reads a request or reply of IPv4 over Ethernet. The sender in the
// message counts, not the one of the frame: neighbours believe that one, too.
func parseARP(b []byte) (c claim, ok bool) {
	if len(b) < arpLen || [6]byte(b) != [6]byte{0, 1, 8, 0, 6, 4} {
		return claim{}, false
	}
	op := binary.BigEndian.Uint16(b[6:])
	sender, target := netip.AddrFrom4([4]byte(b[14:])), netip.AddrFrom4([4]byte(b[24:]))
	c = claim{addr: sender, mac: mac(b[8:14])}
	if sender.IsUnspecified() && op == arpRequest {
		c.addr, c.probing = target, true
	}
	ok = (op == arpRequest || op == arpReply) && c.mac.single() && !c.addr.IsUnspecified() && !c.addr.IsMulticast() &&
		c.addr != netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return c, ok
}

// arpProbe is a request for the address that names no sender address (RFC 5227,
// 2.1.1).
func arpProbe(from mac, addr netip.Addr) []byte {
	b := make([]byte, 0, ethernetLen+arpLen)
	b = header(b, broadcast, from, unix.ETH_P_ARP)
	b = append(b, 0, 1, 8, 0, 6, 4, 0, arpRequest) // Ethernet, IPv4, lengths of their addresses
	b = append(append(b, from[:]...), 0, 0, 0, 0)
	return append(append(b, 0, 0, 0, 0, 0, 0), addr.AsSlice()...)
}

func header(b []byte, to, from mac, protocol uint16) []byte {
	return binary.BigEndian.AppendUint16(append(append(b, to[:]...), from[:]...), protocol)
}

// probeFor is the frame that asks for an address, and where it goes.
func probeFor(from mac, addr netip.Addr, n nonce) (frame []byte, to mac, protocol uint16) {
	if addr.Is4() {
		return arpProbe(from, addr), broadcast, unix.ETH_P_ARP
	}
	return solicitation(from, addr, n), groupMAC(solicitedNode(addr)), unix.ETH_P_IPV6
}
