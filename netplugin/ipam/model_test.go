package ipam

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"
	"pgregory.net/rapid"
)

// model is the allocator without any cleverness: every address of a small pool,
// and who has it.
type model struct {
	pool, rng netip.Prefix
	bound     bool
	held      map[netip.Addr]Lease
}

func (m *model) every() []netip.Addr {
	var all []netip.Addr
	for a := m.pool.Addr(); m.pool.Contains(a); a = a.Next() {
		all = append(all, a)
	}
	return all
}

// isHost counts on its fingers where IsHost calculates.
func (m *model) isHost(a netip.Addr) bool {
	all := m.every()
	if len(all) <= 2 {
		return true
	}
	if a == all[0] {
		return false
	}
	return a.Is6() || a != all[len(all)-1]
}

func (m *model) forgotten(l Lease, now time.Time) bool {
	return m.bound && l.Role == RoleEndpoint && l.Endpoint == "" && now.Sub(l.Since) >= ForgetAfter
}

// free are the addresses an automatic request may get, in two classes.
func (m *model) free(now time.Time) (never, forgotten []netip.Addr) {
	for _, a := range m.every() {
		l, held := m.held[a]
		switch {
		case !m.rng.Contains(a) || !m.isHost(a):
		case !held:
			never = append(never, a)
		case m.forgotten(l, now):
			forgotten = append(forgotten, a)
		}
	}
	return never, forgotten
}

func TestAllocatorAgreesWithANaiveModel(t *testing.T) {
	pools := []struct{ pool, rng string }{
		{"10.1.0.0/28", "10.1.0.0/28"},
		{"10.1.0.0/28", "10.1.0.8/29"},
		{"10.1.0.0/27", "10.1.0.0/30"},
		{"10.1.0.0/31", "10.1.0.0/31"},
		{"10.1.0.3/32", "10.1.0.3/32"},
		{"255.255.0.0/29", "255.255.0.4/30"},
		{"fd00::/124", "fd00::/124"},
		{"fd00::ffff:ffff:ffff:fff0/124", "fd00::ffff:ffff:ffff:fffc/126"},
		{"fd00::/127", "fd00::/127"},
	}
	rapid.Check(t, func(t *rapid.T) {
		c := &clock{t: time.Unix(1_700_000_000, 0)}
		pick := rapid.SampledFrom(pools).Draw(t, "pool")
		pool, rng := netip.MustParsePrefix(pick.pool), netip.MustParsePrefix(pick.rng)
		newAllocator := func() *Allocator {
			return New(Config{Now: c.now, Random: bytes.NewReader(make([]byte, 1<<10))})
		}
		a := newAllocator()
		stored := Pool{ID: "p", Prefix: pool, Range: rng, Since: c.t}
		if err := a.Restore(stored, nil); err != nil {
			t.Fatal(err)
		}
		m := &model{pool: pool, rng: rng, held: make(map[netip.Addr]Lease)}
		anyAddr := rapid.SampledFrom(append(m.every(), netip.MustParseAddr("192.0.2.1")))
		endpoint := rapid.SampledFrom([]string{"e1", "e2", "e3"})

		t.Repeat(map[string]func(*rapid.T){
			"request": func(t *rapid.T) {
				never, forgotten := m.free(c.t)
				l, p, err := a.Request(AddressRequest{Pool: "p"})
				stored = p
				switch {
				case len(never)+len(forgotten) == 0:
					if !errdefs.IsResourceExhausted(err) {
						t.Fatalf("nothing is free, got %v, %v", l, err)
					}
					stored, _ = a.Pool("p")
					return
				case err != nil:
					t.Fatalf("%v are free, got %v", append(never, forgotten...), err)
				case len(never) > 0 && !slices.Contains(never, l.Addr):
					t.Fatalf("%v are free, got %s", never, l.Addr)
				case len(never) == 0 && !slices.Contains(forgotten, l.Addr):
					t.Fatalf("%v are forgotten, got %s", forgotten, l.Addr)
				}
				m.held[l.Addr] = l
			},
			"request by name": func(t *rapid.T) {
				want := anyAddr.Draw(t, "address")
				l, p, err := a.Request(AddressRequest{Pool: "p", Addr: want})
				held, taken := m.held[want]
				switch {
				case !pool.Contains(want) || !m.isHost(want):
					if !errdefs.IsInvalidArgument(err) {
						t.Fatalf("%s is no host of the pool, got %v, %v", want, l, err)
					}
				case taken && !m.forgotten(held, c.t):
					if !errdefs.IsConflict(err) {
						t.Fatalf("%s is in use, got %v, %v", want, l, err)
					}
				case err != nil || l.Addr != want:
					t.Fatalf("%s is free, got %v, %v", want, l, err)
				default:
					stored = p
					m.held[want] = l
				}
			},
			"gateway": func(t *rapid.T) {
				l, p, err := a.Request(AddressRequest{Pool: "p", Gateway: true})
				if err != nil {
					return
				}
				held, taken := m.held[l.Addr]
				if taken && !m.forgotten(held, c.t) || !pool.Contains(l.Addr) || !m.isHost(l.Addr) {
					t.Fatalf("gateway %s is no free host of the pool", l.Addr)
				}
				stored = p
				m.held[l.Addr] = l
			},
			"release": func(t *rapid.T) {
				addr := anyAddr.Draw(t, "address")
				a.Release("p", addr)
				if l, ok := m.held[addr]; ok && l.Endpoint != "" {
					l.Released = true
					m.held[addr] = l
				} else {
					delete(m.held, addr)
				}
			},
			"attach": func(t *rapid.T) {
				addr, ep := anyAddr.Draw(t, "address"), endpoint.Draw(t, "endpoint")
				l, err := a.Attach("p", addr, ep)
				held, taken := m.held[addr]
				refuse := !pool.Contains(addr) || !m.isHost(addr) || taken && (held.Role != RoleEndpoint || held.Endpoint != "" && held.Endpoint != ep)
				if refuse != (err != nil) {
					t.Fatalf("attach %s, held %v: got %v", addr, held, err)
				}
				if err == nil {
					m.held[addr] = l
				}
			},
			"detach": func(t *rapid.T) {
				addr, ep := anyAddr.Draw(t, "address"), endpoint.Draw(t, "endpoint")
				a.Detach("p", addr, ep)
				l, ok := m.held[addr]
				switch {
				case !ok || l.Endpoint != ep:
				case l.Released:
					delete(m.held, addr)
				default:
					l.Endpoint, l.Since = "", c.t
					m.held[addr] = l
				}
			},
			"bind": func(t *rapid.T) {
				var err error
				if stored, err = a.Bind("p", "n"); err != nil {
					t.Fatal(err)
				}
				m.bound = true
			},
			"wait": func(t *rapid.T) {
				c.t = c.t.Add(time.Duration(rapid.IntRange(1, 11).Draw(t, "minutes")) * time.Minute)
			},
			"restart": func(t *rapid.T) {
				leases := a.Leases("p")
				a = newAllocator()
				if err := a.Restore(stored, leases); err != nil {
					t.Fatal(err)
				}
			},
			"": func(t *rapid.T) {
				want := slices.SortedFunc(maps.Values(m.held), func(x, y Lease) int { return x.Addr.Compare(y.Addr) })
				got := a.Leases("p")
				if len(want) == 0 && len(got) == 0 {
					return
				}
				equal := cmp.Comparer(func(x, y netip.Addr) bool { return x == y })
				if diff := cmp.Diff(want, got, equal); diff != "" {
					t.Fatalf("leases (-model +allocator):\n%s", diff)
				}
			},
		})
	})
}

