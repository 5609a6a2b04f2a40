// Package presence tells the hosts that share one root of each other: which of
// them uses which volume, and who has a volume that only one may have at a time.
//
// # Files
//
// Each host writes one file in .berth/hosts, named by a hash of its ID, with the
// volumes it has mounted. It replaces the file when that changes, and every 15
// seconds, which is its heartbeat. Nobody else writes it. There are no locks of a
// file server in this, which are lost when it restarts, and no database.
//
// A lease is a directory .berth/leases/UUID with a file GENERATION.json.
// The file of the highest generation says who has the volume, or that nobody has.
// Whoever takes it makes the file of the next generation with link(2), which succeeds
// for exactly one host, and deletes lower ones. No two owners have the same
// generation, and a file is changed by its maker alone: who was slow can never put
// an old state in the place of a new one. A lease is not renewed by itself. It lasts
// as long as its owner's heartbeat.
//
// Readers pass over files and directories that have no such names. A damaged file of
// a host is put right by its next heartbeat, or else is that of a dead host. A damaged
// lease can only be taken by force. Neither hinders other hosts or volumes.
//
// # Who is dead
//
// A host is dead when all of this holds:
//
//   - this host has watched the other's file for 75 seconds and it did not change;
//   - this host's own heartbeats went well in all that time. When the server was away,
//     nobody could write, and the first to write again must not bury the others;
//   - by the file server's clock, the other's file is older than this host's by more
//     than that. Times that other hosts have on their own clocks are never compared.
//     A file from the server's future, because that clock was set back, is
//     judged by the first two.
//
// So a host that has just been started takes nobody for dead in its first 75
// seconds. Durations are those of CLOCK_BOOTTIME, which goes on while a host is
// suspended.
//
// # Taking over
//
// An owner that could not beat for 45 seconds is told that its leases are doubtful,
// 30 seconds before anybody may take them, so that it can stop to write. It is told
// when they are its own again, or lost.
//
// A taker makes the next generation first, and then looks once more whether the
// owner's file has changed. The owner, coming back, writes its file first and
// then looks for a higher generation. One of them at least sees the other: either the taker
// withdraws or the owner is told that it has lost, whatever the order.
//
// What this cannot do is stop a host that has lost its lease and does not know. A
// host whose berthd was killed and not started again, while containers go on, looks
// dead. berthd that is told to end while volumes are in use says so in its file
// (Close), and then nobody takes them unless forced. A host that was suspended writes
// for up to a second before it is told of its doubts.
//
// # When the server hangs
//
// Run never blocks on the root: a heartbeat that hangs has a goroutine of its own,
// one at most, and the leases become doubtful on time meanwhile. Leave does no
// I/O. All other methods do, on the caller's goroutine; whoever calls them for a request
// bounds them as it bounds all else that touches a root. They never wait for each other
// but for the writing of the host's file, and for that no longer than ctx says.
//
// # For the caller
//
// One Presence in the process for each root that is Shared (by the root's own ID, since
// two paths may lead to one), made with what is mounted already, and Run on a
// goroutine of its own. Then, for each volume:
//
//   - first Mount: Enter; for an exclusive volume Acquire before that, and only then
//     attach and mount it;
//   - last Unmount: unmount and detach it, then Release and Leave;
//   - after a restart: Resume for each exclusive volume that is attached. It may have been
//     lost meanwhile, as if Changed had said so;
//   - Changed says Doubtful: tell people, who may stop the writing; Held: it is over; Lost:
//     take the volume from its programs at once, detach it as soon as it can be, then
//     Release;
//   - removal, rollback, resize: refuse while Users has another host that is InUse;
//   - its data is deleted for good: Drop;
//   - at the end of the process: Close, after Run has returned.
//
// A root that no other host can reach, because it is on a local disk, needs none of
// this.
package presence
