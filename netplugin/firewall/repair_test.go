package firewall

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	"pgregory.net/rapid"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

// damages are what others do to rules. Each leaves drift behind.
func damages() map[string]func(*testkit.Netns) {
	run := func(argv ...string) func(*testkit.Netns) {
		return func(ns *testkit.Netns) { ns.Run(argv...) }
	}
	return map[string]func(*testkit.Netns){
		"flush everything":      run("nft", "flush", "ruleset"),
		"delete a table":        run("nft", "delete", "table", "ip6", "berth"),
		"delete an element":     run("nft", "delete element ip berth bridges { bth1 }"),
		"add an element":        run("nft", "add element ip berth open { bth9 }"),
		"widen a subnet":        run("nft", "add element ip berth sources { 10.200.0.0-10.200.0.9 }"),
		"flush a chain":         run("nft", "flush chain ip berth entering"),
		"add a rule":            run("nft", "insert rule ip berth forward accept"),
		"delete a base chain":   run("nft", "delete chain ip6 berth unmark"),
		"change a policy":       run("nft", "chain ip berth input { policy drop; }"),
		"flush DOCKER-USER":     run("iptables-nft", "-F", "DOCKER-USER"),
		"flush legacy FORWARD":  run("iptables-legacy", "-F", "FORWARD"),
		"a second rule":         func(ns *testkit.Netns) { ns.Run(append([]string{"ip6tables-nft", "-A", "FORWARD"}, ruleSpec()...)...) },
		"another Docker bridge": run("ip", "link", "add", "br-ffffffffffff", "type", "bridge"),
		"swap rules": func(ns *testkit.Netns) {
			ns.Run("nft", "flush chain ip berth accepted")
			ns.Run("nft", "add rule ip berth accepted drop")
		},
	}
}

func damaged(t *testing.T) (*testkit.Netns, *Manager, []Network) {
	ns := testkit.NewNetns(t)
	for _, program := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy"} {
		ns.Run(program, "-P", "FORWARD", "DROP")
	}
	ns.Run("iptables-nft", "-N", "DOCKER-USER")
	ns.Run("iptables-nft", "-I", "FORWARD", "-j", "DOCKER-USER")
	return ns, manager(t, ns), []Network{network(1), network(2)}
}

// snapshot is everything that Sync is responsible for.
func snapshot(ns *testkit.Netns) string {
	return listed(ns) + rulesOfOthers(ns)
}

func TestDamageIsFoundAndRepaired(t *testing.T) {
	for name, damage := range damages() {
		t.Run(name, func(t *testing.T) {
			ns, m, networks := damaged(t)
			assert.NilError(t, m.Sync(t.Context(), networks, nil))
			want := snapshot(ns)
			drift, err := m.Check(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, drift, "")

			damage(ns)
			drift, err = m.Check(t.Context())
			assert.NilError(t, err)
			assert.Assert(t, drift != "")
			assert.NilError(t, m.Sync(t.Context(), networks, nil))
			drift, err = m.Check(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, drift, "")
			switch name {
			case "another Docker bridge":
				assert.Assert(t, strings.Contains(listed(ns), "br-ffffffffffff"))
			case "flush everything":
				// iptables-nft's tables are gone as well, and are not Berth's to make.
				assert.Assert(t, strings.HasPrefix(want, listed(ns)))
			default:
				assert.Equal(t, snapshot(ns), want)
			}
		})
	}
}

// An endpoint's or network's change finds the damage too, so that nothing is
// built on it.
func TestEnsureRepairsWhatItFinds(t *testing.T) {
	for name, damage := range damages() {
		t.Run(name, func(t *testing.T) {
			ns, m, networks := damaged(t)
			assert.NilError(t, m.Sync(t.Context(), networks, nil))
			damage(ns)
			_, err := m.Ensure(t.Context(), network(3))
			assert.NilError(t, err)
			drift, err := m.Check(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, drift, "")
		})
	}
}

