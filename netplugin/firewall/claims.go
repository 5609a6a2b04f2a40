package firewall

import (
	"net/netip"
	"slices"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// Claims say which endpoint has which port, in pages of 256, so that neither one
// port nor a range of all of them is dear. The address of a claim is the host's, or
// the container's where direct.
type claims map[claim]*page

type claim struct {
	addr   netip.Addr
	proto  options.Proto
	direct bool
	page   uint8
}

type page struct {
	owners [256]*Endpoint
	used   int
}

// A span is ports in a row that an endpoint claims.
type span struct {
	claim
	first, last int
}

// spansOf lists what an endpoint claims. The same port of a container may be
// published several times, but is claimed once. trusted says that all may be
// reached by the container's address.
func spansOf(ep Endpoint, trusted bool) []span {
	var out []span
	for _, p := range ep.Ports {
		if !p.Direct() {
			out = append(out, span{claim{addr: p.Host, proto: p.Proto}, int(p.HostPort), int(p.HostPort) + int(p.Count) - 1})
		}
	}
	return append(out, directSpans(ep, trusted)...)
}

// directSpans lists the ports of the container that are reached by its address,
// each once.
func directSpans(ep Endpoint, trusted bool) []span {
	var all []span
	for _, p := range ep.Ports {
		if p.Direct() || trusted && !p.Proxied() {
			all = append(all, span{claim{addr: p.Container, proto: p.Proto, direct: true}, int(p.ContainerPort), int(p.ContainerPort) + int(p.Count) - 1})
		}
	}
	slices.SortFunc(all, func(a, b span) int {
		if c := a.addr.Compare(b.addr); c != 0 {
			return c
		}
		if a.proto != b.proto {
			return int(a.proto) - int(b.proto)
		}
		return a.first - b.first
	})
	var out []span
	for _, s := range all {
		if i := len(out) - 1; i >= 0 && out[i].claim == s.claim && s.first <= out[i].last {
			out[i].last = max(out[i].last, s.last)
			continue
		}
		out = append(out, s)
	}
	return out
}

// ports calls do for each port of the spans, until it returns an error.
func (c claims) ports(spans []span, do func(at claim, port int) error) error {
	for _, s := range spans {
		for port := s.first; port <= s.last; port++ {
			at := s.claim
			at.page = uint8(port >> 8)
			if err := do(at, port); err != nil {
				return err
			}
		}
	}
	return nil
}

// owner is who has a port, nil if nobody.
func (c claims) owner(at claim, port int) *Endpoint {
	if p := c[at]; p != nil {
		return p.owners[port&0xff]
	}
	return nil
}

// check says whether the endpoint could have its ports, in the place of those of
// the endpoint of the same ID.
func (c claims) check(ep Endpoint, trusted bool) error {
	seen := claims{}
	return c.ports(spansOf(ep, trusted), func(at claim, port int) error {
		if !at.direct {
			if seen.owner(at, port) != nil {
				return fault.Conflict("endpoint %s publishes %s port %d of address %s twice", ep.ID, at.proto, port, at.addr)
			}
			seen.put(at, port, &ep)
		}
		switch owner := c.owner(at, port); {
		case owner == nil || owner.ID == ep.ID:
			return nil
		case at.direct:
			return fault.Conflict("%s port %d of container address %s is published by endpoint %s already", at.proto, port, at.addr, owner.ID)
		default:
			return fault.Conflict("%s port %d of address %s is published by endpoint %s already", at.proto, port, at.addr, owner.ID)
		}
	})
}

func (c claims) put(at claim, port int, ep *Endpoint) {
	p := c[at]
	if p == nil {
		p = &page{}
		c[at] = p
	}
	if p.owners[port&0xff] == nil {
		p.used++
	}
	p.owners[port&0xff] = ep
}

// add notes the ports of an endpoint, which check has allowed.
func (c claims) add(ep *Endpoint, trusted bool) {
	_ = c.ports(spansOf(*ep, trusted), func(at claim, port int) error {
		c.put(at, port, ep)
		return nil
	})
}

// remove takes back what add has noted.
func (c claims) remove(ep *Endpoint, trusted bool) {
	_ = c.ports(spansOf(*ep, trusted), func(at claim, port int) error {
		p := c[at]
		if p == nil || p.owners[port&0xff] == nil {
			return nil
		}
		p.owners[port&0xff] = nil
		if p.used--; p.used == 0 {
			delete(c, at)
		}
		return nil
	})
}
