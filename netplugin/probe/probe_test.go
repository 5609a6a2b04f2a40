package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

var cmpAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// noMAC is the target of a probe.
var noMAC = net.HardwareAddr{0, 0, 0, 0, 0, 0}

func TestANeighbourHasIt(t *testing.T) {
	l := newLAN(t)
	here, there := l.host(), l.host("192.0.2.7/24", "2001:db8::7/64")
	here.wantUsed(macOf(2), "192.0.2.7", "2001:db8::7")
	here.wantClear("192.0.2.8", "2001:db8::8")
	// Its own addresses are not answered to a host, but are in use.
	there.wantClear("192.0.2.8")
	c := there.probe("192.0.2.7")
	assert.DeepEqual(t, *c, Conflict{Addr: netip.MustParseAddr("192.0.2.7"), MAC: macOf(2), Host: true}, cmpAddr)
	assert.Equal(t, c.String(), "192.0.2.7 is an address of this host")
	assert.Assert(t, there.probe("2001:db8::7").Host)
	assert.Equal(t, here.probe("192.0.2.7").String(), "192.0.2.7 is in use by 02:00:00:00:00:02")
	// Nobody's cache has changed.
	for _, x := range []*host{here, there} {
		neighbours := x.Run("ip", "neigh", "show")
		assert.Assert(t, !strings.Contains(neighbours, "192.0.2."), "%s", neighbours)
	}
}

// The parent has no IPv6, so that it is in none of the groups by itself.
func TestWithoutIPv6OnTheParent(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	l.host("2001:db8::7/64")
	here.Run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/eth1/disable_ipv6")
	here.wantUsed(macOf(2), "2001:db8::7")
	here.wantClear("2001:db8::8")
}

// Another engine's container, or one that somebody has made by hand.
func TestAMacvlanSiblingHasIt(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	sibling := net.HardwareAddr{2, 0, 0, 0, 1, 1}
	here.child("bridge", sibling, "192.0.2.7/24", "2001:db8::7/64")
	// The kernel does not show a sibling what the parent sends.
	here.wantClear("192.0.2.7", "2001:db8::7")

	here.Run("ip", "link", "add", "shim", "link", "eth1", "type", "macvlan", "mode", "bridge")
	here.Run("ip", "link", "set", "shim", "up")
	here.addr("shim", "192.0.2.9/32")
	l.host("192.0.2.3/24", "2001:db8::3/64")
	child := "shim"
	here.prober(Options{
		Child: func(parent string) string {
			assert.Equal(t, parent, "eth1")
			return child
		},
	})
	here.wantUsed(sibling, "192.0.2.7", "2001:db8::7")
	here.wantUsed(macOf(2), "192.0.2.3", "2001:db8::3")
	here.wantClear("192.0.2.8", "2001:db8::8")
	assert.Assert(t, here.probe("192.0.2.9").Host)

	// Without the child, the LAN is asked all the same.
	child = "gone"
	here.wantUsed(macOf(2), "192.0.2.3")
	child = "shim"
	here.Run("ip", "link", "set", "shim", "down")
	here.wantUsed(macOf(2), "192.0.2.3")
}

// A sibling that says something by itself is heard also without a child.
func TestAMacvlanSiblingTalks(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	sibling := net.HardwareAddr{2, 0, 0, 0, 1, 1}
	c := here.child("bridge", sibling, "192.0.2.7/24")
	var talk sync.WaitGroup
	talk.Go(func() {
		time.Sleep(50 * time.Millisecond)
		c.Do(func() {
			// Its kernel looks for the MAC of the destination.
			conn, err := net.Dial("udp4", "192.0.2.250:9")
			if assert.Check(t, err == nil); err == nil {
				_, _ = conn.Write([]byte{0})
				conn.Close()
			}
		})
	})
	here.wantUsed(sibling, "192.0.2.7")
	talk.Wait()
}

func TestOurOwnContainers(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	l.host("192.0.2.7/24", "2001:db8::7/64")
	l.host("192.0.2.8/24")
	here.prober(Options{
		Ours: func(parent string, mac net.HardwareAddr) bool {
			return parent == "eth1" && mac.String() == macOf(2).String()
		},
	})
	here.wantClear("192.0.2.7", "2001:db8::7")
	here.wantUsed(macOf(3), "192.0.2.8")
}

