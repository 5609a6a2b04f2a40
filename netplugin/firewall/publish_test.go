package firewall

import (
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
	"pgregory.net/rapid"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// onePort is an endpoint of the i-th network with one host port, of both families.
func onePort(id string, i int, hostPort uint16) Endpoint {
	n := network(i)
	addr := n.Subnets[0].Addr().Next().Next().String()
	return Endpoint{ID: id, Bridge: n.Bridge, Ports: []options.PublishedPort{
		published("0.0.0.0", hostPort, addr, 80, 1), published("::", hostPort, "fd00::2", 80, 1),
	}}
}

func TestHostPortHasOneOwner(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := manager(t, ns)
	ctx := t.Context()
	assert.ErrorIs(t, m.Publish(ctx, onePort("a", 1, 80)), errdefs.ErrNotFound)
	assert.NilError(t, m.Sync(ctx, []Network{network(1), network(2)}, []Endpoint{onePort("a", 1, 80)}))
	wide := onePort("b", 2, 79)
	wide.Ports[0].Count = 3
	for _, other := range []Endpoint{onePort("b", 2, 80), wide} {
		before := listed(ns)
		err := m.Publish(ctx, other)
		assert.ErrorIs(t, err, errdefs.ErrConflict)
		assert.ErrorContains(t, err, "80")
		assert.Equal(t, listed(ns), before)
	}
	twice := onePort("b", 2, 81)
	twice.Ports = append(twice.Ports, published("0.0.0.0", 81, "10.0.2.2", 90, 1))
	assert.ErrorIs(t, m.Publish(ctx, twice), errdefs.ErrConflict)
	none := onePort("b", 2, 81)
	none.Ports[0].Count = 0
	assert.ErrorIs(t, m.Publish(ctx, none), errdefs.ErrInvalidArgument)

	// One address is not all addresses, udp not tcp.
	at, udp := onePort("b", 2, 80), onePort("c", 2, 80)
	at.Ports = []options.PublishedPort{published("192.0.2.1", 80, "10.0.2.2", 80, 1)}
	udp.Ports[0].Proto, udp.Ports[1].Proto = options.UDP, options.UDP
	assert.NilError(t, m.Publish(ctx, at))
	assert.NilError(t, m.Publish(ctx, udp))
	// Once it is free, another has it; and the same again changes nothing.
	assert.NilError(t, m.Unpublish(ctx, "a"))
	assert.NilError(t, m.Publish(ctx, onePort("d", 2, 80)))
	before := listed(ns)
	assert.NilError(t, m.Publish(ctx, onePort("d", 2, 80)))
	assert.Equal(t, listed(ns), before)
	// A network takes its ports with it.
	assert.NilError(t, m.Remove(ctx, network(2).Bridge))
	assert.Assert(t, !strings.Contains(listed(ns), "tcp . 80"))
	assert.NilError(t, m.Publish(ctx, onePort("a", 1, 80)))
	// In Sync the first one wins and nothing else is lost.
	second := onePort("b", 2, 80)
	second.Ports = append(second.Ports, published("0.0.0.0", 81, "10.0.2.2", 81, 1))
	lost := onePort("c", 3, 82) // of no network
	assert.NilError(t, m.Sync(ctx, []Network{network(1), network(2)}, []Endpoint{onePort("a", 1, 80), second, lost}))
	text := listed(ns)
	assert.Assert(t, strings.Contains(text, "tcp . 80 : 10.0.1.2 . 80, tcp . 81 : 10.0.2.2 . 81 }"), text)
}

// What somebody does to Berth's tables is found even where a change of ports does
// not look for it first.
func TestPublishAfterTablesWereFlushed(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := manager(t, ns)
	ctx := t.Context()
	assert.NilError(t, m.Sync(ctx, []Network{network(1)}, []Endpoint{onePort("a", 1, 80)}))
	for _, damage := range []string{
		"flush ruleset", "delete table ip6 berth", "delete element ip berth published { tcp . 80 }", "delete rule ip berth across handle 1000",
	} {
		_, err := ns.Try("nft", damage)
		assert.Equal(t, err != nil, strings.Contains(damage, "1000"))
		assert.NilError(t, m.Publish(ctx, onePort("b", 1, 81)))
		assert.NilError(t, m.Publish(ctx, Endpoint{ID: "a", Bridge: network(1).Bridge}))
		assert.NilError(t, m.Publish(ctx, onePort("a", 1, 80)))
		drift, err := m.Check(ctx)
		assert.NilError(t, err)
		assert.Equal(t, drift, "", damage)
		assert.NilError(t, m.Unpublish(ctx, "b"))
	}
	ns.Run("nft", "add element ip berth published { tcp . 99 : 10.0.0.9 . 99 }")
	assert.NilError(t, m.Publish(ctx, onePort("b", 1, 81)))
	drift, err := m.Check(ctx)
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(drift, "tcp . 99 : 10.0.0.9 . 99"), drift)
}

