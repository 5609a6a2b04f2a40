package bridge_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// published makes ep publish a port on this host address.
func published(ep options.Endpoint, host string) options.Endpoint {
	ep.Ports = []options.PublishedPort{{
		Proto: options.UDP, Host: netip.MustParseAddr(host), HostPort: 8053, Container: ep.IPv4.Addr(), ContainerPort: 53, Count: 1,
	}}
	return ep
}

func TestWhatPublishedPortsNeedOfTheBridge(t *testing.T) {
	ns := testkit.NewNetns(t)
	m, n := mode(t, ns), modetest.Network(1)
	ep := modetest.Endpoint(n, 1)
	localnet := func() string { return ns.Run("cat", "/proc/sys/net/ipv4/conf/"+n.Bridge+"/route_localnet") }
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	assert.Equal(t, localnet(), "0")
	assert.Assert(t, !port(t, ns, ep).Hairpin)

	ns.Run("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
	ep = published(ep, "192.0.2.1")
	assert.NilError(t, m.EnsurePorts(t.Context(), n, ep))
	assert.Equal(t, localnet(), "0")
	assert.Assert(t, port(t, ns, ep).Hairpin)
	ep = published(ep, "127.0.0.1")
	for range 2 {
		assert.NilError(t, m.EnsurePorts(t.Context(), n, ep))
		assert.Equal(t, localnet(), "1")
		// A repair keeps it.
		assert.NilError(t, m.EnsureNetwork(t.Context(), n))
		assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
		assert.Equal(t, localnet(), "1")
		assert.Assert(t, port(t, ns, ep).Hairpin)
	}
	assert.NilError(t, m.RemovePorts(t.Context(), n, ep))
	assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
}

func TestPortsAreFreeAfterTheNetwork(t *testing.T) {
	ns := testkit.NewNetns(t)
	m, n := mode(t, ns), modetest.Network(1)
	ep := modetest.Endpoint(n, 1)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	want := []options.PortRequest{{Proto: options.TCP, HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8080, HostPortEnd: 8080, ContainerPort: 80}}
	var err error
	ep.Ports, err = m.ReservePorts(t.Context(), n, ep, want)
	assert.NilError(t, err)
	assert.NilError(t, m.EnsurePorts(t.Context(), n, ep))
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
	assert.Equal(t, ns.Run("ss", "-Hltn"), "")
}

func TestAdoptedBridgeDoesNotStayOpenToLoopback(t *testing.T) {
	ns := testkit.NewNetns(t)
	m, n := mode(t, ns), modetest.Network(1)
	ns.Run("ip", "link", "add", n.Bridge, "type", "bridge")
	n, err := m.Adopt(t.Context(), n)
	assert.NilError(t, err)
	assert.Assert(t, n.Adopted)
	ep := published(modetest.Endpoint(n, 1), "127.0.0.1")
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
	assert.NilError(t, m.EnsurePorts(t.Context(), n, ep))
	assert.Equal(t, ns.Run("cat", "/proc/sys/net/ipv4/conf/"+n.Bridge+"/route_localnet"), "1")
	assert.NilError(t, m.RemoveNetwork(t.Context(), n))
	assert.Equal(t, ns.Run("cat", "/proc/sys/net/ipv4/conf/"+n.Bridge+"/route_localnet"), "0")
}

// With br_netfilter a frame to a published port goes from port to port of the
// bridge, without it through the host.
func TestPublishedPortIsReachedFromItsOwnContainer(t *testing.T) {
	for _, filter := range []string{"0", "1"} {
		ns := testkit.NewNetns(t)
		ns.Run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables="+filter)
		ns.Run("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
		m, n := mode(t, ns), modetest.Network(1)
		ep, sibling := modetest.Endpoint(n, 1), modetest.Endpoint(n, 2)
		assert.NilError(t, m.EnsureNetwork(t.Context(), n))
		var containers []*testkit.Netns
		for _, e := range []options.Endpoint{ep, sibling} {
			assert.NilError(t, m.EnsureEndpoint(t.Context(), n, e))
			c := plug(t, ns, e)
			c.Run("ip", "route", "add", "default", "via", n.Subnets[0].Gateway.String())
			containers = append(containers, c)
		}
		ep.Ports = []options.PublishedPort{{
			Proto: options.TCP, Host: netip.IPv4Unspecified(), HostPort: 80, Container: ep.IPv4.Addr(), ContainerPort: 80, Count: 1,
		}}
		assert.NilError(t, m.EnsurePorts(t.Context(), n, ep))
		for i, c := range containers {
			assert.Check(t, c.Call("192.0.2.1", 3*time.Second) != "", "container %d, bridge-nf-call-iptables %s", i, filter)
		}
		assert.Check(t, ns.Call("127.0.0.1", 3*time.Second) != "")
		assert.NilError(t, m.RemovePorts(t.Context(), n, ep))
		assert.Equal(t, containers[1].Call("192.0.2.1", 300*time.Millisecond), "")
	}
}

// Containers that are kept apart reach what the others publish and nothing else,
// however the bridge's packets go, and also when that is switched.
func TestPortsOfContainersThatAreKeptApart(t *testing.T) {
	ns := testkit.NewNetns(t)
	filter := func(value string) {
		ns.Run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables="+value, "net.bridge.bridge-nf-call-ip6tables="+value)
	}
	filter("1")
	ns.Run("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
	m, n := mode(t, ns), modetest.Network(1)
	n.NoICC = true
	ep, sibling := modetest.Endpoint(n, 1), modetest.Endpoint(n, 2)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	var client *testkit.Netns
	for _, e := range []options.Endpoint{ep, sibling} {
		assert.NilError(t, m.EnsureEndpoint(t.Context(), n, e))
		client = plug(t, ns, e)
		client.Run("ip", "route", "add", "default", "via", n.Subnets[0].Gateway.String())
	}
	silent := ep
	ep.Ports = []options.PublishedPort{{
		Proto: options.TCP, Host: netip.IPv4Unspecified(), HostPort: 80, Container: ep.IPv4.Addr(), ContainerPort: 80, Count: 1,
	}}
	assert.NilError(t, m.EnsurePorts(t.Context(), n, ep))
	for _, value := range []string{"1", "0", "1"} {
		filter(value)
		// The driver's part.
		found, err := m.Drift([]options.Network{n})
		assert.NilError(t, err)
		if len(found) > 0 {
			assert.NilError(t, m.EnsureNetwork(t.Context(), n))
			assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
		}
		assert.Check(t, client.Call("192.0.2.1", 3*time.Second) != "", "bridge-nf-call-iptables %s", value)
		assert.Check(t, client.Call(ep.IPv4.Addr().String(), 300*time.Millisecond) == "", "bridge-nf-call-iptables %s", value)
		assert.Check(t, client.Call(ep.IPv6.Addr().String(), 300*time.Millisecond) == "", "bridge-nf-call-iptables %s", value)
	}
	assert.NilError(t, m.RemovePorts(t.Context(), n, ep))
	assert.Assert(t, port(t, ns, silent).Isolated)
	assert.Equal(t, client.Call("192.0.2.1", 300*time.Millisecond), "")
}

// A socket that sends to a published port goes on sending to the container that
// has it now.
func TestFlowsFollowThePort(t *testing.T) {
	ns := testkit.NewNetns(t)
	ns.Run("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
	m, n := mode(t, ns), modetest.Network(1)
	assert.NilError(t, m.EnsureNetwork(t.Context(), n))
	client := modetest.Endpoint(n, 3)
	assert.NilError(t, m.EnsureEndpoint(t.Context(), n, client))
	from := plug(t, ns, client)
	from.Run("ip", "route", "add", "default", "via", n.Subnets[0].Gateway.String())
	var c net.Conn
	from.Do(func() {
		var err error
		c, err = net.Dial("udp", "192.0.2.1:8053")
		assert.NilError(t, err)
	})
	defer c.Close()
	for i := range 2 {
		ep := published(modetest.Endpoint(n, 1+i), "0.0.0.0")
		assert.NilError(t, m.EnsureEndpoint(t.Context(), n, ep))
		at := plug(t, ns, ep)
		at.Run("ip", "route", "add", "default", "via", n.Subnets[0].Gateway.String())
		var server net.PacketConn
		at.Do(func() {
			var err error
			server, err = net.ListenPacket("udp4", ":53")
			assert.NilError(t, err)
		})
		assert.NilError(t, m.EnsurePorts(t.Context(), n, ep))
		// The first may fail, for what was sent to nobody.
		for range 2 {
			_, _ = c.Write([]byte("x"))
		}
		assert.NilError(t, server.SetReadDeadline(time.Now().Add(3*time.Second)))
		_, _, err := server.ReadFrom(make([]byte, 10))
		assert.NilError(t, err, "container %d", i)
		assert.NilError(t, server.Close())
		assert.NilError(t, m.RemovePorts(t.Context(), n, ep))
		if i == 0 {
			// Sent to nobody, which the kernel remembers as a flow to the host.
			_, _ = c.Write([]byte("x"))
		}
		assert.NilError(t, m.RemoveEndpoint(t.Context(), n, ep))
	}
}
