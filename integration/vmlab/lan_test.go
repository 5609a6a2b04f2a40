package vmlab

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/lan"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

func lanMode(t testing.TB, ns *testkit.Netns) *lan.Mode {
	t.Helper()
	return lan.New(lanLinks(t, ns))
}

func lanLinks(t testing.TB, ns *testkit.Netns) *link.Handle {
	t.Helper()
	links, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(links.Close)
	return links
}

func lanSuite(mode options.Mode) modetest.Suite {
	s := modetest.LANSuite(mode)
	s.New = func(t testing.TB, ns *testkit.Netns) modetest.Mode { return lanMode(t, ns) }
	return s
}

// ownAddrs gives the host an address for the network's containers in each subnet.
func ownAddrs(n options.Network) options.Network {
	n.LAN.HostAccess = true
	for _, s := range n.Subnets {
		n.LAN.HostAddrs = append(n.LAN.HostAddrs, modetest.HostAddr(s).Next())
	}
	return n
}

// onVLAN moves a network to a VLAN, with macvlan.
func onVLAN(n options.Network) options.Network {
	n.Mode, n.LAN = options.ModeMacvlan, options.LAN{Parent: modetest.Parent + ".50", Type: options.MacvlanBridge}
	return n
}

// TestLAN runs what many build machines have no kernel for: ipvlan, VLANs, dummies.
func TestLAN(t *testing.T) {
	opts := Options{
		Modules: []string{"8021q", "bridge", "dummy", "ipvlan", "macvlan", "nf_tables", "overlay", "veth"},
		Timeout: 15 * time.Minute,
		Binaries: map[string]string{
			"berthd":       "github.com/berth-plugin/berth/cmd/berthd",
			"docker-berth": "github.com/berth-plugin/berth/cmd/docker-berth",
		},
	}
	InGuest(t, opts, func(t *testing.T) {
		t.Run("story", tellLANStory)
		t.Run("contract", func(t *testing.T) {
			s := lanSuite(options.ModeIPvlan)
			s.Variants = map[string]func(*options.Network){
				"private link":      modetest.LANVariants(options.ModeIPvlan)["private link"],
				"macvlan on a VLAN": func(n *options.Network) { *n = ownAddrs(onVLAN(*n)) },
			}
			modetest.Run(t, s)
		})
		t.Run("reach", lanReach)
		t.Run("private links are dummies", privateLinks)
		t.Run("VLANs are shared and go with the last", vlansAreShared)
		t.Run("foreign VLAN", foreignVLAN)
		t.Run("links in containers are found", lanElsewhere)
		t.Run("somebody else's links on the parent", lanBeside)
	})
}

func lanReach(t *testing.T) {
	network := func(mode options.Mode, i int, change func(*options.LAN)) options.Network {
		n := modetest.LANNetwork(mode, i)
		change(&n.LAN)
		return n
	}
	ip := func(i int, kind, flag string) options.Network {
		return network(options.ModeIPvlan, i, func(l *options.LAN) { l.Type, l.Flag = kind, flag })
	}
	access := func(n options.Network) options.Network { n.LAN.HostAccess = true; return n }
	vlan := func(l *options.LAN) { l.Parent = modetest.Parent + ".50" }
	private := network(options.ModeMacvlan, 1, func(l *options.LAN) { l.Parent = "" })
	private.Internal = true
	strict := []string{"net.ipv4.conf.all.rp_filter=1", "net.ipv4.conf." + modetest.Parent + ".rp_filter=1"}
	// Macvlan as such needs no other kernel, and who has access to the host lacks
	// nothing else.
	for _, c := range []struct {
		name string
		modetest.Reach
		mode options.Mode
	}{
		{"macvlan on a VLAN, access to the host", modetest.Reach{Network: ownAddrs(network(options.ModeMacvlan, 1, vlan)), Siblings: true, Neighbour: true, Host: true}, options.ModeMacvlan},
		{"macvlan on a private link", modetest.Reach{Network: private, Siblings: true}, options.ModeMacvlan},
		{"ipvlan l2 private", modetest.Reach{Network: ip(1, "l2", "private"), Neighbour: true}, options.ModeIPvlan},
		{"ipvlan l2 vepa", modetest.Reach{Network: ip(1, "l2", "vepa"), Neighbour: true}, options.ModeIPvlan},
		{"ipvlan l2 on a VLAN", modetest.Reach{Network: network(options.ModeIPvlan, 1, vlan), Siblings: true, Neighbour: true}, options.ModeIPvlan},
		{"ipvlan l2, access to the host", modetest.Reach{Network: ownAddrs(ip(1, "l2", "bridge")), Siblings: true, Neighbour: true, Host: true, Sysctls: strict}, options.ModeIPvlan},
		{"ipvlan l3", modetest.Reach{Network: ip(2, "l3", "bridge"), Siblings: true, Neighbour: true}, options.ModeIPvlan},
		{"ipvlan l3, access to the host", modetest.Reach{Network: access(ip(2, "l3", "bridge")), Siblings: true, Neighbour: true, Host: true, Sysctls: strict}, options.ModeIPvlan},
		{"ipvlan l3s, access to the host", modetest.Reach{Network: access(ip(2, "l3s", "bridge")), Siblings: true, Neighbour: true, Host: true, Sysctls: strict}, options.ModeIPvlan},
	} {
		t.Run(c.name, func(t *testing.T) { modetest.RunReach(t, lanSuite(c.mode), c.Reach) })
	}
}

