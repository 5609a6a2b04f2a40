package ipam

import (
	"cmp"
	"math"
	"net"
	"net/netip"
	"slices"
)

// A ledger knows the addresses of all pools on one parent, and of one family, so
// that pools that overlap never give out one twice. A pool without parent has a
// ledger of its own.
type ledger struct {
	parent string
	is4    bool
	// table has the entry of each address that is not merely free.
	table table
	pools []*pool
	// ranges are those of the pools, the smallest first.
	ranges []*rangeLists
	// outside are the holders of each address that belongs to something
	// outside Docker, by age.
	outside map[num][]holder
	// reserved and conflicts are the marks.
	reserved  map[num]reservation
	conflicts map[num]conflict
	// due is when the first conflict ends.
	due int64
	// freed counts the addresses that became never used again, from 1.
	freed uint64
}

// rangeLists are the released addresses of a range that are in no smaller one:
// since ranges are prefixes, two of them are apart or one is in the other. What a
// pool may give out is in the lists of its range and of those in it.
type rangeLists struct {
	prefix       netip.Prefix
	users        int
	free, pinned list
}

// Of each range so many released addresses are remembered, and the keys of so
// many. Beyond that the oldest are like ones that were never used; rotation comes
// to them last.
const (
	maxReleased = 1 << 16
	maxKeyed    = 1 << 12
)

// A holder is a pool with its lease of an address outside Docker.
type holder struct {
	pool  *pool
	lease Lease
}

type reservation struct {
	pool  *pool
	key   string
	since int64
}

type conflict struct {
	pool         *pool
	mac          net.HardwareAddr
	since, until int64
}

type ledgerKey struct {
	parent string
	is4    bool
}

func newLedger(parent string, is4 bool) *ledger {
	return &ledger{parent: parent, is4: is4, due: math.MaxInt64, freed: 1}
}

// home returns the lists that a released address belongs in, nil if no pool would
// give it to one who wants any.
func (l *ledger) home(n num) *rangeLists {
	if len(l.ranges) == 1 && l.parent == "" {
		// The usual pool. It is asked for each release.
		p := l.pools[0]
		if n.less(p.first) || p.last.less(n) {
			return nil
		}
		return l.ranges[0]
	}
	addr := n.addr(l.is4)
	for _, r := range l.ranges {
		if r.prefix.Contains(addr) {
			return r
		}
	}
	return nil
}

// listOf returns the list that an entry is in.
func (a *Allocator) listOf(l *ledger, e *entry) *list {
	switch e.list {
	case inFree:
		return &l.home(e.addr).free
	case inPinned:
		return &l.home(e.addr).pinned
	case inLoose:
		return &a.numbered[e.pool].loose
	case inNone:
	}
	return nil
}

// unlink takes an entry from its list, if it is in one.
func (a *Allocator) unlink(l *ledger, i uint32) {
	if in := a.listOf(l, a.entries.at(i)); in != nil {
		a.entries.unlink(in, i)
	}
}

// relink puts an entry in the list where it belongs.
func (a *Allocator) relink(l *ledger, i uint32) {
	e := a.entries.at(i)
	want := inNone
	if !e.is(markReserved) && !e.is(markConflict) {
		switch {
		case e.kind == kindReleased && l.home(e.addr) == nil:
		case e.kind == kindReleased && e.is(markNamed):
			want = inPinned
		case e.kind == kindReleased:
			want = inFree
		case e.kind == kindLease:
			if p := a.numbered[e.pool]; p.isLoose(e) && p.automatic(e.addr) {
				want = inLoose
			}
		}
	}
	if e.list == want {
		return
	}
	a.unlink(l, i)
	switch want {
	case inFree:
		a.entries.insert(&l.home(e.addr).free, i, want)
	case inPinned:
		a.entries.insert(&l.home(e.addr).pinned, i, want)
	case inLoose:
		a.entries.insert(&a.numbered[e.pool].loose, i, want)
	case inNone:
	}
}

// entryOf returns the entry of an address and makes it if there is none.
func (a *Allocator) entryOf(l *ledger, n num) uint32 {
	i := l.table.get(n)
	if i == 0 {
		i = a.entries.add(entry{addr: n})
		l.table.set(n, i)
	}
	return i
}

// setKey changes the key of an entry.
func (a *Allocator) setKey(l *ledger, i uint32, key string) {
	e := a.entries.at(i)
	if e.key == key {
		return
	}
	in := a.listOf(l, e)
	if e.key != "" {
		a.keys.remove(&a.entries, i)
		if in != nil {
			in.keyed--
		}
	}
	e.key = key
	if key != "" {
		a.keys.add(&a.entries, i)
		if in != nil {
			in.keyed++
			in.cursor = 0
		}
	}
}

