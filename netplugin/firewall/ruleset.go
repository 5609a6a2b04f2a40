package firewall

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/netplugin/options"
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
	// IPv4 and IPv6 say how each family is reached, and with which source it
	// leaves.
	IPv4, IPv6 options.Family
	// Switched says that a link of the host is a port of the bridge. Frames between
	// its ports then pass as on a switch: they are not tracked, so that no translation
	// of the host's gets hold of those to its own addresses on the LAN.
	Switched bool
	// NoICC keeps routed packets between containers of the network apart; the
	// bridge's ports do so for bridged ones.
	NoICC bool
	// HostFirewall, Sources and Trusted as in options.Network.
	HostFirewall bool
	Sources      []netip.Prefix
	Trusted      []string
}

// family is how the network is reached in one family.
func (n Network) family(v6 bool) options.Family {
	if v6 {
		return n.IPv6
	}
	return n.IPv4
}

// An element is one member of one set, with what it leads to in a map.
type element struct {
	set setName
	member
	value string
}

// A ruleset is what one table should hold. It is changed network by network and
// endpoint by endpoint, at a cost that hardly depends on how many there are.
type ruleset struct {
	v6       bool
	elements elements
	// touched are the elements that may differ from what the kernel had when
	// touched was last emptied.
	touched map[setName]map[member]struct{}
	// sources and snat keep the elements of setSources and mapSNAT, whose subnets
	// may overlap.
	sources, snat *cover
	// left are those of elements, and subnets those of sources and snat, that an
	// earlier Berth made and for which this one has not been told the reason yet.
	left        map[setName]map[member]struct{}
	leftSubnets map[*cover][]netip.Prefix
}

func newRuleset(v6 bool) *ruleset {
	r := &ruleset{v6: v6, elements: newElements(), left: map[setName]map[member]struct{}{}, leftSubnets: map[*cover][]netip.Prefix{}}
	r.sources, r.snat = newCover(r, setSources), newCover(r, mapSNAT)
	r.settled()
	return r
}

// set makes x an element.
func (r *ruleset) set(name setName, x member, value string) {
	r.elements[name][x] = value
	r.touch(name, x)
	delete(r.left[name], x)
}

// unset makes x no element.
func (r *ruleset) unset(name setName, x member) {
	delete(r.elements[name], x)
	r.touch(name, x)
	delete(r.left[name], x)
}

func (r *ruleset) touch(name setName, x member) {
	if r.touched[name] == nil {
		r.touched[name] = map[member]struct{}{}
	}
	r.touched[name][x] = struct{}{}
}

// put adds a network whose bridge is not there.
func (r *ruleset) put(n Network) {
	r.forget(n.Bridge)
	for _, e := range r.of(n) {
		r.set(e.set, e.member, e.value)
	}
	r.subnets(n, (*cover).add)
}

// drop takes away what put has added, and what is left of a network of this bridge.
func (r *ruleset) drop(n Network) {
	r.forget(n.Bridge)
	for _, e := range r.of(n) {
		r.unset(e.set, e.member)
	}
	r.subnets(n, (*cover).remove)
}

// of lists the elements of a network but for those whose subnets may overlap with
// others'.
func (r *ruleset) of(n Network) []element {
	var out []element
	add := func(name setName, m member) { out = append(out, element{set: name, member: m}) }
	self := linkMember(n.Bridge)
	family := n.family(r.v6)
	add(setBridges, self)
	add(setSame, linkMember(n.Bridge, n.Bridge))
	for _, x := range []struct {
		set setName
		in  bool
	}{
		{setOpen, !n.Internal},
		{setICC, !n.NoICC},
		{setRouted, !n.Internal && family.Routed()},
		{setUnprotected, !n.Internal && family.Mode == options.GatewayUnprotected},
		{setHost, n.HostFirewall},
		{setLimited, len(n.Sources) > 0},
		{setSwitched, n.Switched},
	} {
		if x.in {
			add(x.set, self)
		}
	}
	for _, p := range r.disjoint(n.Sources) {
		add(setAllowed, prefixMember(p, n.Bridge))
	}
	for _, link := range n.Trusted {
		add(setTrusted, linkMember(link, n.Bridge))
	}
	for _, p := range r.disjoint(n.Subnets) {
		add(setHome, prefixMember(p, n.Bridge))
	}
	return out
}

