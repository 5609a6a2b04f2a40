package ipam

import (
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Lease is one address in use. It is plain data: what the driver stores.
type Lease struct {
	Addr netip.Addr
	Role Role
	// Key is the name of the container or what else it is known by, "" where
	// dockerd sends nothing (before Engine 29).
	Key string
	// Named says that the user asked for this address (--ip).
	Named bool
	// Since is when the address was requested or last lost its endpoint.
	// No two leases have the same.
	Since time.Time
	// Endpoint is the ID of the endpoint that has the address; "" when there
	// is none yet or any more, and for networks of other drivers.
	Endpoint string
	// Released says that dockerd gave the address back although Endpoint
	// still has it. The lease ends with the endpoint.
	Released bool
	// MAC is the MAC address that goes with the address, nil for none.
	MAC net.HardwareAddr
	// DHCP is the lease of the LAN's DHCP server, nil for none.
	DHCP *DHCP
}

// DHCP is what is known of a lease of a DHCP server (RFC 2131).
type DHCP struct {
	// ClientID is the client identifier (option 61) without its code.
	ClientID []byte
	// Server is the server identifier (option 54).
	Server netip.Addr
	// ServerMAC is the Ethernet address that the server's last answer came from.
	ServerMAC net.HardwareAddr
	// T1 is when to renew, T2 when to ask any server, Expires when the
	// address must not be used any more.
	T1, T2, Expires time.Time
	// Hostname is what was sent, "" for nothing.
	Hostname string
}

// A Tombstone is what is left of a lease, plain data too.
type Tombstone struct {
	Addr netip.Addr
	// Key is who gets the address again, "" for nobody in particular.
	Key string
	// Named says that it goes to others only when nothing else is left.
	Named bool
	// Since is when the lease ended.
	Since time.Time
	// MAC and DHCP are those of the lease.
	MAC  net.HardwareAddr
	DHCP *DHCP
}

// An extra is what few leases have.
type extra struct {
	mac  net.HardwareAddr
	dhcp *DHCP
}

func (a *Allocator) setExtra(i uint32, x *extra) {
	e := a.entries.at(i)
	if x == nil || x.mac == nil && x.dhcp == nil {
		if e.is(markExtra) {
			e.marks &^= markExtra
			delete(a.extras, i)
		}
		return
	}
	e.marks |= markExtra
	a.extras[i] = extra{slices.Clone(x.mac), x.dhcp.clone()}
}

func (d *DHCP) clone() *DHCP {
	if d == nil {
		return nil
	}
	out := *d
	out.ClientID, out.ServerMAC = slices.Clone(d.ClientID), slices.Clone(d.ServerMAC)
	return &out
}

// lease returns the lease of an entry of kindLease.
func (a *Allocator) lease(l *ledger, i uint32) Lease {
	e := a.entries.at(i)
	out := Lease{
		Addr: e.addr.addr(l.is4), Role: RoleEndpoint, Key: e.key, Since: time.Unix(0, e.since),
		Named: e.is(markNamed), Released: e.is(markLate), Endpoint: a.names.at(e.endpoint),
	}
	if e.is(markExtra) {
		x := a.extras[i]
		out.MAC, out.DHCP = slices.Clone(x.mac), x.dhcp.clone()
	}
	return out
}

// tombstone returns the tombstone of an entry of kindReleased.
func (a *Allocator) tombstone(l *ledger, i uint32) Tombstone {
	return buried(a.lease(l, i))
}

func buried(l Lease) Tombstone {
	return Tombstone{Addr: l.Addr, Key: l.Key, Named: l.Named, Since: l.Since, MAC: l.MAC, DHCP: l.DHCP}
}

// put gives a pool the lease, whatever the address was before. The caller has
// checked that nobody else has it.
func (a *Allocator) put(p *pool, l Lease) {
	n := number(l.Addr)
	i := a.entryOf(p.led, n)
	e := a.entries.at(i)
	a.last = max(a.last, l.Since.UnixNano())
	p.Used = true
	if l.Role != RoleEndpoint {
		if e.kind != kindOutside {
			a.reset(p.led, i)
			e.kind = kindOutside
		}
		p.led.hold(n, holder{p, l})
		return
	}
	if e.kind != kindLease || e.pool != p.no || e.key != l.Key || e.list != inNone {
		a.reset(p.led, i)
	} else {
		a.names.remove(e.endpoint)
		p.held--
	}
	e.kind, e.pool, e.since, e.endpoint = kindLease, p.no, l.Since.UnixNano(), a.names.add(l.Endpoint)
	p.held++
	e.marks &^= markNamed | markLate
	if l.Named {
		e.marks |= markNamed
	}
	if l.Released {
		e.marks |= markLate
	}
	a.setKey(p.led, i, l.Key)
	a.setExtra(i, &extra{l.MAC, l.DHCP})
	a.relink(p.led, i)
}

// reset is clear without the end of the entry.
func (a *Allocator) reset(l *ledger, i uint32) {
	e := a.entries.at(i)
	if e.kind == kindNone {
		return
	}
	pending := e.marks & markPending
	e.marks |= markPending
	a.clear(l, i)
	e.marks = e.marks&^markPending | pending
	delete(l.outside, e.addr)
}

// hold adds a holder of an address outside Docker, or replaces the pool's own.
func (l *ledger) hold(n num, h holder) {
	if l.outside == nil {
		l.outside = make(map[num][]holder)
	}
	others := slices.DeleteFunc(l.outside[n], func(o holder) bool { return o.pool == h.pool })
	l.outside[n] = append(others, h)
	slices.SortFunc(l.outside[n], func(x, y holder) int { return x.lease.Since.Compare(y.lease.Since) })
}

// holding returns the pool's lease of an address outside Docker.
func (l *ledger) holding(n num, p *pool) (Lease, bool) {
	for _, h := range l.outside[n] {
		if h.pool == p {
			return h.lease, true
		}
	}
	return Lease{}, false
}

// bury ends the pool's lease of an address, or makes a tombstone where there was
// none. It changes t to what is kept.
func (a *Allocator) bury(p *pool, t *Tombstone) {
	led, n := p.led, number(t.Addr)
	a.last = max(a.last, t.Since.UnixNano())
	if !p.Options.Sticky || t.Key != "" && p.prefersOther(t.Key, t.Addr) {
		t.Key = ""
	}
	if r, ok := led.reserved[n]; ok && r.key != t.Key {
		t.Key = ""
	}
	t.Named = t.Named && t.Key != ""
	i := a.entryOf(led, n)
	e := a.entries.at(i)
	if e.kind == kindOutside {
		led.outside[n] = slices.DeleteFunc(led.outside[n], func(h holder) bool { return h.pool == p })
		if len(led.outside[n]) > 0 {
			return
		}
		delete(led.outside, n)
	}
	home := led.home(n)
	if _, excluded := spanOf(p.excluded, n); excluded || home == nil {
		a.clear(led, i)
		return
	}
	a.reset(led, i)
	e.kind, e.pool, e.since = kindReleased, p.no, t.Since.UnixNano()
	if t.Named {
		e.marks |= markNamed
	}
	if t.Key != "" {
		a.forgetOther(p, t.Key, e.since)
		a.setKey(led, i, t.Key)
	}
	a.setExtra(i, &extra{t.MAC, t.DHCP})
	a.relink(led, i)
	a.limit(led, home, e.since)
}

// prefersOther reports whether addresses are reserved for the key and this is none
// of them.
func (p *pool) prefersOther(key string, addr netip.Addr) bool {
	kept := p.reserved[key]
	return len(kept) > 0 && !slices.Contains(kept, addr)
}

// forgetOther takes the key from its tombstone: the newest counts.
func (a *Allocator) forgetOther(p *pool, key string, at int64) {
	for i := a.keys.first(&a.entries, p.no, key); i != 0; i = a.keys.more(&a.entries, i) {
		if a.entries.at(i).kind == kindReleased {
			a.unkey(p.led, i, at)
			return
		}
	}
}

// find returns the pool's lease of an address.
func (a *Allocator) find(p *pool, addr netip.Addr) (Lease, bool) {
	if addr.Is4() != p.is4() {
		return Lease{}, false
	}
	n := number(addr)
	i := p.led.table.get(n)
	if i == 0 {
		return Lease{}, false
	}
	switch e := a.entries.at(i); e.kind {
	case kindLease:
		if e.pool == p.no {
			return a.lease(p.led, i), true
		}
	case kindOutside:
		return p.led.holding(n, p)
	case kindNone, kindReleased:
	}
	return Lease{}, false
}

// Release ends the lease of an address. When an endpoint still has the address,
// the lease stays, marked, and is returned with kept set: it ends with Detach.
// dockerd removes the endpoint before it releases the address, so this is either
// a message that comes late, when the next container already has the address, or
// an endpoint whose end dockerd could not tell.
func (a *Allocator) Release(poolID string, addr netip.Addr) (l Lease, kept bool) {
	p, ok := a.pools[poolID]
	if !ok {
		return Lease{}, false
	}
	l, ok = a.find(p, addr)
	if !ok {
		return Lease{}, false
	}
	if l.Endpoint != "" {
		l.Released = true
		a.change(p, l)
		return l, true
	}
	a.end(p, l)
	return l, false
}

// end makes a tombstone of a lease.
func (a *Allocator) end(p *pool, l Lease) {
	t := buried(l)
	t.Since = a.tick()
	a.bury(p, &t)
	a.record(LeaseGone{Pool: p.ID, Tombstone: t})
}

// change replaces a lease.
func (a *Allocator) change(p *pool, l Lease) {
	a.put(p, l)
	a.record(LeaseSet{Pool: p.ID, Lease: l, Next: p.Next})
}

// Attach gives an address to an endpoint. It takes the address when it had been
// given up meanwhile. The error is *Taken when it belongs to another, invalid
// when no host of the pool can have it.
func (a *Allocator) Attach(poolID string, addr netip.Addr, endpoint string) (Lease, error) {
	p, ok := a.pools[poolID]
	if !ok {
		return Lease{}, unknownPool(poolID)
	}
	if !p.Prefix.Contains(addr) || !IsHost(p.Prefix, addr) {
		return Lease{}, fault.Invalid("address %s: want that of a host of subnet %s", addr, p.Prefix)
	}
	lease := Lease{Addr: addr, Role: RoleEndpoint}
	if i := p.led.table.get(number(addr)); i != 0 {
		e := a.entries.at(i)
		switch own := e.pool == p.no; {
		case e.is(markPending):
			return Lease{}, a.taken(p.led, p, i)
		case e.kind == kindOutside, e.kind == kindLease && !own,
			e.kind == kindLease && e.endpoint != 0 && a.names.at(e.endpoint) != endpoint:
			return Lease{}, a.taken(p.led, p, i)
		case e.kind == kindLease:
			lease = a.lease(p.led, i)
		case e.kind == kindReleased && own:
			// It was given up a moment ago and is its old user's.
			lease = a.lease(p.led, i)
			lease.Since = time.Time{}
		}
	}
	if lease.Since.IsZero() {
		lease.Since = a.tick()
	}
	lease.Endpoint, lease.Released = endpoint, false
	a.change(p, lease)
	return lease, nil
}

// Detach takes an address from an endpoint that is gone. The lease stays until
// dockerd releases it, or is forgotten; when dockerd already did, it ends and
// kept is false. It does nothing when another endpoint has the address.
func (a *Allocator) Detach(poolID string, addr netip.Addr, endpoint string) (l Lease, kept bool) {
	p, ok := a.pools[poolID]
	if !ok {
		return Lease{}, false
	}
	l, ok = a.find(p, addr)
	switch {
	case !ok:
		return Lease{}, false
	case l.Endpoint != endpoint:
		return l, true
	case l.Released:
		a.end(p, l)
		return l, false
	}
	l.Endpoint, l.Since = "", a.tick()
	a.change(p, l)
	return l, true
}

// SetDHCP changes the MAC address and DHCP data of a container's lease, and
// reports whether there is one.
func (a *Allocator) SetDHCP(poolID string, addr netip.Addr, mac net.HardwareAddr, d *DHCP) bool {
	p, ok := a.pools[poolID]
	if !ok {
		return false
	}
	l, ok := a.find(p, addr)
	if !ok || l.Role != RoleEndpoint {
		return false
	}
	l.MAC, l.DHCP = slices.Clone(mac), d.clone()
	a.change(p, l)
	return true
}

// Lease returns the lease of an address.
func (a *Allocator) Lease(poolID string, addr netip.Addr) (Lease, bool) {
	p, ok := a.pools[poolID]
	if !ok {
		return Lease{}, false
	}
	return a.find(p, addr)
}

// RestoreLease puts back a lease as it was, when its end could not be stored.
func (a *Allocator) RestoreLease(poolID string, l Lease) {
	if p, ok := a.pools[poolID]; ok {
		a.change(p, l)
	}
}
