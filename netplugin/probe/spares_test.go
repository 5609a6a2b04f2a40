package probe

import (
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// An allocator hands out the addresses of a list in turn.
type allocator struct {
	mu    sync.Mutex
	free  []netip.Addr
	found []Conflict
	peeks int
}

func newAllocator(list ...string) *allocator {
	a := &allocator{}
	for _, s := range list {
		a.free = append(a.free, addr(s))
	}
	return a
}

func (a *allocator) peek(n int) []netip.Addr {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.peeks++
	return slices.Clone(a.free[:min(n, len(a.free))])
}

func (a *allocator) conflict(c Conflict) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.found = append(a.found, c)
	a.free = slices.DeleteFunc(a.free, func(x netip.Addr) bool { return x == c.Addr })
}

func (a *allocator) take() netip.Addr {
	a.mu.Lock()
	defer a.mu.Unlock()
	first := a.free[0]
	a.free = a.free[1:]
	return first
}

func (a *allocator) conflicts() []Conflict {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.found)
}

func (a *allocator) pool(bound bool) Pool {
	return Pool{Parent: "eth1", Peek: a.peek, Conflict: a.conflict, Bound: bound}
}

// ready waits until the pool has as many clear spares.
func ready(t *testing.T, s *Spares, id string, want int) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		s.mu.Lock()
		n := 0
		for _, x := range s.pools[id].spares {
			if x.clear {
				n++
			}
		}
		s.mu.Unlock()
		if n == want {
			return
		}
		assert.Assert(t, time.Now().Before(deadline), "%d spares instead of %d", n, want)
	}
}

func startSpares(t *testing.T, s *Spares) {
	t.Helper()
	s.start()
	t.Cleanup(func() { assert.NilError(t, s.Close()) })
}

func TestSpares(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	l.host("192.0.2.2/24")
	a := newAllocator("192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5", "192.0.2.6")
	s := newSpares(here.p)
	s.look = 20 * time.Millisecond
	startSpares(t, s)
	s.Set("pool", a.pool(true))
	ready(t, s, "pool", spareCount) // 2 is found out to be in use, and 4 comes for it
	assert.DeepEqual(t, a.conflicts(), []Conflict{{Addr: addr("192.0.2.2"), MAC: macOf(2)}}, cmpAddr)
	assert.Assert(t, !s.Clear("pool", addr("192.0.2.2")))
	assert.Assert(t, !s.Clear("other", addr("192.0.2.1")))
	for range 2 {
		begin := time.Now()
		first := a.take()
		assert.Assert(t, s.Clear("pool", first))
		assert.Assert(t, !s.Clear("pool", first)) // used up
		assert.Assert(t, time.Since(begin) < 150*time.Millisecond)
	}
	ready(t, s, "pool", spareCount)
	s.Drop("pool")
	assert.Assert(t, !s.Clear("pool", addr("192.0.2.4")))
}

func TestASpareIsTakenByAStranger(t *testing.T) {
	l := newLAN(t)
	here, there := l.host(), l.host()
	a := newAllocator("192.0.2.1", "192.0.2.2", "2001:db8::3")
	s := newSpares(here.p)
	startSpares(t, s)
	s.Set("pool", a.pool(true))
	ready(t, s, "pool", 3)
	send(t, there.Netns, "eth1", arp(arpRequest, macOf(2), "192.0.2.1", noMAC, "192.0.2.1"), advertisement(macOf(2), "2001:db8::3"))
	ready(t, s, "pool", 1)
	assert.Assert(t, !s.Clear("pool", addr("192.0.2.1")))
	assert.Assert(t, s.Clear("pool", addr("192.0.2.2")))
	assert.DeepEqual(t, a.conflicts(), []Conflict{{Addr: addr("192.0.2.1"), MAC: macOf(2)}, {Addr: addr("2001:db8::3"), MAC: macOf(2)}}, cmpAddr)
}

func TestSparesGrowOld(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	s := newSpares(here.p)
	startSpares(t, s)
	s.Set("pool", newAllocator("192.0.2.1", "192.0.2.2").pool(true))
	ready(t, s, "pool", 2)
	s.mu.Lock()
	s.pools["pool"].spares[addr("192.0.2.1")] = spare{at: time.Now().Add(-clearFor), clear: true}
	s.pools["pool"].spares[addr("192.0.2.2")] = spare{at: time.Now().Add(10*time.Second - clearFor), clear: true}
	s.mu.Unlock()
	assert.Assert(t, !s.Clear("pool", addr("192.0.2.1")))
	assert.Assert(t, s.Clear("pool", addr("192.0.2.2")))
}

