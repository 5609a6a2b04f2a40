// Package bridge attaches containers to a Linux bridge of their network: the
// bridge with the gateway's addresses, a veth pair per endpoint, and the rules
// that let the network out and keep others away. The bridge may also be one that
// was there before (see Mode.Adopt); it then keeps what it had.
//
// It keeps no records: everything it needs is in the specs, so that the same call
// makes, repairs and, after a reboot, rebuilds. Addresses and routes inside the
// container are dockerd's work.
package bridge

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/apply"
	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/hostport"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

// A Mode makes and removes bridge networks. It is safe for concurrent use, except
// that calls for one network must come one after the other.
type Mode struct {
	links *link.Handle
	fw    *firewall.Manager
	ports *hostport.Manager
	log   *logrus.Entry
	news  *news

	mu sync.Mutex
	// filtered is what bridgedFiltered answers, once looked says that it is known.
	// Guarded by mu.
	filtered, looked bool
}

// New makes a Mode that works in the network namespace of links, fw and ports.
func New(links *link.Handle, fw *firewall.Manager, ports *hostport.Manager) *Mode {
	return &Mode{links: links, fw: fw, ports: ports, log: logrus.NewEntry(logrus.StandardLogger()), news: newNews()}
}

// SetLog makes log receive what cannot be done and fails nothing, instead of the
// standard logger. It comes before all other calls.
func (m *Mode) SetLog(log *logrus.Entry) { m.log = log }

// EnsureNetwork makes the network or repairs it. When it fails, what this call
// has made is gone again, and what was there before stays. A bridge name that
// belongs to somebody else is a fault.Conflict, an adopted bridge that is gone a
// fault.NotFound.
func (m *Mode) EnsureNetwork(ctx context.Context, n options.Network) error {
	return apply.Run(ctx, planNetwork(n), m.do)
}

// RemoveNetwork takes the network away, with the links and ports of endpoints that
// are left on it. Of an adopted bridge all stays that is not Berth's. An unknown
// network is success.
func (m *Mode) RemoveNetwork(ctx context.Context, n options.Network) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	errs := []error{m.releasePorts(n)}
	// All is tried: what is left is of no use.
	if n.Adopted {
		// What turned it on, and the rules that made it safe, are gone.
		errs = append(errs, m.links.RouteLocalnet(n.Bridge, false), m.links.LeaveBridge(n.Bridge, n.AdoptedAddrs))
	} else {
		errs = append(errs, m.unplugUplink(n), m.links.DeleteBridge(n.Bridge, n.ID))
	}
	return errors.Join(append(errs, m.fw.Remove(ctx, n.Bridge))...)
}

// releasePorts lets go of the host ports of endpoints that are left on the bridge.
func (m *Mode) releasePorts(n options.Network) error {
	l, ok, err := m.links.Get(n.Bridge)
	if err != nil || !ok || !n.Adopted && l.Owner != link.OfNetwork(n.ID) {
		return err
	}
	ports, err := m.links.Ports(l)
	for _, port := range ports {
		if port.Owner.Endpoint != "" {
			m.ports.Release(port.Owner.Endpoint)
			m.news.forget(port.Owner.Endpoint)
		}
	}
	return err
}

// EnsureEndpoint makes the pair of links of an endpoint or repairs it; the
// network exists. The container's end waits on the host, down, for dockerd to
// move it. Failure and conflicts are as for EnsureNetwork.
func (m *Mode) EnsureEndpoint(ctx context.Context, n options.Network, ep options.Endpoint) error {
	return apply.Run(ctx, planEndpoint(n, ep, m.bridgedFiltered()), m.do)
}

// RemoveEndpoint ends what the endpoint publishes and removes the pair of links by
// its host's end, wherever dockerd has put the other one. An unknown endpoint is success.
func (m *Mode) RemoveEndpoint(ctx context.Context, n options.Network, ep options.Endpoint) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.news.forget(ep.ID)
	var err error
	if len(ep.Ports) > 0 {
		err = m.RemovePorts(ctx, n, ep)
	}
	return errors.Join(err, m.links.Delete(ep.HostLink, link.OfEndpoint(ep.ID)))
}

// Restore brings the rules of all networks to the host in one go, and removes
// those of networks that are not among them. It is for the start, before the
// networks are ensured one by one: their traffic goes on meanwhile.
func (m *Mode) Restore(ctx context.Context, networks []options.Network, endpoints []options.Endpoint) error {
	rules := make([]firewall.Network, 0, len(networks))
	bridges := make(map[string]string, len(networks))
	for _, n := range networks {
		rules = append(rules, FirewallNetwork(n))
		bridges[n.ID] = n.Bridge
	}
	var ports []firewall.Endpoint
	for _, ep := range endpoints {
		if bridge := bridges[ep.NetworkID]; bridge != "" && len(ep.Ports) > 0 {
			ports = append(ports, firewall.Endpoint{ID: ep.ID, Bridge: bridge, Ports: ep.Ports})
		}
	}
	return m.fw.Sync(ctx, rules, ports)
}

// do does one step, for apply.Run.
func (m *Mode) do(ctx context.Context, s step) (inverse apply.Inverse, err error) {
	switch s := s.(type) {
	case checkForwarding:
		return nil, m.fw.CheckForwarding(s.network)
	case enableForwarding:
		// Not undone: from here on others may rely on it.
		return nil, m.fw.EnableForwarding(ctx, s.network)
	case ensureRules:
		added, err := m.fw.Ensure(ctx, s.network)
		if added {
			inverse = func(ctx context.Context) error { return m.fw.Remove(ctx, s.network.Bridge) }
		}
		return inverse, err
	case ensureBridge:
		created, err := m.links.EnsureBridge(s.Bridge)
		if created {
			inverse = func(context.Context) error { return m.links.Delete(s.Name, link.OfNetwork(s.NetworkID)) }
		}
		return inverse, err
	case plugUplink:
		return m.plugUplink(s.network)
	case setAddrs:
		return nil, m.links.SetAddrs(s.link, s.addrs)
	case adoptBridge:
		added, err := m.links.AdoptBridge(s.link, s.addrs)
		if len(added) > 0 {
			inverse = func(context.Context) error { return m.links.RemoveAddrs(s.link, added) }
		}
		return inverse, err
	case ensureVeth:
		created, err := m.links.EnsureVeth(s.Veth)
		if created {
			m.news.expect(link.Announcement{Bridge: s.Master, EndpointID: s.EndpointID, MAC: s.MAC, Addrs: s.addrs})
			inverse = func(context.Context) error {
				m.news.forget(s.EndpointID)
				return m.links.Delete(s.Host, link.OfEndpoint(s.EndpointID))
			}
		}
		return inverse, err
	default:
		return nil, fmt.Errorf("no way to do step %T", s)
	}
}
