// Package tarball writes volumes as tar archives and extracts archives of anybody's.
//
// # Format
//
// What Write makes is POSIX pax, which GNU tar, bsdtar and Go read. Owners are numbers
// without names, times have nanoseconds, extended attributes are SCHILY.xattr records
// as GNU tar --xattrs and star write them, and POSIX ACLs are there a second time
// as SCHILY.acl records in words, for GNU tar --acls and bsdtar. Files with several
// names are stored once, the other names as hard links. Names are the bytes that they
// are. Sockets are left out: nobody listens to one that comes out of an archive.
//
// Holes are stored as zeros, which any compression makes vanish, though not the time
// to read them; Extract makes holes of zeros.
//
// The archive of a volume has manifest.json first and then the tree as data. A
// file that could not be read to its end is followed by an entry of the same name with
// the record BERTH.missing, at which Extract removes it.
//
// # Hostile archives
//
// Extract writes below one directory and nowhere else. Each step is taken from a
// directory handle that openat2(2) has given, with symbolic links and mounts refused,
// so an archive gains nothing by links that it makes itself. Names that would lead up, and
// names that were one kind of file and become another, are errors. Memory does not
// grow with what an archive says, but with its deepest path, which is bounded.
package tarball
