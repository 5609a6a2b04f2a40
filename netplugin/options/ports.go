package options

import (
	"cmp"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/berth-plugin/berth/shared/fault"
)

// ParsePorts reads the options of ProgramExternalConnectivity: what the endpoint
// publishes, and whether IPv6 clients must not be carried to its IPv4 address.
//
// An entry that comes twice is returned once. The order does not depend on
// dockerd's, which is that of a map: fixed host ports come before ranges to choose
// from, and those before ephemeral ones, so that the choice is made among what the
// user left free. The work grows with the number of entries as that of a sort. The
// error is invalid and shows the entry as `docker run -p` has it.
func ParsePorts(opts map[string]any) (ports []PortRequest, noProxy6to4 bool, _ error) {
	if value, ok := opts[keyNoProxy6to4]; ok && value != nil {
		var err error
		if noProxy6to4, err = parseFlag(keyNoProxy6to4, value); err != nil {
			return nil, false, err
		}
	}
	var list []any
	switch value := opts[keyPortMap].(type) {
	case nil:
	case []any:
		list = value
	default:
		return nil, false, fault.Invalid("option %s: want a list, got %T", keyPortMap, value)
	}
	if len(list) == 0 {
		return nil, noProxy6to4, nil
	}
	ports = make([]PortRequest, 0, len(list))
	for _, entry := range list {
		port, err := parsePort(entry)
		if err != nil {
			return nil, false, fmt.Errorf("published port %s: %w", portText(entry), err)
		}
		ports = append(ports, port)
	}
	slices.SortFunc(ports, comparePorts)
	ports = slices.Compact(ports)
	if err := checkFixedPorts(ports); err != nil {
		return nil, false, err
	}
	return ports, noProxy6to4, nil
}

// parsePort reads one entry of the port map. Its member IP is the container's
// address, which is always the endpoint's.
func parsePort(entry any) (PortRequest, error) {
	m, ok := entry.(map[string]any)
	if !ok {
		return PortRequest{}, fault.Invalid("option %s: want a list of objects, got %T", keyPortMap, entry)
	}
	proto, err := portNumber(m, "Proto", 1, math.MaxUint8)
	if err != nil {
		return PortRequest{}, err
	}
	port := PortRequest{Proto: Proto(proto)}
	switch port.Proto {
	case TCP, UDP, SCTP:
	default:
		return PortRequest{}, fault.Invalid("Proto %d: want %d (tcp), %d (udp) or %d (sctp)", proto, uint8(TCP), uint8(UDP), uint8(SCTP))
	}
	if port.ContainerPort, err = portNumber(m, "Port", 1, math.MaxUint16); err != nil {
		return PortRequest{}, err
	}
	if port.HostPort, err = portNumber(m, "HostPort", 0, math.MaxUint16); err != nil {
		return PortRequest{}, err
	}
	if port.HostPortEnd, err = portNumber(m, "HostPortEnd", 0, math.MaxUint16); err != nil {
		return PortRequest{}, err
	}
	if port.HostPortEnd == 0 {
		port.HostPortEnd = port.HostPort
	}
	if port.HostPortEnd < port.HostPort || port.HostPort == 0 && port.HostPortEnd != 0 {
		return PortRequest{}, fault.Invalid("host ports %d-%d: want the first one from 1, and the last one no lower", port.HostPort, port.HostPortEnd)
	}
	port.HostIP, err = parseHostIP(m["HostIP"])
	return port, err
}

// portNumber is a number of an entry; one that is left out is 0.
func portNumber(m map[string]any, key string, low, high int) (uint16, error) {
	n := 0.0
	switch value := m[key].(type) {
	case nil:
	case float64:
		n = value
	default:
		return 0, fault.Invalid("%s: want a number from %d to %d, got %T", key, low, high, value)
	}
	if n != math.Trunc(n) || n < float64(low) || n > float64(high) {
		return 0, fault.Invalid("%s %s: want a number from %d to %d", key, strconv.FormatFloat(n, 'g', -1, 64), low, high)
	}
	return uint16(n), nil
}

// parseHostIP reads an address of the host; the zero Addr is none.
func parseHostIP(value any) (netip.Addr, error) {
	s, ok := value.(string)
	if !ok && value != nil {
		return netip.Addr{}, fault.Invalid("HostIP: want an address, got %T", value)
	}
	if s == "" {
		return netip.Addr{}, nil
	}
	addr, err := parseHostAddr(s)
	if err != nil {
		return netip.Addr{}, fault.Invalid("HostIP %s: want an IPv4 or IPv6 address of this host without a zone, 0.0.0.0 or ::", shown(s))
	}
	return addr, nil
}

