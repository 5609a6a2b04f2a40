package options

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
)

// Prefixes of the names of links that Berth makes.
const (
	bridgePrefix        = "bth"
	hostLinkPrefix      = "bv"
	containerLinkPrefix = "bc"
	privateLinkPrefix   = "bp"
	privatePeerPrefix   = "bq"
	shimPrefix          = "bs"
)

// BridgeName is the name of a network's bridge when the user gave none: "bth"
// and 12 digits of the network ID. The driver counts attempt up from 0 while the
// name is another network's.
func BridgeName(networkID string, attempt int) string {
	return bridgePrefix + digits(networkID, attempt)
}

// EndpointLinks are the names of the two ends of an endpoint's link: "bv" for
// the host's and "bc" for the container's, and 12 digits of the endpoint ID. The
// driver counts attempt up from 0 while they are another endpoint's.
func EndpointLinks(endpointID string, attempt int) (hostLink, containerLink string) {
	d := digits(endpointID, attempt)
	return hostLinkPrefix + d, containerLinkPrefix + d
}

// PrivateLinks are the names of the link that a network without a parent has
// instead, "bp" and 12 digits of the network ID, and of its other end, if it has one
// ("bq").
func PrivateLinks(networkID string) (private, peer string) {
	d := digits(networkID, 0)
	return privateLinkPrefix + d, privatePeerPrefix + d
}

// ShimName is the name of the host's own link beside those of the containers on a
// parent: "bs" and 12 digits of the hash of the parent's name.
func ShimName(parent string) string { return shimPrefix + digits("parent "+parent, 0) }

// digits are the first 12 of the ID, which users know from `docker ps`, or, if
// those are taken or not hex digits (swarm's IDs), 12 of its hash.
func digits(id string, attempt int) string {
	const n = 12
	if attempt == 0 && len(id) >= n {
		if _, err := hex.DecodeString(id[:n]); err == nil {
			return id[:n]
		}
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d", id, attempt))
	return hex.EncodeToString(sum[:])[:n]
}

// GenerateMAC makes the address of an endpoint whose user gave none: locally
// administered, unicast, and the same whenever the container gets the same IPv4
// address on the same network, so that neighbours' caches stay right although
// the endpoint ID is new at each start. An endpoint without an IPv4 address is
// told apart by its IPv6 address or else by its ID.
func GenerateMAC(ep Endpoint) net.HardwareAddr {
	who := ep.ID
	for _, p := range []netip.Prefix{ep.IPv4, ep.IPv6} {
		if p.IsValid() {
			who = p.Addr().String()
			break
		}
	}
	sum := sha256.Sum256([]byte(ep.NetworkID + "/" + who))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^0x01 | 0x02
	return mac
}
