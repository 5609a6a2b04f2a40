package firewall

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Registers, as the kernel names them when it lists rules: those of 16 bytes where
// one begins, and those of 4 bytes in between.
const (
	reg1   = unix.NFT_REG_1
	reg1at = unix.NFT_REG32_00 // + n is the n-th register of 4 bytes
	reg2   = unix.NFT_REG_2
)

// join makes one rule of several matches and a statement.
func join(parts ...rule) rule {
	var out rule
	for _, p := range parts {
		if out.text != "" {
			out.text += " "
		}
		out.text += p.text
		out.exprs = append(out.exprs, p.exprs...)
	}
	return out
}

func verdict(text string, kind expr.VerdictKind, chain string) rule {
	return rule{text, []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}}
}

func accept() rule         { return verdict("accept", expr.VerdictAccept, "") }
func drop() rule           { return verdict("drop", expr.VerdictDrop, "") }
func to(chain string) rule { return verdict("goto "+chain, expr.VerdictGoto, chain) }

func iif(set setName) rule    { return linkIn("iifname", expr.MetaKeyIIFNAME, set, false) }
func notIif(set setName) rule { return linkIn("iifname", expr.MetaKeyIIFNAME, set, true) }
func oif(set setName) rule    { return linkIn("oifname", expr.MetaKeyOIFNAME, set, false) }
func notOif(set setName) rule { return linkIn("oifname", expr.MetaKeyOIFNAME, set, true) }

// linkIn matches the name of the incoming or outgoing link against a set.
func linkIn(text string, key expr.MetaKey, set setName, invert bool) rule {
	op := " "
	if invert {
		op = " != "
	}
	return rule{text + op + "@" + string(set), []expr.Any{
		&expr.Meta{Key: key, Register: reg1},
		&expr.Lookup{SourceRegister: reg1, SetName: string(set), Invert: invert},
	}}
}

// linkPair matches the incoming and the outgoing link.
func linkPair(set setName) rule {
	return rule{"iifname . oifname @" + string(set), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1},
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg2},
		&expr.Lookup{SourceRegister: reg1, SetName: string(set)},
	}}
}

func notLoopback() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: linkName("lo")},
	}
}

// answer matches what belongs to a connection that has been accepted before, with
// the errors that it causes.
func answer() rule {
	return rule{"ct state established,related", []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: reg1},
		bits(^uint32(0)&(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), 0),
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: native(0)},
	}}
}

// ctStatusDNAT is IPS_DST_NAT of the kernel.
const ctStatusDNAT = 1 << 5

// translated matches connections whose destination was translated: they have asked
// for a published port.
func translated() rule {
	return rule{"ct status dnat", []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: reg1},
		bits(ctStatusDNAT, 0),
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: native(0)},
	}}
}

// untracked keeps a packet from being part of a connection, and so from translation.
func untracked() rule { return rule{"notrack", []expr.Any{&expr.Notrack{}}} }

// fibType matches the type of the destination as seen from the incoming link.
func fibType(text string, kind uint32) rule {
	return rule{"fib daddr . iif type " + text, []expr.Any{
		&expr.Fib{Register: reg1, ResultADDRTYPE: true, FlagDADDR: true, FlagIIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: native(kind)},
	}}
}

// localAddr matches destinations that are any address of the host.
func localAddr() rule {
	return rule{"fib daddr type local", []expr.Any{
		&expr.Fib{Register: reg1, ResultADDRTYPE: true, FlagDADDR: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: native(unix.RTN_LOCAL)},
	}}
}

// addrLength in bytes, which are one register or four.
func (t table) addrLength() uint32 {
	if t.v6 {
		return 16
	}
	return 4
}

// load puts an address of the packet into a register.
func (t table) load(which string, register uint32) expr.Any {
	offset := map[string]uint32{"saddr": 12, "daddr": 16}[which]
	if t.v6 {
		offset = map[string]uint32{"saddr": 8, "daddr": 24}[which]
	}
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: t.addrLength()}
}

// sourceIn matches the source address against a set.
func (t table) sourceIn(set setName) rule {
	return rule{t.keyword + " saddr @" + string(set), []expr.Any{
		t.load("saddr", reg1),
		&expr.Lookup{SourceRegister: reg1, SetName: string(set)},
	}}
}

