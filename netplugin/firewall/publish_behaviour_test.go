package firewall

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

const (
	r4, r6 = "10.4.0", "fd00:4:"
	u4, u6 = "10.5.0", "fd00:5:"
	l4, l6 = "10.6.0", "fd00:6:"
	h4, h6 = "10.7.0", "fd00:7:"
	n4, n6 = "10.8.0", "fd00:8:"
)

// A visit is one line of a table of who reaches which port. seen is as in path.
type visit struct {
	from, addr string
	port       int
	seen       string
}

// expectVisits checks all visits at once.
func (w *world) expectVisits(visits []visit) {
	w.t.Helper()
	type result struct {
		visit
		got string
	}
	results := make(chan result)
	for _, v := range visits {
		go func() {
			wait := waitYes
			if v.seen == "" {
				wait = waitNo
			}
			results <- result{v, call(w.who[v.from], v.addr, v.port, wait)}
		}()
	}
	for range visits {
		r := <-results
		if r.got != r.seen && (r.seen != "any" || r.got == "") {
			w.t.Errorf("%s is seen by %s port %d as %q, not %q", r.from, r.addr, r.port, r.got, r.seen)
		}
	}
}

// call connects to a port and returns the address that the server saw, or "".
func call(ns *testkit.Netns, addr string, port int, wait time.Duration) string {
	var seen string
	ns.Do(func() {
		c, err := (&net.Dialer{Timeout: wait}).Dial("tcp", net.JoinHostPort(addr, fmt.Sprint(port)))
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		if c.SetDeadline(time.Now().Add(wait)) != nil {
			return
		}
		if b, err := io.ReadAll(c); err == nil {
			seen = string(b)
		}
	})
	return seen
}

// echo pings an address once.
func echo(t *testing.T, ns *testkit.Netns, addr string) (answered bool) {
	network, request, reply := "ip4:icmp", icmp.Type(ipv4.ICMPTypeEcho), icmp.Type(ipv4.ICMPTypeEchoReply)
	if strings.Contains(addr, ":") {
		network, request, reply = "ip6:ipv6-icmp", ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	ns.Do(func() {
		c, err := net.DialIP(network, nil, &net.IPAddr{IP: net.ParseIP(addr)})
		assert.NilError(t, err)
		defer func() { _ = c.Close() }()
		b, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: 1, Seq: 1}}).Marshal(nil)
		assert.NilError(t, err)
		_, err = c.Write(b)
		assert.NilError(t, err)
		assert.NilError(t, c.SetReadDeadline(time.Now().Add(waitNo)))
		answer := make([]byte, 1500)
		for {
			n, _, err := c.ReadFrom(answer)
			if err != nil {
				return
			}
			m, err := icmp.ParseMessage(request.Protocol(), answer[:n])
			if err == nil && m.Type == reply {
				answered = true
				return
			}
		}
	})
	return answered
}

