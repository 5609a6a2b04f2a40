package netplugin

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

// Admin returns the side of the driver that answers operators.
func (d *Driver) Admin() control.Networks { return admin{d} }

// admin answers operators. Its methods have the names of control.Networks, which
// would be those of other things in Driver.
type admin struct{ d *Driver }

// Networks lists all networks.
func (a admin) Networks(context.Context) ([]control.Network, error) {
	var networks []control.Network
	for _, rec := range a.d.store.allNetworks() {
		networks = append(networks, a.network(rec))
	}
	return networks, nil
}

// Network tells about one network.
func (a admin) Network(_ context.Context, id string) (control.Network, error) {
	rec, ok := a.d.store.network(id)
	if !ok {
		return control.Network{}, fault.NotFound("network %s is not known to Berth", short(id))
	}
	return a.network(rec), nil
}

// RemoveNetwork removes a network that Docker has forgotten.
func (a admin) RemoveNetwork(ctx context.Context, id string) error {
	d := a.d
	unlock, err := d.locks.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	rec, ok := d.store.network(id)
	if !ok {
		return fault.NotFound("network %s is not known to Berth", short(id))
	}
	// dockerd lists a network only some time after its driver has made it.
	if age := d.now().Sub(rec.Since); age < settleTime {
		return fault.Conflict("network %s was made %s ago and Docker may not list it yet; try again in %s",
			short(id), age.Round(time.Second), (settleTime - age).Round(time.Second))
	}
	links, err := d.endpointLinks()
	if err != nil {
		return err
	}
	for _, ep := range d.store.endpoints(id) {
		if !d.isGone(ep, links) {
			return fault.Conflict("network %s has a running container: endpoint %s", short(id), short(ep.Spec.ID))
		}
	}
	return d.removeNetwork(ctx, rec)
}

// Endpoints lists the endpoints of one network or of all.
func (a admin) Endpoints(_ context.Context, network string) ([]control.Endpoint, error) {
	networks, links, err := a.look(network)
	if err != nil {
		return nil, err
	}
	var endpoints []control.Endpoint
	for _, id := range networks {
		for _, rec := range a.d.store.endpoints(id) {
			endpoints = append(endpoints, a.endpoint(rec, links))
		}
	}
	return endpoints, nil
}

// Collect removes endpoints whose container is gone.
func (a admin) Collect(ctx context.Context, req control.CollectRequest) (control.CollectReport, error) {
	networks, links, err := a.look(req.Network)
	if err != nil {
		return control.CollectReport{}, err
	}
	report := control.CollectReport{Endpoints: []control.Endpoint{}}
	for _, id := range networks {
		for _, rec := range a.d.store.endpoints(id) {
			// What is half made or half removed is a request's that is running
			// now, or Run's.
			if rec.Phase != phaseReady || !a.d.isGone(rec, links) {
				continue
			}
			if !req.DryRun {
				removed, err := a.collect(ctx, rec)
				if err != nil {
					if report.Failed == nil {
						report.Failed = make(map[string]string)
					}
					report.Failed[rec.Spec.ID] = err.Error()
				}
				if !removed {
					continue
				}
			}
			report.Endpoints = append(report.Endpoints, a.endpoint(rec, links))
		}
	}
	return report, nil
}

// collect removes an endpoint if it is still gone, and tells whether it was.
func (a admin) collect(ctx context.Context, rec endpointRecord) (removed bool, _ error) {
	if err := a.d.removeGone(ctx, rec); err != nil {
		return false, err
	}
	_, there := a.d.store.endpoint(rec.Spec.NetworkID, rec.Spec.ID)
	return !there, nil
}

// look returns the IDs of the networks that are meant, and the links of all
// endpoints.
func (a admin) look(network string) (networks []string, _ map[string]link.Link, _ error) {
	if network == "" {
		for _, rec := range a.d.store.allNetworks() {
			networks = append(networks, rec.Spec.ID)
		}
	} else if _, ok := a.d.store.network(network); ok {
		networks = []string{network}
	} else {
		return nil, nil, fault.NotFound("network %s is not known to Berth", short(network))
	}
	links, err := a.d.endpointLinks()
	return networks, links, err
}

