package ipam

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

// clock is a time that tests move.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func newTestAllocator(t testing.TB, supernets string) (*Allocator, *clock) {
	t.Helper()
	list, err := ParseSupernets(supernets)
	assert.NilError(t, err)
	c := &clock{t: time.Unix(1_700_000_000, 0)}
	return New(Config{Supernets: list, Now: c.now, Random: rand.NewChaCha8([32]byte{1})}), c
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func mustPool(t testing.TB, a *Allocator, req PoolRequest) Pool {
	t.Helper()
	req.IPv6 = req.IPv6 || req.Prefix.IsValid() && req.Prefix.Addr().Is6()
	p, _, err := a.RequestPool(req)
	assert.NilError(t, err)
	return p
}

func mustRequest(t testing.TB, a *Allocator, req AddressRequest) netip.Addr {
	t.Helper()
	l, _, err := a.Request(req)
	assert.NilError(t, err)
	return l.Addr
}

func TestAutomaticPoolsNeverRepeatUntilReleased(t *testing.T) {
	a, _ := newTestAllocator(t, "10.208.0.0/20:24")
	seen := make(map[netip.Prefix]string)
	for range 16 {
		p := mustPool(t, a, PoolRequest{})
		_, twice := seen[p.Prefix]
		assert.Assert(t, !twice, "%s was given twice", p.Prefix)
		seen[p.Prefix] = p.ID
	}
	_, _, err := a.RequestPool(PoolRequest{})
	assert.ErrorContains(t, err, "no free subnet left in the address pools 10.208.0.0/20:24")
	assert.Assert(t, errdefs.IsResourceExhausted(err))

	assert.Assert(t, a.ReleasePool(seen[prefix("10.208.5.0/24")]))
	again := mustPool(t, a, PoolRequest{})
	assert.Equal(t, again.Prefix, prefix("10.208.5.0/24"))
	assert.Assert(t, again.ID != seen[again.Prefix], "the ID of a released pool came back")
	assert.Assert(t, !a.ReleasePool(seen[prefix("10.208.5.0/24")]), "the old ID still means something")
}

func TestAutomaticPoolsKeepClearOfTheHost(t *testing.T) {
	for _, tc := range []struct {
		name        string
		busy, avoid []string
		want        string
	}{
		{name: "nothing in the way", want: "10.208.0.0/24"},
		{name: "a default route says nothing", busy: []string{"0.0.0.0/0"}, want: "10.208.0.0/24"},
		{name: "a name server", busy: []string{"10.208.0.53/32"}, want: "10.208.1.0/24"},
		{name: "a wide network of the host", busy: []string{"10.208.0.0/22"}, want: "10.208.4.0/24"},
		{name: "a network within another", busy: []string{"10.208.0.0/23", "10.208.0.128/25", "10.208.2.7/32"}, want: "10.208.3.0/24"},
		{name: "all avoided, one is busy", avoid: []string{"10.0.0.0/8"}, busy: []string{"10.208.0.0/24"}, want: "10.208.1.0/24"},
		{name: "some avoided", avoid: []string{"10.208.0.0/21"}, want: "10.208.8.0/24"},
		{name: "other family", busy: []string{"fd00::/8"}, want: "10.208.0.0/24"},
		{name: "first list is full", busy: []string{"10.208.0.0/16"}, want: "10.220.0.0/26"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, _ := newTestAllocator(t, "10.208.0.0/16:24,10.220.0.0/24:26,fd00:1::/48:64")
			var req PoolRequest
			for _, s := range tc.busy {
				req.Busy = append(req.Busy, prefix(s))
			}
			for _, s := range tc.avoid {
				req.Avoid = append(req.Avoid, prefix(s))
			}
			assert.Equal(t, mustPool(t, a, req).Prefix, prefix(tc.want))
		})
	}
}

func TestAutomaticIPv6Pools(t *testing.T) {
	a, _ := newTestAllocator(t, "10.208.0.0/16:24,fd00:1::/48:64")
	assert.Equal(t, mustPool(t, a, PoolRequest{IPv6: true}).Prefix, prefix("fd00:1::/64"))
	assert.Equal(t, mustPool(t, a, PoolRequest{IPv6: true}).Prefix, prefix("fd00:1:0:1::/64"))
}

func TestPoolAtTheEndOfTheAddressSpace(t *testing.T) {
	a, _ := newTestAllocator(t, "fdff:ffff:ffff:ffff:ffff:ffff:ffff:fff0/124:125")
	mustPool(t, a, PoolRequest{IPv6: true})
	mustPool(t, a, PoolRequest{IPv6: true})
	_, _, err := a.RequestPool(PoolRequest{IPv6: true})
	assert.Assert(t, errdefs.IsResourceExhausted(err))
}

