package hostport

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// hasIPv6 reports whether the thread's namespace has IPv6 switched on. Its
// loopback address goes when it is switched off.
func hasIPv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.Bind(fd, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}) == nil
}

// The files with the ports that the kernel picks for outgoing connections.
const (
	localPortRange     = "/proc/sys/net/ipv4/ip_local_port_range"
	localReservedPorts = "/proc/sys/net/ipv4/ip_local_reserved_ports"
)

// An ephemeral is the set of ports to pick from when the user has no wish.
type ephemeral struct {
	first, last uint16
	// reserved are those in between that the administrator keeps for other uses.
	reserved map[uint16]bool
}

// readEphemeral reads those of the thread's namespace. A range that cannot be read
// is the one that IANA gives, as with Docker.
func readEphemeral() ephemeral {
	e := ephemeral{first: 49153, last: 65535}
	if b, err := os.ReadFile(localPortRange); err == nil {
		if f := strings.Fields(string(b)); len(f) == 2 {
			first, err1 := strconv.ParseUint(f[0], 10, 16)
			last, err2 := strconv.ParseUint(f[1], 10, 16)
			if err1 == nil && err2 == nil && first > 0 && first <= last {
				e.first, e.last = uint16(first), uint16(last)
			}
		}
	}
	if b, err := os.ReadFile(localReservedPorts); err == nil {
		e.reserved = parsePortList(strings.TrimSpace(string(b)))
	}
	return e
}

// parsePortList reads ports as the kernel writes them: 1,2-4,10.
func parsePortList(s string) map[uint16]bool {
	ports := map[uint16]bool{}
	for _, item := range strings.Split(s, ",") {
		first, last, isRange := strings.Cut(item, "-")
		if !isRange {
			last = first
		}
		low, err1 := strconv.ParseUint(first, 10, 16)
		high, err2 := strconv.ParseUint(last, 10, 16)
		if err1 != nil || err2 != nil {
			continue
		}
		for p := low; p <= high; p++ {
			ports[uint16(p)] = true
		}
	}
	return ports
}
