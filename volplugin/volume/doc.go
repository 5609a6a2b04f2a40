// Package volume keeps the truth about volumes beside their data: records, the
// states a volume goes through, the trash, and the layout of a root directory.
//
//	<root>/NAME                       the data of volume NAME
//	<root>/.berth/root.json           the marker: this is a root, and which one
//	<root>/.berth/volumes/NAME.json   the record of volume NAME
//	<root>/.berth/trash/UUID          the data of a removed volume
//	<root>/.berth/trash/UUID.json     its record, with the time of removal
//	<root>/.berth/tmp/                files on their way to one of the above
//
// A root may be shared by several hosts, over NFS or otherwise, so there are no
// lock files and no database in it. What arbitrates is what a file server does in
// one step: a record is made under its name by link(2), which exactly one host
// can do; a removal begins by the link of UUID.json in the trash; files are
// replaced by rename(2) after they and their content are on disk. A host that
// finds another one's half-made step waits for it, and takes it over only when it
// is so old that its host must be gone.
//
// The package does not mount anything, counts no users and holds no locks: the
// caller sees to it that one host does one thing at a time with a name. All calls
// may block as long as the file system does.
package volume
