package ipam

import (
	"net/netip"

	"github.com/berth-plugin/berth/shared/fault"
)

// CheckSubnet refuses prefixes that hosts cannot have addresses in. The prefix is
// valid; the error is invalid and names it.
func CheckSubnet(p netip.Prefix) error {
	addr := p.Masked().Addr()
	reserved := func(s string) bool { return netip.MustParsePrefix(s).Overlaps(p) }
	switch {
	case p.Bits() == 0:
		return fault.Invalid("subnet %s: it is the whole address family, want a part of it", p)
	case addr.Is4In6(), addr.Is6() && reserved("::ffff:0:0/96"):
		return fault.Invalid("subnet %s: IPv4 in IPv6 notation, want it as IPv4", p)
	case reserved("127.0.0.0/8"), reserved("::1/128"):
		return fault.Invalid("subnet %s: it has loopback addresses, want another one", p)
	case reserved("224.0.0.0/4"), reserved("ff00::/8"):
		return fault.Invalid("subnet %s: it has multicast addresses, want another one", p)
	case reserved("0.0.0.0/8"), reserved("240.0.0.0/4"):
		return fault.Invalid("subnet %s: it has reserved addresses (0.0.0.0/8, 240.0.0.0/4), want another one", p)
	case reserved("fe80::/10"):
		return fault.Invalid("subnet %s: it has link-local addresses, which the kernel gives itself, want another one", p)
	}
	return nil
}

// IsHost reports whether an address of the pool may belong to a host: it is
// neither the network's own address (in IPv6 that of all its routers, RFC 4291
// section 2.6.1) nor IPv4's broadcast address. Pools of one or two addresses have
// hosts only (RFC 3021, RFC 6164).
func IsHost(pool netip.Prefix, addr netip.Addr) bool {
	if addr.BitLen()-pool.Bits() <= 1 {
		return true
	}
	if addr == pool.Masked().Addr() {
		return false
	}
	return addr.Is6() || addr != lastAddr(pool)
}

// hosts returns the first and last address of part that hosts of pool may have.
// ok is false when there is none.
func hosts(pool, part netip.Prefix) (first, last netip.Addr, ok bool) {
	first, last = part.Masked().Addr(), lastAddr(part)
	if !IsHost(pool, first) {
		first = first.Next()
	}
	if !IsHost(pool, last) {
		last = last.Prev()
	}
	ok = first.IsValid() && last.IsValid() && !last.Less(first) && part.Contains(first) && part.Contains(last)
	return first, last, ok
}

// lastAddr is the highest address of the prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	first := number(p.Addr())
	host := p.Addr().BitLen() - p.Bits()
	return first.or(lowBits(host)).addr(p.Addr().Is4())
}

// contains reports whether inner lies wholly in outer.
func contains(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}
