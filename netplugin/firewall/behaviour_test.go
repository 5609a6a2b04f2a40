package firewall

import (
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/testkit"
)

const (
	a4, a6 = "10.1.0", "fd00:1:"
	b4, b6 = "10.2.0", "fd00:2:"
	i4, i6 = "10.3.0", "fd00:3:"
)

// fullWorld has two open networks, one that is masqueraded and one that is not,
// an internal one and one of Docker's.
func fullWorld(t *testing.T) (*world, []Network) {
	w := newWorld(t)
	networks := []Network{
		w.berth("btha", a4, a6, Network{Masquerade: true}),
		w.berth("bthb", b4, b6, Network{}),
		w.berth("bthi", i4, i6, Network{Internal: true}),
	}
	w.docker()
	w.container("a2", "btha", a4, a6, 2)
	w.container("a3", "btha", a4, a6, 3)
	w.container("b2", "bthb", b4, b6, 2)
	w.container("i2", "bthi", i4, i6, 2)
	w.container("i3", "bthi", i4, i6, 3)
	w.container("d2", dockerBridge, docker4, docker6, 2)
	return w, networks
}

// reach is who reaches whom in fullWorld. dockerOpen says whether Docker's own
// forwarding is unfiltered; there are no rules of dockerd's in these tests.
func reach(dockerOpen bool) []path {
	var paths []path
	for _, v6 := range []bool{false, true} {
		a := func(n int) string { return addrOf(v6, a4, a6, n) }
		b := func(n int) string { return addrOf(v6, b4, b6, n) }
		i := func(n int) string { return addrOf(v6, i4, i6, n) }
		d := func(n int) string { return addrOf(v6, docker4, docker6, n) }
		host, lan := hostLAN4, neighbour4
		if v6 {
			host, lan = hostLAN6, neighbour6
		}
		paths = append(paths,
			// within a network
			path{"a2", a(3), a(2)},
			path{"i2", i(3), i(2)},
			// to outside: masqueraded, plain, not at all
			path{"a2", lan, host},
			path{"b2", lan, b(2)},
			path{"i2", lan, ""},
			// from outside
			path{"lan", a(2), ""},
			path{"lan", b(2), ""},
			path{"lan", i(2), ""},
			// between networks of Berth
			path{"a2", b(2), ""},
			path{"b2", a(2), ""},
			path{"a2", i(2), ""},
			path{"i2", a(2), ""},
			// between Berth and Docker
			path{"a2", d(2), ""},
			path{"d2", a(2), ""},
			path{"i2", d(2), ""},
			path{"d2", i(2), ""},
			// to the host: an internal network sees the bridge's own address only
			path{"a2", a(1), a(2)},
			path{"a2", host, a(2)},
			path{"i2", i(1), i(2)},
			path{"i2", host, ""},
			path{"i2", a(1), ""},
			// from the host
			path{"host", a(2), a(1)},
			path{"host", i(2), i(1)},
			// the host to itself
			path{"host", a(1), a(1)},
		)
		// What is not Berth's stays as it is.
		seen := ""
		if dockerOpen {
			seen = "any"
		}
		paths = append(paths, path{"d2", lan, seen}, path{"lan", d(2), seen})
	}
	return paths
}

func TestWhoReachesWhom(t *testing.T) {
	drop := func(w *world, suffix string, withUserChain bool) {
		for _, program := range []string{"iptables-" + suffix, "ip6tables-" + suffix} {
			w.host.Run(program, "-P", "FORWARD", "DROP")
			if withUserChain {
				// As the Engines before 28 leave it.
				w.host.Run(program, "-N", "DOCKER-USER")
				w.host.Run(program, "-A", "DOCKER-USER", "-j", "RETURN")
				w.host.Run(program, "-I", "FORWARD", "-j", "DOCKER-USER")
			}
		}
	}
	for _, c := range []struct {
		name    string
		prepare func(*world)
		open    bool
	}{
		{"without iptables", func(*world) {}, true},
		{"iptables-nft drops", func(w *world) { drop(w, "nft", false) }, false},
		{"iptables-nft with DOCKER-USER drops", func(w *world) { drop(w, "nft", true) }, false},
		{"iptables-legacy drops", func(w *world) { drop(w, "legacy", false) }, false},
		{"iptables-legacy with DOCKER-USER drops", func(w *world) { drop(w, "legacy", true) }, false},
		{"both drop", func(w *world) { drop(w, "nft", true); drop(w, "legacy", false) }, false},
		{"a general rule drops", func(w *world) {
			w.host.Run("iptables-nft", "-A", "FORWARD", "-j", "DROP")
			w.host.Run("ip6tables-nft", "-A", "FORWARD", "-j", "DROP")
		}, false},
		{"bridged frames are not filtered", func(w *world) {
			drop(w, "nft", true)
			w.host.Run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=0", "net.bridge.bridge-nf-call-ip6tables=0")
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, networks := fullWorld(t)
			c.prepare(w)
			before := rulesOfOthers(w.host)
			assert.NilError(t, w.m.Sync(t.Context(), networks, nil))
			w.expect(reach(c.open))

			drift, err := w.m.Check(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, drift, "")

			for _, n := range networks {
				assert.NilError(t, w.m.Remove(t.Context(), n.Bridge))
			}
			assert.Equal(t, rulesOfOthers(w.host), before)
			assert.Assert(t, !strings.Contains(w.host.Run("nft", "list", "tables"), TableName))
		})
	}
}

