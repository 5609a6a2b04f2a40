package netplugin

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/dhcp"
)

// kill ends the driver as SIGKILL does, when servers have not heard of what has ended,
// and starts another.
func (e *dhcpEnv) kill() {
	e.t.Helper()
	e.d.partings.release = func(dhcp.Lease) {}
	e.restart()
}

// What ended just before berthd was killed is given back by the next one.
func TestServerHearsOfWhatEndedBeforeAKill(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	n := e.mustCreate()
	early, a, b := mustRun(t, e.testEnv, n, "early", ""), mustRun(t, e.testEnv, n, "a", ""), mustRun(t, e.testEnv, n, "b", "")
	assert.NilError(t, e.stop(early))
	e.part()
	e.t0 = e.t0.Add(2 * partingTime)
	assert.NilError(t, e.stop(a))
	e.kill()
	assert.Equal(t, len(e.manager.Status()), 1)
	assert.Equal(t, e.manager.Status()[0].Lease.Addr, b.ip())
	e.part()
	e.hears("DHCPRELEASE(eth0) " + a.ip().String())
	assert.Equal(t, strings.Count(e.said.String(), "DHCPRELEASE"), 2, e.said.String()) // and early's

	// A container that begins meanwhile is the same client, and keeps what it gets.
	assert.NilError(t, e.stop(b))
	e.kill()
	again := mustRun(t, e.testEnv, n, "again", "")
	assert.Equal(t, again.addr, b.addr)
	assert.Equal(t, again.mac, b.mac)
	e.part()
	assert.Assert(t, !strings.Contains(e.said.String(), "DHCPRELEASE(eth0) "+b.ip().String()), e.said.String())
	e.ping(again)

	// Long after, the server's time has done it.
	assert.NilError(t, e.stop(again))
	e.t0 = e.t0.Add(untoldTime + time.Second)
	e.kill()
	assert.Assert(t, !e.d.partings.has("eth1", e.mac(again)))

	// While the server was not reached, the client is not taken to have the lease still.
	last := mustRun(t, e.testEnv, n, "last", "")
	assert.NilError(t, e.stop(last))
	e.kill()
	e.die()
	_, err := e.run(n, "none", "")
	assert.ErrorContains(t, err, "no address by DHCP")
}

// Killed between any two steps of a start: whoever asks next is the same client.
func TestKilledWhileAnAddressIsTaken(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	n := e.mustCreate()
	pool, ok := e.d.store.leases.pool(n.poolID)
	assert.Assert(t, ok)
	// The server has answered, and nothing is on record.
	space := dhcp.Space{Host: e.d.host, Parent: "eth1", Subnet: pool.Prefix}
	lease, err := e.manager.Acquire(t.Context(), dhcp.Request{Parent: "eth1", Identity: space.Slot(1), Subnet: pool.Prefix})
	assert.NilError(t, err)
	e.kill()
	addr, err := e.request(n, nil)
	assert.NilError(t, err)
	assert.Equal(t, addr, lease.Addr)

	// It is on record, and dockerd has not heard of it: the next container is another
	// client, and this one is given up in the end.
	e.kill()
	assert.Equal(t, len(e.manager.Status()), 1)
	other, err := e.request(n, nil)
	assert.NilError(t, err)
	assert.Assert(t, other != addr)
	c, err := e.attach(n, "c", other)
	assert.NilError(t, err)
	e.kill()
	e.t0 = e.t0.Add(11 * time.Minute)
	e.d.tick(t.Context())
	e.hears("DHCPRELEASE(eth0) " + addr.String())
	assert.Assert(t, e.leased(other.String()) != "")
	assert.Equal(t, c.mac, e.manager.Status()[0].Lease.Identity.MAC.String())
	third, err := e.request(n, nil)
	assert.NilError(t, err)
	assert.Equal(t, third, addr, "the slot is used again")
}