// Pools of any requests never overlap, whatever is asked and released.
func TestPoolsNeverOverlap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &clock{t: time.Unix(1_700_000_000, 0)}
		supernets, err := ParseSupernets("10.0.0.0/26:28,10.0.1.0/28:29,10.0.2.0/29:30")
		if err != nil {
			t.Fatal(err)
		}
		a := New(Config{Supernets: supernets, Now: c.now, Random: bytes.NewReader(pattern(1 << 14))})
		any4 := rapid.Custom(func(t *rapid.T) netip.Prefix {
			a := netip.AddrFrom4([4]byte{10, 0, rapid.Byte().Draw(t, "c") % 3, rapid.Byte().Draw(t, "d")})
			return netip.PrefixFrom(a, rapid.IntRange(22, 32).Draw(t, "bits")).Masked()
		})
		held := make(map[string]netip.Prefix)
		t.Repeat(map[string]func(*rapid.T){
			"automatic": func(t *rapid.T) {
				busy := rapid.SliceOfN(any4, 0, 3).Draw(t, "busy")
				p, _, err := a.RequestPool(PoolRequest{Busy: busy})
				if err != nil {
					if !errdefs.IsResourceExhausted(err) {
						t.Fatal(err)
					}
					for _, s := range supernets {
						if f, ok := bruteForce(s, busy, held); ok {
							t.Fatalf("%s is free, got %v", f, err)
						}
					}
					return
				}
				for _, b := range busy {
					if p.Prefix.Overlaps(b) {
						t.Fatalf("%s overlaps busy %s", p.Prefix, b)
					}
				}
				held[p.ID] = p.Prefix
			},
			"explicit": func(t *rapid.T) {
				p, _, err := a.RequestPool(PoolRequest{Prefix: any4.Draw(t, "subnet")})
				if err == nil {
					held[p.ID] = p.Prefix
				}
			},
			"release": func(t *rapid.T) {
				if len(held) == 0 {
					return
				}
				id := rapid.SampledFrom(slices.Sorted(maps.Keys(held))).Draw(t, "pool")
				if !a.ReleasePool(id) {
					t.Fatalf("pool %s is unknown", id)
				}
				delete(held, id)
			},
			"": func(t *rapid.T) {
				ids := slices.Sorted(maps.Keys(held))
				for i, x := range ids {
					for _, y := range ids[:i] {
						if held[x].Overlaps(held[y]) {
							t.Fatalf("%s and %s overlap", held[x], held[y])
						}
					}
				}
			},
		})
	})
}

