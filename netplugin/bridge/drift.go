package bridge

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

// Drift says in words what somebody has changed on the bridges of networks that
// were ensured before, by network ID; networks that are as they should be are left
// out. EnsureNetwork repairs it, unless an adopted bridge is missing. It takes two
// requests to the kernel, and one or two for each uplink, and may be called at any
// time; the answer is only true for networks that nobody is changing.
func (m *Mode) Drift(networks []options.Network) (map[string]string, error) {
	bridges, err := m.links.Bridges()
	if err != nil {
		return nil, err
	}
	addrs, err := m.links.AllAddrs()
	if err != nil {
		return nil, err
	}
	byName := make(map[string]link.Link, len(bridges))
	for _, l := range bridges {
		byName[l.Name] = l
	}
	uplinks, err := m.uplinks(networks)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	switched := m.lookForFilter()
	for _, n := range networks {
		l, ok := byName[n.Bridge]
		if !ok {
			out[n.ID] = fmt.Sprintf("bridge %q is missing", n.Bridge)
			continue
		}
		found := drift(n, l, addrs[l.Index])
		if n.Uplink != "" {
			if wrong := uplinkDrift(n, l, uplinks); wrong != "" {
				found = append(found, wrong)
			}
		}
		if switched && n.NoICC {
			found = append(found, "has ports that are isolated as before br_netfilter was switched")
		}
		if len(found) > 0 {
			out[n.ID] = fmt.Sprintf("bridge %q %s", n.Bridge, strings.Join(found, ", "))
		}
	}
	return out, nil
}

// drift compares a bridge with its network.
func drift(n options.Network, l link.Link, have []netip.Prefix) (found []string) {
	add := func(wrong bool, format string, args ...any) {
		if wrong {
			found = append(found, fmt.Sprintf(format, args...))
		}
	}
	add(!l.Up, "is down")
	if n.Adopted {
		missing := lacking(have, n.AdoptedAddrs)
		add(len(missing) > 0, "lacks address %s", list(missing))
		return found
	}
	want := bridgeLink(n)
	add(l.Owner != link.OfNetwork(n.ID), "has lost its mark (%s)", l.Owner)
	add(want.MTU != 0 && l.MTU != want.MTU, "has MTU %d instead of %d", l.MTU, want.MTU)
	add(l.MAC.String() != want.MAC.String(), "has MAC address %s instead of %s", l.MAC, want.MAC)
	var missing []netip.Prefix
	for _, p := range gateways(n) {
		if !slices.Contains(have, p) {
			missing = append(missing, p)
		}
	}
	add(len(missing) > 0, "lacks address %s", list(missing))
	return found
}

func list(prefixes []netip.Prefix) string {
	words := make([]string, len(prefixes))
	for i, p := range prefixes {
		words[i] = p.String()
	}
	return strings.Join(words, " and ")
}

// bridgedFiltered reports whether br_netfilter shows bridged packets of both
// families to the rules, as of the last look.
func (m *Mode) bridgedFiltered() bool {
	m.mu.Lock()
	looked := m.looked
	m.mu.Unlock()
	if !looked {
		m.lookForFilter()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.filtered
}

// lookForFilter looks, and reports whether that has changed since the last time.
func (m *Mode) lookForFilter() (switched bool) {
	filtered := true
	for _, family := range []string{"ip", "ip6"} {
		// The sysctl is not there without the module.
		value, err := m.links.Sysctl("bridge/bridge-nf-call-" + family + "tables")
		filtered = filtered && err == nil && value != "0"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switched = m.looked && m.filtered != filtered
	m.filtered, m.looked = filtered, true
	return switched
}
