package netplugin

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/bridge"
	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/hostport"
	"github.com/berth-plugin/berth/netplugin/lan"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

// kernelEnv is a daemon with the real bridge mode in a namespace of its own. Each
// container gets a namespace, which dockerd would make.
func kernelEnv(t *testing.T) (*testEnv, *testkit.Netns, map[string]*testkit.Netns) {
	t.Helper()
	ns := testkit.NewNetns(t)
	links, err := link.Open(link.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(links.Close)
	rules, err := firewall.New(firewall.Options{Links: links})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, rules.Close()) })
	ports, err := hostport.New(hostport.Options{NetNS: ns.File()})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, ports.Close()) })
	e := newEnvOn(t, bridge.New(links, rules, ports), func() Mode { return lan.New(links) }, links)
	sandboxes := make(map[string]*testkit.Netns)
	e.move = func(c *container, src string) error {
		sandbox := testkit.NewNetns(t)
		sandboxes[c.endpoint] = sandbox
		gateway := netip.MustParsePrefix(c.net.gateway).Addr().String()
		ns.Run("ip", "link", "set", src, "netns", sandbox.Path())
		sandbox.Run("ip", "link", "set", src, "name", "eth0")
		sandbox.Run("ip", "link", "set", "eth0", "address", c.mac, "up")
		sandbox.Run("ip", "addr", "add", c.addr, "dev", "eth0")
		sandbox.Run("ip", "route", "add", "default", "via", gateway)
		return nil
	}
	return e, ns, sandboxes
}

func TestContainersTalkOverARealBridge(t *testing.T) {
	e, ns, sandboxes := kernelEnv(t)
	n := mustNetwork(t, e, "net", "")
	a, b := mustRun(t, e, n, "a", ""), mustRun(t, e, n, "b", "")
	addr := func(c *container) string { return netip.MustParsePrefix(c.addr).Addr().String() }
	ping := func(from *container, to string) {
		t.Helper()
		sandboxes[from.endpoint].Run("busybox", "ping", "-c", "1", "-W", "5", to)
	}
	ping(a, addr(b))
	ping(a, netip.MustParsePrefix(n.gateway).Addr().String())

	// The daemon restarts; the containers do not notice.
	e.restart()
	e.t0 = e.t0.Add(24 * time.Hour)
	e.d.tick(t.Context())
	ping(b, addr(a))
	_, err := e.run(n, "c", addr(a))
	assert.ErrorContains(t, err, "is already in use by endpoint "+a.endpoint[:12])

	assert.NilError(t, e.stop(a))
	assert.NilError(t, e.stop(b))
	assert.NilError(t, e.removeNetwork(n))
	assert.Assert(t, !strings.Contains(ns.Run("ip", "-o", "link"), "bth"), ns.Run("ip", "-o", "link"))
	assert.Equal(t, ns.Run("nft", "list", "ruleset"), "")
}

func TestARealBridgeRemovedByHandComesBack(t *testing.T) {
	e, ns, sandboxes := kernelEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	a, b := mustRun(t, e, n, "a", ""), mustRun(t, e, n, "b", "")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.d.Run(ctx)
	}()
	defer func() { cancel(); <-done }()
	time.Sleep(200 * time.Millisecond) // the watch begins
	ns.Run("ip", "link", "del", "bth"+n.id[:12])
	target := netip.MustParsePrefix(b.addr).Addr().String()
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		if _, err = sandboxes[a.endpoint].Try("busybox", "ping", "-c", "1", "-W", "1", target); err == nil {
			break
		}
	}
	assert.NilError(t, err)
}

func TestAfterARealRebootTheContainerStartsAgain(t *testing.T) {
	e, ns, sandboxes := kernelEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	c := mustRun(t, e, n, "c", "10.1.0.7")
	// All links and rules are gone, and what was in flight too.
	ns.Run("ip", "link", "del", "bth"+n.id[:12])
	ns.Run("ip", "link", "del", "bv"+c.endpoint[:12])
	ns.Run("nft", "flush", "ruleset")
	e.restart()
	assert.NilError(t, e.stop(c))
	again := mustRun(t, e, n, "c2", "10.1.0.7")
	assert.Equal(t, again.mac, c.mac)
	sandboxes[again.endpoint].Run("busybox", "ping", "-c", "1", "-W", "5", "10.1.0.1")

	// A link that a daemon left behind when it died.
	ns.Run("ip", "link", "add", "bvlost", "group", "23784", "type", "veth", "peer", "name", "bclost")
	ns.Run("ip", "link", "set", "bvlost", "alias", "berth endpoint lost")
	e.restart()
	assert.Assert(t, !strings.Contains(ns.Run("ip", "-o", "link"), "lost"))
	sandboxes[again.endpoint].Run("busybox", "ping", "-c", "1", "-W", "5", "10.1.0.1")
}

