package mount

import "maps"

// References count the Mounts of one volume by dockerd's mount ID. It is a
// multiset: `docker cp` to a running container sends Mount and Unmount with the
// ID that the container itself holds, and the container's stays.
//
// A nil map is empty. The methods return new values and change none.
type References map[string]int

// Add counts one more Mount of id.
func (r References) Add(id string) References {
	next := maps.Clone(r)
	if next == nil {
		next = References{}
	}
	next[id]++
	return next
}

// Drop counts one Mount of id less. An unknown id changes nothing: its Mount may
// have been answered by a process that is gone.
func (r References) Drop(id string) References {
	next := maps.Clone(r)
	if next[id] > 1 {
		next[id]--
	} else {
		delete(next, id)
	}
	return next
}

// Total is the number of Mounts without an Unmount.
func (r References) Total() int {
	total := 0
	for _, n := range r {
		total += n
	}
	return total
}
