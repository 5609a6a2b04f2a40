package ipam

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"
	"pgregory.net/rapid"
)

// A layout is pools on one ledger.
type layout struct {
	parent string
	// pools are prefix and range.
	pools   [][2]string
	exclude string
}

func layouts() []layout {
	return []layout{
		{pools: [][2]string{{"10.1.0.0/28", "10.1.0.0/28"}}},
		{pools: [][2]string{{"10.1.0.0/28", "10.1.0.8/29"}}},
		{pools: [][2]string{{"10.1.0.0/28", "10.1.0.0/28"}}, exclude: "10.1.0.1-10.1.0.3,10.1.0.7,10.1.0.15"},
		{pools: [][2]string{{"10.1.0.0/27", "10.1.0.0/30"}}, exclude: "10.1.0.2"},
		{pools: [][2]string{{"10.1.0.0/31", "10.1.0.0/31"}}},
		{pools: [][2]string{{"10.1.0.3/32", "10.1.0.3/32"}}},
		{pools: [][2]string{{"223.255.0.0/29", "223.255.0.4/30"}}},
		{pools: [][2]string{{"fd00::/124", "fd00::/124"}}, exclude: "fd00::4/126"},
		{pools: [][2]string{{"fd00::ffff:ffff:ffff:fff0/124", "fd00::ffff:ffff:ffff:fffc/126"}}},
		{pools: [][2]string{{"fd00::/127", "fd00::/127"}}},
		{parent: "eth1", pools: [][2]string{{"10.1.0.0/28", "10.1.0.0/28"}, {"10.1.0.0/28", "10.1.0.0/28"}}},
		{parent: "eth1", pools: [][2]string{{"10.1.0.0/28", "10.1.0.0/29"}, {"10.1.0.0/28", "10.1.0.8/29"}}},
		{parent: "eth1", pools: [][2]string{{"10.1.0.0/28", "10.1.0.4/31"}, {"10.1.0.0/28", "10.1.0.6/31"}}},
		{parent: "eth1", pools: [][2]string{{"10.1.0.0/28", "10.1.0.0/28"}, {"10.1.0.0/28", "10.1.0.4/30"}, {"10.1.0.0/29", "10.1.0.0/29"}}, exclude: "10.1.0.5"},
	}
}

// world is an allocator, its model and its record.
type world struct {
	t      *rapid.T
	clock  *clock
	a      *Allocator
	m      *model
	log    [][]byte
	random *rand.ChaCha8
}

func (w *world) newAllocator(record bool) *Allocator {
	cfg := Config{Now: w.clock.now, Random: w.random}
	if record {
		cfg.Record = func(e Event) { w.log = append(w.log, AppendEvent(nil, e)) }
	}
	return New(cfg)
}

func (w *world) addPool(l layout, i int) {
	exclude, err := ParseRanges(l.exclude)
	if l.exclude == "" {
		exclude, err = nil, nil
	}
	if err != nil {
		w.t.Fatal(err)
	}
	o := PoolOptions{
		Exclude: exclude, Conflict: ConflictRefuse, Parent: l.parent,
		Sticky:     rapid.IntRange(0, 3).Draw(w.t, "sticky") > 0,
		Quarantine: rapid.SampledFrom([]time.Duration{0, time.Minute, time.Hour}).Draw(w.t, "quarantine"),
	}
	p := &modelPool{prefix: prefix(l.pools[i][0]), rng: prefix(l.pools[i][1]), options: o}
	got, _, err := w.a.RequestPool(PoolRequest{Prefix: p.prefix, Range: p.rng, IPv6: p.prefix.Addr().Is6(), Options: o})
	if err != nil {
		w.t.Fatal(err)
	}
	p.id = got.ID
	w.m.pools = append(w.m.pools, p)
}

func (w *world) pool() *modelPool { return rapid.SampledFrom(w.m.pools).Draw(w.t, "pool") }

func (w *world) addr() netip.Addr {
	all := []netip.Addr{addr("192.0.2.1")}
	for _, p := range w.m.pools {
		all = append(all, every(p.prefix)...)
	}
	return rapid.SampledFrom(all).Draw(w.t, "address")
}

func (w *world) key() string {
	return rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(w.t, "key")
}

