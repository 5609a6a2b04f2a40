package firewall

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/testkit"
)

// load gives a rule set to nft, as from /etc/nftables.conf.
func load(ns *testkit.Netns, text string) { ns.Run("nft", text) }

// firewalldLike has the shape of what firewalld 1.3 writes with all links in zone
// public.
const firewalldLike = `table inet firewalld {
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		jump filter_FORWARD_ZONES
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD_ZONES {
		goto filter_FWD_public
	}
	chain filter_FWD_public {
		jump filter_FWD_public_deny
		jump filter_FWD_public_allow
		reject with icmpx admin-prohibited
	}
	chain filter_FWD_public_deny {
	}
	chain filter_FWD_public_allow {
	}
}`

const acceptMark = `meta mark & 0x10000000 == 0x10000000 accept comment "` + ruleComment + `"`

// rulesOf lists the rules of a chain, without the lines around them.
func rulesOf(ns *testkit.Netns, chain string) []string {
	var out []string
	for line := range strings.Lines(ns.Run("nft", "list chain "+chain)) {
		line = strings.TrimSpace(line)
		if strings.ContainsAny(line, "{}") && !strings.Contains(line, "{ ") || strings.HasPrefix(line, "type ") {
			continue
		}
		out = append(out, line)
	}
	return out
}

// The rule stands before what drops everything, and behind what drops something.
func TestRuleInChainsOfOthers(t *testing.T) {
	forward := func(policy string, rules ...string) string {
		return "table inet filter {\nchain forward { type filter hook forward priority filter; policy " + policy + ";\n" + strings.Join(rules, "\n") + "\n}\n}"
	}
	for _, c := range []struct {
		name, chain, text string
		// at is the position of the rule, -1 if it is not needed.
		at int
	}{
		{"policy drop", "inet filter forward", forward("drop", "ip saddr 192.0.2.9 drop", "ct state established accept"), 2},
		{"empty, policy drop", "inet filter forward", forward("drop"), 0},
		{"general drop", "inet filter forward", forward("accept", "ip saddr 192.0.2.9 drop", "counter log drop"), 1},
		{"general reject", "inet filter forward", forward("accept", "ip saddr 192.0.2.9 drop", "reject"), 1},
		{"certain packets are dropped", "inet filter forward", forward("accept", "ip saddr 192.0.2.9 drop", "ct state invalid drop"), -1},
		{"unknown expressions are conditions", "inet filter forward", forward("accept", "rt ipsec missing drop"), -1},
		{"everything is accepted before", "inet filter forward", forward("drop", "accept", "drop"), -1},
		{"policy accept", "inet filter forward", forward("accept"), -1},
		{"firewalld", "inet firewalld filter_FORWARD", firewalldLike, 4},
		{"a subchain for certain packets", "inet filter forward", "table inet filter {\nchain lan { ip saddr 192.0.2.9 drop; drop; }\n" +
			"chain forward { type filter hook forward priority filter; policy accept;\nct state established accept\niifname eth0 jump lan\n}\n}", 1},
		{"chains that call each other through returns", "inet filter forward", "table inet filter {\nchain lan { ip saddr 192.0.2.9 return; return; drop; }\n" +
			"chain forward { type filter hook forward priority filter; policy accept;\njump lan\n}\n}", -1},
		{"one family", "ip6 guard forward", "table ip6 guard {\nchain forward { type filter hook forward priority 5; policy drop; }\n}", 0},
		{"too early", "inet filter forward", strings.Replace(forward("drop"), "priority filter", "priority -100", 1), -1},
		{"Docker's own table", "ip docker-bridges filter-FORWARD", "table ip docker-bridges {\nchain filter-FORWARD { type filter hook forward priority filter; policy drop; }\n}", -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := testkit.NewNetns(t)
			load(ns, c.text)
			before, text := rulesOf(ns, c.chain), ns.Run("nft", "list", "ruleset")
			m := manager(t, ns)
			assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
			want := before
			if c.at >= 0 {
				want = append(append(append([]string{}, before[:c.at]...), acceptMark), before[c.at:]...)
			}
			assert.DeepEqual(t, rulesOf(ns, c.chain), want)
			drift, err := m.Check(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, drift, "")

			if c.at >= 0 {
				ns.Run("nft", "insert rule "+c.chain+" "+acceptMark)
				drift, err = m.Check(t.Context())
				assert.NilError(t, err)
				assert.Assert(t, strings.Contains(drift, c.chain), drift)
				assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
				assert.DeepEqual(t, rulesOf(ns, c.chain), want)
			}
			assert.NilError(t, m.Remove(t.Context(), "bth1"))
			assert.Equal(t, ns.Run("nft", "list", "ruleset"), text)
		})
	}
}

