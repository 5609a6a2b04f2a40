package link_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

// plugged makes an endpoint in a container of its own: 10.1.0.2, the host is
// 10.1.0.1.
func plugged(t testing.TB, v link.Veth) (h *link.Handle, ns, container *testkit.Netns) {
	t.Helper()
	ns, container = testkit.NewNetns(t), testkit.NewNetns(t)
	h = open(t, ns)
	b := bridge()
	b.MTU = v.MTU
	_, err := h.EnsureBridge(b)
	assert.NilError(t, err)
	_, err = h.EnsureVeth(v)
	assert.NilError(t, err)
	ns.Run("ip", "addr", "add", "10.1.0.1/24", "dev", "bth1")
	move(ns, container, "10.1.0.2/24")
	return h, ns, container
}

// move does dockerd's part.
func move(ns, container *testkit.Netns, addr string) {
	ns.Run("ip", "link", "set", "bc1", "netns", container.Path(), "name", "eth0")
	container.Run("ip", "addr", "add", addr, "dev", "eth0")
	container.Run("ip", "link", "set", "eth0", "up")
}

// throughput measures what a server in one namespace gets from a client in the
// other, in bits of payload per second, once the flow has settled.
func throughput(t testing.TB, client, server *testkit.Netns, addr string, settle, d time.Duration) float64 {
	t.Helper()
	var l net.Listener
	server.Do(func() {
		var err error
		l, err = net.Listen("tcp", net.JoinHostPort(addr, "5001"))
		assert.NilError(t, err)
	})
	sent := make(chan error, 1)
	go func() {
		var c net.Conn
		client.Do(func() {
			var err error
			c, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
			assert.Check(t, err)
		})
		if c == nil {
			_ = l.Close() // Nobody will come.
			sent <- fmt.Errorf("no connection to %s", addr)
			return
		}
		defer c.Close()
		buf := make([]byte, 64<<10)
		for {
			if _, err := c.Write(buf); err != nil {
				sent <- nil // The server has seen enough.
				return
			}
		}
	}()
	c, err := l.Accept()
	assert.NilError(t, err)
	buf, total, start := make([]byte, 256<<10), 0, time.Now()
	for end := start.Add(settle + d); time.Now().Before(end); {
		assert.NilError(t, c.SetReadDeadline(end))
		n, err := c.Read(buf)
		if settle > 0 && time.Since(start) > settle {
			total, settle, start = 0, 0, time.Now()
			continue
		}
		total += n
		if errors.Is(err, io.EOF) {
			t.Fatal("the client has ended")
		}
	}
	took := time.Since(start)
	assert.NilError(t, c.Close())
	assert.NilError(t, l.Close())
	assert.NilError(t, <-sent)
	return float64(total) * 8 / took.Seconds()
}

func TestRatesAreKept(t *testing.T) {
	const mbit = 1_000_000
	for _, rate := range []int64{10 * mbit, 100 * mbit} {
		v := veth()
		v.MTU, v.RateIn, v.RateOut = 1500, rate, rate/2
		_, ns, container := plugged(t, v)
		// A busy machine is slower for a while than the limit; a limit that is wrong is
		// so every time.
		kept := func(client, server *testkit.Netns, addr string, want int64) bool {
			for range 10 {
				got := throughput(t, client, server, addr, 300*time.Millisecond, time.Second)
				t.Logf("limit %.1f Mbit/s: %.2f Mbit/s of payload to %s", float64(want)/mbit, got/mbit, addr)
				if got > 0.9*float64(want) && got < 1.1*float64(want) {
					return true
				}
			}
			return false
		}
		assert.Check(t, kept(ns, container, "10.1.0.2", rate))
		assert.Check(t, kept(container, ns, "10.1.0.1", rate/2))
	}
}