// request asks for an address and compares. hold is the two-phase kind.
func (w *world) request(role Role, want netip.Addr, hold bool) {
	p, key := w.pool(), w.key()
	probed := rapid.Bool().Draw(w.t, "probed")
	req := AddressRequest{Pool: p.id, Addr: want, Gateway: role == RoleGateway, Key: key, Probed: probed}
	age, at := w.m.tick(), w.clock.t
	w.m.expire()
	if role == RoleGateway {
		key = ""
	} else if want.IsValid() && !p.bound && key == "" {
		role = RoleReserved
	}
	expect, why := want, ""
	if want.IsValid() {
		why = w.m.why(p, want, role, key, probed)
	} else {
		var ok bool
		if expect, ok = w.m.pick(p, role, key); !ok {
			why = "exhausted"
		}
	}
	ask := w.a.Request
	if hold {
		ask = w.a.Hold
	}
	l, _, err := ask(req)
	if !w.agrees(why, err) {
		w.t.Fatalf("want %s %q, got %s, %v", expect, why, l.Addr, err)
	}
	if err != nil {
		return
	}
	if l.Addr != expect || l.Role != role {
		w.t.Fatalf("want %s for %s, got %s for %s", expect, role, l.Addr, l.Role)
	}
	if hold {
		w.m.get(l.Addr).pending = p
		if rapid.Bool().Draw(w.t, "another") {
			w.request(RoleEndpoint, netip.Addr{}, false)
		}
		w.m.get(l.Addr).pending = nil
		if rapid.Bool().Draw(w.t, "cancel") {
			if !w.a.Cancel(p.id, l.Addr) {
				w.t.Fatalf("%s was not held", l.Addr)
			}
			return
		}
		if _, err := w.a.Commit(p.id, l); err != nil {
			w.t.Fatal(err)
		}
	}
	w.m.lease(p, l.Addr, role, key, want.IsValid(), age)
	w.m.at[l.Addr].at = at
}

func (w *world) agrees(why string, err error) bool {
	switch why {
	case "":
		return err == nil
	case "invalid":
		return errdefs.IsInvalidArgument(err)
	case "not found":
		return errdefs.IsNotFound(err)
	case "exhausted":
		return errdefs.IsResourceExhausted(err)
	case "taken":
		_, ok := err.(*Taken) //nolint:errorlint // it is not wrapped
		return ok
	case "in use":
		_, ok := err.(*InUse) //nolint:errorlint // it is not wrapped
		return ok
	}
	return errdefs.IsConflict(err)
}

// replay makes an allocator of events.
func (w *world) replay(events [][]byte) *Allocator {
	b := w.newAllocator(false)
	for _, raw := range events {
		e, err := DecodeEvent(raw)
		if err != nil {
			w.t.Fatal(err)
		}
		if err := b.Apply(e); err != nil {
			w.t.Fatalf("%+v: %v", e, err)
		}
	}
	return b
}

func snapshot(a *Allocator) [][]byte {
	var out [][]byte
	for e := range a.Snapshot() {
		out = append(out, AppendEvent(nil, e))
	}
	return out
}

func TestAllocatorAgreesWithANaiveModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &clock{t: time.Unix(1_700_000_000, 0)}
		w := &world{t: t, clock: c, m: &model{clock: c, at: make(map[netip.Addr]*modelAddr)}, random: rand.NewChaCha8([32]byte{1})}
		w.a = w.newAllocator(true)
		l := rapid.SampledFrom(layouts()).Draw(t, "layout")
		for i := range l.pools {
			w.addPool(l, i)
		}
		endpoint := rapid.SampledFrom([]string{"e1", "e2", "e3"})
		restart := func(b *Allocator) {
			for _, p := range w.m.pools {
				got, _ := b.Pool(p.id)
				p.next = got.Next
			}
			// It goes on where the other one ended.
			b.cfg.Record = w.a.cfg.Record
			w.a = b
		}
		t.Repeat(map[string]func(*rapid.T){
			"request":         func(t *rapid.T) { w.t = t; w.request(RoleEndpoint, netip.Addr{}, false) },
			"hold":            func(t *rapid.T) { w.t = t; w.request(RoleEndpoint, netip.Addr{}, true) },
			"request by name": func(t *rapid.T) { w.t = t; w.request(RoleEndpoint, w.addr(), false) },
			"hold by name":    func(t *rapid.T) { w.t = t; w.request(RoleEndpoint, w.addr(), true) },
			"gateway":         func(t *rapid.T) { w.t = t; w.request(RoleGateway, netip.Addr{}, false) },
			"gateway by name": func(t *rapid.T) { w.t = t; w.request(RoleGateway, w.addr(), false) },
			"release": func(t *rapid.T) {
				w.t = t
				p, a := w.pool(), w.addr()
				w.a.Release(p.id, a)
				w.m.release(p, a)
			},
			"attach": func(t *rapid.T) {
				w.t = t
				p, a, ep := w.pool(), w.addr(), endpoint.Draw(t, "endpoint")
				x := w.m.get(a)
				refuse := !p.isHost(a) || x.kind == kindOutside || x.kind == kindLease && (x.pool != p || x.endpoint != "" && x.endpoint != ep)
				_, err := w.a.Attach(p.id, a, ep)
				if refuse != (err != nil) {
					t.Fatalf("attach %s, held %+v: got %v", a, x, err)
				}
				if err != nil {
					return
				}
				switch {
				case x.kind == kindReleased && x.pool == p:
					w.m.lease(p, a, RoleEndpoint, x.key, x.named, w.m.tick())
				case x.kind != kindLease:
					w.m.lease(p, a, RoleEndpoint, "", false, w.m.tick())
				}
				x = w.m.get(a)
				x.endpoint, x.late = ep, false
			},
			"detach": func(t *rapid.T) {
				w.t = t
				p, a, ep := w.pool(), w.addr(), endpoint.Draw(t, "endpoint")
				w.a.Detach(p.id, a, ep)
				x := w.m.get(a)
				switch {
				case x.kind != kindLease || x.pool != p || x.endpoint != ep:
				case x.late:
					w.m.bury(p, a, x.key, x.named)
				default:
					x.endpoint, x.age, x.at = "", w.m.tick(), c.t
				}
			},
			"reserve": func(t *rapid.T) {
				w.t = t
				p, a, key := w.pool(), w.addr(), w.key()
				if p.isHost(a) && key != "" {
					w.m.tick()
					w.m.expire()
				}
				x := w.m.get(a)
				why := ""
				switch {
				case !p.isHost(a) || key == "":
					why = "invalid"
				case x.reserved == key && x.reservedBy == p:
				case x.reserved != "":
					why = "reserved"
				case x.kind == kindOutside, x.kind == kindLease && (x.pool != p || x.key != "" && x.key != key):
					why = "taken"
				case !x.conflict.IsZero():
					why = "in use"
				}
				if err := w.a.Reserve(p.id, a, key); !w.agrees(why, err) {
					t.Fatalf("want %q, got %v", why, err)
				}
				if why == "" && x.reserved == "" {
					w.m.reserve(p, a, key)
				}
			},
			"unreserve": func(t *rapid.T) {
				w.t = t
				p, a := w.pool(), w.addr()
				x := w.m.get(a)
				if ok := w.a.Unreserve(p.id, a); ok != (x.reservedBy == p) {
					t.Fatalf("unreserve %s: %v", a, ok)
				}
				if x.reservedBy == p {
					w.m.unreserve(p, a)
				}
			},
			"forget": func(t *rapid.T) {
				w.t = t
				p, a := w.pool(), w.addr()
				w.m.tick()
				w.m.expire()
				why := w.m.whyNotForget(p, a)
				if _, err := w.a.Forget(p.id, a); !w.agrees(why, err) {
					t.Fatalf("forget %s: want %q, got %v", a, why, err)
				}
				if why == "" {
					w.m.forget(a)
				}
			},
			"conflict": func(t *rapid.T) {
				w.t = t
				p, a := w.pool(), w.addr()
				until := c.t.Add(time.Duration(rapid.IntRange(1, 40).Draw(t, "minutes")) * time.Minute)
				err := w.a.MarkConflict(p.id, Conflict{Addr: a, MAC: []byte{2, 0, 0, 0, 0, 1}, Until: until})
				if (err == nil) != p.prefix.Contains(a) {
					t.Fatal(err)
				}
				if err == nil {
					w.m.get(a).conflict = until
					w.m.get(a).conflictBy = p
				}
			},
			"clear conflict": func(t *rapid.T) {
				w.t = t
				p, a := w.pool(), w.addr()
				x := w.m.get(a)
				if ok := w.a.ClearConflict(p.id, a); ok == x.conflict.IsZero() {
					t.Fatalf("clear %s: %v", a, ok)
				} else if ok {
					w.m.clearConflict(a)
				}
			},
			"bind": func(t *rapid.T) {
				w.t = t
				p := w.pool()
				p.bound = rapid.Bool().Draw(t, "bound")
				network := ""
				if p.bound {
					network = "n"
				}
				if _, err := w.a.Bind(p.id, network); err != nil {
					t.Fatal(err)
				}
			},
			// A network changes the options of its pool before a container has had
			// anything of it.
			"configure": func(t *rapid.T) {
				w.t = t
				p := w.pool()
				if len(w.a.Tombstones(p.id)) > 0 {
					return
				}
				o := p.options
				o.Sticky = rapid.Bool().Draw(t, "sticky")
				o.Quarantine = rapid.SampledFrom([]time.Duration{0, time.Minute, time.Hour}).Draw(t, "quarantine")
				if rapid.Bool().Draw(t, "excluding") {
					a := w.addr()
					o.Exclude = []Range{{a, a}}
				}
				if _, err := w.a.Configure(p.id, o); err != nil {
					assert.ErrorContains(t, err, "it leaves no address")
					return
				}
				p.options = o
			},
			"new pool": func(t *rapid.T) {
				w.t = t
				if rapid.IntRange(0, 9).Draw(t, "often") > 0 {
					return
				}
				p := w.pool()
				if !w.a.ReleasePool(p.id) {
					t.Fatalf("no pool %s", p.id)
				}
				w.m.end(p)
				at := slices.IndexFunc(l.pools, func(x [2]string) bool { return prefix(x[0]) == p.prefix && prefix(x[1]) == p.rng })
				w.addPool(l, at)
			},
			"wait": func(t *rapid.T) {
				c.t = c.t.Add(time.Duration(rapid.IntRange(1, 11).Draw(t, "minutes")) * time.Minute)
			},
			"peek": func(t *rapid.T) {
				w.t = t
				p := w.pool()
				before := w.a.pools[p.id].Next
				addrs := w.a.Peek(p.id, 3)
				w.m.tick()
				w.m.expire()
				next := p.next
				for _, got := range addrs {
					want, ok := w.m.pick(p, RoleEndpoint, "")
					if !ok || want != got {
						t.Fatalf("peeked %s, want %s", got, want)
					}
					w.m.get(got).pending = p
				}
				for _, got := range addrs {
					w.m.get(got).pending = nil
				}
				p.next = next
				assert.Assert(t, cmp.Equal(w.a.pools[p.id].Next, before))
			},
			"restart":              func(t *rapid.T) { w.t = t; restart(w.replay(w.log)) },
			"restart from a short": func(t *rapid.T) { w.t = t; w.log = snapshot(w.a); restart(w.replay(w.log)) },
			"": func(t *rapid.T) {
				w.t = t
				if want, got := w.m.String(), state(w.a); want != got {
					t.Fatalf("model:\n%s\nallocator:\n%s", want, got)
				}
				for _, p := range w.m.pools {
					if want, got := w.m.states(p), states(w.a, p.id); want != got {
						t.Fatalf("model of %s:\n%s\nallocator:\n%s", p.id, want, got)
					}
					if want, got := w.m.stats(p), must(w.a.Stats(p.id)); want != got {
						t.Fatalf("model of %s: %+v\nallocator: %+v", p.id, want, got)
					}
				}
				again := w.replay(snapshot(w.a))
				if !slices.EqualFunc(snapshot(again), snapshot(w.a), bytes.Equal) {
					t.Fatalf("a snapshot is not of the same state")
				}
				checkLists(t, w.a)
			},
		})
	})
}

