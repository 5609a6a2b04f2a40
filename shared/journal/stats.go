package journal

import (
	"math/bits"
	"time"
)

// Stats are counts since Open, for metrics, and the present sizes.
type Stats struct {
	// Appends (calls) and Records that became durable.
	Appends, Records uint64
	// Batches that carried them, each with one fdatasync.
	Batches uint64
	// BatchSizes counts batches by their number of appends: BatchSizes[0] those of
	// one, BatchSizes[i] those of more than 2^(i-1) and at most 2^i, the last one all
	// that are larger.
	BatchSizes [12]uint64
	// WriteTime is the sum of what batches took from the queue to the disk, and
	// LongestWrite the longest.
	WriteTime, LongestWrite time.Duration
	// Failures counts appends that were not stored.
	Failures uint64
	// Rewrites counts new files that an I/O error made necessary, and Snapshots
	// those that a Snapshot did.
	Rewrites, Snapshots uint64
	// Bytes is the length of the log, of which the snapshot at its start has
	// SnapshotBytes.
	Bytes, SnapshotBytes int64
}

// Stats returns the counts of this moment.
func (j *Journal) Stats() Stats {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.stats
}

func (j *Journal) count(fn func(*Stats)) {
	j.mu.Lock()
	defer j.mu.Unlock()
	fn(&j.stats)
}

// committed counts a batch that is durable.
func (s *Stats) committed(b *batch, took time.Duration) {
	s.Appends += uint64(b.calls)
	s.Records += uint64(b.count)
	s.Batches++
	s.BatchSizes[min(bits.Len(uint(b.calls-1)), len(s.BatchSizes)-1)]++
	s.WriteTime += took
	s.LongestWrite = max(s.LongestWrite, took)
}
