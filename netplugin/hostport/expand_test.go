package hostport

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/options"
)

var (
	addr4 = netip.MustParseAddr("10.1.0.2")
	addr6 = netip.MustParseAddr("fd00:1::2")
)

func ip(s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(s)
}

// shown is what expand makes of one request, in the words of the tests.
func shown(t Target, hostIP string, proto options.Proto, hostIPv6 bool) string {
	groups, direct, _ := expand(t, []options.PortRequest{{Proto: proto, HostIP: ip(hostIP), HostPort: 80, HostPortEnd: 80, ContainerPort: 80}}, hostIPv6)
	var words []string
	for _, g := range groups {
		for _, b := range g.bindings {
			words = append(words, b.host.String()+">"+b.container.String())
		}
	}
	for _, p := range direct {
		words = append(words, "direct>"+p.Container.String())
	}
	return strings.Join(words, " ")
}

func TestBindingsAreThoseOfDocker(t *testing.T) {
	v4, v6 := Target{Addr4: addr4}, Target{Addr6: addr6}
	dual := Target{Addr4: addr4, Addr6: addr6}
	with := func(t Target, change func(*Target)) Target {
		change(&t)
		return t
	}
	const all4, from6to4 = "0.0.0.0>10.1.0.2", "::>10.1.0.2"
	for name, c := range map[string]struct {
		target Target
		hostIP string
		proto  options.Proto
		noIPv6 bool
		want   string
	}{
		"both families":                  {target: dual, want: all4 + " ::>fd00:1::2"},
		"both families, host without v6": {target: dual, noIPv6: true, want: all4},
		"v4 only":                        {target: v4, want: all4 + " " + from6to4},
		"v4 only, host without v6":       {target: v4, noIPv6: true, want: all4},
		"v4 only, sctp":                  {target: v4, proto: options.SCTP, want: all4},
		"v4 only, no proxy":              {target: with(v4, func(t *Target) { t.Network.NoProxy = true }), want: all4},
		"v4 only, v6 gateway elsewhere":  {target: with(v4, func(t *Target) { t.NoProxy6to4 = true }), want: all4},
		"v6 only":                        {target: v6, want: "::>fd00:1::2"},
		"v6 only, host without v6":       {target: v6, noIPv6: true, want: ""},
		"0.0.0.0":                        {target: dual, hostIP: "0.0.0.0", want: all4},
		"::":                             {target: dual, hostIP: "::", want: "::>fd00:1::2"},
		":: by name, host without v6":    {target: dual, hostIP: "::", noIPv6: true, want: "::>fd00:1::2"},
		":: for v4 only":                 {target: v4, hostIP: "::", want: from6to4},
		"::1 for v4 only":                {target: v4, hostIP: "::1", want: "::1>10.1.0.2"},
		"::1 for v4 only, no proxy":      {target: with(v4, func(t *Target) { t.Network.NoProxy = true }), hostIP: "::1", want: ""},
		"one v4 address":                 {target: dual, hostIP: "127.0.0.1", want: "127.0.0.1>10.1.0.2"},
		"v4 in v6 notation":              {target: dual, hostIP: "::ffff:127.0.0.1", want: "127.0.0.1>10.1.0.2"},
		"one v6 address":                 {target: dual, hostIP: "2001:db8::1", want: "2001:db8::1>fd00:1::2"},
		"v4 address for v6 only":         {target: v6, hostIP: "0.0.0.0", want: ""},
		"bound to an address":            {target: with(dual, func(t *Target) { t.Network.IPv4.Binding = ip("127.0.0.1") }), want: "127.0.0.1>10.1.0.2"},
		"bound, but named":               {target: with(dual, func(t *Target) { t.Network.IPv4.Binding = ip("127.0.0.1") }), hostIP: "0.0.0.0", want: all4},
		"bound to 0.0.0.0":               {target: with(dual, func(t *Target) { t.Network.IPv4.Binding = ip("0.0.0.0") }), want: all4 + " ::>fd00:1::2"},
		"bound to a v6 address":          {target: with(dual, func(t *Target) { t.Network.IPv6.Binding = ip("::1") }), noIPv6: true, want: "::1>fd00:1::2"},
		"bound to ::":                    {target: with(dual, func(t *Target) { t.Network.IPv6.Binding = ip("::") }), want: "::>fd00:1::2"},
		"bound in both":                  {target: with(dual, func(t *Target) { t.Network.IPv4.Binding, t.Network.IPv6.Binding = ip("127.0.0.1"), ip("::1") }), want: "127.0.0.1>10.1.0.2 ::1>fd00:1::2"},
		"routed": {target: with(dual, func(t *Target) {
			t.Network.IPv4.Mode, t.Network.IPv6.Mode = options.GatewayRouted, options.GatewayRouted
		}), want: "direct>10.1.0.2 direct>fd00:1::2"},
		"routed v6, nat v4":       {target: with(dual, func(t *Target) { t.Network.IPv6.Mode = options.GatewayRouted }), noIPv6: true, want: all4 + " direct>fd00:1::2"},
		"routed v4, v4 only":      {target: with(v4, func(t *Target) { t.Network.IPv4.Mode = options.GatewayRouted }), want: "direct>10.1.0.2"},
		"routed v6, v4 only":      {target: with(v4, func(t *Target) { t.Network.IPv6.Mode = options.GatewayRouted }), want: all4},
		"routed v6, asked for v4": {target: with(dual, func(t *Target) { t.Network.IPv6.Mode = options.GatewayRouted }), hostIP: "127.0.0.1", want: "127.0.0.1>10.1.0.2"},
		"unprotected is nat":      {target: with(dual, func(t *Target) { t.Network.IPv4.Mode = options.GatewayUnprotected }), want: all4 + " ::>fd00:1::2"},
		"isolated": {target: with(dual, func(t *Target) {
			t.Network.IPv4.Mode, t.Network.IPv6.Mode = options.GatewayIsolated, options.GatewayIsolated
		}), want: ""},
		"internal": {target: with(dual, func(t *Target) { t.Network.Internal = true }), want: ""},
	} {
		t.Run(name, func(t *testing.T) {
			assert.Equal(t, shown(c.target, c.hostIP, max(c.proto, options.TCP), !c.noIPv6), c.want)
		})
	}
}

