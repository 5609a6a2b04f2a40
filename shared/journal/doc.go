// Package journal is a durable log of records in one file: appended, many
// commits to one fdatasync, checksummed, and replaced by a snapshot before it
// grows too long. It is for state that changes more often than a database with
// two fsyncs a transaction can follow. It does not know what a record means.
//
// # Use
//
// The owner keeps its state in memory under a lock of its own. It decides and
// appends under that lock, which costs no I/O, and waits after unlocking:
//
//	s.mu.Lock()
//	lease := s.choose()
//	commit := s.log.Append(encode(lease))
//	s.mu.Unlock()
//	err := commit.Wait(ctx)
//
// Records should say what is (key and value, or that a key is gone), not what
// has changed, so that the last record of a key is all that counts. When Wait
// fails the owner locks again, puts its memory right, and appends the record of
// what is now true, without the need to wait for it: then a snapshot that was
// taken in between does not keep what failed.
//
// # File
//
// All numbers are little-endian, all checksums CRC-32C.
//
//	0     header: magic "BERTHLOG", version, salt, end of the snapshot, checksum
//	512   the header again: it lies in another sector
//	1024  frames, one behind the other
//	      zeros, never fewer than a frame's head, to the end of the file
//
//	frame: tag (half of the salt), checksum, length, number of records,
//	       number of the first record; then each record behind its length
//
// A frame is what one fdatasync made durable (or a part of a snapshot). Its
// checksum covers the salt, which is random for each file, the frame's place in
// the file and the count of records before it, so no bytes of another file, of
// another place or of an earlier attempt are taken for it. A frame is written only
// when the one before is durable. So one that is torn is the last one, was never
// acknowledged, and a valid frame behind an invalid one proves damage.
//
// The zeros are room that was allocated beforehand. They make fdatasync cheaper,
// since the size of the file stays as it is; they make a full disk known before
// anything is written; and a file without them was cut off.
//
// A file is never repaired in place. Whatever is in doubt (after damage, after an
// fdatasync that failed) is written again, into a new file that takes the place of
// the old one with rename(2).
//
// # Why not a library
//
// The logs in Go's ecosystem serve one writer that syncs by itself, and none of
// those looked at brings what leases need: tidwall/wal has no checksums,
// hashicorp/raft-wal refuses a damaged file and needs a second database,
// Prometheus' log drops what is behind damage and syncs per segment, etcd's is
// bound to Raft's records. None groups the commits of many callers, keeps a
// damaged tail aside, or survives an fsync that failed.
package journal
