package firewall

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"

	"github.com/berth-plugin/berth/netplugin/options"
)

// A member is the key of one element, in the bytes of the kernel's registers.
// last is the end of an interval, which it includes; "" in sets without intervals.
type member struct{ first, last string }

// members are the elements of one set, or of one map with what they lead to.
type members map[member]string

// elements are the members of all sets of one table.
type elements map[setName]members

func newElements() elements {
	e := elements{}
	for _, name := range setNames() {
		e[name] = members{}
	}
	return e
}

// sorted is for people and for messages to the kernel.
func (m members) sorted() []member { return slices.SortedFunc(maps.Keys(m), member.compare) }

func (m member) compare(other member) int {
	if c := strings.Compare(m.first, other.first); c != 0 {
		return c
	}
	return strings.Compare(m.last, other.last)
}

// missing lists what is in m and not in other, sorted.
func (m members) missing(other members) []member {
	var out []member
	for x, value := range m {
		if v, ok := other[x]; !ok || v != value {
			out = append(out, x)
		}
	}
	slices.SortFunc(out, member.compare)
	return out
}

// registers builds keys and values field by field.
type registers []byte

func (r registers) link(name string) registers { return append(r, linkName(name)...) }

func (r registers) addr(a netip.Addr) registers { return append(r, a.AsSlice()...) }

func (r registers) proto(p options.Proto) registers { return append(r, byte(p), 0, 0, 0) }

func (r registers) port(p uint16) registers {
	return append(binary.BigEndian.AppendUint16(r, p), 0, 0)
}

// linkMember is the element of a set of links.
func linkMember(names ...string) member {
	var r registers
	for _, name := range names {
		r = r.link(name)
	}
	return member{first: string(r)}
}

// prefixMember is the element of a set of subnets, after the given links.
func prefixMember(p netip.Prefix, links ...string) member {
	m := linkMember(links...)
	return member{m.first + string(p.Masked().Addr().AsSlice()), m.first + string(lastOf(p).AsSlice())}
}

// encode turns elements of a set into the kernel's. Values are what keys lead to
// in a map.
func encode(s shape, list []member, values members) []nftables.SetElement {
	out := make([]nftables.SetElement, 0, len(list))
	for _, m := range list {
		e := nftables.SetElement{Key: []byte(m.first), Val: []byte(values[m])}
		if s.interval && s.joined() {
			e.KeyEnd = []byte(m.last)
		}
		out = append(out, e)
		if s.interval && !s.joined() {
			// The end is the first address outside; at the very top there is none.
			last, _ := netip.AddrFromSlice([]byte(m.last))
			if end := last.Next(); end.IsValid() {
				out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
			}
		}
	}
	return out
}

// decode is the reverse of encode. Elements that Berth would not have made are an
// error.
func decode(s shape, list []nftables.SetElement) (members, error) {
	for _, e := range list {
		if len(e.Key) != s.padded(s.key) || len(e.KeyEnd) != 0 && len(e.KeyEnd) != len(e.Key) {
			return nil, fmt.Errorf("strange element %x", e.Key)
		}
		if !e.IntervalEnd && len(e.Val) != s.padded(s.value) {
			return nil, fmt.Errorf("element %x leads to %x", e.Key, e.Val)
		}
	}
	if s.interval && !s.joined() {
		return decodeIntervals(list)
	}
	out := make(members, len(list))
	for _, e := range list {
		m := member{first: string(e.Key)}
		if s.interval != (len(e.KeyEnd) > 0) {
			return nil, fmt.Errorf("strange element %x", e.Key)
		}
		if s.interval {
			m.last = string(e.KeyEnd)
		}
		out[m] = string(e.Val)
	}
	return out, nil
}

// decodeIntervals pairs starts with ends.
func decodeIntervals(list []nftables.SetElement) (members, error) {
	type edge struct {
		addr  netip.Addr
		end   bool
		value string
	}
	edges := make([]edge, 0, len(list))
	for _, e := range list {
		addr, ok := netip.AddrFromSlice(e.Key)
		if !ok {
			return nil, fmt.Errorf("strange element %x", e.Key)
		}
		edges = append(edges, edge{addr, e.IntervalEnd, string(e.Val)})
	}
	// Where one interval ends and the next begins, the end comes first.
	slices.SortFunc(edges, func(a, b edge) int {
		if c := a.addr.Compare(b.addr); c != 0 {
			return c
		}
		if a.end == b.end {
			return 0
		}
		if a.end {
			return -1
		}
		return 1
	})
	out := members{}
	for i := 0; i < len(edges); {
		start := edges[i]
		i++
		if start.end {
			return nil, fmt.Errorf("interval ends at %s without a start", start.addr)
		}
		var last netip.Addr
		if i < len(edges) && edges[i].end {
			last = edges[i].addr.Prev()
			i++
		} else if i == len(edges) {
			last = lastOf(netip.PrefixFrom(start.addr, 0))
		} else {
			return nil, fmt.Errorf("interval from %s has no end", start.addr)
		}
		p, ok := prefixOf(start.addr, last)
		if !ok {
			return nil, fmt.Errorf("%s-%s is no subnet", start.addr, last)
		}
		out[prefixMember(p)] = start.value
	}
	return out, nil
}

// text is an element in nft's words.
func (s shape) text(m member, value string) string {
	out := s.fieldsText(s.key, m.first, m.last)
	if s.value != nil {
		out += " : " + s.fieldsText(s.value, value, "")
	}
	return out
}

func (s shape) fieldsText(fields []field, first, last string) string {
	var parts []string
	for _, f := range fields {
		width, end := s.width(f), s.padded([]field{f})
		if len(first) < end {
			return fmt.Sprintf("%x", first)
		}
		part := first[:width]
		to := part
		if last != "" {
			to, last = last[:width], last[end:]
		}
		first = first[end:]
		parts = append(parts, fieldText(f, part, to))
	}
	return strings.Join(parts, " . ")
}

func fieldText(f field, first, last string) string {
	switch f {
	case linkField:
		return fmt.Sprintf("%q", strings.TrimRight(first, "\x00"))
	case addrField:
		a, _ := netip.AddrFromSlice([]byte(first))
		b, _ := netip.AddrFromSlice([]byte(last))
		if p, ok := prefixOf(a, b); ok && a != b {
			return p.String()
		}
		if a != b {
			return a.String() + "-" + b.String()
		}
		return a.String()
	case protoField:
		return options.Proto(first[0]).String()
	default:
		a, b := binary.BigEndian.Uint16([]byte(first)), binary.BigEndian.Uint16([]byte(last))
		if a != b {
			return fmt.Sprintf("%d-%d", a, b)
		}
		return fmt.Sprint(a)
	}
}

// texts are elements of a set for messages; many are cut short.
func (s shape) texts(list []member, values members) []string {
	const most = 5
	var out []string
	for i, m := range list {
		if i == most {
			return append(out, fmt.Sprintf("and %d more", len(list)-most))
		}
		out = append(out, s.text(m, values[m]))
	}
	return out
}

// lastOf is the highest address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	addr, _ := netip.AddrFromSlice(b)
	return addr
}

// prefixOf is the prefix that spans exactly first to last.
func prefixOf(first, last netip.Addr) (netip.Prefix, bool) {
	for bits := range first.BitLen() + 1 {
		if p := netip.PrefixFrom(first, bits); p.Masked() == p && lastOf(p) == last {
			return p, true
		}
	}
	return netip.Prefix{}, false
}
