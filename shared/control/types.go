package control

import (
	"context"
	"net/netip"
	"time"
)

// Info is what a daemon is and how it runs.
type Info struct {
	// Version is that of the build, GoVersion that of its compiler.
	Version, GoVersion string
	// PID as the daemon sees it; a managed plugin has a PID namespace of its own.
	PID     int
	Started time.Time
	// Socket and StateDir are paths as the daemon sees them; in a managed plugin
	// they are mounts. DataDir is "" without volumes.
	Socket, StateDir string
	DataDir          string `json:",omitempty"`
	// Settings in force, by name.
	Settings []Setting
	Services []Service
}

// A Setting is one environment variable that the daemon reads.
type Setting struct {
	Name, Value string
}

// A ServiceState says whether a service answers Docker.
type ServiceState string

// The states of a service.
const (
	// ServiceStarting: calls wait.
	ServiceStarting ServiceState = "starting"
	// ServiceReady: calls are answered.
	ServiceReady ServiceState = "ready"
	// ServiceRefusing: it cannot start; calls are answered with the reason, and
	// the start is tried again every few seconds.
	ServiceRefusing ServiceState = "refusing"
)

// The services by name.
const (
	NetworkService = "network"
	VolumeService  = "volume"
)

// A Service is one half of Berth in a daemon.
type Service struct {
	// Name is NetworkService or VolumeService.
	Name  string
	State ServiceState
	// Reason why it refuses; "" otherwise.
	Reason string `json:",omitempty"`
	// Since is when the state was first that, for this reason.
	Since time.Time
}

// A NetworkState is how a network is.
type NetworkState string

// The states of a network.
const (
	NetworkReady NetworkState = "ready"
	// NetworkBroken: its bridge or rules could not be made; tried again each
	// minute and before the next container.
	NetworkBroken NetworkState = "broken"
	// NetworkCreating: Docker has no answer yet.
	NetworkCreating NetworkState = "creating"
	// NetworkRemoving: something of it could not be removed yet.
	NetworkRemoving NetworkState = "removing"
)

// A Network is one of Berth's. Its name is known to Docker only.
type Network struct {
	// ID is Docker's.
	ID    string
	State NetworkState
	// Mode is the way it attaches containers, as "bridge".
	Mode string
	// Bridge is the name of its own link, "" in modes that have none; Adopted says
	// that it was there before.
	Bridge  string
	Adopted bool `json:",omitempty"`
	// Uplink is the link that joins the bridge to a LAN; "" is none.
	Uplink string `json:",omitempty"`
	// SpoofCheck says that containers can send with their own addresses only.
	SpoofCheck bool `json:",omitempty"`
	// Parent is the link of the LAN that containers are on, in the modes "macvlan"
	// and "ipvlan"; "" is none: they reach each other only.
	Parent string `json:",omitempty"`
	// LANType is what the mode does with the parent: "bridge", "private", "vepa" or
	// "passthru" of macvlan, "l2", "l3" or "l3s" of ipvlan; "" in other modes.
	LANType string `json:",omitempty"`
	// HostAccess says that the host reaches the containers, and they the host, in
	// spite of the mode.
	HostAccess bool `json:",omitempty"`
	Created    time.Time
	Subnets    []Subnet
	// Internal networks have no way out.
	Internal bool
	// ICC says that its containers reach each other.
	ICC bool
	// MTU in bytes; 0 is the kernel's default.
	MTU int `json:",omitempty"`
	// Masquerade says that outgoing traffic gets the host's address, in families
	// whose gateway mode does so.
	Masquerade bool
	// IPv4 and IPv6 are empty where the network has no subnet of the family.
	IPv4 Family `json:",omitzero"`
	IPv6 Family `json:",omitzero"`
	// InhibitIPv4 says that the bridge has no IPv4 address.
	InhibitIPv4 bool `json:",omitempty"`
	Publish     PublishPolicy
	// Routes are given to every container.
	Routes []Route `json:",omitempty"`
	// RateIn and RateOut limit what each container receives and sends, in bits
	// per second; 0 is no limit.
	RateIn  int64 `json:",omitempty"`
	RateOut int64 `json:",omitempty"`
	// Endpoints is how many there are, Ports how many host ports they publish.
	Endpoints, Ports int
}

// A Subnet is a range of addresses with its gateway, which may be none.
type Subnet struct {
	Pool    netip.Prefix
	Gateway netip.Addr `json:",omitzero"`
}

// A Family is how one address family of a network leaves the host.
type Family struct {
	// GatewayMode is "nat", "nat-unprotected", "routed" or "isolated".
	GatewayMode string
	// Source is what outgoing traffic gets as its address; none is that of the
	// outgoing link.
	Source netip.Addr `json:",omitzero"`
	// Binding is the host address of ports published without one; none is all.
	Binding netip.Addr `json:",omitzero"`
}

// A PublishPolicy says who reaches published ports.
type PublishPolicy struct {
	// HostFirewall leaves it to the host's own rules.
	HostFirewall bool `json:",omitempty"`
	// Sources that may; empty is everybody.
	Sources []netip.Prefix `json:",omitempty"`
	// Trusted links of the host may send to the containers' own addresses.
	Trusted []string `json:",omitempty"`
	// NoProxy says that [::1] and IPv6 clients of IPv4 containers are not served.
	NoProxy bool `json:",omitempty"`
}

