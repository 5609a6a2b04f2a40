package netplugin

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/ipam"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	allocator "github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/shared/control"
)

func TestContainersWithLeasesOfADHCPServer(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	n := e.mustCreate()
	a, b := mustRun(t, e.testEnv, n, "a", ""), mustRun(t, e.testEnv, n, "b", "")
	for _, c := range []*container{a, b} {
		// dockerd gives the container the MAC address that the server knows.
		assert.Assert(t, strings.Contains(e.leased(c.ip().String()), " "+c.mac+" "), "%s: %s", c.mac, e.leased(c.ip().String()))
		e.ping(c)
		l := e.shown(n, c.ip())
		assert.Equal(t, l.State, control.LeaseActive)
		assert.Equal(t, l.MAC, c.mac)
		assert.Assert(t, !l.Pinned)
		assert.Equal(t, l.DHCP.State, control.DHCPBound)
		assert.Equal(t, l.DHCP.Server, netip.MustParseAddr("10.9.0.1"))
		assert.Equal(t, l.DHCP.ClientID, "01"+strings.ReplaceAll(c.mac, ":", ""))
		assert.Assert(t, time.Until(l.DHCP.Renews) > 50*time.Second && time.Until(l.DHCP.Expires) < 2*time.Minute+time.Second)
		assert.Equal(t, l.Until, l.DHCP.Expires)
	}
	assert.Assert(t, a.addr != b.addr)

	// What has ended is given back, a moment later.
	begin := time.Now()
	assert.NilError(t, e.stop(a))
	assert.Assert(t, e.shown(n, a.ip()).DHCP == nil)
	e.hears("DHCPRELEASE(eth0) " + a.ip().String() + " " + a.mac)
	assert.Assert(t, time.Since(begin) > partingTime/2)
	assert.Equal(t, len(e.manager.Status()), 1)

	// With the network at once, before the link to the server may go.
	assert.NilError(t, e.stop(b))
	assert.NilError(t, e.removeNetwork(n))
	e.hears("DHCPRELEASE(eth0) " + b.ip().String() + " " + b.mac)
	assert.Equal(t, len(e.manager.Status()), 0)
}

func TestLeasesOutliveTheDaemon(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange, "--dhcp-option-force=58,1", "--dhcp-option-force=59,3")
	n := e.mustCreate()
	c := mustRun(t, e.testEnv, n, "a", "")
	e.ping(c)
	last := e.shown(n, c.ip()).DHCP.Expires
	for range 3 {
		poll.WaitOn(t, func(poll.LogT) poll.Result {
			if got := e.shown(n, c.ip()).DHCP.Expires; got.After(last) {
				last = got
				return poll.Success()
			}
			return poll.Continue("not renewed: %s", e.said.String())
		}, poll.WithDelay(20*time.Millisecond), poll.WithTimeout(10*time.Second))
		stored, ok := e.d.store.leases.leaseOf(n.id, c.ip())
		assert.Assert(t, ok)
		e.restart()
		again, ok := e.d.store.leases.leaseOf(n.id, c.ip())
		assert.Assert(t, ok)
		assert.Assert(t, !again.DHCP.Expires.Before(stored.DHCP.Expires))
		assert.Equal(t, len(e.manager.Status()), 1)
	}
	assert.NilError(t, e.stop(c))
	// The daemon ends before it has told the server, and does it now.
	e.restart()
	e.hears("DHCPRELEASE(eth0) " + c.ip().String())
}

