// Package btrfs is engine.Trees by subvolumes: snapshots, clones and rollbacks in
// the same short time whatever a volume's size, and limits by quota groups. It
// speaks to the kernel by ioctl and needs CAP_SYS_ADMIN.
//
// # Subvolumes and directories
//
// New trees are subvolumes. An ordinary directory, which an operator may have put
// into the root, is a tree as well: it is used as it is, copies of it are subvolumes
// whose files share their blocks with it, and it can have no limit. A rollback puts a
// subvolume in its place; the directory that it keeps is the one snapshot that is not
// read-only.
//
// A snapshot ends at the subvolumes that a container made inside a volume: they
// appear in it as empty directories in which nothing can be made. They are no part of
// clones either, and a rollback leaves them with the data that was kept. With the tree
// that they are in they are deleted, whatever their depth, also when they are
// read-only.
//
// A snapshot is one state of the file system: all that was written before it was
// called for is in it, and of what is written meanwhile as much as a power cut would
// leave.
//
// # What has changed
//
// Two snapshots of one subvolume hold the same when nothing was written to its tree
// between them, and that takes no time to find out. The first one's Mark says what it was:
// the subvolume's UUID, the transaction that made the snapshot, and when an inode was
// changed last. Of the second one the kernel shows the leaves that are younger. They alone
// would not do for a device that was set back to an earlier state, where transactions
// have the same numbers again; the time of the last change alone would not do after a
// power cut, since the kernel repeats its log without noting one. A tree that may be a
// single leaf, written anew for each snapshot, is compared by a digest of its items.
//
// A snapshot that was written to has no mark. The kernel does so when files were removed
// that somebody still has open: it takes them out of the snapshot.
//
// # Limits
//
// A limit is one on the bytes that a subvolume refers to, shared with snapshots or
// not, so a volume of 10 GiB cannot refer to more than that, and what its snapshots
// keep alive is not its trouble. Quotas are switched on with the first limit that is
// asked for, since they cost every later write on the file system something; until
// then Usage walks the tree. The first limit on a file system that is full of files
// waits until they are counted.
//
// They are full quotas, also on kernels with simple ones (6.7 and later). Simple
// quotas charge a block to the subvolume that wrote it first, for its whole life. Measured:
// the clone of a volume that has 20 MiB of 30 is charged 16 KiB and takes 25 MiB more, and
// so would a volume that was rolled back, while the deleted original's 20 MiB stay on the
// books of a quota group that cannot go before the last block. They also set an incompatibility
// flag, which keeps older kernels from mounting the file system. Where the operator has
// switched simple quotas on, they are used, and count what they count.
//
// Numbers of quotas are those of the last commit, at most half a minute old unless
// somebody has synced. The kernel gives up counting when a very large subvolume is
// deleted at once (drop_subtree_threshold in sysfs); that is noticed here at the next
// Limit or Usage and counting starts anew.
package btrfs
