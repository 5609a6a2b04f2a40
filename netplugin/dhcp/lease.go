package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// A Lease is an address that a server has given to an identity for a time. It is
// plain data and may be stored; times are absolute, so that they hold over restarts
// and a suspend.
type Lease struct {
	// Parent is the name of the link that the server is reached by, Identity the
	// client that has the lease.
	Parent   string
	Identity Identity
	// Addr is the address. Subnet is the pool's, which contains it.
	Addr   netip.Addr
	Subnet netip.Prefix
	// Prefix is Addr with the length of the subnet mask that the server has sent, or
	// the length of Subnet.
	Prefix netip.Prefix
	// Router, DNS, Domain and MTU (bytes) are what the server says of the LAN, the zero
	// values where it says nothing.
	Router netip.Addr
	DNS    []netip.Addr
	Domain string
	MTU    int
	// Server is the server's identifier (option 54); ServerMAC is the Ethernet
	// address its last answer came from, which may be a relay's.
	Server    netip.Addr
	ServerMAC net.HardwareAddr
	// From T1 on the lease is renewed with its server, from T2 on with any. After
	// Expires the address may be another's. All are zero for a lease without end.
	T1, T2, Expires time.Time
}

// Expired says whether the lease is over. One with a zero Expires never is.
func (l Lease) Expired(now time.Time) bool { return !l.Expires.IsZero() && !now.Before(l.Expires) }

// minLeaseTime is the shortest time that is taken at its word; the traffic of
// shorter ones would be all that such a server does.
const minLeaseTime = 2 * time.Second

// leaseFrom reads a DHCPACK (or, without times, a DHCPOFFER). Times count from now,
// which is when the request was sent: the RFC's way to be on the safe side.
func leaseFrom(r reply, parent string, id Identity, subnet netip.Prefix, now time.Time) (Lease, error) {
	addr, ok := toAddr(r.msg.YourIPAddr)
	if !ok {
		return Lease{}, errors.New("its answer contains no address")
	}
	l := Lease{
		Parent: parent, Identity: id, Addr: addr, Subnet: subnet, Prefix: netip.PrefixFrom(addr, subnet.Bits()),
		Server: r.server(), ServerMAC: r.from, Domain: printable(r.msg.DomainName()),
	}
	if !l.Server.IsValid() {
		return Lease{}, errors.New("its answer does not contain the server's address (option 54)")
	}
	if mask := r.msg.Options.Get(dhcpv4.OptionSubnetMask); len(mask) == 4 {
		if ones, bits := net.IPMask(mask).Size(); bits == 32 {
			l.Prefix = netip.PrefixFrom(addr, ones)
		}
	}
	if routers := r.msg.Router(); len(routers) > 0 {
		l.Router, _ = toAddr(routers[0])
	}
	for _, ip := range r.msg.DNS() {
		if a, ok := toAddr(ip); ok {
			l.DNS = append(l.DNS, a)
		}
	}
	// 68 is the least that IPv4 works with.
	if mtu := r.msg.Options.Get(dhcpv4.OptionInterfaceMTU); len(mtu) == 2 && binary.BigEndian.Uint16(mtu) >= 68 {
		l.MTU = int(binary.BigEndian.Uint16(mtu))
	}
	return l, l.setTimes(r.msg, now)
}

// setTimes reads the lease time and when to renew, half and seven eighths of it
// where the server leaves them out or they make no sense.
func (l *Lease) setTimes(m *dhcpv4.DHCPv4, now time.Time) error {
	b := m.Options.Get(dhcpv4.OptionIPAddressLeaseTime)
	if len(b) != 4 {
		if m.MessageType() == dhcpv4.MessageTypeOffer {
			return nil
		}
		return errors.New("its answer does not say how long the lease lasts (option 51)")
	}
	seconds := binary.BigEndian.Uint32(b)
	if seconds == math.MaxUint32 {
		return nil
	}
	length := time.Duration(seconds) * time.Second
	if length < minLeaseTime {
		return fmt.Errorf("its lease would last only %s", length)
	}
	t1, t2 := m.IPAddressRenewalTime(length/2), m.IPAddressRebindingTime(length/8*7)
	if t1 <= 0 || t1 >= t2 || t2 >= length {
		t1, t2 = length/2, length/8*7
	}
	now = wall(now)
	l.T1, l.T2, l.Expires = now.Add(t1), now.Add(t2), now.Add(length)
	return nil
}

// acceptable says in words why an address cannot be used in the subnet.
func acceptable(addr netip.Addr, subnet netip.Prefix) error {
	if !subnet.Contains(addr) {
		return fmt.Errorf("not in subnet %s of the pool", subnet)
	}
	if subnet.Bits() < 31 {
		last := binary.BigEndian.Uint32(subnet.Masked().Addr().AsSlice()) | math.MaxUint32>>subnet.Bits()
		if addr == subnet.Masked().Addr() || binary.BigEndian.Uint32(addr.AsSlice()) == last {
			return fmt.Errorf("the network or broadcast address of subnet %s", subnet)
		}
	}
	return nil
}

// wall is a time without the monotonic clock, which stands still while the host is
// suspended.
func wall(t time.Time) time.Time { return t.Round(0).UTC() }

func toAddr(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip.To4())
	return a, ok && !a.IsUnspecified()
}

// printable is a server's text as far as it can be shown.
func printable(s string) string {
	const most = 200
	b := []byte(s[:min(len(s), most)])
	return string(slices.DeleteFunc(b, func(c byte) bool { return c < ' ' || c > '~' }))
}
