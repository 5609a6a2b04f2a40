package bridge_test

import (
	"context"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

func handle(t testing.TB, ns *testkit.Netns) *link.Handle {
	t.Helper()
	links, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(links.Close)
	return links
}

// port is how the bridge treats the host's end of an endpoint.
func port(t testing.TB, ns *testkit.Netns, ep options.Endpoint) link.Port {
	t.Helper()
	l, ok, err := handle(t, ns).Get(ep.HostLink)
	assert.NilError(t, err)
	assert.Assert(t, ok)
	return l.Port
}

// plug does dockerd's part.
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

func TestContainersThatAreKeptApart(t *testing.T) {
	ns := testkit.NewNetns(t)
	m, n := mode(t, ns), modetest.Network(1)
	n.NoICC = true
	one, two := modetest.Endpoint(n, 1), modetest.Endpoint(n, 2)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, one))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, two))
	first := plug(t, ns, one)
	plug(t, ns, two)
	for _, to := range []string{two.IPv4.Addr().String(), two.IPv6.Addr().String()} {
		assert.Equal(t, first.Call(to, 300*time.Millisecond), "")
		assert.Assert(t, ns.Call(to, 3*time.Second) != "", to)
	}
}

func TestBridgesThatCannotBeAdopted(t *testing.T) {
	ns := testkit.NewNetns(t)
	m, n := mode(t, ns), modetest.Network(1)
	other := modetest.Network(2)
	assert.NilError(t, m.EnsureNetwork(t.Context(), other))
	ns.Run("ip", "link", "add", "br-0123456789ab", "type", "bridge")
	ns.Run("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
	ns.Run("ip", "link", "add", "lan", "type", "bridge")
	ns.Run("ip", "addr", "add", "10.0.1.77/24", "dev", "lan")
	for name, want := range map[string]string{
		other.Bridge: "another network of Berth", "br-0123456789ab": "Docker's own", "veth0": "is a veth, not a bridge", "lan": "--gateway 10.0.1.77",
	} {
		n.Bridge = name
		_, err := m.Adopt(t.Context(), n)
		assert.Assert(t, errdefs.IsConflict(err), "%s: %v", name, err)
		assert.ErrorContains(t, err, want)
		assert.ErrorContains(t, err, name)
	}
}

func TestWhatAdoptFindsOnTheHost(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := mode(t, ns)
	adopt := func(change func(*options.Network)) options.Network {
		t.Helper()
		n := modetest.Network(1)
		n.MTU = 0
		change(&n)
		n, err := m.Adopt(t.Context(), n)
		assert.NilError(t, err)
		return n
	}
	asIs := func(*options.Network) {}
	assert.Equal(t, adopt(asIs).MTU, 0)
	ns.Run("ip", "link", "add", "up0", "mtu", "1450", "type", "veth", "peer", "name", "up1")
	ns.Run("ip", "link", "set", "up0", "up")
	ns.Run("ip", "route", "add", "default", "dev", "up0")
	n := adopt(asIs)
	assert.Equal(t, n.MTU, 1450)
	assert.Assert(t, !n.Adopted && n.AdoptedAddrs == nil)
	assert.Equal(t, adopt(func(n *options.Network) { n.MTU = 1300 }).MTU, 1300)
	assert.Equal(t, adopt(func(n *options.Network) { n.Bridge = "" }).MTU, 1450)

	// Its own bridge, made by a try that was cut short.
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.Assert(t, !adopt(asIs).Adopted)

	ns.Run("ip", "link", "add", "lan", "mtu", "1400", "type", "bridge")
	ns.Run("ip", "addr", "add", n.Subnets[0].Gateway.String()+"/16", "dev", "lan")
	n = adopt(func(n *options.Network) { n.Bridge = "lan" })
	assert.Assert(t, n.Adopted)
	assert.Equal(t, n.MTU, 1400)
	assert.Equal(t, len(n.AdoptedAddrs), 1)
	assert.Equal(t, n.AdoptedAddrs[0], netip.PrefixFrom(n.Subnets[1].Gateway, 64))
}

func TestDriftIsFoundAndRepaired(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := mode(t, ns)
	ns.Run("ip", "link", "add", "lan", "type", "bridge")
	own, adopted := modetest.Network(1), modetest.Network(2)
	adopted.Bridge = "lan"
	adopted, err := m.Adopt(t.Context(), adopted)
	assert.NilError(t, err)
	all := []options.Network{own, adopted}
	repair := func() {
		t.Helper()
		for _, n := range all {
			assert.NilError(t, m.EnsureNetwork(t.Context(), n))
		}
		found, err := m.Drift(all)
		assert.NilError(t, err)
		assert.Equal(t, len(found), 0, "%v", found)
	}
	repair()
	gateway := own.Subnets[0].Gateway.String() + "/24"
	for _, c := range []struct {
		damage []string
		want   string
	}{
		{[]string{"ip", "link", "set", own.Bridge, "down"}, "is down"},
		{[]string{"ip", "addr", "del", gateway, "dev", own.Bridge}, "lacks address " + gateway},
		{[]string{"ip", "addr", "flush", "dev", own.Bridge, "scope", "global"}, "lacks address " + gateway + " and "},
		{[]string{"ip", "link", "set", own.Bridge, "mtu", "1300"}, "has MTU 1300 instead of 1400"},
		{[]string{"ip", "link", "set", own.Bridge, "address", "02:00:00:00:00:55"}, "has MAC address 02:00:00:00:00:55"},
		{[]string{"ip", "link", "set", own.Bridge, "alias", "", "group", "23784"}, "has lost its mark"},
		{[]string{"ip", "link", "del", own.Bridge}, "is missing"},
	} {
		ns.Run(c.damage...)
		found, err := m.Drift(all)
		assert.NilError(t, err)
		assert.Assert(t, strings.Contains(found[own.ID], c.want) && strings.Contains(found[own.ID], own.Bridge), "%v", found)
		assert.Equal(t, found[adopted.ID], "")
		repair()
	}
	ns.Run("ip", "addr", "flush", "dev", "lan", "scope", "global")
	ns.Run("ip", "link", "set", "lan", "down", "mtu", "1300")
	found, err := m.Drift(all)
	assert.NilError(t, err)
	assert.Equal(t, found[own.ID], "")
	assert.Assert(t, strings.HasPrefix(found[adopted.ID], `bridge "lan" is down, lacks address 10.0.2.1/24 and `), "%v", found)
	repair()
}

// As up to Engine 27, the container says nothing itself.
func TestNewContainersAreAnnounced(t *testing.T) {
	ns := testkit.NewNetns(t)
	m, n := mode(t, ns), modetest.Network(1)
	ctx, cancel := context.WithCancel(t.Context())
	var run sync.WaitGroup
	run.Go(func() { m.Run(ctx) })
	defer func() { cancel(); run.Wait() }()
	neighbour, ep := modetest.Endpoint(n, 1), modetest.Endpoint(n, 2)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, neighbour))
	c := plug(t, ns, neighbour)
	know := func() {
		for _, a := range []netip.Addr{ep.IPv4.Addr(), ep.IPv6.Addr()} {
			c.Run("ip", "neigh", "replace", a.String(), "lladdr", "02:00:00:00:00:aa", "dev", "eth0", "nud", "stale")
		}
	}
	learnt := func() bool {
		for range 100 {
			if strings.Count(c.Run("ip", "neigh", "show", "dev", "eth0"), ep.MAC.String()) == 2 {
				return true
			}
			time.Sleep(30 * time.Millisecond)
		}
		return false
	}
	know()
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	ns.Run("ip", "link", "set", ep.ContainerLink, "up") // not yet in a container
	ns.Run("ip", "link", "set", ep.ContainerLink, "down")
	assert.Assert(t, strings.Contains(c.Run("ip", "neigh", "show", "dev", "eth0"), "02:00:00:00:00:aa"))
	silent := testkit.NewNetns(t)
	ns.Run("ip", "link", "set", ep.ContainerLink, "netns", silent.Path(), "name", "eth0")
	silent.Run("ip", "link", "set", "eth0", "up")
	assert.Assert(t, learnt())
	// More than once; then no more after the endpoint is gone.
	know()
	assert.Assert(t, learnt())
	know()
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))
	know()
	time.Sleep(1600 * time.Millisecond)
	assert.Assert(t, !strings.Contains(c.Run("ip", "neigh", "show", "dev", "eth0"), ep.MAC.String()))
}
