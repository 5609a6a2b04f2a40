// Package volume keeps the truth about volumes beside their data: records, the
// states a volume goes through, snapshots, the trash, and the layout of a root
// directory.
//
//	<root>/NAME                              the data of volume NAME, for engines of directories
//	<root>/.berth/root.json                  the marker: this is a root, and which one
//	<root>/.berth/volumes/NAME.json          the record of volume NAME
//	<root>/.berth/images/NAME.img            the data of volume NAME of engine image
//	<root>/.berth/snapshots/UUID/SNAP        a snapshot of the volume with that UUID
//	<root>/.berth/snapshots/UUID/SNAP.json   its record
//	<root>/.berth/snapshots/UUID/.volume.json
//	                                         the last record of a volume that was removed
//	                                         while its data was kept: when the data becomes
//	                                         a volume again, the snapshots are its
//	<root>/.berth/trash/UUID                 the data of a removed volume
//	<root>/.berth/trash/UUID.json            its record, with the time of removal
//	<root>/.berth/tmp/                       files and trees on their way to one of the above;
//	                                         file.HOST.PROCESS.UUID says who writes a file, so
//	                                         that the next process of that host removes what a
//	                                         killed one has left
//	<root>/.berth/tmp/claim.KEY              the right to replace a record, for a moment
//
// A root may be shared by several hosts, over NFS or otherwise, so there are no
// lock files that would have to be kept and no database in it. What arbitrates is what
// a file server does in one step: a record is made under its name by link(2), which
// exactly one host can do; a removal begins by the link of UUID.json in the trash; a
// record that is there is replaced by rename(2), by the host whose claim was linked,
// after the file and its content are on disk. What takes longer than that step is
// guarded by the phase in the record, with the host that works on it, and by the record's
// time, which that host keeps near the present. A host that finds another one's half-made
// step waits for it, and takes it over only when it is so old that its host must be gone.
//
// # What is killed
//
// Each operation first records what it is about to do, then does it in steps that may
// be repeated, and last takes the record to its end. Settle, SettleClaim and
// SettleSnapshots go on from whatever is recorded:
//
//	creating       undone: nobody has seen the volume
//	restoring      made anew, from what the record names; broken when that is gone
//	rolling-back   completed
//	renaming       completed, or undone if the new name is taken
//	removing       completed
//	in the trash   a claim without a removal is taken back, a restoration completed or
//	               taken back, a deletion completed
//	snapshots      half-made and half-removed ones are removed
//
// What was once a volume is deleted from the trash alone, under a record that says so;
// what carries a name that no record knows is nobody's to remove.
//
// The package does not mount anything but through engines, counts no users and holds no
// locks: the caller sees to it that one host does one thing at a time with a name, that of
// a volume that is cloned included, and that what is rolled back, renamed or removed is in
// nobody's use. All calls may block as long as the file system does.
package volume