func lanHost(t *testing.T) *testkit.Netns {
	t.Helper()
	ns := testkit.NewNetns(t)
	modetest.PrepareLAN(ns)
	return ns
}

// lanNetwork is network i on a VLAN.
func lanNetwork(i int, parent string) options.Network {
	n := modetest.LANNetwork(options.ModeMacvlan, i)
	n.LAN.Parent = parent
	return n
}

func lanHas(t *testing.T, ns *testkit.Netns, name string) bool {
	t.Helper()
	_, ok, err := lanLinks(t, ns).Get(name)
	assert.NilError(t, err)
	return ok
}

// privateLinks are pairs of veths only where there are no dummies.
func privateLinks(t *testing.T) {
	ns := lanHost(t)
	m, n := lanMode(t, ns), lanNetwork(1, "")
	name, peer := options.PrivateLinks(n.ID)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	l, ok, err := lanLinks(t, ns).Get(name)
	assert.NilError(t, err)
	assert.Assert(t, ok && l.Kind == "dummy" && l.Up && l.Owner == link.OfNetwork(n.ID), "%+v", l)
	assert.Assert(t, !lanHas(t, ns, peer))
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
	assert.Assert(t, !lanHas(t, ns, name))
}

func vlansAreShared(t *testing.T) {
	ns := lanHost(t)
	m := lanMode(t, ns)
	const parent = modetest.Parent + ".50"
	first, second := lanNetwork(1, parent), lanNetwork(2, parent)
	adopted, err := m.Adopt(t.Context(), lanNetwork(1, parent))
	assert.NilError(t, err)
	assert.Equal(t, adopted.MTU, 1400)
	for _, n := range []options.Network{first, second} {
		assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	}
	ns.Run("ip", "link", "set", parent, "down")
	found, err := m.Drift([]options.Network{first, second})
	assert.NilError(t, err)
	assert.Equal(t, len(found), 2, "%v", found)
	assert.NilError(t, m.EnsureNetwork(t.Context(), first))
	found, err = m.Drift([]options.Network{first, second})
	assert.NilError(t, err)
	assert.Equal(t, len(found), 0, "%v", found)

	// The link below goes and comes back as another one.
	ns.Run("ip", "link", "del", modetest.Parent)
	assert.Assert(t, !lanHas(t, ns, parent))
	modetest.PrepareLAN(ns)
	m = lanMode(t, ns)
	assert.NilError(t, m.Restore(t.Context(), []options.Network{first, second}, nil))
	assert.NilError(t, m.EnsureNetwork(t.Context(), second))
	assert.NilError(t, m.EnsureNetwork(t.Context(), first))

	assert.NilError(t, m.RemoveNetwork(t.Context(), first))
	assert.Assert(t, lanHas(t, ns, parent))
	assert.NilError(t, m.RemoveNetwork(t.Context(), second))
	assert.Assert(t, !lanHas(t, ns, parent))

	// Left by a Berth whose records are gone.
	assert.NilError(t, m.EnsureNetwork(t.Context(), first))
	m = lanMode(t, ns)
	assert.NilError(t, m.Restore(t.Context(), nil, nil))
	assert.Assert(t, !lanHas(t, ns, parent))
}