func TestRequestsThatDifferInTheAddressOnlyAreOneGroup(t *testing.T) {
	groups, _, _ := expand(Target{Addr4: addr4, Addr6: addr6}, []options.PortRequest{
		{Proto: options.TCP, HostIP: ip("127.0.0.1"), ContainerPort: 80},
		{Proto: options.TCP, HostIP: ip("::1"), ContainerPort: 80},
		{Proto: options.UDP, HostIP: ip("::1"), ContainerPort: 80},
	}, true)
	assert.Equal(t, len(groups), 2)
	assert.Equal(t, len(groups[0].bindings), 2)
}

func TestNonsenseIsRefused(t *testing.T) {
	for _, r := range []options.PortRequest{
		{Proto: options.TCP, HostPort: 80},
		{Proto: 1, HostPort: 80, ContainerPort: 80},
		{Proto: options.TCP, HostPort: 80, HostPortEnd: 79, ContainerPort: 80},
		{Proto: options.TCP, HostPortEnd: 79, ContainerPort: 80},
	} {
		err := check([]options.PortRequest{r})
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v: %v", r, err)
		assert.ErrorContains(t, err, r.String())
	}
}

func TestPortsInARowAreJoined(t *testing.T) {
	one := func(host string, hostPort uint16, port uint16) options.PublishedPort {
		return options.PublishedPort{Proto: options.TCP, Host: ip(host), HostPort: hostPort, Container: addr4, ContainerPort: port, Count: 1}
	}
	for name, c := range map[string]struct {
		in   []options.PublishedPort
		want string
	}{
		"none":         {nil, ""},
		"equal":        {[]options.PublishedPort{one("0.0.0.0", 81, 81), one("0.0.0.0", 80, 80)}, "0.0.0.0:80-81->80-81/tcp"},
		"shifted":      {[]options.PublishedPort{one("0.0.0.0", 8001, 81), one("0.0.0.0", 8000, 80)}, "0.0.0.0:8000-8001->80-81/tcp"},
		"gap":          {[]options.PublishedPort{one("0.0.0.0", 80, 80), one("0.0.0.0", 82, 82)}, "0.0.0.0:80->80/tcp 0.0.0.0:82->82/tcp"},
		"reversed":     {[]options.PublishedPort{one("0.0.0.0", 80, 81), one("0.0.0.0", 81, 80)}, "0.0.0.0:80->81/tcp 0.0.0.0:81->80/tcp"},
		"to one port":  {[]options.PublishedPort{one("0.0.0.0", 80, 80), one("0.0.0.0", 81, 80)}, "0.0.0.0:80->80/tcp 0.0.0.0:81->80/tcp"},
		"two hosts":    {[]options.PublishedPort{one("0.0.0.0", 80, 80), one("::", 81, 81)}, "0.0.0.0:80->80/tcp [::]:81->81/tcp"},
		"direct":       {[]options.PublishedPort{one("", 0, 80), one("", 0, 81), one("", 0, 80)}, "10.1.0.2:80-81/tcp"},
		"to the top":   {[]options.PublishedPort{one("0.0.0.0", 65534, 65534), one("0.0.0.0", 65535, 65535)}, "0.0.0.0:65534-65535->65534-65535/tcp"},
		"over the top": {[]options.PublishedPort{one("0.0.0.0", 65535, 80), one("0.0.0.0", 1, 81)}, "0.0.0.0:1->81/tcp 0.0.0.0:65535->80/tcp"},
	} {
		t.Run(name, func(t *testing.T) {
			var words []string
			for _, p := range coalesce(c.in) {
				words = append(words, p.String())
			}
			assert.Equal(t, strings.Join(words, " "), c.want)
		})
	}
}

