// Package volplugin is the volume driver: one method for each VolumeDriver call,
// recovery at start, and the work in the background.
//
// # A volume's way
//
// Create makes a record beside the data (package volume), Mount binds the data
// to the path that dockerd passes to a container (package mount), Remove moves
// the data into the trash. This package puts these together: it keeps one request
// at a time per volume, bounds every touch of the storage, remembers the volumes
// it has seen, and counts mounts.
//
// # Stores
//
// A host may have several roots; a store is one of them as this host works on it:
// the default one, those that the operator has named, and shares that Berth mounts.
// Each has threads, a cache and background work of its own, so that one that hangs
// holds up no volume of another. Names are one space for all of them, because
// dockerd's are: a volume that exists in any store is the one that its name means,
// and where two hosts have used one name in two stores, the store in which this
// host saw it first has it. Which that is, is kept in the state file.
//
// # Shares
//
// The root of a share is a directory of a file server, which Berth mounts where only
// it looks (package netfs) and whose volumes are bound from there as all others are.
// How it is mounted is in the state file before it is mounted for the first time, so
// that a later process, or the host after a reboot, can do it again. Until somebody
// needs it, or a round in the background has mounted it, Get and List answer from what
// was seen and do not try: mounting waits for a server.
//
// One attempt to mount or unmount a share runs at a time, beside the workers, since
// mount(2) may hang for minutes; the server is spoken to before, so that it rarely
// does. A handle that the server has forgotten is replaced by a new mount when no
// container of this host uses the share. While one does, it keeps what it has.
//
// # Operations
//
// What an operator asks for (control.VolumeAdmin) and what a schedule does may take
// minutes. An operation has a lock of its own for its volume, so that containers go on
// to start and end beside a snapshot or a copy; what moves the data away takes the
// requests' lock too. A volume that is filled from a source is made by two steps:
// its record, which says what it is made from, and the data, in the background if it
// takes longer than a request may. A process that comes after goes on with it.
//
// # Attached volumes
//
// Directories are there. What is in an image or on a device has to be mounted on this
// host first, for as long as a container or an operation has it (holders). On a root
// that other hosts may reach, holding a volume is also what they are told of
// (society), and a volume for one host at a time is held by a lease.
//
// # When storage is away
//
// dockerd takes any error from Get for "no such volume": it forgets the volume
// and makes an empty local one of that name at the next `docker run`. So Get and
// List look at the root for two seconds at most and answer otherwise from what
// this host has seen, which its state file keeps. While the storage hangs they do
// not look at all. A name that is not among what this host has seen is answered
// "not found" when the root was looked at, or when this host has once read the
// whole root and every name since: then dockerd has no record of it either,
// because all its knowledge of Berth's volumes came through here. A host that has
// not read the default root yet answers "unavailable" instead, for which package
// pluginapi cuts the connection, and dockerd keeps its records. Cutting it in
// every case would protect nothing more, and each `docker run -v NEW:/x`, for
// whatever driver, would wait while dockerd tries again.
//
// Create, Mount and Remove need the storage and say in words that it is away,
// within the deadline. A system call that hangs cannot be ended: its goroutine is
// given up, keeps the lock of its volume until the kernel lets it go, and other
// volumes go on. Their number is bounded.
//
// # Mounts and mount IDs
//
// dockerd gives each mount of a container an ID. Mounts are counted by volume and
// ID, in a file of their own, with the boot they belong to. No count outlives its boot, so
// the file is not synced: it is there after this process was killed, which is what it is
// for. What makes a count true is the mount itself, which mountinfo shows:
//
//   - This process was killed: the mounts are in the host's propagated mount and
//     still there for its successor, and so are their counts. Nothing is mounted
//     twice, and the Unmounts to come find their counts.
//   - dockerd was killed without live-restore, or the plugin disabled by force:
//     dockerd drops the mounts on the host, sends no Unmount, and sends Mount
//     with the same IDs later. The mount is gone from mountinfo, so the old counts
//     are void, at recovery or at the next Mount, and an ID never counts twice for
//     one container.
//   - The host was rebooted: the boot ID differs, all counts are void.
//   - A mount without a count belongs to a Mount whose answer never reached
//     dockerd, or to an Unmount that failed: it is unmounted at recovery and then
//     every minute. Containers hold mounts of their own and lose nothing.
//
// Without a mounts directory (a daemon on the host, not in a plugin) nothing is
// mounted and mountinfo cannot say whether a count is stale. Counts hinder nobody
// there, except Remove, which looks through the mount tables of all processes for
// a container that really has the data before it refuses.
//
// One stale count cannot be told from a true one: Engine 20.10 with live-restore
// sends one Unmount too few after `docker cp` following its restart. The volume
// stays mounted until the host is rebooted or the plugin is disabled and enabled.
package volplugin
