// Package tree copies, measures and removes whole directory trees that programs
// may write to meanwhile, and that nobody vouches for.
//
// # Hostile trees
//
// A tree is walked through directory handles. Every step down is one openat2(2) that
// follows no symbolic link and enters no mount (on kernels without openat2 one
// component at a time, with the mount's number compared, as package rooted does).
// Nothing but regular files and directories is ever opened: a file is first taken
// hold of by O_PATH, which runs no driver and wakes no other end of a pipe, and what
// that handle shows to be a regular file is then opened through the handle. So it
// does not help to exchange a file for a device at the right moment.
//
// Directories that wait for their turn hold no descriptor. They are opened again by
// their path from the top, or from the directory that the worker has just left, so
// the number of descriptors depends on the number of workers alone, not on the depth
// of the tree or the length of its directories.
//
// # Trees in use
//
// Copy does not fail because files come, go, change, shrink or turn into something else. A
// file that changed while it was read is read again a few times; Stats tells how
// many never held still. Writes through a memory map to a page that is dirty
// already leave no trace in a file's times and so cannot be seen. A file that is moved
// during the copy may be in it twice, or not at all, as with any copy that is
// made one file after the other.
//
// # What is kept
//
// Content with its holes, hard links, owners, modes with set-ID and sticky bits, access and
// modification times to the nanosecond, symbolic links, device nodes, pipes, sockets, POSIX ACLs,
// all extended attributes that the target can store, and on btrfs the
// attribute "no copy on write". Not kept: creation times, other inode flags such as
// "immutable", project IDs, NFSv4 ACLs, and security.evm, which is valid for one
// inode only.
//
// # On disk
//
// Copy ends with one syncfs(2) of the target's file system, which writes the journal once,
// where an fsync(2) for each file would do so for each file. It waits for what others
// have written to the same file system, too; that is bounded by the kernel's limit for
// unwritten data, while the cost of fsync grows with the number of files. On kernels
// before 5.8 syncfs does not tell of blocks that could not be written; the file system
// itself does, by ceasing to work. File systems of which it is not known that they
// obey syncfs, FUSE for one, get an fsync for each file and directory.
package tree
