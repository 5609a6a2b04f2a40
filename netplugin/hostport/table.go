package hostport

import (
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/berth-plugin/berth/netplugin/options"
)

// A key is one port of one address of the host; an unspecified address is all of
// its family.
type key struct {
	proto options.Proto
	port  uint16
	host  netip.Addr
}

// String is the address as Docker writes it.
func (k key) String() string {
	return net.JoinHostPort(k.host.String(), strconv.Itoa(int(k.port)))
}

func (k key) slot() slot { return slot{k.proto, k.port} }

// overlaps reports whether there are packets for both keys.
func (k key) overlaps(o key) bool {
	if k.proto != o.proto || k.port != o.port || k.host.Is4() != o.host.Is4() {
		return false
	}
	return k.host == o.host || k.host.IsUnspecified() || o.host.IsUnspecified()
}

// A destination is where a host port leads.
type destination struct {
	addr netip.Addr
	port uint16
}

// A socket holds a key for an endpoint.
type socket struct {
	key
	owner string
	// fd is -1 in a parcel, and for a protocol that the kernel does not have, of
	// which the table is the only reservation.
	fd     int
	parcel *parcel
	filter filter
	to     destination
	// listener is set while the proxy serves the socket.
	listener *listener
}

type slot struct {
	proto options.Proto
	port  uint16
}

// A table has the sockets of all endpoints by protocol and port.
type table map[slot][]*socket

func (t table) add(s *socket) { t[s.slot()] = append(t[s.slot()], s) }

func (t table) remove(s *socket) {
	rest := t[s.slot()]
	if i := slices.Index(rest, s); i >= 0 {
		rest = slices.Delete(rest, i, i+1)
	}
	if t[s.slot()] = rest; len(rest) == 0 {
		delete(t, s.slot())
	}
}

// exact returns the socket of k, nil if there is none.
func (t table) exact(k key) *socket {
	for _, s := range t[k.slot()] {
		if s.key == k {
			return s
		}
	}
	return nil
}

// overlapping returns a socket that has packets of k, nil if there is none.
func (t table) overlapping(k key) *socket {
	for _, s := range t[k.slot()] {
		if s.overlaps(k) {
			return s
		}
	}
	return nil
}
