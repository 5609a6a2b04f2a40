package lan_test

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/lan"
	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// onLAN is a host with a parent.
func onLAN(t testing.TB) *testkit.Netns {
	t.Helper()
	ns := testkit.NewNetns(t)
	modetest.PrepareLAN(ns)
	return ns
}

func macvlan(i int, change func(*options.Network)) options.Network {
	n := modetest.LANNetwork(options.ModeMacvlan, i)
	if change != nil {
		change(&n)
	}
	return n
}

func hostAccess(n *options.Network) { n.LAN.HostAccess = true }

// plug moves an endpoint's link as dockerd does.
func plug(t testing.TB, ns *testkit.Netns, ep options.Endpoint) *testkit.Netns {
	t.Helper()
	c := testkit.NewNetns(t)
	ns.Run("ip", "link", "set", ep.ContainerLink, "netns", c.Path(), "name", "eth0")
	c.Run("ip", "addr", "add", ep.IPv4.String(), "dev", "eth0")
	c.Run("ip", "addr", "add", ep.IPv6.String(), "dev", "eth0", "nodad")
	c.Run("ip", "link", "set", "eth0", "up")
	c.Serve()
	return c
}

func TestWhatAdoptFindsOnTheHost(t *testing.T) {
	ns := onLAN(t)
	m := mode(t, ns)
	ns.Run("ip", "link", "set", modetest.Parent, "mtu", "1450")
	open := func(n *options.Network) { n.MTU = 0 }
	for name, change := range map[string]func(*options.Network){
		"parent":         open,
		"VLAN to be":     func(n *options.Network) { n.MTU, n.LAN.Parent = 0, modetest.Parent+".50" },
		"host access":    func(n *options.Network) { n.MTU, n.LAN.HostAccess = 0, true },
		"ipvlan":         func(n *options.Network) { n.MTU, n.Mode, n.LAN.Type = 0, options.ModeIPvlan, options.IPvlanL2 },
		"passthru alone": func(n *options.Network) { n.MTU, n.LAN.Type = 0, options.MacvlanPassthru },
	} {
		n, err := m.Adopt(t.Context(), macvlan(1, change))
		assert.NilError(t, err, name)
		assert.Equal(t, n.MTU, 1450, name)
	}
	n, err := m.Adopt(t.Context(), macvlan(1, nil))
	assert.NilError(t, err)
	assert.Equal(t, n.MTU, 1400)
}

func TestParentsThatCannotBeUsed(t *testing.T) {
	ns := onLAN(t)
	m := mode(t, ns)
	ns.Run("ip", "link", "add", "br0", "type", "bridge")
	ns.Run("ip", "link", "add", "port0", "master", "br0", "type", "veth", "peer", "name", "port1")
	parent := func(name string) func(*options.Network) { return func(n *options.Network) { n.LAN.Parent = name } }
	private := macvlan(7, func(n *options.Network) { n.LAN.Parent = "" })
	assert.NilError(t, m.EnsureNetwork(t.Context(), private))
	own, _ := options.PrivateLinks(private.ID)
	for _, c := range []struct {
		change func(*options.Network)
		want   string
		is     func(error) bool
	}{
		{parent("eth7"), `option parent=eth7: parent "eth7" does not exist: the host has br0, lan0, lan1, port1`, errdefs.IsInvalidArgument},
		{parent("eth7.50"), `parent "eth7" does not exist: the host has`, errdefs.IsInvalidArgument},
		{parent("port0"), `parent "port0" is a port of another link (br0): use that as the parent`, errdefs.IsConflict},
		{parent(own), "is a link of Berth's own", errdefs.IsConflict},
		{func(n *options.Network) { n.MTU = 9000 }, `option mtu=9000: it is more than that of parent "lan0", 1500`, errdefs.IsInvalidArgument},
		{func(n *options.Network) { n.MTU, n.LAN.Parent = 9000, "lan0.50" }, `option mtu=9000: it is more than that of link "lan0" of VLAN "lan0.50", 1500`, errdefs.IsInvalidArgument},
		{func(n *options.Network) { n.LAN.Parent, n.LAN.HostAccess = "port1", true }, `parent "port1" has no address in subnet 10.0.1.0/24`, errdefs.IsInvalidArgument},
	} {
		_, err := m.Adopt(t.Context(), macvlan(1, c.change))
		assert.ErrorContains(t, err, c.want)
		assert.Assert(t, c.is(err), "%v", err)
	}
	ns.Run("ip", "tuntap", "add", "tun7", "mode", "tun")
	_, err := m.Adopt(t.Context(), macvlan(1, func(n *options.Network) { n.MTU, n.LAN.Parent = 0, "tun7" }))
	assert.ErrorContains(t, err, `option parent=tun7: want an Ethernet link, "tun7" has no MAC address`)
	ns.Run("sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=1")
	_, err = m.Adopt(t.Context(), macvlan(1, hostAccess))
	assert.ErrorContains(t, err, "arp_ignore")
}

