package options

import (
	"net"
	"net/netip"
)

// Mode is the way a network attaches its containers.
type Mode string

// The modes. Bridge is the default.
const (
	ModeBridge Mode = "bridge"
)

// A Subnet is one pool of a network with the addresses that have a role in it.
type Subnet struct {
	// Pool is the whole subnet, masked.
	Pool netip.Prefix
	// Gateway is the address of the bridge; the zero Addr means none.
	Gateway netip.Addr
}

// A Network is the validated form of CreateNetwork. It holds all that is needed
// to build the network again, because dockerd never sends CreateNetwork twice.
type Network struct {
	// ID is dockerd's network ID, 64 hex digits (25 characters in swarm scope).
	ID   string
	Mode Mode
	// Bridge is the name of the bridge link, at most 15 bytes. ParseNetwork
	// leaves it empty when the user named none: the driver, which knows the
	// names already taken, then uses BridgeName.
	Bridge string
	// MTU in bytes for the bridge and its endpoints; 0 leaves the kernel's default.
	MTU int
	// Internal networks have no gateway and no way out.
	Internal bool
	// Masquerade rewrites the source of traffic that leaves the host.
	Masquerade bool
	// ContainerPrefix is the prefix of the link's name in the container ("eth").
	ContainerPrefix string
	// Subnets in the order dockerd gave them, IPv4 before IPv6. Empty with the
	// null IPAM driver.
	Subnets []Subnet
}

// SubnetOf returns the subnet whose pool contains the address.
func (n Network) SubnetOf(addr netip.Addr) (Subnet, bool) {
	for _, subnet := range n.Subnets {
		if subnet.Pool.Contains(addr) {
			return subnet, true
		}
	}
	return Subnet{}, false
}

// An Endpoint is the validated form of CreateEndpoint.
type Endpoint struct {
	// ID is dockerd's endpoint ID, 64 hex digits, new at every container start.
	ID        string
	NetworkID string
	// HostLink stays on the bridge, ContainerLink is moved into the sandbox by
	// dockerd; at most 15 bytes each. ParseEndpoint leaves them empty for the
	// driver, as with Network.Bridge.
	HostLink, ContainerLink string
	// MAC of the container's end: the user's, or one that Berth generated.
	MAC net.HardwareAddr
	// IPv4 and IPv6 carry the network's prefix length; invalid when not given.
	IPv4, IPv6 netip.Prefix
	// ContainerName is the name the link should get in the container
	// (com.docker.network.endpoint.ifname); "" leaves it to dockerd.
	ContainerName string
}
