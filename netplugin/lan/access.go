package lan

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/berth-plugin/berth/netplugin/apply"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// onShim are the networks that want access to the host on a parent, in a fixed
// order. The caller holds m.mu.
func (m *Mode) onShim(parent string) []options.Network {
	var out []options.Network
	for _, n := range m.networks {
		if n.LAN.HostAccess && n.LAN.Parent == parent {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b options.Network) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// shim is the host's link on a parent as it should be. The caller holds m.mu.
func (m *Mode) shim(parent string) (link.Shim, error) {
	addrs, err := m.links.Addrs(parent)
	if err != nil {
		return link.Shim{}, err
	}
	return planShim(parent, m.onShim(parent), addrs), nil
}

// leaveShim removes the host's link on a parent, or what only a network that is gone
// has wanted of it. The caller holds m.mu.
func (m *Mode) leaveShim(parent string) error {
	if len(m.onShim(parent)) == 0 {
		err := m.links.Delete(options.ShimName(parent), link.OfParent(parent))
		if errdefs.IsConflict(err) {
			return nil // Somebody else's by that name, so ours is gone.
		}
		return err
	}
	shim, err := m.shim(parent)
	if err == nil {
		_, err = m.links.EnsureShim(shim)
	}
	if errdefs.IsNotFound(err) {
		return nil // It went with its parent.
	}
	if err != nil {
		return err
	}
	// The kernel has removed them all if the last address of the link went.
	for _, n := range m.onShim(parent) {
		for _, ep := range m.endpoints[n.ID] {
			if _, err := m.ensureRoutes(ensureRoutes{n, ep}); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkAccess says whether the host has an address for the containers of each subnet.
func (m *Mode) checkAccess(n options.Network) error {
	addrs, err := m.parentAddrs(n.LAN.Parent)
	if err != nil {
		return err
	}
	careful, err := m.carefulOfARP()
	if err != nil {
		return err
	}
	for _, subnet := range n.Subnets {
		own := n.LAN.HostAddrIn(subnet).IsValid()
		if careful && !own && n.Mode == options.ModeMacvlan && subnet.Pool.Addr().Is4() {
			return fault.Invalid("option host-access: sysctl net.ipv4.conf.all.arp_ignore keeps the host from answering containers in subnet %s by its address on parent %q: give it one of its own with host-access=ADDRESS, which then nobody else may have",
				subnet.Pool, n.LAN.Parent)
		}
		if hostAddr(n, subnet, addrs).IsValid() {
			continue
		}
		if n.LAN.Type == options.IPvlanL2 {
			return fault.Invalid("option host-access: the host has no address in subnet %s: with ipvlan_mode=l2 it needs one of its own there, give it with host-access=ADDRESS", subnet.Pool)
		}
		return fault.Invalid("option host-access: parent %q has no address in subnet %s: give the host one there with host-access=ADDRESS, which then nobody else may have", n.LAN.Parent, subnet.Pool)
	}
	return nil
}

// carefulOfARP reports whether the host answers ARP only for addresses on the link
// that the question came by.
func (m *Mode) carefulOfARP() (bool, error) {
	value, err := m.links.Sysctl("ipv4/conf/all/arp_ignore")
	return value != "0", err
}

// checkFree says whether addresses of a container are not the host's own, for which a
// look at the LAN finds nobody: the host does not answer itself.
func (m *Mode) checkFree(parent string, addrs []netip.Addr) error {
	have, err := m.parentAddrs(parent)
	if err != nil {
		return err
	}
	for _, p := range have {
		if slices.Contains(addrs, p.Addr()) {
			return fault.Conflict("address %s is the host's own on %q: keep it from containers with --aux-address or --ip-range", p.Addr(), parent)
		}
	}
	return nil
}

// parentAddrs are the addresses of the host on a parent; none when there is no
// such link yet.
func (m *Mode) parentAddrs(parent string) ([]netip.Prefix, error) {
	addrs, err := m.links.Addrs(parent)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	return addrs, err
}

// ensureRoutes leads the host to an endpoint.
func (m *Mode) ensureRoutes(s ensureRoutes) (inverse apply.Inverse, err error) {
	addrs, err := m.parentAddrs(s.network.LAN.Parent)
	if err != nil {
		return nil, err
	}
	shim := options.ShimName(s.network.LAN.Parent)
	var made []netip.Addr
	inverse = func(context.Context) error {
		var errs []error
		for _, addr := range made {
			errs = append(errs, m.links.DeleteHostRoute(shim, addr))
		}
		return errors.Join(errs...)
	}
	routes := hostRoutes(s.network, s.endpoint, addrs)
	if len(routes) < len(addresses(s.endpoint)) {
		m.log.WithField("network", s.network.ID).WithField("parent", s.network.LAN.Parent).
			Warn("the parent has lost an address: until it has one in each subnet again, the host does not reach all addresses of containers")
	}
	for _, r := range routes {
		changed, err := m.links.SetHostRoute(shim, r)
		if err != nil {
			return inverse, err
		}
		if changed {
			made = append(made, r.To)
		}
	}
	return inverse, nil
}

// AccessLink is the host's own macvlan link on a parent, "" for none. What is sent by
// it is heard by the containers beside it, which hear nothing that the parent sends.
func (m *Mode) AccessLink(parent string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.onShim(parent) {
		if n.Mode == options.ModeMacvlan && n.LAN.Type == options.MacvlanBridge {
			return options.ShimName(parent)
		}
	}
	return ""
}
