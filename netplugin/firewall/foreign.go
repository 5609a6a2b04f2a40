package firewall

import (
	"fmt"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/netplugin/link"
)

// isDocker tells the bridges of dockerd by name.
func isDocker(name string) bool {
	if name == "docker0" || name == "docker_gwbridge" {
		return true
	}
	id, ok := strings.CutPrefix(name, "br-")
	return ok && len(id) == 12 && strings.Trim(id, "0123456789abcdef") == ""
}

// A bridge on the host that is not Berth's.
type bridge struct {
	name string
	// ports are the kinds of the links plugged into it.
	ports []string
	// defaultRoute says that the host reaches the world through it.
	defaultRoute bool
}

// isForeign tells the bridge of another container network, from which Berth's
// networks are kept apart, from one that is the host's uplink, which is outside.
// Docker's are known by name. Another one is a container network if there are
// only veth ports and no default route; with hardware, a bond or a tap device in
// it, it leads somewhere else.
func (b bridge) isForeign() bool {
	if isDocker(b.name) {
		return true
	}
	return !b.defaultRoute && !slices.ContainsFunc(b.ports, func(kind string) bool { return kind != "veth" })
}

// wantForeignLocked makes the foreign bridges elements of the set, without those
// that have been adopted for a network of Berth's: they carry no mark of Berth, but
// are not foreign.
func (m *Manager) wantForeignLocked() {
	names := slices.DeleteFunc(slices.Clone(m.foreign), func(name string) bool {
		_, ours := m.networks[name]
		return ours
	})
	for _, s := range m.sides() {
		s.want.setForeignBridges(names)
	}
}

// foreignBridges lists the bridges of other container networks, sorted.
func foreignBridges(links *link.Handle) ([]string, error) {
	all, err := links.Bridges()
	if err != nil {
		return nil, err
	}
	var (
		out    []string
		routes []link.Route
	)
	for _, l := range all {
		if l.Owner.Ours {
			continue
		}
		b := bridge{name: l.Name}
		if !isDocker(l.Name) {
			if routes == nil {
				if routes, err = links.Routes(); err != nil {
					return nil, err
				}
			}
			ports, err := links.Ports(l)
			if err != nil {
				return nil, fmt.Errorf("bridge %q: %w", l.Name, err)
			}
			for _, p := range ports {
				b.ports = append(b.ports, p.Kind)
			}
			b.defaultRoute = slices.ContainsFunc(routes, func(r link.Route) bool { return r.Link == l.Index && r.Dst.Bits() == 0 })
		}
		if b.isForeign() {
			out = append(out, l.Name)
		}
	}
	slices.Sort(out)
	return out, nil
}
