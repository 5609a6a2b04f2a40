package bridge

import (
	"context"
	"errors"
	"net/netip"

	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/hostport"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

func target(n options.Network, ep options.Endpoint) hostport.Target {
	return hostport.Target{
		Endpoint: ep.ID, Network: n, Addr4: ep.IPv4.Addr(), Addr6: ep.IPv6.Addr(), NoProxy6to4: ep.NoProxy6to4,
	}
}

// ReservePorts picks and holds the host ports that an endpoint is to publish.
func (m *Mode) ReservePorts(ctx context.Context, n options.Network, ep options.Endpoint, want []options.PortRequest) ([]options.PublishedPort, error) {
	return m.ports.Reserve(ctx, target(n, ep), want)
}

// EnsurePorts makes the endpoint's ports work, or brings them back. Where a port
// has been taken by another process meanwhile, all others work.
func (m *Mode) EnsurePorts(ctx context.Context, n options.Network, ep options.Endpoint) error {
	// The rules first: the proxy would answer what the rules would carry better, and
	// they keep others than the host from what RouteLocalnet opens.
	err := m.fw.Publish(ctx, firewall.Endpoint{ID: ep.ID, Bridge: n.Bridge, Ports: ep.Ports})
	if err != nil {
		return err
	}
	if onLoopback(n, ep) {
		if err := m.fw.RouteLocalnet(n.Bridge); err != nil {
			return err
		}
	}
	if err := m.links.SetPort(ep.HostLink, link.OfEndpoint(ep.ID), port(n, ep, m.bridgedFiltered())); err != nil {
		return err
	}
	m.forgetFlows(link.Flows{Forwarded: forwards(ep)})
	return m.ports.Serve(ctx, target(n, ep), ep.Ports)
}

// RemovePorts ends the publishing of the endpoint's ports. An endpoint without any
// is success.
func (m *Mode) RemovePorts(ctx context.Context, n options.Network, ep options.Endpoint) error {
	err := m.fw.Unpublish(ctx, ep.ID)
	silent := ep
	silent.Ports = nil
	err = errors.Join(err, m.links.SetPort(ep.HostLink, link.OfEndpoint(ep.ID), port(n, silent, m.bridgedFiltered())))
	m.ports.Release(ep.ID)
	if err == nil {
		m.forgetFlows(link.Flows{Answered: answers(ep)})
	}
	return errors.Join(ctx.Err(), err)
}

// forgetFlows ends flows that would go on past the rules. Without it their clients
// are not served until they have been silent for a while.
func (m *Mode) forgetFlows(flows link.Flows) {
	if len(flows.Answered)+len(flows.Forwarded) == 0 {
		return
	}
	if _, err := m.links.ForgetFlows(flows); err != nil {
		m.log.WithError(err).Warn("flows of UDP and SCTP to published ports could not be forgotten: clients that knew the last container may wait")
	}
}

// onLoopback reports whether the rules carry packets from the host's own 127.0.0.1
// to the endpoint.
func onLoopback(n options.Network, ep options.Endpoint) bool {
	if n.Internal || n.IPv4.Routed() || n.IPv4.Mode == options.GatewayIsolated {
		return false
	}
	for _, p := range ep.Ports {
		if p.Host.Is4() && p.Container.Is4() && (p.Host.IsUnspecified() || p.Host.IsLoopback()) {
			return true
		}
	}
	return false
}

// isFlow reports whether the kernel may take new packets for part of an old flow:
// the protocol has no start that it could tell.
func isFlow(p options.PublishedPort) bool { return p.Proto == options.UDP || p.Proto == options.SCTP }

// forwards are the published ports whose older flows are to be forgotten.
func forwards(ep options.Endpoint) []link.Forward {
	var out []link.Forward
	for _, p := range ep.Ports {
		if !isFlow(p) || p.Direct() || p.Proxied() {
			continue
		}
		out = append(out, link.Forward{
			Proto: uint8(p.Proto), Host: p.Host, HostPort: p.HostPort, Container: p.Container, Port: p.ContainerPort, Count: p.Count,
		})
	}
	return out
}

// answers are the addresses of the endpoint that flows to its ports lead to.
func answers(ep options.Endpoint) []netip.Addr {
	var out []netip.Addr
	for _, p := range ep.Ports {
		if isFlow(p) && (len(out) == 0 || out[len(out)-1] != p.Container) {
			out = append(out, p.Container)
		}
	}
	return out
}
