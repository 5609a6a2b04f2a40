package presence

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

const (
	// maxLease bounds a lease's file.
	maxLease = 64 << 10
	// maxGeneration is far from overflow, and no file that Berth wrote has it.
	maxGeneration = 1 << 53
)

// leaseRecord is the file of one generation. Only the host that made it changes it.
type leaseRecord struct {
	Schema int    `json:"schema"`
	Host   string `json:"host"`
	Name   string `json:"name"`
	// Made tells this file from others of its generation, which another host may
	// have been faster to make.
	Made  string    `json:"made"`
	State state     `json:"state"`
	Since time.Time `json:"since"`
	// From is whom it is taken from, in state taking.
	From *previous `json:"from,omitempty"`
}

type state string

// The states of a lease's file.
const (
	held state = "held"
	// taking: made, but not looked yet whether the dead owner is alive after all. To
	// the owner it is lost already.
	taking state = "taking"
	free   state = "free"
)

// previous is the owner that was judged dead, and its file when it was.
type previous struct {
	File  string       `json:"file"`
	Stamp rooted.Stamp `json:"stamp"`
}

// current reads the highest generation, 0 when there is none. An error that wraps
// errDamaged comes with the generation.
func current(dir *rooted.Dir) (uint64, leaseRecord, error) {
	for range attempts {
		if err := dir.Refresh(); err != nil {
			return 0, leaseRecord{}, unavailable(err)
		}
		names, err := dir.Names()
		if err != nil {
			return 0, leaseRecord{}, unavailable(err)
		}
		var highest uint64
		for _, name := range names {
			if g, ok := parseLeaseName(name); ok {
				highest = max(highest, g)
			}
		}
		if highest == 0 {
			return 0, leaseRecord{}, nil
		}
		rec, err := readLease(dir, leaseName(highest))
		if errors.Is(err, fs.ErrNotExist) {
			continue // a higher one is there by now, or it was withdrawn
		}
		if err != nil && !errors.Is(err, errDamaged) {
			err = unavailable(err)
		}
		return highest, rec, err
	}
	return 0, leaseRecord{}, fault.Unavailable("the lease in %s changes while it is read, over and over", dir.Path())
}

func readLease(dir *rooted.Dir, name string) (leaseRecord, error) {
	data, err := dir.ReadFile(name, maxLease)
	if errors.Is(err, rooted.ErrNotFile) || errors.Is(err, rooted.ErrSymlink) || errors.Is(err, rooted.ErrTooLarge) {
		return leaseRecord{}, fmt.Errorf("%w: %w", err, errDamaged)
	}
	if err != nil {
		return leaseRecord{}, err
	}
	rec, err := decodeLease(data)
	if err != nil {
		return leaseRecord{}, fmt.Errorf("%s/%s %w", dir.Path(), name, err)
	}
	return rec, nil
}

// decodeLease gives errors that wrap errDamaged.
func decodeLease(data []byte) (leaseRecord, error) {
	var rec leaseRecord
	if err := json.Unmarshal(data, &rec); err != nil {
		return leaseRecord{}, fmt.Errorf("%w: %w", errDamaged, err)
	}
	known := rec.State == held || rec.State == free || rec.State == taking && rec.From != nil && isFileName(rec.From.File)
	if rec.Schema != schema || rec.Host == "" || rec.Made == "" || !known {
		return leaseRecord{}, fmt.Errorf("%w or was written by a newer Berth", errDamaged)
	}
	return rec, nil
}

func encode(rec leaseRecord) ([]byte, error) {
	data, err := json.Marshal(rec)
	if err != nil {
		return nil, fmt.Errorf("encode lease: %w", err)
	}
	return append(data, '\n'), nil
}

func leaseName(generation uint64) string { return strconv.FormatUint(generation, 10) + suffix }

// parseLeaseName takes the one form that leaseName writes.
func parseLeaseName(name string) (uint64, bool) {
	number, ok := strings.CutSuffix(name, suffix)
	if !ok {
		return 0, false
	}
	g, err := strconv.ParseUint(number, 10, 64)
	return g, err == nil && g > 0 && leaseName(g) == name
}

func nameOf(rec leaseRecord) string { return cmp.Or(rec.Name, rec.Host) }