func TestWatchRepairs(t *testing.T) {
	ns, m, networks := damaged(t)
	assert.NilError(t, m.Sync(t.Context(), networks, nil))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		m.Watch(ctx, 50*time.Millisecond)
	}()
	defer wg.Wait()
	defer cancel()
	want := listed(ns)
	ns.Run("nft", "flush", "ruleset")
	eventually(t, "the tables did not come back", func() bool {
		_, err := ns.Try("nft", "list", "table", "ip6", "berth")
		return err == nil && listed(ns) == want
	})
	ns.Run("iptables-legacy", "-F", "FORWARD")
	eventually(t, "the rule did not come back", func() bool { return strings.Contains(ns.Run("iptables-legacy", "-S"), ruleComment) })

	// dockerd makes a network and removes it.
	inSet := func() bool { return strings.Contains(ns.Run("nft", "list set ip berth foreign"), "br-0123456789ab") }
	ns.Run("ip", "link", "add", "br-0123456789ab", "type", "bridge")
	eventually(t, "the new bridge was not noticed", inSet)
	ns.Run("ip", "link", "del", "br-0123456789ab")
	eventually(t, "the removal of the bridge was not noticed", func() bool { return !inSet() })

	// A bridge turns from a container network's into the uplink.
	ns.Run("ip", "link", "add", "br0", "type", "bridge")
	eventually(t, "br0 was not noticed", func() bool { return strings.Contains(ns.Run("nft", "list set ip berth foreign"), "br0") })
	ns.Run("ip", "addr", "add", "192.0.2.1/24", "dev", "br0")
	ns.Run("ip", "link", "set", "br0", "up")
	ns.Run("ip", "route", "add", "default", "via", "192.0.2.2")
	eventually(t, "br0 stayed foreign", func() bool { return !strings.Contains(ns.Run("nft", "list set ip berth foreign"), "br0") })
}

// dockerd comes and goes while networks live.
func TestRuleMovesToDockerUser(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := manager(t, ns)
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	where := func() []string {
		var found []string
		for line := range strings.Lines(ns.Run("iptables-nft", "-S")) {
			if strings.Contains(line, ruleComment) {
				found = append(found, strings.Fields(line)[1])
			}
		}
		return found
	}
	ns.Run("iptables-nft", "-P", "FORWARD", "DROP")
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	assert.DeepEqual(t, where(), []string{"FORWARD"})

	ns.Run("iptables-nft", "-N", "DOCKER-USER")
	ns.Run("iptables-nft", "-A", "DOCKER-USER", "-j", "RETURN")
	ns.Run("iptables-nft", "-I", "FORWARD", "-j", "DOCKER-USER")
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	assert.DeepEqual(t, where(), []string{"DOCKER-USER"})
	rules := strings.Split(ns.Run("iptables-nft", "-S", "DOCKER-USER"), "\n")
	assert.Equal(t, rules[len(rules)-1], "-A DOCKER-USER -j RETURN")

	ns.Run("iptables-nft", "-D", "FORWARD", "-j", "DOCKER-USER")
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	assert.Assert(t, slices.Contains(where(), "FORWARD"))

	assert.NilError(t, m.Remove(t.Context(), "bth1"))
	assert.Equal(t, len(where()), 0)
}

// A table called filter may be an administrator's own, which iptables-nft refuses
// to touch. It is one like others then.
func TestFilterTableThatIsNotIptables(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := manager(t, ns)
	ns.Run("nft", "add table ip filter")
	ns.Run("nft", "add chain ip filter FORWARD { type filter hook forward priority 5; policy accept; }")
	ns.Run("nft", "add rule ip filter FORWARD ip saddr { 192.0.2.7, 192.0.2.9 } counter")
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	assert.Assert(t, !strings.Contains(ns.Run("nft", "list chain ip filter FORWARD"), commentPrefix))
	ns.Run("nft", "chain ip filter FORWARD { policy drop; }")
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	list := rulesOf(ns, "ip filter FORWARD")
	assert.Equal(t, list[len(list)-1], acceptMark)
	ns.Run("nft", "add rule ip filter FORWARD counter")
	drift, err := m.Check(t.Context())
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(drift, "ip filter FORWARD"), drift)
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	drift, err = m.Check(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, drift, "")
	// Also by a Berth that was started later.
	m = manager(t, ns)
	assert.NilError(t, m.Remove(t.Context(), "bth1"))
	assert.Assert(t, !strings.Contains(ns.Run("nft", "list chain ip filter FORWARD"), commentPrefix))
}