func TestLimitsAreRepairedAndGoWithTheEndpoint(t *testing.T) {
	v := veth()
	v.RateIn, v.RateOut = 1_000_000, 2_000_000
	h, ns, _ := plugged(t, v)
	state := func() string {
		return ns.Run("tc", "qdisc", "show", "dev", "bv1") + "\n" + ns.Run("tc", "filter", "show", "dev", "bv1", "ingress") + "\n" +
			ns.Run("tc", "qdisc", "show", "dev", "bi1") + "\n" + ns.Run("ip", "-d", "-br", "link", "show", "bi1")
	}
	// Handles of qdiscs differ from one to the next, so do indices of actions.
	has := func() {
		t.Helper()
		have := state()
		for _, want := range []string{"rate 1Mbit", "rate 2Mbit", "ingress ffff:", "match 00000000/00000000 at 0", "Egress Redirect to device bi1", "UP"} {
			assert.Assert(t, strings.Contains(have, want), "no %q in %s", want, have)
		}
		assert.Equal(t, strings.Count(have, "mirred"), 1, have)
	}
	has()
	assert.Equal(t, ns.Run("ip", "-6", "addr", "show", "dev", "bi1"), "")
	for _, damage := range [][]string{
		{"true"},
		{"tc", "qdisc", "del", "dev", "bv1", "root"},
		{"tc", "qdisc", "replace", "dev", "bv1", "root", "handle", "1:", "pfifo"},
		{"tc", "qdisc", "del", "dev", "bv1", "ingress"},
		{"tc", "filter", "del", "dev", "bv1", "ingress"},
		{"tc", "filter", "add", "dev", "bv1", "ingress", "u32", "match", "u32", "1", "1", "action", "mirred", "egress", "mirror", "dev", "bth1"},
		{"tc", "qdisc", "change", "dev", "bi1", "root", "tbf", "rate", "9mbit", "burst", "20kb", "limit", "20kb"},
		{"ip", "link", "del", "bi1"},
		{"ip", "link", "set", "bi1", "down"},
	} {
		ns.Run(damage...)
		assert.Assert(t, !ensureVeth(t, h, v))
		has()
	}
	owned, err := h.Owned()
	assert.NilError(t, err)
	assert.Equal(t, len(owned), 2, "%v", owned)

	// The container has died: the limiter is left, and found.
	ns.Run("ip", "link", "del", "bv1")
	owned, err = h.Owned()
	assert.NilError(t, err)
	assert.Equal(t, len(owned), 2, "%v", owned)
	assert.Equal(t, owned[1].Name, "bi1")
	assert.Equal(t, owned[1].Owner, link.OfEndpoint(endpointID))
	assert.Assert(t, owned[1].Peer != 0)
	assert.NilError(t, h.Delete("bi1", owned[1].Owner))
	gone(t, h, "bi1")

	for _, remove := range []func() error{
		func() error { return h.Delete("bv1", link.OfEndpoint(endpointID)) },
		func() error { return h.DeleteBridge("bth1", networkID) },
		func() error {
			ns.Run("ip", "link", "del", "bv1")
			return h.Delete("bv1", link.OfEndpoint(endpointID))
		},
	} {
		ensureBridge(t, h, bridge())
		assert.Assert(t, ensureVeth(t, h, v))
		assert.NilError(t, remove())
		gone(t, h, "bi1")
		gone(t, h, "bv1")
	}
	// Limits that are not wanted any more.
	ensureBridge(t, h, bridge())
	assert.Assert(t, ensureVeth(t, h, v))
	v.RateOut = 0
	assert.Assert(t, !ensureVeth(t, h, v))
	gone(t, h, "bi1")
}

func TestHalfMadeLimiterIsReplaced(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ensureBridge(t, h, bridge())
	ns.Run("ip", "link", "add", "bi1", "group", "23784", "type", "ifb")
	v := veth()
	v.RateOut = 1_000_000
	assert.Assert(t, ensureVeth(t, h, v))
	assert.Equal(t, get(t, h, "bi1").Owner, link.OfEndpoint(endpointID))
	assert.NilError(t, h.Delete("bv1", link.OfEndpoint(endpointID)))
	// And removed, whatever else is there of its endpoint.
	ns.Run("ip", "link", "add", "bi1", "group", "23784", "type", "ifb")
	owned, err := h.Owned()
	assert.NilError(t, err)
	assert.Equal(t, len(owned), 2)
	assert.NilError(t, h.Delete("bv1", link.OfEndpoint(endpointID)))
	gone(t, h, "bi1")
}