// portWorld has a network of each kind, with published ports.
func portWorld(t *testing.T) (*world, []Network, []Endpoint) {
	w := newWorld(t)
	routed := options.Family{Mode: options.GatewayRouted}
	open := options.Family{Mode: options.GatewayUnprotected}
	networks := []Network{
		w.berth("btha", a4, a6, Network{Masquerade: true}),
		w.berth("bthb", b4, b6, Network{Masquerade: true}),
		w.berth("bthi", i4, i6, Network{Internal: true, Masquerade: true}),
		w.berth("bthr", r4, r6, Network{Masquerade: true, IPv4: routed, IPv6: routed}),
		w.berth("bthu", u4, u6, Network{Masquerade: true, IPv4: open, IPv6: open}),
		w.berth("bthl", l4, l6, Network{Masquerade: true, Sources: prefixes(neighbour4 + "/32")}),
		w.berth("bthh", h4, h6, Network{Masquerade: true, HostFirewall: true}),
		w.berth("bthn", n4, n6, Network{Masquerade: true, NoICC: true, Trusted: []string{uplink}}),
	}
	w.docker()
	var endpoints []Endpoint
	for _, c := range []struct {
		name, bridge, v4, v6 string
		n                    int
		host                 uint16
	}{
		{"a2", "btha", a4, a6, 2, 8080},
		{"a3", "btha", a4, a6, 3, 0},
		{"b2", "bthb", b4, b6, 2, 0},
		{"i2", "bthi", i4, i6, 2, 0},
		{"r2", "bthr", r4, r6, 2, 0},
		{"r3", "bthr", r4, r6, 3, 0},
		{"u2", "bthu", u4, u6, 2, 0},
		{"l2", "bthl", l4, l6, 2, 8082},
		{"l3", "bthl", l4, l6, 3, 0},
		{"h2", "bthh", h4, h6, 2, 8083},
		{"n2", "bthn", n4, n6, 2, 8084},
		{"n3", "bthn", n4, n6, 3, 0},
		{"d2", dockerBridge, docker4, docker6, 2, 0},
	} {
		w.container(c.name, c.bridge, c.v4, c.v6, c.n)
		// As the driver does, for the container's own port where bridged frames pass
		// the rules.
		w.host.Run("ip", "link", "set", "v"+c.name, "type", "bridge_slave", "hairpin", "on")
		if c.host != 0 {
			endpoints = append(endpoints, Endpoint{ID: c.name, Bridge: c.bridge, Ports: []options.PublishedPort{
				published("0.0.0.0", c.host, addrOf(false, c.v4, c.v6, c.n), 80, 1),
				published("::", c.host, addrOf(true, c.v4, c.v6, c.n), 80, 1),
			}})
		}
	}
	endpoints[0].Ports = append(endpoints[0].Ports,
		published("127.0.0.1", 8081, a4+".2", 80, 1),
		published("0.0.0.0", 9000, a4+".2", 79, 3), published("::", 9000, a6+":2", 79, 3),
		published(hostLAN4, 79, a4+".2", 79, 3), published(hostLAN6, 79, a6+":2", 79, 3),
	)
	endpoints = append(endpoints, Endpoint{ID: "r2", Bridge: "bthr", Ports: []options.PublishedPort{
		published("", 0, r4+".2", 79, 5), published("", 0, r6+":2", 80, 1),
	}})
	for _, n := range networks {
		w.host.Run("sysctl", "-qw", "net.ipv4.conf."+n.Bridge+".route_localnet=1")
	}
	return w, networks, endpoints
}