// Findings tells what is not in order although Run tries to mend it.
func (a admin) Findings(context.Context) []control.Finding {
	networks, links, err := a.look("")
	if err != nil {
		return []control.Finding{{ID: "links", Status: control.StatusFail, Summary: fmt.Sprintf("the links of the host cannot be listed: %v", err)}}
	}
	var findings []control.Finding
	gone := 0
	for _, id := range networks {
		if a.d.isBroken(id) {
			findings = append(findings, control.Finding{
				ID: "network-broken", Status: control.StatusFail,
				Summary: fmt.Sprintf("network %s could not be made as it should be", short(id)),
				Detail:  "It is tried again each minute and before its next container; the plugin's log has the reason.",
			})
		}
		for _, rec := range a.d.store.endpoints(id) {
			ep := a.endpoint(rec, links)
			if ep.State == control.EndpointGone {
				gone++
			}
			if ep.PortsMissing {
				findings = append(findings, control.Finding{
					ID: "ports-missing", Status: control.StatusFail,
					Summary: fmt.Sprintf("ports of endpoint %s (%s) are not published: another process has them", short(ep.ID), addressOf(ep)),
					Detail:  "They were published before the daemon started anew. They are tried again each minute; the plugin's log names the port.",
				})
			}
		}
	}
	if gone > 0 {
		findings = append(findings, control.Finding{
			ID: "endpoints-gone", Status: control.StatusWarn,
			Summary: fmt.Sprintf("endpoints without a container, of which Docker did not say so: %d", gone),
			Detail:  fmt.Sprintf("The daemon removes them by itself when that has lasted %s.", collectAfter),
			Cure:    "docker berth endpoint gc",
		})
	}
	if len(findings) == 0 {
		findings = []control.Finding{{ID: "networks", Status: control.StatusOK, Summary: fmt.Sprintf("no network and no published port is broken (networks: %d)", len(networks))}}
	}
	return findings
}

// HostFacts are what the records say about the host, for netplugin/doctor.
type HostFacts struct {
	// Bridges are the names of the networks' bridges.
	Bridges []string
	// Parents are the links that networks on a LAN are on, by name. The value says
	// that containers there have MAC addresses of their own.
	Parents map[string]bool
	// Uplinks are the links by which bridges are on a LAN.
	Uplinks []string
	// IPv6 says that some network has IPv6.
	IPv6 bool
	// PublishedPorts is how many host ports are held.
	PublishedPorts int
	// Leftovers are the names of links of Berth that no record knows.
	Leftovers []string
}

// HostFacts looks through the records and the links.
func (d *Driver) HostFacts() (facts HostFacts, _ error) {
	owned, err := d.links.Owned()
	if err != nil {
		return facts, err
	}
	known := d.owners()
	for _, rec := range d.store.allNetworks() {
		if rec.Spec.Bridge != "" {
			facts.Bridges = append(facts.Bridges, rec.Spec.Bridge)
		}
		if parent := rec.Spec.LAN.Parent; parent != "" {
			if facts.Parents == nil {
				facts.Parents = make(map[string]bool)
			}
			facts.Parents[parent] = facts.Parents[parent] || !rec.Spec.SharesMAC()
		}
		if rec.Spec.Uplink != "" {
			facts.Uplinks = append(facts.Uplinks, rec.Spec.Uplink)
		}
		for _, subnet := range rec.Spec.Subnets {
			facts.IPv6 = facts.IPv6 || subnet.Pool.Addr().Is6()
		}
		for _, ep := range d.store.endpoints(rec.Spec.ID) {
			for _, p := range ep.Spec.Ports {
				if !p.Direct() {
					facts.PublishedPorts += int(p.Count)
				}
			}
		}
	}
	for _, l := range owned {
		if !known[l.Owner] {
			facts.Leftovers = append(facts.Leftovers, l.Name)
		}
	}
	return facts, nil
}