func TestForeignLinkWithTheNameOfALimiter(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ensureBridge(t, h, bridge())
	ns.Run("ip", "link", "add", "bi1", "type", "ifb")
	v := veth()
	v.RateOut = 1_000_000
	_, err := h.EnsureVeth(v)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, `"bi1"`)
	assert.NilError(t, h.Delete("bv1", link.OfEndpoint(endpointID)))
	gone(t, h, "bv1")
	get(t, h, "bi1")
}

func TestBridgeThatIsFull(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ensureBridge(t, h, bridge())
	// Half of the links, as each has two ends.
	ns.Run("sh", "-c", `i=0; while [ $i -lt 512 ]; do i=$((i+1)); m="master bth1"; [ $i -eq 512 ] && m=; `+
		`echo "link add a$i master bth1 type veth peer name b$i"; [ -z "$m" ] || echo "link set b$i $m"; done | ip -batch -`)
	ports, err := h.Ports(get(t, h, "bth1"))
	assert.NilError(t, err)
	assert.Equal(t, len(ports), 1023)
	_, err = h.EnsureVeth(veth())
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
	assert.ErrorContains(t, err, "make another network")
	gone(t, h, "bv1")
	gone(t, h, "bc1")
	ns.Run("ip", "link", "del", "a1")
	assert.Assert(t, ensureVeth(t, h, veth()))
	ns.Run("ip", "link", "set", "bv1", "nomaster")
	ns.Run("ip", "link", "set", "b512", "master", "bth1")
	ns.Run("ip", "link", "add", "last", "master", "bth1", "type", "veth", "peer", "name", "last0")
	_, err = h.EnsureVeth(veth())
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
}

func TestPortFlags(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	ensureBridge(t, h, bridge())
	v := veth()
	for _, want := range []link.Port{{Isolated: true}, {Hairpin: true, Isolated: true}, {Hairpin: true}, {}} {
		for range 2 {
			v.Port = want
			ensureVeth(t, h, v)
			assert.Equal(t, get(t, h, "bv1").Port, want)
			// Somebody else changes them, or unplugs the link.
			ns.Run("ip", "link", "set", "bv1", "type", "bridge_slave", "hairpin", "on", "isolated", "off")
			ensureVeth(t, h, v)
			assert.Equal(t, get(t, h, "bv1").Port, want)
			ns.Run("ip", "link", "set", "bv1", "nomaster")
			ensureVeth(t, h, v)
			assert.Equal(t, get(t, h, "bv1").Port, want)
			assert.NilError(t, h.Delete("bv1", link.OfEndpoint(endpointID)))
		}
	}
	ensureVeth(t, h, v)
	for _, want := range []link.Port{{Hairpin: true}, {Hairpin: true}, {Isolated: true}, {}} {
		assert.NilError(t, h.SetPort("bv1", link.OfEndpoint(endpointID), want))
		assert.Equal(t, get(t, h, "bv1").Port, want)
	}
	assert.NilError(t, h.SetPort("nothing", link.OfEndpoint(endpointID), link.Port{Hairpin: true}))
}

func TestTheKernelLacksSomething(t *testing.T) {
	assert.ErrorContains(t, link.LimitError("rate.in", "sch_tbf", unix.ENOENT), "option rate.in: the kernel has no sch_tbf")
	assert.ErrorContains(t, link.LimitError("rate.out", "ifb", unix.EOPNOTSUPP), "ifb")
	assert.Error(t, link.LimitError("rate.out", "ifb", unix.EPERM), "option rate.out: operation not permitted")
	assert.NilError(t, link.LimitError("rate.out", "ifb", nil))
}
