package ipam

import (
	"iter"
	"math/bits"
)

// Addresses are kept in chunks of 4096: a full /8 is 4096 chunks, and an IPv6
// pool with few addresses has few chunks. The values in a chunk are in groups of
// 64 that are made when they are needed, so that a lone address costs little more
// than a kilobyte and one of many four bytes.
const (
	chunkShift = 12
	chunkSize  = 1 << chunkShift
	wordBits   = 64
)

type chunk struct {
	count  int
	words  [chunkSize / wordBits]uint64
	values [chunkSize / wordBits]*[wordBits]uint32
}

// A table maps addresses to values other than 0. The zero table is empty. A chunk
// without addresses is not in the map.
type table struct {
	chunks map[num]*chunk
	// last is the chunk that was used last, which the next address is
	// likely to be in; nil for none.
	last   *chunk
	lastNo num
}

func (t *table) chunk(no num) *chunk {
	if t.last != nil && t.lastNo == no {
		return t.last
	}
	c := t.chunks[no]
	if c != nil {
		t.last, t.lastNo = c, no
	}
	return c
}

// get returns the value of n, 0 for none.
func (t *table) get(n num) uint32 {
	c := t.chunk(n.chunk())
	if c == nil || c.words[word(n)]&bit(n) == 0 {
		return 0
	}
	return c.values[word(n)][n.lo%wordBits]
}

// set gives n a value, which is not 0.
func (t *table) set(n num, value uint32) {
	no := n.chunk()
	c := t.chunk(no)
	if c == nil {
		if t.chunks == nil {
			t.chunks = make(map[num]*chunk)
		}
		c = &chunk{}
		t.chunks[no] = c
	}
	w := word(n)
	if c.values[w] == nil {
		c.values[w] = new([wordBits]uint32)
	}
	c.values[w][n.lo%wordBits] = value
	if c.words[w]&bit(n) == 0 {
		c.words[w] |= bit(n)
		c.count++
	}
}

// remove takes n from the table; it need not be in it.
func (t *table) remove(n num) {
	no := n.chunk()
	c := t.chunk(no)
	w := word(n)
	if c == nil || c.words[w]&bit(n) == 0 {
		return
	}
	c.words[w] &^= bit(n)
	if c.words[w] == 0 {
		c.values[w] = nil
	}
	if c.count--; c.count == 0 {
		delete(t.chunks, no)
		t.last = nil
	}
}

// free returns the lowest number from first to last that is not in the table. It
// takes one step for each full chunk on the way.
func (t *table) free(first, last num) (num, bool) {
	for n := first; !last.less(n); {
		no := n.chunk()
		c := t.chunk(no)
		if c == nil {
			return n, true
		}
		if c.count < chunkSize {
			if at, ok := c.free(int(n.lo % chunkSize)); ok {
				n = no.firstOf().or(num{lo: uint64(at)})
				return n, !last.less(n)
			}
		}
		n = no.next().firstOf()
		if n == (num{}) {
			break // past the highest address of all
		}
	}
	return num{}, false
}

// all returns the values in no order. The table must not change meanwhile.
func (t *table) all() iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for _, c := range t.chunks {
			for w, members := range c.words {
				for ; members != 0; members &= members - 1 {
					if !yield(c.values[w][bits.TrailingZeros64(members)]) {
						return
					}
				}
			}
		}
	}
}

// free returns the lowest clear bit at or after from.
func (c *chunk) free(from int) (int, bool) {
	clear := ^c.words[from/wordBits] &^ (1<<(from%wordBits) - 1)
	for w := from / wordBits; ; clear = ^c.words[w] {
		if clear != 0 {
			return w*wordBits + bits.TrailingZeros64(clear), true
		}
		if w++; w == len(c.words) {
			return 0, false
		}
	}
}

func word(n num) uint64 { return n.lo % chunkSize / wordBits }

func bit(n num) uint64 { return 1 << (n.lo % wordBits) }