// parseHostAddr reads an address that a socket of the host can have: not one of a
// group of hosts, and none with a zone, which means nothing to the rules of
// another link. An IPv4 address written as an IPv6 one is an IPv4 address, as
// everywhere in Docker.
func parseHostAddr(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}, err
	}
	addr = addr.Unmap()
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	if addr.Zone() != "" || addr.IsMulticast() || addr == broadcast {
		return netip.Addr{}, fault.Invalid("address %s is not one host's", shown(s))
	}
	return addr, nil
}

// comparePorts orders fixed host ports, ranges and ephemeral ports. Within those,
// addresses that are more general come first.
func comparePorts(a, b PortRequest) int {
	return cmp.Or(
		a.class()-b.class(),
		cmp.Compare(a.Proto, b.Proto),
		cmp.Compare(a.HostPort, b.HostPort),
		cmp.Compare(a.HostPortEnd, b.HostPortEnd),
		a.HostIP.Compare(b.HostIP),
		cmp.Compare(a.ContainerPort, b.ContainerPort),
	)
}

// The kinds of request, in the order in which they are to be served.
const (
	classFixed = iota
	classRange
	classEphemeral
)

func (p PortRequest) class() int {
	switch p.HostPort {
	case 0:
		return classEphemeral
	case p.HostPortEnd:
		return classFixed
	default:
		return classRange
	}
}

// checkFixedPorts refuses a host port that leads to two ports of the container.
// The ports are in the order of comparePorts.
func checkFixedPorts(ports []PortRequest) error {
	// all4 and all6 are the last request for all addresses of a family, last is
	// that for the address before.
	var all4, all6, last PortRequest
	for _, port := range ports {
		if port.class() != classFixed {
			break
		}
		others := []PortRequest{last}
		if !port.HostIP.IsValid() || port.HostIP.Is4() {
			others = append(others, all4)
		}
		if !port.HostIP.IsValid() || port.HostIP.Is6() {
			others = append(others, all6)
		}
		for i, other := range others {
			same := other.Proto == port.Proto && other.HostPort == port.HostPort && other.ContainerPort != port.ContainerPort
			if same && (i > 0 || other.HostIP == port.HostIP) {
				return fault.Invalid("published ports %s and %s: port is already allocated: a host port leads to one port of the container", other, port)
			}
		}
		last = port
		if any4 := netip.IPv4Unspecified(); !port.HostIP.IsValid() || port.HostIP == any4 {
			all4 = port
		}
		if any6 := netip.IPv6Unspecified(); !port.HostIP.IsValid() || port.HostIP == any6 {
			all6 = port
		}
	}
	return nil
}

// String is the request as `docker run -p` has it, with an arrow in the place of
// the last colon: 127.0.0.1:8080->80/tcp. The word any stands for an ephemeral
// port.
func (p PortRequest) String() string {
	host := "any"
	if p.HostPort != 0 {
		host = strconv.Itoa(int(p.HostPort))
	}
	if p.HostPortEnd > p.HostPort {
		host += "-" + strconv.Itoa(int(p.HostPortEnd))
	}
	if p.HostIP.IsValid() {
		host = net.JoinHostPort(p.HostIP.String(), host)
	}
	return fmt.Sprintf("%s->%d/%s", host, p.ContainerPort, p.Proto)
}

// portText is an entry that may be wrong for a message: what can be read of it.
func portText(entry any) string {
	m, ok := entry.(map[string]any)
	if !ok {
		return "of unknown form"
	}
	number := func(key string) string {
		n, _ := m[key].(float64)
		return strconv.FormatFloat(n, 'g', -1, 64)
	}
	host := number("HostPort")
	if host == "0" {
		host = "any"
	}
	if end := number("HostPortEnd"); end != "0" && end != host {
		host += "-" + end
	}
	if ip, ok := m["HostIP"].(string); ok && ip != "" {
		if addr, err := netip.ParseAddr(ip); err == nil {
			host = net.JoinHostPort(addr.WithZone("").String(), host)
		}
	}
	proto := number("Proto")
	if n, err := strconv.ParseUint(proto, 10, 8); err == nil {
		proto = Proto(n).String()
	}
	return fmt.Sprintf("%s->%s/%s", host, number("Port"), proto)
}
