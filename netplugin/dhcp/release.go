package dhcp

import (
	"context"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// releaseTimeout bounds Release and Decline.
const releaseTimeout = 2 * time.Second

// Release tells the server that the address is free, and ends the tracking. Nothing
// answers a release: the error is that it could not be sent in 2 s, in which case the
// address is free when the lease ends. A lease that is over is only untracked.
func (m *Manager) Release(ctx context.Context, l Lease) error {
	m.Untrack(l.Parent, l.Addr)
	if l.Expired(m.opts.Now()) {
		return nil
	}
	err := m.tell(ctx, l, func(e *exchange) []byte {
		msg := e.message(dhcpv4.MessageTypeRelease, l.Identity, 0, dhcpv4.OptServerIdentifier(l.Server.AsSlice()))
		msg.ClientIPAddr = l.Addr.AsSlice()
		return frame(msg, toServer(l))
	})
	if err == nil {
		m.counts.released.Add(1)
	}
	return err
}

// Decline tells the server that somebody else on the LAN uses the address, which
// has not been used yet: it will give another. As Release otherwise.
func (m *Manager) Decline(ctx context.Context, l Lease) error {
	m.Untrack(l.Parent, l.Addr)
	err := m.tell(ctx, l, func(e *exchange) []byte {
		msg := e.message(dhcpv4.MessageTypeDecline, l.Identity, 0,
			dhcpv4.OptRequestedIPAddress(l.Addr.AsSlice()), dhcpv4.OptServerIdentifier(l.Server.AsSlice()))
		return frame(msg, everybody(l.Identity.MAC))
	})
	if err == nil {
		m.counts.declined.Add(1)
	}
	return err
}

// tell sends a message that has no answer. It is repeated only when it could not be
// sent: one that came later would end the next lease of the same identity.
func (m *Manager) tell(ctx context.Context, l Lease, make func(*exchange) []byte) error {
	ctx, cancel := m.within(ctx, releaseTimeout)
	defer cancel()
	e, err := m.join(l.Parent, l.Identity)
	if err != nil {
		return err
	}
	defer e.leave()
	if err = e.port.send(make(e)); err == nil {
		return nil
	}
	select {
	case <-time.After(m.opts.Retry):
		return e.port.send(make(e))
	case <-ctx.Done():
		return err
	}
}

// toServer is the route to the lease's server. Without its Ethernet address the frame
// goes to everybody, and the IP address says who is meant.
func toServer(l Lease) route {
	r := route{fromMAC: l.Identity.MAC, toMAC: l.ServerMAC, from: l.Addr, to: l.Server}
	if len(r.toMAC) != 6 {
		r.toMAC = broadcastMAC()
	}
	return r
}
