package firewall

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/golden"
	"pgregory.net/rapid"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

func prefixes(list ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(list))
	for i, s := range list {
		out[i] = netip.MustParsePrefix(s)
	}
	return out
}

// An example is what some rules are made for.
type example struct {
	// about says what is to be seen, in docs/firewall.md; examples without are not
	// shown there.
	about     string
	networks  []Network
	endpoints []Endpoint
	foreign   []string
}

func published(host string, hostPort uint16, container string, containerPort, count uint16) options.PublishedPort {
	p := options.PublishedPort{Proto: options.TCP, HostPort: hostPort, Container: netip.MustParseAddr(container), ContainerPort: containerPort, Count: count}
	if host != "" {
		p.Host = netip.MustParseAddr(host)
	}
	return p
}

// examples are networks whose rules are kept as text in testdata.
func examples() map[string]example {
	v4 := Network{Bridge: "bth-v4", Subnets: prefixes("10.1.0.0/24"), Masquerade: true}
	v6 := Network{Bridge: "bth-v6", Subnets: prefixes("fd00:1::/64"), Masquerade: true}
	dual := func(bridge string, change func(*Network)) []Network {
		n := Network{Bridge: bridge, Subnets: prefixes("10.1.0.0/24", "fd00:1::/64"), Masquerade: true}
		change(&n)
		return []Network{n}
	}
	family := func(mode options.GatewayMode) func(*Network) {
		return func(n *Network) { n.IPv4.Mode, n.IPv6.Mode = mode, mode }
	}
	ports := func(bridge string, list ...options.PublishedPort) []Endpoint {
		return []Endpoint{{ID: "one", Bridge: bridge, Ports: list}}
	}
	web := []options.PublishedPort{published("0.0.0.0", 8080, "10.1.0.2", 80, 1), published("::", 8080, "fd00:1::2", 80, 1)}
	direct := []options.PublishedPort{published("", 0, "10.1.0.2", 80, 1), published("", 0, "fd00:1::2", 80, 1), published("", 0, "10.1.0.2", 9000, 10)}
	several := []Network{
		v4, v6,
		{Bridge: "bth-int", Subnets: prefixes("10.2.0.0/24"), Internal: true},
		// Touches the first one, and contains the next.
		{Bridge: "bth-next", Subnets: prefixes("10.1.1.0/24"), Masquerade: true},
		{Bridge: "bth-wide", Subnets: prefixes("10.0.0.0/8", "255.255.255.0/24"), Masquerade: true},
	}
	udp := published("0.0.0.0", 5353, "10.1.0.2", 53, 1)
	udp.Proto = options.UDP
	sctp := published("0.0.0.0", 5353, "10.1.0.2", 53, 1)
	sctp.Proto = options.SCTP
	return map[string]example{
		"v4":        {networks: []Network{v4}},
		"v6":        {networks: []Network{v6}},
		"dual":      {networks: []Network{{Bridge: "bth-dual", Subnets: prefixes("10.1.0.0/24", "10.9.0.0/25", "fd00:1::/64"), Masquerade: true}}},
		"no-subnet": {networks: []Network{{Bridge: "bth-null", Masquerade: true}}},
		"several":   {networks: several, foreign: []string{"br-0123456789ab", "docker0"}},
		"nat": {
			about:    "Gateway mode `nat`, the default, with `-p 8080:80`.",
			networks: dual("bth-nat", family(options.GatewayNAT)), endpoints: ports("bth-nat", web...),
		},
		"ports": {
			about: "Other ways to publish: `-p 127.0.0.1:8081:81`, `-p 5353:53/udp` and `/sctp`, a range that keeps its numbers" +
				" (`-p 8000-8009:8000-8009`, and the same on 192.0.2.1 with others) and one that does not (`-p 9000-9002:90-92`)." +
				" A port of an IPv6 address that leads to an IPv4 container is carried by the proxy, and has no rule.",
			networks: dual("bth-ports", func(*Network) {}),
			endpoints: ports("bth-ports", published("127.0.0.1", 8081, "10.1.0.2", 81, 1), udp, sctp,
				published("0.0.0.0", 8000, "10.1.0.2", 8000, 10), published("192.0.2.1", 7000, "10.1.0.2", 7000, 8),
				published("0.0.0.0", 9000, "10.1.0.2", 90, 3), published("::", 5353, "10.1.0.2", 53, 1), published("::1", 80, "fd00:1::2", 80, 1),
				published("fd00:ff::1", 7000, "fd00:1::2", 7000, 8), published("fd00:ff::1", 80, "fd00:1::2", 81, 1), published("::", 7100, "fd00:1::2", 7100, 4)),
		},
		"nat-unprotected": {
			about:    "Gateway mode `nat-unprotected`: as `nat`, and the bridge is in the set `unprotected`.",
			networks: dual("bth-open", family(options.GatewayUnprotected)), endpoints: ports("bth-open", web...),
		},
		"routed": {
			about:    "Gateway mode `routed`: published ports are those of the container, in the set `direct`. Nothing is masqueraded.",
			networks: dual("bth-routed", family(options.GatewayRouted)), endpoints: ports("bth-routed", direct...),
		},
		"routed-ipv6": {
			about:    "IPv4 translated and IPv6 routed.",
			networks: dual("bth-mixed", func(n *Network) { n.IPv6.Mode = options.GatewayRouted }), endpoints: ports("bth-mixed", web[0], direct[1]),
		},
		"internal": {
			about:    "An `--internal` network: it is in no set but `bridges`, `same`, `icc` and `home`.",
			networks: dual("bth-int", func(n *Network) { n.Internal = true }),
		},
		"isolated": {
			about:    "Gateway mode `isolated`: an internal network whose bridge has no address. The rules are the same.",
			networks: dual("bth-isolated", func(n *Network) { n.Internal = true; family(options.GatewayIsolated)(n) }),
		},
		"icc-off": {
			about:    "`icc=false`: the bridge is not in the set `icc`.",
			networks: dual("bth-noicc", func(n *Network) { n.NoICC = true }), endpoints: ports("bth-noicc", web...),
		},
		"uplink": {
			about:    "A bridge with an uplink: as an internal network, and the bridge is in the set `switched`.",
			networks: dual("bth-uplink", func(n *Network) { n.Internal, n.Switched = true, true }),
		},
		"publish-host-firewall": {
			about:    "`publish=host-firewall`: Berth neither drops nor marks what goes to published ports.",
			networks: dual("bth-host", func(n *Network) { n.HostFirewall = true }), endpoints: ports("bth-host", web...),
		},
		"publish-sources": {
			about: "`publish=192.0.2.0/24,198.51.100.7/32`: published ports are for these sources. IPv6, of which none is listed, is closed.",
			networks: dual("bth-limited", func(n *Network) {
				n.Sources = prefixes("192.0.2.0/24", "198.51.100.7/32")
			}),
			endpoints: ports("bth-limited", web...),
		},
		"trusted": {
			about:    "Trusted host interfaces: from `eth1`, published ports are also reached by the container's address.",
			networks: dual("bth-trust", func(n *Network) { n.Trusted = []string{"eth1"} }), endpoints: ports("bth-trust", web...),
		},
		"snat": {
			about: "A chosen source address for outgoing traffic (`host_ipv4`, `host_ipv6`).",
			networks: dual("bth-snat", func(n *Network) {
				n.IPv4.Source, n.IPv6.Source = netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("fd00:ff::7")
			}),
		},
		"no-masquerade": {
			about:    "`enable_ip_masquerade=false`: outgoing traffic keeps its source address.",
			networks: dual("bth-raw", func(n *Network) { n.Masquerade = false }), endpoints: ports("bth-raw", web...),
		},
	}
}

