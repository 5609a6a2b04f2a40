package firewall

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A foreignRule is what matters of a rule of others.
type foreignRule struct {
	chain  string
	handle uint64
	// ours says that Berth has put it there.
	ours bool
	// always says that the verdict does not depend on the packet.
	always bool
	// verdict is expr.VerdictContinue for a rule without one; to reject is to drop.
	verdict expr.VerdictKind
	// target of a jump or goto.
	target string
}

// ends says that nothing after the rule in its chain is reached.
func (r foreignRule) ends() bool {
	return r.verdict != expr.VerdictContinue && r.verdict != expr.VerdictJump
}

// tableFlagOwner is NFT_TABLE_F_OWNER: the table goes with the socket that made it,
// and nobody else may change it.
const tableFlagOwner = 0x2

type tableKey struct {
	family nftables.TableFamily
	name   string
}

// ownedTables are those with tableFlagOwner.
func (k *kernel) ownedTables() (map[tableKey]bool, error) {
	out := map[tableKey]bool{}
	err := k.dump(unix.NFT_MSG_GETTABLE, unix.NFPROTO_UNSPEC, nil, func(family byte, attrs []mdlayher.Attribute) {
		var (
			name  string
			flags uint32
		)
		for _, a := range attrs {
			switch {
			case a.Type == unix.NFTA_TABLE_NAME:
				name = cString(a.Data)
			case a.Type == unix.NFTA_TABLE_FLAGS && len(a.Data) == 4:
				flags = binary.BigEndian.Uint32(a.Data)
			}
		}
		if flags&tableFlagOwner != 0 {
			out[tableKey{nftables.TableFamily(family), name}] = true
		}
	})
	if err != nil {
		return nil, fmt.Errorf("list nftables tables: %w", err)
	}
	return out, nil
}

// foreignRules reads the rules of a table, or of one chain of it, by chain. The
// library's own reader leaves out the expressions that it does not know, which would make "drop what
// matches" a "drop".
func (k *kernel) foreignRules(t *nftables.Table, chain string) (map[string][]foreignRule, error) {
	out := map[string][]foreignRule{}
	request := []mdlayher.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: []byte(t.Name + "\x00")}}
	if chain != "" {
		request = append(request, mdlayher.Attribute{Type: unix.NFTA_RULE_CHAIN, Data: []byte(chain + "\x00")})
	}
	err := k.dump(unix.NFT_MSG_GETRULE, byte(t.Family), request, func(_ byte, attrs []mdlayher.Attribute) {
		r := foreignRuleOf(attrs)
		out[r.chain] = append(out[r.chain], r)
	})
	if err != nil {
		return nil, fmt.Errorf("list rules of nftables table %s: %w", t.Name, err)
	}
	return out, nil
}

// dump calls each with the attributes of everything of one type.
func (k *kernel) dump(message int, family byte, request []mdlayher.Attribute, each func(family byte, attrs []mdlayher.Attribute)) error {
	data, err := mdlayher.MarshalAttributes(request)
	if err != nil {
		return err
	}
	reply, err := k.raw.Execute(mdlayher.Message{
		Header: mdlayher.Header{
			Type:  mdlayher.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | message),
			Flags: mdlayher.Request | mdlayher.Dump,
		},
		Data: append([]byte{family, unix.NFNETLINK_V0, 0, 0}, data...),
	})
	if err != nil {
		return err
	}
	for _, m := range reply {
		if len(m.Data) < 4 {
			continue
		}
		attrs, err := mdlayher.UnmarshalAttributes(m.Data[4:])
		if err != nil {
			return err
		}
		each(m.Data[0], attrs)
	}
	return nil
}

func foreignRuleOf(attrs []mdlayher.Attribute) foreignRule {
	r := foreignRule{always: true, verdict: expr.VerdictContinue}
	for _, a := range attrs {
		switch a.Type {
		case unix.NFTA_RULE_CHAIN:
			r.chain = cString(a.Data)
		case unix.NFTA_RULE_HANDLE:
			if len(a.Data) == 8 {
				r.handle = binary.BigEndian.Uint64(a.Data)
			}
		case unix.NFTA_RULE_USERDATA:
			comment, ok := userdata.GetString(a.Data, userdata.TypeComment)
			r.ours = ok && strings.HasPrefix(comment, commentPrefix)
		case unix.NFTA_RULE_EXPRESSIONS:
			for _, e := range nested(a.Data) {
				r.add(nested(e.Data))
			}
		}
	}
	return r
}