func TestWrongPoolsAreRefusedByName(t *testing.T) {
	a, _ := newTestAllocator(t, "10.208.0.0/16:24")
	bound := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/16")})
	_, err := a.Bind(bound.ID, "0123456789abcdef")
	assert.NilError(t, err)
	for _, tc := range []struct {
		pool, rng string
		v6        bool
		want      string
	}{
		{pool: "10.1.2.0/24", want: "subnet 10.1.2.0/24 overlaps subnet 10.1.0.0/16 of Berth network 0123456789ab"},
		{pool: "10.0.0.0/8", want: "subnet 10.0.0.0/8 overlaps subnet 10.1.0.0/16"},
		{pool: "10.3.0.0/24", v6: true, want: "subnet 10.3.0.0/24: it is of the other address family"},
		{pool: "0.0.0.0/0", want: "subnet 0.0.0.0/0: it is the whole address family"},
		{pool: "::/0", v6: true, want: "subnet ::/0: it is the whole address family"},
		{pool: "127.0.0.0/24", want: "loopback"},
		{pool: "126.0.0.0/7", want: "loopback"},
		{pool: "224.1.0.0/24", want: "multicast"},
		{pool: "255.255.255.0/24", want: "reserved"},
		{pool: "0.1.0.0/16", want: "reserved"},
		{pool: "fe80::/64", v6: true, want: "link-local"},
		{pool: "ff02::/64", v6: true, want: "multicast"},
		{rng: "10.2.0.0/24", want: "range 10.2.0.0/24: it needs a subnet"},
		{pool: "10.2.0.0/24", rng: "10.3.0.0/25", want: "range 10.3.0.0/25: want a part of subnet 10.2.0.0/24"},
		{pool: "10.2.0.0/24", rng: "10.2.0.0/23", want: "want a part of subnet"},
		{pool: "10.2.0.0/24", rng: "10.2.0.0/32", want: "no address in it can belong to a host"},
		{pool: "10.2.0.0/24", rng: "10.2.0.255/32", want: "no address in it can belong to a host"},
	} {
		req := PoolRequest{IPv6: tc.v6}
		if tc.pool != "" {
			req.Prefix = prefix(tc.pool)
		}
		if tc.rng != "" {
			req.Range = prefix(tc.rng)
		}
		_, _, err := a.RequestPool(req)
		assert.ErrorContains(t, err, tc.want)
		assert.Assert(t, errdefs.IsInvalidArgument(err) || errdefs.IsConflict(err), "%v", err)
	}
	assert.Equal(t, len(a.pools), 1)
}

func TestHostsOfSmallPools(t *testing.T) {
	for _, tc := range []struct {
		pool string
		want []string
	}{
		{"10.1.0.0/30", []string{"10.1.0.1", "10.1.0.2"}},
		{"10.1.0.0/31", []string{"10.1.0.0", "10.1.0.1"}},
		{"10.1.0.7/32", []string{"10.1.0.7"}},
		{"fd00::/126", []string{"fd00::1", "fd00::2", "fd00::3"}},
		{"fd00::/127", []string{"fd00::", "fd00::1"}},
		{"fd00::9/128", []string{"fd00::9"}},
	} {
		a, _ := newTestAllocator(t, "")
		p := mustPool(t, a, PoolRequest{Prefix: prefix(tc.pool)})
		for _, want := range tc.want {
			assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), addr(want))
		}
		_, _, err := a.Request(AddressRequest{Pool: p.ID})
		assert.ErrorContains(t, err, "no free address in pool "+tc.pool)
		assert.Assert(t, errdefs.IsResourceExhausted(err))
	}
}

func TestGatewayAndRange(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/16"), Range: prefix("10.1.5.0/29")})
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Gateway: true}), addr("10.1.0.1"))
	// An aux-address lies outside the range and must be accepted.
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.9.9")}), addr("10.1.9.9"))
	// The first and last address of a range are hosts of the larger subnet.
	for _, want := range []string{"10.1.5.0", "10.1.5.1", "10.1.5.2", "10.1.5.3", "10.1.5.4", "10.1.5.5", "10.1.5.6", "10.1.5.7"} {
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), addr(want))
	}
	_, _, err := a.Request(AddressRequest{Pool: p.ID})
	assert.ErrorContains(t, err, "no free address in range 10.1.5.0/29 of pool 10.1.0.0/16")
}

func TestAReleasedAddressIsTheLastToComeBack(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/29")})
	first := mustRequest(t, a, AddressRequest{Pool: p.ID})
	assert.Equal(t, first, addr("10.1.0.1"))
	a.Release(p.ID, first)
	for _, want := range []string{"10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6", "10.1.0.1"} {
		assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), addr(want))
	}
}

func TestRotationGoesOnAfterARestart(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/24")})
	first, stored, err := a.Request(AddressRequest{Pool: p.ID})
	assert.NilError(t, err)
	a.Release(p.ID, first.Addr)

	b, _ := newTestAllocator(t, "")
	assert.NilError(t, b.Restore(stored, nil))
	assert.Equal(t, mustRequest(t, b, AddressRequest{Pool: p.ID}), addr("10.1.0.2"))
}

