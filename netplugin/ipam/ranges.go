package ipam

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Range is the addresses from First to Last, both of one family.
type Range struct {
	First, Last netip.Addr
}

// String is the form that ParseRanges reads.
func (r Range) String() string {
	if r.First == r.Last {
		return r.First.String()
	}
	return r.First.String() + "-" + r.Last.String()
}

// maxRanges is more than anybody writes, and keeps a search short.
const maxRanges = 1024

// ParseRanges reads addresses, ranges A-B and prefixes, separated by commas, as in
//
//	10.1.0.1-10.1.0.20,10.1.0.128/28,10.1.0.77,fd00:1::/120
//
// Spaces around each are ignored. The result is sorted and no two ranges touch.
// The error is invalid and names the entry.
func ParseRanges(s string) ([]Range, error) {
	var list []Range
	for entry := range strings.SplitSeq(s, ",") {
		r, err := parseRange(strings.TrimSpace(entry))
		if err != nil {
			return nil, err
		}
		if list = append(list, r); len(list) > maxRanges {
			return nil, fault.Invalid("want at most %d ranges", maxRanges)
		}
	}
	return joinRanges(list), nil
}

func parseRange(entry string) (Range, error) {
	wrong := func() (Range, error) {
		const most = 64
		return Range{}, fault.Invalid("%q: want an address, a range A-B or a prefix, as 10.1.0.7, 10.1.0.1-10.1.0.20 or 10.1.0.64/28", entry[:min(most, len(entry))])
	}
	if p, err := netip.ParsePrefix(entry); err == nil {
		if p.Addr().Is4In6() {
			return wrong()
		}
		if p != p.Masked() {
			return Range{}, fault.Invalid("%q: it has bits beyond its length, want %s", entry, p.Masked())
		}
		return Range{p.Addr(), lastAddr(p)}, nil
	}
	a, b, isRange := strings.Cut(entry, "-")
	if !isRange {
		b = a
	}
	first, err := parsePlain(strings.TrimSpace(a))
	if err != nil {
		return wrong()
	}
	last, err := parsePlain(strings.TrimSpace(b))
	if err != nil || first.Is4() != last.Is4() {
		return wrong()
	}
	if last.Less(first) {
		return Range{}, fault.Invalid("%q: it ends before it begins, want %s-%s", entry, last, first)
	}
	return Range{first, last}, nil
}

func parsePlain(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	if err == nil && (addr.Zone() != "" || addr.Is4In6()) {
		err = fault.Invalid("address %s: want it without zone and not as IPv4 in IPv6", addr)
	}
	return addr, err
}

// joinRanges sorts ranges and makes one of those that overlap or touch.
func joinRanges(list []Range) []Range {
	slices.SortFunc(list, func(a, b Range) int { return a.First.Compare(b.First) })
	var out []Range
	for _, r := range list {
		if n := len(out) - 1; n >= 0 && out[n].Last.Is4() == r.First.Is4() && !out[n].Last.Less(r.First) {
			if out[n].Last.Less(r.Last) {
				out[n].Last = r.Last
			}
			continue
		} else if n >= 0 && out[n].Last.Next() == r.First {
			out[n].Last = r.Last
			continue
		}
		out = append(out, r)
	}
	return out
}

// A span is a Range as numbers.
type span struct {
	first, last num
}

// spansIn are the parts of ranges that lie in the prefix, sorted. Those of other
// subnets and of the other family are none: dockerd sends one list for all
// subnets of a network.
func spansIn(ranges []Range, p netip.Prefix) []span {
	low, high := number(p.Addr()), number(lastAddr(p))
	var spans []span
	for _, r := range ranges {
		if r.First.Is4() != p.Addr().Is4() {
			continue
		}
		s := span{number(r.First), number(r.Last)}
		if high.less(s.first) || s.last.less(low) {
			continue
		}
		if s.first.less(low) {
			s.first = low
		}
		if high.less(s.last) {
			s.last = high
		}
		spans = append(spans, s)
	}
	slices.SortFunc(spans, func(a, b span) int {
		if a.first.less(b.first) {
			return -1
		}
		return 1
	})
	return spans
}

// spanOf returns the span that n is in.
func spanOf(spans []span, n num) (span, bool) {
	at, _ := slices.BinarySearchFunc(spans, n, func(s span, n num) int {
		if s.last.less(n) {
			return -1
		}
		return 1
	})
	if at == len(spans) || n.less(spans[at].first) {
		return span{}, false
	}
	return spans[at], true
}
