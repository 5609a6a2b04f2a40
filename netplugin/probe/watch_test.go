package probe

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// next waits for a conflict.
func next(t *testing.T, heard <-chan Conflict) Conflict {
	t.Helper()
	select {
	case c := <-heard:
		return c
	case <-time.After(5 * time.Second):
		t.Fatal("nothing is heard")
		return Conflict{}
	}
}

func quiet(t *testing.T, heard <-chan Conflict) {
	t.Helper()
	select {
	case c := <-heard:
		t.Fatalf("heard %s", c)
	case <-time.After(100 * time.Millisecond):
	}
}

func TestWatch(t *testing.T) {
	l := newLAN(t)
	here, there := l.host(), l.host()
	here.prober(Options{Ours: func(_ string, m net.HardwareAddr) bool { return mac(m) == mac(macOf(5)) }})
	heard := make(chan Conflict, 100)
	held := map[netip.Addr]bool{addr("192.0.2.7"): true, addr("192.0.2.8"): true, addr("2001:db8::7"): true}
	stop, err := here.p.Watch("eth1", func(a netip.Addr) bool { return held[a] }, func(c Conflict) { heard <- c })
	assert.NilError(t, err)
	fd := frames(t, there.Netns, "eth1")
	say := func(list ...[]byte) {
		t.Helper()
		for _, b := range list {
			_, err := unix.Write(fd, b)
			assert.NilError(t, err)
		}
	}
	say(
		arp(arpReply, macOf(5), "192.0.2.7", macOf(1), "192.0.2.1"), // ours
		arp(arpRequest, macOf(2), "0.0.0.0", noMAC, "192.0.2.7"),    // only asks
		arp(arpRequest, macOf(2), "192.0.2.9", noMAC, "192.0.2.7"),  // looks for it
		arp(arpReply, macOf(2), "192.0.2.9", macOf(5), "192.0.2.7"), // speaks with it
		solicitation(mac(macOf(2)), addr("2001:db8::7"), nonce{}),
	)
	quiet(t, heard)
	say(arp(arpRequest, macOf(2), "192.0.2.7", noMAC, "192.0.2.7"), arp(arpReply, macOf(3), "192.0.2.7", macOf(1), "192.0.2.1"))
	assert.DeepEqual(t, next(t, heard), Conflict{Addr: addr("192.0.2.7"), MAC: macOf(2)}, cmpAddr)
	quiet(t, heard) // not twice in a minute
	say(advertisement(macOf(2), "2001:db8::7"))
	assert.DeepEqual(t, next(t, heard), Conflict{Addr: addr("2001:db8::7"), MAC: macOf(2)}, cmpAddr)
	stop()
	stop()
	say(arp(arpRequest, macOf(2), "192.0.2.8", noMAC, "192.0.2.8"))
	quiet(t, heard)
}

func TestWatchReportsOnceAMinute(t *testing.T) {
	w := &watch{last: map[netip.Addr]time.Time{}, every: reportEvery}
	begin := time.Now()
	for i, want := range []bool{true, false, false, true} {
		assert.Equal(t, w.due(addr("192.0.2.7"), begin.Add(time.Duration(i)*25*time.Second)), want, "%d", i)
	}
	assert.Assert(t, w.due(addr("192.0.2.8"), begin.Add(3*time.Minute)))
	assert.Equal(t, len(w.last), 1)
}

// A parent that is not there yet is waited for, and one that comes back is heard.
func TestWatchFollowsTheParent(t *testing.T) {
	l := newLAN(t)
	here, there := l.host(), l.host()
	here.p.mu.Lock()
	here.p.retry = 5 * time.Millisecond
	here.p.mu.Unlock()
	heard := make(chan Conflict, 100)
	// The rate is not what this is about.
	w := &watch{held: func(netip.Addr) bool { return true }, report: func(c Conflict) { heard <- c }, last: map[netip.Addr]time.Time{}}
	stop, err := here.p.listen("eth2", w.heard)
	assert.NilError(t, err)
	defer stop()
	until := func() {
		t.Helper()
		for deadline := time.Now().Add(5 * time.Second); ; {
			send(t, there.Netns, "eth1", arp(arpRequest, macOf(2), "192.0.2.7", noMAC, "192.0.2.7"))
			select {
			case <-heard:
				return
			case <-time.After(20 * time.Millisecond):
				assert.Assert(t, time.Now().Before(deadline), "nothing is heard")
			}
		}
	}
	for range 2 {
		l.sw.Run("ip", "link", "add", "p9", "type", "veth", "peer", "name", "eth2")
		l.sw.Run("ip", "link", "set", "p9", "master", "br0", "up")
		l.sw.Run("ip", "link", "set", "eth2", "netns", here.Path())
		here.Run("ip", "link", "set", "eth2", "up")
		until()
		here.Run("ip", "link", "set", "eth2", "down")
		here.Run("ip", "link", "set", "eth2", "up")
		until()
		here.Run("ip", "link", "del", "eth2")
	}
}
