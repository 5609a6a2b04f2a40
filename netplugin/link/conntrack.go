package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Flows says which flows ForgetFlows is about: those that fit any of the two.
type Flows struct {
	// Answered are flows whose answers come from one of these addresses: those to a
	// container, however it was reached. For a container that has gone.
	Answered []netip.Addr
	// Forwarded are flows to these ports of the host that do not lead to where they
	// should, because they are older than the port's rule. For a port that is
	// published.
	Forwarded []Forward
}

// A Forward is Count ports of the host in a row that lead to a container.
type Forward struct {
	// Proto is the IP protocol number, UDP or SCTP.
	Proto uint8
	// Host is an address of the host; an unspecified one is all of its family.
	Host     netip.Addr
	HostPort uint16
	// HostPort+i leads to Port+i of Container for each i below Count.
	Container netip.Addr
	Port      uint16
	Count     uint16
}

// ForgetFlows makes the kernel's connection tracking forget UDP and SCTP flows, so
// that the next packet of each is sent where the rules say now. It returns how many
// there were. The table is read once for each family and protocol that is asked
// for, which takes the time of looking at every flow of that protocol, whatever the
// number of ports. TCP needs none of this: a new connection is a new flow.
//
// A Forward from one family to the other, which the rules have no part in, is
// ignored.
func (h *Handle) ForgetFlows(which Flows) (int, error) {
	m, err := h.newFlowMatcher(which)
	if err != nil || m.empty() {
		return 0, err
	}
	ns := netns.None()
	if h.ns != nil {
		ns = netns.NsHandle(h.ns.Fd())
	}
	socket, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_NETFILTER)
	if err != nil {
		return 0, fmt.Errorf("open a netlink socket: %w", err)
	}
	t := &conntrack{sockets: map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: socket}}}
	defer socket.Close()
	forgotten := 0
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		for _, proto := range []uint8{unix.IPPROTO_UDP, unix.IPPROTO_SCTP} {
			if !m.concerns(family, proto) {
				continue
			}
			n, err := t.forget(family, proto, m)
			forgotten += n
			if err != nil {
				return forgotten, err
			}
		}
	}
	return forgotten, nil
}

// A flow is an entry of the table: the first packet and the answer.
type flow struct {
	proto       uint8
	orig, reply tuple
}

type tuple struct{ src, dst netip.AddrPort }

// A flowMatcher picks the flows to forget.
type flowMatcher struct {
	answered  map[netip.Addr]bool
	forwarded map[hostPort][]forward
	// local are the addresses of the host, read only where they matter.
	local map[netip.Addr]bool
}

type hostPort struct {
	proto uint8
	port  uint16
}

type forward struct {
	host netip.Addr
	to   netip.AddrPort
}

func (h *Handle) newFlowMatcher(which Flows) (*flowMatcher, error) {
	m := &flowMatcher{answered: map[netip.Addr]bool{}, forwarded: map[hostPort][]forward{}}
	for _, a := range which.Answered {
		if a.IsValid() {
			m.answered[a] = true
		}
	}
	all := false
	for _, f := range which.Forwarded {
		if !f.Host.IsValid() || f.Host.Is4() != f.Container.Is4() {
			continue
		}
		all = all || f.Host.IsUnspecified()
		for i := range f.Count {
			at := hostPort{f.Proto, f.HostPort + i}
			m.forwarded[at] = append(m.forwarded[at], forward{f.Host, netip.AddrPortFrom(f.Container, f.Port+i)})
		}
	}
	if !all {
		return m, nil
	}
	list, err := dump(func() ([]netlink.Addr, error) { return h.nl.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	m.local = map[netip.Addr]bool{}
	for _, a := range list {
		m.local[prefixOf(a).Addr()] = true
	}
	return m, nil
}

func (m *flowMatcher) empty() bool { return len(m.answered)+len(m.forwarded) == 0 }

// concerns reports whether flows of the kind can match.
func (m *flowMatcher) concerns(family, proto uint8) bool {
	is4 := family == unix.AF_INET
	for a := range m.answered {
		if a.Is4() == is4 {
			return true
		}
	}
	for at, list := range m.forwarded {
		if at.proto == proto && slices.ContainsFunc(list, func(f forward) bool { return f.host.Is4() == is4 }) {
			return true
		}
	}
	return false
}

func (m *flowMatcher) matches(f flow) bool {
	if m.answered[f.reply.src.Addr()] {
		return true
	}
	dst := f.orig.dst
	for _, fwd := range m.forwarded[hostPort{f.proto, dst.Port()}] {
		if fwd.host.Is4() != dst.Addr().Is4() || fwd.to == f.reply.src {
			continue
		}
		if fwd.host == dst.Addr() {
			return true
		}
		// Flows to the same port of other hosts are none of ours, and no rule
		// catches [::1].
		local := m.local[dst.Addr()] || dst.Addr().Is4() && dst.Addr().IsLoopback()
		if fwd.host.IsUnspecified() && local && dst.Addr() != netip.IPv6Loopback() {
			return true
		}
	}
	return false
}

// A conntrack speaks to the kernel's connection tracking.
type conntrack struct {
	sockets map[int]*nl.SocketHandle
}

// Attributes of linux/netfilter/nfnetlink_conntrack.h that the netlink library has
// no names for.
const (
	ctaFilter          = 25
	ctaFilterOrigFlags = 1
	// ctaFilterProtoNum makes the kernel compare the protocol only.
	ctaFilterProtoNum = 1 << 3
)

func (t *conntrack) request(op, flags int, family uint8) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|op, flags)
	req.Sockets = t.sockets
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return req
}