// clear ends the lease or tombstone of an entry, and the entry if it has no marks.
func (a *Allocator) clear(l *ledger, i uint32) {
	e := a.entries.at(i)
	a.unlink(l, i)
	a.setKey(l, i, "")
	a.names.remove(e.endpoint)
	a.setExtra(i, nil)
	if e.kind == kindLease {
		a.numbered[e.pool].held--
	}
	e.kind, e.endpoint, e.since, e.pool = kindNone, 0, 0, 0
	e.marks &= markReserved | markConflict | markPending
	if e.marks == 0 {
		l.table.remove(e.addr)
		l.freed++
		a.entries.remove(i)
	}
}

// join makes a pool one of the ledger's.
func (a *Allocator) join(l *ledger, p *pool) {
	p.led = l
	l.pools = append(l.pools, p)
	for _, r := range l.ranges {
		if r.prefix == p.Range {
			r.users++
			return
		}
	}
	a.rearrange(l, func() {
		l.ranges = append(l.ranges, &rangeLists{prefix: p.Range, users: 1})
		slices.SortStableFunc(l.ranges, func(x, y *rangeLists) int { return cmp.Compare(y.prefix.Bits(), x.prefix.Bits()) })
	})
}

// leave takes a pool, all of whose entries are gone, from its ledger.
func (a *Allocator) leave(p *pool) {
	l := p.led
	l.pools = slices.DeleteFunc(l.pools, func(q *pool) bool { return q == p })
	if len(l.pools) == 0 {
		delete(a.ledgers, ledgerKey{l.parent, l.is4})
		return
	}
	at := slices.IndexFunc(l.ranges, func(r *rangeLists) bool { return r.prefix == p.Range })
	if l.ranges[at].users--; l.ranges[at].users == 0 {
		a.rearrange(l, func() { l.ranges = slices.Delete(l.ranges, at, at+1) })
	}
}

// rearrange changes the ranges of a ledger. Released addresses change over to the
// lists where they belong then, and are forgotten if they belong in none.
func (a *Allocator) rearrange(l *ledger, change func()) {
	var listed []uint32
	for i := range l.table.all() {
		if e := a.entries.at(i); e.kind == kindReleased {
			a.unlink(l, i)
			listed = append(listed, i)
		}
	}
	change()
	a.sortByAge(listed)
	for _, i := range listed {
		if l.home(a.entries.at(i).addr) == nil {
			a.clear(l, i)
			continue
		}
		a.relink(l, i)
		e := a.entries.at(i)
		a.limit(l, l.home(e.addr), e.since)
	}
}

func (a *Allocator) sortByAge(entries []uint32) {
	slices.SortFunc(entries, func(i, j uint32) int {
		if a.entries.older(i, j) {
			return -1
		}
		return 1
	})
}

// entriesOf returns the leases and released addresses of a pool by age, without
// those outside Docker.
func (a *Allocator) entriesOf(p *pool) []uint32 {
	var list []uint32
	for i := range p.led.table.all() {
		if e := a.entries.at(i); e.pool == p.no && (e.kind == kindLease || e.kind == kindReleased) {
			list = append(list, i)
		}
	}
	a.sortByAge(list)
	return list
}

// limit forgets the oldest released addresses of a range and their keys, after
// one was added at the given time.
func (a *Allocator) limit(l *ledger, r *rangeLists, at int64) {
	for r.free.keyed+r.pinned.keyed > maxKeyed {
		i, j := a.entries.oldestKeyed(&r.free), a.entries.oldestKeyed(&r.pinned)
		if i == 0 || j != 0 && a.entries.older(j, i) {
			i = j
		}
		a.unkey(l, i, at)
	}
	for r.free.count+r.pinned.count > maxReleased {
		i := r.free.head
		if i == 0 {
			i = r.pinned.head
		}
		a.clear(l, i)
	}
}

// unkey makes a released address one of nobody in particular. One that was pinned
// counts as released at the given time or later, so that it is at the end of its list.
func (a *Allocator) unkey(l *ledger, i uint32, at int64) {
	a.setKey(l, i, "")
	e := a.entries.at(i)
	if e.is(markNamed) {
		a.unlink(l, i)
		e.marks &^= markNamed
		e.since = max(e.since, at)
		a.relink(l, i)
	}
}
