package options

import (
	"cmp"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// unknown refuses an option that nobody knows and names those that the user may
// have meant, or all of Berth's own.
func unknown(key string, known []string, own string) error {
	near := nearest(key, known)
	if len(near) == 0 {
		return fault.Invalid("unknown option %s: Berth has %s", shown(key), own)
	}
	return fault.Invalid("unknown option %s: did you mean %s?", shown(key), strings.Join(near, " or "))
}

// nearest returns up to three of the known names, best first.
func nearest(key string, known []string) []string {
	// Nobody mistypes into a name of this length, and the distance costs its
	// product with the length of each known name.
	const longest = 80
	// The beginning of a short name is meant to be that name, from this length on.
	const beginning = 3
	if len(key) > longest {
		return nil
	}
	type candidate struct {
		name     string
		distance int
	}
	var found []candidate
	lower := strings.ToLower(key)
	for _, name := range known {
		d := distance(lower, name)
		if docker := strings.HasPrefix(name, dockerPrefix); docker {
			// The distance to the last part counts too: enable_icc is meant
			// to be com.docker.network.bridge.enable_icc.
			d = min(d, distance(lower, name[strings.LastIndexByte(name, '.')+1:]))
		} else if len(lower) >= beginning && strings.HasPrefix(name, lower) {
			d = min(d, 1)
		}
		if d <= max(1, min(len(key), len(name))/3) {
			found = append(found, candidate{name, d})
		}
	}
	slices.SortFunc(found, func(a, b candidate) int {
		if a.distance != b.distance {
			return a.distance - b.distance
		}
		// The short names are Berth's own.
		return cmp.Or(len(a.name)-len(b.name), strings.Compare(a.name, b.name))
	})
	names := make([]string, 0, 3)
	for _, c := range found[:min(3, len(found))] {
		names = append(names, c.name)
	}
	return names
}

// distance is the number of bytes to insert, delete, change or swap with their
// neighbour to make b of a.
func distance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := last[j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			row[j] = min(change, last[j]+1, row[j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