func bruteForce(s Supernet, busy []netip.Prefix, held map[string]netip.Prefix) (netip.Prefix, bool) {
	for addr := s.Prefix.Addr(); s.Prefix.Contains(addr); {
		p := netip.PrefixFrom(addr, s.Size)
		overlaps := func(q netip.Prefix) bool { return q.Overlaps(p) }
		if !slices.ContainsFunc(busy, overlaps) && !slices.ContainsFunc(slices.Collect(maps.Values(held)), overlaps) {
			return p, true
		}
		addr = lastAddr(p).Next()
	}
	return netip.Prefix{}, false
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i ^ i>>8)
	}
	return b
}

func TestSetAgreesWithAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, m := newSet(), make(map[num]bool)
		base := rapid.SampledFrom([]num{{}, {lo: 1<<32 - 20}, {hi: 7, lo: ^uint64(0) - 10}, {hi: ^uint64(0), lo: ^uint64(0) - 5000}}).Draw(t, "base")
		at := func(t *rapid.T) num {
			n := base
			for range rapid.IntRange(0, 40).Draw(t, "offset") {
				if n.next() == (num{}) {
					break
				}
				n = n.next()
			}
			return n
		}
		t.Repeat(map[string]func(*rapid.T){
			"add":    func(t *rapid.T) { n := at(t); checkEqual(t, s.add(n), !m[n]); m[n] = true },
			"remove": func(t *rapid.T) { n := at(t); checkEqual(t, s.remove(n), m[n]); delete(m, n) },
			"has":    func(t *rapid.T) { n := at(t); checkEqual(t, s.has(n), m[n]) },
			"free": func(t *rapid.T) {
				first, last := at(t), at(t)
				if last.less(first) {
					first, last = last, first
				}
				want, ok := first, false
				for n := first; !ok && !last.less(n); n = n.next() {
					if want, ok = n, !m[n]; n == last {
						break
					}
				}
				got, gotOK := s.free(first, last)
				checkEqual(t, gotOK, ok)
				if ok {
					checkEqual(t, got, want)
				}
			},
		})
	})
}

func checkEqual[T comparable](t *rapid.T, got, want T) {
	t.Helper()
	if got != want {
		t.Fatalf("got %v, want %v", got, want)
	}
}

func TestFullSlash8IsLookedThroughQuickly(t *testing.T) {
	s := newSet()
	first, last := number(addr("10.0.0.0")), number(addr("10.255.255.255"))
	for n := first; !last.less(n); n = n.next() {
		s.add(n)
	}
	_, ok := s.free(first, last)
	assert.Assert(t, !ok)
	s.remove(number(addr("10.200.1.2")))
	got, ok := s.free(first, last)
	assert.Assert(t, ok)
	assert.Equal(t, got.addr(true), addr("10.200.1.2"))
	start := time.Now()
	for range 100 {
		s.free(first, last)
	}
	assert.Assert(t, time.Since(start) < 2*time.Second, "100 searches took %v", time.Since(start))
}

func BenchmarkRequest(b *testing.B) {
	for _, p := range []string{"10.0.0.0/8", "10.1.0.0/16", "fd00::/64"} {
		b.Run(p, func(b *testing.B) {
			a, _ := newTestAllocator(b, "")
			pool := mustPool(b, a, PoolRequest{Prefix: prefix(p)})
			for b.Loop() {
				l, _, err := a.Request(AddressRequest{Pool: pool.ID})
				if err != nil {
					b.Fatal(err)
				}
				a.Release(pool.ID, l.Addr)
			}
		})
	}
}

func BenchmarkSearchInFullSlash8(b *testing.B) {
	s := newSet()
	first, last := number(addr("10.0.0.0")), number(addr("10.255.255.255"))
	for n := first; !last.less(n); n = n.next() {
		s.add(n)
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