// One container on two networks of a LAN is two clients; neither takes the other's
// lease.
func TestTwoNetworksOnOneLANWithDHCP(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	first := e.mustCreate()
	second, err := e.createAs("second", map[string]any{"parent": "eth1"})
	assert.NilError(t, err)
	web := map[string]string{optEndpointName: "web"}
	seen := make(map[netip.Addr]bool)
	for _, n := range []*dockerNet{first, second} {
		for _, opts := range []map[string]string{web, nil} {
			addr, err := e.request(n, opts)
			assert.NilError(t, err)
			assert.Assert(t, !seen[addr], "%s is given twice", addr)
			seen[addr] = true
		}
	}
	assert.Equal(t, len(e.manager.Status()), 4)
	// By name it is refused, and the server does not hear that it is free.
	for addr := range seen {
		for _, n := range []*dockerNet{first, second} {
			_, err := e.ipam.RequestAddress(t.Context(), &ipam.RequestAddressRequest{PoolID: n.poolID, Address: addr.String()})
			assert.ErrorContains(t, err, "in use")
		}
	}
	assert.Equal(t, len(e.manager.Status()), 4)
	assert.Assert(t, !strings.Contains(e.said.String(), "DHCPRELEASE"), e.said.String())
}

// A server that offers what another network's container has.
func TestServerOffersWhatIsInUse(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	first := e.mustCreate()
	second, err := e.createAs("second", map[string]any{"parent": "eth1"})
	assert.NilError(t, err)
	addr, err := e.request(first, nil)
	assert.NilError(t, err)
	// It has lost its memory, and has this one address.
	e.die()
	assert.NilError(t, e.forgetLeases())
	e.serve(addr.String() + "," + addr.String() + ",255.255.255.0,2m")
	_, err = e.request(second, nil)
	assert.ErrorContains(t, err, "a container of this host has it")
	assert.Equal(t, len(e.manager.Status()), 1)
	assert.Assert(t, !strings.Contains(e.said.String(), "DHCPRELEASE"), e.said.String())
}

// The network is not what the server says of the LAN.
func TestServerDescribesAnotherLAN(t *testing.T) {
	e := newDHCPEnv(t)
	var said bytes.Buffer
	with := e.with
	e.with = func(cfg *Config) {
		with(cfg)
		cfg.Log.Logger.SetOutput(&said)
	}
	e.restart()
	e.serve("10.9.0.100,10.9.0.149,255.255.0.0,2m", "--dhcp-option=3,10.9.0.9")
	n := e.mustCreate()
	for range 2 {
		_, err := e.request(n, nil)
		assert.NilError(t, err)
	}
	assert.Equal(t, strings.Count(said.String(), "DHCP server names 10.9.0.9 as router, containers of the network use 10.9.0.1"), 1, said.String())
	assert.Equal(t, strings.Count(said.String(), "DHCP server says that the LAN's subnet is 10.9.0.0/16, that of the network is 10.9.0.0/24"), 1, said.String())
}

func TestMetricsOfDHCP(t *testing.T) {
	e := newDHCPEnv(t)
	e.serve(usualRange)
	n := e.mustCreate()
	mustRun(t, e.testEnv, n, "a", "")
	assert.NilError(t, e.stop(mustRun(t, e.testEnv, n, "b", "")))
	e.part()
	assert.NilError(t, testutil.CollectAndCompare(e.d.Metrics(), strings.NewReader(`
# HELP berth_dhcp_leases Addresses from DHCP servers by state: bound, renewing, rebinding, expired.
# TYPE berth_dhcp_leases gauge
berth_dhcp_leases{state="bound"} 1
berth_dhcp_leases{state="expired"} 0
berth_dhcp_leases{state="rebinding"} 0
berth_dhcp_leases{state="renewing"} 0
# HELP berth_dhcp_messages_total Messages of and to DHCP servers by kind, and those that got no answer (silence), since berthd started.
# TYPE berth_dhcp_messages_total counter
berth_dhcp_messages_total{kind="ack"} 2
berth_dhcp_messages_total{kind="decline"} 0
berth_dhcp_messages_total{kind="nak"} 0
berth_dhcp_messages_total{kind="offer"} 2
berth_dhcp_messages_total{kind="release"} 1
berth_dhcp_messages_total{kind="silence"} 0
# HELP berth_dhcp_leases_lost_total Addresses of containers that DHCP servers took back or that ran out, since berthd started.
# TYPE berth_dhcp_leases_lost_total counter
berth_dhcp_leases_lost_total 0
`), "berth_dhcp_leases", "berth_dhcp_messages_total", "berth_dhcp_leases_lost_total"))
}
