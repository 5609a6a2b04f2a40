package ipam

// names has strings by number, from 1, for entries that need not have one.
type names struct {
	list   []string
	unused []uint32
}

func (n *names) at(i uint32) string {
	if i == 0 {
		return ""
	}
	return n.list[i-1]
}

// add returns the number of a string, 0 for "".
func (n *names) add(s string) uint32 {
	if s == "" {
		return 0
	}
	if last := len(n.unused) - 1; last >= 0 {
		i := n.unused[last]
		n.unused = n.unused[:last]
		n.list[i-1] = s
		return i
	}
	n.list = append(n.list, s)
	return uint32(len(n.list))
}

func (n *names) remove(i uint32) {
	if i != 0 {
		n.list[i-1] = ""
		n.unused = append(n.unused, i)
	}
}
