package netplugin

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp/cmpopts"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
)

// What operators see of addresses in all states, over the socket.
func TestOperatorSeesAddressesAndPools(t *testing.T) {
	e := newEnv(t)
	client, ctx := operator(e), t.Context()
	leases, err := client.Leases(ctx, "")
	assert.NilError(t, err)
	assert.Equal(t, len(leases), 0)

	n, err := e.createNetwork("net", "10.1.0.0/28", map[string]any{"ipam.exclude": "10.1.0.14,10.1.0.8-10.1.0.9", "ipam.quarantine": "5m"})
	assert.NilError(t, err)
	other := mustNetwork(t, e, "other", "10.2.0.0/24")
	running := mustRun(t, e, n, "running", "10.1.0.5")
	pending, err := e.ask(n, "pending", "")
	assert.NilError(t, err)
	gone, err := e.ask(n, "gone", "")
	assert.NilError(t, err)
	assert.NilError(t, e.giveBack(n, gone))
	_, err = client.ReserveLease(ctx, control.ReserveRequest{Network: n.id, Addr: netip.MustParseAddr("10.1.0.7"), Key: "db"})
	assert.NilError(t, err)

	leases, err = client.Leases(ctx, n.id)
	assert.NilError(t, err)
	all := control.Lease{NetworkID: n.id, PoolID: n.poolID}
	of := func(addr string, state control.LeaseState, more func(*control.Lease)) control.Lease {
		l := all
		l.Addr, l.State = netip.MustParseAddr(addr), state
		more(&l)
		return l
	}
	want := []control.Lease{
		of("10.1.0.1", control.LeaseGateway, func(*control.Lease) {}),
		of(pending.String(), control.LeasePending, func(l *control.Lease) { l.Key = "pending" }),
		of(gone.String(), control.LeaseQuarantined, func(l *control.Lease) { l.Key, l.Until = "gone", e.t0.Add(5*time.Minute) }),
		of("10.1.0.5", control.LeaseActive, func(l *control.Lease) { l.Pinned, l.MAC, l.EndpointID = true, running.mac, running.endpoint }),
		of("10.1.0.7", control.LeaseReserved, func(l *control.Lease) { l.Key, l.Reserved = "db", true }),
	}
	assert.DeepEqual(t, leases, want,
		cmpopts.EquateComparable(netip.Addr{}), cmpopts.EquateApproxTime(time.Millisecond), cmpopts.IgnoreFields(control.Lease{}, "Since"))
	everything, err := client.Leases(ctx, "")
	assert.NilError(t, err)
	assert.Equal(t, len(everything), len(want)+1) // the other's gateway
	_, err = client.Leases(ctx, id("none"))
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)

	pools, err := client.Pools(ctx)
	assert.NilError(t, err)
	assert.Equal(t, len(pools), 2)
	p := pools[0]
	assert.Equal(t, p.NetworkID, n.id)
	assert.Equal(t, pools[1].NetworkID, other.id)
	assert.DeepEqual(t, p.Exclude, []string{"10.1.0.8-10.1.0.9", "10.1.0.14"})
	assert.Equal(t, p.Quarantine, 5*time.Minute)
	assert.Equal(t, p.Size, uint64(14-3))
	assert.Equal(t, p.Used, uint64(3))
	assert.Equal(t, p.Quarantined, uint64(1))
	assert.Equal(t, p.Reserved, uint64(1))
	assert.Equal(t, p.Size, p.Used+p.Reserved+p.Quarantined+p.Conflicts+p.Free)
}

// A reserved address waits for its container, whatever happens to berthd, until it is
// released.
func TestOperatorReservesAnAddress(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	had, err := e.ask(n, "db", "")
	assert.NilError(t, err)
	assert.NilError(t, e.giveBack(n, had))
	addr := netip.MustParseAddr("10.1.0.9")
	reserve := control.ReserveRequest{Network: n.id, Addr: addr, Key: "/db"} // as docker inspect shows names
	for range 2 {                                                            // the same again is success
		got, err := operator(e).ReserveLease(t.Context(), reserve)
		assert.NilError(t, err)
		assert.Equal(t, got.State, control.LeaseReserved)
		assert.Equal(t, got.Key, "db")
		assert.Assert(t, got.Reserved)
		e.restart()
	}
	_, err = e.ask(n, "web", addr.String())
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "address 10.1.0.9 of subnet 10.1.0.0/24 is reserved for db")
	for range 20 {
		got, err := e.ask(n, "", "")
		assert.NilError(t, err)
		assert.Assert(t, got != addr)
	}
	got, err := e.ask(n, "db", "")
	assert.NilError(t, err)
	assert.Equal(t, got, addr, "not what it had before")
	lease := e.leases()[addr.String()]
	assert.Equal(t, lease.State, control.LeasePending)
	assert.Assert(t, lease.Reserved)
	assert.NilError(t, e.giveBack(n, addr))
	assert.Equal(t, e.leases()[addr.String()].State, control.LeaseReserved)

	was, err := operator(e).ReleaseLease(t.Context(), control.ReleaseRequest{Network: n.id, Addr: addr})
	assert.NilError(t, err)
	assert.Equal(t, was.State, control.LeaseReserved)
	e.restart()
	_, kept := e.leases()[addr.String()]
	assert.Assert(t, !kept)
	got, err = e.ask(n, "web", addr.String())
	assert.NilError(t, err)
	assert.Equal(t, got, addr)
	e.healthy()
}