func TestMissingProgramIsNamed(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := manager(t, ns)
	ns.Run("iptables-legacy", "-P", "FORWARD", "DROP")
	t.Setenv("PATH", t.TempDir())
	assert.ErrorContains(t, m.Sync(t.Context(), []Network{network(1)}, nil), "iptables-legacy")
}

// iptables-nft must go on working beside Berth's tables.
func TestIptablesDoesNotMindBerthsTables(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := manager(t, ns)
	assert.NilError(t, m.Sync(t.Context(), []Network{network(1)}, nil))
	for _, argv := range [][]string{{"iptables-nft", "-S"}, {"ip6tables-nft", "-L"}, {"iptables-nft-save"}, {"iptables-nft", "-A", "FORWARD", "-j", "ACCEPT"}} {
		out := ns.Run(argv...)
		assert.Assert(t, !strings.Contains(strings.ToLower(out), "warning") && !strings.Contains(out, "incompatible"), "%v: %s", argv, out)
	}
}

// A Berth that has just been started is told its networks one by one; the others'
// traffic must not stop meanwhile.
func TestRestartKeepsNetworksUntilTheyAreTold(t *testing.T) {
	ns := testkit.NewNetns(t)
	first := manager(t, ns)
	networks := []Network{network(1), network(2), network(3)}
	assert.NilError(t, first.Sync(t.Context(), networks, nil))
	want := listed(ns)

	second := manager(t, ns)
	added, err := second.Ensure(t.Context(), network(1))
	assert.NilError(t, err)
	assert.Assert(t, !added, "an undo would take it away")
	assert.Equal(t, listed(ns), want)
	assert.NilError(t, second.Remove(t.Context(), "bth1"))
	assert.Assert(t, strings.Contains(listed(ns), "bth2") && !strings.Contains(listed(ns), "bth1"))
	// Told with other properties.
	changed := network(2)
	changed.Internal = true
	_, err = second.Ensure(t.Context(), changed)
	assert.NilError(t, err)
	assert.NilError(t, second.Sync(t.Context(), []Network{changed}, nil))
	other := testkit.NewNetns(t)
	assert.NilError(t, manager(t, other).Sync(t.Context(), []Network{changed}, nil))
	assert.Equal(t, listed(ns), listed(other))
}

func TestLastRemovalAfterRestartTakesTheTables(t *testing.T) {
	ns := testkit.NewNetns(t)
	assert.NilError(t, manager(t, ns).Sync(t.Context(), []Network{network(1)}, nil))
	assert.NilError(t, manager(t, ns).Remove(t.Context(), "bth1"))
	assert.Equal(t, ns.Run("nft", "list", "ruleset"), "")

	assert.NilError(t, manager(t, ns).Sync(t.Context(), []Network{network(1)}, nil))
	assert.NilError(t, manager(t, ns).Sync(t.Context(), nil, nil))
	assert.Equal(t, ns.Run("nft", "list", "ruleset"), "")
}

