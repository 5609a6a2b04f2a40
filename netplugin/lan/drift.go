package lan

import (
	"fmt"
	"slices"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

// Drift says in words what somebody has changed on the links that networks share, by
// network ID; networks that are as they should be are left out. EnsureNetwork and
// EnsureEndpoint repair it, unless a parent is missing. It takes two requests to the
// kernel and some for each parent with access to the host, and may be called at any
// time; the answer is only true for networks that nobody is changing.
//
// A parent that is down is not among it unless Berth has made it: whoever took it
// down wants it so.
func (m *Mode) Drift(networks []options.Network) (map[string]string, error) {
	links, err := m.links.List()
	if err != nil {
		return nil, err
	}
	byName := make(map[string]link.Link, len(links))
	for _, l := range links {
		byName[l.Name] = l
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	out := map[string]string{}
	onShim := map[string]string{}
	for _, n := range networks {
		if !n.IsLAN() {
			continue
		}
		found := driftOfParent(n, byName)
		if found == "" && n.LAN.HostAccess {
			var looked bool
			if found, looked = onShim[n.LAN.Parent]; !looked {
				if found, err = m.driftOfShim(n.LAN.Parent, byName); err != nil {
					return nil, err
				}
				onShim[n.LAN.Parent] = found
			}
		}
		if found != "" {
			out[n.ID] = found
		}
	}
	return out, nil
}

func driftOfParent(n options.Network, byName map[string]link.Link) string {
	name := parentOf(n)
	l, ok := byName[name]
	base, _, isVLAN := n.LAN.VLAN()
	switch {
	case !ok && n.LAN.Parent == "":
		return fmt.Sprintf("private link %q is missing", name)
	case !ok:
		return fmt.Sprintf("parent %q is missing", name)
	case n.LAN.Parent == "" && l.Owner != link.OfNetwork(n.ID):
		return fmt.Sprintf("private link %q has lost its mark (%s)", name, l.Owner)
	case n.LAN.Parent == "" && !l.Carrier:
		return fmt.Sprintf("private link %q is down", name)
	case isVLAN && l.Owner == link.OfParent(name) && !l.Up && byName[base].Up:
		return fmt.Sprintf("parent %q is down", name)
	}
	return ""
}

// driftOfShim compares the host's link on a parent with what its networks and their
// endpoints want. The caller holds m.mu.
func (m *Mode) driftOfShim(parent string, byName map[string]link.Link) (string, error) {
	networks := m.onShim(parent)
	if len(networks) == 0 {
		return "", nil
	}
	addrs, err := m.parentAddrs(parent)
	if err != nil {
		return "", err
	}
	want := planShim(parent, networks, addrs)
	l, ok := byName[want.Name]
	switch {
	case !ok:
		return fmt.Sprintf("link %q for access to the host is missing", want.Name), nil
	case l.Owner != want.Owner:
		return fmt.Sprintf("link %q for access to the host has lost its mark (%s)", want.Name, l.Owner), nil
	case l.Peer != byName[parent].Index:
		return fmt.Sprintf("link %q for access to the host is not on parent %q", want.Name, parent), nil
	case !l.Up && byName[parent].Up:
		return fmt.Sprintf("link %q for access to the host is down", want.Name), nil
	case want.MAC != nil && l.MAC.String() != want.MAC.String():
		return fmt.Sprintf("link %q for access to the host has MAC address %s instead of %s", want.Name, l.MAC, want.MAC), nil
	}
	have, err := m.links.Addrs(want.Name)
	if err != nil {
		return "", err
	}
	for _, p := range want.Addrs {
		if !slices.Contains(have, p) {
			return fmt.Sprintf("link %q for access to the host lacks address %s", want.Name, p.Addr()), nil
		}
	}
	if want.IPv6 {
		proxied, err := m.links.Proxied(l)
		if err != nil {
			return "", err
		}
		if !slices.Equal(proxied, want.Proxied) {
			return fmt.Sprintf("link %q for access to the host answers for %v instead of %v", want.Name, proxied, want.Proxied), nil
		}
	}
	routes, err := m.links.HostRoutes(l)
	if err != nil {
		return "", err
	}
	for _, n := range networks {
		for _, ep := range m.endpoints[n.ID] {
			for _, r := range hostRoutes(n, ep, addrs) {
				if !slices.Contains(routes, r) {
					return fmt.Sprintf("link %q for access to the host lacks the route to %s", want.Name, r.To), nil
				}
			}
		}
	}
	return "", nil
}