// checkLists looks through everything that the allocator believes of its lists.
func checkLists(t *rapid.T, a *Allocator) {
	if len(a.pending) > 0 {
		t.Fatalf("pending: %v", a.pending)
	}
	check := func(l *list, where place) {
		count, keyed := 0, 0
		for i, prev := l.head, uint32(0); i != 0; i, prev = a.entries.at(i).next, i {
			e := a.entries.at(i)
			if e.prev != prev || e.list != where || prev != 0 && !a.entries.older(prev, i) {
				t.Fatalf("entry %d %+v after %d", i, e, prev)
			}
			if count++; e.key != "" {
				keyed++
			}
		}
		if count != l.count || keyed != l.keyed {
			t.Fatalf("%d entries, %d with a key: the list says %d, %d", count, keyed, l.count, l.keyed)
		}
	}
	for _, p := range a.pools {
		check(&p.loose, inLoose)
		held := 0
		for i := range p.led.table.all() {
			e := a.entries.at(i)
			if e.kind == kindLease && e.pool == p.no {
				held++
			}
			if e.kind == kindNone && e.marks == 0 {
				t.Fatalf("entry of %s says nothing", e.addr.addr(p.led.is4))
			}
		}
		if held != p.held {
			t.Fatalf("%d held, pool says %d", held, p.held)
		}
		for _, r := range p.led.ranges {
			check(&r.free, inFree)
			check(&r.pinned, inPinned)
		}
	}
}
