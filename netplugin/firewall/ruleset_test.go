package firewall

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/golden"
	"pgregory.net/rapid"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

func prefixes(list ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(list))
	for i, s := range list {
		out[i] = netip.MustParsePrefix(s)
	}
	return out
}

// goldens are networks whose rules are kept as text in testdata.
func goldens() map[string][]Network {
	v4 := Network{Bridge: "bth-v4", Subnets: prefixes("10.1.0.0/24"), Masquerade: true}
	v6 := Network{Bridge: "bth-v6", Subnets: prefixes("fd00:1::/64"), Masquerade: true}
	return map[string][]Network{
		"v4":            {v4},
		"v6":            {v6},
		"dual":          {{Bridge: "bth-dual", Subnets: prefixes("10.1.0.0/24", "10.9.0.0/25", "fd00:1::/64"), Masquerade: true}},
		"internal":      {{Bridge: "bth-int", Subnets: prefixes("10.1.0.0/24", "fd00:1::/64"), Internal: true, Masquerade: true}},
		"no-masquerade": {{Bridge: "bth-raw", Subnets: prefixes("10.1.0.0/24", "fd00:1::/64")}},
		"no-subnet":     {{Bridge: "bth-null", Masquerade: true}},
		"several": {
			v4, v6,
			{Bridge: "bth-int", Subnets: prefixes("10.2.0.0/24"), Internal: true},
			// Touches the first one, and contains the next.
			{Bridge: "bth-next", Subnets: prefixes("10.1.1.0/24"), Masquerade: true},
			{Bridge: "bth-wide", Subnets: prefixes("10.0.0.0/8", "255.255.255.0/24"), Masquerade: true},
		},
	}
}

func foreignOf(name string) []string {
	if name == "several" {
		return []string{"br-0123456789ab", "docker0"}
	}
	return nil
}

func TestRulesAsText(t *testing.T) {
	for name, networks := range goldens() {
		t.Run(name, func(t *testing.T) {
			golden.Assert(t, text(networks, foreignOf(name)), name+".golden")
		})
	}
}

// The texts of the rules are written beside their expressions: what nft makes of
// the expressions must be the same text.
func TestKernelShowsTheSameRules(t *testing.T) {
	for name, networks := range goldens() {
		t.Run(name, func(t *testing.T) {
			ns := testkit.NewNetns(t)
			m := manager(t, ns)
			for _, bridge := range foreignOf(name) {
				ns.Run("ip", "link", "add", bridge, "type", "bridge")
			}
			assert.NilError(t, m.Sync(t.Context(), networks))
			golden.Assert(t, listed(ns), name+".golden")
		})
	}
}

func manager(t testing.TB, ns *testkit.Netns) *Manager {
	t.Helper()
	h, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(h.Close)
	m, err := New(Options{Links: h})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, m.Close()) })
	return m
}

var elementLists = regexp.MustCompile(`elements = \{ ([^}]*) \}`)

// listed is the text of Berth's tables in the kernel, with elements sorted and on
// one line.
func listed(ns *testkit.Netns) string {
	var b strings.Builder
	for _, family := range []string{"ip", "ip6"} {
		text := ns.Run("nft", "list", "table", family, TableName)
		b.WriteString(elementLists.ReplaceAllStringFunc(text, func(list string) string {
			members := regexp.MustCompile(`,\s+`).Split(elementLists.FindStringSubmatch(list)[1], -1)
			slices.Sort(members)
			return "elements = { " + strings.Join(members, ", ") + " }"
		}))
		b.WriteString("\n")
	}
	return b.String()
}

// drawPrefix draws subnets of few addresses, so that they meet often.
func drawPrefix(t *rapid.T) netip.Prefix {
	b := rapid.SliceOfN(rapid.ByteRange(0, 3), 4, 4).Draw(t, "addr")
	bits := rapid.IntRange(0, 32).Draw(t, "bits")
	return netip.PrefixFrom(netip.AddrFrom4([4]byte(b)), bits).Masked()
}

