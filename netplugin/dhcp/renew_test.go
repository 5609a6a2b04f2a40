package dhcp

import (
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/shared/testkit"
)

// The whole life of a lease whose server wants to hear of it often, by the true clock:
// the container's own kernel answers the server's ARP requests.
func TestRenewalByTheTrueClock(t *testing.T) {
	w := newWorld(t)
	// T1 after a second, T2 after three, the end after two minutes.
	s := w.dnsmasq(w.leaseFile(), usualRange, "--dhcp-option-force=58,1", "--dhcp-option-force=59,3")
	l := w.acquire(request(slot(1)))
	c := w.container(l)
	w.ping(c, "10.9.0.1")
	w.m.Track(l)
	last := l
	for range 3 {
		start := time.Now()
		e := w.event()
		assert.Equal(t, e.Kind, EventRenewed)
		assert.Equal(t, e.Lease.Addr, l.Addr)
		assert.Assert(t, e.Lease.Expires.After(last.Expires))
		assert.Assert(t, time.Since(start) > 300*time.Millisecond, "renewed after %s", time.Since(start))
		last = e.Lease
	}
	assert.Equal(t, w.m.Counts().Silences, uint64(0))
	assert.Equal(t, state(w.m, l.Addr), "bound ")
	assert.NilError(t, w.m.Release(t.Context(), last))
	s.waitFor("DHCPRELEASE(srv) " + l.Addr.String())
	assert.Equal(t, len(w.m.Status()), 0)
}

// By Berth's clock, put forward: nothing happens before T1.
func TestRenewal(t *testing.T) {
	w := newWorld(t)
	s := w.dnsmasq(w.leaseFile(), usualRange)
	l := w.acquire(request(slot(1)))
	c := w.container(l)
	w.m.Track(l)
	assert.Equal(t, state(w.m, l.Addr), "bound ")
	w.jump(50 * time.Second)
	asked := s.count("DHCPREQUEST")
	w.jump(11 * time.Second)
	e := w.event()
	assert.Equal(t, e.Kind, EventRenewed)
	assert.Assert(t, e.Lease.Expires.After(l.Expires))
	assert.Equal(t, s.count("DHCPREQUEST"), asked+1)
	assert.Equal(t, w.m.Counts().Silences, uint64(0))
	w.ping(c, "10.9.0.1")
}

// What a server answers that sends to a client's address and asks for its MAC address
// first: nothing to a container that is not up, unless by broadcast.
func TestWhichRequestsAreAnswered(t *testing.T) {
	w := newWorld(t)
	w.opts.Retry = 60 * time.Millisecond
	w.restart()
	w.dnsmasq(w.leaseFile(), usualRange)
	l := w.acquire(request(slot(1)))
	ask := func(s State, boot bool) bool {
		tr := &tracked{lease: l, state: s, ctx: t.Context()}
		to := toServer
		if s == Rebinding {
			to = everyServer
		}
		return w.m.renew(tr, boot, to).ok
	}
	assert.Assert(t, ask(Rebinding, true), "INIT-REBOOT without a container")
	assert.Assert(t, !ask(Renewing, false), "unicast without a container")
	assert.Assert(t, !ask(Rebinding, false), "broadcast without a container")
	c := w.container(l)
	w.ping(c, "10.9.0.1")
	assert.Assert(t, ask(Renewing, false), "unicast")
	assert.Assert(t, ask(Rebinding, false), "broadcast")
	assert.Assert(t, ask(Rebinding, true), "INIT-REBOOT")
}

// The server dies, and comes back before the lease is over.
func TestRebinding(t *testing.T) {
	w := newWorld(t)
	w.opts.Retry = 50 * time.Millisecond
	w.restart()
	file := w.leaseFile()
	s := w.dnsmasq(file, usualRange)
	l := w.acquire(request(slot(1)))
	w.container(l)
	w.m.Track(l)
	s.stop()
	w.jump(62 * time.Second)
	w.waitState(l, "renewing DHCP server 10.9.0.1 does not answer on link \"eth1\"")
	next := w.m.Status()[0].Next
	assert.Assert(t, next.After(w.now()) && next.Before(l.T2))
	w.jump(l.T2.Sub(w.now()) + time.Second)
	w.waitState(l, "rebinding DHCP server 10.9.0.1 does not answer on link \"eth1\"")
	w.dnsmasq(file, usualRange)
	w.jump(4 * time.Second)
	assert.Equal(t, w.event().Kind, EventRenewed)
	assert.Equal(t, state(w.m, l.Addr), "bound ")
}

