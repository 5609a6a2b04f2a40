// Package archive keeps backups as files that need no program of Berth's to be read: one
// compressed tar archive for each, as package tarball writes them, in a directory or an S3
// bucket. Every backup is a full one, and nothing is encrypted but by the transport.
//
// # Layout
//
//	berth-archive.json      says that this is a repository
//	VOLUME/ID.tar.zst       manifest.json and data/, readable by tar --zstd
//	VOLUME/ID.json          the record: whose backup it is, how much, and the sum
//
// The record is written when the archive is there, whole and of the right size. A backup
// exists when its record does. So a program that is killed leaves at most an archive
// without a record, or an upload that was not completed, which Prune removes when they
// are a day old. Names are chosen by chance and nothing is ever changed, so hosts need
// not know of each other.
//
// A record is not to be trusted more than an archive: what it says of its name is compared with
// its name, and the rest is shown or compared only.
package archive