// A Route leads to Destination by NextHop, or on the link itself if that is none.
type Route struct {
	Destination netip.Prefix
	NextHop     netip.Addr `json:",omitzero"`
}

// An EndpointState is how an endpoint is.
type EndpointState string

// The states of an endpoint.
const (
	// EndpointAlive: its link is in a container, or was made moments ago.
	EndpointAlive EndpointState = "alive"
	// EndpointGone: its container is certainly gone, and Docker did not say so.
	EndpointGone EndpointState = "gone"
	// EndpointCreating: Docker has no answer yet.
	EndpointCreating EndpointState = "creating"
	// EndpointRemoving: something of it could not be removed yet.
	EndpointRemoving EndpointState = "removing"
)

// An Endpoint is a container's place on a network.
type Endpoint struct {
	// ID is Docker's, new at every start of the container.
	ID, NetworkID string
	State         EndpointState
	Created       time.Time
	// GoneSince is when it was first seen to be gone; zero when that was not yet.
	GoneSince time.Time `json:",omitzero"`
	MAC       string
	// IPv4 and IPv6 have the network's prefix length.
	IPv4 netip.Prefix `json:",omitzero"`
	IPv6 netip.Prefix `json:",omitzero"`
	// HostLink stays on the host, ContainerLink is moved into the container, where
	// it is called ContainerName, or as Docker likes if that is "".
	HostLink, ContainerLink string
	ContainerName           string  `json:",omitempty"`
	Routes                  []Route `json:",omitempty"`
	// RateIn and RateOut as in Network, whose values hold where these are 0.
	RateIn  int64  `json:",omitempty"`
	RateOut int64  `json:",omitempty"`
	Ports   []Port `json:",omitempty"`
	// PortsMissing says that not all of them could be had again after a restart.
	PortsMissing bool `json:",omitempty"`
}

// A Port is Count published ports in a row.
type Port struct {
	NetworkID, EndpointID string
	// Proto is "tcp", "udp" or "sctp".
	Proto string
	// HostIP is the address they are published on, 0.0.0.0 or :: for all of a
	// family. None means that there is no host port: the container's own address
	// is reached directly.
	HostIP netip.Addr `json:",omitzero"`
	// HostPort+i leads to ContainerPort+i of ContainerIP for each i below Count.
	HostPort      uint16 `json:",omitempty"`
	ContainerIP   netip.Addr
	ContainerPort uint16
	Count         uint16
	// Proxied says that the daemon itself carries the traffic, since the two
	// addresses are of different families.
	Proxied bool `json:",omitempty"`
}

// A CollectRequest asks for the removal of endpoints whose container is gone.
type CollectRequest struct {
	// Network limits it to one; "" is all.
	Network string `json:",omitempty"`
	// DryRun removes nothing.
	DryRun bool `json:",omitempty"`
}

// A CollectReport lists the endpoints that were removed, or would be. Failed are
// the IDs of those that could not be, with the reason.
type CollectReport struct {
	Endpoints []Endpoint
	Failed    map[string]string `json:",omitempty"`
}

// Networks is what the network service does for an operator. All methods may be
// called concurrently. IDs are whole ones; an unknown one is not found.
type Networks interface {
	// Networks lists all, the oldest first.
	Networks(context.Context) ([]Network, error)
	Network(ctx context.Context, id string) (Network, error)
	// RemoveNetwork removes a network that Docker does not know any more, with
	// its subnets. The caller has asked Docker. It is a conflict when a container
	// is on it or when it is so new that Docker may not know it yet.
	RemoveNetwork(ctx context.Context, id string) error
	// Endpoints lists those of a network, or of all if that is "".
	Endpoints(ctx context.Context, network string) ([]Endpoint, error)
	// Collect removes endpoints whose container is certainly gone, without the
	// time that the daemon itself waits.
	Collect(context.Context, CollectRequest) (CollectReport, error)
	// Leases lists the addresses of a network, or of all if that is "", that are
	// not simply free. A network that shares its parent with others has those that
	// its own pools gave.
	Leases(ctx context.Context, network string) ([]Lease, error)
	// Pools lists all pools, the oldest first.
	Pools(context.Context) ([]Pool, error)
	// ReserveLease keeps an address for a key, which gets it at its next request,
	// whatever it had before, and nobody else does. It is a conflict when the
	// address is reserved for another key, when it is in use for another one or by
	// somebody else on the LAN, or when it is the network's own; it is invalid when
	// containers cannot have it.
	ReserveLease(context.Context, ReserveRequest) (Lease, error)
	// ReleaseLease makes an address free for all: it takes away a reservation, what
	// is kept for a key, a quarantine, the mark of a conflict, and what was requested
	// and is used by no endpoint. It returns the lease as it was. It is a conflict
	// when an endpoint is alive with the address or when it is the network's own;
	// an address that is free already is not found.
	ReleaseLease(context.Context, ReleaseRequest) (Lease, error)
	// Findings says what of the networks is not in order.
	Findings(context.Context) []Finding
}
