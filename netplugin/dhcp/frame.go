package dhcp

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

const (
	ethernetHeader = 14
	ipHeader       = 20
	udpHeader      = 8

	serverPort = 67
	clientPort = 68
)

func broadcastMAC() net.HardwareAddr { return net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff} }

func broadcastIP() netip.Addr { return netip.AddrFrom4([4]byte{255, 255, 255, 255}) }

// A route is the way of a message: its Ethernet and IP addresses.
type route struct {
	fromMAC, toMAC net.HardwareAddr
	from, to       netip.Addr
}

// everybody is the route of a client that has no address to all servers.
func everybody(mac net.HardwareAddr) route {
	return route{fromMAC: mac, toMAC: broadcastMAC(), from: netip.IPv4Unspecified(), to: broadcastIP()}
}

// frame is a message to a server, ready for the wire.
func frame(m *dhcpv4.DHCPv4, r route) []byte {
	payload := m.ToBytes()
	length := udpHeader + len(payload)
	b := slices.Grow(slices.Concat(r.toMAC, r.fromMAC), 2+ipHeader+length)
	b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IP)

	ip := len(b)
	b = append(b, 0x45, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(ipHeader+length))
	b = append(b, 0, 0, 0x40, 0, 64, unix.IPPROTO_UDP, 0, 0) // never in fragments
	b = append(append(b, r.from.AsSlice()...), r.to.AsSlice()...)
	binary.BigEndian.PutUint16(b[ip+10:], ^sum(0, b[ip:ip+ipHeader]))

	udp := len(b)
	b = binary.BigEndian.AppendUint16(b, clientPort)
	b = binary.BigEndian.AppendUint16(b, serverPort)
	b = binary.BigEndian.AppendUint16(b, uint16(length))
	b = append(append(b, 0, 0), payload...)
	// The pseudo header: both addresses, the protocol and the length.
	pseudo := uint32(unix.IPPROTO_UDP + length)
	check := ^sum(pseudo+uint32(sum(0, b[ip+12:ip+ipHeader])), b[udp:])
	if check == 0 {
		check = 0xffff // 0 would be "none"
	}
	binary.BigEndian.PutUint16(b[udp+6:], check)
	return b
}

// sum is the ones' complement sum of RFC 1071.
func sum(start uint32, b []byte) uint16 {
	s := start
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// A reply is a server's message.
type reply struct {
	// from is the Ethernet address it came from, source the IP address.
	from   net.HardwareAddr
	source netip.Addr
	msg    *dhcpv4.DHCPv4
}

// server is the server's identifier, the zero Addr if the message has none.
func (r reply) server() netip.Addr {
	a, _ := toAddr(r.msg.ServerIdentifier())
	return a
}

// parse reads a frame; ok is false for all that is no whole message of a server. The
// UDP checksum is not looked at: that of a packet which never was on a wire is not
// filled in, and a wire has its own.
func parse(b []byte) (r reply, ok bool) {
	if len(b) < ethernetHeader+ipHeader+udpHeader || binary.BigEndian.Uint16(b[12:]) != unix.ETH_P_IP {
		return reply{}, false
	}
	r.from = slices.Clone(net.HardwareAddr(b[6:12]))
	ip := b[ethernetHeader:]
	header, total := int(ip[0]&0xf)*4, int(binary.BigEndian.Uint16(ip[2:]))
	fragment := binary.BigEndian.Uint16(ip[6:]) & 0x3fff
	if ip[0]>>4 != 4 || header < ipHeader || total > len(ip) || total < header+udpHeader || fragment != 0 || ip[9] != unix.IPPROTO_UDP {
		return reply{}, false
	}
	r.source = netip.AddrFrom4([4]byte(ip[12:16]))
	udp := ip[header:total]
	length := int(binary.BigEndian.Uint16(udp[4:]))
	if binary.BigEndian.Uint16(udp) != serverPort || binary.BigEndian.Uint16(udp[2:]) != clientPort || length < udpHeader || length > len(udp) {
		return reply{}, false
	}
	msg, err := dhcpv4.FromBytes(udp[udpHeader:length])
	if err != nil || msg.OpCode != dhcpv4.OpcodeBootReply {
		return reply{}, false
	}
	r.msg = msg
	return r, true
}

// program is the filter of the socket: UDP from port 67 to 68 that has come in
// without the tag of a VLAN. Tagged frames are those of other links above the same
// parent, unless the tag names VLAN 0 and is there for its priority. What this host
// sends itself is no answer.
func program() ([]unix.SockFilter, error) {
	const take = 0xffff
	code, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.PACKET_OUTGOING, SkipTrue: 14},
		bpf.LoadExtension{Num: bpf.ExtVLANTag},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0xfff, SkipTrue: 12},
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.ETH_P_IP, SkipTrue: 10},
		bpf.LoadAbsolute{Off: ethernetHeader + 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 8},
		bpf.LoadAbsolute{Off: ethernetHeader + 6, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x1fff, SkipTrue: 6},
		bpf.LoadMemShift{Off: ethernetHeader},
		bpf.LoadIndirect{Off: ethernetHeader, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: serverPort, SkipTrue: 3},
		bpf.LoadIndirect{Off: ethernetHeader + 2, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: clientPort, SkipTrue: 1},
		bpf.RetConstant{Val: take},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return nil, err
	}
	filter := make([]unix.SockFilter, len(code))
	for i, c := range code {
		filter[i] = unix.SockFilter{Code: c.Op, Jt: c.Jt, Jf: c.Jf, K: c.K}
	}
	return filter, nil
}