// Both notice when both listen before either asks. One that begins after the other
// has asked may not, since that one stops: then it alone takes the address.
func TestTwoAskAtTheSameTime(t *testing.T) {
	for _, prefix := range []string{"192.0.2.", "2001:db8::"} {
		t.Run(prefix, func(t *testing.T) {
			l := newLAN(t)
			hosts := []*host{l.host(), l.host()}
			both := 0
			for try := 1; both == 0 && try <= 20; try++ {
				addr := netip.MustParseAddr(prefix + strconv.Itoa(try))
				found := make([]*Conflict, len(hosts))
				var all sync.WaitGroup
				for i, x := range hosts {
					all.Go(func() {
						var err error
						found[i], err = x.p.Probe(t.Context(), "eth1", addr, Fast)
						assert.Check(t, err == nil)
					})
				}
				all.Wait()
				noticed := 0
				for i, c := range found {
					if c == nil {
						continue
					}
					noticed++
					assert.DeepEqual(t, *c, Conflict{Addr: addr, MAC: macOf(2 - i), Probing: true}, cmpAddr)
					assert.Equal(t, c.String(), fmt.Sprintf("%s is being taken by %s", addr, macOf(2-i)))
				}
				assert.Assert(t, noticed > 0, "both take %s", addr)
				if noticed == len(hosts) {
					both++
				}
			}
			assert.Equal(t, both, 1)
		})
	}
}

// A host whose kernel is looking for duplicates itself. Either hears the other first:
// it is never so that both have the address.
func TestAKernelTakesIt(t *testing.T) {
	l := newLAN(t)
	here, there := l.host(), l.host()
	there.Run("sh", "-ec", `cd /proc/sys/net/ipv6
		echo 0 > conf/eth1/router_solicitation_delay
		echo 9 > conf/eth1/dad_transmits
		echo 50 > neigh/eth1/retrans_time_ms`)
	there.Run("ip", "addr", "add", "2001:db8::7/64", "dev", "eth1")
	c := here.probe("2001:db8::7")
	if c == nil {
		assert.Assert(t, strings.Contains(there.Run("ip", "-6", "addr", "show", "dev", "eth1"), "dadfailed"))
		return
	}
	assert.Assert(t, c.Probing)
	assert.DeepEqual(t, c.MAC, macOf(2))
}

// A frame that the network sends back is not somebody else's.
func TestOwnFramesComeBack(t *testing.T) {
	l := newLAN(t)
	here, mirror := l.host(), l.host()
	respondRaw(t, mirror, func(b []byte) []byte { return b })
	here.wantClear("192.0.2.7", "2001:db8::7")
	// Also when the MAC was changed on the way.
	respondRaw(t, mirror, func(b []byte) []byte {
		if b[12] == 8 {
			return nil
		}
		copy(b[6:], macOf(9))
		return b
	})
	here.wantClear("2001:db8::8")
}

// respondRaw answers every probe of the first host with what fn makes of it.
func respondRaw(t *testing.T, x *host, fn func([]byte) []byte) {
	t.Helper()
	fd := frames(t, x.Netns, "eth1")
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() {
		buf := make([]byte, 2048)
		for ctx.Err() == nil {
			n, err := unix.Read(fd, buf)
			if err != nil {
				continue
			}
			if c, ok := parse(buf[:n]); !ok || !c.probing || c.mac != mac(macOf(1)) {
				continue
			}
			if answer := fn(buf[:n]); answer != nil {
				_, _ = unix.Write(fd, answer)
			}
		}
	})
	t.Cleanup(func() { cancel(); done.Wait() })
}

func TestASlowNeighbour(t *testing.T) {
	l := newLAN(t)
	here, slow := l.host(), l.host()
	respond(t, slow.Netns, "eth1", 150*time.Millisecond, func(c claim) []byte {
		if !c.probing || c.mac != mac(macOf(1)) {
			return nil
		}
		if c.addr.Is4() {
			return arp(arpReply, macOf(9), c.addr.String(), macOf(1), "0.0.0.0")
		}
		return advertisement(macOf(9), c.addr.String())
	})
	here.wantUsed(macOf(9), "192.0.2.7", "2001:db8::7")
}