func TestRestartKeepsPortsUntilTheyAreTold(t *testing.T) {
	ns := testkit.NewNetns(t)
	ctx := t.Context()
	networks := []Network{network(1), network(2), network(3)}
	networks[0].Trusted, networks[0].Sources = []string{"eth1"}, prefixes("192.0.2.0/24")
	networks[1].IPv4 = options.Family{Source: netip.MustParseAddr("192.0.2.1")}
	endpoints := []Endpoint{onePort("a", 1, 80), onePort("b", 2, 81), onePort("c", 3, 82)}
	for i := range endpoints {
		endpoints[i].Ports[1].Container = netip.MustParseAddr(fmt.Sprintf("fd00::%d", i+2))
	}
	endpoints[1].Ports = append(endpoints[1].Ports, published("0.0.0.0", 8000, "10.0.2.2", 8000, 9))
	assert.NilError(t, manager(t, ns).Sync(ctx, networks, endpoints))
	want := listed(ns)

	second := manager(t, ns)
	for i := range networks[:2] {
		added, err := second.Ensure(ctx, networks[i])
		assert.NilError(t, err)
		assert.Assert(t, !added)
		assert.NilError(t, second.Publish(ctx, endpoints[i]))
		assert.Equal(t, listed(ns), want)
	}
	// A range that overlaps with one that is left.
	third := manager(t, ns)
	_, err := third.Ensure(ctx, networks[0])
	assert.NilError(t, err)
	moved := Endpoint{ID: "d", Bridge: networks[0].Bridge, Ports: []options.PublishedPort{published("0.0.0.0", 7990, "10.0.1.2", 7990, 20)}}
	assert.NilError(t, third.Publish(ctx, moved))
	assert.Assert(t, strings.Contains(listed(ns), "tcp . 7990-8009 : 10.0.1.2 }"))
	assert.NilError(t, third.Sync(ctx, networks, endpoints))
	assert.Equal(t, listed(ns), want)

	// A port that moved, and a network that goes without having been told.
	moved = endpoints[0]
	moved.Ports = []options.PublishedPort{published("0.0.0.0", 82, "10.0.1.2", 80, 1)}
	assert.NilError(t, second.Publish(ctx, moved))
	assert.NilError(t, second.Remove(ctx, network(3).Bridge))
	text := listed(ns)
	assert.Assert(t, strings.Contains(text, "tcp . 82 : 10.0.1.2 . 80"), text)
	assert.Assert(t, !strings.Contains(text, "10.0.3."), text)
	assert.Assert(t, strings.Contains(text, "10.0.2.0/24 : 192.0.2.1"), text)
	assert.NilError(t, second.Sync(ctx, networks, endpoints))
	assert.Equal(t, listed(ns), want)
	assert.NilError(t, second.Sync(ctx, networks, nil))
	assert.Assert(t, !strings.Contains(listed(ns), "tcp ."))
}

// drawPorts draws ports of few addresses, so that endpoints meet often.
func drawPorts(t *rapid.T, addr string) []options.PublishedPort {
	var out []options.PublishedPort
	for range rapid.IntRange(0, 4).Draw(t, "ports") {
		host := rapid.SampledFrom([]string{"0.0.0.0", "192.0.2.1", "127.0.0.1", "", "::"}).Draw(t, "host")
		p := published(host, uint16(rapid.IntRange(1, 12).Draw(t, "hostPort")), addr,
			uint16(rapid.IntRange(1, 12).Draw(t, "containerPort")), uint16(rapid.IntRange(1, 5).Draw(t, "count")))
		if rapid.Bool().Draw(t, "unshifted") {
			p.ContainerPort = p.HostPort
		}
		out = append(out, p)
	}
	return out
}

