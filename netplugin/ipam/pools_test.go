package ipam

import (
	"bytes"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"pgregory.net/rapid"
)

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
