package modetest

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// A Reach says who reaches whom on a LAN network, in both directions and with both
// families.
type Reach struct {
	// Network is made by LANNetwork 1 and may be changed; made by LANNetwork 2 it is one
	// that the neighbour has a route to by the host. On a VLAN it is the neighbour's
	// only network.
	Network options.Network
	// Siblings: two containers of the network reach each other. Neighbour: they and
	// another host of the LAN. Host: they and their host.
	Siblings, Neighbour, Host bool
	// Sysctls of the host, as "net.ipv4.conf.all.rp_filter=1".
	Sysctls []string
}

// A lanWorld is a host with two containers and a neighbour on one LAN.
type lanWorld struct {
	host       *host
	neighbour  *testkit.Netns
	containers []*testkit.Netns
	endpoints  []options.Endpoint
}

// neighbourOf is the address of the neighbour.
func neighbourOf(s options.Subnet) netip.Prefix {
	p := hostOf(s)
	return netip.PrefixFrom(p.Addr().Next().Next(), p.Bits())
}

func newLANWorld(t *testing.T, s Suite, r Reach) *lanWorld {
	t.Helper()
	w := &lanWorld{host: s.newHost(t), neighbour: testkit.NewNetns(t)}
	if len(r.Sysctls) > 0 {
		w.host.ns.Run(append([]string{"sysctl", "-qw"}, r.Sysctls...)...)
	}
	w.host.ns.Run("ip", "link", "set", Neighbour, "netns", w.neighbour.Path(), "name", "eth0")
	link := "eth0"
	if _, id, ok := r.Network.LAN.VLAN(); ok {
		link = "vlan0"
		w.neighbour.Run("ip", "link", "add", "link", "eth0", "name", link, "type", "vlan", "id", strconv.Itoa(id))
	}
	w.neighbour.Run("sysctl", "-qw", "net.ipv6.conf."+link+".disable_ipv6=0")
	w.neighbour.Run("ip", "link", "set", "eth0", "up")
	w.neighbour.Run("ip", "link", "set", link, "up")
	for i, subnet := range lanSubnets() {
		w.neighbour.Run("ip", "addr", "add", neighbourOf(subnet).String(), "dev", link, "nodad")
		if pool := r.Network.Subnets[i].Pool; pool != subnet.Pool {
			w.neighbour.Run("ip", "route", "add", pool.String(), "via", hostOf(subnet).Addr().String())
		}
	}
	w.host.ns.Serve()
	w.neighbour.Serve()
	m := s.New(t, w.host.ns)
	assert.NilError(t, m.EnsureNetwork(t.Context(), r.Network))
	for i := range 2 {
		ep := s.Endpoint(r.Network, i+1)
		assert.NilError(t, m.EnsureEndpoint(t.Context(), r.Network, ep))
		w.endpoints = append(w.endpoints, ep)
		w.containers = append(w.containers, w.host.plug(r.Network, ep))
	}
	return w
}

// lanSubnets are those that the host and the neighbour have addresses in.
func lanSubnets() []options.Subnet { return LANNetwork(options.ModeMacvlan, 1).Subnets }

// RunReach makes the network and tries who reaches whom.
func RunReach(t *testing.T, s Suite, r Reach) {
	w := newLANWorld(t, s, r)
	w.check(t, r)
	// Berth starts again, and makes everything sure once more.
	m := s.New(t, w.host.ns)
	assert.NilError(t, m.EnsureNetwork(t.Context(), r.Network))
	for _, ep := range w.endpoints {
		assert.NilError(t, m.EnsureEndpoint(t.Context(), r.Network, ep))
	}
	w.check(t, r)
}

func (w *lanWorld) check(t *testing.T, r Reach) {
	t.Helper()
	first, second := w.containers[0], w.containers[1]
	for i, subnet := range r.Network.Subnets {
		hosts, neighbours := hostOf(lanSubnets()[i]).Addr().String(), neighbourOf(lanSubnets()[i]).Addr().String()
		own := hosts
		if addr := r.Network.LAN.HostAddrIn(subnet); addr.IsValid() {
			own = addr.String()
		}
		addrs := make([]string, len(w.endpoints))
		for j, ep := range w.endpoints {
			addrs[j] = []string{ep.IPv4.Addr().String(), ep.IPv6.Addr().String()}[i]
		}
		try(t, "container to container", first, addrs[1], addrs[0], r.Siblings)
		try(t, "container to neighbour", first, neighbours, addrs[0], r.Neighbour)
		try(t, "neighbour to container", w.neighbour, addrs[1], neighbours, r.Neighbour)
		try(t, "container to host", second, own, addrs[1], r.Host)
		try(t, "host to container", w.host.ns, addrs[0], own, r.Host)
		if _, _, ok := r.Network.LAN.VLAN(); ok {
			continue // The host itself is not on it.
		}
		// The host's own life on the LAN goes on as before.
		for range 3 {
			try(t, "neighbour to host", w.neighbour, hosts, neighbours, true)
			try(t, "host to neighbour", w.host.ns, neighbours, hosts, true)
			assert.Assert(t, strings.Contains(w.neighbour.Run("ip", "neigh", "show", hosts), "02:00:00:00:aa:00"), "the neighbour takes another link for the host's")
			w.neighbour.Run("ip", "neigh", "flush", "dev", "eth0")
		}
	}
}

// try connects, and expects the server to see that source or no answer.
func try(t *testing.T, what string, from *testkit.Netns, to, source string, answered bool) {
	t.Helper()
	if answered {
		assert.Equal(t, from.Call(to, waitYes), source, fmt.Sprintf("%s, %s", what, to))
		return
	}
	assert.Equal(t, from.Call(to, waitNo), "", fmt.Sprintf("%s, %s", what, to))
}
