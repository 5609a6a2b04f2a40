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
// not read the root yet answers "unavailable" instead, for which package
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
// ID, in the state file, with the boot they belong to. What makes a count true is
// the mount itself, which mountinfo shows:
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
