package ipam

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// model is the allocator without any cleverness: it looks through all addresses
// each time.
type model struct {
	clock *clock
	pools []*modelPool
	at    map[netip.Addr]*modelAddr
	age   int
}

type modelPool struct {
	id          string
	prefix, rng netip.Prefix
	options     PoolOptions
	bound       bool
	next        netip.Addr
}

// modelAddr is what is known of one address. Ages count up; at is the clock's
// time.
type modelAddr struct {
	kind     kind
	pool     *modelPool
	key      string
	named    bool
	endpoint string
	late     bool
	age      int
	at       time.Time
	outside  map[*modelPool]Role

	reservedBy *modelPool
	reserved   string
	conflict   time.Time
	conflictBy *modelPool
	pending    *modelPool
}

func (m *model) tick() int { m.age++; return m.age }

func (m *model) get(a netip.Addr) *modelAddr {
	if m.at[a] == nil {
		m.at[a] = &modelAddr{}
	}
	return m.at[a]
}

// tidy drops addresses of which nothing is known.
func (m *model) tidy() {
	maps.DeleteFunc(m.at, func(_ netip.Addr, x *modelAddr) bool {
		return x.kind == kindNone && x.reserved == "" && x.conflict.IsZero() && x.pending == nil
	})
}

func every(p netip.Prefix) []netip.Addr {
	var all []netip.Addr
	for a := p.Addr(); p.Contains(a); a = a.Next() {
		all = append(all, a)
	}
	return all
}

// isHost counts on its fingers where IsHost calculates.
func (p *modelPool) isHost(a netip.Addr) bool {
	all := every(p.prefix)
	if len(all) <= 2 {
		return slices.Contains(all, a)
	}
	return slices.Contains(all[1:], a) && (a.Is6() || a != all[len(all)-1])
}

func (p *modelPool) excluded(a netip.Addr) bool {
	return slices.ContainsFunc(p.options.Exclude, func(r Range) bool { return !a.Less(r.First) && !r.Last.Less(a) })
}

func (p *modelPool) automatic(a netip.Addr) bool {
	return p.rng.Contains(a) && p.isHost(a) && !p.excluded(a)
}

func (m *model) loose(x *modelAddr) bool {
	return x.kind == kindLease && x.endpoint == "" && x.pool.bound
}

func (m *model) forgotten(x *modelAddr) bool {
	return m.loose(x) && m.clock.t.Sub(x.at) >= ForgetAfter
}

// expire ends conflicts, the first that is over first.
func (m *model) expire() {
	over := m.where(func(_ netip.Addr, x *modelAddr) bool { return !x.conflict.IsZero() && !m.clock.t.Before(x.conflict) })
	slices.SortStableFunc(over, func(a, b netip.Addr) int { return m.at[a].conflict.Compare(m.at[b].conflict) })
	for _, a := range over {
		m.clearConflict(a)
	}
}

func (m *model) clearConflict(a netip.Addr) {
	x := m.at[a]
	x.conflict, x.conflictBy = time.Time{}, nil
	m.again(x)
}

// again makes a released address one that was released now, after a mark went.
func (m *model) again(x *modelAddr) {
	age := m.tick()
	if x.kind == kindReleased {
		x.age, x.at = age, m.clock.t
	}
}