// No server until the end, and after it.
func TestLostAndRegained(t *testing.T) {
	w := newWorld(t)
	w.impatient()
	file := w.leaseFile()
	s := w.dnsmasq(file, usualRange)
	l := w.acquire(request(slot(1)))
	w.m.Track(l)
	s.stop()
	w.jump(3 * time.Minute)
	e := w.event()
	assert.Equal(t, e.Kind, EventLost)
	assert.Equal(t, e.Lease.Addr, l.Addr)
	assert.Assert(t, strings.Contains(e.Reason, "it has ended at "+l.Expires.Format(time.RFC3339)+"; no address by DHCP: no server has offered one"), e.Reason)
	assert.Equal(t, w.m.Counts().Lost, uint64(1))
	assert.Assert(t, strings.HasPrefix(state(w.m, l.Addr), "lost it has ended at "))
	// In vain once more, and then the server is back.
	w.jump(20 * time.Second)
	w.waitState(l, "lost no address by DHCP: no server")
	w.dnsmasq(file, usualRange)
	w.jump(time.Minute)
	e = w.event()
	assert.Equal(t, e.Kind, EventRegained)
	assert.Equal(t, e.Lease.Addr, l.Addr)
	assert.Equal(t, state(w.m, l.Addr), "bound ")
}

// The server is set up for other addresses and refuses to renew the old one.
func TestNakOnRenewal(t *testing.T) {
	for name, jump := range map[string]time.Duration{"renewing": 62 * time.Second, "rebinding": 107 * time.Second} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.impatient()
			file := w.leaseFile()
			s := w.dnsmasq(file, usualRange)
			l := w.acquire(request(slot(1)))
			w.container(l)
			w.m.Track(l)
			s.stop()
			w.dnsmasq(file, "--dhcp-range=10.9.0.200,10.9.0.210,255.255.255.0,2m")
			w.jump(jump)
			e := w.event()
			assert.Equal(t, e.Kind, EventLost)
			assert.Assert(t, strings.HasPrefix(e.Reason, "DHCP server 10.9.0.1 refuses "+l.Addr.String()+": "), e.Reason)
			assert.Assert(t, strings.Contains(e.Reason, ": not "+l.Addr.String()+", which is wanted"), e.Reason)
			assert.Equal(t, w.m.Counts().Naks, uint64(1))
		})
	}
}

// A server that has forgotten the lease but gives it again is no loss.
func TestNakOfAServerThatGivesTheAddressAgain(t *testing.T) {
	w := newWorld(t)
	w.impatient()
	r := request(slot(1))
	r.Want = addr("10.9.0.123")
	s := w.dnsmasq(w.leaseFile(), usualRange)
	l := w.acquire(r)
	w.container(l)
	w.m.Track(l)
	s.stop()
	s = w.dnsmasq(w.leaseFile(), usualRange) // another file: it knows nobody
	w.jump(62 * time.Second)
	assert.Equal(t, w.event().Kind, EventRenewed)
	t.Log(s.String())
}

