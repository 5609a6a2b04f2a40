package firewall

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
)

// encode turns members of a set into the kernel's elements.
func encode(name setName, list []string) ([]nftables.SetElement, error) {
	var out []nftables.SetElement
	for _, m := range list {
		switch name {
		case setSources:
			p, err := netip.ParsePrefix(m)
			if err != nil {
				return nil, err
			}
			out = append(out, nftables.SetElement{Key: p.Addr().AsSlice()})
			// The end is the first address outside; at the very top there is none.
			if end := lastOf(p).Next(); end.IsValid() {
				out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
			}
		case setSame:
			out = append(out, nftables.SetElement{Key: slices.Concat(linkName(m), linkName(m))})
		default:
			out = append(out, nftables.SetElement{Key: linkName(m)})
		}
	}
	return out, nil
}

// decode is the reverse of encode. Elements that Berth would not have made are an
// error.
func decode(name setName, list []nftables.SetElement) (members, error) {
	if name == setSources {
		return decodeIntervals(list)
	}
	out := members{}
	for _, e := range list {
		key := e.Key
		if name == setSame {
			if len(key) != 2*len(linkName("")) || !bytes.Equal(key[:len(key)/2], key[len(key)/2:]) {
				return nil, fmt.Errorf("set %s: strange element %x", name, key)
			}
			key = key[:len(key)/2]
		}
		out[strings.TrimRight(string(key), "\x00")] = struct{}{}
	}
	return out, nil
}

// decodeIntervals pairs starts with ends.
func decodeIntervals(list []nftables.SetElement) (members, error) {
	type edge struct {
		addr netip.Addr
		end  bool
	}
	edges := make([]edge, 0, len(list))
	for _, e := range list {
		addr, ok := netip.AddrFromSlice(e.Key)
		if !ok {
			return nil, fmt.Errorf("set %s: strange element %x", setSources, e.Key)
		}
		edges = append(edges, edge{addr, e.IntervalEnd})
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
			return nil, fmt.Errorf("set %s: interval ends at %s without a start", setSources, start.addr)
		}
		var last netip.Addr
		if i < len(edges) && edges[i].end {
			last = edges[i].addr.Prev()
			i++
		} else if i == len(edges) {
			last = lastOf(netip.PrefixFrom(start.addr, 0))
		} else {
			return nil, fmt.Errorf("set %s: interval from %s has no end", setSources, start.addr)
		}
		p, ok := prefixOf(start.addr, last)
		if !ok {
			return nil, fmt.Errorf("set %s: %s-%s is no subnet", setSources, start.addr, last)
		}
		out[p.String()] = struct{}{}
	}
	return out, nil
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