func TestABridgeOfSomebodyElseIsUsedAndStays(t *testing.T) {
	e, ns, sandboxes := kernelEnv(t)
	ns.Run("ip", "link", "add", "br-lan", "type", "bridge")
	ns.Run("ip", "addr", "add", "198.51.100.1/24", "dev", "br-lan")
	n, err := e.createNetwork("net", "10.1.0.0/24", map[string]any{"bridge": "br-lan"})
	assert.NilError(t, err)
	assert.NilError(t, e.net.CreateNetwork(t.Context(), n.request(map[string]any{"bridge": "br-lan"})), "repeated")
	c := mustRun(t, e, n, "c", "")
	sandboxes[c.endpoint].Run("busybox", "ping", "-c", "1", "-W", "5", "10.1.0.1")
	assert.NilError(t, e.stop(c))
	assert.NilError(t, e.removeNetwork(n))
	addrs := ns.Run("ip", "-o", "addr", "show", "dev", "br-lan")
	assert.Assert(t, strings.Contains(addrs, "198.51.100.1/24") && !strings.Contains(addrs, "10.1.0.1"), addrs)
	assert.Equal(t, ns.Run("nft", "list", "ruleset"), "")

	ns.Run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire2")
	_, err = e.createNetwork("net", "10.1.0.0/24", map[string]any{"bridge": "wire"})
	assert.ErrorContains(t, err, "not a bridge")
	assert.Equal(t, len(e.d.store.networks), 0)
}

func TestABridgeTakenDownOrStrippedComesBack(t *testing.T) {
	for _, harm := range [][]string{
		{"ip", "link", "set", "BRIDGE", "down"},
		{"ip", "addr", "flush", "dev", "BRIDGE"},
	} {
		t.Run(strings.Join(harm, " "), func(t *testing.T) {
			e, ns, sandboxes := kernelEnv(t)
			n := mustNetwork(t, e, "net", "10.1.0.0/24")
			c := mustRun(t, e, n, "c", "")
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				e.d.Run(ctx)
			}()
			defer func() { cancel(); <-done }()
			time.Sleep(200 * time.Millisecond) // the watch begins
			args := slices.Clone(harm)
			args[slices.Index(args, "BRIDGE")] = "bth" + n.id[:12]
			ns.Run(args...)
			var err error
			for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
				if _, err = sandboxes[c.endpoint].Try("busybox", "ping", "-c", "1", "-W", "1", "10.1.0.1"); err == nil {
					break
				}
			}
			assert.NilError(t, err)
		})
	}
}

// The way of a published port through the real rules, sockets and links, each of
// which has tests of its own.
func TestAPublishedPortLeadsToTheContainer(t *testing.T) {
	e, ns, sandboxes := kernelEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	c := mustRun(t, e, n, "c", "")
	assert.NilError(t, e.program(c, port{18080, 80}))
	var server net.Listener
	sandboxes[c.endpoint].Do(func() {
		var err error
		server, err = net.Listen("tcp", ":80")
		assert.NilError(t, err)
	})
	defer server.Close()
	go func() {
		for {
			conn, err := server.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("from the container")) // a client that is gone misses it
			_ = conn.Close()
		}
	}()
	for range 2 {
		out := ns.Run("timeout", "5", "busybox", "nc", "127.0.0.1", "18080")
		assert.Equal(t, strings.TrimSpace(out), "from the container")
		_, err := ns.Try("timeout", "1", "busybox", "nc", "-l", "-p", "18080")
		assert.ErrorContains(t, err, "in use")
		e.restart()
	}
	assert.NilError(t, e.stop(c))
	assert.NilError(t, e.removeNetwork(n))
	assert.Equal(t, ns.Run("nft", "list", "ruleset"), "")
}