func portVisits() []visit {
	visits := []visit{
		{"host", "127.0.0.1", 8080, a4 + ".1"},
		{"host", "127.0.0.1", 8081, a4 + ".1"},
		{"host", "127.0.0.1", 9001, a4 + ".1"},
		{"lan", hostLAN4, 8081, ""},
		{"a3", hostLAN4, 8081, ""},
		{"lan", hostLAN4, 8082, neighbour4},
		{"lan", hostLAN6, 8082, ""}, // no IPv6 source is listed
		{"n2", n4 + ".3", 80, "bridged"},
		{"n2", n6 + ":3", 80, "bridged"},
	}
	for _, v6 := range []bool{false, true} {
		at := func(v4, v6net string, n int) string { return addrOf(v6, v4, v6net, n) }
		host, lan := hostLAN4, neighbour4
		if v6 {
			host, lan = hostLAN6, neighbour6
		}
		visits = append(visits,
			// from another machine, with its own address
			visit{"lan", host, 8080, lan},
			visit{"lan", host, 9001, lan},
			visit{"lan", host, 80, lan},
			visit{"lan", at(a4, a6, 1), 8080, lan},
			visit{"lan", at(a4, a6, 2), 80, ""},
			visit{"lan", at(a4, a6, 2), 8080, ""},
			// from the host
			visit{"host", host, 8080, host},
			visit{"host", at(a4, a6, 1), 8080, at(a4, a6, 1)},
			visit{"host", host, 80, host},
			// itself, a sibling, another network, Docker's, an internal one
			visit{"a2", host, 8080, at(a4, a6, 1)},
			visit{"a3", host, 8080, at(a4, a6, 1)},
			visit{"a3", at(a4, a6, 1), 8080, at(a4, a6, 1)},
			visit{"b2", host, 8080, at(b4, b6, 2)},
			visit{"b2", at(b4, b6, 1), 9001, at(b4, b6, 2)},
			visit{"b2", at(a4, a6, 2), 80, ""},
			visit{"d2", host, 8080, at(docker4, docker6, 2)},
			visit{"d2", at(a4, a6, 2), 80, ""},
			visit{"i2", host, 8080, ""},
			visit{"i2", at(i4, i6, 1), 8080, ""},
			// routed
			visit{"lan", at(r4, r6, 2), 80, lan},
			visit{"lan", at(r4, r6, 3), 80, ""},
			visit{"b2", at(r4, r6, 2), 80, at(b4, b6, 2)},
			visit{"d2", at(r4, r6, 2), 80, at(docker4, docker6, 2)},
			visit{"i2", at(r4, r6, 2), 80, ""},
			visit{"r2", lan, 80, at(r4, r6, 2)},
			visit{"r2", at(r4, r6, 3), 80, at(r4, r6, 2)},
			// unprotected
			visit{"lan", at(u4, u6, 2), 80, lan},
			visit{"b2", at(u4, u6, 2), 80, ""},
			visit{"d2", at(u4, u6, 2), 80, ""},
			visit{"u2", lan, 80, host},
			// for some sources only
			visit{"b2", host, 8082, ""},
			visit{"d2", host, 8082, ""},
			visit{"host", host, 8082, host},
			visit{"l3", host, 8082, at(l4, l6, 1)},
			visit{"l2", lan, 80, host},
			// the host's firewall, which is open
			visit{"lan", host, 8083, lan},
			visit{"b2", host, 8083, at(b4, b6, 2)},
			// a trusted link, and containers that may not talk
			visit{"lan", at(n4, n6, 2), 80, lan},
			visit{"lan", at(n4, n6, 3), 80, ""},
			visit{"lan", host, 8084, lan},
			visit{"n2", host, 8084, at(n4, n6, 1)},
			visit{"n3", host, 8084, at(n4, n6, 1)},
		)
	}
	return visits
}

func TestWhoReachesPublishedPorts(t *testing.T) {
	for _, bridged := range []bool{true, false} {
		t.Run(fmt.Sprintf("bridged frames filtered: %v", bridged), func(t *testing.T) {
			w, networks, endpoints := portWorld(t)
			if !bridged {
				w.host.Run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=0", "net.bridge.bridge-nf-call-ip6tables=0")
			}
			assert.NilError(t, w.m.Sync(t.Context(), networks, nil))
			for _, ep := range endpoints {
				assert.NilError(t, w.m.Publish(t.Context(), ep))
			}
			visits := portVisits()
			for i := range visits {
				// Only rules keep these apart here; the driver isolates the ports as well.
				if v := &visits[i]; v.seen == "bridged" {
					if v.seen = ""; !bridged {
						v.seen = "any"
					}
				}
			}
			w.expectVisits(visits)
			for _, c := range []struct {
				from, addr string
				answers    bool
			}{{"lan", r4 + ".3", true}, {"lan", r6 + ":3", true}, {"b2", r6 + ":3", true}, {"lan", a4 + ".2", false}, {"lan", a6 + ":2", false}} {
				assert.Equal(t, echo(t, w.who[c.from], c.addr), c.answers, "ping from %s to %s", c.from, c.addr)
			}

			assert.NilError(t, w.m.Unpublish(t.Context(), "a2"))
			assert.NilError(t, w.m.Unpublish(t.Context(), "a2"))
			assert.NilError(t, w.m.Remove(t.Context(), "bthr"))
			w.expectVisits([]visit{
				{"lan", hostLAN4, 8080, ""},
				{"lan", hostLAN6, 9001, ""},
				{"host", "127.0.0.1", 8081, ""},
				{"lan", hostLAN4, 80, neighbour4}, // the host's own
				{"lan", hostLAN4, 8084, neighbour4},
			})
			drift, err := w.m.Check(t.Context())
			assert.NilError(t, err)
			assert.Equal(t, drift, "")
		})
	}
}