func addressOf(ep control.Endpoint) string {
	for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
		if p.IsValid() {
			return p.Addr().String()
		}
	}
	return ep.MAC
}

// network is the wire form of a record.
func (a admin) network(rec networkRecord) control.Network {
	spec := rec.Spec
	n := control.Network{
		ID: spec.ID, State: control.NetworkState(rec.Phase), Mode: string(spec.Mode),
		Bridge: spec.Bridge, Adopted: spec.Adopted, Uplink: spec.Uplink, SpoofCheck: spec.SpoofCheck, Created: rec.Since,
		Parent: spec.LAN.Parent, LANType: spec.LAN.Type, HostAccess: spec.LAN.HostAccess,
		Subnets:  []control.Subnet{},
		Internal: spec.Internal, ICC: !spec.NoICC, MTU: spec.MTU, Masquerade: spec.Masquerade, InhibitIPv4: spec.InhibitIPv4,
		Publish: control.PublishPolicy{HostFirewall: spec.HostFirewall, Sources: spec.Sources, Trusted: spec.Trusted, NoProxy: spec.NoProxy},
		Routes:  wireRoutes(spec.Routes), RateIn: spec.RateIn, RateOut: spec.RateOut,
	}
	if rec.Phase == phaseReady && a.d.isBroken(spec.ID) {
		n.State = control.NetworkBroken
	}
	for _, subnet := range spec.Subnets {
		n.Subnets = append(n.Subnets, control.Subnet{Pool: subnet.Pool, Gateway: subnet.Gateway})
		if subnet.Pool.Addr().Is4() {
			n.IPv4 = wireFamily(spec.IPv4)
		} else {
			n.IPv6 = wireFamily(spec.IPv6)
		}
	}
	for _, ep := range a.d.store.endpoints(spec.ID) {
		n.Endpoints++
		for _, p := range ep.Spec.Ports {
			n.Ports += int(p.Count)
		}
	}
	return n
}

func wireFamily(f options.Family) control.Family {
	if f.Mode == "" {
		f.Mode = options.GatewayNAT
	}
	return control.Family{GatewayMode: string(f.Mode), Source: f.Source, Binding: f.Binding}
}

func wireRoutes(routes []options.Route) []control.Route {
	var wire []control.Route
	for _, r := range routes {
		wire = append(wire, control.Route{Destination: r.Destination, NextHop: r.NextHop})
	}
	return wire
}

// endpoint is the wire form of a record. links are those of endpointLinks.
func (a admin) endpoint(rec endpointRecord, links map[string]link.Link) control.Endpoint {
	spec := rec.Spec
	ep := control.Endpoint{
		ID: spec.ID, NetworkID: spec.NetworkID, Created: rec.Since,
		MAC: spec.MAC.String(), IPv4: spec.IPv4, IPv6: spec.IPv6,
		HostLink: spec.HostLink, ContainerLink: spec.ContainerLink, ContainerName: spec.ContainerName,
		Routes: wireRoutes(spec.Routes), RateIn: spec.RateIn, RateOut: spec.RateOut,
	}
	switch {
	case rec.Phase != phaseReady:
		ep.State = control.EndpointState(rec.Phase)
	case a.d.isGone(rec, links):
		ep.State = control.EndpointGone
	default:
		ep.State = control.EndpointAlive
	}
	for _, p := range spec.Ports {
		ep.Ports = append(ep.Ports, control.Port{
			NetworkID: spec.NetworkID, EndpointID: spec.ID, Proto: p.Proto.String(),
			HostIP: p.Host, HostPort: p.HostPort, ContainerIP: p.Container, ContainerPort: p.ContainerPort,
			Count: p.Count, Proxied: p.Proxied(),
		})
	}
	a.d.mu.Lock()
	defer a.d.mu.Unlock()
	ep.PortsMissing = a.d.unserved[spec.ID]
	if ep.State == control.EndpointGone {
		ep.GoneSince = a.d.dead[spec.ID]
	}
	return ep
}
