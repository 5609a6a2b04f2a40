package dhcp

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

func TestAcquire(t *testing.T) {
	w := newWorld(t)
	s := w.dnsmasq(w.leaseFile(), usualRange, "--dhcp-option=option:router,10.9.0.254", "--dhcp-option=option:dns-server,10.9.0.53",
		"--dhcp-option=option:mtu,1400", "--domain=lan.test")
	id := slot(1)
	id.Hostname = "my_web.1"
	before := time.Now()
	l := w.acquire(request(id))
	assert.Assert(t, subnet().Contains(l.Addr))
	assert.Equal(t, l.Prefix, netip.PrefixFrom(l.Addr, 24))
	assert.Equal(t, l.Router, addr("10.9.0.254"))
	assert.Equal(t, l.Server, addr("10.9.0.1"))
	assert.Equal(t, l.DNS[0], addr("10.9.0.53"))
	assert.Equal(t, l.MTU, 1400)
	assert.Equal(t, l.Domain, "lan.test")
	assert.Equal(t, l.Parent, parent)
	assert.DeepEqual(t, l.Identity, id)
	assert.Assert(t, strings.Contains(w.lan.Run("ip", "link", "show", "srv"), l.ServerMAC.String()))
	assert.Assert(t, l.Expires.Sub(before) >= 2*time.Minute-time.Second && l.Expires.Sub(before) < 130*time.Second)
	assert.Assert(t, l.T1.Before(l.T2) && l.T2.Before(l.Expires) && l.T1.After(before))
	assert.Assert(t, strings.Contains(s.String(), "my-web-1"), s.String())
	c := w.m.Counts()
	assert.Equal(t, c.Offers, uint64(1))
	assert.Equal(t, c.Acks, uint64(1))
}

func TestTwentyAtOnce(t *testing.T) {
	w := newWorld(t)
	w.dnsmasq(w.leaseFile(), usualRange)
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
	)
	got := map[netip.Addr]bool{}
	for n := range 20 {
		wg.Go(func() {
			l, err := w.m.Acquire(t.Context(), request(slot(n+1)))
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
			got[l.Addr] = true
		})
	}
	wg.Wait()
	assert.NilError(t, errors.Join(errs...))
	assert.Equal(t, len(got), 20)
}

func TestTheSameIdentityGetsTheSameAddress(t *testing.T) {
	w := newWorld(t)
	file := w.leaseFile()
	s := w.dnsmasq(file, usualRange)
	first, second := w.acquire(request(slot(1))), w.acquire(request(slot(2)))
	assert.Assert(t, first.Addr != second.Addr)
	// After a crash of Berth the lease is confirmed.
	again := request(slot(1))
	again.Previous, again.Resume = first.Addr, true
	offers := w.m.Counts().Offers
	assert.Equal(t, w.acquire(again).Addr, first.Addr)
	assert.Equal(t, w.m.Counts().Offers, offers)
	// After a release the server has the address back.
	assert.NilError(t, w.m.Release(t.Context(), first))
	s.waitFor("DHCPRELEASE(srv) " + first.Addr.String())
	again.Resume = false
	assert.Equal(t, w.acquire(again).Addr, first.Addr)
	// After a restart of the server with its file.
	s.stop()
	w.dnsmasq(file, usualRange)
	again.Resume = true
	assert.Equal(t, w.acquire(again).Addr, first.Addr)
	assert.Equal(t, w.acquire(request(slot(2))).Addr, second.Addr)
}

func TestASilentServerFailsInTimeAndWords(t *testing.T) {
	w := newWorld(t)
	w.impatient()
	start := time.Now()
	_, err := w.m.Acquire(t.Context(), request(slot(1)))
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, `no address by DHCP: no server has offered one on link "eth1" in 600ms: there is none`)
	took := time.Since(start)
	assert.Assert(t, took >= 600*time.Millisecond && took < 2*time.Second, "%s", took)
	assert.Assert(t, DefaultTimeout < 20*time.Second)
	// The same when the server was there before.
	r := request(slot(1))
	r.Previous, r.Resume = addr("10.9.0.100"), true
	assert.Assert(t, strings.Contains(w.fails(r), "no server has offered one"))
}

