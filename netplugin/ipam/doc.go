// Package ipam gives out address pools and addresses. An Allocator is pure: it
// does no I/O, reads no clock and no host. It tells the driver each change as an
// Event, which the driver stores; Apply makes the same state of them again, and
// Snapshot says it in as few as possible.
//
// A pool is one subnet and belongs to one network. A lease is one address of a
// pool. All pools on one LAN, which have the same parent, share a ledger: they may
// overlap, and no container's address is ever given out twice in it. The gateway
// and what else is outside Docker may be in several of them. Pools without parent
// do not overlap each other.
//
// A container gets the address that it had before, or that is reserved for it, by
// its key, which is its name or its MAC address. All other automatic addresses
// rotate, and rest for a while after they were released: neighbours may still have
// the old container's MAC address for them. What somebody on the LAN was found to
// have is not given out.
//
// dockerd does not always tell when it has no more use for a pool or address
// (it was killed, the plugin was away, or a request failed half way). Leases of a
// Berth network that no endpoint uses, and pools that nothing ever used, are
// given again after a while, and only when they are needed.
//
// The time that a request takes hardly depends on the size of the pool and on what
// is in use: addresses are in a sparse table, so a full /8 and an IPv6 /64 are both
// fine, and what was released is in lists by age.
package ipam