func TestRestore(t *testing.T) {
	w := newWorld(t)
	w.impatient()
	file := w.leaseFile()
	s := w.dnsmasq(file, usualRange)
	first, second, third := w.acquire(request(slot(1))), w.acquire(request(slot(2))), w.acquire(request(slot(3)))
	// Valid ones wait for their time, renewals that are due are made up for.
	w.restart()
	w.m.Restore([]Lease{first, second})
	assert.Equal(t, state(w.m, first.Addr), "bound ")
	assert.Equal(t, w.m.Counts().Acks, uint64(0))
	// The second has no container that would answer the server's ARP requests: it waits for
	// T2, when the answers are broadcast.
	c := w.container(first)
	w.ping(c, "10.9.0.1")
	w.jump(80 * time.Second)
	e := w.event()
	assert.Equal(t, e.Kind, EventRenewed)
	assert.Equal(t, e.Lease.Addr, first.Addr)
	w.waitState(second, "renewing DHCP server 10.9.0.1 does not answer")
	w.m.Untrack(parent, first.Addr)
	w.jump(second.T2.Sub(w.now()) + time.Second)
	e = w.event()
	assert.Equal(t, e.Kind, EventRenewed)
	assert.Equal(t, e.Lease.Addr, second.Addr)
	w.m.Untrack(parent, second.Addr)

	// Over while berthd was away, and the server gives it again.
	w.restart()
	w.jump(time.Hour)
	w.m.Restore([]Lease{third})
	e = w.event()
	assert.Equal(t, e.Kind, EventRenewed)
	assert.Equal(t, e.Lease.Addr, third.Addr)
	assert.Assert(t, e.Lease.Expires.After(w.now()))

	// Another has it by now.
	assert.NilError(t, w.m.Release(t.Context(), e.Lease))
	s.waitFor("DHCPRELEASE(srv) " + third.Addr.String())
	r := request(slot(4))
	r.Want = third.Addr
	w.acquire(r)
	w.restart()
	w.m.Restore([]Lease{third})
	e = w.event()
	assert.Equal(t, e.Kind, EventLost)
	assert.Assert(t, strings.Contains(e.Reason, "which is wanted and may be in use"), e.Reason)
	// A container that is removed ends it; nothing is sent for a lease that is over.
	assert.NilError(t, w.m.Release(t.Context(), third))
	assert.Equal(t, w.m.Counts().Released, uint64(0))
	assert.Equal(t, len(w.m.Status()), 0)
}

// The parent is a port of a bridge, and the container is on that.
func TestRenewalBehindABridge(t *testing.T) {
	w := newWorld(t)
	w.host.Run("ip", "link", "add", "name", "br0", "type", "bridge")
	w.host.Run("ip", "link", "set", parent, "master", "br0")
	w.host.Run("ip", "link", "set", "br0", "up")
	w.dnsmasq(w.leaseFile(), usualRange)
	l := w.acquire(request(slot(1)))
	c := testkit.NewNetns(t)
	w.host.Run("ip", "link", "add", "ve", "type", "veth", "peer", "name", "eth0", "netns", c.Path())
	w.host.Run("ip", "link", "set", "ve", "master", "br0", "up")
	c.Run("ip", "link", "set", "eth0", "address", l.Identity.MAC.String())
	c.Run("ip", "addr", "add", l.Prefix.String(), "dev", "eth0")
	c.Run("ip", "link", "set", "eth0", "up")
	w.ping(c, "10.9.0.1")
	w.m.Track(l)
	w.jump(62 * time.Second)
	assert.Equal(t, w.event().Kind, EventRenewed)
	assert.Equal(t, w.m.Counts().Silences, uint64(0))
	w.ping(c, "10.9.0.1")
}

func TestALeaseWithoutEndIsNotRenewed(t *testing.T) {
	w := newWorld(t)
	w.dnsmasq(w.leaseFile(), "--dhcp-range=10.9.0.100,10.9.0.150,255.255.255.0,infinite")
	l := w.acquire(request(slot(1)))
	assert.Assert(t, l.Expires.IsZero() && l.T1.IsZero() && !l.Expired(w.now().Add(1e6*time.Hour)))
	w.m.Track(l)
	w.jump(1e5 * time.Hour)
	assert.Equal(t, state(w.m, l.Addr), "bound ")
	assert.Assert(t, w.m.Status()[0].Next.IsZero())
	assert.NilError(t, w.m.Release(t.Context(), l))
}

// waitState waits for the state and the beginning of the reason.
func (w *world) waitState(l Lease, want string) {
	w.t.Helper()
	poll.WaitOn(w.t, func(poll.LogT) poll.Result {
		if got := state(w.m, l.Addr); !strings.HasPrefix(got, want) {
			return poll.Continue("%s", got)
		}
		return poll.Success()
	}, poll.WithDelay(5*time.Millisecond), poll.WithTimeout(10*time.Second))
}
