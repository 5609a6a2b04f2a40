package ipam

import (
	"maps"
	"slices"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	"pgregory.net/rapid"
)

func TestTableAgreesWithAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s table
		m := make(map[num]uint32)
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
			"set": func(t *rapid.T) {
				n, v := at(t), uint32(rapid.IntRange(1, 9).Draw(t, "value"))
				s.set(n, v)
				m[n] = v
			},
			"remove": func(t *rapid.T) { n := at(t); s.remove(n); delete(m, n) },
			"get":    func(t *rapid.T) { n := at(t); checkEqual(t, s.get(n), m[n]) },
			"all": func(t *rapid.T) {
				got := slices.Sorted(s.all())
				want := slices.Sorted(maps.Values(m))
				if !slices.Equal(got, want) {
					t.Fatalf("got %v, want %v", got, want)
				}
			},
			"free": func(t *rapid.T) {
				first, last := at(t), at(t)
				if last.less(first) {
					first, last = last, first
				}
				want, ok := first, false
				for n := first; !ok && !last.less(n); n = n.next() {
					if want, ok = n, m[n] == 0; n == last {
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
	var s table
	first, last := number(addr("10.0.0.0")), number(addr("10.255.255.255"))
	for n := first; !last.less(n); n = n.next() {
		s.set(n, 1)
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