func TestNetworksThatCannotShareAParent(t *testing.T) {
	kind := func(mode options.Mode, kind, flag string) func(*options.Network) {
		return func(n *options.Network) { n.Mode, n.LAN.Type, n.LAN.Flag = mode, kind, flag }
	}
	bridge, passthru := kind(options.ModeMacvlan, "bridge", ""), kind(options.ModeMacvlan, "passthru", "")
	l2, l3, private := kind(options.ModeIPvlan, "l2", "bridge"), kind(options.ModeIPvlan, "l3", "bridge"), kind(options.ModeIPvlan, "l2", "private")
	for _, c := range []struct {
		first, second func(*options.Network)
		want          string
	}{
		{bridge, passthru, "a network with macvlan_mode=passthru must be the only one on its parent"},
		{passthru, bridge, "it has macvlan_mode=passthru and must be the only one"},
		{bridge, l2, "the kernel does not put ipvlan links beside macvlan links, want another parent or mode=macvlan"},
		{l2, l3, "all ipvlan networks on a parent have one mode, want ipvlan_mode=l2 and ipvlan_flag=bridge"},
		{l2, private, "want ipvlan_mode=l2 and ipvlan_flag=bridge"},
		{bridge, kind(options.ModeMacvlan, "private", ""), ""},
		{l2, l2, ""},
	} {
		ns := onLAN(t)
		m := mode(t, ns)
		first, second := macvlan(1, c.first), macvlan(2, c.second)
		assert.NilError(t, m.EnsureNetwork(t.Context(), first))
		_, err := m.Adopt(t.Context(), second)
		if c.want == "" {
			assert.NilError(t, err)
			assert.NilError(t, m.EnsureNetwork(t.Context(), second))
			continue
		}
		assert.ErrorContains(t, err, c.want)
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.Assert(t, errdefs.IsConflict(m.EnsureNetwork(t.Context(), second)))
		// The driver undoes; the first is not touched, and its end makes room.
		assert.NilError(t, m.RemoveNetwork(t.Context(), second))
		assert.Assert(t, errdefs.IsConflict(m.EnsureNetwork(t.Context(), second)))
		assert.NilError(t, m.RemoveNetwork(t.Context(), first))
		assert.NilError(t, m.EnsureNetwork(t.Context(), second))
	}
}

func TestForeignLinksOfTheOtherKindOnTheParent(t *testing.T) {
	ns := onLAN(t)
	m := mode(t, ns)
	ns.Run("ip", "link", "add", "link", modetest.Parent, "name", "own0", "type", "macvlan", "mode", "bridge")
	_, err := m.Adopt(t.Context(), macvlan(1, nil))
	assert.NilError(t, err)
	_, err = m.Adopt(t.Context(), macvlan(1, func(n *options.Network) { n.Mode, n.LAN.Type = options.ModeIPvlan, options.IPvlanL2 }))
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, `parent "lan0" has the macvlan link "own0" on it: the kernel does not put ipvlan links beside, want another parent`)
}

func TestPassthruHasOneContainer(t *testing.T) {
	ns := onLAN(t)
	m := mode(t, ns)
	n := macvlan(1, func(n *options.Network) { n.LAN.Type = options.MacvlanPassthru })
	ep, second := modetest.LANEndpoint(n, 1), modetest.LANEndpoint(n, 2)
	assert.Assert(t, ep.MAC == nil)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	l, ok, err := handle(t, ns).Get(ep.ContainerLink)
	assert.NilError(t, err)
	assert.Assert(t, ok)
	assert.Equal(t, l.MAC.String(), "02:00:00:00:aa:00", "that of the parent")
	c := plug(t, ns, ep)
	err = m.EnsureEndpoint(t.Context(), n, second)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "must be the only one")
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, second))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	c.Run("ip", "link", "show", "dev", "eth0")
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, second))
}

