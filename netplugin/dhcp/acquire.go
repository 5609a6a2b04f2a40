package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Request asks for a lease.
type Request struct {
	// Parent is the name of the link to the LAN.
	Parent string
	// Identity is the client; it must not have a lease on this parent that is in use.
	Identity Identity
	// Subnet is that of the pool, IPv4. No address outside is taken.
	Subnet netip.Prefix
	// Want is the address that the user insists on, the zero Addr for any.
	Want netip.Addr
	// Previous is the address that the identity had last. The server is asked for it
	// but may give another.
	Previous netip.Addr
	// Resume says that the lease of Previous was not released: the server need only
	// confirm it, which is one round trip.
	Resume bool
	// Held is the lease of Previous, where it is known to hold still: it is the answer
	// when Resume is set and nobody answers (RFC 2131, 3.2). nil is none.
	Held *Lease
	// Accept says in words why an address that is offered cannot be used ("excluded by
	// ..."); nil accepts all.
	Accept func(netip.Addr) error
}

func (r Request) check() error {
	switch {
	case !r.Subnet.IsValid() || !r.Subnet.Addr().Is4():
		return fault.Invalid("option dhcp=true: want an IPv4 subnet, DHCPv6 is not supported")
	case len(r.Identity.MAC) != 6:
		return fault.Invalid("MAC address %s: want one of Ethernet", r.Identity.MAC)
	case r.Want.IsValid():
		if err := acceptable(r.Want, r.Subnet); err != nil {
			return fault.Invalid("address %s: it is %s", r.Want, err)
		}
	}
	return nil
}

// refuse says why an address that a server gives is not taken.
func (r Request) refuse(addr netip.Addr) error {
	if err := acceptable(addr, r.Subnet); err != nil {
		return err
	}
	if r.Want.IsValid() && addr != r.Want {
		return fmt.Errorf("not %s, which is wanted and may be in use or reserved", r.Want)
	}
	if r.Accept != nil {
		return r.Accept(addr)
	}
	return nil
}

// Acquire takes a lease from the first server that offers an acceptable one. It may
// be called many times at once, for identities that differ. The lease is not tracked.
//
// It returns within Options.Timeout, with a lease that is Held in a few times
// Options.Retry. Errors, in words that name server, address and
// link: invalid for a bad request, conflict when servers only offered what cannot be
// used, unavailable when there was no answer or the link cannot be used.
func (m *Manager) Acquire(ctx context.Context, r Request) (Lease, error) {
	if err := r.check(); err != nil {
		return Lease{}, err
	}
	ctx, cancel := m.within(ctx, m.opts.Timeout)
	defer cancel()
	a := &attempt{m: m, Request: r, start: time.Now()}
	if r.Previous.IsValid() && r.Resume && r.refuse(r.Previous) == nil {
		l, ok := a.reboot(ctx)
		switch silent := a.said == nil && len(a.refused) == 0; {
		case ok:
			return l, nil
		case silent && r.Held != nil && r.Held.Addr == r.Previous && !r.Held.Expired(m.opts.Now()):
			held := *r.Held
			held.Identity = r.Identity
			return held, nil
		}
	}
	for {
		l, ok := a.selectOffer(ctx)
		switch {
		case ok:
			return l, nil
		case a.final, ctx.Err() != nil:
			return Lease{}, a.failure()
		}
		// The server has said no, or nothing more: not at once again.
		select {
		case <-time.After(m.opts.Retry):
		case <-ctx.Done():
		}
	}
}

// An attempt is one Acquire under way, and what to tell the user if it fails.
type attempt struct {
	m *Manager
	Request
	start time.Time
	// refused are the offers that cannot be used.
	refused []string
	// said is the last thing that went wrong otherwise.
	said error
	// final says that there is no use in going on.
	final bool
}

// firstTries is how often a request is sent that only one server can answer, before
// the client begins with a DISCOVER again.
const firstTries = 3

// reboot asks for the confirmation of the previous address (INIT-REBOOT).
func (a *attempt) reboot(ctx context.Context) (lease Lease, ok bool) {
	e, err := a.m.join(a.Parent, a.Identity)
	if err != nil {
		a.said = err
		return Lease{}, false
	}
	defer e.leave()
	sent := a.m.opts.Now()
	// If it cannot be sent, or nobody answers, a DISCOVER will show it.
	_ = e.ask(ctx, pace{first: a.m.opts.Retry, tries: 2}, func(secs time.Duration) []byte {
		return frame(rebooting(e, a.Identity, secs, a.Previous), everybody(a.Identity.MAC))
	}, func(r reply) bool {
		lease, ok = a.confirmed(r, a.Previous, netip.Addr{}, sent)
		return ok || r.msg.MessageType() == dhcpv4.MessageTypeNak
	})
	return lease, ok
}