// In front of rules that somebody has added later for certain packets, the rule
// would overrule them.
func TestLaterRulesOfTheAdministratorComeFirst(t *testing.T) {
	ns := testkit.NewNetns(t)
	load(ns, "table inet filter {\nchain forward { type filter hook forward priority filter; policy drop; }\n}")
	ns.Run("iptables-nft", "-P", "FORWARD", "DROP")
	ns.Run("iptables-nft", "-N", userChain)
	ns.Run("iptables-nft", "-I", forwardChain, "-j", userChain)
	m := manager(t, ns)
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	for range 2 {
		ns.Run("nft", "add rule inet filter forward ip saddr 192.0.2.9 drop")
		ns.Run("iptables-nft", "-A", userChain, "-s", "192.0.2.9", "-j", "DROP")
		drift, err := m.Check(t.Context())
		assert.NilError(t, err)
		assert.Assert(t, drift != "")
		_, err = m.Ensure(t.Context(), network(2))
		assert.NilError(t, err)
		list := rulesOf(ns, "inet filter forward")
		assert.Equal(t, list[len(list)-1], acceptMark)
		list = strings.Split(ns.Run("iptables-nft", "-S", userChain), "\n")
		assert.Assert(t, isOurs(list[len(list)-1]), "%q", list)
	}
}

func TestTrafficThroughChainsOfOthers(t *testing.T) {
	for _, c := range []struct {
		name, text string
		open       bool
	}{
		{"firewalld", firewalldLike, false},
		{"nftables.service", "table inet filter {\nchain forward { type filter hook forward priority filter; policy drop; }\n}", false},
		// dockerd's nftables backend with a bridge of its own, and what an earlier
		// dockerd has left of iptables.
		{"Docker's nftables backend", `table ip docker-bridges {
			map filter-forward-in-jumps { type ifname : verdict; elements = { "` + dockerBridge + `" : jump in }; }
			map filter-forward-out-jumps { type ifname : verdict; elements = { "` + dockerBridge + `" : jump out }; }
			chain in { accept; }
			chain out { ct state established,related accept; drop; }
			chain filter-FORWARD {
				type filter hook forward priority filter; policy accept;
				oifname vmap @filter-forward-out-jumps
				iifname vmap @filter-forward-in-jumps
			}
		}
		table ip filter {
			chain DOCKER-USER { }
			chain FORWARD { type filter hook forward priority filter; policy drop; jump DOCKER-USER; }
		}`, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			load(w.host, c.text)
			n := w.berth("btha", a4, a6, Network{Masquerade: true})
			w.docker()
			w.container("a2", "btha", a4, a6, 2)
			w.container("a3", "btha", a4, a6, 3)
			w.container("d2", dockerBridge, docker4, docker6, 2)
			before := w.host.Run("nft", "list", "ruleset")
			assert.NilError(t, w.m.Sync(t.Context(), []Network{n}, nil))
			w.expect([]path{
				{"a2", neighbour4, hostLAN4},
				{"a2", neighbour6, hostLAN6},
				{"a2", a4 + ".3", a4 + ".2"},
				{"a2", docker4 + ".2", ""},
				{"d2", a4 + ".2", ""},
				{"lan", a4 + ".2", ""},
				{"lan", docker4 + ".2", ""},
			})
			assert.NilError(t, w.m.Remove(t.Context(), "btha"))
			after := w.host.Run("nft", "list", "ruleset")
			if !c.open {
				assert.Equal(t, after, before)
			}
			assert.Assert(t, !strings.Contains(after, commentPrefix), after)
		})
	}
}