func TestAddressOfTheHostIsNotAContainers(t *testing.T) {
	ns := onLAN(t)
	m, n := mode(t, ns), macvlan(1, nil)
	ns.Run("ip", "addr", "add", "10.0.1.2/24", "dev", modetest.Parent)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	err := m.EnsureEndpoint(t.Context(), n, modetest.LANEndpoint(n, 1))
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, `address 10.0.1.2 is the host's own on "lan0"`)
}

func TestDriftIsFoundAndRepaired(t *testing.T) {
	ns := onLAN(t)
	m := mode(t, ns)
	n, private := macvlan(1, hostAccess), macvlan(2, func(n *options.Network) { n.LAN.Parent = "" })
	ep := modetest.LANEndpoint(n, 1)
	shim := options.ShimName(modetest.Parent)
	bp, _ := options.PrivateLinks(private.ID)
	all := []options.Network{n, private, modetest.Network(3)}
	repair := func() {
		t.Helper()
		assert.NilError(t, m.EnsureNetwork(t.Context(), n))
		assert.NilError(t, m.EnsureNetwork(t.Context(), private))
		assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
		found, err := m.Drift(all)
		assert.NilError(t, err)
		assert.Equal(t, len(found), 0, "%v", found)
	}
	repair()
	c := plug(t, ns, ep)
	repair()
	for _, d := range []struct {
		damage, want string
		network      options.Network
	}{
		{"ip link del " + shim, `link "` + shim + `" for access to the host is missing`, n},
		{"ip link set " + shim + " down", "is down", n},
		{"ip link set " + shim + " address 02:00:00:00:00:77", "has MAC address 02:00:00:00:00:77", n},
		{"ip link set " + shim + " alias x", "has lost its mark", n},
		{"ip route flush dev " + shim, "lacks the route to 10.0.1.2", n},
		{"ip -6 route flush dev " + shim + " proto 184", "lacks the route to fd00:0:0:1::2", n},
		{"ip neigh del proxy " + modetest.HostAddr(n.Subnets[1]).String() + " dev " + shim, "answers for [] instead of", n},
		{"ip addr add fd00:0:0:1::77/64 dev lan0 nodad", "answers for [", n},
		{"ip link del " + bp, `private link "` + bp + `" is missing`, private},
		{"ip link set " + bp + " down", "is down", private},
	} {
		ns.Run(strings.Fields(d.damage)...)
		found, err := m.Drift(all)
		assert.NilError(t, err)
		assert.Equal(t, len(found), 1, "%s: %v", d.damage, found)
		assert.Assert(t, strings.Contains(found[d.network.ID], d.want), "%s: %v", d.damage, found)
		if strings.Contains(d.damage, "alias") {
			// Not Berth's any more, so Berth leaves it alone.
			assert.Assert(t, errdefs.IsConflict(m.EnsureNetwork(t.Context(), n)))
			ns.Run("ip", "link", "del", shim)
		}
		repair()
		assert.Equal(t, ns.Call(ep.IPv4.Addr().String(), 3*time.Second), modetest.HostAddr(n.Subnets[0]).String(), d.damage)
		assert.Equal(t, c.Call("10.0.1.250", 100*time.Millisecond), "") // nobody serves
	}
	// A parent that somebody has taken down is his business.
	ns.Run("ip", "link", "set", modetest.Parent, "down")
	found, err := m.Drift(all)
	assert.NilError(t, err)
	assert.Equal(t, len(found), 0, "%v", found)
}

