package ipam

import "hash/maphash"

// A kind is what an address is at present.
type kind uint8

const (
	// kindNone has only marks.
	kindNone kind = iota
	// kindLease is a container's.
	kindLease
	// kindOutside is a gateway's or a reserved one, which may be held by
	// several pools; see ledger.outside.
	kindOutside
	// kindReleased is free, and is known to have been used.
	kindReleased
)

// Marks of an address.
const (
	// markReserved: kept for a key; see ledger.reserved.
	markReserved = 1 << iota
	// markConflict: in use by somebody on the LAN; see ledger.conflicts.
	markConflict
	// markPending: held for a request that is not decided; see
	// Allocator.pending.
	markPending
	// markNamed: the lease was asked for by address.
	markNamed
	// markLate: released while an endpoint has it.
	markLate
	// markExtra: has a MAC address or DHCP data; see Allocator.extras.
	markExtra
)

// A place is which list an address is in.
type place uint8

const (
	inNone place = iota
	// inFree: released, oldest first.
	inFree
	// inPinned: the same, of containers that asked for it by name.
	inPinned
	// inLoose: leased and without endpoint, oldest first.
	inLoose
)

// An entry is all about an address that is not merely free. There are many, so
// they refer to each other by number, and what few of them have is elsewhere.
type entry struct {
	addr num
	// since is in nanoseconds of Unix time: that of the lease, or of its end.
	since int64
	// key is who has or had the address, "" where that is not known or of no
	// matter any more.
	key string
	// prev and next are the neighbours in the list; sib is the next entry with
	// a key of the same hash.
	prev, next, sib uint32
	// pool is the number of the pool that has or had it.
	pool uint32
	// endpoint is the number of the endpoint's ID, 0 for none.
	endpoint uint32
	kind     kind
	marks    uint8
	list     place
}

func (e *entry) is(mark uint8) bool { return e.marks&mark != 0 }

// An arena has entries by number, from 1.
type arena struct {
	blocks []*[arenaBlock]entry
	used   uint32
	// unused is the first of those that were given back, linked by next.
	unused uint32
}

const arenaBlock = 256

func (a *arena) at(i uint32) *entry { return &a.blocks[i/arenaBlock][i%arenaBlock] }

func (a *arena) add(e entry) uint32 {
	if i := a.unused; i != 0 {
		at := a.at(i)
		a.unused = at.next
		*at = e
		return i
	}
	a.used++
	if int(a.used/arenaBlock) == len(a.blocks) {
		a.blocks = append(a.blocks, new([arenaBlock]entry))
	}
	*a.at(a.used) = e
	return a.used
}

func (a *arena) remove(i uint32) {
	*a.at(i) = entry{next: a.unused}
	a.unused = i
}

// A list is of entries by age, the oldest first; ages that are equal by address.
type list struct {
	head, tail uint32
	count      int
	// keyed is how many have a key, and none before cursor has; cursor 0 is
	// the head.
	keyed  int
	cursor uint32
}

func (a *arena) older(i, j uint32) bool {
	x, y := a.at(i), a.at(j)
	return x.since < y.since || x.since == y.since && x.addr.less(y.addr)
}

// insert puts an entry at its age, which is nearly always the end.
func (a *arena) insert(l *list, i uint32, where place) {
	after := l.tail
	for after != 0 && a.older(i, after) {
		after = a.at(after).prev
	}
	if after != l.tail {
		l.cursor = 0
	}
	e := a.at(i)
	e.list, e.prev = where, after
	if after == 0 {
		e.next, l.head = l.head, i
	} else {
		prev := a.at(after)
		e.next, prev.next = prev.next, i
	}
	if e.next == 0 {
		l.tail = i
	} else {
		a.at(e.next).prev = i
	}
	l.count++
	if e.key != "" {
		l.keyed++
	}
}

func (a *arena) unlink(l *list, i uint32) {
	e := a.at(i)
	if l.cursor == i {
		l.cursor = e.next
	}
	if e.prev == 0 {
		l.head = e.next
	} else {
		a.at(e.prev).next = e.next
	}
	if e.next == 0 {
		l.tail = e.prev
	} else {
		a.at(e.next).prev = e.prev
	}
	l.count--
	if e.key != "" {
		l.keyed--
	}
	e.prev, e.next, e.list = 0, 0, inNone
}

// oldestKeyed returns the oldest entry with a key, 0 for none. All calls together
// pass over an entry once.
func (a *arena) oldestKeyed(l *list) uint32 {
	if l.keyed == 0 {
		return 0
	}
	i := l.cursor
	if i == 0 {
		i = l.head
	}
	for a.at(i).key == "" {
		i = a.at(i).next
	}
	l.cursor = i
	return i
}

// A keyIndex finds the entries of a pool that have a key: a map of hashes, and
// chains of the entries with the same hash.
type keyIndex struct {
	seed  maphash.Seed
	heads map[uint32]uint32
}

func newKeyIndex() keyIndex {
	return keyIndex{seed: maphash.MakeSeed(), heads: make(map[uint32]uint32)}
}

func (x keyIndex) hash(pool uint32, key string) uint32 {
	const spread = 0x9e3779b1 // neighbouring numbers to distant ones
	return uint32(maphash.String(x.seed, key)) ^ pool*spread
}

func (x keyIndex) add(a *arena, i uint32) {
	e := a.at(i)
	h := x.hash(e.pool, e.key)
	e.sib = x.heads[h]
	x.heads[h] = i
}

func (x keyIndex) remove(a *arena, i uint32) {
	e := a.at(i)
	h := x.hash(e.pool, e.key)
	if x.heads[h] == i {
		if e.sib == 0 {
			delete(x.heads, h)
		} else {
			x.heads[h] = e.sib
		}
		e.sib = 0
		return
	}
	for j := x.heads[h]; j != 0; j = a.at(j).sib {
		if a.at(j).sib == i {
			a.at(j).sib, e.sib = e.sib, 0
			return
		}
	}
}

// first and more go through the entries of the key: there are one or two.
func (x keyIndex) first(a *arena, pool uint32, key string) uint32 {
	return x.match(a, x.heads[x.hash(pool, key)], pool, key)
}

func (x keyIndex) more(a *arena, i uint32) uint32 {
	e := a.at(i)
	return x.match(a, e.sib, e.pool, e.key)
}

func (x keyIndex) match(a *arena, i, pool uint32, key string) uint32 {
	for i != 0 && (a.at(i).pool != pool || a.at(i).key != key) {
		i = a.at(i).sib
	}
	return i
}
