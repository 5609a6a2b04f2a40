package ipam

import (
	"net/netip"
	"slices"
	"strings"
)

// slots are the pools that a supernet is cut into.
type slots struct {
	Supernet
	// taken counts the pools in each slot.
	taken table
	// wide are pools that are larger than a slot.
	wide map[*pool]bool
}

// shift is how far an address is from the number of its slot.
func (s *slots) shift() int { return s.Prefix.Addr().BitLen() - s.Size }

func (s *slots) slot(n num) num { return n.shr(s.shift()) }

// takeSlots counts a pool by 1 or -1.
func (a *Allocator) takeSlots(p *pool, by int) {
	for i := range a.slots {
		s := &a.slots[i]
		if !s.Prefix.Overlaps(p.Prefix) {
			continue
		}
		if p.Prefix.Bits() < s.Size {
			if s.wide[p] = true; by < 0 {
				delete(s.wide, p)
			}
			continue
		}
		n := s.slot(number(p.Prefix.Addr()))
		if count := int(s.taken.get(n)) + by; count > 0 {
			s.taken.set(n, uint32(count))
		} else {
			s.taken.remove(n)
		}
	}
}

// choose returns the lowest free automatic pool.
func (a *Allocator) choose(req PoolRequest) (netip.Prefix, bool) {
	for _, occupied := range [][]netip.Prefix{slices.Concat(req.Busy, req.Avoid), req.Busy} {
		for i := range a.slots {
			s := &a.slots[i]
			if s.Prefix.Addr().Is6() != req.IPv6 {
				continue
			}
			if p, ok := s.lowest(occupied); ok {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}

// lowest returns the lowest slot in which there is no pool and that overlaps none
// of the occupied prefixes.
func (s *slots) lowest(occupied []netip.Prefix) (netip.Prefix, bool) {
	var ranges []Range
	add := func(p netip.Prefix) {
		// The whole family is the default route, which says nothing.
		if p.Bits() > 0 && p.Overlaps(s.Prefix) {
			ranges = append(ranges, Range{p.Masked().Addr(), lastAddr(p.Masked())})
		}
	}
	for _, p := range occupied {
		add(p)
	}
	for p := range s.wide {
		add(p.Prefix)
	}
	spans := spansIn(joinRanges(ranges), s.Prefix)
	first, last := s.slot(number(s.Prefix.Addr())), s.slot(number(lastAddr(s.Prefix)))
	for !last.less(first) {
		n, ok := s.taken.free(first, last)
		if !ok {
			return netip.Prefix{}, false
		}
		candidate := netip.PrefixFrom(n.shl(s.shift()).addr(s.Prefix.Addr().Is4()), s.Size)
		end, overlaps := lastOverlap(spans, number(candidate.Addr()), number(lastAddr(candidate)))
		if !overlaps {
			return candidate, true
		}
		if first = s.slot(end).next(); first == (num{}) {
			break
		}
	}
	return netip.Prefix{}, false
}

// lastOverlap returns the end of the last of the spans that overlaps first to
// last.
func lastOverlap(spans []span, first, last num) (num, bool) {
	at, _ := slices.BinarySearchFunc(spans, first, func(s span, n num) int {
		if s.last.less(n) {
			return -1
		}
		return 1
	})
	var end num
	overlaps := false
	for ; at < len(spans) && !last.less(spans[at].first); at++ {
		end, overlaps = spans[at].last, true
	}
	return end, overlaps
}

func comparePrefixes(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

func (a *Allocator) supernets(is6 bool) string {
	var names []string
	for _, s := range a.cfg.Supernets {
		if s.Prefix.Addr().Is6() == is6 {
			names = append(names, s.String())
		}
	}
	return strings.Join(names, ",")
}
