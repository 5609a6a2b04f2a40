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
)

// An Owner says what a link of Berth is for. The zero Owner is nobody: the link
// is not Berth's.
type Owner struct {
	// Network is the network ID of a bridge, Endpoint the endpoint ID of the host's
	// end of an endpoint; at most one is set. Both are empty for a link that Berth
	// had just begun to make when it died.
	Network, Endpoint string
	// Ours tells such a link from a foreign one.
	Ours bool
}

// OfNetwork owns the bridge of a network.
func OfNetwork(id string) Owner { return Owner{Network: id, Ours: true} }

// OfEndpoint owns the host's end of an endpoint.
func OfEndpoint(id string) Owner { return Owner{Endpoint: id, Ours: true} }

// String is the owner in words, the alias of the link if it has one.
func (o Owner) String() string {
	switch {
	case o.Network != "":
		return networkAlias + o.Network
	case o.Endpoint != "":
		return endpointAlias + o.Endpoint
	case o.Ours:
		return "berth, half made"
	default:
		return "not berth"
	}
}

// halfMade says that the link may be removed by whoever finds it in the way.
func (o Owner) halfMade() bool { return o.Ours && o.Network == "" && o.Endpoint == "" }

// ownerOf reads the mark of a link. The alias alone is enough: it is the part
// that names the owner, and network managers may reset groups.
func ownerOf(alias string, linkGroup uint32) Owner {
	if id, ok := strings.CutPrefix(alias, networkAlias); ok && id != "" {
		return OfNetwork(id)
	}
	if id, ok := strings.CutPrefix(alias, endpointAlias); ok && id != "" {
		return OfEndpoint(id)
	}
	return Owner{Ours: linkGroup == group && alias == ""}
}
