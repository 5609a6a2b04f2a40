package ipam

import "math/bits"

// Addresses are kept in chunks of 4096 bits: a full /8 is 4096 chunks of half a
// kilobyte, and a chunk costs an IPv6 pool no more where only one bit is set.
const (
	chunkShift = 12
	chunkSize  = 1 << chunkShift
	wordBits   = 64
)

type chunk struct {
	count int
	words [chunkSize / wordBits]uint64
}

// A set of addresses. A chunk without members is not in the map.
type set struct {
	chunks map[num]*chunk
}

func newSet() set { return set{chunks: make(map[num]*chunk)} }

func (s set) has(n num) bool {
	c, ok := s.chunks[n.chunk()]
	return ok && c.words[word(n)]&bit(n) != 0
}

// add reports whether n was not yet in the set.
func (s set) add(n num) bool {
	key := n.chunk()
	c, ok := s.chunks[key]
	if !ok {
		c = &chunk{}
		s.chunks[key] = c
	}
	if c.words[word(n)]&bit(n) != 0 {
		return false
	}
	c.words[word(n)] |= bit(n)
	c.count++
	return true
}

// remove reports whether n was in the set.
func (s set) remove(n num) bool {
	key := n.chunk()
	c, ok := s.chunks[key]
	if !ok || c.words[word(n)]&bit(n) == 0 {
		return false
	}
	c.words[word(n)] &^= bit(n)
	c.count--
	if c.count == 0 {
		delete(s.chunks, key)
	}
	return true
}

// free returns the lowest number from first to last that is not in the set. It
// takes one step for each full chunk on the way.
func (s set) free(first, last num) (num, bool) {
	for n := first; !last.less(n); {
		key := n.chunk()
		c, ok := s.chunks[key]
		if !ok {
			return n, true
		}
		if c.count < chunkSize {
			if at, ok := c.free(int(n.lo % chunkSize)); ok {
				n = key.firstOf().or(num{lo: uint64(at)})
				return n, !last.less(n)
			}
		}
		n = key.next().firstOf()
		if n == (num{}) {
			break // past the highest address of all
		}
	}
	return num{}, false
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
