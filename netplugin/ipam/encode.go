package ipam

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"time"
)

// eventVersion begins each encoded event. Whoever changes the encoding counts it
// up.
const eventVersion = 1

// Kinds of event, the second byte.
const (
	codePoolAdded byte = iota + 1
	codePoolChanged
	codePoolReleased
	codeLeaseSet
	codeLeaseGone
	codeReserved
	codeUnreserved
	codeConflictSet
	codeConflictCleared
	codeForgotten
)

// AppendEvent appends an event in a compact form: version, kind, and the fields
// in their order. Numbers are varints, strings have their length before them,
// times are in nanoseconds.
func AppendEvent(b []byte, e Event) []byte { return e.appendTo(append(b, eventVersion)) }

// DecodeEvent reads what AppendEvent wrote and nothing else: there is one encoding
// of each event. It keeps nothing of b.
func DecodeEvent(b []byte) (Event, error) {
	d := decoder{b: b}
	if v := d.byte(); d.err == nil && v != eventVersion {
		return nil, fmt.Errorf("event has version %d, want %d: it was written by a newer Berth", v, eventVersion)
	}
	e := d.event()
	if d.err == nil && len(d.b) > 0 {
		d.fail("%d bytes too many", len(d.b))
	}
	if d.err != nil {
		return nil, d.err
	}
	return e, nil
}

func (e PoolAdded) appendTo(b []byte) []byte   { return appendPool(append(b, codePoolAdded), e.Pool) }
func (e PoolChanged) appendTo(b []byte) []byte { return appendPool(append(b, codePoolChanged), e.Pool) }
func (e PoolReleased) appendTo(b []byte) []byte {
	return appendString(append(b, codePoolReleased), e.Pool)
}

func (e LeaseSet) appendTo(b []byte) []byte {
	b = appendString(append(b, codeLeaseSet), e.Pool)
	l := e.Lease
	b = append(b, roleCode(l.Role)|flagBit(l.Named, 2)|flagBit(l.Released, 3)|flagBit(l.DHCP != nil, 4))
	b = appendAddr(b, l.Addr)
	b = appendString(b, l.Key)
	b = appendTime(b, l.Since)
	b = appendString(b, l.Endpoint)
	b = appendString(b, string(l.MAC))
	b = appendDHCP(b, l.DHCP)
	return appendAddr(b, e.Next)
}

func (e LeaseGone) appendTo(b []byte) []byte {
	b = appendString(append(b, codeLeaseGone), e.Pool)
	t := e.Tombstone
	b = append(b, flagBit(t.Named, 0)|flagBit(t.DHCP != nil, 1))
	b = appendAddr(b, t.Addr)
	b = appendString(b, t.Key)
	b = appendTime(b, t.Since)
	b = appendString(b, string(t.MAC))
	return appendDHCP(b, t.DHCP)
}

func (e Forgotten) appendTo(b []byte) []byte {
	return appendTime(appendAddr(appendString(append(b, codeForgotten), e.Pool), e.Addr), e.At)
}

func (e Reserved) appendTo(b []byte) []byte {
	b = appendAddr(appendString(append(b, codeReserved), e.Pool), e.Addr)
	return appendTime(appendString(b, e.Key), e.Since)
}

func (e Unreserved) appendTo(b []byte) []byte {
	return appendTime(appendAddr(appendString(append(b, codeUnreserved), e.Pool), e.Addr), e.At)
}

func (e ConflictSet) appendTo(b []byte) []byte {
	b = appendAddr(appendString(append(b, codeConflictSet), e.Pool), e.Addr)
	return appendTime(appendTime(appendString(b, string(e.MAC)), e.Since), e.Until)
}

func (e ConflictCleared) appendTo(b []byte) []byte {
	return appendTime(appendAddr(appendString(append(b, codeConflictCleared), e.Pool), e.Addr), e.At)
}

func roleCode(r Role) byte {
	switch r {
	case RoleGateway:
		return 1
	case RoleReserved:
		return 2
	case RoleEndpoint:
	}
	return 0
}

func flagBit(set bool, at int) byte {
	if set {
		return 1 << at
	}
	return 0
}

func appendPool(b []byte, p Pool) []byte {
	o := p.Options
	b = appendString(b, p.ID)
	b = append(b, flagBit(p.Used, 0)|flagBit(o.Sticky, 1)|flagBit(o.DHCP, 2))
	b = appendPrefix(b, p.Prefix)
	b = appendPrefix(b, p.Range)
	b = binary.AppendUvarint(b, uint64(len(o.Exclude)))
	for _, r := range o.Exclude {
		b = appendAddr(appendAddr(b, r.First), r.Last)
	}
	b = binary.AppendUvarint(b, uint64(o.Quarantine))
	b = appendString(b, string(o.Probe))
	b = appendString(b, string(o.Conflict))
	b = appendString(b, o.Parent)
	b = appendString(b, p.Network)
	b = appendTime(b, p.Since)
	return appendAddr(b, p.Next)
}

func appendDHCP(b []byte, d *DHCP) []byte {
	if d == nil {
		return b
	}
	b = appendString(b, string(d.ClientID))
	b = appendString(appendAddr(b, d.Server), string(d.ServerMAC))
	for _, t := range []time.Time{d.T1, d.T2, d.Expires} {
		b = appendTime(b, t)
	}
	return appendString(b, d.Hostname)
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// appendTime writes the zero time, which Unix time in nanoseconds cannot tell, as
// the lowest number.
func appendTime(b []byte, t time.Time) []byte {
	nano := int64(math.MinInt64)
	if !t.IsZero() {
		nano = t.UnixNano()
	}
	return binary.BigEndian.AppendUint64(b, uint64(nano))
}

func appendAddr(b []byte, a netip.Addr) []byte {
	return append(append(b, byte(a.BitLen()/8)), a.AsSlice()...)
}

func appendPrefix(b []byte, p netip.Prefix) []byte {
	return append(appendAddr(b, p.Addr()), byte(p.Bits()))
}

// A decoder reads fields from b until the first error.
type decoder struct {
	b   []byte
	err error
}

var errShort = errors.New("event is cut short")

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("event is damaged: "+format, args...)
	}
	d.b = nil
}