func foreignVLAN(t *testing.T) {
	ns := lanHost(t)
	m := lanMode(t, ns)
	const parent = modetest.Parent + ".50"
	n := lanNetwork(1, parent)
	ns.Run("ip", "link", "add", "link", modetest.Parent, "name", "office", "type", "vlan", "id", "50")
	assert.ErrorContains(t, m.EnsureNetwork(t.Context(), n), "has VLAN 50 already, by another name")
	ns.Run("ip", "link", "del", "office")
	ns.Run("ip", "link", "add", "link", modetest.Parent, "name", parent, "type", "vlan", "id", "50")
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
	assert.NilError(t, lanMode(t, ns).Restore(t.Context(), nil, nil))
	assert.Assert(t, lanHas(t, ns, parent), "somebody else has made it")
}

// lanElsewhere shows on this kernel that links are found where dockerd has put them.
func lanElsewhere(t *testing.T) {
	for _, mode := range []options.Mode{options.ModeMacvlan, options.ModeIPvlan} {
		ns, container := lanHost(t), testkit.NewNetns(t)
		m, n := lanMode(t, ns), modetest.LANNetwork(mode, 1)
		ep := modetest.LANEndpoint(n, 1)
		assert.NilError(t, m.EnsureNetwork(t.Context(), n))
		assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
		ns.Run("ip", "link", "set", ep.ContainerLink, "netns", container.Path(), "name", "eth0")
		found, err := lanLinks(t, ns).Elsewhere()
		assert.NilError(t, err)
		assert.Equal(t, len(found), 1)
		assert.Assert(t, found[0].Owner == link.OfEndpoint(ep.ID) && found[0].Name == "eth0" && found[0].Peer == 0)
		assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))
		_, err = container.Try("ip", "link", "show", "dev", "eth0")
		assert.Assert(t, err != nil, "the link is still in the container")
	}
}

// lanBeside puts links beside those of others, which are in containers already.
func lanBeside(t *testing.T) {
	macvlan, ipvlan := modetest.LANNetwork(options.ModeMacvlan, 1), modetest.LANNetwork(options.ModeIPvlan, 1)
	beside := func(n options.Network, kind ...string) (*testkit.Netns, options.Endpoint, error) {
		ns, container := lanHost(t), testkit.NewNetns(t)
		ns.Run(append([]string{"ip", "link", "add", "link", modetest.Parent, "name", "other0", "type"}, kind...)...)
		ns.Run("ip", "link", "set", "other0", "netns", container.Path())
		m, ep := lanMode(t, ns), modetest.LANEndpoint(n, 1)
		assert.NilError(t, m.EnsureNetwork(t.Context(), n))
		return ns, ep, m.EnsureEndpoint(t.Context(), n, ep)
	}
	for _, c := range []struct {
		n    options.Network
		kind []string
		want string
	}{
		{macvlan, []string{"ipvlan", "mode", "l2"}, `parent "lan0" cannot have macvlan links: it is a port of another link or has links of another kind on it`},
		{ipvlan, []string{"macvlan", "mode", "bridge"}, `parent "lan0" cannot have ipvlan links: it is a port of another link or has links of another kind on it`},
		{macvlan, []string{"macvlan", "mode", "passthru"}, "has one in mode passthru, which must be the only one"},
	} {
		_, _, err := beside(c.n, c.kind...)
		assert.Assert(t, errdefs.IsConflict(err), "%v: %v", c.kind, err)
		assert.ErrorContains(t, err, c.want)
	}
	// The last link sets the mode of all, which the documentation warns of.
	ns, ep, err := beside(ipvlan, "ipvlan", "mode", "l3")
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(ns.Run("ip", "-d", "link", "show", "dev", ep.ContainerLink), "ipvlan  mode l2"))
}