// Where the host drops what it forwards, a port is open but for the network that
// leaves the decision to the host.
func TestHostFirewallDecidesWhereItIsAsked(t *testing.T) {
	for _, suffix := range []string{"nft", "legacy"} {
		t.Run(suffix, func(t *testing.T) {
			w, networks, endpoints := portWorld(t)
			for _, program := range []string{"iptables-" + suffix, "ip6tables-" + suffix} {
				w.host.Run(program, "-P", "FORWARD", "DROP")
			}
			// A mark that another machine's packets get from the host does not open it.
			w.host.Run("nft", "add table inet other")
			w.host.Run("nft", "add chain inet other pre { type filter hook prerouting priority mangle; }")
			w.host.Run("nft", "add rule inet other pre iifname "+uplink+" meta mark set 0x10000000")
			assert.NilError(t, w.m.Sync(t.Context(), networks, endpoints))
			w.expectVisits([]visit{
				{"lan", hostLAN4, 8080, neighbour4}, {"lan", hostLAN6, 8080, neighbour6}, {"lan", r4 + ".2", 80, neighbour4},
				{"lan", hostLAN4, 8083, ""}, {"lan", hostLAN6, 8083, ""}, {"b2", hostLAN4, 8083, ""},
				{"host", hostLAN4, 8083, hostLAN4}, {"h2", neighbour4, 80, hostLAN4},
				{"lan", a4 + ".2", 80, ""}, {"lan", a6 + ":2", 80, ""},
			})
			w.host.Run("iptables-"+suffix, "-A", "FORWARD", "-p", "tcp", "-d", h4+".2", "--dport", "80", "-s", neighbour4, "-j", "ACCEPT")
			w.expectVisits([]visit{{"lan", hostLAN4, 8083, neighbour4}, {"b2", hostLAN4, 8083, ""}})
		})
	}
}

// withoutLoopback makes a namespace send packets for 127.0.0.1 to its gateway.
func withoutLoopback(ns *testkit.Netns, link, gateway string) {
	ns.Run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
	ns.Run("ip", "addr", "flush", "dev", "lo")
	ns.Run("ip", "route", "add", "127.0.0.1/32", "via", gateway, "dev", link)
}

func TestLoopbackIsReachedFromTheHostOnly(t *testing.T) {
	w, networks, endpoints := portWorld(t)
	// Even on a host that lets all links route it.
	w.host.Run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
	assert.NilError(t, w.m.Sync(t.Context(), networks, endpoints))
	withoutLoopback(w.who["lan"], "lan0", hostLAN4)
	for _, name := range []string{"a2", "a3"} {
		withoutLoopback(w.who[name], "eth0", a4+".1")
	}
	withoutLoopback(w.who["d2"], "eth0", docker4+".1")
	w.expectVisits([]visit{
		{"lan", "127.0.0.1", 8080, ""},
		{"lan", "127.0.0.1", 8081, ""},
		{"d2", "127.0.0.1", 8081, ""},
		{"a3", "127.0.0.1", 8081, ""},
		{"a3", "127.0.0.1", 80, ""}, // of the host itself
		{"a2", "127.0.0.1", 80, ""},
		{"host", "127.0.0.1", 8081, a4 + ".1"},
	})
	// Were it not for these rules, there would be answers: the packets do arrive.
	w.host.Run("nft", "flush chain ip berth guard")
	w.host.Run("nft", "flush chain ip berth prerouting")
	w.host.Run("nft", "add rule ip berth prerouting fib daddr type local goto publish")
	w.expectVisits([]visit{{"a3", "127.0.0.1", 80, a4 + ".3"}, {"lan", "127.0.0.1", 8081, neighbour4}})
}

