package link_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

// tracked is a host with 192.0.2.1 whose flows are tracked, a container at
// 10.1.0.2 and fd00:1::2, and a client at 198.51.100.2 and fd00:2::2 beyond.
func tracked(t testing.TB) (host, box, far *testkit.Netns) {
	t.Helper()
	host, box, far = testkit.NewNetns(t), testkit.NewNetns(t), testkit.NewNetns(t)
	for i, ns := range []*testkit.Netns{box, far} {
		name := fmt.Sprintf("to%d", i)
		host.Run("ip", "link", "add", name, "type", "veth", "peer", "name", "peer")
		host.Run("ip", "link", "set", "peer", "netns", ns.Path())
		host.Run("ip", "link", "set", name, "up")
		four, six := [2]string{"10.1.0", "198.51.100"}[i], [2]string{"fd00:1:", "fd00:2:"}[i]
		host.Run("ip", "addr", "add", four+".1/24", "dev", name)
		host.Run("ip", "addr", "add", six+":1/64", "dev", name, "nodad")
		ns.Run("ip", "addr", "add", four+".2/24", "dev", "peer")
		ns.Run("ip", "addr", "add", six+":2/64", "dev", "peer", "nodad")
		ns.Run("ip", "link", "set", "peer", "up")
		ns.Run("ip", "route", "add", "default", "via", four+".1")
		ns.Run("ip", "-6", "route", "add", "default", "via", six+":1")
	}
	host.Run("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
	host.Run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	// Tracking begins with the first rule that needs it.
	host.Run("nft", "add table inet t; add chain inet t in { type filter hook prerouting priority 0; }; add chain inet t out { type filter hook output priority 0; }; "+
		"add rule inet t in ct state new counter; add rule inet t out ct state new counter")
	return host, box, far
}

// send sends a datagram from a port of its own.
func send(t testing.TB, ns *testkit.Netns, to string) {
	t.Helper()
	ns.Do(func() {
		c, err := net.Dial("udp", to)
		assert.NilError(t, err)
		defer c.Close()
		_, err = c.Write([]byte("x"))
		assert.NilError(t, err)
	})
}

func flows(host *testkit.Netns) string {
	return host.Run("conntrack", "-L", "-f", "ipv4") + "\n" + host.Run("conntrack", "-L", "-f", "ipv6")
}

// waitFlows waits until the host has seen the flows, which takes as long as the
// sender looks for his neighbour.
func waitFlows(t testing.TB, host *testkit.Netns, words ...string) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		have := flows(host)
		for _, w := range words {
			if !strings.Contains(have, w) {
				return poll.Continue("no %q in\n%s", w, have)
			}
		}
		return poll.Success()
	})
}

func dnat(host *testkit.Netns, port, to string) {
	host.Run("nft", "add table inet n; add chain inet n pre { type nat hook prerouting priority -100; }; "+
		"add rule inet n pre udp dport "+port+" dnat "+to)
}