// What is joined is taken apart again to the same ports.
func FuzzJoiningLosesNothing(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4, 5, 6, 7, 8})
	f.Fuzz(func(t *testing.T, b []byte) {
		want := map[key]destination{}
		var in []options.PublishedPort
		for ; len(b) >= 2; b = b[2:] {
			k := key{options.TCP, 65500 + uint16(b[0]%36), []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}[b[0]>>7]}
			if _, ok := want[k]; ok {
				continue
			}
			to := destination{addr4, 1 + uint16(b[1]%64)}
			want[k] = to
			in = append(in, options.PublishedPort{Proto: k.proto, Host: k.host, HostPort: k.port, Container: to.addr, ContainerPort: to.port, Count: 1})
		}
		out := coalesce(slices.Clone(in))
		got := map[key]destination{}
		each(out, func(k key, to destination) {
			if _, ok := got[k]; ok {
				t.Errorf("%v comes twice", k)
			}
			got[k] = to
		})
		assert.Equal(t, len(got), len(want))
		for k, to := range want {
			assert.Equal(t, got[k], to)
		}
		slices.Reverse(in)
		assert.DeepEqual(t, coalesce(in), out, cmpAddr)
	})
}

// Whatever is asked for, of whatever target, leads to bindings that can work, and
// every request is answered for.
func FuzzExpand(f *testing.F) {
	f.Add(uint32(0), []byte{0, 1, 2, 3, 4, 5, 6, 7})
	f.Add(uint32(0xffff), []byte{7, 6, 5, 4, 3, 2, 1, 0, 1})
	f.Fuzz(func(t *testing.T, bits uint32, b []byte) {
		take := func(n uint32) (v int) {
			v, bits = int(bits%n), bits/n
			return v
		}
		modes := []options.GatewayMode{"", options.GatewayNAT, options.GatewayUnprotected, options.GatewayRouted, options.GatewayIsolated}
		hosts := []netip.Addr{{}, ip("0.0.0.0"), ip("::"), ip("127.0.0.1"), ip("::1"), ip("::ffff:127.0.0.1")}
		target := Target{Addr4: []netip.Addr{{}, addr4}[take(2)], Addr6: []netip.Addr{{}, addr6}[take(2)], NoProxy6to4: take(2) == 1}
		n := &target.Network
		n.IPv4.Mode, n.IPv6.Mode = modes[take(5)], modes[take(5)]
		n.IPv4.Binding, n.IPv6.Binding = []netip.Addr{{}, ip("0.0.0.0"), ip("127.0.0.1")}[take(3)], []netip.Addr{{}, ip("::"), ip("::1")}[take(3)]
		n.NoProxy, n.Internal = take(2) == 1, take(2) == 1
		hostIPv6 := take(2) == 1
		var want []options.PortRequest
		for ; len(b) >= 3; b = b[3:] {
			want = append(want, options.PortRequest{
				Proto: []options.Proto{options.TCP, options.UDP, options.SCTP}[b[0]%3], HostIP: hosts[b[0]/3%6],
				HostPort: uint16(b[1] % 4), HostPortEnd: uint16(b[1] % 4), ContainerPort: 1 + uint16(b[2]%4),
			})
		}
		groups, direct, impossible := expand(target, want, hostIPv6)
		bindings := len(direct)
		for _, g := range groups {
			assert.Assert(t, len(g.bindings) > 0)
			for i, b := range g.bindings {
				p := options.PublishedPort{Proto: g.proto, Host: b.host, HostPort: 1, Container: b.container, ContainerPort: g.container, Count: 1}
				assert.Assert(t, b.container == target.Addr4 || b.container == target.Addr6)
				assert.Assert(t, !slices.Contains(g.bindings[:i], b) && !b.host.Is4In6())
				assert.Assert(t, !n.FamilyOf(b.host).Routed() && !n.FamilyOf(b.container).Routed() && !n.Internal)
				if p.Proxied() {
					assert.Assert(t, b.host.Is6() && !target.Addr6.IsValid() && !n.NoProxy && !target.NoProxy6to4 && g.proto != options.SCTP)
				}
				bindings++
			}
		}
		for _, p := range direct {
			assert.Assert(t, p.Direct() && n.FamilyOf(p.Container).Routed() && !n.Internal)
		}
		assert.Assert(t, len(impossible) <= len(want) && (bindings > 0 || len(impossible) == len(want)))
		assert.Assert(t, slices.IsSortedFunc(groups, compareGroups))
	})
}

func TestReservedPortsAreRead(t *testing.T) {
	got := parsePortList("1,5-7,65535")
	for _, p := range []uint16{1, 5, 6, 7, 65535} {
		assert.Assert(t, got[p], "%d", p)
	}
	assert.Equal(t, len(got), 5)
	assert.Equal(t, len(parsePortList("")), 0)
}
