package ipam

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// now is the machine's clock, whose cost is part of what is measured.
func newClockAllocator(t testing.TB, supernets string, record func(Event)) *Allocator {
	t.Helper()
	a, _ := newTestAllocator(t, supernets)
	a.cfg.Now, a.cfg.Record = time.Now, record
	return a
}

// fill leases n addresses of a pool, with keys if the engine sends names.
func fill(t testing.TB, a *Allocator, pool string, n int, key func(i int) string) []netip.Addr {
	t.Helper()
	addrs := make([]netip.Addr, n)
	for i := range addrs {
		req := AddressRequest{Pool: pool}
		if key != nil {
			req.Key = key(i)
		}
		addrs[i] = mustRequest(t, a, req)
	}
	return addrs
}

// Docker's own allocator takes 1.15 us for a pair beside 60,000 addresses.
func BenchmarkRequestAndRelease(b *testing.B) {
	for _, tc := range []struct {
		pool string
		held int
	}{
		{"10.1.0.0/16", 0}, {"10.1.0.0/16", 60000}, {"10.1.0.0/16", 64900}, {"10.1.0.0/16", 65533},
		{"10.0.0.0/8", 0}, {"10.0.0.0/8", 60000}, {"fd00::/64", 0}, {"fd00::/64", 60000},
	} {
		for _, key := range []string{"", "web"} {
			b.Run(fmt.Sprintf("%s/held=%d/key=%s", tc.pool, tc.held, key), func(b *testing.B) {
				events := 0
				a := newClockAllocator(b, "", func(Event) { events++ })
				pool := mustPool(b, a, PoolRequest{Prefix: prefix(tc.pool)})
				fill(b, a, pool.ID, tc.held, nil)
				b.ReportAllocs()
				for b.Loop() {
					l, _, err := a.Request(AddressRequest{Pool: pool.ID, Key: key})
					if err != nil {
						b.Fatal(err)
					}
					a.Release(pool.ID, l.Addr)
				}
			})
		}
	}
}

// Every address was used before, as after a week.
func BenchmarkRequestAndReleaseInAnOldPool(b *testing.B) {
	a := newClockAllocator(b, "", nil)
	pool := mustPool(b, a, PoolRequest{Prefix: prefix("10.1.0.0/16")})
	for _, addr := range fill(b, a, pool.ID, 65534, nil)[60000:] {
		a.Release(pool.ID, addr)
	}
	for b.Loop() {
		l, _, err := a.Request(AddressRequest{Pool: pool.ID})
		if err != nil {
			b.Fatal(err)
		}
		a.Release(pool.ID, l.Addr)
	}
}

func BenchmarkHoldAndCommit(b *testing.B) {
	a := newClockAllocator(b, "", nil)
	pool := mustPool(b, a, PoolRequest{Prefix: prefix("10.1.0.0/16")})
	fill(b, a, pool.ID, 60000, nil)
	for b.Loop() {
		l, _, err := a.Hold(AddressRequest{Pool: pool.ID})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := a.Commit(pool.ID, l); err != nil {
			b.Fatal(err)
		}
		a.Release(pool.ID, l.Addr)
	}
}

func BenchmarkSearchInFullSlash8(b *testing.B) {
	var s table
	first, last := number(addr("10.0.0.0")), number(addr("10.255.255.255"))
	for n := first; !last.less(n); n = n.next() {
		s.set(n, 1)
	}
	for b.Loop() {
		s.free(first, last)
	}
}

func BenchmarkRequestPoolWithManyPools(b *testing.B) {
	for _, n := range []int{10, 1000, 4000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			a, _ := newTestAllocator(b, "10.208.0.0/12:24")
			for range n {
				mustPool(b, a, PoolRequest{})
			}
			for b.Loop() {
				p := mustPool(b, a, PoolRequest{})
				a.ReleasePool(p.ID)
			}
		})
	}
}

// record returns the encoded events that made n leases.
func record(t testing.TB, n int) [][]byte {
	var log [][]byte
	a := newClockAllocator(t, "", func(e Event) { log = append(log, AppendEvent(nil, e)) })
	pool := mustPool(t, a, PoolRequest{Prefix: prefix("10.0.0.0/12")})
	_, err := a.Bind(pool.ID, "0123456789abcdef")
	assert.NilError(t, err)
	fill(t, a, pool.ID, n, func(i int) string { return fmt.Sprintf("container-%d", i) })
	return log
}

func replay(t testing.TB, log [][]byte) *Allocator {
	t.Helper()
	a := newClockAllocator(t, "", nil)
	for _, raw := range log {
		e, err := DecodeEvent(raw)
		assert.NilError(t, err)
		assert.NilError(t, a.Apply(e))
	}
	return a
}

func BenchmarkReplayOf100000Leases(b *testing.B) {
	log := record(b, 100000)
	size := 0
	for _, raw := range log {
		size += len(raw)
	}
	b.ReportMetric(float64(size)/float64(len(log)), "bytes/event")
	for b.Loop() {
		replay(b, log)
	}
}

// A lease takes the bytes of what it says and less than 40 more.
func TestMemoryOfALease(t *testing.T) {
	const n = 100000
	// What is said: the address and time of 16 and 8 bytes, the key's header,
	// the pool, the endpoint, the kind and marks.
	const said = 16 + 8 + 16 + 4 + 4 + 2
	for _, key := range []func(int) string{nil, func(i int) string { return fmt.Sprintf("container-%06d", i) }} {
		keyBytes := 0
		if key != nil {
			keyBytes = 16
		}
		a := newClockAllocator(t, "", nil)
		pool := mustPool(t, a, PoolRequest{Prefix: prefix("10.0.0.0/12")})
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		for i := range n {
			req := AddressRequest{Pool: pool.ID}
			if key != nil {
				req.Key = key(i)
			}
			mustRequest(t, a, req)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		each := float64(after.HeapAlloc-before.HeapAlloc)/n - float64(keyBytes)
		t.Logf("a lease with a key of %d bytes takes %.1f bytes beside it, %.1f over the %d that it says", keyBytes, each, each-said, said)
		assert.Assert(t, each-said < 40)
		runtime.KeepAlive(a)
	}
}