func TestAServerThatRefusesOrHasNoneLeft(t *testing.T) {
	w := newWorld(t)
	w.impatient()
	s := w.dnsmasq(w.leaseFile(), "--dhcp-range=10.9.0.100,10.9.0.101,255.255.255.0,2m", "--dhcp-host="+slot(9).MAC.String()+",ignore")
	assert.Assert(t, strings.Contains(w.fails(request(slot(9))), "it does not serve this client, or it has no address left"))
	assert.Assert(t, s.count("DHCPOFFER") == 0)
	first := w.acquire(request(slot(1)))
	w.acquire(request(slot(2)))
	assert.Assert(t, strings.Contains(w.fails(request(slot(3))), "it has no address left"))
	assert.NilError(t, w.m.Release(t.Context(), first))
	assert.Equal(t, w.acquire(request(slot(3))).Addr, first.Addr)
}

func TestExplicitAddress(t *testing.T) {
	w := newWorld(t)
	w.dnsmasq(w.leaseFile(), usualRange)
	r := request(slot(1))
	r.Want = addr("10.9.0.123")
	assert.Equal(t, w.acquire(r).Addr, r.Want)
	// Taken by another client.
	r.Identity = slot(2)
	_, err := w.m.Acquire(t.Context(), r)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, `no address by DHCP: DHCP server 10.9.0.1 on link "eth1" offers 10.9.0.`)
	assert.ErrorContains(t, err, ": not 10.9.0.123, which is wanted and may be in use or reserved")
	// Not one of the server's.
	r.Want = addr("10.9.0.20")
	assert.Assert(t, strings.Contains(w.fails(r), "not 10.9.0.20, which is wanted"))
	for _, bad := range []string{"10.8.0.1", "10.9.0.0", "10.9.0.255"} {
		r.Want = addr(bad)
		_, err := w.m.Acquire(t.Context(), r)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
}

func TestOffersThatAreNotTaken(t *testing.T) {
	w := newWorld(t)
	w.dnsmasq(w.leaseFile(), usualRange)
	r := request(slot(1))
	r.Subnet = netip.MustParsePrefix("10.77.0.0/16")
	got := w.fails(r)
	assert.Assert(t, strings.HasPrefix(got, `no address by DHCP: DHCP server 10.9.0.1 on link "eth1" offers 10.9.0.1`), got)
	assert.Assert(t, strings.HasSuffix(got, ": not in subnet 10.77.0.0/16 of the pool"), got)
	r = request(slot(1))
	r.Accept = func(a netip.Addr) error { return fmt.Errorf("held by a static address") }
	assert.Assert(t, strings.HasSuffix(w.fails(r), ": held by a static address"))
	assert.Equal(t, w.m.Counts().Acks, uint64(0))
}

// A second server on the LAN offers what is of no use; the first acceptable offer is
// taken, whichever comes first.
func TestOfTwoServersTheOneThatFitsIsTaken(t *testing.T) {
	w := newWorld(t)
	w.lan.Run("ip", "link", "add", "name", "br0", "type", "bridge")
	w.lan.Run("ip", "link", "set", "br0", "up")
	w.lan.Run("ip", "addr", "flush", "dev", "srv")
	w.lan.Run("ip", "link", "set", "srv", "name", "up0", "master", "br0")
	w.lan.Run("ip", "link", "set", "up0", "up")
	w.lan.Run("ip", "link", "add", "srv", "type", "veth", "peer", "name", "p1")
	w.lan.Run("ip", "link", "add", "srv2", "type", "veth", "peer", "name", "p2")
	for _, l := range []string{"p1", "p2"} {
		w.lan.Run("ip", "link", "set", l, "master", "br0", "up")
	}
	w.lan.Run("ip", "link", "set", "srv", "up")
	w.lan.Run("ip", "addr", "add", "10.9.0.1/24", "dev", "srv")
	w.lan.Run("ip", "link", "set", "srv2", "up")
	w.lan.Run("ip", "addr", "add", "10.66.0.1/24", "dev", "srv2")
	w.dnsmasq(w.leaseFile(), usualRange)
	w.dnsmasq(w.leaseFile(), "--interface=srv2", "--except-interface=srv", "--dhcp-range=10.66.0.100,10.66.0.150,255.255.255.0,2m")
	for n := range 5 {
		l := w.acquire(request(slot(n + 1)))
		assert.Equal(t, l.Server, addr("10.9.0.1"))
		r := request(slot(n + 1))
		r.Subnet = netip.MustParsePrefix("10.66.0.0/24")
		l = w.acquire(r)
		assert.Equal(t, l.Server, addr("10.66.0.1"))
	}
}

