// Package restic keeps backups in restic repositories, with the program restic. It
// implements backup.Engine.
//
// # What a backup is
//
// One restic snapshot of the two relative paths data and manifest.json, which are then
// the top of its tree. Its host and time are those of the source; its tags are berth,
// volume=NAME, uuid=UUID, tag=WORD for each word of the user's, and holds=FILES/DIRS/BYTES,
// what there was to be stored as counted before. Plain restic restores it without Berth.
//
// restic counts each name of a regular file and each directory that it has stored, and the
// sizes of the files; it leaves out sockets, and files that vanish, without a word. So the
// two counts differ exactly if something is missing. restic stores its own count in the
// snapshot, hence a list tells incomplete backups, whatever happened to the process that made
// them. What the counts do not show, an attribute that could not be read for example, is
// marked with the tag incomplete, which needs the repository alone for a moment.
//
// # The child
//
// restic never runs as a child of the daemon itself, but below a small process that is this
// program once more (see Child): it is number 1 of a PID namespace of its own, and ends
// with the daemon, even if that is killed, because it watches a pipe. The kernel then ends
// all that is in the namespace, with ssh and rclone. The environment is made from nothing;
// secrets are in it or in files with mode 0600 in a directory that is removed afterwards,
// and by the next run if the daemon was killed. A cancelled call interrupts restic, so that
// it removes its lock, and kills it when that takes too long.
//
// # Locks
//
// A restic that was killed leaves its lock in the repository. Others ignore it, except for
// what needs the repository alone (forget, prune, check, tag), or if it was one of those
// that was killed. restic's own rule is that a lock is dead when it is older than 30
// minutes, or if it bears the name of this host and a process number that does not exist.
// Process numbers repeat, above all in a container, and restic asks by sending SIGHUP to
// whoever has the number now. Therefore:
//
//   - The children run under a host name of their own (UTS namespace), "berth-HOST-HEX". HEX
//     stands for this boot of this kernel and the directory of the leases: no other
//     machine has it, not even a clone, so that a lock with that name is of this daemon.
//   - A child inherits a lease, flock(2) on a file of this host: shared for most calls,
//     alone for those that need the repository alone. So a lease held alone proves that no
//     restic of ours works on that repository, even if its daemon is long dead.
//   - When the repository is locked, `restic unlock` runs under the lease held alone, in a PID
//     namespace where it is itself number 1 and no process has a number that another child
//     of ours may have had. It removes the locks of ours, all of which are dead then, and
//     those that are too old. Those of a living restic elsewhere remain.
//
// After a reboot the host name is another one: dead locks then go when they are 30 minutes old.
//
// # Making a repository
//
// restic makes a repository without care for another host that does the same: the key of
// one and the configuration of the other may remain, and then the password seems to open a
// damaged repository. Init therefore looks again when all others must be done, and removes
// keys that open nothing.
package restic
