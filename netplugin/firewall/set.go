package firewall

import (
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
)

// setName is the name of a set or map in Berth's tables.
type setName string

// The sets whose elements are networks.
const (
	setBridges     setName = "bridges"       // every Berth bridge
	setOpen        setName = "open"          // those that are not internal
	setSame        setName = "same"          // each Berth bridge, twice: from itself to itself
	setICC         setName = "icc"           // those whose containers may talk to each other
	setRouted      setName = "routed"        // those whose containers are reached by their own addresses
	setUnprotected setName = "unprotected"   // those of which all ports are reached so
	setHost        setName = "host_firewall" // those whose published ports are the host's firewall's affair
	setLimited     setName = "limited"       // those whose published ports are for some sources only
	setAllowed     setName = "allowed"       // these sources
	setTrusted     setName = "trusted"       // links from which published ports are also reached by the containers' addresses
	setSwitched    setName = "switched"      // those that are part of a LAN
	setForeign     setName = "foreign"       // bridges of other container networks
	setSources     setName = "sources"       // subnets that are masqueraded
	setHome        setName = "home"          // subnets, each with its bridge
)

// The maps that lead to the source address of outgoing traffic and, for published
// ports, to a container.
const (
	mapSNAT        setName = "snat_sources" // by subnet
	mapPublished   setName = "published"    // by host port, on all addresses of the host
	mapPublishedAt setName = "published_at" // ... on one of them
	mapRanges      setName = "ranges"       // ranges that keep their numbers, on all addresses of the host
	mapRangesAt    setName = "ranges_at"    // ... on one of them
)

// The sets of containers' own ports that may be reached by the containers'
// addresses.
const (
	setDirect       setName = "direct"
	setDirectRanges setName = "direct_ranges"
)

// setNames in the order they are made and shown.
func setNames() []setName {
	return []setName{
		setBridges, setOpen, setSame, setICC, setRouted, setUnprotected, setHost, setLimited, setAllowed, setTrusted,
		setSwitched, setForeign, setSources, setHome, mapSNAT,
		mapPublished, mapPublishedAt, mapRanges, mapRangesAt, setDirect, setDirectRanges,
	}
}

// A field is one part of an element.
type field uint8

const (
	linkField field = iota
	addrField
	protoField
	portField
)

// A shape says what the elements of a set are made of.
type shape struct {
	v6 bool
	// key, and for a map what it leads to.
	key, value []field
	// interval says that a key may be a range in each of its fields.
	interval bool
}

func shapeOf(name setName, v6 bool) shape {
	s := shape{v6: v6, key: []field{linkField}}
	switch name {
	case setBridges, setOpen, setICC, setRouted, setUnprotected, setHost, setLimited, setSwitched, setForeign:
	case setSame, setTrusted:
		s.key = []field{linkField, linkField}
	case setAllowed, setHome:
		s.key, s.interval = []field{linkField, addrField}, true
	case setSources:
		s.key, s.interval = []field{addrField}, true
	case mapSNAT:
		s.key, s.value, s.interval = []field{addrField}, []field{addrField}, true
	case mapPublished:
		s.key, s.value = []field{protoField, portField}, []field{addrField, portField}
	case mapPublishedAt:
		s.key, s.value = []field{addrField, protoField, portField}, []field{addrField, portField}
	case mapRanges:
		s.key, s.value, s.interval = []field{protoField, portField}, []field{addrField}, true
	case mapRangesAt:
		s.key, s.value, s.interval = []field{addrField, protoField, portField}, []field{addrField}, true
	case setDirect:
		s.key = []field{addrField, protoField, portField}
	case setDirectRanges:
		s.key, s.interval = []field{addrField, protoField, portField}, true
	}
	return s
}

// joined says that keys have several fields. The kernel takes their intervals in
// one piece, and those of a single field as two elements.
func (s shape) joined() bool { return len(s.key) > 1 }

// width is the length in bytes of a field's data, without what fills a register.
func (s shape) width(f field) int {
	switch {
	case f == linkField:
		return len(linkName(""))
	case f == addrField && s.v6:
		return 16
	case f == addrField:
		return 4
	case f == protoField:
		return 1
	default:
		return 2
	}
}

// padded is the length of several fields in registers of four bytes.
func (s shape) padded(fields []field) int {
	n := 0
	for _, f := range fields {
		n += (s.width(f) + 3) / 4 * 4
	}
	return n
}

// dataType is the fields in the library's words.
func (s shape) dataType(fields []field) nftables.SetDatatype {
	types := make([]nftables.SetDatatype, len(fields))
	for i, f := range fields {
		switch {
		case f == linkField:
			types[i] = nftables.TypeIFName
		case f == addrField && s.v6:
			types[i] = nftables.TypeIP6Addr
		case f == addrField:
			types[i] = nftables.TypeIPAddr
		case f == protoField:
			types[i] = nftables.TypeInetProto
		default:
			types[i] = nftables.TypeInetService
		}
	}
	if len(types) == 1 {
		return types[0]
	}
	return nftables.MustConcatSetType(types...)
}

// set is the declaration of one of the sets.
func (t table) set(of *nftables.Table, name setName) *nftables.Set {
	shape := shapeOf(name, t.v6)
	s := &nftables.Set{
		Table: of, Name: string(name), KeyType: shape.dataType(shape.key), KeyByteOrder: binaryutil.BigEndian,
		Interval: shape.interval, Concatenation: shape.joined(),
	}
	if shape.key[0] == linkField {
		s.KeyByteOrder = binaryutil.NativeEndian
	}
	if shape.value != nil {
		s.IsMap, s.DataType = true, shape.dataType(shape.value)
	}
	return s
}
