package lan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
)

func kind(mode options.Mode, kind, flag string) options.Network {
	n := modetest.LANNetwork(mode, 1)
	n.LAN.Type, n.LAN.Flag = kind, flag
	return n
}

func TestPlans(t *testing.T) {
	bridge := kind(options.ModeMacvlan, options.MacvlanBridge, "")
	with := func(change func(*options.LAN)) options.Network {
		n := bridge
		change(&n.LAN)
		return n
	}
	for _, c := range []struct {
		n    options.Network
		want []string
	}{
		{bridge, []string{"use parent lan0", "set up link bc"}},
		{with(func(l *options.LAN) { l.HostAccess = true }), []string{
			"use parent lan0", "set up access to the host on parent lan0", "set up link bc", "set up access of the host to link bc",
		}},
		{with(func(l *options.LAN) { l.Parent = "lan0.7" }), []string{"set up VLAN lan0.7", "use parent lan0.7", "set up link bc"}},
		{with(func(l *options.LAN) { l.Parent = "" }), []string{"set up private link bpaaaa00000001", "set up link bc"}},
	} {
		ep := modetest.LANEndpoint(c.n, 1)
		steps := append(planNetwork(c.n), planEndpoint(c.n, ep)...)
		assert.Equal(t, len(steps), len(c.want))
		for i, s := range steps {
			assert.Assert(t, strings.HasPrefix(s.String(), c.want[i]), "%s, want %s", s, c.want[i])
		}
	}
	vlan := planNetwork(with(func(l *options.LAN) { l.Parent = "lan0.7" }))[0].(ensureVLAN)
	assert.Equal(t, vlan, ensureVLAN{"lan0.7", "lan0", 7})

	n := kind(options.ModeIPvlan, options.IPvlanL3S, options.IPvlanVEPA)
	l := planEndpoint(n, modetest.LANEndpoint(n, 1))[0].(ensureLink)
	assert.Equal(t, fmt.Sprint(l.Kind, " ", l.Mode, " ", l.Flag, " ", l.MAC, " ", l.MTU), "ipvlan l3s vepa  1400")
	n = with(func(l *options.LAN) { l.BroadcastQueue = 5000 })
	l = planEndpoint(n, modetest.LANEndpoint(n, 1))[0].(ensureLink)
	assert.Equal(t, fmt.Sprint(l.Kind, " ", l.Mode, " ", l.Flag, " ", l.MAC, " ", l.BroadcastQueue), "macvlan bridge  02:00:00:00:01:01 5000")
}

// Which addresses the host's link has, which it answers for, and which are sources.
func TestShimPlans(t *testing.T) {
	prefixes := func(words ...string) (out []netip.Prefix) {
		for _, w := range words {
			out = append(out, netip.MustParsePrefix(w))
		}
		return out
	}
	host := prefixes("192.0.2.1/24", "10.0.1.250/24", "fd00:0:0:1::250/64", "fd00:0:0:1::251/64", "2001:db8::1/64")
	own := []netip.Addr{netip.MustParseAddr("10.0.1.9"), netip.MustParseAddr("fd00:0:0:1::9")}
	for _, c := range []struct {
		n       options.Network
		own     []netip.Addr
		parent  []netip.Prefix
		shim    string // addresses, proxied addresses, mode
		sources string
	}{
		{kind(options.ModeMacvlan, "bridge", ""), nil, host, "[] [fd00:0:0:1::250 fd00:0:0:1::251] bridge", "10.0.1.250 fd00:0:0:1::250"},
		{kind(options.ModeMacvlan, "bridge", ""), nil, host[:1], "[] [] bridge", ""},
		{kind(options.ModeMacvlan, "bridge", ""), own, host, "[10.0.1.9/32 fd00:0:0:1::9/128] [] bridge", "10.0.1.9 fd00:0:0:1::9"},
		{kind(options.ModeMacvlan, "bridge", ""), own[:1], host, "[10.0.1.9/32] [fd00:0:0:1::250 fd00:0:0:1::251] bridge", "10.0.1.9 fd00:0:0:1::250"},
		{kind(options.ModeIPvlan, "l2", "bridge"), own, host, "[10.0.1.9/32 fd00:0:0:1::9/128] [] l2", "10.0.1.9 fd00:0:0:1::9"},
		{kind(options.ModeIPvlan, "l2", "bridge"), own[:1], host, "[10.0.1.9/32] [] l2", "10.0.1.9"},
		{kind(options.ModeIPvlan, "l3", "bridge"), nil, host, "[] [] l3", "10.0.1.250 fd00:0:0:1::250"},
		{kind(options.ModeIPvlan, "l3s", "bridge"), nil, slices.Concat(host[:1], host[4:]), "[] [] l3s", "192.0.2.1 2001:db8::1"},
	} {
		c.n.LAN.HostAccess, c.n.LAN.HostAddrs = true, c.own
		s := planShim(c.n.LAN.Parent, []options.Network{c.n}, c.parent)
		assert.Equal(t, fmt.Sprint(s.Addrs, " ", s.Proxied, " ", s.Mode), c.shim)
		assert.Assert(t, s.IPv6)
		assert.Equal(t, s.MAC != nil, c.n.Mode == options.ModeMacvlan)
		var sources []string
		for _, r := range hostRoutes(c.n, modetest.LANEndpoint(c.n, 1), c.parent) {
			sources = append(sources, r.From.String())
		}
		assert.Equal(t, strings.Join(sources, " "), c.sources)
	}
}

func TestParents(t *testing.T) {
	one, two, three := kind(options.ModeMacvlan, "bridge", ""), kind(options.ModeMacvlan, "bridge", ""), kind(options.ModeMacvlan, "bridge", "")
	one.LAN.HostAccess = true
	two.LAN.Parent = "eth1.7"
	three.LAN.Parent = ""
	names := Parents([]options.Network{one, two, three, modetest.Network(4)})
	private, _ := options.PrivateLinks(three.ID)
	for _, name := range []string{"lan0", options.ShimName("lan0"), "eth1", "eth1.7", private} {
		assert.Assert(t, names[name], name)
	}
	assert.Equal(t, len(names), 5, "%v", names)
}
