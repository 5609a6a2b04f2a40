package options

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
)

// Mode is the way a network attaches its containers.
type Mode string

// The modes. Bridge is the default.
const (
	ModeBridge  Mode = "bridge"
	ModeMacvlan Mode = "macvlan"
	ModeIPvlan  Mode = "ipvlan"
)

// A Subnet is one pool of a network with the addresses that have a role in it.
type Subnet struct {
	// Pool is the whole subnet, masked.
	Pool netip.Prefix
	// Gateway is the address of the bridge, or of a router on the LAN; the zero Addr
	// means none.
	Gateway netip.Addr
	// ContainerGateway is the default gateway of the containers where that is
	// another host of the subnet than the bridge; the zero Addr means Gateway.
	ContainerGateway netip.Addr `json:",omitzero"`
}

// DefaultGateway is the address that containers send to what is on no subnet of
// theirs; the zero Addr means none.
func (s Subnet) DefaultGateway() netip.Addr {
	if s.ContainerGateway.IsValid() {
		return s.ContainerGateway
	}
	return s.Gateway
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
	// Masquerade rewrites the source of traffic that leaves the host, in families
	// whose gateway mode does so.
	Masquerade bool
	// ContainerPrefix is the prefix of the link's name in the container ("eth").
	ContainerPrefix string
	// Subnets in the order dockerd gave them, IPv4 before IPv6. Empty with the
	// null IPAM driver.
	Subnets []Subnet
	// IPv4 and IPv6 say how each family leaves and is reached.
	IPv4, IPv6 Family `json:",omitzero"`
	// NoICC keeps the network's containers apart from each other.
	NoICC bool `json:",omitempty"`
	// InhibitIPv4 keeps the bridge without its IPv4 address.
	InhibitIPv4 bool `json:",omitempty"`
	// Adopted says that the bridge was there before the network. It is never
	// removed, and keeps what it had.
	Adopted bool `json:",omitempty"`
	// AdoptedAddrs are the addresses that Berth has given an adopted bridge, to be
	// taken away with the network.
	AdoptedAddrs []netip.Prefix `json:",omitempty"`
	// HostFirewall leaves published ports to the host's own FORWARD rules: Berth
	// does not accept for them.
	HostFirewall bool `json:",omitempty"`
	// Sources are those that reach published ports; empty is everybody. Masked, of
	// both families, sorted, and none is part of another. A family of which none is
	// listed is closed.
	Sources []netip.Prefix `json:",omitempty"`
	// Trusted are links of the host whose packets may go to the published ports of
	// containers by the containers' own addresses.
	Trusted []string `json:",omitempty"`
	// NoProxy turns off the proxy for [::1] and from IPv6 to IPv4.
	NoProxy bool `json:",omitempty"`
	// Routes are given to every container beside its default route.
	Routes []Route `json:",omitempty"`
	// RateIn and RateOut limit what each container receives and sends, in bits per
	// second; 0 is no limit.
	RateIn, RateOut int64 `json:",omitempty"`
	// Uplink is a link of the host that is a port of the bridge, so that the
	// containers are on its LAN; "" is none. The bridge has no address then. NAME.ID
	// that does not exist is made, see SegmentVLAN.
	Uplink string `json:",omitempty"`
	// UplinkUp says that the uplink was up before the network, and stays so after it.
	UplinkUp bool `json:",omitempty"`
	// SpoofCheck lets each container of a bridge send with its own MAC and IP addresses
	// only (see link.Veth.Guarded).
	SpoofCheck bool `json:",omitempty"`
	// LAN is for the modes macvlan and ipvlan.
	LAN LAN `json:",omitzero"`
	// IPAM are options of the network's pools by name, as they were given with the
	// network; see PoolOptions.
	IPAM map[string]string `json:",omitempty"`
}

// A GatewayMode is what the bridge is for one address family, by Docker's names.
type GatewayMode string

// The gateway modes. The zero value is GatewayNAT.
const (
	// GatewayNAT: containers are reached by ports published on the host only.
	GatewayNAT GatewayMode = "nat"
	// GatewayUnprotected is GatewayNAT, but all ports are also reached by the
	// containers' own addresses.
	GatewayUnprotected GatewayMode = "nat-unprotected"
	// GatewayRouted: no address is translated. Published ports are reached by the
	// containers' own addresses; there are no host ports.
	GatewayRouted GatewayMode = "routed"
	// GatewayIsolated: the bridge has no address. Internal networks only.
	GatewayIsolated GatewayMode = "isolated"
)

// A Family says how one address family of a network leaves the host and is
// reached.
type Family struct {
	// Mode is never "" after ParseNetwork.
	Mode GatewayMode `json:",omitempty"`
	// Source is the address that outgoing traffic gets in the NAT modes; the zero
	// Addr is that of the outgoing link.
	Source netip.Addr `json:",omitzero"`
	// Binding is the host address that ports are published on when the user names
	// none; an unspecified one is all of the family. The zero Addr is all of the
	// family too, unless the other family alone has a Binding: then such ports are
	// not published in this one. 0.0.0.0 alone is all of both, as in Docker.
	Binding netip.Addr `json:",omitzero"`
}