func TestParents(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	l.host("192.0.2.7/24")
	addr := netip.MustParseAddr("192.0.2.7")
	want := func(parent, text string) {
		t.Helper()
		c, err := here.p.Probe(t.Context(), parent, addr, Fast)
		assert.Assert(t, c == nil)
		var not *NotProbedError
		assert.Assert(t, errors.As(err, &not), "%v", err)
		assert.Equal(t, not.Parent, parent)
		assert.Assert(t, errdefs.IsUnavailable(err))
		assert.Error(t, err, fmt.Sprintf("nobody can be asked on link %q: %s", parent, text))
	}
	want("eth9", "it does not exist")
	want("lo", "it has no MAC address")
	here.Run("ip", "link", "set", "eth1", "down")
	want("eth1", "it is down")
	here.Run("ip", "link", "set", "eth1", "up")
	l.sw.Run("ip", "link", "set", "p1", "down")
	want("eth1", "it has no carrier")
	l.sw.Run("ip", "link", "set", "p1", "up")
	l.forwards("p1")
	here.wantUsed(macOf(2), addr.String())

	// One that goes away while it waits for answers.
	for _, down := range [][]string{{"ip", "link", "set", "eth1", "down"}, {"ip", "link", "del", "eth1"}} {
		err := here.whileProbing("192.0.2.8", func() { here.Run(down...) })
		var not *NotProbedError
		assert.Assert(t, errors.As(err, &not), "%v", err)
		_, _ = here.Try("ip", "link", "set", "eth1", "up") // the second one is gone
	}

	// It comes back as another link, while the socket is open on the old one.
	l.n = 0
	l.sw.Run("ip", "link", "add", "p9", "type", "veth", "peer", "name", "eth1")
	l.sw.Run("ip", "link", "set", "eth1", "netns", here.Path())
	l.sw.Run("ip", "link", "set", "p9", "master", "br0", "up")
	here.Run("ip", "link", "set", "eth1", "up")
	l.forwards("p9")
	here.wantUsed(macOf(2), addr.String())
}

func TestOffAsksNobody(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	c, err := here.p.Probe(t.Context(), "missing", netip.MustParseAddr("192.0.2.7"), Off)
	assert.NilError(t, err)
	assert.Assert(t, c == nil)
}

func TestEnds(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	addr := netip.MustParseAddr("192.0.2.7")
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(30*time.Millisecond, cancel)
	begin := time.Now()
	_, err := here.p.Probe(ctx, "eth1", addr, Full)
	assert.ErrorIs(t, err, context.Canceled)
	assert.Assert(t, time.Since(begin) < time.Second)

	err = here.whileProbing("192.0.2.7", func() { _ = here.p.Close() })
	assert.ErrorContains(t, err, "its socket was closed")
	_, err = here.p.Probe(t.Context(), "eth1", addr, Fast)
	assert.ErrorContains(t, err, "shutting down")
	_, err = here.p.Watch("eth1", nil, nil)
	assert.ErrorContains(t, err, "shutting down")
}

// Exactly the frames that are promised leave the host, at the promised times.
func TestWhatIsSent(t *testing.T) {
	assert.DeepEqual(t, Fast.waits(), []time.Duration{0, 100 * time.Millisecond, 100 * time.Millisecond})
	for _, addr := range []string{"192.0.2.7", "2001:db8::7"} {
		t.Run(addr, func(t *testing.T) {
			l := newLAN(t)
			here, there := l.host(), l.host()
			here.Run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/eth1/disable_ipv6")
			stop := sniff(t, there.Netns, "eth1")
			begin := time.Now()
			here.wantClear(addr)
			took := time.Since(begin)
			var sent []frame
			for _, f := range stop() {
				if mac(f.data[6:]) == mac(macOf(1)) {
					sent = append(sent, f)
				}
			}
			assert.Equal(t, len(sent), fastProbes)
			// A busy machine is late, with one frame more than with the other, but never
			// before the plan.
			second := sent[1].at.Sub(begin)
			assert.Assert(t, second >= fastGap, "%v", second)
			assert.Assert(t, took >= fastProbes*fastGap, "%v", took)
			for _, f := range sent {
				c, ok := parse(f.data)
				assert.Assert(t, ok && c.probing && c.addr == netip.MustParseAddr(addr))
				if c.addr.Is4() {
					assert.DeepEqual(t, f.data, arp(arpRequest, macOf(1), "0.0.0.0", noMAC, addr))
				} else {
					assert.Equal(t, mac(f.data), groupMAC(solicitedNode(c.addr)))
					assert.Assert(t, c.nonce != nonce{})
				}
			}
		})
	}
}

