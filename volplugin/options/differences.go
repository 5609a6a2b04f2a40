package options

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
)

// Differences lists, sorted by option, where a later Create asked for something
// else than the volume was made with: "mode: has 0755, asked 0700". Values that
// mean the same are no difference: mode=750 and mode=0750, size=1G and
// size=1024M, ro=false and no ro.
func Differences(has, asked map[string]string) []string {
	meansHas, meansAsked := meaning(has), meaning(asked)
	names := slices.Collect(maps.Keys(meansHas))
	for name := range meansAsked {
		if _, ok := meansHas[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	show := func(m map[string]string, name string) string {
		if value, ok := m[name]; ok {
			if value == "" {
				return `""`
			}
			return value
		}
		return "none"
	}
	var out []string
	for _, name := range names {
		h, inHas := meansHas[name]
		a, inAsked := meansAsked[name]
		if h != a || inHas != inAsked {
			out = append(out, fmt.Sprintf("%s: has %s, asked %s", name, show(has, name), show(asked, name)))
		}
	}
	return out
}

// meaning writes options so that equal ones are equal texts, and leaves out those
// that ask for what is so without them. Options that this version does not take,
// as a newer one may have stored them, are compared as they are.
func meaning(given map[string]string) map[string]string {
	out := make(map[string]string, len(given))
	for name, value := range given {
		var s Spec
		if err := s.set(name, value, nil); err != nil {
			out[name] = value
			continue
		}
		if text, ok := s.text(name, value); ok {
			out[name] = text
		}
	}
	return out
}

// text is the canonical form of the one option that s was set from; ok is false
// when it asks for nothing.
func (s *Spec) text(name, value string) (text string, ok bool) {
	switch name {
	case "engine":
		return s.Engine, s.Engine != ""
	case "exclusive":
		// Asked for or not, some volumes are exclusive: false is not the default.
		return strconv.FormatBool(s.Exclusive), true
	case "nocow", "nodev", "noexec", "nosuid", "protect", "ro", "sparse":
		return "true", s.NoCOW || s.NoDev || s.NoExec || s.NoSUID || s.Protect || s.ReadOnly || s.Sparse
	case "gid":
		return strconv.FormatUint(uint64(*s.GID), 10), true
	case "uid":
		return strconv.FormatUint(uint64(*s.UID), 10), true
	case "mode":
		return strconv.FormatUint(uint64(*s.Mode), 8), true
	case "size":
		return strconv.FormatUint(s.Size, 10), true
	case "backup.keep":
		return s.BackupKeep.String(), true
	case "backup.schedule":
		return s.BackupSchedule, true
	case "from-backup":
		return s.FromBackup, true
	case "snapshot.keep":
		return s.Keep.String(), true
	case "snapshot.schedule":
		return s.Schedule, true
	case "trash.keep":
		return s.TrashKeep.String(), true
	case "o":
		return value, value != ""
	}
	return value, true
}
