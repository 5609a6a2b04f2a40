package options

import (
	"encoding/base64"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
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
)

// endpointOwn are Berth's own names of an endpoint's options, for messages.
const endpointOwn = "ifname and mac"

// endpointDockerd are names that dockerd sets, or acts on itself. What an
// endpoint publishes is checked by CheckPorts when dockerd asks for it: the same
// map comes for every network of the container, and only one of them publishes.
func endpointDockerd() []string {
	return []string{
		keyPortMap,
		keyExposedPorts,
		"com.docker.network.endpoint.dnsservers",
		"com.docker.network.endpoint.sysctls",
		"com.docker.network.driver.private.no_proxy_6to4",
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
	warnings, err := ep.setOptions(opts)
	if err != nil {
		return Endpoint{}, nil, err
	}
	if iface == nil {
		return ep, warnings, nil
	}
	if ep.IPv4, err = parseEndpointAddress(n, iface.Address, false); err != nil {
		return Endpoint{}, nil, err
	}
	if ep.IPv6, err = parseEndpointAddress(n, iface.AddressIPv6, true); err != nil {
		return Endpoint{}, nil, err
	}
	if iface.MacAddress != "" {
		if ep.MAC, err = parseMAC("MacAddress", iface.MacAddress); err != nil {
			return Endpoint{}, nil, err
		}
	}
	return ep, warnings, nil
}

func (ep *Endpoint) setOptions(opts map[string]any) ([]string, error) {
	var warnings []string
	for _, key := range slices.Sorted(maps.Keys(opts)) {
		short := key
		switch {
		case slices.Contains(endpointDockerd(), key):
			continue
		case key == keyIfname:
			short = "ifname"
		case key == keyEndpointMAC:
			short = "mac"
		case key == "ifname", key == "mac":
		case strings.HasPrefix(key, dockerPrefix):
			warnings = append(warnings, fmt.Sprintf("option %s is not known to Berth and has no effect", shown(key)))
			continue
		default:
			return nil, unknown(key, []string{"ifname", "mac", keyIfname, keyEndpointMAC}, endpointOwn)
		}
		value, err := text(key, opts[key])
		if err != nil {
			return nil, err
		}
		g := given{key, value}
		switch short {
		case "ifname":
			var name string
			if name, err = parseLinkName(g.key, g.value, maxLinkName); err != nil {
				return nil, err
			}
			if ep.ContainerName != "" && ep.ContainerName != name {
				return nil, fault.Invalid("options %s=%s and ifname=%s are the same one: give one of them", keyIfname, ep.ContainerName, name)
			}
			ep.ContainerName = name
		case "mac":
			mac, err := parseMAC(g.key, g.value)
			if err != nil {
				return nil, err
			}
			if ep.MAC != nil && ep.MAC.String() != mac.String() {
				return nil, fault.Invalid("options %s=%s and mac=%s are the same one: give one of them", keyEndpointMAC, ep.MAC, mac)
			}
			ep.MAC = mac
		}
	}
	return warnings, nil
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
	case subnet.Gateway == prefix.Addr():
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

// CheckPorts reads the options of ProgramExternalConnectivity. Ports that are
// exposed only are fine; ports to publish are refused, because a user would
// otherwise wait for connections that never arrive.
func CheckPorts(opts map[string]any) error {
	switch ports := opts[keyPortMap].(type) {
	case nil:
		return nil
	case []any:
		if len(ports) == 0 {
			return nil
		}
		names := make([]string, 0, len(ports))
		for _, port := range ports {
			names = append(names, portText(port))
		}
		// dockerd's order is that of a map.
		slices.Sort(names)
		const most = 5
		if more := len(names) - most; more > 0 {
			names = append(names[:most], fmt.Sprintf("%d more", more))
		}
		return fault.Invalid("publishing ports is not supported yet: %s; start the container without -p and -P", strings.Join(names, ", "))
	default:
		return fault.Invalid("option %s: want a list, got %T", keyPortMap, ports)
	}
}

// portText is a published port as `docker run -p` has it.
func portText(port any) string {
	m, ok := port.(map[string]any)
	if !ok {
		return "a port"
	}
	number := func(key string) int {
		n, _ := m[key].(float64)
		return int(n)
	}
	host := "any"
	if n := number("HostPort"); n != 0 {
		host = strconv.Itoa(n)
	}
	if end := number("HostPortEnd"); end > number("HostPort") {
		host += "-" + strconv.Itoa(end)
	}
	if ip, ok := m["HostIP"].(string); ok && ip != "" {
		if addr, err := netip.ParseAddr(ip); err == nil {
			host = net.JoinHostPort(addr.String(), host)
		}
	}
	const tcp, udp, sctp = 6, 17, 132
	proto := strconv.Itoa(number("Proto"))
	switch number("Proto") {
	case tcp:
		proto = "tcp"
	case udp:
		proto = "udp"
	case sctp:
		proto = "sctp"
	}
	return fmt.Sprintf("%s->%d/%s", host, number("Port"), proto)
}