// A published port of Docker's is Docker's affair, also for Berth's containers.
func TestPortsOfDocker(t *testing.T) {
	w, networks, endpoints := portWorld(t)
	w.host.Run("iptables-nft", "-t", "nat", "-A", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL",
		"-p", "tcp", "--dport", "7777", "-j", "DNAT", "--to-destination", docker4+".2:80")
	w.host.Run("iptables-nft", "-P", "FORWARD", "DROP")
	w.host.Run("iptables-nft", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
	assert.NilError(t, w.m.Sync(t.Context(), networks, endpoints))
	w.expectVisits([]visit{{"a3", hostLAN4, 7777, ""}, {"lan", hostLAN4, 7777, ""}})
	w.host.Run("iptables-nft", "-A", "FORWARD", "-o", dockerBridge, "-p", "tcp", "--dport", "80", "-j", "ACCEPT")
	w.expectVisits([]visit{{"a3", hostLAN4, 7777, "any"}, {"lan", hostLAN4, 7777, neighbour4}, {"i2", hostLAN4, 7777, ""}, {"a3", docker4 + ".2", 80, ""}})
}

func TestOutgoingTrafficGetsTheChosenSource(t *testing.T) {
	w := newWorld(t)
	addrs(w.host, uplink, "192.0.2.7/24", "fd00:ff::7/64")
	n := w.berth("btha", a4, a6, Network{Masquerade: true, IPv4: options.Family{Source: netip.MustParseAddr("192.0.2.7")}, IPv6: options.Family{Source: netip.MustParseAddr("fd00:ff::7")}})
	w.container("a2", "btha", a4, a6, 2)
	assert.NilError(t, w.m.Sync(t.Context(), []Network{n}, nil))
	w.expect([]path{{"a2", neighbour4, "192.0.2.7"}, {"a2", neighbour6, "fd00:ff::7"}, {"a2", a4 + ".1", a4 + ".2"}})
	n.IPv4.Source = netip.Addr{}
	_, err := w.m.Ensure(t.Context(), n)
	assert.NilError(t, err)
	assert.Assert(t, !strings.Contains(w.host.Run("nft", "list map ip berth snat_sources"), "elements"))
	w.expect([]path{{"a2", neighbour4, hostLAN4}})
}

// serveUDP answers datagrams to port 53 with the address that they come from.
func serveUDP(t *testing.T, ns *testkit.Netns) {
	t.Helper()
	var c net.PacketConn
	ns.Do(func() {
		var err error
		c, err = net.ListenPacket("udp", ":53")
		assert.NilError(t, err)
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 100)
		for {
			_, from, err := c.ReadFrom(b)
			if err != nil {
				return // closed below
			}
			host, _, _ := net.SplitHostPort(from.String())
			_, _ = c.WriteTo([]byte(host), from) // the caller notices what is missing
		}
	}()
	t.Cleanup(func() {
		_ = c.Close()
		<-done
	})
}

func TestPublishedDatagrams(t *testing.T) {
	w, networks, _ := portWorld(t)
	serveUDP(t, w.who["a2"])
	var ep Endpoint
	for _, p := range []options.PublishedPort{published("0.0.0.0", 5353, a4+".2", 53, 1), published("::", 5353, a6+":2", 53, 1)} {
		p.Proto = options.UDP
		ep.Ports = append(ep.Ports, p)
	}
	ep.ID, ep.Bridge = "a2", "btha"
	assert.NilError(t, w.m.Sync(t.Context(), networks, []Endpoint{ep}))
	for _, v := range []visit{
		{"lan", hostLAN4, 5353, neighbour4}, {"lan", hostLAN6, 5353, neighbour6}, {"host", "127.0.0.1", 5353, a4 + ".1"},
		{"a2", hostLAN4, 5353, a4 + ".1"}, {"a3", hostLAN4, 5353, a4 + ".1"}, {"b2", hostLAN6, 5353, b6 + ":2"}, {"lan", a4 + ".2", 53, ""},
	} {
		var got string
		w.who[v.from].Do(func() {
			c, err := net.Dial("udp", net.JoinHostPort(v.addr, fmt.Sprint(v.port)))
			assert.NilError(t, err)
			defer func() { _ = c.Close() }()
			_, err = c.Write([]byte("who am I"))
			assert.NilError(t, err)
			assert.NilError(t, c.SetReadDeadline(time.Now().Add(waitNo)))
			b := make([]byte, 100)
			n, _ := c.Read(b) // nothing comes where none is wanted
			got = string(b[:n])
		})
		if a, err := netip.ParseAddr(v.seen); err == nil {
			v.seen = a.String()
		}
		assert.Equal(t, got, v.seen, "from %s to %s", v.from, v.addr)
	}
}
