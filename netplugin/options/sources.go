package options

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// setPublish reads who reaches published ports: open, host-firewall or a list of
// prefixes; or gwbridge, which leaves publishing to Docker.
func (n *Network) setPublish(g given) error {
	switch g.value {
	case "open":
		return nil
	case "host-firewall":
		n.HostFirewall = true
		return nil
	case "gwbridge":
		n.LAN.GatewayBridge = true
		return nil
	}
	words := strings.Split(g.value, ",")
	if len(words) > maxSources {
		return fault.Invalid("option %s: want at most %d prefixes, got %d", g.key, maxSources, len(words))
	}
	sources := make([]netip.Prefix, 0, len(words))
	for _, word := range words {
		source, ok := parsePrefix(strings.TrimSpace(word))
		if !ok {
			return fault.Invalid("option %s: %s: want open, host-firewall or a list of prefixes, as 192.0.2.0/24,2001:db8::/32", g.key, shown(word))
		}
		if source != source.Masked() {
			return fault.Invalid("option %s: prefix %s has bits set behind its length, want %s or %s",
				g.key, source, source.Masked(), netip.PrefixFrom(source.Addr(), source.Addr().BitLen()))
		}
		sources = append(sources, source)
	}
	n.Sources = withoutParts(sources)
	return nil
}

// parsePrefix reads a prefix, or an address, which is the prefix of all its bits.
func parsePrefix(s string) (netip.Prefix, bool) {
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		addr, err := netip.ParseAddr(s)
		if err != nil || addr.Zone() != "" {
			return netip.Prefix{}, false
		}
		prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
	return prefix, !prefix.Addr().Is4In6()
}

// withoutParts sorts masked prefixes and leaves out those that are part of another
// one: sets of the kernel hold no overlapping intervals.
func withoutParts(prefixes []netip.Prefix) []netip.Prefix {
	slices.SortFunc(prefixes, comparePrefixes)
	var out []netip.Prefix
	for _, p := range prefixes {
		// A prefix that contains p sorts before it, and all between the two
		// are part of the former too.
		if len(out) == 0 || !out[len(out)-1].Overlaps(p) {
			out = append(out, p)
		}
	}
	return out
}

func comparePrefixes(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}