func TestRulesAsText(t *testing.T) {
	for name, e := range examples() {
		t.Run(name, func(t *testing.T) {
			golden.Assert(t, text(e), name+".golden")
		})
	}
}

// The texts of the rules are written beside their expressions: what nft makes of
// the expressions must be the same text.
func TestKernelShowsTheSameRules(t *testing.T) {
	for name, e := range examples() {
		t.Run(name, func(t *testing.T) {
			ns := testkit.NewNetns(t)
			m := manager(t, ns)
			for _, bridge := range e.foreign {
				ns.Run("ip", "link", "add", bridge, "type", "bridge")
			}
			assert.NilError(t, m.Sync(t.Context(), e.networks, e.endpoints))
			golden.Assert(t, listed(ns), name+".golden")
			drift, err := m.Check(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, drift, "")
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
			self := linkMember(n.Bridge)
			want[setBridges][self], want[setSame][linkMember(n.Bridge, n.Bridge)], want[setICC][self] = "", "", ""
			for _, p := range n.Subnets[:2] {
				if p != n.Subnets[0] && contains(n.Subnets[0], p) || contains(n.Subnets[1], p) {
					continue
				}
				want[setHome][prefixMember(p, n.Bridge)] = ""
			}
			if n.Internal {
				continue
			}
			want[setOpen][self] = ""
			for _, p := range n.Subnets {
				if n.Masquerade && p.Addr().Is4() && !hiddenByAny(p, now) {
					want[setSources][prefixMember(p)] = ""
				}
			}
		}
		assert.DeepEqual(t, r.elements, want, gocmp.AllowUnexported(member{}))

		// And it survives the kernel's form.
		shape := shapeOf(setSources, false)
		list := encode(shape, r.elements[setSources].sorted(), nil)
		if len(list) > 0 {
			list = rapid.Permutation(list).Draw(t, "order")
		}
		back, err := decode(shape, list)
		if err != nil {
			t.Fatal(err)
		}
		assert.DeepEqual(t, back, r.elements[setSources], gocmp.AllowUnexported(member{}))
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
			shape := shapeOf(name, len(a) > 8)
			got, err := decode(shape, list)
			if err != nil {
				continue
			}
			for m, value := range got {
				_ = shape.text(m, value)
			}
			back, err := decode(shape, encode(shape, got.sorted(), got))
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