func TestForgetFlowsThatAreOlderThanTheirPort(t *testing.T) {
	host, box, far := tracked(t)
	h := open(t, host)
	server, err := listenPacket(box, "10.1.0.2:53")
	assert.NilError(t, err)
	defer func() { _ = server.Close() }()
	received := func() bool {
		b := make([]byte, 10)
		assert.NilError(t, server.SetReadDeadline(time.Now().Add(300*time.Millisecond)))
		_, _, err := server.ReadFrom(b)
		return err == nil
	}

	// The client sends from one port before, and after, the port is published.
	client, err := listenPacket(far, "198.51.100.2:5000")
	assert.NilError(t, err)
	defer func() { _ = client.Close() }()
	to := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 5353}
	_, err = client.WriteTo([]byte("x"), to)
	assert.NilError(t, err)
	// Others have the same port elsewhere, and another port here.
	send(t, far, "10.1.0.2:5353")
	send(t, far, "192.0.2.1:5354")
	send(t, host, "198.51.100.2:5353")
	waitFlows(t, host, "dst=192.0.2.1 sport=5000 dport=5353", "dst=10.1.0.2", "dport=5354", "src=198.51.100.1 dst=198.51.100.2")
	dnat(host, "5353", "ip to 10.1.0.2:53")
	_, err = client.WriteTo([]byte("x"), to)
	assert.NilError(t, err)
	assert.Assert(t, !received(), "the flow was not stale")

	which := link.Flows{Forwarded: []link.Forward{{
		Proto: unix.IPPROTO_UDP, Host: netip.IPv4Unspecified(), HostPort: 5350, Container: netip.MustParseAddr("10.1.0.2"), Port: 50, Count: 4,
	}}}
	n, err := h.ForgetFlows(which)
	assert.NilError(t, err)
	assert.Equal(t, n, 1)
	_, err = client.WriteTo([]byte("x"), to)
	assert.NilError(t, err)
	assert.Assert(t, received())
	// The flow is now right, and stays, for the range and for the address alone.
	for _, address := range []string{"0.0.0.0", "192.0.2.1"} {
		which.Forwarded[0].Host = netip.MustParseAddr(address)
		n, err = h.ForgetFlows(which)
		assert.NilError(t, err)
		assert.Equal(t, n, 0)
	}
	left := flows(host)
	for _, words := range []string{
		"dst=192.0.2.1 sport=5000 dport=5353", "dst=10.1.0.2", "dport=5354", "src=198.51.100.1 dst=198.51.100.2",
	} {
		assert.Assert(t, strings.Contains(left, words), "no %s in\n%s", words, left)
	}
	// Now it leads to another container.
	which.Forwarded[0].Container = netip.MustParseAddr("10.1.0.3")
	n, err = h.ForgetFlows(which)
	assert.NilError(t, err)
	assert.Equal(t, n, 1)
}

func listenPacket(ns *testkit.Netns, addr string) (c net.PacketConn, err error) {
	ns.Do(func() { c, err = net.ListenPacket("udp", addr) })
	return c, err
}

func TestForgetFlowsOfADeadContainer(t *testing.T) {
	host, _, far := tracked(t)
	h := open(t, host)
	dnat(host, "5353", "ip to 10.1.0.2:53")
	dnat(host, "5353", "ip6 to [fd00:1::2]:53")
	send(t, far, "192.0.2.1:5353")
	send(t, far, "[fd00:2::1]:5353")
	send(t, far, "10.1.0.2:99")
	send(t, far, "10.1.0.1:99")
	send(t, far, "[fd00:1::1]:99")
	waitFlows(t, host, "dst=192.0.2.1", "dst=fd00:2::1", "src=198.51.100.2 dst=10.1.0.2", "dst=10.1.0.1", "dst=fd00:1::1")
	n, err := h.ForgetFlows(link.Flows{Answered: []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00:1::2"), {}}})
	assert.NilError(t, err)
	assert.Equal(t, n, 3)
	left := flows(host)
	assert.Assert(t, !strings.Contains(left, "10.1.0.2") && !strings.Contains(left, "fd00:1::2"), left)
	assert.Assert(t, strings.Contains(left, "dst=10.1.0.1") && strings.Contains(left, "dst=fd00:1::1"), left)
	n, err = h.ForgetFlows(link.Flows{})
	assert.NilError(t, err)
	assert.Equal(t, n, 0)
}

// The work does not grow with the number of ports times that of flows.
func TestForgetFlowsOfManyPorts(t *testing.T) {
	host, _, far := tracked(t)
	h := open(t, host)
	const many = 2000
	// A neighbour that is not known yet would cost most of the datagrams.
	send(t, far, "192.0.2.1:9")
	waitFlows(t, host, "dport=9 ")
	far.Do(func() {
		c, err := net.ListenPacket("udp", "198.51.100.2:5000")
		assert.NilError(t, err)
		defer func() { _ = c.Close() }()
		for i := range many {
			_, err := c.WriteTo([]byte("x"), &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 10000 + i})
			assert.NilError(t, err)
		}
	})
	start := time.Now()
	n, err := h.ForgetFlows(link.Flows{Forwarded: []link.Forward{{
		Proto: unix.IPPROTO_UDP, Host: netip.MustParseAddr("192.0.2.1"), HostPort: 10000,
		Container: netip.MustParseAddr("10.1.0.2"), Port: 10000, Count: 20000,
	}}})
	assert.NilError(t, err)
	assert.Assert(t, n > many/2, "%d flows", n)
	t.Logf("%d flows forgotten in %v", n, time.Since(start))
}