// where returns the known addresses that match, sorted.
func (m *model) where(match func(netip.Addr, *modelAddr) bool) []netip.Addr {
	var list []netip.Addr
	for a, x := range m.at {
		if match(a, x) {
			list = append(list, a)
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return list
}

// oldest returns that of the known addresses that match.
func (m *model) oldest(match func(netip.Addr, *modelAddr) bool) (netip.Addr, bool) {
	list := m.where(match)
	slices.SortStableFunc(list, func(a, b netip.Addr) int { return m.at[a].age - m.at[b].age })
	if len(list) == 0 {
		return netip.Addr{}, false
	}
	return list[0], true
}

// why says why an address that is named cannot be had, "" if it can.
func (m *model) why(p *modelPool, a netip.Addr, role Role, key string, probed bool) string {
	if !p.isHost(a) {
		return "invalid"
	}
	x := m.get(a)
	switch {
	case x.pending != nil:
		return "taken"
	case x.kind == kindLease && !m.forgotten(x) &&
		(x.pool != p || !m.loose(x) || role != RoleEndpoint || key == "" || x.key != key):
		return "taken"
	case x.kind == kindOutside:
		own, held := x.outside[p]
		again := held && own == RoleGateway && role == RoleGateway && !p.bound
		shared := !held && role != RoleEndpoint && p.options.Parent != ""
		if !again && !shared {
			return "taken"
		}
	}
	if role == RoleEndpoint {
		if x.reserved != "" && key != "" && x.reserved != key {
			return "reserved"
		}
		if !x.conflict.IsZero() && !probed {
			return "in use"
		}
	}
	return ""
}

// pick is the address for one who wants any; ok is false when there is none.
func (m *model) pick(p *modelPool, role Role, key string) (_ netip.Addr, ok bool) {
	if role == RoleGateway {
		for _, a := range every(p.prefix) {
			if !p.isHost(a) || p.excluded(a) {
				continue
			}
			if m.why(p, a, RoleGateway, "", true) == "" && m.get(a).reserved == "" {
				return a, true
			}
			break
		}
	} else if a, ok := m.own(p, key); ok {
		return a, true
	}
	m.tidy()
	var before, after []netip.Addr
	for _, a := range every(p.prefix) {
		if m.at[a] == nil && p.automatic(a) {
			if a.Less(p.next) {
				before = append(before, a)
			} else {
				after = append(after, a)
			}
		}
	}
	if never := slices.Concat(after, before); len(never) > 0 {
		p.next = never[0].Next()
		return never[0], true
	}
	marked := func(x *modelAddr) bool { return x.reserved != "" || !x.conflict.IsZero() || x.pending != nil }
	released := func(named bool) func(netip.Addr, *modelAddr) bool {
		return func(a netip.Addr, x *modelAddr) bool {
			return x.kind == kindReleased && x.named == named && p.automatic(a) && !marked(x)
		}
	}
	first, ok := m.oldest(released(false))
	if ok && m.clock.t.Sub(m.at[first].at) >= p.options.Quarantine {
		return first, true
	}
	forgotten, any := m.oldest(func(a netip.Addr, x *modelAddr) bool {
		return m.forgotten(x) && x.pool == p && p.automatic(a) && !marked(x)
	})
	switch {
	case any:
		return forgotten, true
	case ok:
		return first, true
	}
	return m.oldest(released(true))
}

// own is the address that is the key's.
func (m *model) own(p *modelPool, key string) (netip.Addr, bool) {
	if key == "" {
		return netip.Addr{}, false
	}
	mine := func(x *modelAddr) bool {
		return x.pool == p && x.key == key && x.pending == nil && x.conflict.IsZero()
	}
	if list := m.where(func(_ netip.Addr, x *modelAddr) bool { return m.loose(x) && mine(x) }); len(list) > 0 {
		return list[0], true
	}
	if p.options.Sticky {
		list := m.where(func(a netip.Addr, x *modelAddr) bool {
			return x.kind == kindReleased && mine(x) && (x.reserved == key || x.reserved == "" && p.automatic(a))
		})
		if len(list) > 0 {
			return list[0], true
		}
	}
	list := m.where(func(a netip.Addr, x *modelAddr) bool {
		return x.reserved == key && x.reservedBy == p && m.why(p, a, RoleEndpoint, key, false) == ""
	})
	if len(list) > 0 {
		return list[0], true
	}
	return netip.Addr{}, false
}

// lease gives an address away.
func (m *model) lease(p *modelPool, a netip.Addr, role Role, key string, named bool, age int) {
	x := m.get(a)
	if role != RoleEndpoint {
		if x.kind != kindOutside {
			*x = modelAddr{reserved: x.reserved, reservedBy: x.reservedBy, conflict: x.conflict, conflictBy: x.conflictBy, kind: kindOutside, outside: make(map[*modelPool]Role)}
		}
		x.outside[p] = role
		x.age = age
		return
	}
	if x.kind == kindLease && x.pool == p && x.key == key && key != "" {
		named = named || x.named
	}
	*x = modelAddr{
		kind: kindLease, pool: p, key: key, named: named, age: age, at: m.clock.t,
		reserved: x.reserved, reservedBy: x.reservedBy, conflict: x.conflict, conflictBy: x.conflictBy,
	}
}

// release ends what the pool has.
func (m *model) release(p *modelPool, a netip.Addr) {
	x := m.get(a)
	switch {
	case x.kind == kindLease && x.pool == p && x.endpoint != "":
		x.late = true
	case x.kind == kindLease && x.pool == p:
		m.bury(p, a, x.key, x.named)
	case x.kind == kindOutside:
		if _, ok := x.outside[p]; !ok {
			return
		}
		if delete(x.outside, p); len(x.outside) == 0 {
			m.bury(p, a, "", false)
		}
	}
}

func (m *model) bury(p *modelPool, a netip.Addr, key string, named bool) {
	x := m.get(a)
	age := m.tick()
	kept := m.where(func(_ netip.Addr, y *modelAddr) bool { return y.reserved == key && y.reservedBy == p })
	if !p.options.Sticky || len(kept) > 0 && !slices.Contains(kept, a) || x.reserved != "" && x.reserved != key {
		key = ""
	}
	*x = modelAddr{reserved: x.reserved, reservedBy: x.reservedBy, conflict: x.conflict, conflictBy: x.conflictBy, pending: x.pending}
	if p.excluded(a) || !slices.ContainsFunc(m.pools, func(q *modelPool) bool { return q.rng.Contains(a) }) {
		return
	}
	for _, b := range m.where(func(_ netip.Addr, y *modelAddr) bool {
		return key != "" && y.kind == kindReleased && y.pool == p && y.key == key
	}) {
		m.unkey(m.at[b], age)
	}
	x.kind, x.pool, x.key, x.named, x.age, x.at = kindReleased, p, key, named && key != "", age, m.clock.t
}

func (m *model) unkey(x *modelAddr, age int) {
	if x.key = ""; x.named {
		x.named, x.age, x.at = false, age, m.clock.t
	}
}

func (m *model) reserve(p *modelPool, a netip.Addr, key string) {
	age := m.tick()
	x := m.get(a)
	x.reserved, x.reservedBy = key, p
	for _, y := range m.at {
		if y.kind == kindReleased && y.pool == p && y.key == key && (y.reserved != key || y.reservedBy != p) {
			m.unkey(y, age)
		}
	}
	if x.kind == kindReleased && (x.key != key || x.pool != p) {
		m.unkey(x, age)
	}
}

func (m *model) unreserve(p *modelPool, a netip.Addr) {
	x := m.get(a)
	key := x.reserved
	x.reserved, x.reservedBy = "", nil
	others := m.where(func(_ netip.Addr, y *modelAddr) bool { return y.reserved == key && y.reservedBy == p })
	if x.kind == kindReleased && x.pool == p && x.key == key && len(others) > 0 {
		x.key, x.named = "", false
	}
	m.again(x)
}

// end releases a pool.
func (m *model) end(p *modelPool) {
	m.pools = slices.DeleteFunc(m.pools, func(q *modelPool) bool { return q == p })
	for a, x := range m.at {
		if x.reservedBy == p {
			x.reserved, x.reservedBy = "", nil
		}
		if x.conflictBy == p {
			x.conflict, x.conflictBy = time.Time{}, nil
		}
		if delete(x.outside, p); x.kind == kindOutside && len(x.outside) == 0 {
			x.kind = kindNone
		}
		homeless := x.kind == kindReleased && !slices.ContainsFunc(m.pools, func(q *modelPool) bool { return q.rng.Contains(a) })
		if x.kind != kindOutside && x.pool == p || homeless {
			x.kind, x.pool, x.key, x.named, x.endpoint, x.late = kindNone, nil, "", false, "", false
		}
	}
	m.tidy()
}

// String is the state of all pools but for rotation.
func (m *model) String() string {
	m.tidy()
	var out []string
	for a, x := range m.at {
		line := ""
		switch x.kind {
		case kindLease:
			line += fmt.Sprintf(" lease %s key=%s named=%v ep=%s late=%v", x.pool.id, x.key, x.named, x.endpoint, x.late)
		case kindReleased:
			line += fmt.Sprintf(" released %s key=%s named=%v", x.pool.id, x.key, x.named)
		case kindOutside:
			var list []string
			for p, role := range x.outside {
				list = append(list, fmt.Sprintf(" %s %s", role, p.id))
			}
			slices.Sort(list)
			line += fmt.Sprint(list)
		case kindNone:
		}
		if x.reserved != "" {
			line += fmt.Sprintf(" reserved %s %s", x.reservedBy.id, x.reserved)
		}
		if !x.conflict.IsZero() {
			line += " conflict"
		}
		if line != "" {
			out = append(out, fmt.Sprintf("%s:%s\n", a, line))
		}
	}
	slices.Sort(out)
	byAge := m.where(func(_ netip.Addr, x *modelAddr) bool { return x.kind == kindLease || x.kind == kindReleased })
	slices.SortStableFunc(byAge, func(a, b netip.Addr) int { return m.at[a].age - m.at[b].age })
	return fmt.Sprint(out, byAge)
}

// state is the same of the allocator.
func state(a *Allocator) string {
	lines := make(map[netip.Addr]string)
	since := make(map[netip.Addr]time.Time)
	outside := make(map[netip.Addr][]string)
	reserved, conflicts := make(map[netip.Addr]string), make(map[netip.Addr]string)
	for _, p := range a.Pools() {
		for _, l := range a.Leases(p.ID) {
			if l.Role == RoleEndpoint {
				since[l.Addr] = l.Since
				lines[l.Addr] += fmt.Sprintf(" lease %s key=%s named=%v ep=%s late=%v", p.ID, l.Key, l.Named, l.Endpoint, l.Released)
			} else {
				outside[l.Addr] = append(outside[l.Addr], fmt.Sprintf(" %s %s", l.Role, p.ID))
			}
		}
		for _, t := range a.Tombstones(p.ID) {
			since[t.Addr] = t.Since
			lines[t.Addr] += fmt.Sprintf(" released %s key=%s named=%v", p.ID, t.Key, t.Named)
		}
		for _, r := range a.Reservations(p.ID) {
			reserved[r.Addr] = fmt.Sprintf(" reserved %s %s", p.ID, r.Key)
		}
		for _, c := range a.Conflicts(p.ID) {
			conflicts[c.Addr] = " conflict"
		}
	}
	for addr, list := range outside {
		slices.Sort(list)
		lines[addr] += fmt.Sprint(list)
	}
	for _, more := range []map[netip.Addr]string{reserved, conflicts} {
		for addr, text := range more {
			lines[addr] += text
		}
	}
	var out []string
	for addr, line := range lines {
		out = append(out, fmt.Sprintf("%s:%s\n", addr, line))
	}
	slices.Sort(out)
	byAge := slices.SortedFunc(maps.Keys(since), func(x, y netip.Addr) int {
		if c := since[x].Compare(since[y]); c != 0 {
			return c
		}
		return x.Compare(y)
	})
	return fmt.Sprint(out, byAge)
}
