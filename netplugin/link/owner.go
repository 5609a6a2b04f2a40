package link

import (
	"strings"
)

// group marks a link of Berth from the message that creates it; the alias can
// only follow in a second one ("berth" on a telephone's keys).
const group = 23784

const (
	networkAlias  = "berth network "
	endpointAlias = "berth endpoint "
	parentAlias   = "berth parent "
)

// An Owner says what a link of Berth is for. The zero Owner is nobody: the link
// is not Berth's.
type Owner struct {
	// Network is the network ID of a bridge or of a private link, Endpoint the
	// endpoint ID of the host's end of an endpoint, or of the container's where there
	// is no other. Parent is the name of a parent of macvlan or ipvlan links, for
	// what its networks share. At most one is set, none for a link that Berth had just
	// begun to make when it died.
	Network, Endpoint, Parent string
	// Ours tells such a link from a foreign one.
	Ours bool
}

// OfNetwork owns the bridge of a network.
func OfNetwork(id string) Owner { return Owner{Network: id, Ours: true} }

// OfEndpoint owns the host's end of an endpoint.
func OfEndpoint(id string) Owner { return Owner{Endpoint: id, Ours: true} }

// OfParent owns what the networks on a parent share: a VLAN sub-interface of that
// name, or the host's own link on it.
func OfParent(name string) Owner { return Owner{Parent: name, Ours: true} }

// String is the owner in words, the alias of the link if it has one.
func (o Owner) String() string {
	switch {
	case o.Network != "":
		return networkAlias + o.Network
	case o.Endpoint != "":
		return endpointAlias + o.Endpoint
	case o.Parent != "":
		return parentAlias + o.Parent
	case o.Ours:
		return "berth, half made"
	default:
		return "not berth"
	}
}

// halfMade says that the link may be removed by whoever finds it in the way.
func (o Owner) halfMade() bool { return o == Owner{Ours: true} }

// ownerOf reads the mark of a link. The alias alone is enough: it is the part
// that names the owner, and network managers may reset groups.
func ownerOf(alias string, linkGroup uint32) Owner {
	if id, ok := strings.CutPrefix(alias, networkAlias); ok && id != "" {
		return OfNetwork(id)
	}
	if id, ok := strings.CutPrefix(alias, endpointAlias); ok && id != "" {
		return OfEndpoint(id)
	}
	if name, ok := strings.CutPrefix(alias, parentAlias); ok && name != "" {
		return OfParent(name)
	}
	return Owner{Ours: linkGroup == group && alias == ""}
}
