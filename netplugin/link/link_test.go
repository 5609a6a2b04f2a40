package link_test

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

const (
	networkID  = "n1n1n1n1n1n1"
	endpointID = "e1e1e1e1e1e1"
)

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

func open(t testing.TB, ns *testkit.Netns) *link.Handle {
	t.Helper()
	h, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(h.Close)
	return h
}

func bridge() link.Bridge {
	return link.Bridge{Name: "bth1", NetworkID: networkID, MAC: mac("02:00:00:00:00:01"), MTU: 1400}
}

func veth() link.Veth {
	return link.Veth{
		Host: "bv1", Container: "bc1", EndpointID: endpointID, Master: "bth1",
		MAC: mac("02:00:00:00:00:02"), MTU: 1400,
	}
}

func get(t testing.TB, h *link.Handle, name string) link.Link {
	t.Helper()
	l, ok, err := h.Get(name)
	assert.NilError(t, err)
	assert.Assert(t, ok, "link %s does not exist", name)
	return l
}

func gone(t testing.TB, h *link.Handle, name string) {
	t.Helper()
	_, ok, err := h.Get(name)
	assert.NilError(t, err)
	assert.Assert(t, !ok, "link %s still exists", name)
}

func ensureBridge(t testing.TB, h *link.Handle, b link.Bridge) bool {
	t.Helper()
	created, err := h.EnsureBridge(b)
	assert.NilError(t, err)
	return created
}

func ensureVeth(t testing.TB, h *link.Handle, v link.Veth) bool {
	t.Helper()
	created, err := h.EnsureVeth(v)
	assert.NilError(t, err)
	return created
}

func TestBridgeIsMadeOnceAndAsWanted(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	assert.Assert(t, ensureBridge(t, h, bridge()))
	assert.Assert(t, !ensureBridge(t, h, bridge()))

	l := get(t, h, "bth1")
	assert.Equal(t, l.Kind, "bridge")
	assert.Equal(t, l.MTU, 1400)
	assert.Equal(t, l.MAC.String(), "02:00:00:00:00:01")
	assert.Assert(t, l.Up)
	assert.Equal(t, l.Owner, link.OfNetwork(networkID))
	detail := ns.Run("ip", "-d", "link", "show", "bth1")
	assert.Assert(t, strings.Contains(detail, "forward_delay 0 "), detail)
	assert.Assert(t, strings.Contains(detail, "stp_state 0"), detail)
}

func TestBridgeIsRepaired(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ensureBridge(t, h, bridge())
	ns.Run("ip", "link", "set", "bth1", "down", "mtu", "1300", "address", "02:00:00:00:00:99")
	assert.Assert(t, !ensureBridge(t, h, bridge()))
	l := get(t, h, "bth1")
	assert.Assert(t, l.Up)
	assert.Equal(t, l.MTU, 1400)
	assert.Equal(t, l.MAC.String(), "02:00:00:00:00:01")
}

// The kernel lets the MTU of a bridge follow its ports, and go back to 1500 with
// the last of them, unless it has been told otherwise.
func TestBridgeKeepsItsMTUAndMACWhenContainersComeAndGo(t *testing.T) {
	for _, mtu := range []int{1400, 1500, 9000} {
		ns := testkit.NewNetns(t)
		h := open(t, ns)
		b, v := bridge(), veth()
		b.MTU, v.MTU = mtu, mtu
		ensureBridge(t, h, b)
		ensureVeth(t, h, v)
		assert.NilError(t, h.Delete("bv1", link.OfEndpoint(endpointID)))
		l := get(t, h, "bth1")
		assert.Equal(t, l.MTU, mtu)
		assert.Equal(t, l.MAC.String(), "02:00:00:00:00:01")
	}
}

