package firewall

import (
	"context"
	"maps"
	"net/netip"
	"slices"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// An Endpoint is what the rules need to know of an endpoint that publishes ports.
type Endpoint struct {
	ID string
	// Bridge is that of its network.
	Bridge string
	// Ports of which only the proxy carries the traffic need no rules.
	Ports []options.PublishedPort
}

// Publish makes the endpoint's ports work, in the place of those it had. A host
// port that another endpoint has is a fault.Conflict, a network that is not known a
// fault.NotFound; either changes nothing. The cost depends on the endpoint's ports
// only, not on what else is published.
func (m *Manager) Publish(ctx context.Context, ep Endpoint) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := m.adoptLocked(); err != nil {
		return err
	}
	ep, err := checked(ep)
	if err != nil {
		return err
	}
	if _, ok := m.networks[ep.Bridge]; !ok {
		return fault.NotFound("no network has bridge %q", ep.Bridge)
	}
	if err := m.claims.check(ep, m.trustedLocked(ep)); err != nil {
		return err
	}
	before := m.endpoints[ep.ID]
	m.dropEndpointLocked(ep.ID)
	m.putEndpointLocked(ep)
	if err := m.applyPortsLocked(ctx); err != nil {
		if m.dropEndpointLocked(ep.ID); before != nil {
			m.putEndpointLocked(*before)
		}
		return err
	}
	return nil
}

// Unpublish takes the endpoint's ports away; unknown ones are success. Connections
// that are established go on as long as the container lives.
func (m *Manager) Unpublish(ctx context.Context, endpoint string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := m.adoptLocked(); err != nil {
		return err
	}
	before := m.endpoints[endpoint]
	if before == nil {
		return nil
	}
	m.dropEndpointLocked(endpoint)
	err := m.applyPortsLocked(ctx)
	if err != nil {
		m.putEndpointLocked(*before)
	}
	return err
}

// checked is the endpoint with a list of ports of its own.
func checked(ep Endpoint) (Endpoint, error) {
	ep.Ports = slices.Clone(ep.Ports)
	for i := range ep.Ports {
		p := &ep.Ports[i]
		p.Host, p.Container = p.Host.Unmap().WithZone(""), p.Container.Unmap().WithZone("")
		last := max(int(p.ContainerPort), int(p.HostPort)) + int(p.Count) - 1
		if !p.Container.IsValid() || p.Count == 0 || p.ContainerPort == 0 || !p.Direct() && p.HostPort == 0 || last > 0xffff {
			return ep, fault.Invalid("published port %s: want an address of the container and ports between 1 and 65535", *p)
		}
	}
	return ep, nil
}

func (m *Manager) putEndpointLocked(ep Endpoint) {
	own := &ep
	m.endpoints[ep.ID] = own
	if m.byBridge[ep.Bridge] == nil {
		m.byBridge[ep.Bridge] = map[string]*Endpoint{}
	}
	m.byBridge[ep.Bridge][ep.ID] = own
	m.claims.add(own, m.trustedLocked(ep))
	for _, s := range m.sides() {
		for _, e := range s.want.ports(ep, m.trustedLocked(ep)) {
			s.want.makeRoom(e)
			s.want.set(e.set, e.member, e.value)
		}
	}
}

func (m *Manager) dropEndpointLocked(id string) {
	ep := m.endpoints[id]
	if ep == nil {
		return
	}
	delete(m.endpoints, id)
	if delete(m.byBridge[ep.Bridge], id); len(m.byBridge[ep.Bridge]) == 0 {
		delete(m.byBridge, ep.Bridge)
	}
	m.claims.remove(ep, m.trustedLocked(*ep))
	for _, s := range m.sides() {
		for _, e := range s.want.ports(*ep, m.trustedLocked(*ep)) {
			s.want.unset(e.set, e.member)
		}
	}
}

// trustedLocked says that the endpoint's network has trusted links.
func (m *Manager) trustedLocked(ep Endpoint) bool { return len(m.networks[ep.Bridge].Trusted) > 0 }