// What leaves the host is what the comment at the constants says: two frames for
// each spare in each period, and nothing for a pool that nobody uses.
func TestWhatSparesSend(t *testing.T) {
	l := newLAN(t)
	here, there := l.host(), l.host()
	here.Run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/eth1/disable_ipv6")
	s := newSpares(here.p)
	s.refresh, s.look, s.used = 600*time.Millisecond, 20*time.Millisecond, 400*time.Millisecond
	startSpares(t, s)
	count := func(d time.Duration, begin func()) int {
		stop := sniff(t, there.Netns, "eth1")
		begin()
		time.Sleep(d)
		n := 0
		for _, f := range stop() {
			if mac(f.data[6:]) == mac(macOf(1)) {
				n++
			}
		}
		return n
	}
	a := newAllocator("192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4")
	assert.Equal(t, count(150*time.Millisecond, func() { s.Set("pool", a.pool(false)) }), 0)
	// Begun at 0, 0.6 and 1.2 s.
	assert.Equal(t, count(1550*time.Millisecond, func() { s.Set("pool", a.pool(true)) }), 3*fastProbes*spareCount)
	// No longer bound.
	assert.Equal(t, count(800*time.Millisecond, func() { s.Set("pool", a.pool(false)) }), 0)
	// Asked for, so that it is in use for 0.4 s.
	assert.Equal(t, count(1500*time.Millisecond, func() { assert.Assert(t, !s.Clear("pool", a.take())) }), fastProbes*spareCount)
	s.mu.Lock()
	defer s.mu.Unlock()
	assert.Equal(t, len(s.listen), 0)
}

// One that is handed out, or heard of, while it is asked for is not clear afterwards.
func TestSparesWhileAsking(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	s := newSpares(here.p)
	startSpares(t, s)
	s.Set("pool", newAllocator("192.0.2.1", "192.0.2.2", "192.0.2.3").pool(true))
	asking := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.pools["pool"].spares) == 3
	}
	for !asking() {
		time.Sleep(time.Millisecond)
	}
	s.heard("eth1", claim{addr: addr("192.0.2.1"), mac: mac(macOf(9))})
	s.heard("eth2", claim{addr: addr("192.0.2.2"), mac: mac(macOf(9))})
	ready(t, s, "pool", 2)
	assert.Assert(t, !s.Clear("pool", addr("192.0.2.1")))
}

func TestSparesOfAParentThatIsDown(t *testing.T) {
	l := newLAN(t)
	here := l.host()
	here.Run("ip", "link", "set", "eth1", "down")
	a := newAllocator("192.0.2.1")
	s := newSpares(here.p)
	s.look = 10 * time.Millisecond
	startSpares(t, s)
	s.Set("pool", a.pool(true))
	time.Sleep(50 * time.Millisecond)
	assert.Assert(t, !s.Clear("pool", addr("192.0.2.1")))
	here.Run("ip", "link", "set", "eth1", "up")
	ready(t, s, "pool", 1)
	assert.Assert(t, s.Clear("pool", addr("192.0.2.1")))
}

// Many that are handed out have as many come after them, for a moment.
func TestSparesForMany(t *testing.T) {
	now := time.Now()
	p := &pool{}
	assert.Equal(t, p.want(now), spareCount)
	for range 10 {
		p.handOut(now)
	}
	assert.Equal(t, p.want(now), 10)
	p.handOut(now.Add(momentAgo))
	assert.Equal(t, p.want(now.Add(momentAgo)), 10)
	p.handOut(now.Add(2 * momentAgo))
	assert.Equal(t, p.want(now.Add(2*momentAgo)), spareCount)
	for range 10 * mostSpares {
		p.handOut(now.Add(2 * momentAgo))
	}
	assert.Equal(t, p.want(now.Add(2*momentAgo)), mostSpares)
	assert.Equal(t, p.want(now.Add(4*momentAgo)), spareCount)
	p.handOut(now.Add(10 * momentAgo))
	assert.Equal(t, p.want(now.Add(10*momentAgo)), spareCount)
}
