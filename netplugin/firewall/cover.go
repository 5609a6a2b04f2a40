package firewall

import "net/netip"

// A cover keeps the elements of a set of subnets. An interval set refuses overlaps,
// so that only those are elements that no other contains: one bad pair must not
// keep the rules of all other networks away.
type cover struct {
	of   *ruleset
	name setName
	// count is how many networks have the subnet.
	count map[netip.Prefix]int
	// values are what subnets lead to, in a map. Of two networks with one subnet the
	// first has its way.
	values map[netip.Prefix]string
}

func newCover(of *ruleset, name setName) *cover {
	return &cover{of: of, name: name, count: map[netip.Prefix]int{}, values: map[netip.Prefix]string{}}
}

func (c *cover) add(s netip.Prefix, value string) {
	c.count[s]++
	if c.count[s] > 1 {
		return
	}
	c.values[s] = value
	if c.hidden(s) {
		return
	}
	for other := range c.count {
		if contains(s, other) {
			c.of.unset(c.name, prefixMember(other))
		}
	}
	c.of.set(c.name, prefixMember(s), value)
}

func (c *cover) remove(s netip.Prefix, _ string) {
	if c.count[s] == 0 {
		return
	}
	if c.count[s]--; c.count[s] > 0 {
		return
	}
	delete(c.count, s)
	delete(c.values, s)
	if c.hidden(s) {
		return
	}
	c.of.unset(c.name, prefixMember(s))
	for other := range c.count {
		if contains(s, other) && !c.hidden(other) {
			c.of.set(c.name, prefixMember(other), c.values[other])
		}
	}
}

// hidden says that another subnet contains s.
func (c *cover) hidden(s netip.Prefix) bool {
	for bits := range s.Bits() {
		if c.count[netip.PrefixFrom(s.Addr(), bits).Masked()] > 0 {
			return true
		}
	}
	return false
}

// contains says that b is a part of a, and smaller.
func contains(a, b netip.Prefix) bool { return a.Bits() < b.Bits() && a.Contains(b.Addr()) }
