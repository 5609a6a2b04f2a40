package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Where the fields of a frame are, in bytes. IPv6 is followed by what its next header
// says: a message of ICMPv6, or an extension header that names the next one.
const (
	atSource     = 6
	atType       = 12
	atARP        = 14 // hardware, protocol
	atARPLengths = 18
	atARPMAC     = 22
	atARPAddr    = 28
	atIPv4Addr   = 26
	atNextHeader = 20
	atIPv6Addr   = 22
	atPayload    = 54
	atTarget     = 62 // of an advertisement
)

// Numbers of IPv6 headers and ICMPv6 messages.
const (
	hopByHop          = 0
	routingHeader     = 43
	icmpv6            = 58
	destOptions       = 60
	advertisementType = 136
)

// What a filter of traffic control answers.
const (
	goOn = 0xffffffff // TC_ACT_UNSPEC: to the next filter, or in
	drop = 2          // TC_ACT_SHOT
)

// anyOf goes on behind itself when the frame has one of the addresses at an offset,
// and drops it otherwise.
func anyOf(at uint32, addrs []netip.Addr) []bpf.Instruction {
	blocks := make([][]bpf.Instruction, len(addrs))
	rest := 1 // the drop
	for i := len(addrs) - 1; i >= 0; i-- {
		b := addrs[i].AsSlice()
		const perWord = 2 // instructions
		words := len(b) / 4
		var block []bpf.Instruction
		for w := range words {
			block = append(block,
				bpf.LoadAbsolute{Off: at + uint32(4*w), Size: 4},
				// The jump that ends the block is passed over as well.
				bpf.JumpIf{Cond: bpf.JumpEqual, Val: binary.BigEndian.Uint32(b[4*w:]), SkipFalse: uint8(perWord*(words-1-w) + 1)},
			)
		}
		blocks[i] = append(block, bpf.Jump{Skip: uint32(rest)})
		rest += len(blocks[i])
	}
	var out []bpf.Instruction
	for _, b := range blocks {
		out = append(out, b...)
	}
	return append(out, bpf.RetConstant{Val: drop})
}

// equal drops a frame that has something else at an offset.
func equal(at uint32, size int, want uint32) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: at, Size: size},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: want, SkipTrue: 1},
		bpf.RetConstant{Val: drop},
	}
}

// sender drops a frame that has another MAC address at an offset.
func sender(at uint32, mac net.HardwareAddr) []bpf.Instruction {
	return append(equal(at, 4, binary.BigEndian.Uint32(mac)), equal(at+4, 2, uint32(binary.BigEndian.Uint16(mac[4:])))...)
}

// when does the block, which must not fall out of its end, if A has this value.
func when(value uint32, block []bpf.Instruction) []bpf.Instruction {
	return append([]bpf.Instruction{bpf.JumpIf{Cond: bpf.JumpEqual, Val: value, SkipFalse: uint8(len(block))}}, block...)
}

// extension lets a frame in unless A is the number of an extension header.
func extension() []bpf.Instruction {
	return []bpf.Instruction{
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: hopByHop, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: routingHeader, SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: destOptions, SkipTrue: 1},
		bpf.RetConstant{Val: goOn},
	}
}

// linkLocal is the address that a link makes itself of its MAC address (RFC 4291,
// appendix A).
func linkLocal(mac net.HardwareAddr) netip.Addr {
	a := [16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]}
	return netip.AddrFrom16(a)
}