// selectOffer waits for an offer that can be used, and takes it. Without one, it
// returns when the context ends, or soon after one that cannot be used.
func (a *attempt) selectOffer(ctx context.Context) (lease Lease, ok bool) {
	e, err := a.m.join(a.Parent, a.Identity)
	if err != nil {
		a.said, a.final = err, true
		return Lease{}, false
	}
	defer e.leave()
	hint := a.Previous
	if a.Want.IsValid() {
		hint = a.Want
	}
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	var offer Lease
	err = e.ask(waiting, pace{first: a.m.opts.Retry}, func(secs time.Duration) []byte {
		return frame(discover(e, a.Identity, secs, hint), everybody(a.Identity.MAC))
	}, func(r reply) (taken bool) {
		if r.msg.MessageType() != dhcpv4.MessageTypeOffer {
			return false
		}
		a.m.counts.offers.Add(1)
		offer, taken = a.usable(r, time.Time{})
		if !taken && !a.final {
			// Another server gets its chance, but not all the time there is.
			a.final = true
			time.AfterFunc(2*a.m.opts.Retry, stop)
		}
		return taken
	})
	if err != nil {
		if !errors.Is(err, errSilence) {
			a.said = err
		}
		a.m.counts.silences.Add(1)
		return Lease{}, false
	}
	a.final = false
	return a.request(ctx, e, offer)
}

// request takes an offer.
func (a *attempt) request(ctx context.Context, e *exchange, offer Lease) (lease Lease, ok bool) {
	sent := a.m.opts.Now()
	err := e.ask(ctx, pace{first: a.m.opts.Retry, tries: firstTries}, func(time.Duration) []byte {
		return frame(selecting(e, a.Identity, time.Since(a.start), offer), everybody(a.Identity.MAC))
	}, func(r reply) bool {
		lease, ok = a.confirmed(r, offer.Addr, offer.Server, sent)
		return ok || r.msg.MessageType() == dhcpv4.MessageTypeNak && r.server() == offer.Server
	})
	if err != nil {
		a.m.counts.silences.Add(1)
		a.said = fmt.Errorf("DHCP server %s has offered %s but does not confirm it: %w", offer.Server, offer.Addr, err)
	}
	return lease, ok
}

// confirmed reads an answer to a request for the address: of this server, or of any
// if it is the zero Addr.
func (a *attempt) confirmed(r reply, addr, server netip.Addr, sent time.Time) (l Lease, ok bool) {
	if server.IsValid() && r.server() != server {
		return Lease{}, false
	}
	switch r.msg.MessageType() {
	case dhcpv4.MessageTypeNak:
		a.m.counts.naks.Add(1)
		a.said = refusal(r, addr)
	case dhcpv4.MessageTypeAck:
		a.m.counts.acks.Add(1)
		if l, ok = a.usable(r, sent); ok && l.Addr != addr {
			a.said = fmt.Errorf("DHCP server %s confirms %s, not %s", l.Server, l.Addr, addr)
			return Lease{}, false
		}
	default:
	}
	return l, ok
}

// refusal is a DHCPNAK in words.
func refusal(r reply, addr netip.Addr) error {
	words := fmt.Sprintf("DHCP server %s refuses %s", r.server(), addr)
	if why := printable(r.msg.Message()); why != "" {
		words += ": " + why
	}
	return errors.New(words)
}

// usable reads an answer that contains an address, and remembers why it is of no
// use.
func (a *attempt) usable(r reply, sent time.Time) (Lease, bool) {
	l, err := leaseFrom(r, a.Parent, a.Identity, a.Subnet, sent)
	if err == nil {
		err = a.refuse(l.Addr)
	}
	if err == nil {
		return l, true
	}
	server := r.server()
	if !server.IsValid() {
		server = r.source
	}
	words := fmt.Sprintf("DHCP server %s on link %q offers %s: %s", server, a.Parent, r.msg.YourIPAddr, err)
	if !slices.Contains(a.refused, words) && len(a.refused) < 4 {
		a.refused = append(a.refused, words)
	}
	return Lease{}, false
}

// failure is why there is no lease.
func (a *attempt) failure() error {
	took := time.Since(a.start).Round(100 * time.Millisecond)
	switch {
	case a.m.ctx.Err() != nil:
		return errClosed()
	case len(a.refused) > 0:
		return fault.Conflict("no address by DHCP: %s", strings.Join(a.refused, "; "))
	case a.said == nil:
		return fault.Unavailable("no address by DHCP: no server has offered one on link %q in %s: there is none, "+
			"it does not serve this client, or it has no address left", a.Parent, took)
	default:
		return fault.Unavailable("no address by DHCP on link %q in %s: %w", a.Parent, took, a.said)
	}
}