// A table that a process owns cannot be changed by others; it must not keep
// networks from being made.
func TestTableWithAnOwner(t *testing.T) {
	ns := testkit.NewNetns(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var (
		owner *exec.Cmd
		err   error
	)
	ns.Do(func() {
		owner = exec.CommandContext(ctx, "nft", "-i")
		in, pipeErr := owner.StdinPipe()
		assert.NilError(t, pipeErr)
		err = owner.Start()
		_, writeErr := in.Write([]byte("add table inet firewalld { flags owner; }\n" +
			"add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; policy accept; }\n" +
			"add rule inet firewalld filter_FORWARD reject\n"))
		assert.NilError(t, writeErr)
	})
	assert.NilError(t, err)
	defer func() { cancel(); _ = owner.Wait() }()
	eventually(t, "the table was not made", func() bool {
		list, err := ns.Try("nft", "list", "chain", "inet", "firewalld", "filter_FORWARD")
		return err == nil && strings.Contains(list, "reject")
	})

	m := manager(t, ns)
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	drift, err := m.Check(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, drift, "", "what cannot be repaired must not be found again and again")
	list, err := m.Obstacles()
	assert.NilError(t, err)
	assert.DeepEqual(t, list, []Obstacle{{Chain: "inet firewalld filter_FORWARD", Owned: true}})
	assert.NilError(t, m.Remove(t.Context(), "bth1"))
}

func TestObstacles(t *testing.T) {
	ns := testkit.NewNetns(t)
	load(ns, firewalldLike+"\ntable ip guard {\nchain forward { type filter hook forward priority -150; policy drop; }\n}")
	m := manager(t, ns)
	for _, open := range []bool{false, true} {
		list, err := m.Obstacles()
		assert.NilError(t, err)
		assert.DeepEqual(t, list, []Obstacle{
			{Chain: "inet firewalld filter_FORWARD", Open: open},
			{Chain: "ip guard forward", Early: true},
		})
		assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// watch runs Watch until the test ends and counts the repairs.
func watch(t *testing.T, ns *testkit.Netns, interval time.Duration) (m *Manager, repairs *atomic.Int32) {
	t.Helper()
	m, repairs = manager(t, ns), new(atomic.Int32)
	m.repaired = func(found string) {
		t.Log("repaired: " + found)
		repairs.Add(1)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { m.Watch(ctx, interval) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return m, repairs
}

// Events alone are enough for what nftables counts: the interval is not.
func TestWatchHearsOfChanges(t *testing.T) {
	ns := testkit.NewNetns(t)
	m, repairs := watch(t, ns, time.Hour)
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	want := listed(ns)

	ns.Run("nft", "flush", "ruleset")
	eventually(t, "Berth's tables did not come back", func() bool {
		_, err := ns.Try("nft", "list", "table", "ip6", TableName)
		return err == nil && listed(ns) == want
	})
	eventually(t, "the repair was not told", func() bool { return repairs.Load() > 0 })

	ns.Run("iptables-nft", "-P", "FORWARD", "DROP")
	eventually(t, "no rule in FORWARD", func() bool { return strings.Contains(ns.Run("iptables-nft", "-S"), ruleComment) })
	ns.Run("iptables-nft", "-F")
	eventually(t, "no rule in FORWARD after a flush", func() bool { return strings.Contains(ns.Run("iptables-nft", "-S"), ruleComment) })

	// firewalld starts and is reloaded.
	load(ns, firewalldLike)
	for range 2 {
		eventually(t, "no rule in firewalld's chain", func() bool {
			return strings.Contains(ns.Run("nft", "list chain inet firewalld filter_FORWARD"), ruleComment)
		})
		load(ns, "delete table inet firewalld\n"+firewalldLike)
	}
	eventually(t, "no rule in firewalld's chain", func() bool {
		return strings.Contains(ns.Run("nft", "list chain inet firewalld filter_FORWARD"), ruleComment)
	})
}

func TestWatchTurnsForwardingOnAgain(t *testing.T) {
	for _, byBerth := range []bool{true, false} {
		ns := testkit.NewNetns(t)
		ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=0")
		m, repairs := watch(t, ns, 50*time.Millisecond)
		assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
		if !byBerth {
			ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=1")
		}
		assert.NilError(t, m.EnableForwarding(t.Context(), network(1)))
		ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=0")
		if byBerth {
			eventually(t, "forwarding stayed off", func() bool { return sysctl(ns, "ipv4/ip_forward") == "1" })
			continue
		}
		time.Sleep(300 * time.Millisecond)
		assert.Equal(t, sysctl(ns, "ipv4/ip_forward"), "0", "what others turned on, others may turn off")
		assert.Equal(t, repairs.Load(), int32(0))
	}
}

// Berth's own changes must not lead to repairs, nor to changes that lead to
// others.
func TestWatchIsQuietAboutBerthsOwnChanges(t *testing.T) {
	ns := testkit.NewNetns(t)
	ns.Run("iptables-nft", "-P", "FORWARD", "DROP")
	load(ns, firewalldLike)
	m, repairs := watch(t, ns, 100*time.Millisecond)
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	for i := range 100 {
		_, err := m.Ensure(t.Context(), network(2+i%7))
		assert.NilError(t, err)
		assert.NilError(t, m.Remove(t.Context(), network(2+i%7).Bridge))
	}
	time.Sleep(2 * settle)
	m.mu.Lock()
	before, err := m.kernel.generation()
	m.mu.Unlock()
	assert.NilError(t, err)
	time.Sleep(time.Second)
	m.mu.Lock()
	after, err := m.kernel.generation()
	m.mu.Unlock()
	assert.NilError(t, err)
	assert.Equal(t, before, after, "nothing has happened, and yet something was changed")
	assert.Equal(t, repairs.Load(), int32(0))
}

func TestWaitGrowsWithTheWork(t *testing.T) {
	assert.Equal(t, waitAfter(0, 0), settle)
	assert.Equal(t, waitAfter(50*time.Millisecond, 0), time.Second)
	assert.Equal(t, waitAfter(time.Minute, 0), patience)
	assert.Equal(t, waitAfter(0, 2), 4*settle)
	assert.Equal(t, waitAfter(0, 1000), patience)
}

// An adopted bridge carries no mark of Berth's.
func TestAdoptedBridgeIsNotForeign(t *testing.T) {
	ns := testkit.NewNetns(t)
	ns.Run("ip", "link", "add", "br0", "type", "bridge")
	m, repairs := watch(t, ns, 50*time.Millisecond)
	foreign := func() bool { return strings.Contains(ns.Run("nft", "list set ip berth foreign"), "br0") }
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	eventually(t, "br0 is nobody's", foreign)
	n := network(2)
	n.Bridge = "br0"
	_, err := m.Ensure(t.Context(), n)
	assert.NilError(t, err)
	assert.Assert(t, !foreign())
	time.Sleep(2 * settle)
	assert.Assert(t, !foreign())
	assert.NilError(t, m.Remove(t.Context(), "br0"))
	assert.Assert(t, foreign())
	assert.Equal(t, repairs.Load(), int32(0))
}

// To start a program costs more than to make a network: none is, where all is well.
func TestNoProgramIsStartedToLook(t *testing.T) {
	for _, user := range []bool{false, true} {
		ns := testkit.NewNetns(t)
		for _, program := range []string{"iptables-nft", "ip6tables-nft"} {
			ns.Run(program, "-P", forwardChain, "DROP")
			ns.Run(program, "-A", forwardChain, "-m", "comment", "--comment", "berths of ships", "-j", "ACCEPT")
			if user {
				ns.Run(program, "-N", userChain)
				ns.Run(program, "-A", userChain, "-j", "RETURN")
				ns.Run(program, "-I", forwardChain, "-j", userChain)
			}
		}
		assert.NilError(t, manager(t, ns).Sync(t.Context(), []Network{network(1)}, nil))
		t.Run("later", func(t *testing.T) {
			t.Setenv("PATH", t.TempDir())
			m := manager(t, ns)
			assert.NilError(t, m.Sync(t.Context(), []Network{network(1), network(2)}, nil))
			drift, err := m.Check(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, drift, "")
		})
	}
}

// What could not be done is tried again although nothing has changed since.
func TestRuleIsTriedAgain(t *testing.T) {
	ns := testkit.NewNetns(t)
	ns.Run("iptables-nft", "-P", forwardChain, "DROP")
	m := manager(t, ns)
	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())
	_, err := m.Ensure(t.Context(), network(1))
	assert.ErrorContains(t, err, "iptables-nft")
	t.Setenv("PATH", path)
	_, err = m.Ensure(t.Context(), network(1))
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(ns.Run("iptables-nft", "-S"), ruleComment))
}
