package options

import (
	"encoding/base64"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/shared/fault"
)

// Keys of an endpoint's options that dockerd sets or defines.
const (
	keyPortMap      = "com.docker.network.portmap"
	keyExposedPorts = "com.docker.network.endpoint.exposedports"
	keyEndpointMAC  = "com.docker.network.endpoint.macaddress"
	keyIfname       = "com.docker.network.endpoint.ifname"
	keyNoProxy6to4  = "com.docker.network.driver.private.no_proxy_6to4"
)

// endpointDockerd are names that dockerd sets, or acts on itself. What an
// endpoint publishes is read by ParsePorts when dockerd asks for it: the same
// map comes for every network of the container, and only one of them publishes.
func endpointDockerd() []string {
	return []string{
		keyPortMap,
		keyExposedPorts,
		"com.docker.network.endpoint.dnsservers",
		"com.docker.network.endpoint.sysctls",
		keyNoProxy6to4,
	}
}

// ParseEndpoint reads CreateEndpoint for an endpoint of the network. The result
// has no MAC when the user gave none (see GenerateMAC). Warnings and errors are
// as with ParseNetwork.
func ParseEndpoint(n Network, id string, iface *network.EndpointInterface, opts map[string]any) (Endpoint, []string, error) {
	if err := checkID("EndpointID", id); err != nil {
		return Endpoint{}, nil, err
	}
	ep := Endpoint{ID: id, NetworkID: n.ID}
	if iface != nil {
		if err := ep.setInterface(n, *iface); err != nil {
			return Endpoint{}, nil, err
		}
	}
	warnings, err := ep.setOptions(n, opts)
	if err != nil {
		return Endpoint{}, nil, err
	}
	return ep, warnings, ep.checkLAN(n)
}

// setInterface reads what dockerd or the IPAM driver has chosen. A MAC address
// comes among the options too, in which case it is the same.
func (ep *Endpoint) setInterface(n Network, iface network.EndpointInterface) (err error) {
	if ep.IPv4, err = parseEndpointAddress(n, iface.Address, false); err != nil {
		return err
	}
	if ep.IPv6, err = parseEndpointAddress(n, iface.AddressIPv6, true); err != nil {
		return err
	}
	if iface.MacAddress != "" {
		ep.MAC, err = parseMAC("MacAddress", iface.MacAddress)
	}
	return err
}

// endpointNames maps every name of an option to Berth's short one.
func endpointNames() map[string]string {
	return map[string]string{
		"ifname": "ifname", keyIfname: "ifname",
		"mac": "mac", keyEndpointMAC: "mac",
		"routes":  "routes",
		"rate.in": "rate.in", "rate.out": "rate.out",
	}
}

func (ep *Endpoint) setOptions(n Network, opts map[string]any) ([]string, error) {
	names := endpointNames()
	var warnings []string
	for _, key := range slices.Sorted(maps.Keys(opts)) {
		short, ok := names[key]
		switch {
		case ok:
		case slices.Contains(endpointDockerd(), key):
			continue
		case strings.HasPrefix(key, dockerPrefix):
			warnings = append(warnings, fmt.Sprintf("option %s is not known to Berth and has no effect", shown(key)))
			continue
		default:
			own := slices.DeleteFunc(slices.Collect(maps.Keys(names)), func(name string) bool { return name != names[name] })
			return nil, unknown(key, slices.Collect(maps.Keys(names)), ownNames(own))
		}
		value, err := text(key, opts[key])
		if err == nil {
			err = ep.setOption(n, short, given{key, value})
		}
		if err != nil {
			return nil, err
		}
	}
	return warnings, nil
}

func (ep *Endpoint) setOption(n Network, short string, g given) (err error) {
	switch short {
	case "ifname":
		name, err := parseLinkName(g.key, g.value, maxLinkName)
		if err != nil {
			return err
		}
		if ep.ContainerName != "" && ep.ContainerName != name {
			return fault.Invalid("options %s=%s and ifname=%s are the same one: give one of them", keyIfname, ep.ContainerName, name)
		}
		ep.ContainerName = name
	case "mac":
		mac, err := parseMAC(g.key, g.value)
		if err != nil {
			return err
		}
		if ep.MAC != nil && ep.MAC.String() != mac.String() {
			return fault.Invalid("option %s=%s: the endpoint has MAC address %s already, by --mac-address or the option's other name: give one of them",
				g.key, mac, ep.MAC)
		}
		ep.MAC = mac
	case "routes":
		if ep.Routes, err = parseRoutes(g); err != nil {
			return err
		}
		return n.checkEndpointRoutes(g.key, *ep)
	case "rate.in":
		ep.RateIn, err = parseRate(g)
	case "rate.out":
		ep.RateOut, err = parseRate(g)
	}
	return err
}

// parseMAC reads aa:bb:cc:dd:ee:ff, or the base64 of its six bytes as dockerd
// writes it among the options.
func parseMAC(key, value string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(value)
	if err != nil {
		if raw, err64 := base64.StdEncoding.DecodeString(value); err64 == nil {
			mac, err = net.HardwareAddr(raw), nil
		}
	}
	const multicast = 0x01
	zero := true
	for _, b := range mac {
		zero = zero && b == 0
	}
	if err != nil || len(mac) != 6 || mac[0]&multicast != 0 || zero {
		return nil, fault.Invalid("option %s=%s: want a unicast MAC address, as 02:42:ac:11:00:02", key, shown(value))
	}
	return mac, nil
}

// parseEndpointAddress reads an address with its prefix length, "" being none.
func parseEndpointAddress(n Network, s string, is6 bool) (netip.Prefix, error) {
	if s == "" {
		return netip.Prefix{}, nil
	}
	prefix, err := netip.ParsePrefix(s)
	if err != nil || prefix.Addr().Is6() != is6 || prefix.Addr().Is4In6() {
		return netip.Prefix{}, fault.Invalid("address %s: want an address with a prefix length, as 10.1.0.2/24 or fd00:1::2/64", shown(s))
	}
	if len(n.Subnets) == 0 {
		return prefix, nil
	}
	subnet, ok := n.SubnetOf(prefix.Addr())
	switch {
	case !ok:
		return netip.Prefix{}, fault.Invalid("address %s is in no subnet of the network: it has %s", prefix, subnetList(n))
	case subnet.Pool.Bits() != prefix.Bits():
		return netip.Prefix{}, fault.Invalid("address %s: want the prefix length of subnet %s", prefix, subnet.Pool)
	case n.LAN.HostAddrIn(subnet) == prefix.Addr():
		return netip.Prefix{}, fault.Conflict("address %s is the host's, by the network's option host-access; leave it out with --aux-address or --ip-range", prefix.Addr())
	case subnet.Gateway == prefix.Addr(), n.Uplink != "" && subnet.ContainerGateway == prefix.Addr():
		return netip.Prefix{}, fault.Conflict("address %s is the network's gateway", prefix.Addr())
	case !ipam.IsHost(subnet.Pool, prefix.Addr()):
		return netip.Prefix{}, fault.Invalid("address %s: want the address of a host in subnet %s", prefix.Addr(), subnet.Pool)
	}
	return prefix, nil
}

func subnetList(n Network) string {
	names := make([]string, 0, len(n.Subnets))
	for _, subnet := range n.Subnets {
		names = append(names, subnet.Pool.String())
	}
	return strings.Join(names, ", ")
}
