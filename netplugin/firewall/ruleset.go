package firewall

import (
	"maps"
	"net/netip"
	"slices"
)

// Mark is the bit of a packet's mark that carries the decision "accepted by
// Berth" from Berth's forward chain to the one rule in the chains of iptables,
// where an accept in nftables would not be heard. No other bit is changed, and
// this one is cleared again before the packet leaves.
const Mark uint32 = 0x1000_0000

// A Network is what the rules need to know of a network.
type Network struct {
	// Bridge is the name of its bridge link, unique among networks.
	Bridge string
	// Subnets of both families, masked.
	Subnets []netip.Prefix
	// Internal networks are closed to everything but their own containers and the
	// bridge's own addresses.
	Internal bool
	// Masquerade gives traffic to outside the host's address as source.
	Masquerade bool
}

// setName is the name of a set in Berth's tables.
type setName string

const (
	setBridges setName = "bridges" // every Berth bridge
	setOpen    setName = "open"    // those that are not internal
	setSame    setName = "same"    // each Berth bridge, twice: from itself to itself
	setForeign setName = "foreign" // bridges of other container networks
	setSources setName = "sources" // subnets that are masqueraded
)

// setNames in the order they are made and shown.
func setNames() []setName { return []setName{setBridges, setOpen, setSame, setForeign, setSources} }

// members are the elements of one set: link names, or masked prefixes in
// setSources.
type members map[string]struct{}

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
func (m members) sorted() []string { return slices.Sorted(maps.Keys(m)) }

// missing lists what is in m and not in other, sorted.
func (m members) missing(other members) []string {
	var out []string
	for x := range m {
		if _, ok := other[x]; !ok {
			out = append(out, x)
		}
	}
	slices.Sort(out)
	return out
}

// A ruleset is what one table should hold. It is changed network by network at a
// cost that hardly depends on how many there are.
type ruleset struct {
	v6       bool
	elements elements
	// touched are the elements that may differ from what the kernel had when
	// touched was last emptied.
	touched elements
	// subnets counts the masqueraded subnets of all networks. An interval set
	// refuses overlaps, so that only those are elements that no other contains: one
	// bad pair must not keep the rules of all other networks away.
	subnets map[netip.Prefix]int
}

func newRuleset(v6 bool) *ruleset {
	return &ruleset{v6: v6, elements: newElements(), touched: newElements(), subnets: map[netip.Prefix]int{}}
}

// set makes x an element or not.
func (r *ruleset) set(name setName, x string, in bool) {
	if in {
		r.elements[name][x] = struct{}{}
	} else {
		delete(r.elements[name], x)
	}
	r.touched[name][x] = struct{}{}
}

// put adds a network whose bridge is not there; without a bridge it is only
// subnets.
func (r *ruleset) put(n Network) { r.change(n, true) }

// drop takes away what put has added.
func (r *ruleset) drop(n Network) { r.change(n, false) }

func (r *ruleset) change(n Network, in bool) {
	if n.Bridge != "" {
		r.set(setBridges, n.Bridge, in)
		r.set(setSame, n.Bridge, in)
		r.set(setOpen, n.Bridge, in && !n.Internal)
	}
	if n.Internal || !n.Masquerade {
		return
	}
	for _, s := range n.Subnets {
		s = s.Masked()
		switch {
		case s.Addr().Is6() != r.v6:
		case in:
			r.addSubnet(s)
		default:
			r.removeSubnet(s)
		}
	}
}

func (r *ruleset) addSubnet(s netip.Prefix) {
	r.subnets[s]++
	if r.subnets[s] > 1 || r.hidden(s) {
		return
	}
	for other := range r.subnets {
		if contains(s, other) {
			r.set(setSources, other.String(), false)
		}
	}
	r.set(setSources, s.String(), true)
}

func (r *ruleset) removeSubnet(s netip.Prefix) {
	if r.subnets[s]--; r.subnets[s] > 0 {
		return
	}
	delete(r.subnets, s)
	if r.hidden(s) {
		return
	}
	r.set(setSources, s.String(), false)
	for other := range r.subnets {
		if contains(s, other) && !r.hidden(other) {
			r.set(setSources, other.String(), true)
		}
	}
}

// hidden says that another subnet contains s.
func (r *ruleset) hidden(s netip.Prefix) bool {
	for bits := range s.Bits() {
		if r.subnets[netip.PrefixFrom(s.Addr(), bits).Masked()] > 0 {
			return true
		}
	}
	return false
}

// contains says that b is a part of a, and smaller.
func contains(a, b netip.Prefix) bool { return a.Bits() < b.Bits() && a.Contains(b.Addr()) }

// setForeignBridges replaces the names of other container networks' bridges.
func (r *ruleset) setForeignBridges(names []string) {
	for _, x := range r.elements[setForeign].sorted() {
		if !slices.Contains(names, x) {
			r.set(setForeign, x, false)
		}
	}
	for _, x := range names {
		if _, ok := r.elements[setForeign][x]; !ok {
			r.set(setForeign, x, true)
		}
	}
}

// steps lists what has to be added to a set and removed from it, given what it
// has. Unless all, only what was touched is looked at.
func (r *ruleset) steps(name setName, have members, all bool) (add, remove []string) {
	want := r.elements[name]
	if all {
		return want.missing(have), have.missing(want)
	}
	for _, x := range r.touched[name].sorted() {
		_, wanted := want[x]
		_, there := have[x]
		switch {
		case wanted && !there:
			add = append(add, x)
		case there && !wanted:
			remove = append(remove, x)
		}
	}
	return add, remove
}

// settled forgets what has been touched: the kernel has it all.
func (r *ruleset) settled() { r.touched = newElements() }

// networksOf guesses the networks that have led to the elements of a table. The
// subnets, whose networks are unknown, are those of a network without a bridge.
func networksOf(e elements) []Network {
	rest := Network{Masquerade: true}
	for x := range e[setSources] {
		if p, err := netip.ParsePrefix(x); err == nil {
			rest.Subnets = append(rest.Subnets, p)
		}
	}
	out := []Network{rest}
	for x := range e[setBridges] {
		_, open := e[setOpen][x]
		out = append(out, Network{Bridge: x, Internal: !open})
	}
	return out
}
