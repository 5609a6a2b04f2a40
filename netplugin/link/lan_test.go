package link_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

// parent makes a veth pair whose first end is the parent of others.
func parent(ns *testkit.Netns) {
	ns.Run("ip", "link", "add", "lan0", "mtu", "1400", "type", "veth", "peer", "name", "lan1")
	ns.Run("ip", "link", "set", "lan0", "up")
	ns.Run("ip", "link", "set", "lan1", "up")
}

func child(i int) link.Child {
	return link.Child{
		Name: fmt.Sprintf("bc%d", i), Owner: link.OfEndpoint(fmt.Sprintf("e%d", i)), Parent: "lan0",
		Kind: "macvlan", Mode: "bridge", MAC: mac(fmt.Sprintf("02:00:00:00:01:%02x", i%250)), MTU: 1300,
	}
}

func ensureChild(t testing.TB, h *link.Handle, c link.Child) bool {
	t.Helper()
	created, err := h.EnsureChild(c)
	assert.NilError(t, err)
	return created
}

func TestChildIsMadeOnceAndAsWanted(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	parent(ns)
	for _, mode := range []string{"bridge", "private", "vepa", "passthru"} {
		c := child(1)
		c.Mode, c.BroadcastQueue = mode, 2000
		assert.Assert(t, ensureChild(t, h, c))
		assert.Assert(t, !ensureChild(t, h, c))
		l := get(t, h, c.Name)
		assert.Equal(t, l.Owner, c.Owner)
		assert.Equal(t, l.Kind, "macvlan")
		assert.Equal(t, l.MTU, 1300)
		assert.Equal(t, l.MAC.String(), c.MAC.String())
		assert.Assert(t, !l.Up)
		ns.Run("ip", "link", "set", c.Name, "mtu", "1200", "address", "02:00:00:00:00:99")
		assert.Assert(t, !ensureChild(t, h, c))
		l = get(t, h, c.Name)
		assert.Equal(t, l.MTU, 1300)
		assert.Equal(t, l.MAC.String(), c.MAC.String())
		assert.NilError(t, h.DeleteAnywhere(c.Name, c.Owner))
		gone(t, h, c.Name)
		assert.NilError(t, h.DeleteAnywhere(c.Name, c.Owner))
	}
}

func TestWhatTheKernelRefusesIsSaidInWords(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	c := child(1)
	_, err := h.EnsureChild(c)
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	parent(ns)
	c.MTU = 1500
	_, err = h.EnsureChild(c)
	assert.ErrorContains(t, err, `MTU 1500 is more than that of parent "lan0", 1400`)
	c.MTU = 0
	ensureChild(t, h, c)
	second := child(2)
	second.Mode = "passthru"
	_, err = h.EnsureChild(second)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "must be the only one")
	assert.NilError(t, h.DeleteAnywhere(c.Name, c.Owner))
	ensureChild(t, h, second)
	_, err = h.EnsureChild(c)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "passthru")
	assert.NilError(t, h.DeleteAnywhere(second.Name, second.Owner))
	ns.Run("ip", "link", "add", "br0", "type", "bridge")
	ns.Run("ip", "link", "set", "lan0", "master", "br0")
	_, err = h.EnsureChild(c)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "port of another link")
}

func TestLinksInOtherNamespacesAreFound(t *testing.T) {
	ns, container := testkit.NewNetns(t), testkit.NewNetns(t)
	h := open(t, ns)
	parent(ns)
	ensureChild(t, h, child(1))
	ensureChild(t, h, child(2))
	found, err := h.Elsewhere()
	assert.NilError(t, err)
	assert.Equal(t, len(found), 0)
	ns.Run("ip", "link", "set", "bc1", "netns", container.Path(), "name", "eth0")
	container.Run("ip", "link", "set", "eth0", "up")
	// As when Berth starts again.
	h = open(t, ns)
	found, err = h.Elsewhere()
	assert.NilError(t, err)
	assert.Equal(t, len(found), 1)
	l := found[0]
	assert.Equal(t, l.Owner, child(1).Owner)
	assert.Equal(t, l.Name, "eth0")
	assert.Assert(t, l.Away && l.Peer == 0 && l.Up)
	owned, err := h.Owned()
	assert.NilError(t, err)
	assert.Equal(t, len(owned), 1)
	assert.Assert(t, owned[0].Owner == child(2).Owner && owned[0].Peer != 0)

	// Somebody has taken the name here meanwhile: that stays, ours goes.
	ns.Run("ip", "link", "add", "bc1", "type", "bridge")
	err = h.DeleteAnywhere("bc1", child(1).Owner)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.Equal(t, container.Run("ip", "-o", "link", "show", "type", "macvlan"), "")
	get(t, h, "bc1")
	found, err = h.Elsewhere()
	assert.NilError(t, err)
	assert.Equal(t, len(found), 0)
}

