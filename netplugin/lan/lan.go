// Package lan attaches containers to a segment that the host is on: macvlan and
// ipvlan links on a parent of the host's, the VLAN sub-interface that this may be,
// and the host's own link beside the containers'. A network without a parent gets a
// private link instead, which leads nowhere.
//
// What the networks on one parent share, the VLAN and the host's link, carries the
// mark of the parent (link.OfParent), is made by the first of them and removed with
// the last. A VLAN without that mark is somebody else's, is used as it is, and stays.
//
// It keeps no records: what it remembers of networks and endpoints is what it was
// asked to make or restore since it was started, so that it knows who else uses a
// parent. Addresses and routes inside the container are dockerd's work, and the
// gateway is a router of the LAN. A container's link has no other end on the host:
// where it is when dockerd has moved it is found by its mark (link.Handle.Elsewhere).
package lan

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin/apply"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

// A Mode makes and removes macvlan and ipvlan networks. It is safe for concurrent
// use, except that calls for one network must come one after the other.
type Mode struct {
	links *link.Handle
	log   *logrus.Entry

	mu sync.Mutex
	// networks are those that were ensured or restored, by ID. mu is held while
	// what they share on a parent is changed. Guarded by mu.
	networks map[string]options.Network
	// endpoints are those that were ensured or restored, by network ID and their
	// own. Guarded by mu.
	endpoints map[string]map[string]options.Endpoint
	// restored says that an endpoint that is not among them is a new one. Guarded
	// by mu.
	restored bool
}

// New makes a Mode that works in the network namespace of links.
func New(links *link.Handle) *Mode {
	return &Mode{
		links:     links,
		log:       logrus.NewEntry(logrus.StandardLogger()),
		networks:  make(map[string]options.Network),
		endpoints: make(map[string]map[string]options.Endpoint),
	}
}

// SetLog makes log receive what cannot be done and fails nothing, instead of the
// standard logger. It comes before all other calls.
func (m *Mode) SetLog(log *logrus.Entry) { m.log = log }

// EnsureNetwork makes what the network's endpoints share, or repairs it. When it
// fails, what this call has made is gone again, and what was there before stays. A
// parent that does not exist is a fault.NotFound; one that cannot be used, or that
// another network uses in a way that this one cannot share, a fault.Conflict.
func (m *Mode) EnsureNetwork(ctx context.Context, n options.Network) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	before, known := m.networks[n.ID]
	m.networks[n.ID] = n
	err := apply.Run(ctx, planNetwork(n), m.do)
	if err != nil {
		if delete(m.networks, n.ID); known {
			m.networks[n.ID] = before
		}
	}
	return err
}

// RemoveNetwork takes the network away, with the links of endpoints that are left on
// it, and what it shared on a parent if no other network does. An unknown network is
// success.
func (m *Mode) RemoveNetwork(ctx context.Context, n options.Network) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for _, ep := range m.endpoints[n.ID] {
		errs = append(errs, m.removeEndpoint(n, ep))
	}
	delete(m.networks, n.ID)
	delete(m.endpoints, n.ID)
	if n.LAN.Parent == "" {
		name, _ := options.PrivateLinks(n.ID)
		return errors.Join(append(errs, m.links.Delete(name, link.OfNetwork(n.ID)))...)
	}
	if n.LAN.HostAccess {
		errs = append(errs, m.leaveShim(n.LAN.Parent))
	}
	return errors.Join(append(errs, m.leaveParent(n.LAN.Parent))...)
}

// EnsureEndpoint makes the link of an endpoint or repairs it; the network exists. The
// link waits on the host, down, for dockerd to move it; one that has moved already
// is left alone. A parent that is missing or down is waited for for some seconds, as
// it may be after a boot. Failure and conflicts are as for EnsureNetwork.
func (m *Mode) EnsureEndpoint(ctx context.Context, n options.Network, ep options.Endpoint) error {
	if err := apply.Run(ctx, planEndpoint(n, ep), m.do); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.remember(ep)
	return nil
}

func (m *Mode) remember(ep options.Endpoint) {
	if m.endpoints[ep.NetworkID] == nil {
		m.endpoints[ep.NetworkID] = make(map[string]options.Endpoint)
	}
	m.endpoints[ep.NetworkID][ep.ID] = ep
}

// RemoveEndpoint removes the endpoint's link, wherever dockerd has put it, and the
// host's routes to it. An unknown endpoint is success.
func (m *Mode) RemoveEndpoint(ctx context.Context, n options.Network, ep options.Endpoint) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.removeEndpoint(n, ep); err != nil {
		return err
	}
	delete(m.endpoints[n.ID], ep.ID)
	return nil
}