// What a ruleset makes step by step is what its networks say, in the plainest
// words; and nothing that changes is left out of touched.
func TestRulesetFollowsItsNetworks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRuleset(false)
		now := map[string]Network{}
		for range rapid.IntRange(0, 20).Draw(t, "steps") {
			before := map[setName]members{}
			for name, m := range r.elements {
				before[name] = maps.Clone(m)
			}
			r.settled()
			n := network(rapid.IntRange(0, 5).Draw(t, "network"))
			if old, ok := now[n.Bridge]; ok {
				r.drop(old)
				delete(now, n.Bridge)
			} else {
				n.Internal, n.Masquerade = rapid.Bool().Draw(t, "internal"), rapid.Bool().Draw(t, "masquerade")
				n.Subnets = []netip.Prefix{drawPrefix(t), drawPrefix(t), netip.MustParsePrefix("fd00::/64")}
				r.put(n)
				now[n.Bridge] = n
			}
			for _, name := range setNames() {
				for _, x := range append(r.elements[name].missing(before[name]), before[name].missing(r.elements[name])...) {
					if _, ok := r.touched[name][x]; !ok {
						t.Fatalf("%s changed in set %s, but is not touched", x, name)
					}
				}
			}
		}
		want := newElements()
		for _, n := range now {
			want[setBridges][n.Bridge], want[setSame][n.Bridge] = struct{}{}, struct{}{}
			if n.Internal {
				continue
			}
			want[setOpen][n.Bridge] = struct{}{}
			for _, p := range n.Subnets {
				if n.Masquerade && p.Addr().Is4() && !hiddenByAny(p, now) {
					want[setSources][p.String()] = struct{}{}
				}
			}
		}
		assert.DeepEqual(t, r.elements, want)

		// And it survives the kernel's form.
		list, err := encode(setSources, r.elements[setSources].sorted())
		if err != nil {
			t.Fatal(err)
		}
		if len(list) > 0 {
			list = rapid.Permutation(list).Draw(t, "order")
		}
		back, err := decode(setSources, list)
		if err != nil {
			t.Fatal(err)
		}
		assert.DeepEqual(t, back, r.elements[setSources])
	})
}

func hiddenByAny(p netip.Prefix, networks map[string]Network) bool {
	for _, n := range networks {
		for _, q := range n.Subnets {
			if n.Masquerade && !n.Internal && q.Bits() < p.Bits() && q.Contains(p.Addr()) {
				return true
			}
		}
	}
	return false
}

// FuzzDecode feeds elements that somebody else may have put into Berth's sets.
func FuzzDecode(f *testing.F) {
	f.Add([]byte{10, 0, 0, 0}, false, []byte{10, 0, 1, 0}, true)
	f.Add([]byte{10, 0, 0, 0}, true, []byte{}, false)
	f.Add([]byte{0, 0, 0, 0}, false, []byte{0, 0, 0, 0}, true)
	f.Fuzz(func(t *testing.T, a []byte, aEnd bool, b []byte, bEnd bool) {
		list := []nftables.SetElement{{Key: a, IntervalEnd: aEnd}, {Key: b, IntervalEnd: bEnd}}
		for _, name := range setNames() {
			got, err := decode(name, list)
			if err != nil || name != setSources {
				continue
			}
			again, err := encode(name, got.sorted())
			if err != nil {
				t.Fatal(err)
			}
			back, err := decode(name, again)
			if err != nil || !maps.Equal(got, back) {
				t.Fatalf("%v came back as %v: %v", got, back, err)
			}
		}
	})
}

func TestRuleOfIptablesIsSplitIntoWords(t *testing.T) {
	got := words(`-m mark --mark 0x1/0x1 -m comment --comment "berth: two words" -j ACCEPT`)
	assert.DeepEqual(t, got, []string{"-m", "mark", "--mark", "0x1/0x1", "-m", "comment", "--comment", "berth: two words", "-j", "ACCEPT"})
}

func FuzzWords(f *testing.F) {
	f.Add(`-m comment --comment "a b" -j X`)
	f.Fuzz(func(t *testing.T, s string) {
		for _, w := range words(s) {
			if strings.Contains(w, `"`) {
				t.Fatalf("quote in %q", w)
			}
		}
	})
}

func TestBridgesOfOtherContainerNetworks(t *testing.T) {
	for _, c := range []struct {
		bridge
		foreign bool
	}{
		{bridge{name: "docker0"}, true},
		{bridge{name: "docker_gwbridge"}, true},
		{bridge{name: "br-0123456789ab", ports: []string{"device"}, defaultRoute: true}, true},
		{bridge{name: "podman1", ports: []string{"veth", "veth"}}, true},
		{bridge{name: "podman2"}, true},
		{bridge{name: "br0", ports: []string{"device", "veth"}}, false},
		{bridge{name: "br0", ports: []string{"bond"}}, false},
		{bridge{name: "br0", ports: []string{"veth"}, defaultRoute: true}, false},
		{bridge{name: "virbr0", ports: []string{"tun"}}, false},
		{bridge{name: "br-0123456789aX", ports: []string{"device"}}, false},
		{bridge{name: "br-0123456789abc", ports: []string{"device"}}, false},
	} {
		assert.Equal(t, c.isForeign(), c.foreign, "%+v", c.bridge)
	}
}

// network makes the i-th of many networks.
func network(i int) Network {
	return Network{
		Bridge:     fmt.Sprintf("bth%d", i),
		Subnets:    []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)},
		Masquerade: true,
	}
}
