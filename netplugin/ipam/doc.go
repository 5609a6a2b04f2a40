// Package ipam gives out address pools and addresses. An Allocator is pure: it
// does no I/O, reads no clock and no host; the driver stores what it decides and
// gives it back with Restore.
//
// A pool is one subnet and belongs to one network. Pools never overlap. A lease
// is one address of a pool. Automatic addresses rotate: an address that was just
// released is the last to be given again, because neighbours may still hold the
// old container's MAC address for it.
//
// dockerd does not always tell when it has no more use for a pool or address
// (it was killed, the plugin was away, or a request failed half way). Leases of a
// Berth network that no endpoint uses, and pools that nothing ever used, are
// given again after a while, and only when they are needed.
//
// Looking for a free address does not depend on the size of the pool: addresses
// in use are kept in a sparse bitmap, so a full /8 and an IPv6 /64 are both fine.
package ipam