// Routed reports whether the family has no host ports.
func (f Family) Routed() bool { return f.Mode == GatewayRouted }

// FamilyOf returns the family of an address.
func (n Network) FamilyOf(addr netip.Addr) Family {
	if addr.Is6() {
		return n.IPv6
	}
	return n.IPv4
}

// SkipGateway4 reports whether nobody would use an IPv4 gateway address: the
// bridge does not take it, and there is no way out through another host. A LAN has
// its gateway elsewhere: there it is one that the user names.
func (n Network) SkipGateway4() bool {
	return n.IsLAN() || n.Uplink != "" || n.IPv4.Mode == GatewayIsolated || n.InhibitIPv4 && n.Internal
}

// SkipGateway6 is SkipGateway4 for IPv6.
func (n Network) SkipGateway6() bool {
	return n.IsLAN() || n.Uplink != "" || n.IPv6.Mode == GatewayIsolated
}

// A Route is one that containers get, masked.
type Route struct {
	Destination netip.Prefix
	// NextHop is an address in a subnet of the network; the zero Addr means that
	// the destination is on the link itself.
	NextHop netip.Addr `json:",omitzero"`
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
	// dockerd; at most 15 bytes each. LAN networks have no HostLink. ParseEndpoint leaves them empty for the
	// driver, as with Network.Bridge.
	HostLink, ContainerLink string
	// MAC of the container's end: the user's, or one that Berth generated; nil for
	// the parent's (see Network.SharesMAC).
	MAC net.HardwareAddr
	// IPv4 and IPv6 carry the network's prefix length; invalid when not given.
	IPv4, IPv6 netip.Prefix
	// ContainerName is the name the link should get in the container
	// (com.docker.network.endpoint.ifname); "" leaves it to dockerd.
	ContainerName string
	// Routes of this endpoint, after those of the network.
	Routes []Route `json:",omitempty"`
	// RateIn and RateOut as in Network, whose values hold where these are 0.
	RateIn, RateOut int64 `json:",omitempty"`
	// Ports are what the endpoint publishes while it is its container's gateway.
	Ports []PublishedPort `json:",omitempty"`
	// NoProxy6to4 keeps the proxy from carrying IPv6 clients to this endpoint's
	// IPv4 address: another network is the container's IPv6 gateway.
	NoProxy6to4 bool `json:",omitempty"`
}

// A Proto is an IP protocol number that has ports.
type Proto uint8

// The protocols that can be published.
const (
	TCP  Proto = 6
	UDP  Proto = 17
	SCTP Proto = 132
)

// String is the name as `docker run -p` has it.
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	default:
		return strconv.Itoa(int(p))
	}
}

// A PortRequest is one entry of dockerd's port map: what the user wants.
type PortRequest struct {
	Proto Proto
	// HostIP is the address to publish on; the zero Addr is all of both families,
	// an unspecified one all of its family.
	HostIP netip.Addr
	// HostPort to HostPortEnd are the host ports to choose one from; both 0 is any
	// of the ephemeral ones.
	HostPort, HostPortEnd uint16
	ContainerPort         uint16
}

// A PublishedPort is Count published ports in a row.
type PublishedPort struct {
	Proto Proto
	// Host is the address they are published on; an unspecified one is all of its
	// family. The zero Addr means that there is no host port: the container's own
	// is reached directly (GatewayRouted).
	Host     netip.Addr `json:",omitzero"`
	HostPort uint16     `json:",omitempty"`
	// Container is the endpoint's address. Its family differs from Host's where
	// only the proxy carries the traffic.
	Container     netip.Addr
	ContainerPort uint16
	// Count is at least 1. HostPort+i leads to ContainerPort+i for each i below it.
	Count uint16
}

// Direct reports whether the ports have no host ports.
func (p PublishedPort) Direct() bool { return !p.Host.IsValid() }

// Proxied reports whether only the proxy can carry the traffic.
func (p PublishedPort) Proxied() bool { return p.Host.IsValid() && p.Host.Is4() != p.Container.Is4() }

// String is one line as `docker port` has it: 0.0.0.0:8080->80/tcp, with ranges as
// 0.0.0.0:8080-8089->80-89/tcp.
func (p PublishedPort) String() string {
	ports := func(first uint16) string {
		if p.Count > 1 {
			return fmt.Sprintf("%d-%d", first, first+p.Count-1)
		}
		return strconv.Itoa(int(first))
	}
	to := ports(p.ContainerPort) + "/" + p.Proto.String()
	if p.Direct() {
		return net.JoinHostPort(p.Container.String(), to)
	}
	return net.JoinHostPort(p.Host.String(), ports(p.HostPort)) + "->" + to
}
