package firewall

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/netplugin/link"
)

// forwardingSysctl is the switch that makes the host a router.
func forwardingSysctl(v6 bool) string {
	if v6 {
		return "ipv6/conf/all/forwarding"
	}
	return "ipv4/ip_forward"
}

// CheckForwarding says whether EnableForwarding would succeed for the network.
func (m *Manager) CheckForwarding(n Network) error {
	for _, v6 := range n.forwards() {
		if err := m.links.CheckSysctl(forwardingSysctl(v6), "1"); err != nil {
			return err
		}
	}
	return nil
}

// EnableForwarding turns on IP forwarding for the families of the network, unless
// it is on or the network is internal. The error says what to do if that is not
// possible.
//
// It is a call of its own, made when a container comes and not when the rules are
// restored at boot: dockerd sets FORWARD's policy to DROP only if it is the one
// who turns forwarding on, and must not find it on for Berth's sake.
func (m *Manager) EnableForwarding(ctx context.Context, n Network) error {
	for _, v6 := range n.forwards() {
		if value, err := m.links.Sysctl(forwardingSysctl(v6)); err != nil {
			return err
		} else if value != "0" {
			continue
		}
		if err := m.turnOnForwarding(ctx, v6); err != nil {
			return err
		}
	}
	return nil
}

func (m *Manager) turnOnForwarding(ctx context.Context, v6 bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if v6 {
		if err := m.keepRouterAdvertisements(); err != nil {
			return err
		}
	}
	if err := m.links.SetSysctl(forwardingSysctl(v6), "1"); err != nil {
		return err
	}
	m.log.Infof("turned on sysctl net/%s", forwardingSysctl(v6))
	// Remembered in the table, so that the removal of the last network finds it.
	if v6 {
		m.ip6.forwarding = true
	} else {
		m.ip.forwarding = true
	}
	if err := m.adoptLocked(); err != nil {
		return err
	}
	return m.applyLocked(ctx, false)
}

// RouteLocalnet lets packets to 127.0.0.0/8 leave by the bridge, for ports that are
// published on the host's loopback address, and keeps it so until the network of
// the bridge is removed.
func (m *Manager) RouteLocalnet(bridge string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.localnet[bridge] = true
	return m.links.RouteLocalnet(bridge, true)
}

// sysctlOffLocked names a switch that Berth has turned on and somebody has turned
// off again, "" if there is none. What Berth found on is others' affair.
func (m *Manager) sysctlOffLocked() (string, error) {
	for _, path := range m.sysctlsLocked() {
		value, err := m.links.Sysctl(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // The bridge is gone, which is noticed elsewhere.
		}
		if err != nil || value == "0" {
			return path, err
		}
	}
	return "", nil
}

// keepSysctlsLocked turns them on again.
func (m *Manager) keepSysctlsLocked() error {
	var errs []error
	for _, path := range m.sysctlsLocked() {
		if err := m.links.SetSysctl(path, "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// sysctlsLocked lists the switches that Berth has turned on.
func (m *Manager) sysctlsLocked() []string {
	var paths []string
	for _, s := range m.sides() {
		if s.forwarding {
			paths = append(paths, forwardingSysctl(s.table.v6))
		}
	}
	for bridge := range m.localnet {
		if _, ok := m.networks[bridge]; !ok {
			delete(m.localnet, bridge)
			continue
		}
		paths = append(paths, "ipv4/conf/"+bridge+"/route_localnet")
	}
	return paths
}

// keepRouterAdvertisements lets links of the host that configure themselves by
// router advertisements go on with it: a router ignores them unless accept_ra
// is 2, and the kernel throws away what it has learnt from them.
func (m *Manager) keepRouterAdvertisements() error {
	links, err := m.links.List()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Owner.Ours || l.Name == "lo" {
			continue
		}
		path := "ipv6/conf/" + l.Name + "/accept_ra"
		// A link without IPv6 has no such setting, and one may vanish meanwhile.
		if value, err := m.links.Sysctl(path); err != nil || value != "1" {
			continue
		}
		if err := m.links.SetSysctl(path, "2"); err != nil {
			return err
		}
	}
	return nil
}

// restoreForwarding turns forwarding off again if Berth turned it on and nothing
// on the host can have come to rely on it: no link but Berth's, hardware, and
// what is built on hardware alone.
func (m *Manager) restoreForwarding() error {
	for _, s := range m.sides() {
		if !s.forwarding {
			continue
		}
		path := forwardingSysctl(s.table.v6)
		links, err := m.links.List()
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(links, mayForward); i >= 0 {
			m.log.Infof("sysctl net/%s stays on: link %q may rely on it", path, links[i].Name)
		} else if err := m.links.SetSysctl(path, "0"); err != nil {
			return fmt.Errorf("after the last network: %w", err)
		}
		s.forwarding = false
	}
	return nil
}

// mayForward tells links that are likely to be one side of a routed path.
func mayForward(l link.Link) bool {
	switch l.Kind {
	case "device", "bond", "team", "vlan", "dummy", "ifb":
		return false
	}
	return !l.Owner.Ours && !strings.HasPrefix(l.Kind, "ip6") && l.Kind != "sit" && l.Kind != "ipip"
}

// forwards lists the families, by v6, that the network needs forwarding for.
func (n Network) forwards() []bool {
	var out []bool
	for _, s := range n.Subnets {
		if v6 := s.Addr().Is6(); !n.Internal && !slices.Contains(out, v6) {
			out = append(out, v6)
		}
	}
	return out
}
