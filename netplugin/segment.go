package netplugin

import (
	"maps"
	"slices"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// linksOf are the names of the links that a network is made of or depends on.
func linksOf(n options.Network) []string {
	var names []string
	for _, name := range []string{n.Bridge, n.Segment()} {
		if name != "" {
			names = append(names, name)
		}
	}
	if base, _, ok := n.SegmentVLAN(); ok {
		names = append(names, base)
	}
	return names
}

// checkUplink says whether a network may have its uplink or parent beside the others:
// a link is in one bridge, and carries frames for nothing else then.
func (s *store) checkUplink(spec options.Network) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.checkUplinkLocked(spec)
}

func (s *store) checkUplinkLocked(spec options.Network) error {
	if spec.Segment() == "" {
		return nil
	}
	for _, id := range slices.Sorted(maps.Keys(s.networks)) {
		other := s.networks[id].rec.Spec
		switch {
		case other.Segment() != spec.Segment() || spec.IsLAN() && other.IsLAN() || id == spec.ID:
		case other.Uplink == "":
			return fault.Conflict("option uplink=%s: it is the parent of Berth network %s, and a port of a bridge cannot be: choose another link, or parent=%s for this network too",
				spec.Uplink, short(id), spec.Uplink)
		case spec.Uplink == "":
			return fault.Conflict("option parent=%s: it is the uplink of Berth network %s, and a port of its bridge: choose another link", spec.LAN.Parent, short(id))
		default:
			return fault.Conflict("option uplink=%s: it is the uplink of Berth network %s, and a link is a port of one bridge: choose another link, or use that network",
				spec.Uplink, short(id))
		}
	}
	return nil
}

// apart reports whether two networks may have the same addresses. Containers on a
// LAN are not reached by way of the host, which so never has to choose between two
// of them; with host access it would.
func apart(a, b options.Network) bool {
	return a.OnLAN() && b.OnLAN() && (a.Segment() == b.Segment() || !a.LAN.HostAccess || !b.LAN.HostAccess)
}
