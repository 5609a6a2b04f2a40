package devmapper

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// SectorSize in bytes of the sectors in tables.
const SectorSize = 512

// A Number is a block device's.
type Number struct{ Major, Minor uint32 }

// String is the form of tables: "253:7".
func (n Number) String() string {
	return strconv.FormatUint(uint64(n.Major), 10) + ":" + strconv.FormatUint(uint64(n.Minor), 10)
}

func (n Number) dev() uint64 { return unix.Mkdev(n.Major, n.Minor) }

func numberOf(dev uint64) Number { return Number{Major: unix.Major(dev), Minor: unix.Minor(dev)} }

// NumberOf gives the number of the block device that path leads to.
func NumberOf(path string) (Number, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return Number{}, fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return Number{}, fmt.Errorf("%s is no block device", path)
	}
	return numberOf(st.Rdev), nil
}

// A Target is one stretch of a device's table.
type Target struct {
	// Start and Length in sectors.
	Start, Length uint64
	// Kind is the target's name: "linear", "thin".
	Kind string
	// Params are its parameters, or what it says of its state.
	Params string
}

// Linear is a stretch of another device, from its sector offset on.
func Linear(length uint64, device Number, offset uint64) Target {
	return Target{Length: length, Kind: "linear", Params: fmt.Sprintf("%s %d", device, offset)}
}

// Error is a stretch that fails all I/O.
func Error(length uint64) Target { return Target{Length: length, Kind: "error"} }

// Length of a table in sectors.
func Length(table []Target) uint64 {
	var length uint64
	for _, t := range table {
		length = max(length, t.Start+t.Length)
	}
	return length
}

// PoolOptions are those of a thin pool.
type PoolOptions struct {
	// BlockSectors is the size of what is allocated at a time and shared by
	// snapshots: a multiple of 128 sectors from 128 (64 KiB) to 2097152 (1 GiB).
	BlockSectors uint64
	// LowWater raises an event when fewer blocks are free.
	LowWater uint64
	// KeepDiscarded keeps what is discarded as the pool's, for a preallocated file
	// below it, which would get holes otherwise.
	KeepDiscarded bool
}

// ThinPool is a pool of length sectors that keeps its map in another device. Writes
// fail when it is full, and do not wait for somebody to enlarge it.
func ThinPool(length uint64, metadata, data Number, o PoolOptions) Target {
	params := fmt.Sprintf("%s %s %d %d ", metadata, data, o.BlockSectors, o.LowWater)
	if o.KeepDiscarded {
		params += "2 error_if_no_space no_discard_passdown"
	} else {
		params += "1 error_if_no_space"
	}
	return Target{Length: length, Kind: "thin-pool", Params: params}
}

// Thin is device id of a pool.
func Thin(length uint64, pool Number, id uint32) Target {
	return Target{Length: length, Kind: "thin", Params: fmt.Sprintf("%s %d", pool, id)}
}

// alignment of the records in tables.
const alignment = 8

func aligned(n int) int { return (n + alignment - 1) &^ (alignment - 1) }

// encodeTable makes the form that the kernel reads: for each target its
// description, the parameters with a final zero, and padding.
func encodeTable(table []Target) ([]byte, error) {
	var out []byte
	for _, t := range table {
		var spec unix.DmTargetSpec
		if len(t.Kind) >= len(spec.Target_type) || t.Kind == "" || t.Length == 0 {
			return nil, fmt.Errorf("no target: %+v", t)
		}
		size := aligned(unix.SizeofDmTargetSpec + len(t.Params) + 1)
		spec.Sector_start, spec.Length, spec.Next = t.Start, t.Length, uint32(size)
		copy(spec.Target_type[:], t.Kind)
		entry := make([]byte, size)
		copy(entry, (*[unix.SizeofDmTargetSpec]byte)(unsafe.Pointer(&spec))[:])
		copy(entry[unix.SizeofDmTargetSpec:], t.Params)
		out = append(out, entry...)
	}
	return out, nil
}

var errShort = errors.New("the kernel's answer is cut off")

// decodeTable reads count targets. In answers the place of the next one is counted
// from the first one's, other than in questions.
func decodeTable(data []byte, count int) ([]Target, error) {
	var targets []Target
	for at := 0; len(targets) < count; {
		if at < 0 || at > len(data)-unix.SizeofDmTargetSpec {
			return nil, errShort
		}
		head := data[at : at+unix.SizeofDmTargetSpec]
		params := data[at+unix.SizeofDmTargetSpec:]
		next := int(binary.NativeEndian.Uint32(head[20:]))
		if len(targets) < count-1 {
			if next <= at || next > len(data) || next-at < unix.SizeofDmTargetSpec {
				return nil, errShort
			}
			params = data[at+unix.SizeofDmTargetSpec : next]
		}
		targets = append(targets, Target{
			Start:  binary.NativeEndian.Uint64(head[0:]),
			Length: binary.NativeEndian.Uint64(head[8:]),
			Kind:   cString(head[24:40]),
			Params: cString(params),
		})
		at = next
	}
	return targets, nil
}

// decodeNames reads a list of struct dm_name_list: number, distance to the next
// entry or 0, name. What newer kernels add behind the name is passed over.
func decodeNames(data []byte) (map[string]Number, error) {
	devices := map[string]Number{}
	for {
		if len(data) < 12 {
			return nil, errShort
		}
		dev := binary.NativeEndian.Uint64(data)
		next := int(binary.NativeEndian.Uint32(data[8:]))
		if dev == 0 { // there is no device
			return devices, nil
		}
		entry := data
		if next != 0 {
			if next < 12 || next > len(data) {
				return nil, errShort
			}
			entry = data[:next]
		}
		devices[cString(entry[12:])] = numberOf(dev)
		if next == 0 {
			return devices, nil
		}
		data = data[next:]
	}
}

// decodeVersions reads a list of struct dm_target_versions.
func decodeVersions(data []byte) (map[string]string, error) {
	targets := map[string]string{}
	for {
		if len(data) < 16 {
			return nil, errShort
		}
		next := int(binary.NativeEndian.Uint32(data))
		entry := data
		if next != 0 {
			if next < 16 || next > len(data) {
				return nil, errShort
			}
			entry = data[:next]
		}
		targets[cString(entry[16:])] = fmt.Sprintf("%d.%d.%d", binary.NativeEndian.Uint32(data[4:]),
			binary.NativeEndian.Uint32(data[8:]), binary.NativeEndian.Uint32(data[12:]))
		if next == 0 {
			return targets, nil
		}
		data = data[next:]
	}
}

// cString is what is before the first zero.
func cString(b []byte) string {
	if end := bytes.IndexByte(b, 0); end >= 0 {
		b = b[:end]
	}
	return string(b)
}
