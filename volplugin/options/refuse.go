package options

import (
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// known lists the options as messages show them.
func known() []string {
	var names []string
	for _, option := range table() {
		names = append(names, option.name)
	}
	return append(names, labelPrefix+"KEY")
}

// refused lists options of other drivers that Berth does not take, with what to
// do instead.
func refused() map[string]string {
	const cloud = "it is for convoy's volumes in a cloud, which are not supported"
	return map[string]string{
		"backup":      "use from-backup=TARGET/VOLUME, or backup.schedule",
		"backup-url":  "use from-backup=TARGET/VOLUME",
		"driver":      "the driver is chosen by `docker volume create -d`; for convoy's drivers of storage use engine",
		"endpoint":    "places of backups are set up by docker berth target add",
		"filesystem":  "use fs",
		"fstype":      "use fs",
		"id":          cloud,
		"iops":        cloud,
		"label":       "want label.KEY=VALUE",
		"mountpoint":  "data lies in a volume root; see `docker berth volume adopt` for a directory that is elsewhere",
		"path":        "data lies in a volume root; see `docker berth volume adopt` for a directory that is elsewhere",
		"quota":       "use size",
		"read-only":   "use ro",
		"readonly":    "use ro",
		"retention":   "use snapshot.keep",
		"s3-endpoint": "places of backups are set up by docker berth target add",
		"schedule":    "use snapshot.schedule",
		"share":       "use type and device, as type=nfs and device=HOST:/PATH",
		"snapshot":    "use from=VOLUME@SNAPSHOT, or snapshot.schedule",
		"vm":          "convoy's disk images for virtual machines are not supported; engine=image keeps a volume in an image",
	}
}

// refuse explains an option that is not taken.
func refuse(name string) error {
	if reason, ok := refused()[name]; ok {
		return fault.Invalid("option %s is not taken: %s", quote(name), reason)
	}
	if near := nearest(name); len(near) > 0 {
		return fault.Invalid("unknown option %s: did you mean %s?", quote(name), strings.Join(near, " or "))
	}
	return fault.Invalid("unknown option %s: allowed are %s", quote(name), strings.Join(known(), ", "))
}

// nearest gives the known option that is equal but for case and punctuation, or
// else those that are at most two edits away, one edit for short names.
func nearest(name string) []string {
	if len(name) > 32 {
		return nil
	}
	if i := len(labelPrefix); len(name) > i && plain(name[:i]) == "label" {
		return []string{labelPrefix + "KEY"}
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
		// One edit makes one short name of any other: "o", "fs", "ro".
		if len(option) > 2 && distance(strings.ToLower(name), option) <= limit {
			near = append(near, option)
		}
	}
	return near
}

// plain drops case and punctuation.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune("-_. :", r) {
			return -1
		}
		return r
	}, strings.ToLower(s))
}

// distance is the number of single-byte edits between two short names, where two
// neighbours that are swapped are one edit.
func distance(a, b string) int {
	before, above := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range above {
		above[j] = j
	}
	for i := range len(a) {
		row := make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = min(above[j]+cost, row[j]+1, above[j+1]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, above = above, row
	}
	return above[len(b)]
}
