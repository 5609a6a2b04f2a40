package hostport

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// backlog is the number of connections that wait for the proxy; the kernel lowers
// it to its own limit.
const backlog = 4096

// openSocket binds a socket in the thread's namespace. The descriptor is -1 when
// the kernel does not have the protocol. The error is that of the system call.
func openSocket(k key, f filter, programs *programs) (int, error) {
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	if k.host.Is6() {
		family = unix.AF_INET6
	}
	if k.proto == options.UDP {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(k.proto))
	if errors.Is(err, unix.EMFILE) && raiseFileLimit() {
		fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(k.proto))
	}
	if k.proto == options.SCTP && (errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT)) {
		return -1, nil
	}
	if err != nil {
		return -1, err
	}
	if err := bind(fd, k, f, programs); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// bind makes a fresh socket hold the key. The filter comes first: no packet may
// slip in before it.
func bind(fd int, k key, f filter, programs *programs) error {
	if err := programs.set(fd, f); err != nil {
		return err
	}
	if k.host.Is6() {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return err
		}
		if k.proto == options.UDP {
			// The proxy answers from the address that it was asked at.
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1); err != nil {
				return err
			}
		}
	}
	if k.proto != options.TCP {
		return unix.Bind(fd, sockaddr(netip.AddrPortFrom(k.host, k.port)))
	}
	// Connections in TIME_WAIT do not keep the port from being bound; a socket that
	// listens does, at the latest in listen.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(k.host, k.port))); err != nil {
		return err
	}
	return unix.Listen(fd, backlog)
}

// sockaddr is an address as system calls have it. Published ones have no zone.
func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// raiseFileLimit raises the number of files that the process may open as far as it
// can and reports whether there is room for more.
func raiseFileLimit() bool {
	var now unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &now) != nil {
		return false
	}
	if now.Cur < now.Max {
		return unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: now.Max, Max: now.Max}) == nil
	}
	// With CAP_SYS_RESOURCE, up to fs.nr_open, whose default this is.
	const most = 1 << 20
	return now.Max < most && unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: most}) == nil
}

// bindError puts the failure of a key into words. Docker's come first, which its
// users and their scripts know.
func (m *Manager) bindError(k key, err error) error {
	failed := fmt.Sprintf("Bind for %s failed", k)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		by := "in use by another process of the host"
		if s := m.table.overlapping(k); s != nil {
			by = "published by endpoint " + short(s.owner)
			if s.key != k {
				by += " on " + s.String()
			}
		}
		return fault.Conflict("%s: port is already allocated: %s/%s is %s: %w", failed, k, k.proto, by, unix.EADDRINUSE)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fault.Invalid("%s: %s is not an address of this host: %w", failed, k.host, unix.EADDRNOTAVAIL)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fault.Exhausted("%s: %w: a published port takes an open file for each host address, and the limit is %s; "+
			"raise it (LimitNOFILE of the service), publish fewer ports, or name one host address", failed, err, fileLimit())
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s: %w: ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE", failed, err)
	default:
		return fmt.Errorf("%s: %s: %w", failed, k.proto, err)
	}
}

func fileLimit() string {
	var now unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &now) != nil {
		return "unknown"
	}
	return strconv.FormatUint(now.Cur, 10)
}

// short is an ID as Docker shows it.
func short(id string) string { return id[:min(len(id), 12)] }
