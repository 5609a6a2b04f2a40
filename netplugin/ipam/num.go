package ipam

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// A num is an address as a number. IPv4 addresses are below 1<<32; the two
// families never meet in one set.
type num struct {
	hi, lo uint64
}

func number(a netip.Addr) num {
	if a.Is4() {
		b := a.As4()
		return num{lo: uint64(binary.BigEndian.Uint32(b[:]))}
	}
	b := a.As16()
	return num{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

func (n num) addr(is4 bool) netip.Addr {
	if is4 {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(n.lo))
		return netip.AddrFrom4(b)
	}
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], n.hi)
	binary.BigEndian.PutUint64(b[8:], n.lo)
	return netip.AddrFrom16(b)
}

// lowBits has the n lowest bits set, n from 0 to 128.
func lowBits(n int) num {
	if n <= 64 {
		return num{lo: ^uint64(0) >> (64 - n)}
	}
	return num{^uint64(0) >> (128 - n), ^uint64(0)}
}

func (n num) or(m num) num { return num{n.hi | m.hi, n.lo | m.lo} }

// next is n+1, and 0 after the highest number.
func (n num) next() num {
	lo, carry := bits.Add64(n.lo, 1, 0)
	return num{n.hi + carry, lo}
}

// prev is n-1; n is not 0.
func (n num) prev() num {
	lo, borrow := bits.Sub64(n.lo, 1, 0)
	return num{n.hi - borrow, lo}
}

func (n num) less(m num) bool {
	return n.hi < m.hi || n.hi == m.hi && n.lo < m.lo
}

// chunk is the number of the chunk that n is in.
func (n num) chunk() num {
	return num{n.hi >> chunkShift, n.lo>>chunkShift | n.hi<<(64-chunkShift)}
}

// firstOf is the first number in the chunk with the number n.
func (n num) firstOf() num {
	return num{n.hi<<chunkShift | n.lo>>(64-chunkShift), n.lo << chunkShift}
}

// shr shifts by k bits to the right, k from 0 to 128.
func (n num) shr(k int) num {
	if k >= 64 {
		return num{lo: n.hi >> (k - 64)}
	}
	return num{n.hi >> k, n.lo>>k | n.hi<<(64-k)}
}

// shl shifts by k bits to the left, k from 0 to 128.
func (n num) shl(k int) num {
	if k >= 64 {
		return num{hi: n.lo << (k - 64)}
	}
	return num{n.hi<<k | n.lo>>(64-k), n.lo << k}
}