// sourceWith matches outgoing link and source address together.
func (t table) sourceWith(set setName) rule {
	return rule{"oifname . " + t.keyword + " saddr @" + string(set), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1},
		t.load("saddr", reg2),
		&expr.Lookup{SourceRegister: reg1, SetName: string(set)},
	}}
}

// allowedSource matches sources that may reach the network's published ports.
func (t table) allowedSource() rule { return t.sourceWith(setAllowed) }

// sourceOnOif matches packets that go back to the subnet that they come from.
func (t table) sourceOnOif() rule { return t.sourceWith(setHome) }

// loopbackAddr matches 127.0.0.0/8 or ::1.
func (t table) loopbackAddr(which string) rule {
	if t.v6 {
		return rule{"ip6 " + which + " ::1", []expr.Any{
			t.load(which, reg1),
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: netip.IPv6Loopback().AsSlice()},
		}}
	}
	load := &expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 1}
	if which == "daddr" {
		load.Offset = 16
	}
	return rule{"ip " + which + " 127.0.0.0/8", []expr.Any{load, &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{127}}}}
}

// port puts protocol and destination port into registers from the n-th of 4 bytes.
func port(n uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register(n)},
		&expr.Payload{DestRegister: register(n + 1), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

// register is the name of the n-th register of 4 bytes.
func register(n uint32) uint32 {
	if n%4 == 0 {
		return reg1 + n/4
	}
	return reg1at + n
}

// directPort matches a container's own address and port.
func (t table) directPort(set setName) rule {
	exprs := append([]expr.Any{t.load("daddr", reg1)}, port(t.addrLength()/4)...)
	return rule{t.keyword + " daddr . meta l4proto . th dport @" + string(set), append(exprs, &expr.Lookup{SourceRegister: reg1, SetName: string(set)})}
}

// echoRequest matches pings.
func (t table) echoRequest() rule {
	text, proto, kind := "icmp type echo-request", byte(unix.IPPROTO_ICMP), byte(8)
	if t.v6 {
		text, proto, kind = "icmpv6 type echo-request", unix.IPPROTO_ICMPV6, 128
	}
	return rule{text, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{proto}},
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{kind}},
	}}
}

// translate gives packets the destination that a map has for their host port; a
// map of single ports also has the container's.
func (t table) translate(by setName) rule {
	text, exprs := "meta l4proto . th dport", port(0)
	shape := shapeOf(by, t.v6)
	if shape.key[0] == addrField {
		text, exprs = t.keyword+" daddr . "+text, append([]expr.Any{t.load("daddr", reg1)}, port(t.addrLength()/4)...)
	}
	family := ""
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(t.family), RegAddrMin: reg1, RegAddrMax: reg1}
	if len(shape.value) > 1 {
		nat.RegProtoMin = register(t.addrLength() / 4)
		nat.RegProtoMax, nat.Specified = nat.RegProtoMin, true
		family = t.keyword + " "
	}
	exprs = append(exprs, &expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: string(by)}, nat)
	return rule{"dnat " + family + "to " + text + " map @" + string(by), exprs}
}

// translateSource gives packets the source address that is chosen for their
// subnet.
func (t table) translateSource() rule {
	return rule{"snat to " + t.keyword + " saddr map @" + string(mapSNAT), []expr.Any{
		t.load("saddr", reg1),
		&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: string(mapSNAT)},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(t.family), RegAddrMin: reg1, RegAddrMax: reg1},
	}}
}

func matchMarkBit() rule {
	return rule{"meta mark & 0x10000000 == 0x10000000", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
		bits(Mark, 0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: native(Mark)},
	}}
}

func setMarkBit() rule {
	return rule{"meta mark set meta mark | 0x10000000", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
		bits(^Mark, Mark),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg1},
	}}
}

func clearMarkBit() rule {
	return rule{"meta mark set meta mark & 0xefffffff", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
		bits(^Mark, 0),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg1},
	}}
}

// bits is register = register & mask ^ xor.
func bits(mask, xor uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: native(mask), Xor: native(xor)}
}

// native is a number as the kernel keeps it in a register.
func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// linkName is a name as the kernel compares it, padded to IFNAMSIZ.
func linkName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}