// Step by step must lead to what is planned from nothing.
func TestStepsLeadWhereThePlanLeads(t *testing.T) {
	m := manager(t, testkit.NewNetns(t))
	ctx := t.Context()
	rapid.Check(t, func(t *rapid.T) {
		if err := m.Sync(ctx, nil, nil); err != nil {
			t.Fatal(err)
		}
		now := map[string]Network{}
		for range rapid.IntRange(1, 8).Draw(t, "steps") {
			n := network(rapid.IntRange(0, 3).Draw(t, "network"))
			n.Internal, n.Masquerade = rapid.Bool().Draw(t, "internal"), rapid.Bool().Draw(t, "masquerade")
			// Overlapping subnets: one network's may hide another's.
			bits := rapid.SampledFrom([]int{8, 23, 24}).Draw(t, "bits")
			n.Subnets = prefixes(fmt.Sprintf("10.0.%s.0/%d", strings.TrimPrefix(n.Bridge, "bth"), bits))
			var err error
			if rapid.Bool().Draw(t, "remove") {
				delete(now, n.Bridge)
				err = m.Remove(ctx, n.Bridge)
			} else {
				now[n.Bridge] = n
				_, err = m.Ensure(ctx, n)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		for _, v6 := range []bool{false, true} {
			got, err := m.kernel.read(newTable(v6))
			if err != nil {
				t.Fatal(err)
			}
			if got.exists != (len(now) > 0) || got.whole != got.exists {
				t.Fatalf("%d networks, but the table is %+v", len(now), got)
			}
			want := newRuleset(v6)
			for _, n := range now {
				want.put(n)
			}
			for _, name := range setNames() {
				if !maps.Equal(got.elements[name], want.elements[name]) {
					t.Fatalf("set %s: step by step %v, planned %v", name, got.elements[name], want.elements[name])
				}
			}
		}
	})
}

func TestChangesAtTheSameTime(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := manager(t, ns)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, err := m.Ensure(t.Context(), network(i))
			assert.Check(t, err)
			if i%2 == 0 {
				assert.Check(t, m.Remove(t.Context(), network(i).Bridge))
			}
		}()
	}
	wg.Wait()
	s, err := m.kernel.read(newTable(false))
	assert.NilError(t, err)
	assert.Equal(t, len(s.elements[setBridges]), 10)
}

func TestTwoThousandNetworks(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := manager(t, ns)
	var networks []Network
	for i := range 2000 {
		networks = append(networks, network(i))
	}
	start := time.Now()
	assert.NilError(t, m.Sync(t.Context(), networks, nil))
	made := time.Since(start)
	start = time.Now()
	assert.NilError(t, m.Sync(t.Context(), networks, nil))
	t.Logf("2000 networks: made in %v, checked in %v", made, time.Since(start))
	s, err := m.kernel.read(newTable(false))
	assert.NilError(t, err)
	for _, name := range []setName{setBridges, setOpen, setSame, setSources} {
		assert.Equal(t, len(s.elements[name]), 2000, "set %s", name)
	}
	assert.NilError(t, m.Sync(t.Context(), networks[:1], nil))
	assert.NilError(t, m.Sync(t.Context(), nil, nil))
}

func benchmarkEnsure(b *testing.B, others int) {
	ns := testkit.NewNetns(b)
	h, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(b, err)
	b.Cleanup(h.Close)
	m, err := New(Options{Links: h})
	assert.NilError(b, err)
	b.Cleanup(func() { assert.Check(b, m.Close()) })
	// One is always there, so that the table does not come and go.
	networks := []Network{network(60000)}
	for i := range others {
		networks = append(networks, network(i))
	}
	assert.NilError(b, m.Sync(b.Context(), networks, nil))
	for b.Loop() {
		_, err := m.Ensure(b.Context(), network(50000))
		assert.NilError(b, err)
		assert.NilError(b, m.Remove(b.Context(), network(50000).Bridge))
	}
}

// A round is Ensure and Remove.
func BenchmarkEnsureAlone(b *testing.B)              { benchmarkEnsure(b, 0) }
func BenchmarkEnsureBesideThousand(b *testing.B)     { benchmarkEnsure(b, 1000) }
func BenchmarkEnsureBesideFourThousand(b *testing.B) { benchmarkEnsure(b, 4000) }