// What an operator asks for and cannot have is refused with what is in the way, and
// changes nothing.
func TestReservationsAndReleasesThatAreRefused(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	foreign := &dockerNet{id: id("foreign"), pool: "10.8.0.0/24", gateway: "10.8.0.1/24"}
	req := foreign.request(nil)
	req.IPv4Data[0].AddressSpace = "LocalDefault"
	assert.NilError(t, e.net.CreateNetwork(t.Context(), req))
	running := mustRun(t, e, n, "running", "10.1.0.5")
	_, err := e.ask(n, "web", "10.1.0.6")
	assert.NilError(t, err)
	client, ctx := operator(e), t.Context()
	_, err = client.ReserveLease(ctx, control.ReserveRequest{Network: n.id, Addr: netip.MustParseAddr("10.1.0.7"), Key: "db"})
	assert.NilError(t, err)
	before := e.leases()
	for _, tc := range []struct {
		network, addr, key string // without key it is a release
		kind               func(error) bool
		want               string
	}{
		{id("none"), "10.1.0.9", "db", errdefs.IsNotFound, "network " + short(id("none")) + " is not known to Berth"},
		{id("none"), "10.1.0.9", "", errdefs.IsNotFound, "network " + short(id("none")) + " is not known to Berth"},
		{"", "10.1.0.9", "db", errdefs.IsInvalidArgument, "Network is empty: want the whole ID of one"},
		{n.id, "10.2.0.9", "db", errdefs.IsInvalidArgument, "address 10.2.0.9: want one of the subnets that Berth's IPAM driver gave network " + short(n.id) + " (it has 10.1.0.0/24)"},
		{n.id, "10.2.0.9", "", errdefs.IsInvalidArgument, "address 10.2.0.9: want one of the subnets"},
		{foreign.id, "10.8.0.9", "db", errdefs.IsInvalidArgument, "address 10.8.0.9: want one of the subnets that Berth's IPAM driver gave network " + short(foreign.id)},
		{n.id, "10.1.0.255", "db", errdefs.IsInvalidArgument, "address 10.1.0.255: want that of a host of subnet 10.1.0.0/24"},
		{n.id, "fd00::1", "db", errdefs.IsInvalidArgument, "address fd00::1: want one of the subnets"},
		{n.id, "10.1.0.9", "not a name", errdefs.IsInvalidArgument, `key "not a name": want a container's name or a MAC address`},
		{n.id, "10.1.0.9", "ff:ff:ff:ff:ff:ff", errdefs.IsInvalidArgument, "key ff:ff:ff:ff:ff:ff: want the MAC address of one container"},
		{n.id, "10.1.0.9", strings.Repeat("x", 300), errdefs.IsInvalidArgument, "want a container's name or a MAC address"},
		{n.id, "10.1.0.7", "web", errdefs.IsConflict, "address 10.1.0.7 of subnet 10.1.0.0/24 is reserved for db already"},
		{n.id, "10.1.0.6", "db", errdefs.IsConflict, "address 10.1.0.6 of subnet 10.1.0.0/24 is already in use by a container of container web"},
		{n.id, "10.1.0.1", "db", errdefs.IsConflict, "address 10.1.0.1 of subnet 10.1.0.0/24 is already in use as the gateway"},
		{n.id, "10.1.0.1", "", errdefs.IsConflict, "address 10.1.0.1 of subnet 10.1.0.0/24 is already in use as the gateway"},
		{n.id, "10.1.0.5", "", errdefs.IsConflict, "address 10.1.0.5 of subnet 10.1.0.0/24 is already in use by endpoint " + short(running.endpoint)},
		{n.id, "10.1.0.99", "", errdefs.IsNotFound, "address 10.1.0.99 of subnet 10.1.0.0/24 is free already"},
	} {
		addr := netip.MustParseAddr(tc.addr)
		var err error
		if tc.key == "" {
			_, err = client.ReleaseLease(ctx, control.ReleaseRequest{Network: tc.network, Addr: addr})
		} else {
			_, err = client.ReserveLease(ctx, control.ReserveRequest{Network: tc.network, Addr: addr, Key: tc.key})
		}
		assert.Assert(t, tc.kind(err), "%s %s: %v", tc.addr, tc.key, err)
		assert.ErrorContains(t, err, tc.want)
		assert.DeepEqual(t, e.leases(), before, cmpopts.EquateComparable(netip.Addr{}))
	}
	e.healthy()
}

// An operator frees what dockerd has forgotten, and what is kept for somebody.
func TestOperatorReleasesWhatIsKept(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	lost, err := e.ask(n, "lost", "")
	assert.NilError(t, err)
	gone, err := e.ask(n, "gone", "")
	assert.NilError(t, err)
	assert.NilError(t, e.giveBack(n, gone))
	for addr, state := range map[netip.Addr]control.LeaseState{lost: control.LeasePending, gone: control.LeaseQuarantined} {
		was, err := operator(e).ReleaseLease(t.Context(), control.ReleaseRequest{Network: n.id, Addr: addr})
		assert.NilError(t, err)
		assert.Equal(t, was.State, state)
	}
	e.restart()
	assert.Equal(t, len(e.leases()), 1) // the gateway
	for _, addr := range []netip.Addr{lost, gone} {
		got, err := e.ask(n, "other", addr.String())
		assert.NilError(t, err)
		assert.Equal(t, got, addr)
	}
	e.healthy()
}