// Whatever comes and goes, the kernel has what the endpoints that are there lead
// to, and a conflict changes nothing.
func TestPortsStepByStep(t *testing.T) {
	m := manager(t, testkit.NewNetns(t))
	ctx := t.Context()
	rapid.Check(t, func(t *rapid.T) {
		nets := []Network{network(0), network(1)}
		if err := m.Sync(ctx, nets, nil); err != nil {
			t.Fatal(err)
		}
		now := map[string]Endpoint{}
		for range rapid.IntRange(1, 10).Draw(t, "steps") {
			i := rapid.IntRange(0, 3).Draw(t, "endpoint")
			ep := Endpoint{ID: fmt.Sprint(i), Bridge: nets[i%2].Bridge, Ports: drawPorts(t, fmt.Sprintf("10.0.%d.%d", i%2, i+2))}
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 0:
				delete(now, ep.ID)
				if err := m.Unpublish(ctx, ep.ID); err != nil {
					t.Fatal(err)
				}
			case 1:
				if nets[i%2].Trusted = nil; rapid.Bool().Draw(t, "trusted") {
					nets[i%2].Trusted = []string{"eth1"}
				}
				if _, err := m.Ensure(ctx, nets[i%2]); err != nil {
					t.Fatal(err)
				}
			default:
				err := m.Publish(ctx, ep)
				if err != nil && !errdefs.IsConflict(err) {
					t.Fatal(err)
				}
				if err == nil {
					now[ep.ID] = ep
				}
			}
		}
		got, err := m.kernel.read(newTable(false))
		if err != nil {
			t.Fatal(err)
		}
		want := newRuleset(false)
		for _, n := range nets {
			want.put(n)
		}
		for _, ep := range now {
			for _, e := range want.ports(ep, len(nets[0].Trusted) > 0 && ep.Bridge == nets[0].Bridge || len(nets[1].Trusted) > 0 && ep.Bridge == nets[1].Bridge) {
				want.set(e.set, e.member, e.value)
			}
		}
		for _, name := range setNames() {
			if !maps.Equal(got.elements[name], want.elements[name]) {
				t.Fatalf("set %s has %v, want %v", name, got.elements[name], want.elements[name])
			}
		}
	})
}

// manyPorts is an endpoint with shifted ports in a row, which are an element each.
func manyPorts(id string, i int, first, count uint16) Endpoint {
	ep := onePort(id, i, first)
	ep.Ports = ep.Ports[:1]
	for port := range count {
		p := ep.Ports[0]
		p.HostPort, p.ContainerPort = first+port, 1+port
		ep.Ports = append(ep.Ports, p)
	}
	ep.Ports = ep.Ports[1:]
	return ep
}

func TestTwentyThousandPorts(t *testing.T) {
	ns := testkit.NewNetns(t)
	m := manager(t, ns)
	ctx := t.Context()
	assert.NilError(t, m.Sync(ctx, []Network{network(1), network(2)}, nil))
	start := time.Now()
	assert.NilError(t, m.Publish(ctx, manyPorts("many", 1, 10000, 20000)))
	made := time.Since(start)
	// Each of them a range of two, in an interval set.
	ranges := onePort("ranges", 2, 40000)
	ranges.Ports = nil
	for port := uint16(40000); port < 60000; port += 2 {
		ranges.Ports = append(ranges.Ports, published("0.0.0.0", port, "10.0.2.2", port, 2))
	}
	start = time.Now()
	assert.NilError(t, m.Publish(ctx, ranges))
	t.Logf("20000 ports in %v, 10000 ranges in %v", made, time.Since(start))
	start = time.Now()
	drift, err := m.Check(ctx)
	assert.NilError(t, err)
	assert.Equal(t, drift, "")
	s, err := m.kernel.read(newTable(false))
	assert.NilError(t, err)
	assert.Equal(t, len(s.elements[mapPublished]), 20000)
	assert.Equal(t, len(s.elements[mapRanges]), 10000)
	for port := range uint16(20000) {
		key := member{first: string(registers{}.proto(options.TCP).port(10000 + port))}
		assert.Equal(t, s.elements[mapPublished][key], string(registers{}.addr(netip.MustParseAddr("10.0.1.2")).port(1+port)))
	}
	t.Logf("read twice in %v", time.Since(start))
	assert.NilError(t, m.Unpublish(ctx, "many"))
	assert.NilError(t, m.Unpublish(ctx, "ranges"))
	assert.Assert(t, !strings.Contains(listed(ns), "tcp ."))
}

func benchmarkPublish(b *testing.B, ports, beside uint16) {
	ns := testkit.NewNetns(b)
	m := manager(b, ns)
	var others []Endpoint
	if beside > 0 {
		others = append(others, manyPorts("others", 1, 20000, beside))
	}
	assert.NilError(b, m.Sync(b.Context(), []Network{network(1), network(2)}, others))
	ep := manyPorts("one", 2, 1000, ports)
	for b.Loop() {
		assert.NilError(b, m.Publish(b.Context(), ep))
		assert.NilError(b, m.Unpublish(b.Context(), ep.ID))
	}
}

func BenchmarkPublishOne(b *testing.B)                          { benchmarkPublish(b, 1, 0) }
func BenchmarkPublishOneBesideTwentyThousand(b *testing.B)      { benchmarkPublish(b, 1, 20000) }
func BenchmarkPublishThousand(b *testing.B)                     { benchmarkPublish(b, 1000, 0) }
func BenchmarkPublishThousandBesideTwentyThousand(b *testing.B) { benchmarkPublish(b, 1000, 20000) }