// endpointsOf are those of a bridge.
func (m *Manager) endpointsOf(bridge string) []Endpoint {
	var out []Endpoint
	for _, ep := range m.byBridge[bridge] {
		out = append(out, *ep)
	}
	return out
}

// replaceEndpointsLocked puts these endpoints in the place of all others. Of two
// that have the same port, the first keeps it.
func (m *Manager) replaceEndpointsLocked(list []Endpoint) {
	for id := range maps.Clone(m.endpoints) {
		m.dropEndpointLocked(id)
	}
	for _, ep := range list {
		if _, ok := m.networks[ep.Bridge]; !ok {
			m.log.WithField("endpoint", ep.ID).Errorf("no network has bridge %q; ports are not published", ep.Bridge)
			continue
		}
		ep, err := checked(ep)
		if err == nil {
			err = m.claims.check(ep, m.trustedLocked(ep))
		}
		if err != nil {
			m.log.WithField("endpoint", ep.ID).WithError(err).Error("published ports do not go together; the others work")
			ep = m.withoutConflicts(ep)
		}
		m.dropEndpointLocked(ep.ID)
		m.putEndpointLocked(ep)
	}
}

// withoutConflicts keeps those ports that the endpoint can have.
func (m *Manager) withoutConflicts(ep Endpoint) Endpoint {
	out := Endpoint{ID: ep.ID, Bridge: ep.Bridge}
	for _, p := range ep.Ports {
		try, err := checked(Endpoint{ID: ep.ID, Bridge: ep.Bridge, Ports: append(slices.Clone(out.Ports), p)})
		if err == nil && m.claims.check(try, m.trustedLocked(ep)) == nil {
			out = try
		}
	}
	return out
}

// applyPortsLocked is applyLocked where only ports have changed, which are nothing to
// the chains of others.
func (m *Manager) applyPortsLocked(ctx context.Context) error {
	if m.wholeLocked() && m.writeUnreadLocked() {
		return nil
	}
	return m.applyLocked(ctx, false)
}

// ports lists the elements of an endpoint in one family. trusted says that its
// network has trusted links.
func (r *ruleset) ports(ep Endpoint, trusted bool) []element {
	var out []element
	for _, p := range ep.Ports {
		if p.Direct() || p.Proxied() || p.Host.Is6() != r.v6 || p.Host == netip.IPv6Loopback() {
			continue
		}
		out = append(out, hostPorts(p)...)
	}
	for _, s := range directSpans(ep, trusted) {
		if s.addr.Is6() != r.v6 {
			continue
		}
		first := registers{}.addr(s.addr).proto(s.proto).port(uint16(s.first))
		if s.first == s.last {
			out = append(out, element{set: setDirect, member: member{first: string(first)}})
			continue
		}
		last := registers{}.addr(s.addr).proto(s.proto).port(uint16(s.last))
		out = append(out, element{set: setDirectRanges, member: member{string(first), string(last)}})
	}
	return out
}

// hostPorts lists the elements that translate published ports. Those that keep
// their numbers are one.
func hostPorts(p options.PublishedPort) []element {
	single, ranges, key := mapPublished, mapRanges, registers{}
	if !p.Host.IsUnspecified() {
		single, ranges, key = mapPublishedAt, mapRangesAt, key.addr(p.Host)
	}
	key = slices.Clip(key.proto(p.Proto))
	if p.Count > 1 && p.HostPort == p.ContainerPort {
		return []element{{
			set:    ranges,
			member: member{string(key.port(p.HostPort)), string(key.port(p.HostPort + p.Count - 1))},
			value:  string(registers{}.addr(p.Container)),
		}}
	}
	out := make([]element, p.Count)
	for i := range p.Count {
		out[i] = element{
			set:    single,
			member: member{first: string(key.port(p.HostPort + i))},
			value:  string(registers{}.addr(p.Container).port(p.ContainerPort + i)),
		}
	}
	return out
}
