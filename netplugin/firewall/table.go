package firewall

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// TableName is the name of Berth's tables, one of family ip and one of ip6.
const TableName = "berth"

// A rule is one constant rule, as text in the words of `nft list` and as the
// kernel's expressions. Tests hold the two against each other in a real kernel.
type rule struct {
	text  string
	exprs []expr.Any
}

// A chain is one constant chain. hook is nil for one that is only jumped to.
type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority nftables.ChainPriority
	// text of the line that declares a base chain.
	text  string
	rules []rule
}

// A table describes the constant part of Berth's table of one family.
type table struct {
	v6     bool
	family nftables.TableFamily
	// keyword is the family in nft's words.
	keyword string
	addr    nftables.SetDatatype
	chains  []chain
}

// priorityBefore is the priority of the filter chains: before those of iptables
// and of Docker's nftables backend (0), since a mark set later is of no use
// there, and a drop is final wherever it is.
const priorityBefore = -10

// priorityLast is after everything that may look at the mark.
const priorityLast = 300

// forwardingChain is an empty chain without a hook. It is there when Berth has
// turned forwarding on for the family, and so tells the next berthd, too: a
// reboot clears both.
const forwardingChain = "turned_on_forwarding"

func newTable(v6 bool) table {
	t := table{v6: v6, family: nftables.TableFamilyIPv4, keyword: "ip", addr: nftables.TypeIPAddr}
	if v6 {
		t.family, t.keyword, t.addr = nftables.TableFamilyIPv6, "ip6", nftables.TypeIP6Addr
	}
	drop := verdict("drop", expr.VerdictDrop, "")
	accept := verdict("accept", expr.VerdictAccept, "")
	to := func(name string) rule { return verdict("goto "+name, expr.VerdictGoto, name) }

	t.chains = []chain{
		// A packet that Berth has accepted: say so to the rules of others.
		{name: "accepted", rules: []rule{
			join(setMarkBit(), accept),
		}},
		// From a container. The order decides: its own network, then the networks
		// it must not reach, then outside.
		{name: "leaving", rules: []rule{
			join(inSameBridge(), to("accepted")),
			join(linkIn("oifname", expr.MetaKeyOIFNAME, setBridges, false), drop),
			join(linkIn("oifname", expr.MetaKeyOIFNAME, setForeign, false), drop),
			join(linkIn("iifname", expr.MetaKeyIIFNAME, setOpen, false), to("accepted")),
			drop,
		}},
		// To a container, from anything but a Berth bridge: only answers.
		{name: "entering", rules: []rule{
			join(linkIn("oifname", expr.MetaKeyOIFNAME, setOpen, false), ctState(), to("accepted")),
			drop,
		}},
		{
			name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: priorityBefore,
			text: "type filter hook forward priority filter - 10; policy accept;",
			rules: []rule{
				// A mark from elsewhere must not open Docker's chains.
				join(matchMarkBit(), clearMarkBit()),
				join(linkIn("iifname", expr.MetaKeyIIFNAME, setBridges, false), to("leaving")),
				join(linkIn("oifname", expr.MetaKeyOIFNAME, setBridges, false), to("entering")),
			},
		},
		// Containers of an internal network reach the addresses of their own bridge
		// and no other address of the host.
		{
			name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, priority: priorityBefore,
			text: "type filter hook input priority filter - 10; policy accept;",
			rules: []rule{
				join(linkIn("iifname", expr.MetaKeyIIFNAME, setBridges, true), accept),
				join(linkIn("iifname", expr.MetaKeyIIFNAME, setOpen, false), accept),
				join(ctState(), accept),
				join(fibType("local", unix.RTN_LOCAL), accept),
				join(fibType("broadcast", unix.RTN_BROADCAST), accept),
				join(fibType("multicast", unix.RTN_MULTICAST), accept),
				drop,
			},
		},
		{
			name: "postrouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: *nftables.ChainPriorityNATSource,
			text: "type nat hook postrouting priority srcnat; policy accept;",
			rules: []rule{
				join(t.source(), notLoopback(), linkIn("oifname", expr.MetaKeyOIFNAME, setBridges, true), rule{"masquerade", []expr.Any{&expr.Masq{}}}),
			},
		},
		{
			name: "unmark", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPostrouting, priority: priorityLast,
			text: "type filter hook postrouting priority 300; policy accept;",
			rules: []rule{
				join(matchMarkBit(), clearMarkBit()),
			},
		},
	}
	return t
}

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

// linkIn matches the name of the incoming or outgoing link against a set.
func linkIn(text string, key expr.MetaKey, set setName, invert bool) rule {
	op := " "
	if invert {
		op = " != "
	}
	return rule{text + op + "@" + string(set), []expr.Any{
		&expr.Meta{Key: key, Register: unix.NFT_REG_1},
		&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: string(set), Invert: invert},
	}}
}

func inSameBridge() rule {
	return rule{"iifname . oifname @" + string(setSame), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: unix.NFT_REG_1},
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: unix.NFT_REG_2},
		&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: string(setSame)},
	}}
}

func notLoopback() rule {
	return rule{`oifname != "lo"`, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: unix.NFT_REG_1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: unix.NFT_REG_1, Data: linkName("lo")},
	}}
}

func ctState() rule {
	return rule{"ct state established,related", []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: unix.NFT_REG_1},
		bits(^uint32(0)&(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), 0),
		&expr.Cmp{Op: expr.CmpOpNeq, Register: unix.NFT_REG_1, Data: native(0)},
	}}
}

// fibType matches the type of the destination as seen from the incoming link.
func fibType(text string, kind uint32) rule {
	return rule{"fib daddr . iif type " + text, []expr.Any{
		&expr.Fib{Register: unix.NFT_REG_1, ResultADDRTYPE: true, FlagDADDR: true, FlagIIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: native(kind)},
	}}
}

// source matches the source address against the masqueraded subnets.
func (t table) source() rule {
	offset, length := uint32(12), uint32(4)
	if t.v6 {
		offset, length = 8, 16
	}
	return rule{t.keyword + " saddr @" + string(setSources), []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: string(setSources)},
	}}
}

func matchMarkBit() rule {
	return rule{"meta mark & 0x10000000 == 0x10000000", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: unix.NFT_REG_1},
		bits(Mark, 0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: native(Mark)},
	}}
}

func setMarkBit() rule {
	return rule{"meta mark set meta mark | 0x10000000", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: unix.NFT_REG_1},
		bits(^Mark, Mark),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: unix.NFT_REG_1},
	}}
}

func clearMarkBit() rule {
	return rule{"meta mark set meta mark & 0xefffffff", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: unix.NFT_REG_1},
		bits(^Mark, 0),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: unix.NFT_REG_1},
	}}
}

// bits is register = register & mask ^ xor.
func bits(mask, xor uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: 4, Mask: native(mask), Xor: native(xor)}
}

// native is a number as the kernel keeps it in a register.
func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// linkName is a name as the kernel compares it, padded to IFNAMSIZ.
func linkName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// set is the declaration of one of the sets.
func (t table) set(of *nftables.Table, name setName) *nftables.Set {
	s := &nftables.Set{Table: of, Name: string(name), KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian}
	switch name {
	case setSame:
		s.KeyType, s.Concatenation = nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIFName), true
	case setBridges, setOpen, setForeign:
	case setSources:
		s.KeyType, s.Interval, s.KeyByteOrder = t.addr, true, binaryutil.BigEndian
	}
	return s
}