func TestFullModeHasTheNumbersOfTheRFC(t *testing.T) {
	for range 1000 {
		waits := Full.waits()
		assert.Equal(t, len(waits), fullProbes+1)
		assert.Assert(t, waits[0] >= 0 && waits[0] < time.Second)
		for _, w := range waits[1:fullProbes] {
			assert.Assert(t, w >= time.Second && w <= 2*time.Second)
		}
		assert.Equal(t, waits[fullProbes], 2*time.Second)
	}
	l := newLAN(t)
	here := l.host()
	l.host("192.0.2.7/24")
	begin := time.Now()
	c, err := here.p.Probe(t.Context(), "eth1", netip.MustParseAddr("192.0.2.7"), Full)
	assert.NilError(t, err)
	assert.DeepEqual(t, c.MAC, macOf(2))
	assert.Assert(t, time.Since(begin) < 3*time.Second)
	found, err := here.p.ProbeAll(t.Context(), "eth1", []netip.Addr{netip.MustParseAddr("192.0.2.8"), netip.MustParseAddr("2001:db8::8")}, Full)
	assert.NilError(t, err)
	assert.Equal(t, len(found), 0)
	assert.Assert(t, time.Since(begin) < 9*time.Second)
}

// 64 containers start at once on a busy LAN, some of their addresses are taken.
func TestManyAtOnceInAFlood(t *testing.T) {
	l := newLAN(t)
	here, there, noisy := l.host(), l.host(), l.host()
	for i := range 64 {
		if i%4 == 0 {
			there.addr("eth1", fmt.Sprintf("192.0.2.%d/24", 100+i))
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var flood sync.WaitGroup
	fd := frames(t, noisy.Netns, "eth1")
	sent := 0
	flood.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			for _, b := range [][]byte{
				arp(arpRequest, macOf(3), fmt.Sprintf("198.51.100.%d", i%256), noMAC, "198.51.100.1"),
				arp(arpReply, macOf(3), "198.51.100.9", macOf(1), fmt.Sprintf("192.0.2.%d", i%256)), // names it as the target only
				advertisement(macOf(3), "2001:db8::99"),
				arp(arpRequest, macOf(3), "198.51.100.9", noMAC, "192.0.2.101")[:30],
			} {
				_, _ = unix.Write(fd, b)
				sent++
			}
			time.Sleep(time.Millisecond)
		}
	})
	defer func() { cancel(); flood.Wait(); t.Logf("%d frames of noise", sent) }()
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			c, err := here.p.Probe(t.Context(), "eth1", netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", 100+i)), Fast)
			if assert.Check(t, err == nil, "%v", err); i%4 == 0 {
				assert.Check(t, c != nil && mac(c.MAC) == mac(macOf(2)), "%d: %v", i, c)
			} else {
				assert.Check(t, c == nil, "%d: %v", i, c)
			}
		})
	}
	all.Wait()
	here.p.mu.Lock()
	defer here.p.mu.Unlock()
	assert.Equal(t, len(here.p.segments), 1)
	assert.Equal(t, len(here.p.segments["eth1"].queries), 0)
	assert.Equal(t, here.p.segments["eth1"].users, 0)
}

// Frames of a VLAN on the parent speak of another network.
func TestVLANsAreOtherNetworks(t *testing.T) {
	l := newLAN(t)
	here, there := l.host(), l.host()
	tagged := func(id uint16) []byte {
		b := arp(arpReply, macOf(9), "192.0.2.7", macOf(1), "0.0.0.0")
		return append(append(append([]byte(nil), b[:12]...), 0x81, 0, byte(id>>8), byte(id)), b[12:]...)
	}
	id := uint16(50)
	respondRaw(t, there, func([]byte) []byte { return tagged(id) })
	here.wantClear("192.0.2.7")
}

// A priority tag makes no network.
func TestPriorityTags(t *testing.T) {
	l := newLAN(t)
	here, there := l.host(), l.host()
	respondRaw(t, there, func([]byte) []byte {
		b := arp(arpReply, macOf(9), "192.0.2.7", macOf(1), "0.0.0.0")
		return append(append(append([]byte(nil), b[:12]...), 0x81, 0, 0xa0, 0), b[12:]...)
	})
	here.wantUsed(macOf(9), "192.0.2.7")
}

func TestIdleSocketsAreClosed(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	here.p.mu.Lock()
	here.p.idle = 20 * time.Millisecond
	here.p.mu.Unlock()
	here.wantClear("192.0.2.7")
	deadline := time.Now().Add(5 * time.Second)
	for {
		here.p.mu.Lock()
		n := len(here.p.segments)
		here.p.mu.Unlock()
		if n == 0 {
			break
		}
		assert.Assert(t, time.Now().Before(deadline))
		time.Sleep(time.Millisecond)
	}
	here.p.readers.Wait()
	here.wantClear("192.0.2.7")
}