// A container that is started again while the server is silent goes on with its
// lease; one that is new fails in time.
func TestSilentServer(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	n := e.mustCreate()
	a, b := mustRun(t, e.testEnv, n, "a", ""), mustRun(t, e.testEnv, n, "b", "")
	e.die()
	for _, old := range []*container{a, b} {
		assert.NilError(t, e.stop(old))
		again := mustRun(t, e.testEnv, n, "again", "")
		assert.Equal(t, again.addr, old.addr)
		assert.Equal(t, again.mac, old.mac)
		e.ping(again)
		// Nothing is sent later on.
		e.part()
		assert.Equal(t, e.shown(n, old.ip()).DHCP.State, control.DHCPBound)
		e.sandboxes[again.endpoint].Run("ip", "link", "set", "eth0", "name", "old")
		assert.NilError(t, e.stop(again))
		back := mustRun(t, e.testEnv, n, old.endpoint[:8], "")
		assert.Equal(t, back.addr, old.addr)
	}
	begin := time.Now()
	_, err := e.run(n, "c", "")
	assert.ErrorContains(t, err, `no address by DHCP: no server has offered one on link "eth1" in 3`)
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.Assert(t, time.Since(begin) < 5*time.Second)
	assert.Equal(t, len(e.d.requesting), 0)
	assert.Equal(t, len(e.manager.Status()), 2)

	// It comes back, and knows whose its addresses are.
	e.serve(usualRange)
	c := mustRun(t, e.testEnv, n, "c", "")
	assert.Assert(t, c.addr != a.addr && c.addr != b.addr)
	assert.Assert(t, !strings.Contains(e.said.String(), "DHCPRELEASE"), e.said.String())
}

// With the lease, a server that has forgotten it is asked first.
func TestServerRefusesARestart(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	n := e.mustCreate()
	a := mustRun(t, e.testEnv, n, "a", "")
	e.die()
	e.serve("10.9.0.200,10.9.0.210,255.255.255.0,2m")
	assert.NilError(t, e.stop(a))
	again := mustRun(t, e.testEnv, n, "again", "")
	assert.Assert(t, again.ip().Compare(netip.MustParseAddr("10.9.0.200")) >= 0, again.addr)
	assert.Equal(t, again.mac, a.mac)
	e.hears("DHCPNAK(eth0) " + a.ip().String())
	e.ping(again)
}

func TestManyContainersAskADHCPServerAtOnce(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	n := e.mustCreate()
	const many = 20
	var got [many]netip.Addr
	var errs [many]error
	var wg sync.WaitGroup
	for i := range many {
		wg.Go(func() { got[i], errs[i] = e.request(n, nil) })
	}
	wg.Wait()
	seen := make(map[netip.Addr]bool)
	for i, addr := range got {
		assert.NilError(t, errs[i])
		assert.Assert(t, !seen[addr], "%s is given twice", addr)
		seen[addr] = true
	}
	// dockerd was killed and has forgotten them all.
	e.d.tick(t.Context())
	assert.Equal(t, len(e.manager.Status()), many)
	c, err := e.attach(n, "kept", got[0])
	assert.NilError(t, err)
	e.t0 = e.t0.Add(allocator.ForgetAfter + time.Second)
	e.d.tick(t.Context())
	assert.Equal(t, len(e.manager.Status()), 1)
	e.hears("DHCPRELEASE(eth0) " + got[many-1].String())
	assert.Assert(t, e.leased(got[0].String()) != "")
	e.detach(c)
}

