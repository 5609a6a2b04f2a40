package vmlab

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/bridge"
	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/hostport"
	"github.com/berth-plugin/berth/netplugin/lan"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// TestUplinkOnVLAN joins a bridge to a VLAN, which many build machines cannot make.
func TestUplinkOnVLAN(t *testing.T) {
	InGuest(t, Options{Modules: []string{"8021q", "veth", "bridge", "sch_ingress", "cls_bpf"}}, func(t *testing.T) {
		t.Run("made", func(t *testing.T) { uplinkOnVLAN(t, false) })
		t.Run("foreign", func(t *testing.T) { uplinkOnVLAN(t, true) })
	})
}

func uplinkOnVLAN(t *testing.T, foreign bool) {
	const uplink = "eth1.50"
	host, neighbour := testkit.NewNetns(t), testkit.NewNetns(t)
	host.Run("ip", "link", "add", "eth1", "mtu", "1450", "type", "veth", "peer", "name", "lan0", "netns", neighbour.Path())
	host.Run("ip", "link", "set", "eth1", "up")
	neighbour.Run("ip", "link", "set", "lan0", "up")
	neighbour.Run("ip", "link", "add", "link", "lan0", "name", "lan0.50", "type", "vlan", "id", "50")
	neighbour.Run("ip", "link", "set", "lan0.50", "up")
	if foreign {
		host.Run("ip", "link", "add", "link", "eth1", "name", uplink, "type", "vlan", "id", "50")
	}
	links, err := link.Open(link.Options{NetNS: host.File()})
	assert.NilError(t, err)
	t.Cleanup(links.Close)
	rules, err := firewall.New(firewall.Options{Links: links})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, rules.Close()) })
	ports, err := hostport.New(hostport.Options{NetNS: host.File()})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, ports.Close()) })
	mode := bridge.New(links, rules, ports)

	n := modetest.Network(1)
	n.Uplink, n.Masquerade, n.MTU, n.SpoofCheck = uplink, false, 0, true
	ep := modetest.Endpoint(n, 1)
	for i, s := range n.Subnets {
		add := []string{"ip", "addr", "add", netip.PrefixFrom(s.Gateway, s.Pool.Bits()).String(), "dev", "lan0.50"}
		if s.Gateway.Is6() {
			add = append(add, "nodad")
		}
		neighbour.Run(add...)
		n.Subnets[i].Gateway, n.Subnets[i].ContainerGateway = netip.Addr{}, s.Gateway
	}
	n, err = mode.Adopt(t.Context(), n)
	assert.NilError(t, err)
	assert.Equal(t, n.MTU, 1450)
	assert.NilError(t, mode.EnsureNetwork(t.Context(), n))
	assert.NilError(t, mode.EnsureEndpoint(t.Context(), n, ep))
	container := testkit.NewNetns(t)
	host.Run("ip", "link", "set", ep.ContainerLink, "netns", container.Path(), "name", "eth0")
	container.Run("ip", "addr", "add", ep.IPv4.String(), "dev", "eth0")
	container.Run("ip", "addr", "add", ep.IPv6.String(), "dev", "eth0", "nodad")
	container.Run("ip", "link", "set", "eth0", "up")
	container.Serve()
	reached := func(what string) {
		t.Helper()
		for _, a := range []netip.Addr{ep.IPv4.Addr(), ep.IPv6.Addr()} {
			assert.Assert(t, neighbour.Call(a.String(), 10*time.Second) != "", "%s: %s", what, a)
		}
	}
	vlan := func() (link.Link, bool) {
		t.Helper()
		l, ok, err := links.Get(uplink)
		assert.NilError(t, err)
		return l, ok
	}
	reached("at first")
	l, _ := vlan()
	assert.Equal(t, l.Owner == link.OfParent(uplink), !foreign, "%s", l.Owner)

	// The modes of LANs, which have no network on it, leave it alone at their start.
	assert.NilError(t, lan.New(links).Restore(t.Context(), nil, nil))
	reached("after a start")

	// Somebody removes it.
	host.Run("ip", "link", "del", uplink)
	found, err := mode.Drift([]options.Network{n})
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(found[n.ID], `lacks its uplink "eth1.50"`), "%v", found)
	assert.NilError(t, mode.EnsureNetwork(t.Context(), n))
	reached("repaired")
	if foreign {
		host.Run("ip", "link", "del", uplink)
		host.Run("ip", "link", "add", "link", "eth1", "name", uplink, "type", "vlan", "id", "50")
		assert.NilError(t, mode.EnsureNetwork(t.Context(), n))
		reached("made by its owner again")
	}

	// eth1 goes down and takes the VLAN with it.
	host.Run("ip", "link", "set", "eth1", "down")
	assert.ErrorContains(t, mode.EnsureNetwork(t.Context(), n), "is down")
	host.Run("ip", "link", "set", "eth1", "up")
	assert.NilError(t, mode.EnsureNetwork(t.Context(), n))
	reached("up again")

	// A container that takes another address is not heard.
	container.Run("ip", "addr", "add", "10.0.1.99/24", "dev", "eth0")
	assert.Equal(t, neighbour.Call("10.0.1.99", 500*time.Millisecond), "")

	assert.NilError(t, mode.RemoveNetwork(t.Context(), n))
	l, ok := vlan()
	assert.Equal(t, ok, foreign)
	assert.Equal(t, l.Master, 0)
	base, _, err := links.Get("eth1")
	assert.NilError(t, err)
	assert.Assert(t, base.Up && base.Master == 0)
}