// guardProgram lets in what a container with this MAC address and these addresses may
// send, for classic BPF: IPv4, ARP and IPv6 without a VLAN tag. A frame that is too
// short for what is looked at is of no use to anybody, and passes.
//
// An advertisement (NDP) must be of one of its own addresses, and hide behind no
// extension header.
func guardProgram(mac net.HardwareAddr, addrs []netip.Addr) []bpf.Instruction {
	own4, own6 := []netip.Addr{}, []netip.Addr{linkLocal(mac)}
	for _, a := range addrs {
		if a.Is4() {
			own4 = append(own4, a)
		} else {
			own6 = append(own6, a)
		}
	}
	in := bpf.RetConstant{Val: goOn}
	join := slices.Concat[[]bpf.Instruction]
	one := func(i ...bpf.Instruction) []bpf.Instruction { return i }

	// One who asks whether an address is in use gives none of his own.
	arp := join(equal(atARP, 4, 1<<16|unix.ETH_P_IP), equal(atARPLengths, 2, 6<<8|4), sender(atARPMAC, mac),
		anyOf(atARPAddr, slices.Concat(own4, []netip.Addr{netip.IPv4Unspecified()})), one(in))
	ipv4 := join(anyOf(atIPv4Addr, own4), one(in))
	advertisement := join(one(bpf.LoadAbsolute{Off: atPayload, Size: 1}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: advertisementType, SkipTrue: 1}, in),
		anyOf(atTarget, own6), one(in))
	hidden := one(bpf.LoadIndirect{Off: atPayload, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: advertisementType, SkipTrue: 1}, in, bpf.RetConstant{Val: drop})
	ipv6 := join(anyOf(atIPv6Addr, slices.Concat(own6, []netip.Addr{netip.IPv6Unspecified()})),
		one(bpf.LoadAbsolute{Off: atNextHeader, Size: 1}),
		when(icmpv6, advertisement),
		extension(),
		// X is its length; behind it, there is a message at most.
		one(bpf.LoadAbsolute{Off: atPayload + 1, Size: 1}, bpf.ALUOpConstant{Op: bpf.ALUOpAdd, Val: 1},
			bpf.ALUOpConstant{Op: bpf.ALUOpShiftLeft, Val: 3}, bpf.TAX{}, bpf.LoadAbsolute{Off: atPayload, Size: 1}),
		when(icmpv6, hidden),
		extension(),
		one(bpf.RetConstant{Val: drop}),
	)
	return join(
		one(bpf.LoadExtension{Num: bpf.ExtVLANTagPresent}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1}, bpf.RetConstant{Val: drop}),
		sender(atSource, mac),
		one(bpf.LoadAbsolute{Off: atType, Size: 2}),
		when(unix.ETH_P_ARP, arp), when(unix.ETH_P_IP, ipv4), when(unix.ETH_P_IPV6, ipv6),
		one(bpf.RetConstant{Val: drop}),
	)
}

// Priorities of the filters of what a container sends.
const (
	guardPriority  = 1
	divertPriority = 2
)

// guard lets in by the host's end only what the container may send, if that is
// wanted. It takes the place of the guard that is there in one step.
func (h *Handle) guard(v Veth, host Link) error {
	if !v.Guarded {
		return nil
	}
	if len(v.MAC) != 6 {
		return fmt.Errorf("option spoof-check: link %q has no MAC address of its own", v.Host)
	}
	program, err := bpf.Assemble(guardProgram(v.MAC, v.Addrs))
	if err != nil {
		return fmt.Errorf("option spoof-check: %w", err)
	}
	err = do(func() error { return h.nl.QdiscAdd(ingress(host)) })
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return limitError("spoof-check", "sch_ingress", err)
	}
	var ops []byte
	for _, i := range program {
		ops = binary.NativeEndian.AppendUint16(ops, i.Op)
		ops = append(ops, i.Jt, i.Jf)
		ops = binary.NativeEndian.AppendUint32(ops, i.K)
	}
	req := h.request(unix.RTM_NEWTFILTER, unix.NLM_F_CREATE|unix.NLM_F_ACK)
	req.AddData(&nl.TcMsg{
		Family: nl.FAMILY_ALL, Ifindex: int32(host.Index), Handle: 1, Parent: netlink.HANDLE_MIN_INGRESS,
		Info: netlink.MakeHandle(guardPriority, nl.Swap16(unix.ETH_P_ALL)),
	})
	req.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("bpf")))
	options := nl.NewRtAttr(nl.TCA_OPTIONS, nil)
	options.AddRtAttr(nl.TCA_BPF_OPS_LEN, nl.Uint16Attr(uint16(len(program))))
	options.AddRtAttr(nl.TCA_BPF_OPS, ops)
	options.AddRtAttr(nl.TCA_BPF_FLAGS, nl.Uint32Attr(nl.TCA_BPF_FLAG_ACT_DIRECT))
	req.AddData(options)
	return limitError("spoof-check", "cls_bpf", h.execute(req))
}
