// Package options turns the -o map of `docker volume create` into a typed,
// validated Spec. Below it nothing reads option maps. It does not look at any
// file or volume.
package options

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// OnRemove says what becomes of a volume's data when the volume is removed.
type OnRemove string

// What removal does with the data.
const (
	// Trash moves the data into the root's trash.
	Trash OnRemove = "trash"
	// Keep leaves the data where it is, without a record.
	Keep OnRemove = "keep"
	// Purge deletes the data.
	Purge OnRemove = "purge"
)

// A Spec is the validated form of a volume's options. A nil field was not given.
type Spec struct {
	OnRemove *OnRemove
	// UID and GID own the top directory of the data.
	UID, GID *uint32
	// Mode is the permission bits of the top directory, at most octal 7777.
	Mode *uint32
	// Given is the map as it came, for comparing with a later Create.
	Given map[string]string
}

// The options of this version.
const (
	nameGID      = "gid"
	nameMode     = "mode"
	nameOnRemove = "on-remove"
	nameUID      = "uid"
)

// maxID is the largest user or group ID; the one above means "no change" to chown(2).
const maxID = 1<<32 - 2

// known lists the options in the order messages show them.
func known() []string { return []string{nameGID, nameMode, nameOnRemove, nameUID} }

// later lists options that Berth does not take yet, with the reason where "not
// supported yet" would say too little. A name that ends in a dot is a prefix.
func later() map[string]string {
	const mounts = "Berth keeps volumes in directories of its own root and mounts no other file system yet; mount it on the host below the root or use it as the root"
	return map[string]string{
		"backup.":   "",
		"device":    mounts,
		"engine":    "the only engine is dir",
		"exclusive": "",
		"from":      "",
		"label.":    "",
		"o":         mounts,
		"owner":     "",
		"protect":   "",
		"ro":        "use -v VOLUME:PATH:ro for a container",
		"root":      "",
		"seed":      "",
		"size":      "the dir engine cannot enforce a size",
		"snapshot.": "",
		"trash.":    "",
		"type":      mounts,
	}
}

// Parse checks the map of a Create; nil is the empty map. The error is invalid
// and names the first wrong option in alphabetical order, its value and what is
// allowed.
func Parse(given map[string]string) (Spec, error) {
	spec := Spec{Given: maps.Clone(given)}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if err := spec.set(name, given[name], given); err != nil {
			return Spec{}, err
		}
	}
	return spec, nil
}

func (s *Spec) set(name, value string, given map[string]string) (err error) {
	switch name {
	case nameOnRemove:
		switch v := OnRemove(value); v {
		case Trash, Keep, Purge:
			s.OnRemove = &v
			return nil
		}
		return fault.Invalid("option on-remove=%s: want trash, keep or purge", quote(value))
	case nameUID:
		s.UID, err = parseID(name, value)
	case nameGID:
		s.GID, err = parseID(name, value)
	case nameMode:
		s.Mode, err = parseMode(value)
	default:
		err = refuse(name, given)
	}
	return err
}

// parseID takes decimal digits only: names would have to be looked up in the
// plugin's own passwd file, not in the container's or the host's.
func parseID(name, value string) (*uint32, error) {
	id, err := strconv.ParseUint(value, 10, 32)
	if err != nil || id > maxID {
		return nil, fault.Invalid("option %s=%s: want a number from 0 to %d", name, quote(value), uint32(maxID))
	}
	short := uint32(id)
	return &short, nil
}

func parseMode(value string) (*uint32, error) {
	mode, err := strconv.ParseUint(value, 8, 32)
	if err != nil || mode > 0o7777 || len(value) < 3 || len(value) > 5 {
		return nil, fault.Invalid("option mode=%s: want octal permission bits of 3 or 4 digits, as 0750", quote(value))
	}
	short := uint32(mode)
	return &short, nil
}

// refuse explains an option that is not taken.
func refuse(name string, given map[string]string) error {
	if (name == "device" || name == "o") && isBind(given["o"]) {
		return fault.Invalid("option %s=%s: bind mounts of host directories (o=bind,device=PATH of the local driver) are not supported; use -v PATH:PATH for the container or create the volume with the local driver", name, quote(given[name]))
	}
	for late, reason := range later() {
		if name != late && (!strings.HasSuffix(late, ".") || !strings.HasPrefix(name, late)) {
			continue
		}
		if reason != "" {
			reason = ": " + reason
		}
		return fault.Invalid("option %s is not supported yet%s", quote(name), reason)
	}
	if near := nearest(name); len(near) > 0 {
		return fault.Invalid("unknown option %s: did you mean %s?", quote(name), strings.Join(near, " or "))
	}
	return fault.Invalid("unknown option %s: allowed are %s", quote(name), strings.Join(known(), ", "))
}

// isBind reads local's `o` option.
func isBind(o string) bool {
	flags := strings.Split(o, ",")
	return slices.Contains(flags, "bind") || slices.Contains(flags, "rbind")
}

// nearest gives the known option that is equal but for case and punctuation, or
// else those that are at most two edits away.
func nearest(name string) []string {
	if len(name) > 32 {
		return nil
	}
	var near []string
	for _, option := range known() {
		limit := 2
		if len(option) <= 4 {
			limit = 1
		}
		if plain(name) == plain(option) {
			return []string{option}
		}
		if distance(strings.ToLower(name), option) <= limit {
			near = append(near, option)
		}
	}
	return near
}

// plain drops case and punctuation.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune("-_. ", r) {
			return -1
		}
		return r
	}, strings.ToLower(s))
}

// distance is the number of single-byte edits between two short names.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(diagonal+cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// quote shows a user's text on one line and no longer than a line.
func quote(s string) string {
	const limit = 60
	if len(s) > limit {
		return fmt.Sprintf("%q…", s[:limit])
	}
	return fmt.Sprintf("%q", s)
}

// Differences lists, sorted by option, where a later Create asked for something
// else than the volume was made with: "mode: has 0755, asked 0700".
func Differences(has, asked map[string]string) []string {
	names := slices.Collect(maps.Keys(has))
	for name := range asked {
		if _, ok := has[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	show := func(m map[string]string, name string) string {
		if value, ok := m[name]; ok {
			return value
		}
		return "none"
	}
	var out []string
	for _, name := range names {
		h, inHas := has[name]
		a, inAsked := asked[name]
		if h != a || inHas != inAsked {
			out = append(out, fmt.Sprintf("%s: has %s, asked %s", name, show(has, name), show(asked, name)))
		}
	}
	return out
}
