package control

import (
	"net"
	"net/netip"
	"regexp"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// A LeaseState is what becomes of an address.
type LeaseState string

// The states of a lease.
const (
	// LeaseGateway: it is the network's own.
	LeaseGateway LeaseState = "gateway"
	// LeaseAux: Docker keeps it from containers (--aux-address).
	LeaseAux LeaseState = "aux"
	// LeaseActive: an endpoint has it.
	LeaseActive LeaseState = "active"
	// LeasePending: Docker asked for it, and there is no endpoint yet.
	LeasePending LeaseState = "pending"
	// LeaseQuarantined: it was given back moments ago. Only its key gets it, or
	// anybody when nothing else is free.
	LeaseQuarantined LeaseState = "quarantined"
	// LeaseReleased: it is kept for its key, and others get it only when no address
	// is left that nobody ever had.
	LeaseReleased LeaseState = "released"
	// LeaseReserved: an operator keeps it for its key, which does not use it.
	LeaseReserved LeaseState = "reserved"
	// LeaseConflict: somebody else on the LAN uses it.
	LeaseConflict LeaseState = "conflict"
)

// A Lease is one address that is not simply free.
type Lease struct {
	// NetworkID is "" while Docker has not made the network of the pool.
	NetworkID string `json:",omitempty"`
	PoolID    string
	Addr      netip.Addr
	State     LeaseState
	// Key is whom the address is for: a container's name, or a MAC address. ""
	// is nobody, who gets it back when it is gone.
	Key string `json:",omitempty"`
	// Reserved says that an operator keeps it for Key, in whatever state it is.
	Reserved bool `json:",omitempty"`
	// Pinned says that the user asked for this very address (--ip).
	Pinned bool `json:",omitempty"`
	// MAC is that of the endpoint, or of whoever else uses the address when the
	// state is LeaseConflict; "" when there is none.
	MAC string `json:",omitempty"`
	// EndpointID is Docker's; "" unless the state is LeaseActive.
	EndpointID string `json:",omitempty"`
	// Since is when the state was first that.
	Since time.Time
	// Until is when the quarantine ends, when a conflict is looked at again, or
	// when the lease from the LAN's DHCP server expires; zero is never.
	Until time.Time `json:",omitzero"`
	// DHCP is nil unless the address came from the LAN's DHCP server.
	DHCP *DHCPLease `json:",omitempty"`
}

// A DHCPState is where a lease is in the course of DHCP (RFC 2131, figure 5).
type DHCPState string

// The states of a lease from a DHCP server.
const (
	// DHCPRequesting: the server has not confirmed it yet.
	DHCPRequesting DHCPState = "requesting"
	// DHCPBound: it holds.
	DHCPBound DHCPState = "bound"
	// DHCPRenewing: its server is asked to prolong it (T1 is over).
	DHCPRenewing DHCPState = "renewing"
	// DHCPRebinding: any server is asked to prolong it (T2 is over).
	DHCPRebinding DHCPState = "rebinding"
	// DHCPExpired: no server did so.
	DHCPExpired DHCPState = "expired"
)

// A DHCPLease is what the LAN's DHCP server knows of an address.
type DHCPLease struct {
	// Server is its identifier (option 54).
	Server netip.Addr `json:",omitzero"`
	// ClientID is what Berth calls itself there (option 61), in hexadecimal digits.
	ClientID string `json:",omitempty"`
	// Hostname that the server was told (option 12).
	Hostname string `json:",omitempty"`
	State    DHCPState
	// Renews is when the server is asked next, Expires when the lease ends; zero
	// is never.
	Renews  time.Time `json:",omitzero"`
	Expires time.Time `json:",omitzero"`
}

// A Pool is a range that a network's addresses come from.
type Pool struct {
	ID string
	// NetworkID is "" while Docker has not made the network.
	NetworkID string `json:",omitempty"`
	Prefix    netip.Prefix
	// Range limits what containers get (--ip-range); none is all of Prefix.
	Range netip.Prefix `json:",omitzero"`
	// Parent is the link whose LAN has the addresses; "" is none. Pools of one
	// parent may overlap, and no address is given twice there.
	Parent string `json:",omitempty"`
	// Since is when Docker asked for it.
	Since time.Time
	// Sticky keeps an address for the key that had it.
	Sticky bool
	// Quarantine is how long nobody else gets an address that was given back, in
	// nanoseconds on the wire; 0 is not at all.
	Quarantine time.Duration
	// Probe is how the LAN is asked whether an address is in use: "off", "fast" or
	// "full".
	Probe string
	// Conflict is what becomes of a user's own address that is in use: "refuse" or
	// "warn".
	Conflict string
	// Exclude are the addresses that nobody gets, and ranges A-B of them.
	Exclude []string `json:",omitempty"`
	// DHCP says that the LAN's DHCP server gives the addresses.
	DHCP bool `json:",omitempty"`
	// Size is how many addresses there are for containers: those of Range or else
	// Prefix, without what is excluded or has a meaning of its own, as IPv4's
	// broadcast address. Larger numbers than fit are the largest that does; so
	// is Free. Size is the sum of Used, Reserved, Quarantined, Conflicts and Free.
	Size uint64
	// Used are held: by endpoints, for endpoints that come, as gateway, as auxiliary
	// addresses.
	Used uint64
	// Reserved are kept for a key that does not use them.
	Reserved uint64
	// Quarantined were given back moments ago.
	Quarantined uint64
	// Conflicts are used by somebody else on the LAN.
	Conflicts uint64
	// Free is how many can be had at once, Released how many of these are kept for
	// a key until no others are left.
	Free, Released uint64
}

// A ReserveRequest asks to keep an address for a key.
type ReserveRequest struct {
	// Network is the whole ID.
	Network string
	Addr    netip.Addr
	// Key is what LeaseKey returns.
	Key string
}

// A ReleaseRequest asks to forget what keeps an address from being free.
type ReleaseRequest struct {
	// Network is the whole ID.
	Network string
	Addr    netip.Addr
}

// containerName is what Docker allows. It shows names with a slash before them.
var containerName = regexp.MustCompile(`^/?[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// maxKey bounds a key, in bytes. Docker has no bound for names.
const maxKey = 255

// LeaseKey returns the form in which a key is kept and compared. What looks like a
// MAC address, in any of the forms of net.ParseMAC, is one: 02:00:00:00:00:01. All
// else must be a container's name. The error is invalid.
func LeaseKey(key string) (string, error) {
	if mac, err := net.ParseMAC(key); err == nil && len(mac) == 6 {
		if mac[0]&1 != 0 || [6]byte(mac) == [6]byte{} {
			return "", fault.Invalid("key %s: want the MAC address of one container", key)
		}
		return mac.String(), nil
	}
	if len(key) > maxKey || !containerName.MatchString(key) {
		return "", fault.Invalid("key %.300q: want a container's name or a MAC address", key)
	}
	return strings.TrimPrefix(key, "/"), nil
}

// IsMAC reports whether a key that LeaseKey returned is a MAC address.
func IsMAC(key string) bool {
	mac, err := net.ParseMAC(key)
	return err == nil && len(mac) == 6
}

// leaseAddr is the form of an address that is asked about.
func leaseAddr(network string, addr netip.Addr) (netip.Addr, error) {
	addr = addr.Unmap()
	switch {
	case network == "":
		return addr, fault.Invalid("Network is empty: want the whole ID of one")
	case !addr.IsValid() || addr.Zone() != "":
		return addr, fault.Invalid("Addr %q: want an IP address without a zone", addr)
	default:
		return addr, nil
	}
}