func TestForeignLinksAreNeitherTakenOverNorRemoved(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ns.Run("ip", "link", "add", "bth1", "type", "bridge")
	ns.Run("ip", "link", "add", "bv1", "type", "bridge")
	ns.Run("ip", "link", "add", "bth2", "type", "bridge")
	ns.Run("ip", "link", "set", "bth2", "alias", "berth network other")

	_, err := h.EnsureBridge(bridge())
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, `"bth1"`)
	err = h.Delete("bth1", link.OfNetwork(networkID))
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	err = h.DeleteBridge("bth2", networkID)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "berth network other")
	err = h.SetAddrs("bth1", nil)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)

	b := bridge()
	b.Name = "bth3"
	ensureBridge(t, h, b)
	v := veth()
	v.Master = "bth3"
	_, err = h.EnsureVeth(v)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	// The name of the container's end may be taken, too.
	v.Host, v.Container = "bv2", "bv1"
	created, err := h.EnsureVeth(v)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.Assert(t, !created)
	gone(t, h, "bv2")
	for _, name := range []string{"bth1", "bth2", "bv1"} {
		get(t, h, name)
	}
}

func TestUnknownLinkIsRemovedWithSuccess(t *testing.T) {
	h := open(t, testkit.NewNetns(t))
	assert.NilError(t, h.Delete("nothing", link.OfEndpoint(endpointID)))
	assert.NilError(t, h.DeleteBridge("nothing", networkID))
}

func TestHalfMadeLinkIsReplaced(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ensureBridge(t, h, bridge())
	// As after a crash between the first message and the second.
	ns.Run("ip", "link", "add", "bv1", "group", "23784", "type", "veth", "peer", "name", "bc1")
	owned, err := h.Owned()
	assert.NilError(t, err)
	assert.Equal(t, len(owned), 2)
	assert.Assert(t, ensureVeth(t, h, veth()))
	assert.Equal(t, get(t, h, "bv1").Owner, link.OfEndpoint(endpointID))
}

func TestEndpointLinks(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ensureBridge(t, h, bridge())
	assert.Assert(t, ensureVeth(t, h, veth()))
	assert.Assert(t, !ensureVeth(t, h, veth()))

	host, container := get(t, h, "bv1"), get(t, h, "bc1")
	assert.Equal(t, host.Master, get(t, h, "bth1").Index)
	assert.Equal(t, host.MTU, 1400)
	assert.Assert(t, host.Up)
	assert.Equal(t, host.Owner, link.OfEndpoint(endpointID))
	assert.Equal(t, host.Peer, container.Index)
	assert.Equal(t, container.MTU, 1400)
	assert.Equal(t, container.MAC.String(), "02:00:00:00:00:02")
	assert.Assert(t, !container.Up)
	assert.Equal(t, container.Master, 0)
	assert.Assert(t, !container.Owner.Ours)

	ns.Run("ip", "link", "set", "bv1", "nomaster", "down", "mtu", "1300")
	ns.Run("ip", "link", "set", "bc1", "mtu", "1300", "address", "02:00:00:00:00:99")
	assert.Assert(t, !ensureVeth(t, h, veth()))
	assert.DeepEqual(t, get(t, h, "bv1"), host)
	assert.DeepEqual(t, get(t, h, "bc1"), container)
}

func TestPortHasNoAddressOfItsOwn(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ensureBridge(t, h, bridge())
	ensureVeth(t, h, veth())
	ns.Run("ip", "link", "set", "bc1", "up")
	assert.Equal(t, ns.Run("ip", "-6", "addr", "show", "dev", "bv1"), "")
}

func TestEndpointIsRemovedWhereverItsContainerEndIs(t *testing.T) {
	ns, container := testkit.NewNetns(t), testkit.NewNetns(t)
	h, inside := open(t, ns), open(t, container)
	ensureBridge(t, h, bridge())

	ensureVeth(t, h, veth())
	ns.Run("ip", "link", "set", "bc1", "netns", container.Path(), "name", "eth0")
	container.Run("ip", "link", "set", "eth0", "up")
	assert.Assert(t, !ensureVeth(t, h, veth()))
	assert.Equal(t, get(t, h, "bv1").Peer, 0)
	assert.NilError(t, h.Delete("bv1", link.OfEndpoint(endpointID)))
	gone(t, h, "bv1")
	gone(t, inside, "eth0")

	ensureVeth(t, h, veth())
	ns.Run("ip", "link", "set", "bc1", "netns", container.Path(), "name", "eth0")
	container.Run("ip", "link", "set", "eth0", "netns", ns.Path(), "name", "bc1")
	assert.NilError(t, h.Delete("bv1", link.OfEndpoint(endpointID)))
	gone(t, h, "bv1")
	gone(t, h, "bc1")
	assert.NilError(t, h.Delete("bv1", link.OfEndpoint(endpointID)))
}