func TestAddressesByNameFromADHCPServer(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	n := e.mustCreate()
	c := mustRun(t, e.testEnv, n, "c", "10.9.0.123")
	assert.Equal(t, c.addr, "10.9.0.123/24")
	assert.Assert(t, strings.Contains(e.leased("10.9.0.123"), c.mac))
	assert.Assert(t, e.shown(n, c.ip()).Pinned)
	e.ping(c)

	// Nobody need be asked for what is in use here.
	asked := strings.Count(e.said.String(), "DHCPDISCOVER")
	_, err := e.run(n, "d", "10.9.0.123")
	assert.ErrorContains(t, err, "address 10.9.0.123 of subnet 10.9.0.0/24 is already in use by endpoint "+c.endpoint[:12])
	_, err = e.run(n, "d", "10.9.0.1")
	assert.ErrorContains(t, err, "address 10.9.0.1 of subnet 10.9.0.0/24 is already in use as the gateway")
	_, err = e.run(n, "d", "10.8.0.1")
	assert.ErrorContains(t, err, "address 10.8.0.1: want one of subnet 10.9.0.0/24")
	assert.Equal(t, strings.Count(e.said.String(), "DHCPDISCOVER"), asked)

	// The server has it not.
	_, err = e.run(n, "d", "10.9.0.7")
	assert.ErrorContains(t, err, `no address by DHCP: DHCP server 10.9.0.1 on link "eth1" offers 10.9.0.1`)
	assert.ErrorContains(t, err, "not 10.9.0.7, which is wanted and may be in use or reserved")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)

	// The same client has the same address again, also long after.
	assert.NilError(t, e.stop(c))
	before := mustRun(t, e.testEnv, n, "before", "")
	assert.Assert(t, before.addr != c.addr, "an address that a user had asked for goes to another")
	e.part()
	again := mustRun(t, e.testEnv, n, "again", "10.9.0.123")
	assert.Equal(t, again.mac, c.mac)

	// A container that has ended without a word makes room.
	e.sandboxes[again.endpoint].Run("ip", "link", "del", "eth0")
	third := mustRun(t, e.testEnv, n, "third", "10.9.0.123")
	e.ping(third)
}

// Engines from 29 on tell the container's name.
func TestDHCPServerHearsNames(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	n := e.mustCreate()
	web := map[string]string{optEndpointName: "web_1"}
	addr, err := e.request(n, web)
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(e.leased(addr.String()), " web-1 "), e.leased(addr.String()))
	assert.Equal(t, e.shown(n, addr).DHCP.Hostname, "web_1")
	// dockerd has lost the answer and asks again.
	twice, err := e.request(n, web)
	assert.NilError(t, err)
	assert.Equal(t, twice, addr)
	c, err := e.attach(n, "web", addr)
	assert.NilError(t, err)

	// Others come between, and the server forgets nobody.
	e.detach(c)
	e.part()
	other, err := e.request(n, map[string]string{optEndpointName: "db"})
	assert.NilError(t, err)
	third, err := e.request(n, nil)
	assert.NilError(t, err)
	again, err := e.request(n, web)
	assert.NilError(t, err)
	assert.Equal(t, again, addr)
	assert.Assert(t, other != addr)
	back, err := e.attach(n, "web2", again)
	assert.NilError(t, err)
	assert.Equal(t, back.mac, c.mac)

	// Under its name it wants another address: the old one is given back first.
	e.detach(back)
	want := netip.MustParseAddr("10.9.0.100")
	for want == addr || want == other || want == third {
		want = want.Next()
	}
	got, err := e.ipam.RequestAddress(t.Context(), &ipam.RequestAddressRequest{PoolID: n.poolID, Address: want.String(), Options: web})
	assert.NilError(t, err)
	assert.Equal(t, got.Address, want.String()+"/24")
	e.hears("DHCPRELEASE(eth0) " + addr.String())
}

// What is reserved on the server for a MAC address is what its container gets.
func TestReservationsOfADHCPServer(t *testing.T) {
	e := newDHCPEnv(t)
	with := e.with
	e.with = func(cfg *Config) { with(cfg); cfg.KeyByMAC = true }
	e.restart()
	e.serve(usualRange, "--dhcp-host=02:00:00:00:00:07,10.9.0.77")
	n := e.mustCreate()
	opts := map[string]string{optEndpointMAC: "02:00:00:00:00:07", optEndpointName: "printer"}
	addr, err := e.request(n, opts)
	assert.NilError(t, err)
	assert.Equal(t, addr, netip.MustParseAddr("10.9.0.77"))
	assert.Assert(t, strings.Contains(e.leased("10.9.0.77"), " printer "), e.leased("10.9.0.77"))
	c, err := e.attach(n, "printer", addr)
	assert.NilError(t, err)
	assert.Equal(t, c.mac, "02:00:00:00:00:07")
	_, err = e.request(n, map[string]string{optEndpointMAC: "01:00:5e:00:00:01"})
	assert.ErrorContains(t, err, "MAC address 01:00:5e:00:00:01: want the address of one Ethernet link")
}

