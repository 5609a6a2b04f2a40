// Package thin is the engine whose volumes are thin devices of a device-mapper pool,
// each with a file system of its own: convoy's devicemapper driver in Berth's terms.
//
// A snapshot takes no time and no space at first, whatever the volume's size, and a
// size is a limit that nobody gets past. All volumes share the blocks of one pool,
// which may be smaller than the sum of their sizes: writes fail when it is full.
//
// # The pool
//
// A root has one pool. It is on two block devices that the operator gives, or on two
// files in the root, thin-data and thin-meta, which are made when the first volume
// is. One host alone can use it, so the root must not be shared.
//
// # Files
//
//	.berth/thin/pool.json           what the pool is; never changes when it is ready
//	.berth/thin/volumes/NAME.json   the pointer of volume NAME to its thin device
//	.berth/trash/UUID               the pointer of a removed volume
//	.berth/snapshots/UUID/SNAP      the pointer of a snapshot
//	.berth/thin/devices/ID          the claim on thin device ID, with .making or
//	                                .deleting while that is not done
//	.berth/thin/lock                locked by who claims a device
//
// # IDs
//
// A pool knows its devices by numbers of 24 bits and will not list them. A mix-up
// shows one volume's data in another, so each number has a claim before the device
// exists, and until it does not exist any more. A claim is a file with the number as
// its name, made when the pool has certainly no such device, under the lock. A
// device is real when a pointer leads to it and its claim has lost the
// suffix .making. Whoever is killed before leaves a claim that says which pointer
// was meant: the next process finds that pointer, and the device is real, or it does
// not and deletes it. A claim that is at work is locked by its process and left
// alone. Nothing else ever deletes a device: a pointer that is lost costs space, not
// data.
//
// Numbers are handed out by the pool's transaction ID, whose lower half counts devices
// and only goes up, so that a number that was used is not met again before 16 million
// others, even when claims were lost. Its upper half is made up with the pool, and
// tells when metadata is not that of this root's pool.
//
// # Consistency
//
// A snapshot is taken while the volume's device is suspended, for which the kernel
// freezes the file system: all that was written is in it. The device is resumed
// whatever happens; if this process is killed just then, Recover of the next one
// does it.
//
// # Devices
//
// Device nodes are made in a directory of the engine's own, as device-mapper's names
// are the host's and a plugin has no udev. A pool runs as long as one of its devices
// does. Thin devices and mount points are called by the pool and the number, so that
// no number is ever active twice.
package thin