func (d *decoder) take(n int) []byte {
	if n > len(d.b) {
		if d.err == nil {
			d.err = errShort
		}
		d.b = nil
		return make([]byte, min(n, net.IPv6len))
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) byte() byte { return d.take(1)[0] }

// flags reads a byte in which only those of mask may be set.
func (d *decoder) flags(mask byte) byte {
	f := d.byte()
	if f&^mask != 0 {
		d.fail("flags %#x", f)
	}
	return f
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	// The last byte of a longer form than necessary is 0.
	if n <= 0 || n > 1 && d.b[n-1] == 0 {
		d.fail("number")
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) string() string {
	n := d.uvarint()
	if n > uint64(len(d.b)) {
		d.take(len(d.b) + 1)
		return ""
	}
	return string(d.take(int(n)))
}

// bytes is nil for none.
func (d *decoder) bytes() []byte {
	if s := d.string(); s != "" {
		return []byte(s)
	}
	return nil
}

func (d *decoder) time() time.Time {
	nano := int64(binary.BigEndian.Uint64(d.take(8)))
	if nano == math.MinInt64 {
		return time.Time{}
	}
	return time.Unix(0, nano)
}

func (d *decoder) addr() netip.Addr {
	switch n := d.byte(); n {
	case 0, net.IPv4len, net.IPv6len:
		a, _ := netip.AddrFromSlice(d.take(int(n)))
		return a
	default:
		d.fail("address of %d bytes", n)
		return netip.Addr{}
	}
}

func (d *decoder) prefix() netip.Prefix {
	a, bits := d.addr(), int(d.byte())
	if !a.IsValid() || bits > a.BitLen() {
		d.fail("prefix %s/%d", a, bits)
	}
	return netip.PrefixFrom(a, bits)
}

func (d *decoder) event() Event {
	switch code := d.byte(); code {
	case codePoolAdded:
		return PoolAdded{d.pool()}
	case codePoolChanged:
		return PoolChanged{d.pool()}
	case codePoolReleased:
		return PoolReleased{d.string()}
	case codeLeaseSet:
		return d.leaseSet()
	case codeLeaseGone:
		return d.leaseGone()
	case codeForgotten:
		return Forgotten{Pool: d.string(), Addr: d.addr(), At: d.time()}
	case codeReserved:
		return Reserved{Pool: d.string(), Reservation: Reservation{Addr: d.addr(), Key: d.string(), Since: d.time()}}
	case codeUnreserved:
		return Unreserved{Pool: d.string(), Addr: d.addr(), At: d.time()}
	case codeConflictSet:
		return ConflictSet{Pool: d.string(), Conflict: Conflict{Addr: d.addr(), MAC: d.bytes(), Since: d.time(), Until: d.time()}}
	case codeConflictCleared:
		return ConflictCleared{Pool: d.string(), Addr: d.addr(), At: d.time()}
	default:
		d.fail("kind %d", code)
		return nil
	}
}

func (d *decoder) leaseSet() Event {
	e := LeaseSet{Pool: d.string()}
	f := d.flags(0x1f)
	l := &e.Lease
	switch f & 3 {
	case roleCode(RoleEndpoint):
		l.Role = RoleEndpoint
	case roleCode(RoleGateway):
		l.Role = RoleGateway
	case roleCode(RoleReserved):
		l.Role = RoleReserved
	default:
		d.fail("role %d", f&3)
	}
	l.Named, l.Released = f&4 != 0, f&8 != 0
	l.Addr, l.Key, l.Since, l.Endpoint, l.MAC = d.addr(), d.string(), d.time(), d.string(), d.bytes()
	l.DHCP = d.dhcp(f&16 != 0)
	e.Next = d.addr()
	return e
}

func (d *decoder) leaseGone() Event {
	e := LeaseGone{Pool: d.string()}
	f := d.flags(3)
	t := &e.Tombstone
	t.Named = f&1 != 0
	t.Addr, t.Key, t.Since, t.MAC = d.addr(), d.string(), d.time(), d.bytes()
	t.DHCP = d.dhcp(f&2 != 0)
	return e
}

func (d *decoder) dhcp(there bool) *DHCP {
	if !there {
		return nil
	}
	return &DHCP{ClientID: d.bytes(), Server: d.addr(), ServerMAC: d.bytes(), T1: d.time(), T2: d.time(), Expires: d.time(), Hostname: d.string()}
}

func (d *decoder) pool() Pool {
	p := Pool{ID: d.string()}
	f := d.flags(7)
	p.Used, p.Options.Sticky, p.Options.DHCP = f&1 != 0, f&2 != 0, f&4 != 0
	p.Prefix, p.Range = d.prefix(), d.prefix()
	n := d.uvarint()
	if n > maxRanges {
		d.fail("%d ranges", n)
		return p
	}
	for range n {
		p.Options.Exclude = append(p.Options.Exclude, Range{d.addr(), d.addr()})
	}
	p.Options.Quarantine = time.Duration(d.uvarint())
	p.Options.Probe, p.Options.Conflict = ProbeMode(d.string()), ConflictPolicy(d.string())
	p.Options.Parent, p.Network, p.Since, p.Next = d.string(), d.string(), d.time(), d.addr()
	return p
}