func TestAddressesInUseAreNamedWithTheirUser(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/24")})
	mustRequest(t, a, AddressRequest{Pool: p.ID, Gateway: true})
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.0.2")})
	_, err := a.Bind(p.ID, "n")
	assert.NilError(t, err)
	mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: addr("10.1.0.3"), Key: "web"})
	_, err = a.Attach(p.ID, addr("10.1.0.3"), "e0123456789abc")
	assert.NilError(t, err)
	for _, tc := range []struct{ addr, want string }{
		{"10.1.0.1", "address 10.1.0.1 of subnet 10.1.0.0/24 is already in use as the gateway"},
		{"10.1.0.2", "as a reserved address (--aux-address)"},
		{"10.1.0.3", "by endpoint e0123456789a of container web"},
		{"10.1.0.0", "network or broadcast address"},
		{"10.1.0.255", "network or broadcast address"},
		{"10.2.0.1", "want one of subnet 10.1.0.0/24"},
		{"fd00::1", "want one of subnet 10.1.0.0/24"},
	} {
		_, _, err := a.Request(AddressRequest{Pool: p.ID, Addr: addr(tc.addr), Key: "web"})
		assert.ErrorContains(t, err, tc.want)
	}
	_, _, err = a.Request(AddressRequest{Pool: "no such pool"})
	assert.Assert(t, errdefs.IsNotFound(err))
}

func TestAForgottenLeaseIsGivenAgainOnlyWhenNeededAndOld(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/30")})
	_, err := a.Bind(p.ID, "n")
	assert.NilError(t, err)
	lost := mustRequest(t, a, AddressRequest{Pool: p.ID})
	c.t = c.t.Add(ForgetAfter)
	assert.Assert(t, mustRequest(t, a, AddressRequest{Pool: p.ID}) != lost, "a free address goes before a forgotten one")
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID}), lost)

	// All leases are young now.
	var taken *Taken
	_, _, err = a.Request(AddressRequest{Pool: p.ID, Addr: lost})
	assert.Assert(t, errors.As(err, &taken) && errdefs.IsConflict(err), "%v", err)
	_, _, err = a.Request(AddressRequest{Pool: p.ID})
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)

	c.t = c.t.Add(ForgetAfter)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: lost}), lost)

	// With an endpoint a lease is never forgotten.
	_, err = a.Attach(p.ID, lost, "e")
	assert.NilError(t, err)
	c.t = c.t.Add(100 * ForgetAfter)
	_, _, err = a.Request(AddressRequest{Pool: p.ID, Addr: lost})
	assert.Assert(t, errors.As(err, &taken) && taken.Lease.Endpoint == "e", "%v", err)
}

func TestLeasesOfOtherDriversNetworksAreNeverForgotten(t *testing.T) {
	a, c := newTestAllocator(t, "")
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/32")})
	got := mustRequest(t, a, AddressRequest{Pool: p.ID})
	c.t = c.t.Add(100 * ForgetAfter)
	_, _, err := a.Request(AddressRequest{Pool: p.ID, Addr: got})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	_, _, err = a.Request(AddressRequest{Pool: p.ID})
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
}

func TestAPoolThatNothingUsedMakesRoomForTheSameSubnet(t *testing.T) {
	a, c := newTestAllocator(t, "")
	lost := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/24")})
	_, _, err := a.RequestPool(PoolRequest{Prefix: prefix("10.1.0.0/24")})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	c.t = c.t.Add(ForgetAfter)
	p, reclaimed, err := a.RequestPool(PoolRequest{Prefix: prefix("10.1.0.0/24")})
	assert.NilError(t, err)
	assert.DeepEqual(t, reclaimed, []string{lost.ID})
	_, _, err = a.Request(AddressRequest{Pool: lost.ID})
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)

	used := mustRequest(t, a, AddressRequest{Pool: p.ID})
	a.Release(p.ID, used)
	c.t = c.t.Add(100 * ForgetAfter)
	_, _, err = a.RequestPool(PoolRequest{Prefix: prefix("10.1.0.0/24")})
	assert.Assert(t, errdefs.IsConflict(err), "a pool that was used is never given up: %v", err)
}

func TestTheSameContainerGetsTheAddressItDidNotUse(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/24")})
	_, err := a.Bind(p.ID, "n")
	assert.NilError(t, err)
	first := mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "web"})
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "web"}), first)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: first, Key: "web"}), first)
	_, _, err = a.Request(AddressRequest{Pool: p.ID, Addr: first, Key: "db"})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	_, err = a.Attach(p.ID, first, "e")
	assert.NilError(t, err)
	assert.Assert(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Key: "web"}) != first)
}

func TestALateReleaseDoesNotTakeAnEndpointsAddress(t *testing.T) {
	a, _ := newTestAllocator(t, "")
	p := mustPool(t, a, PoolRequest{Prefix: prefix("10.1.0.0/24")})
	_, err := a.Bind(p.ID, "n")
	assert.NilError(t, err)
	got := mustRequest(t, a, AddressRequest{Pool: p.ID})
	_, err = a.Attach(p.ID, got, "e")
	assert.NilError(t, err)

	_, kept := a.Release(p.ID, got)
	assert.Assert(t, kept)
	_, _, err = a.Request(AddressRequest{Pool: p.ID, Addr: got})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	_, kept = a.Detach(p.ID, got, "e")
	assert.Assert(t, !kept)
	assert.Equal(t, mustRequest(t, a, AddressRequest{Pool: p.ID, Addr: got}), got)
}
