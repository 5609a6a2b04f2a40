package ipam

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"
)

var equalAddrs = cmp.Comparer(func(x, y netip.Addr) bool { return x == y })

var equalPrefixes = cmp.Comparer(func(x, y netip.Prefix) bool { return x == y })

// someEvents has each kind with all its fields.
func someEvents() []Event {
	at := time.Unix(1_700_000_000, 123)
	o := PoolOptions{
		Exclude: []Range{{addr("10.1.0.1"), addr("10.1.0.9")}}, Quarantine: time.Minute, Sticky: true,
		Probe: ProbeFull, Conflict: ConflictWarn, Parent: "eth1.50", DHCP: true,
	}
	p := Pool{ID: "10.1.0.0/24#1", Prefix: prefix("10.1.0.0/24"), Range: prefix("10.1.0.0/25"), Options: o, Network: "n", Since: at, Used: true, Next: addr("10.1.0.7")}
	d := &DHCP{ClientID: []byte{1, 2}, Server: addr("10.1.0.254"), ServerMAC: []byte{2, 0, 0, 0, 0, 9}, T1: at, T2: at.Add(1), Expires: at.Add(2), Hostname: "web"}
	return []Event{
		PoolAdded{p},
		PoolAdded{Pool{ID: "x", Prefix: prefix("fd00::/64"), Range: prefix("fd00::/64")}},
		PoolChanged{p},
		PoolReleased{"10.1.0.0/24#1"},
		LeaseSet{Pool: "p", Lease: Lease{Addr: addr("10.1.0.7"), Role: RoleEndpoint, Key: "web", Named: true, Since: at, Endpoint: "e", Released: true, MAC: []byte{2, 0, 0, 0, 0, 1}, DHCP: d}, Next: addr("10.1.0.8")},
		LeaseSet{Pool: "p", Lease: Lease{Addr: addr("fd00::1"), Role: RoleGateway}},
		LeaseSet{Pool: "p", Lease: Lease{Addr: addr("fd00::1"), Role: RoleReserved, DHCP: &DHCP{}}},
		LeaseGone{Pool: "p", Tombstone: Tombstone{Addr: addr("10.1.0.7"), Key: "web", Named: true, Since: at, MAC: []byte{2, 0, 0, 0, 0, 1}, DHCP: d}},
		LeaseGone{Pool: "p", Tombstone: Tombstone{Addr: addr("10.1.0.7")}},
		Forgotten{Pool: "p", Addr: addr("10.1.0.7"), At: at},
		Reserved{Pool: "p", Reservation: Reservation{addr("10.1.0.7"), "web", at}},
		Unreserved{Pool: "p", Addr: addr("10.1.0.7"), At: at},
		ConflictSet{Pool: "p", Conflict: Conflict{Addr: addr("10.1.0.7"), MAC: []byte{2, 0, 0, 0, 0, 1}, Since: at, Until: at.Add(1)}},
		ConflictCleared{Pool: "p", Addr: addr("10.1.0.7"), At: at},
	}
}

func TestEventsComeBackAsTheyWere(t *testing.T) {
	for _, e := range someEvents() {
		raw := AppendEvent(nil, e)
		got, err := DecodeEvent(raw)
		assert.NilError(t, err)
		assert.DeepEqual(t, got, e, equalAddrs, equalPrefixes)
		for n := range raw {
			_, err := DecodeEvent(raw[:n])
			assert.Assert(t, err != nil, "%T cut to %d of %d bytes", e, n, len(raw))
		}
		_, err = DecodeEvent(append(raw, 0))
		assert.ErrorContains(t, err, "bytes too many")
	}
}

func TestStrangeEventsAreRefused(t *testing.T) {
	for _, tc := range []struct {
		raw  []byte
		want string
	}{
		{nil, "event is cut short"},
		{[]byte{2, 3, 0}, "event has version 2, want 1"},
		{[]byte{1, 99}, "event is damaged: kind 99"},
		{[]byte{1, codePoolReleased, 0x80, 0}, "event is damaged: number"},
		{[]byte{1, codeLeaseGone, 0, 8}, "event is damaged: flags 0x8"},
		{[]byte{1, codeLeaseSet, 0, 3}, "event is damaged: role 3"},
		{[]byte{1, codeUnreserved, 0, 5}, "event is damaged: address of 5 bytes"},
	} {
		_, err := DecodeEvent(tc.raw)
		assert.ErrorContains(t, err, tc.want)
	}
}