func TestDeclinedAddressIsNotGivenAgain(t *testing.T) {
	w := newWorld(t)
	s := w.dnsmasq(w.leaseFile(), usualRange)
	l := w.acquire(request(slot(1)))
	assert.NilError(t, w.m.Decline(t.Context(), l))
	s.waitFor("DHCPDECLINE")
	assert.Assert(t, w.acquire(request(slot(1))).Addr != l.Addr)
}

func TestTheLinkIsDownGoneAndBack(t *testing.T) {
	w := newWorld(t)
	s := w.dnsmasq(w.leaseFile(), usualRange)
	w.impatient()
	r := request(slot(1))
	r.Parent = "eth7"
	assert.Assert(t, strings.Contains(w.fails(r), `link "eth7" does not exist`))
	r.Parent = "a-name-that-no-link-can-have"
	assert.Assert(t, strings.Contains(w.fails(r), `does not exist`))
	w.acquire(request(slot(1)))
	w.host.Run("ip", "link", "set", parent, "down")
	assert.Assert(t, strings.Contains(w.fails(request(slot(2))), `link "eth1" is down`))
	// It comes back while a container waits for it.
	w.opts.Timeout = 8 * time.Second
	w.restart()
	done := make(chan error)
	go func() {
		_, err := w.m.Acquire(t.Context(), request(slot(2)))
		done <- err
	}()
	w.host.Run("ip", "link", "set", parent, "up")
	assert.NilError(t, <-done)
	// Another link with the same name.
	s.stop()
	w.host.Run("ip", "link", "del", parent)
	w.host.Run("ip", "link", "add", parent, "type", "veth", "peer", "name", "srv", "netns", w.lan.Path())
	w.host.Run("ip", "link", "set", parent, "up")
	w.lan.Run("ip", "link", "set", "srv", "up")
	w.lan.Run("ip", "addr", "add", "10.9.0.1/24", "dev", "srv")
	w.dnsmasq(w.leaseFile(), usualRange)
	w.acquire(request(slot(3)))
}

func TestCloseEndsWhatIsUnderWay(t *testing.T) {
	w := newWorld(t)
	done := make(chan error)
	go func() {
		_, err := w.m.Acquire(t.Context(), request(slot(1)))
		done <- err
	}()
	for w.open() == 0 {
		time.Sleep(time.Millisecond)
	}
	w.m.Close()
	assert.ErrorContains(t, <-done, "shutting down")
	assert.Equal(t, w.open(), 0)
	_, err := w.m.Acquire(t.Context(), request(slot(1)))
	assert.ErrorContains(t, err, "shutting down")
}

// The socket goes when nothing is under way.
func TestTheSocketIsClosedWhenIdle(t *testing.T) {
	w := newWorld(t)
	w.dnsmasq(w.leaseFile(), usualRange)
	w.acquire(request(slot(1)))
	assert.Equal(t, w.open(), 1)
	w.m.mu.Lock()
	p := w.m.ports[parent]
	w.m.mu.Unlock()
	p.mu.Lock()
	p.idle.Reset(0)
	p.mu.Unlock()
	for w.open() != 0 {
		time.Sleep(time.Millisecond)
	}
	w.acquire(request(slot(2)))
	assert.Equal(t, w.open(), 1)
}

// open counts the packet sockets of the host.
func (w *world) open() int {
	return strings.Count(w.host.Run("cat", "/proc/net/packet"), "\n")
}