// Somebody on the LAN uses what the server believes to be free.
func TestConflictOfADHCPServersAddress(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve("10.9.0.100,10.9.0.101,255.255.255.0,2m")
	n := e.mustCreate()
	first := mustRun(t, e.testEnv, n, "first", "")
	assert.NilError(t, e.stop(first))
	e.part()
	e.lan.Run("ip", "addr", "add", first.addr, "dev", "eth0")
	second := mustRun(t, e.testEnv, n, "second", "")
	assert.Assert(t, second.addr != first.addr)
	e.hears("DHCPDECLINE(eth0) " + first.ip().String())
	assert.Equal(t, e.shown(n, first.ip()).State, control.LeaseConflict)

	e.poolOpts["conflict"] = "warn"
	assert.NilError(t, e.stop(second))
	_, err := e.run(n, "third", first.ip().String())
	assert.ErrorContains(t, err, "in use")
	assert.NilError(t, e.removeNetwork(n))
	e.die()
	e.serve(usualRange)
	n = e.mustCreate()
	fourth := mustRun(t, e.testEnv, n, "fourth", first.ip().String())
	assert.Equal(t, fourth.addr, first.addr)
}

func TestWhatDHCPIsRefusedFor(t *testing.T) {
	e := newDHCPEnv(t)
	for _, tc := range []struct {
		opts map[string]any
		want string
	}{
		{map[string]any{"parent": "eth1", "mode": "ipvlan"}, "IPAM option dhcp=true: containers of mode ipvlan l2 have the MAC address of the parent, by which a DHCP server tells its clients apart; use mode macvlan"},
		{map[string]any{"parent": "eth1", "ipvlan_mode": "l3"}, "containers of mode ipvlan l3 have the MAC address of the parent"},
		{map[string]any{"parent": "eth1", "macvlan_mode": "passthru"}, "containers of mode macvlan passthru have the MAC address of the parent"},
		{nil, "IPAM option dhcp=true: the network has mode bridge and is not on the LAN of eth1, want mode=macvlan with that parent, or uplink=eth1"},
		{map[string]any{"mode": "macvlan"}, `IPAM option parent=eth1: the parent of the network is "", want the same for both`},
	} {
		_, err := e.create(tc.opts)
		assert.ErrorContains(t, err, tc.want)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
	ask := func(req ipam.RequestPoolRequest) error {
		req.AddressSpace, req.Options = localSpace, e.poolOpts
		got, err := e.ipam.RequestPool(t.Context(), &req)
		if err == nil {
			err = fmt.Errorf("got %s", got.Pool)
		}
		return err
	}
	assert.Error(t, ask(ipam.RequestPoolRequest{}), "IPAM option dhcp=true: it needs the LAN's subnet, give --subnet")
	assert.ErrorContains(t, ask(ipam.RequestPoolRequest{Pool: "10.9.0.0/24", SubPool: "10.9.0.128/25"}), "with the IPAM option dhcp=true the DHCP server chooses the addresses, leave --ip-range out")
	assert.ErrorContains(t, ask(ipam.RequestPoolRequest{Pool: "fd00:9::/64", V6: true}), "neither by DHCPv6 nor by SLAAC")
	assert.ErrorContains(t, ask(ipam.RequestPoolRequest{V6: true}), "neither by DHCPv6 nor by SLAAC")

	// Another driver's network: nobody would give the container the MAC address.
	pool, err := e.ipam.RequestPool(t.Context(), &ipam.RequestPoolRequest{AddressSpace: localSpace, Pool: "10.9.0.0/24", Options: e.poolOpts})
	assert.NilError(t, err)
	_, err = e.ipam.RequestAddress(t.Context(), &ipam.RequestAddressRequest{PoolID: pool.PoolID})
	assert.Error(t, err, "IPAM option dhcp=true: it works with networks of Berth only, give --driver too")
}