func (m *Mode) removeEndpoint(n options.Network, ep options.Endpoint) error {
	var errs []error
	if n.LAN.HostAccess {
		for _, addr := range addresses(ep) {
			errs = append(errs, m.links.DeleteHostRoute(options.ShimName(n.LAN.Parent), addr))
		}
	}
	return errors.Join(append(errs, m.links.DeleteAnywhere(ep.ContainerLink, link.OfEndpoint(ep.ID)))...)
}

// Restore notes the networks and endpoints that there are, and removes VLAN
// sub-interfaces and links for access to the host that none of them uses. It is for
// the start, before the networks are ensured one by one.
func (m *Mode) Restore(ctx context.Context, networks []options.Network, endpoints []options.Endpoint) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.networks)
	clear(m.endpoints)
	for _, n := range networks {
		if n.IsLAN() {
			m.networks[n.ID] = n
		}
	}
	for _, ep := range endpoints {
		if _, ok := m.networks[ep.NetworkID]; ok {
			m.remember(ep)
		}
	}
	m.restored = true
	owned, err := m.links.Owned()
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range owned {
		// A VLAN that is a port of a bridge is the bridge's uplink.
		if l.Owner.Parent == "" || l.Kind == "vlan" && l.Master != 0 || l.Kind == "vlan" && m.uses(l.Owner.Parent) || l.Kind != "vlan" && len(m.onShim(l.Owner.Parent)) > 0 {
			continue
		}
		errs = append(errs, m.links.Delete(l.Name, l.Owner))
	}
	return errors.Join(errs...)
}

// do does one step, for apply.Run.
func (m *Mode) do(ctx context.Context, s step) (inverse apply.Inverse, err error) {
	switch s := s.(type) {
	case ensurePrivate:
		created, err := m.links.EnsurePrivate(link.Private{Name: s.name, Peer: s.peer, NetworkID: s.networkID, MAC: s.mac, MTU: s.mtu})
		return m.deletes(created, s.name, link.OfNetwork(s.networkID)), err
	case ensureVLAN:
		created, err := m.links.EnsureVLAN(s.name, s.base, s.id)
		return m.deletes(created, s.name, link.OfParent(s.name)), err
	case checkParent:
		_, err := m.usableParent(s.network)
		return nil, err
	case ensureShim:
		shim, err := m.shim(s.parent)
		if err != nil {
			return nil, err
		}
		created, err := m.links.EnsureShim(shim)
		return m.deletes(created, shim.Name, shim.Owner), err
	case ensureLink:
		created, err := m.ensureLink(ctx, s)
		return m.deletes(created, s.Name, s.Owner), err
	case ensureRoutes:
		return m.ensureRoutes(s)
	default:
		return nil, fmt.Errorf("no way to do step %T", s)
	}
}

// deletes is the inverse of making a link.
func (m *Mode) deletes(created bool, name string, owner link.Owner) apply.Inverse {
	if !created {
		return nil
	}
	return func(context.Context) error { return m.links.Delete(name, owner) }
}

// ensureLink makes an endpoint's link unless it has moved into a container.
func (m *Mode) ensureLink(ctx context.Context, s ensureLink) (created bool, err error) {
	l, ok, err := m.links.Get(s.Name)
	if err != nil {
		return false, err
	}
	if !ok || l.Owner != s.Owner {
		m.mu.Lock()
		_, known := m.endpoints[s.networkID][s.Owner.Endpoint]
		look := known || !m.restored
		m.mu.Unlock()
		if look {
			if _, moved, err := m.links.ElsewhereOf(s.Owner); err != nil || moved {
				return false, err
			}
		}
		if err := m.await(ctx, s.Parent); err != nil {
			return false, err
		}
		if err := m.checkFree(s.Parent, s.addrs); err != nil {
			return false, err
		}
	}
	created, err = m.links.EnsureChild(s.Child)
	if created && err == nil && s.MAC != nil {
		m.announce(s)
	}
	return created, err
}

// announce tells the LAN, and the containers beside it where something reaches them,
// which MAC address the addresses have from now on: somebody may remember another
// container's. Engines from 28 do so themselves, once the link is up.
func (m *Mode) announce(s ensureLink) {
	for _, name := range []string{s.Parent, m.AccessLink(s.Parent)} {
		if name == "" {
			continue
		}
		if err := m.links.AnnounceBy(name, s.MAC, s.addrs); err != nil {
			m.log.WithError(err).WithField("endpoint", s.Owner.Endpoint).Warn("neighbours could not be told of a container's address")
		}
	}
}