func TestPrivateLinkCarriesFrames(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	for i := range 2 {
		created, err := h.EnsurePrivate(link.Private{Name: "bp1", Peer: "bq1", NetworkID: networkID, MAC: mac("02:00:00:00:00:07"), MTU: 1400})
		assert.NilError(t, err)
		assert.Equal(t, created, i == 0)
	}
	l := get(t, h, "bp1")
	assert.Assert(t, l.Up && l.Carrier && l.MTU == 1400)
	var ends []*testkit.Netns
	for i := range 2 {
		c := child(i)
		c.Parent = "bp1"
		ensureChild(t, h, c)
		end := testkit.NewNetns(t)
		ns.Run("ip", "link", "set", c.Name, "netns", end.Path(), "name", "eth0")
		end.Run("ip", "addr", "add", fmt.Sprintf("10.0.0.%d/24", i+1), "dev", "eth0")
		end.Run("ip", "link", "set", "eth0", "up")
		ends = append(ends, end)
	}
	ends[1].Serve()
	assert.Equal(t, ends[0].Call("10.0.0.2", 3*time.Second), "10.0.0.1")
	assert.NilError(t, h.Delete("bp1", link.OfNetwork(networkID)))
	assert.Equal(t, ns.Run("ip", "-o", "link", "show", "type", "veth"), "")
	assert.Equal(t, ends[0].Run("ip", "-o", "link", "show", "type", "macvlan"), "")
}

func TestHostRoutes(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	parent(ns)
	ns.Run("ip", "addr", "add", "192.0.2.1/24", "dev", "lan0")
	ns.Run("ip", "addr", "add", "2001:db8::1/64", "dev", "lan0", "nodad")
	s := link.Shim{
		Child:   link.Child{Name: "bs1", Owner: link.OfParent("lan0"), Parent: "lan0", Kind: "macvlan", Mode: "bridge", MAC: mac("02:00:00:00:00:55")},
		IPv6:    true,
		Proxied: []netip.Addr{netip.MustParseAddr("2001:db8::1")},
	}
	for i := range 2 {
		created, err := h.EnsureShim(s)
		assert.NilError(t, err)
		assert.Equal(t, created, i == 0)
	}
	l := get(t, h, "bs1")
	assert.Assert(t, l.Up)
	proxied, err := h.Proxied(l)
	assert.NilError(t, err)
	assert.Assert(t, slices.Equal(proxied, s.Proxied))
	for _, r := range []link.HostRoute{
		{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("192.0.2.1")},
		{netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("2001:db8::1")},
	} {
		for i := range 2 {
			changed, err := h.SetHostRoute("bs1", r)
			assert.NilError(t, err)
			assert.Equal(t, changed, i == 0)
		}
		routes, err := h.HostRoutes(l)
		assert.NilError(t, err)
		assert.Equal(t, len(routes), 1)
		assert.Equal(t, routes[0], r)
		assert.NilError(t, h.DeleteHostRoute("bs1", r.To))
		assert.NilError(t, h.DeleteHostRoute("bs1", r.To))
	}
	s.Proxied = nil
	_, err = h.EnsureShim(s)
	assert.NilError(t, err)
	proxied, err = h.Proxied(l)
	assert.NilError(t, err)
	assert.Equal(t, len(proxied), 0)
}

// A look at all containers of a host.
func BenchmarkElsewhere200(b *testing.B) {
	ns := testkit.NewNetns(b)
	h := open(b, ns)
	parent(ns)
	for i := range 200 {
		ensureChild(b, h, child(i))
		ns.Run("ip", "link", "set", fmt.Sprintf("bc%d", i), "netns", testkit.NewNetns(b).Path(), "name", "eth0")
	}
	for b.Loop() {
		found, err := h.Elsewhere()
		assert.NilError(b, err)
		assert.Equal(b, len(found), 200)
	}
}