func TestEventsThatDoNotFitAreRefused(t *testing.T) {
	p := Pool{ID: "p", Prefix: prefix("10.1.0.0/24"), Range: prefix("10.1.0.0/24"), Options: PoolOptions{Conflict: ConflictRefuse, Parent: "eth1"}}
	q := p
	q.ID = "q"
	held := LeaseSet{Pool: "p", Lease: Lease{Addr: addr("10.1.0.7"), Role: RoleEndpoint, Endpoint: "e", Since: time.Unix(1, 0)}}
	stolen, gateway := held, held
	stolen.Pool = "q"
	gateway.Lease.Role = RoleGateway
	strange := held
	strange.Lease.Role = "guest"
	moved := p
	moved.Options.Parent = "eth2"
	for _, tc := range []struct {
		e    Event
		want string
	}{
		{PoolAdded{p}, "pool p is there twice"},
		{PoolAdded{Pool{ID: "r", Prefix: prefix("10.1.0.0/24"), Range: prefix("10.2.0.0/24")}}, "pool r has prefix"},
		{PoolReleased{"r"}, `pool "r" is not there`},
		{PoolChanged{Pool{ID: "r"}}, `pool "r" is not there`},
		{PoolChanged{moved}, "changes from parent eth1"},
		{LeaseSet{Pool: "r"}, `pool "r" is not there`},
		{LeaseSet{Pool: "p", Lease: Lease{Addr: addr("10.2.0.7"), Role: RoleEndpoint}}, "address outside 10.1.0.0/24"},
		{strange, `for "guest"`},
		{stolen, "has two holders"},
		{gateway, "has two holders"},
		{LeaseGone{Pool: "q", Tombstone: Tombstone{Addr: addr("10.1.0.7")}}, "is not held by pool q"},
		{Reserved{Pool: "p", Reservation: Reservation{Addr: addr("10.1.0.9"), Key: "db"}}, "which cannot be"},
		{Forgotten{Pool: "p", Addr: addr("10.1.0.8")}, "of which nothing is known"},
		{Forgotten{Pool: "q", Addr: addr("10.1.0.7")}, "not its own"},
		{Forgotten{Pool: "p", Addr: addr("10.1.0.9")}, "not its own"},
		{Unreserved{Pool: "p", Addr: addr("10.1.0.8")}, "has no reservation"},
		{ConflictCleared{Pool: "p", Addr: addr("10.1.0.8")}, "has no conflict"},
		{nil, "is not known"},
	} {
		a, _ := newTestAllocator(t, "")
		for _, e := range []Event{PoolAdded{p}, PoolAdded{q}, held, Reserved{Pool: "p", Reservation: Reservation{Addr: addr("10.1.0.9"), Key: "web"}}} {
			assert.NilError(t, a.Apply(e))
		}
		assert.ErrorContains(t, a.Apply(tc.e), tc.want)
	}
}

// What DecodeEvent accepts is exactly what AppendEvent writes, and Apply does not
// fall over it.
func FuzzDecodeEvent(f *testing.F) {
	for _, e := range someEvents() {
		f.Add(AppendEvent(nil, e))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := DecodeEvent(raw)
		if err != nil {
			return
		}
		assert.Assert(t, bytes.Equal(AppendEvent(nil, e), raw), "%+v", e)
		a, _ := newTestAllocator(t, "")
		pool := Pool{ID: "p", Prefix: prefix("10.1.0.0/24"), Range: prefix("10.1.0.0/24"), Options: DefaultOptions()}
		assert.NilError(t, a.Apply(PoolAdded{pool}))
		if a.Apply(e) != nil {
			return
		}
		// Damage is found later rather than never, but nothing is worse for it.
		for e := range a.Snapshot() {
			AppendEvent(nil, e)
		}
		a.Request(AddressRequest{Pool: "p"}) //nolint:errcheck // it may fail, but must return
	})
}
