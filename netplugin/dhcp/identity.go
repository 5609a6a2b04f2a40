package dhcp

import (
	"crypto/sha256"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
)

// An Identity is a client as DHCP servers see it. Servers give the same identity
// the same address as long as they can. It is plain data and may be stored.
type Identity struct {
	// Slot is the name of the identity within its pool: "slot-1" or, where the
	// container is known, its key.
	Slot string
	// MAC is the client's hardware address (chaddr) and the source of its frames;
	// the endpoint must have it.
	MAC net.HardwareAddr
	// ClientID is option 61, "" for none; servers know the client by it first.
	ClientID []byte
	// Hostname is option 12, "" for none. What a host name may not contain is
	// replaced when it is sent.
	Hostname string
}

// A Space is what identities of one pool are derived from. The same Space gives the
// same identities for ever.
type Space struct {
	// Host tells this host from others on the LAN, which may have pools and
	// containers with the same names: the machine ID, or random bytes that are kept.
	Host string
	// Parent is the name of the parent link, Subnet that of the pool.
	Parent string
	Subnet netip.Prefix
}

// Slot is the anonymous identity with this number; the first is 1.
func (s Space) Slot(number int) Identity {
	return s.derive("slot", "slot-"+strconv.Itoa(number))
}

// Key is the identity of a container with a key that lasts: its name.
func (s Space) Key(key string) Identity { return s.derive("key", key) }

// MAC is the identity of a container whose MAC address is known. It is that of any
// client with this address, so that what a user has reserved for it on the server
// counts.
func (s Space) MAC(mac net.HardwareAddr) (Identity, error) {
	if len(mac) != 6 || mac[0]&1 != 0 || slices.Equal(mac, make(net.HardwareAddr, 6)) {
		return Identity{}, fault.Invalid("MAC address %s: want the address of one Ethernet link", mac)
	}
	return Identity{Slot: mac.String(), MAC: slices.Clone(mac), ClientID: clientID(mac)}, nil
}

func (s Space) derive(kind, name string) Identity {
	// Every part has its length in front: no two lists of parts look alike.
	hash := sha256.New()
	for _, part := range []string{"berth dhcp identity", s.Host, s.Parent, s.Subnet.String(), kind, name} {
		hash.Write(binary.BigEndian.AppendUint32(nil, uint32(len(part))))
		hash.Write([]byte(part))
	}
	mac := net.HardwareAddr(hash.Sum(nil)[:6])
	mac[0] = mac[0]&^1 | 2 // of one link, locally administered
	return Identity{Slot: name, MAC: mac, ClientID: clientID(mac)}
}

// clientID is option 61 for a client that is known by its MAC address: its type,
// Ethernet, and the address. Many servers make that of a client without the option
// and of a reservation, so it is better known than an RFC 4361 one.
func clientID(mac net.HardwareAddr) []byte { return append([]byte{1}, mac...) }

// FreeSlot is the lowest slot that is not in use. Low ones first, so that the same
// few identities come back to the server.
func FreeSlot(inUse func(number int) bool) int {
	number := 1
	for inUse(number) {
		number++
	}
	return number
}

// hostLabel is a container's name as a host name: letters, digits and hyphens, at
// most 63.
func hostLabel(name string) string {
	label := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-':
			return r
		default:
			return '-'
		}
	}, name)
	label = strings.Trim(label, "-")
	return strings.TrimRight(label[:min(len(label), 63)], "-")
}
