package devmapper

import (
	"fmt"
	"strconv"
	"strings"
)

// MetadataBlock is the size in bytes of the blocks that a pool's metadata is counted
// in, whatever its data blocks are.
const MetadataBlock = 4096

// A PoolMode says what a pool lets be done.
type PoolMode string

// Modes of a pool, from the best to the worst.
const (
	// PoolWritable is a pool in good health.
	PoolWritable PoolMode = "rw"
	// PoolNoData has no free block: writes to new places fail.
	PoolNoData PoolMode = "out_of_data_space"
	// PoolReadOnly has no metadata left, or could not write it.
	PoolReadOnly PoolMode = "ro"
	// PoolFailed fails all I/O; its metadata cannot be read.
	PoolFailed PoolMode = "fail"
)

// A PoolStatus is what a thin pool says of itself.
type PoolStatus struct {
	Mode PoolMode
	// Transaction is the number that Message set_transaction_id sets.
	Transaction uint64
	// Blocks of metadata, of MetadataBlock bytes each, and of data.
	MetadataUsed, MetadataTotal uint64
	DataUsed, DataTotal         uint64
	// NeedsCheck: the metadata has to be checked by thin_check before the pool can be
	// written again.
	NeedsCheck bool
	// Queues: writes wait when there is no free block, and do not fail.
	Queues bool
}

// ParsePool reads the state of a target thin-pool.
func ParsePool(state string) (PoolStatus, error) {
	fields := strings.Fields(state)
	if len(fields) == 1 && (fields[0] == "Fail" || fields[0] == "Error") {
		return PoolStatus{Mode: PoolFailed}, nil
	}
	bad := func(err error) (PoolStatus, error) {
		if err != nil {
			return PoolStatus{}, fmt.Errorf("state of a thin pool %.200q: %w", state, err)
		}
		return PoolStatus{}, fmt.Errorf("state of a thin pool %.200q", state)
	}
	if len(fields) < 4 {
		return bad(nil)
	}
	s := PoolStatus{Mode: PoolWritable}
	var err error
	if s.Transaction, err = strconv.ParseUint(fields[0], 10, 64); err != nil {
		return bad(err)
	}
	if s.MetadataUsed, s.MetadataTotal, err = parts(fields[1]); err != nil {
		return bad(err)
	}
	if s.DataUsed, s.DataTotal, err = parts(fields[2]); err != nil {
		return bad(err)
	}
	// fields[3] is the root of a metadata snapshot; the rest came over the years and
	// is told by its words.
	for _, word := range fields[4:] {
		switch word {
		case "ro":
			s.Mode = PoolReadOnly
		case "out_of_data_space":
			s.Mode = PoolNoData
		case "needs_check":
			s.NeedsCheck = true
		case "queue_if_no_space":
			s.Queues = true
		}
	}
	return s, nil
}

func parts(text string) (used, total uint64, err error) {
	a, b, _ := strings.Cut(text, "/")
	if used, err = strconv.ParseUint(a, 10, 64); err != nil {
		return 0, 0, err
	}
	total, err = strconv.ParseUint(b, 10, 64)
	return used, total, err
}

// ParseThin reads the state of a target thin: how many sectors have blocks of
// their own or shared ones. failed says that the pool has failed.
func ParseThin(state string) (mapped uint64, failed bool, err error) {
	fields := strings.Fields(state)
	if len(fields) == 1 && (fields[0] == "Fail" || fields[0] == "Error") {
		return 0, true, nil
	}
	if len(fields) != 2 {
		return 0, false, fmt.Errorf("state of a thin device %.200q", state)
	}
	mapped, err = strconv.ParseUint(fields[0], 10, 64)
	if err != nil {
		return 0, false, fmt.Errorf("state of a thin device %.200q: %w", state, err)
	}
	return mapped, false, nil
}