// rulesOfOthers lists iptables' rules without loading anything.
func rulesOfOthers(ns *testkit.Netns) string {
	var out []string
	for _, file := range []string{"/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"} {
		program := "iptables-legacy"
		if strings.Contains(file, "ip6") {
			program = "ip6tables-legacy"
		}
		if ns.Run("cat", file) != "" {
			out = append(out, ns.Run(program, "-S"))
		}
	}
	for _, family := range []string{"ip", "ip6"} {
		if text, err := ns.Try("nft", "-s", "list", "table", family, "filter"); err == nil {
			out = append(out, text)
		}
	}
	return strings.Join(out, "\n")
}

func TestUplinkMayBeABridge(t *testing.T) {
	w := newWorld(t)
	w.host.Run("ip", "addr", "flush", "dev", uplink)
	w.host.Run("ip", "link", "add", "br0", "type", "bridge")
	w.host.Run("ip", "link", "set", uplink, "master", "br0")
	addrs(w.host, "br0", hostLAN4+"/24", hostLAN6+"/64")
	w.host.Run("ip", "route", "add", "default", "via", neighbour4)
	n := w.berth("btha", a4, a6, Network{Masquerade: true})
	w.container("a2", "btha", a4, a6, 2)
	assert.NilError(t, w.m.Sync(t.Context(), []Network{n}, nil))
	w.expect([]path{{"a2", neighbour4, hostLAN4}, {"lan", a4 + ".2", ""}})
}

func TestAdministratorsRulesInDockerUserComeFirst(t *testing.T) {
	w := newWorld(t)
	n := w.berth("btha", a4, a6, Network{Masquerade: true})
	w.container("a2", "btha", a4, a6, 2)
	w.host.Run("iptables-nft", "-P", "FORWARD", "DROP")
	w.host.Run("iptables-nft", "-N", "DOCKER-USER")
	w.host.Run("iptables-nft", "-A", "DOCKER-USER", "-d", neighbour4, "-j", "DROP")
	w.host.Run("iptables-nft", "-I", "FORWARD", "-j", "DOCKER-USER")
	assert.NilError(t, w.m.Sync(t.Context(), []Network{n}, nil))
	w.expect([]path{{"a2", neighbour4, ""}, {"a2", neighbour6, hostLAN6}})
}

// A connection fails when either direction is cut. Packets that need no answer
// must not get through either.
func TestNotOnePacketGoesToOtherContainerNetworks(t *testing.T) {
	w := newWorld(t)
	n := w.berth("btha", a4, a6, Network{Masquerade: true})
	w.container("a2", "btha", a4, a6, 2)
	w.docker()
	w.container("d2", dockerBridge, docker4, docker6, 2)
	assert.NilError(t, w.m.Sync(t.Context(), []Network{n}, nil))
	w.host.Run("nft", "add table inet other")
	w.host.Run("nft", "add chain inet other forward { type filter hook forward priority 5; }")
	w.host.Run("nft", "add rule inet other forward oifname { btha, "+dockerBridge+" } counter")
	w.expect([]path{{"a2", docker4 + ".2", ""}, {"d2", a4 + ".2", ""}, {"a2", docker6 + ":2", ""}, {"d2", a6 + ":2", ""}, {"lan", a4 + ".2", ""}})
	counted := w.host.Run("nft", "list table inet other")
	assert.Assert(t, strings.Contains(counted, "counter packets 0 "), counted)
}

// Others may use the mark, and must not see Berth's bit in it, nor gain by it.
func TestMarkOfOthersIsKeptAndBerthsIsNot(t *testing.T) {
	w := newWorld(t)
	n := w.berth("btha", a4, a6, Network{Masquerade: true})
	w.container("a2", "btha", a4, a6, 2)
	w.docker()
	w.container("d2", dockerBridge, docker4, docker6, 2)
	w.host.Run("iptables-nft", "-P", "FORWARD", "DROP")
	w.host.Run("nft", "add table ip other")
	w.host.Run("nft", "add chain ip other pre { type filter hook prerouting priority mangle; }")
	w.host.Run("nft", "add rule ip other pre iifname btha meta mark set 0x00000005")
	for _, name := range []string{dockerBridge, uplink} {
		w.host.Run("nft", "add rule ip other pre iifname "+name+" meta mark set 0x10000000")
	}
	w.host.Run("nft", "add chain ip other post { type filter hook postrouting priority 301; }")
	w.host.Run("nft", "add counter ip other right")
	w.host.Run("nft", "add counter ip other wrong")
	w.host.Run("nft", "add rule ip other post iifname btha oifname eth0 meta mark 0x00000005 counter name right accept")
	w.host.Run("nft", "add rule ip other post iifname btha oifname eth0 counter name wrong")
	assert.NilError(t, w.m.Sync(t.Context(), []Network{n}, nil))
	w.expect([]path{{"a2", neighbour4, hostLAN4}, {"d2", neighbour4, ""}})
	assert.Assert(t, !strings.Contains(w.host.Run("nft", "list counter ip other right"), "packets 0 "))
	assert.Assert(t, strings.Contains(w.host.Run("nft", "list counter ip other wrong"), "packets 0 "))
}