// add takes up the next expression of a rule.
func (r *foreignRule) add(attrs []mdlayher.Attribute) {
	var (
		name string
		data []mdlayher.Attribute
	)
	for _, a := range attrs {
		switch a.Type {
		case unix.NFTA_EXPR_NAME:
			name = cString(a.Data)
		case unix.NFTA_EXPR_DATA:
			data = nested(a.Data)
		}
	}
	switch name {
	case "reject":
		r.verdict = expr.VerdictDrop
	case "match":
		// A comment of iptables' matches everything.
		if comment, ok := commentOf(data); ok {
			r.ours = r.ours || strings.HasPrefix(comment, commentPrefix)
			return
		}
		r.always = false
	case "immediate":
		if !r.setVerdict(data) {
			r.always = false
		}
	default:
		r.always = r.always && !isCondition(name)
	}
}

// commentOf reads what iptables has for a comment.
func commentOf(attrs []mdlayher.Attribute) (comment string, ok bool) {
	for _, a := range attrs {
		switch a.Type {
		case unix.NFTA_MATCH_NAME:
			ok = cString(a.Data) == "comment"
		case unix.NFTA_MATCH_INFO:
			comment, _, _ = strings.Cut(string(a.Data), "\x00")
		}
	}
	return comment, ok
}

// setVerdict reads an immediate expression; one that only loads a register has no
// verdict.
func (r *foreignRule) setVerdict(attrs []mdlayher.Attribute) bool {
	for _, a := range attrs {
		if a.Type != unix.NFTA_IMMEDIATE_DATA {
			continue
		}
		for _, d := range nested(a.Data) {
			if d.Type != unix.NFTA_DATA_VERDICT {
				continue
			}
			for _, v := range nested(d.Data) {
				switch {
				case v.Type == unix.NFTA_VERDICT_CODE && len(v.Data) == 4:
					r.verdict = expr.VerdictKind(int32(binary.BigEndian.Uint32(v.Data)))
				case v.Type == unix.NFTA_VERDICT_CHAIN:
					r.target = cString(v.Data)
				}
			}
			return true
		}
	}
	return false
}

// nested decodes attributes within an attribute. What the kernel sends is well
// formed; anything else has no meaning here.
func nested(b []byte) []mdlayher.Attribute {
	attrs, err := mdlayher.UnmarshalAttributes(b)
	if err != nil {
		return nil
	}
	for i := range attrs {
		attrs[i].Type &^= unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER
	}
	return attrs
}

func cString(b []byte) string { return strings.TrimRight(string(b), "\x00") }

// hasRule says that Berth's rule is where it belongs in iptables-nft's chains, as
// keepRule would have it. It asks the kernel: to start the program costs more than
// to make a network.
func (k *kernel) hasRule(v variant) (bool, error) {
	table := &nftables.Table{Name: filterTable, Family: v.family()}
	rules, err := k.foreignRules(table, forwardChain)
	if err != nil {
		return false, err
	}
	count := func(list []foreignRule) (n int) {
		for _, r := range list {
			if r.ours {
				n++
			}
		}
		return n
	}
	forward := rules[forwardChain]
	if !slices.ContainsFunc(forward, func(r foreignRule) bool {
		return r.always && r.verdict == expr.VerdictJump && r.target == userChain
	}) {
		return count(forward) == 1, nil
	}
	if rules, err = k.foreignRules(table, userChain); err != nil {
		return false, err
	}
	user := rules[userChain]
	if n := len(user); n > 0 && user[n-1].always && user[n-1].verdict == expr.VerdictReturn {
		user = user[:n-1]
	}
	return count(forward) == 0 && count(user) == 1 && user[len(user)-1].ours, nil
}
