package hostport

import (
	"cmp"
	"slices"

	"github.com/berth-plugin/berth/netplugin/options"
)

// coalesce sorts single ports, drops those that come twice and joins neighbours:
// ports in a row that lead to ports in a row.
func coalesce(ports []options.PublishedPort) []options.PublishedPort {
	slices.SortFunc(ports, func(a, b options.PublishedPort) int {
		return cmp.Or(
			cmp.Compare(a.Proto, b.Proto), a.Host.Compare(b.Host), a.Container.Compare(b.Container),
			cmp.Compare(a.HostPort, b.HostPort), cmp.Compare(a.ContainerPort, b.ContainerPort),
		)
	})
	ports = slices.Compact(ports)
	out := make([]options.PublishedPort, 0, min(len(ports), 16))
	for _, p := range ports {
		if len(out) > 0 && follows(out[len(out)-1], p) {
			out[len(out)-1].Count += p.Count
			continue
		}
		out = append(out, p)
	}
	return slices.Clip(out)
}

// follows reports whether next continues prev.
func follows(prev, next options.PublishedPort) bool {
	if prev.Proto != next.Proto || prev.Host != next.Host || prev.Container != next.Container {
		return false
	}
	if int(next.ContainerPort) != int(prev.ContainerPort)+int(prev.Count) {
		return false
	}
	return prev.Direct() || int(next.HostPort) == int(prev.HostPort)+int(prev.Count)
}

// each calls fn for every single port of a list that coalesce has made.
func each(ports []options.PublishedPort, fn func(k key, to destination)) {
	for _, p := range ports {
		if p.Direct() {
			continue
		}
		for i := range p.Count {
			fn(key{p.Proto, p.HostPort + i, p.Host}, destination{p.Container, p.ContainerPort + i})
		}
	}
}