// forget removes the flows of one family and protocol that match.
func (t *conntrack) forget(family, proto uint8, m *flowMatcher) (int, error) {
	found, err := dump(func() ([][]byte, error) {
		req := t.request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, family)
		// Kernels before 5.8 do not know the filter and send all flows.
		tuple := nl.NewRtAttr(nl.CTA_TUPLE_ORIG|unix.NLA_F_NESTED, nil)
		tuple.AddRtAttr(nl.CTA_TUPLE_PROTO|unix.NLA_F_NESTED, nil).AddRtAttr(nl.CTA_PROTO_NUM, []byte{proto})
		filter := nl.NewRtAttr(ctaFilter|unix.NLA_F_NESTED, nil)
		filter.AddRtAttr(ctaFilterOrigFlags, nl.Uint32Attr(ctaFilterProtoNum))
		req.AddData(tuple)
		req.AddData(filter)
		var found [][]byte
		err := req.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(msg []byte) bool {
			if f, ok := parseFlow(msg); ok && f.proto == proto && m.matches(f) {
				found = append(found, slices.Clone(msg[nl.SizeofNfgenmsg:]))
			}
			return true
		})
		return found, err
	})
	if err != nil {
		return 0, fmt.Errorf("list tracked flows: %w", err)
	}
	forgotten := 0
	for _, attrs := range found {
		// The message has the flow's ID: a new flow of the same addresses is safe.
		req := t.request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, family)
		req.AddRawData(attrs)
		_, err := retry(func() ([][]byte, error) { return req.Execute(unix.NETLINK_NETFILTER, 0) })
		if errors.Is(err, unix.ENOENT) {
			continue // it has ended by itself
		}
		if err != nil {
			return forgotten, fmt.Errorf("forget a tracked flow: %w", err)
		}
		forgotten++
	}
	return forgotten, nil
}

// parseFlow reads an entry, without the netlink header.
func parseFlow(msg []byte) (flow, bool) {
	if len(msg) < nl.SizeofNfgenmsg {
		return flow{}, false
	}
	var (
		f           flow
		orig, reply bool
	)
	attributes(msg[nl.SizeofNfgenmsg:], func(kind uint16, value []byte) {
		switch kind {
		case nl.CTA_TUPLE_ORIG:
			f.orig, f.proto, orig = parseTuple(value)
		case nl.CTA_TUPLE_REPLY:
			f.reply, _, reply = parseTuple(value)
		}
	})
	return f, orig && reply
}

func parseTuple(b []byte) (t tuple, proto uint8, ok bool) {
	var (
		src, dst         netip.Addr
		srcPort, dstPort uint16
	)
	attributes(b, func(kind uint16, value []byte) {
		switch kind {
		case nl.CTA_TUPLE_IP:
			attributes(value, func(kind uint16, value []byte) {
				switch kind {
				case nl.CTA_IP_V4_SRC, nl.CTA_IP_V6_SRC:
					src, _ = netip.AddrFromSlice(value)
				case nl.CTA_IP_V4_DST, nl.CTA_IP_V6_DST:
					dst, _ = netip.AddrFromSlice(value)
				}
			})
		case nl.CTA_TUPLE_PROTO:
			attributes(value, func(kind uint16, value []byte) {
				switch {
				case kind == nl.CTA_PROTO_NUM && len(value) == 1:
					proto = value[0]
				case kind == nl.CTA_PROTO_SRC_PORT && len(value) == 2:
					srcPort = binary.BigEndian.Uint16(value)
				case kind == nl.CTA_PROTO_DST_PORT && len(value) == 2:
					dstPort = binary.BigEndian.Uint16(value)
				}
			})
		}
	})
	return tuple{netip.AddrPortFrom(src, srcPort), netip.AddrPortFrom(dst, dstPort)}, proto, src.IsValid() && dst.IsValid()
}

// attributes calls fn for each netlink attribute.
func attributes(b []byte, fn func(kind uint16, value []byte)) {
	for len(b) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			return
		}
		fn(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:size])
		b = b[min((size+3)&^3, len(b)):]
	}
}
