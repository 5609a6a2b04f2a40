// Package treeengine is the engine of roots whose volumes are directory trees: the
// data of volume web is the tree web in the root, and its snapshots, what is in the
// trash and what is on its way are trees of the same file system. What a tree is and
// how it is copied, an engine.Trees knows.
//
// # No half-made copies
//
// A copy is built in the place's Tmp and gets its final name by one rename. Names in
// Tmp begin with the volume's UUID and say what they are for, so whoever repeats a
// call after a kill finds what the first one left, and starts it anew:
//
//	UUID.snapshot.SNAP   a snapshot that is being made
//	UUID.removed.SNAP    a snapshot that is being deleted
//	UUID.clone           data for a new volume
//	UUID.cloned          a file: the clone is complete, in Tmp or under the volume's name
//	UUID.rollback.part   data for a rollback
//	UUID.rollback        the same, complete
//	UUID.destroyed       an entry of the trash that is being deleted
//
// Trees may put ".making" behind such a name until the copy is complete.
//
// Who repeats no call has RemoveSnapshot, Abandon and Destroy, which delete all of
// it. Top directories in Tmp carry the times of what they are copies of, so their
// mtime says nothing about their age.
//
// NFS can neither exchange two names nor refuse to replace an empty directory. Where
// the kernel cannot, a look before the rename is all there is; the records, which are
// made exclusively, keep hosts from meeting there.
//
// # Rollback
//
// The data is never gone without a way back. First there is a complete copy of the
// snapshot in Tmp, then the data becomes the snapshot keep, then the copy becomes the
// data. Which of these have happened is seen from what exists:
//
//	data  keep  copy
//	yes   no    any    make the copy anew, go on from there
//	no    yes   yes    the copy becomes the data
//	no    yes   no     somebody cleaned Tmp: make the copy anew, it becomes the data
//	yes   yes   no     complete
//	yes   yes   yes    something else has taken the volume's name: an error
//	no    no    any    there is nothing to keep: an error
//
// So keep has to be a name that is no snapshot's when Rollback is called for the first
// time; the caller sees to it by making the snapshot's record first.
package treeengine
