package thin

import (
	"strconv"
	"strings"

	"github.com/docker/go-units"

	"github.com/berth-plugin/berth/shared/fault"
)

// ParseSettings reads the setting BERTH_THIN_POOL: NAME=VALUE with white space between
// them, as "data=/dev/sdb metadata=/dev/sdc1 volume-size=20G". The error is invalid and
// names what is wrong.
func ParseSettings(text string) (Settings, error) {
	var s Settings
	sizes := map[string]*uint64{"size": &s.DataSize, "block-size": &s.BlockSize, "volume-size": &s.DefaultSize}
	devices := map[string]*string{"data": &s.Data, "metadata": &s.Metadata}
	seen := map[string]bool{}
	for entry := range strings.FieldsSeq(text) {
		name, value, _ := strings.Cut(entry, "=")
		if seen[name] {
			return Settings{}, fault.Invalid("thin pool: %s is given twice", name)
		}
		seen[name] = true
		var err error
		switch {
		case devices[name] != nil:
			*devices[name], err = value, checkDevice(name, value)
		case sizes[name] != nil:
			*sizes[name], err = parseSize(name, value)
		case name == "sparse":
			if s.Sparse, err = strconv.ParseBool(value); err != nil {
				err = fault.Invalid("thin pool: sparse=%.80q: want true or false", value)
			}
		default:
			err = fault.Invalid("thin pool: %.80q: want data=, metadata=, size=, sparse=, block-size= or volume-size=", entry)
		}
		if err != nil {
			return Settings{}, err
		}
	}
	if s.Data != "" && (s.DataSize != 0 || s.Sparse) {
		return Settings{}, fault.Invalid("thin pool: size and sparse are of a pool on files, and data=%s is a device", s.Data)
	}
	_, err := New(s)
	return s, err
}

func checkDevice(name, value string) error {
	if base, ok := strings.CutPrefix(value, "/dev/"); !ok || base == "" || strings.Contains(value, "..") {
		return fault.Invalid("thin pool: %s=%.80q: want a block device, as /dev/sdb", name, value)
	}
	return nil
}

func parseSize(name, value string) (uint64, error) {
	n, err := units.RAMInBytes(value)
	if err != nil || n <= 0 {
		return 0, fault.Invalid("thin pool: %s=%.80q: want a size, as 20G", name, value)
	}
	return uint64(n), nil
}