func TestParentThatGoesAndComesBack(t *testing.T) {
	ns := onLAN(t)
	m, n := mode(t, ns), macvlan(1, hostAccess)
	ep, next := modetest.LANEndpoint(n, 1), modetest.LANEndpoint(n, 2)
	assert.NilError(t, m.Restore(t.Context(), nil, nil))
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	plug(t, ns, ep)
	assert.Assert(t, lan.Parents([]options.Network{n})[modetest.Parent])

	ns.Run("ip", "link", "del", modetest.Parent)
	found, err := m.Drift([]options.Network{n})
	assert.NilError(t, err)
	assert.Equal(t, found[n.ID], `parent "lan0" is missing`)
	err = m.EnsureNetwork(t.Context(), n)
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	away, err := handle(t, ns).Elsewhere()
	assert.NilError(t, err)
	assert.Equal(t, len(away), 0, "the kernel has removed the containers' links")
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))

	// It comes while a container starts.
	back := make(chan struct{})
	go func() {
		defer close(back)
		time.Sleep(500 * time.Millisecond)
		modetest.PrepareLAN(ns)
	}()
	assert.NilError(t, m.EnsureEndpoint(t.Context(), macvlan(1, nil), next))
	<-back
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, next))
	plug(t, ns, next)
	assert.Equal(t, ns.Call(next.IPv4.Addr().String(), 3*time.Second), modetest.HostAddr(n.Subnets[0]).String())
}

func TestParentThatStaysDown(t *testing.T) {
	ns := onLAN(t)
	m, n := mode(t, ns), macvlan(1, nil)
	ns.Run("ip", "link", "set", modetest.Parent, "down")
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	began := time.Now()
	err := m.EnsureEndpoint(t.Context(), n, modetest.LANEndpoint(n, 1))
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, `parent "lan0" is down: run`)
	assert.Assert(t, time.Since(began) < 8*time.Second)
}

func TestShimIsSharedAndGoesWithTheLast(t *testing.T) {
	ns := onLAN(t)
	m := mode(t, ns)
	first, second, plain := macvlan(1, hostAccess), macvlan(2, hostAccess), macvlan(3, nil)
	second.LAN.HostAddrs = append(second.LAN.HostAddrs, modetest.HostAddr(second.Subnets[0]))
	shim := options.ShimName(modetest.Parent)
	addrs := func() string { return ns.Run("ip", "-4", "-br", "addr", "show", "dev", shim) }
	for _, n := range []options.Network{first, second, plain} {
		assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	}
	assert.Assert(t, strings.Contains(addrs(), "10.0.2.250/32"), addrs())
	assert.NilError(t, m.RemoveNetwork(t.Context(), second))
	assert.Assert(t, !strings.Contains(addrs(), "10.0.2.250/32"), addrs())
	assert.NilError(t, m.RemoveNetwork(t.Context(), first))
	_, ok, err := handle(t, ns).Get(shim)
	assert.NilError(t, err)
	assert.Assert(t, !ok)

	// Left by a Berth whose records are gone.
	assert.NilError(t, m.EnsureNetwork(t.Context(), first))
	m = mode(t, ns)
	assert.NilError(t, m.Restore(t.Context(), []options.Network{first}, nil))
	_, ok, err = handle(t, ns).Get(shim)
	assert.NilError(t, err)
	assert.Assert(t, ok)
	assert.NilError(t, m.Restore(t.Context(), []options.Network{plain}, nil))
	_, ok, err = handle(t, ns).Get(shim)
	assert.NilError(t, err)
	assert.Assert(t, !ok)
}

func TestForeignLinkByTheNameOfTheShim(t *testing.T) {
	ns := onLAN(t)
	m, n := mode(t, ns), macvlan(1, hostAccess)
	shim := options.ShimName(modetest.Parent)
	ns.Run("ip", "link", "add", shim, "type", "bridge")
	err := m.EnsureNetwork(t.Context(), n)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, shim)
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
	_, ok, err := handle(t, ns).Get(shim)
	assert.NilError(t, err)
	assert.Assert(t, ok)
}

func TestPortsAreNotPublished(t *testing.T) {
	ns := onLAN(t)
	m, n := mode(t, ns), macvlan(1, nil)
	ep := modetest.LANEndpoint(n, 1)
	ports, err := m.ReservePorts(t.Context(), n, ep, []options.PortRequest{{Proto: options.TCP, HostPort: 80, HostPortEnd: 80, ContainerPort: 80}})
	assert.NilError(t, err)
	assert.Equal(t, len(ports), 0)
	assert.NilError(t, m.EnsurePorts(t.Context(), n, ep))
	assert.NilError(t, m.RemovePorts(t.Context(), n, ep))
}