func TestBridgeGoesWithWhatIsLeftOnIt(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ensureBridge(t, h, bridge())
	ensureVeth(t, h, veth())
	ns.Run("ip", "link", "add", "tap", "type", "veth", "peer", "name", "tap0")
	ns.Run("ip", "link", "set", "tap", "master", "bth1")
	assert.NilError(t, h.DeleteBridge("bth1", networkID))
	gone(t, h, "bth1")
	gone(t, h, "bv1")
	gone(t, h, "bc1")
	get(t, h, "tap")
}

func TestAddressesAreExactlyThoseWanted(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	b := bridge()
	b.IPv6 = true
	ns.Run("sysctl", "-qw", "net.ipv6.conf.all.accept_dad=1")
	ensureBridge(t, h, b)
	v4, v6 := netip.MustParsePrefix("10.1.0.1/24"), netip.MustParsePrefix("fd00:1::1/64")
	// The foreign one is the primary address of the same subnet: the kernel drops
	// the wanted one with it.
	ns.Run("ip", "addr", "add", "10.1.0.9/24", "dev", "bth1")
	ns.Run("ip", "addr", "add", "10.1.0.1/24", "dev", "bth1")
	ns.Run("ip", "addr", "add", "fd00:2::1/64", "dev", "bth1")
	for range 2 {
		assert.NilError(t, h.SetAddrs("bth1", []netip.Prefix{v4, v6}))
		have, err := h.Addrs("bth1")
		assert.NilError(t, err)
		assert.DeepEqual(t, have, []netip.Prefix{v4, v6}, comparePrefix())
	}
	// Usable at once, although the bridge has no carrier.
	assert.Assert(t, !strings.Contains(ns.Run("ip", "-6", "addr", "show", "dev", "bth1", "scope", "global"), "tentative"))
	assert.NilError(t, h.SetAddrs("bth1", nil))
	have, err := h.Addrs("bth1")
	assert.NilError(t, err)
	assert.Equal(t, len(have), 0)
}

func TestRoutesOfAllTables(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ns.Run("ip", "link", "add", "up0", "type", "bridge")
	ns.Run("ip", "link", "set", "up0", "up")
	ns.Run("ip", "addr", "add", "192.0.2.2/24", "dev", "up0")
	ns.Run("ip", "route", "add", "default", "via", "192.0.2.1")
	ns.Run("ip", "route", "add", "10.9.0.0/16", "via", "192.0.2.1", "table", "77")
	ns.Run("ip", "route", "add", "blackhole", "10.8.0.0/16")
	ns.Run("ip", "-6", "route", "add", "fd00:9::/64", "dev", "up0")
	routes, err := h.Routes()
	assert.NilError(t, err)
	up := get(t, h, "up0").Index
	for _, want := range []link.Route{
		{Dst: netip.MustParsePrefix("192.0.2.0/24"), Link: up, OnLink: true},
		{Dst: netip.MustParsePrefix("0.0.0.0/0"), Link: up},
		{Dst: netip.MustParsePrefix("10.9.0.0/16"), Link: up},
		{Dst: netip.MustParsePrefix("10.8.0.0/16")},
		{Dst: netip.MustParsePrefix("fd00:9::/64"), Link: up, OnLink: true},
	} {
		assert.Assert(t, slices.Contains(routes, want), "%v is not in %v", want, routes)
	}
	for _, r := range routes {
		assert.Assert(t, r.Dst.Addr().String() != "192.0.2.2", "%v is of table local", r)
	}
}