// disjoint lists those of the family's prefixes that no other contains.
func (r *ruleset) disjoint(list []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range list {
		hidden := slices.ContainsFunc(list, func(other netip.Prefix) bool { return contains(other, p) })
		if p = p.Masked(); p.Addr().Is6() == r.v6 && !hidden && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

// subnets adds the network's subnets to, or removes them from, those whose source
// address is translated.
func (r *ruleset) subnets(n Network, change func(*cover, netip.Prefix, string)) {
	family := n.family(r.v6)
	if n.Internal || !n.Masquerade || family.Routed() || family.Mode == options.GatewayIsolated {
		return
	}
	to, value := r.sources, ""
	if family.Source.IsValid() && family.Source.Is6() == r.v6 {
		to, value = r.snat, string(registers{}.addr(family.Source))
	}
	for _, s := range n.Subnets {
		if s = s.Masked(); s.Addr().Is6() == r.v6 {
			change(to, s, value)
		}
	}
}

// setForeignBridges replaces the names of other container networks' bridges.
func (r *ruleset) setForeignBridges(names []string) {
	wanted := members{}
	for _, x := range names {
		wanted[linkMember(x)] = ""
	}
	for _, x := range r.elements[setForeign].missing(wanted) {
		r.unset(setForeign, x)
	}
	for _, x := range wanted.missing(r.elements[setForeign]) {
		r.set(setForeign, x, "")
	}
}

// adopt takes over all that the table holds. It lists the bridges.
func (r *ruleset) adopt(have elements) (bridges []string) {
	for _, name := range setNames() {
		if name == setForeign {
			continue
		}
		for x, value := range have[name] {
			c := map[setName]*cover{setSources: r.sources, mapSNAT: r.snat}[name]
			if c == nil {
				r.set(name, x, value)
				if r.left[name] == nil {
					r.left[name] = map[member]struct{}{}
				}
				r.left[name][x] = struct{}{}
				continue
			}
			first, _ := netip.AddrFromSlice([]byte(x.first))
			last, _ := netip.AddrFromSlice([]byte(x.last))
			if p, ok := prefixOf(first, last); ok {
				c.add(p, value)
				r.leftSubnets[c] = append(r.leftSubnets[c], p)
			}
		}
	}
	for x := range have[setBridges] {
		bridges = append(bridges, strings.TrimRight(x.first, "\x00"))
	}
	return bridges
}

// forget drops what is left of a network of this bridge.
func (r *ruleset) forget(bridge string) {
	for _, p := range r.leftHome(bridge) {
		for _, c := range []*cover{r.sources, r.snat} {
			if i := slices.Index(r.leftSubnets[c], p); i >= 0 {
				r.leftSubnets[c] = slices.Delete(r.leftSubnets[c], i, i+1)
				c.remove(p, "")
			}
		}
	}
	for name, list := range r.left {
		for x := range list {
			if shapeOf(name, r.v6).names(x, bridge) {
				r.unset(name, x)
			}
		}
	}
}

// leftHome lists the subnets that are left of a network of this bridge.
func (r *ruleset) leftHome(bridge string) []netip.Prefix {
	var out []netip.Prefix
	home, at := shapeOf(setHome, r.v6), len(linkName(""))
	for x := range r.left[setHome] {
		first, _ := netip.AddrFromSlice([]byte(x.first[at:]))
		last, _ := netip.AddrFromSlice([]byte(x.last[at:]))
		if p, ok := prefixOf(first, last); ok && home.names(x, bridge) {
			out = append(out, p)
		}
	}
	return out
}

// forgetPorts drops what is left of ports of containers of a network, as far as
// its subnets tell. They are n's, or those that are left of it: it is called before
// forget.
func (r *ruleset) forgetPorts(n Network) {
	subnets := slices.Concat(n.Subnets, r.leftHome(n.Bridge))
	width := shapeOf(setSources, r.v6).width(addrField)
	for _, name := range []setName{mapPublished, mapPublishedAt, mapRanges, mapRangesAt, setDirect, setDirectRanges} {
		for x := range r.left[name] {
			container := r.elements[name][x]
			if container == "" {
				container = x.first
			}
			addr, _ := netip.AddrFromSlice([]byte(container[:width]))
			if slices.ContainsFunc(subnets, func(p netip.Prefix) bool { return p.Contains(addr) }) {
				r.unset(name, x)
			}
		}
	}
}

// makeRoom drops what is left of a range of ports that overlaps with e, which the
// kernel would refuse.
func (r *ruleset) makeRoom(e element) {
	const port = 4 // bytes, the last of the key
	for x := range r.left[e.set] {
		at := len(x.first) - port
		if x.last != "" && x.first[:at] == e.first[:at] && x.first <= e.last && e.first <= x.last {
			r.unset(e.set, x)
		}
	}
}

// names says that one of the fields is the name of this link.
func (s shape) names(m member, link string) bool {
	want, at := string(linkName(link)), 0
	for _, f := range s.key {
		end := at + s.padded([]field{f})
		if f == linkField && m.first[at:end] == want {
			return true
		}
		at = end
	}
	return false
}

// forgetAll drops all that is left.
func (r *ruleset) forgetAll() {
	for name, list := range r.left {
		for x := range list {
			r.unset(name, x)
		}
	}
	for c, list := range r.leftSubnets {
		for _, p := range list {
			c.remove(p, "")
		}
	}
	clear(r.leftSubnets)
}

// steps lists what has to be added to a set and removed from it, given what it
// has; an element that leads elsewhere is both. Unless all, only what was touched
// is looked at.
func (r *ruleset) steps(name setName, have members, all bool) (add, remove []member) {
	want := r.elements[name]
	if all {
		return want.missing(have), have.missing(want)
	}
	for x := range r.touched[name] {
		wanted, in := want[x]
		old, there := have[x]
		if in && (!there || old != wanted) {
			add = append(add, x)
		}
		if there && (!in || old != wanted) {
			remove = append(remove, x)
		}
	}
	slices.SortFunc(add, member.compare)
	slices.SortFunc(remove, member.compare)
	return add, remove
}

// settled forgets what has been touched: the kernel has it all.
func (r *ruleset) settled() { r.touched = map[setName]map[member]struct{}{} }
