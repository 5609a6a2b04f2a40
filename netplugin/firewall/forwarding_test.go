package firewall

import (
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/testkit"
)

func sysctl(ns *testkit.Netns, path string) string { return ns.Run("cat", "/proc/sys/net/"+path) }

func dual(i int) Network {
	n := network(i)
	n.Subnets = append(n.Subnets, prefixes("fd00:1::/64")...)
	return n
}

func TestForwardingIsTurnedOnForWhoNeedsIt(t *testing.T) {
	for _, c := range []struct {
		name   string
		n      Network
		v4, v6 string
	}{
		{"v4", network(1), "1", "0"},
		{"v6", Network{Bridge: "bth1", Subnets: prefixes("fd00:1::/64")}, "0", "1"},
		{"dual", dual(1), "1", "1"},
		{"internal", Network{Bridge: "bth1", Subnets: prefixes("10.0.0.0/24", "fd00:1::/64"), Internal: true}, "0", "0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := testkit.NewNetns(t)
			m := manager(t, ns)
			ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
			assert.NilError(t, m.Sync(t.Context(), []Network{c.n}, nil))
			assert.Equal(t, sysctl(ns, "ipv4/ip_forward"), "0", "Sync may run before dockerd")
			assert.NilError(t, m.CheckForwarding(c.n))
			assert.Equal(t, sysctl(ns, "ipv4/ip_forward"), "0")
			for range 2 {
				assert.NilError(t, m.EnableForwarding(t.Context(), c.n))
				assert.Equal(t, sysctl(ns, "ipv4/ip_forward"), c.v4)
				assert.Equal(t, sysctl(ns, "ipv6/conf/all/forwarding"), c.v6)
			}
			drift, err := m.Check(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, drift, "")
		})
	}
}

func TestForwardingIsTurnedOffWithTheLastNetwork(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare func(*testkit.Netns)
		want    string
	}{
		{"nobody else", func(*testkit.Netns) {}, "0"},
		{"a virtual link may rely on it", func(ns *testkit.Netns) { ns.Run("ip", "link", "add", "br0", "type", "bridge") }, "1"},
		{"it was on before", func(ns *testkit.Netns) {
			ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
		}, "1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := testkit.NewNetns(t)
			ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
			c.prepare(ns)
			m := manager(t, ns)
			for _, n := range []Network{dual(1), network(2)} {
				_, err := m.Ensure(t.Context(), n)
				assert.NilError(t, err)
				assert.NilError(t, m.EnableForwarding(t.Context(), n))
			}
			// Also by a Berth that was started later.
			later := manager(t, ns)
			assert.NilError(t, later.Sync(t.Context(), []Network{dual(1), network(2)}, nil))
			assert.NilError(t, later.Remove(t.Context(), "bth1"))
			assert.Equal(t, sysctl(ns, "ipv4/ip_forward"), "1")
			assert.NilError(t, later.Remove(t.Context(), "bth2"))
			assert.Equal(t, sysctl(ns, "ipv4/ip_forward"), c.want)
			assert.Equal(t, sysctl(ns, "ipv6/conf/all/forwarding"), c.want)
			assert.Assert(t, !strings.Contains(ns.Run("nft", "list", "tables"), "berth"))
		})
	}
}

// Forwarding makes the kernel deaf to router advertisements, by which a host may
// have its own address and default route.
func TestHostKeepsItsIPv6Configuration(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := manager(t, ns)
	ns.Run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=0")
	ns.Run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
	ns.Run("sysctl", "-qw", "net.ipv6.conf.up0.accept_ra=1", "net.ipv6.conf.up1.accept_ra=0")
	_, err := m.Ensure(t.Context(), dual(1))
	assert.NilError(t, err)
	assert.NilError(t, m.EnableForwarding(t.Context(), dual(1)))
	assert.Equal(t, sysctl(ns, "ipv6/conf/up0/accept_ra"), "2")
	assert.Equal(t, sysctl(ns, "ipv6/conf/up1/accept_ra"), "0")
}

func TestWatchKeepsRouteLocalnet(t *testing.T) {
	ns := testkit.NewNetns(t)
	ns.Run("ip", "link", "add", "bth1", "type", "bridge")
	m, _ := watch(t, ns, 50*time.Millisecond)
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1), network(2)}, nil))
	assert.NilError(t, m.RouteLocalnet("bth1"))
	const path = "ipv4/conf/bth1/route_localnet"
	assert.Equal(t, sysctl(ns, path), "1")
	ns.Run("sysctl", "-qw", "net.ipv4.conf.bth1.route_localnet=0")
	eventually(t, "route_localnet stayed off", func() bool { return sysctl(ns, path) == "1" })

	assert.NilError(t, m.Remove(t.Context(), "bth1"))
	ns.Run("sysctl", "-qw", "net.ipv4.conf.bth1.route_localnet=0")
	time.Sleep(300 * time.Millisecond)
	assert.Equal(t, sysctl(ns, path), "0", "the network is gone")
}
