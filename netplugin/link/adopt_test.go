package link_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

func TestAdoptedBridgeKeepsWhatItHas(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	gw4, gw6 := netip.MustParsePrefix("10.1.0.1/24"), netip.MustParsePrefix("fd00:1::1/64")
	_, err := h.AdoptBridge("lan", nil)
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.ErrorContains(t, err, `"lan" is gone`)

	ns.Run("ip", "link", "add", "lan", "mtu", "1300", "address", "02:00:00:00:00:77", "type", "bridge")
	ns.Run("ip", "link", "set", "lan", "alias", "the office", "group", "7")
	ns.Run("ip", "addr", "add", "192.0.2.1/24", "dev", "lan")
	ns.Run("ip", "link", "add", "tap", "master", "lan", "type", "veth", "peer", "name", "tap0")
	before := ns.Run("sh", "-c", "ip -o link show lan | sed 's/<.*qdisc//; s/noqueue//; s/noop//; s/ state [A-Z]* / /'; ip -4 -o addr show lan")
	same := func() {
		t.Helper()
		assert.Equal(t, ns.Run("sh", "-c", "ip -o link show lan | sed 's/<.*qdisc//; s/noqueue//; s/noop//; s/ state [A-Z]* / /'; ip -4 -o addr show lan"), before)
	}
	added, err := h.AdoptBridge("lan", []netip.Prefix{gw4, gw6})
	assert.NilError(t, err)
	assert.DeepEqual(t, added, []netip.Prefix{gw4, gw6}, comparePrefix())
	added, err = h.AdoptBridge("lan", []netip.Prefix{gw4, gw6})
	assert.NilError(t, err)
	assert.Equal(t, len(added), 0)
	assert.Assert(t, get(t, h, "lan").Up)
	assert.Assert(t, !get(t, h, "lan").Owner.Ours)

	v := veth()
	v.Master, v.MTU, v.RateOut = "lan", 1500, 1_000_000
	assert.Assert(t, ensureVeth(t, h, v))
	for range 2 {
		assert.NilError(t, h.LeaveBridge("lan", []netip.Prefix{gw4, gw6}))
	}
	same()
	gone(t, h, "bv1")
	gone(t, h, "bi1")
	assert.Equal(t, get(t, h, "tap").Master, get(t, h, "lan").Index)
	assert.Assert(t, !strings.Contains(ns.Run("ip", "-6", "addr", "show", "dev", "lan"), "fd00:1::1"))

	ns.Run("sysctl", "-qw", "net.ipv6.conf.lan.disable_ipv6=1")
	_, err = h.AdoptBridge("lan", []netip.Prefix{gw6})
	assert.ErrorContains(t, err, "net.ipv6.conf.lan.disable_ipv6=0")

	// It is something else now.
	ns.Run("ip", "link", "del", "lan")
	assert.NilError(t, h.LeaveBridge("lan", []netip.Prefix{gw4}))
	ns.Run("ip", "link", "add", "lan", "type", "veth", "peer", "name", "lan0")
	_, err = h.AdoptBridge("lan", nil)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.NilError(t, h.LeaveBridge("lan", []netip.Prefix{gw4}))
	ns.Run("ip", "link", "del", "lan")
	b := bridge()
	b.Name = "lan"
	ensureBridge(t, h, b)
	_, err = h.AdoptBridge("lan", nil)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
}

func TestMTUOfTheDefaultRoute(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	want := func(mtu int) {
		t.Helper()
		got, err := h.DefaultMTU()
		assert.NilError(t, err)
		assert.Equal(t, got, mtu)
	}
	want(0)
	for i, mtu := range []string{"1280", "1400", "9000"} {
		name, net := "up"+mtu, "192.0."+string(rune('2'+i))+"."
		ns.Run("ip", "link", "add", name, "mtu", mtu, "type", "veth", "peer", "name", "x"+mtu)
		ns.Run("ip", "link", "set", name, "up")
		ns.Run("ip", "addr", "add", net+"2/24", "dev", name)
	}
	ns.Run("ip", "-6", "route", "add", "default", "dev", "up1280")
	want(1280)
	ns.Run("ip", "route", "add", "default", "via", "192.0.3.1", "metric", "200")
	want(1400)
	ns.Run("ip", "route", "add", "default", "via", "192.0.4.1", "metric", "100")
	want(9000)
	ns.Run("ip", "route", "add", "default", "metric", "50", "nexthop", "via", "192.0.3.1", "nexthop", "via", "192.0.4.1")
	got, err := h.DefaultMTU()
	assert.NilError(t, err)
	assert.Assert(t, got == 1400 || got == 9000, "%d is that of neither way", got)
	// IPv4 leads nowhere; a table that no rule names does not count.
	ns.Run("ip", "route", "add", "unreachable", "default", "metric", "10")
	ns.Run("ip", "route", "add", "default", "via", "192.0.4.1", "table", "77")
	want(1280)
	ns.Run("ip", "-6", "route", "add", "blackhole", "default", "metric", "10")
	want(0)
}

func TestDockersBridges(t *testing.T) {
	for name, want := range map[string]bool{
		"docker0": true, "docker_gwbridge": true, "br-0123456789ab": true,
		"br-lan": false, "br-0123456789ag": false, "br-0123456789abc": false, "bth0123456789ab": false, "docker1": false,
	} {
		assert.Equal(t, link.IsDocker(name), want, name)
	}
}
