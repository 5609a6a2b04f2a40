package dhcp

import (
	"context"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// message makes a message of the client; secs is how long it has been trying.
func (e *exchange) message(kind dhcpv4.MessageType, id Identity, secs time.Duration, more ...dhcpv4.Option) *dhcpv4.DHCPv4 {
	m := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootRequest, HWType: 1, TransactionID: e.xid, ClientHWAddr: id.MAC,
		NumSeconds:   uint16(min(secs/time.Second, math.MaxUint16)),
		ClientIPAddr: net.IPv4zero, YourIPAddr: net.IPv4zero, ServerIPAddr: net.IPv4zero, GatewayIPAddr: net.IPv4zero,
		Options: dhcpv4.OptionsFromList(more...),
	}
	m.UpdateOption(dhcpv4.OptMessageType(kind))
	if len(id.ClientID) > 0 {
		m.UpdateOption(dhcpv4.OptClientIdentifier(id.ClientID))
	}
	if kind == dhcpv4.MessageTypeRelease || kind == dhcpv4.MessageTypeDecline {
		return m
	}
	m.SetBroadcast()
	if name := hostLabel(id.Hostname); name != "" {
		m.UpdateOption(dhcpv4.OptHostName(name))
	}
	// Not 121 (classless routes): a server that sends it may leave the router out.
	m.UpdateOption(dhcpv4.OptParameterRequestList(
		dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer, dhcpv4.OptionDomainName,
		dhcpv4.OptionInterfaceMTU, dhcpv4.OptionIPAddressLeaseTime, dhcpv4.OptionServerIdentifier,
		dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue,
	))
	return m
}

func discover(e *exchange, id Identity, secs time.Duration, hint netip.Addr) *dhcpv4.DHCPv4 {
	var more []dhcpv4.Option
	if hint.IsValid() {
		more = append(more, dhcpv4.OptRequestedIPAddress(hint.AsSlice()))
	}
	return e.message(dhcpv4.MessageTypeDiscover, id, secs, more...)
}

// selecting is the request that takes an offer.
func selecting(e *exchange, id Identity, secs time.Duration, offer Lease) *dhcpv4.DHCPv4 {
	return e.message(dhcpv4.MessageTypeRequest, id, secs,
		dhcpv4.OptRequestedIPAddress(offer.Addr.AsSlice()), dhcpv4.OptServerIdentifier(offer.Server.AsSlice()))
}

// rebooting is the request of a client that knows its address and asks whether it
// may still use it.
func rebooting(e *exchange, id Identity, secs time.Duration, addr netip.Addr) *dhcpv4.DHCPv4 {
	return e.message(dhcpv4.MessageTypeRequest, id, secs, dhcpv4.OptRequestedIPAddress(addr.AsSlice()))
}

// renewing is the request of a client that uses its address.
func renewing(e *exchange, l Lease, secs time.Duration) *dhcpv4.DHCPv4 {
	m := e.message(dhcpv4.MessageTypeRequest, l.Identity, secs)
	m.ClientIPAddr = l.Addr.AsSlice()
	m.SetUnicast()
	return m
}

// A pace says how often a message is sent: after first, then after twice the time,
// and so on, up to four times the time, with a tenth of randomness.
type pace struct {
	first time.Duration
	// tries is how many times in all, 0 for until the context ends.
	tries int
}

// ask sends a message until take says that an answer is the one. It returns
// errSilence when there was none, or why the last message could not be sent.
func (e *exchange) ask(ctx context.Context, p pace, send func(since time.Duration) []byte, take func(reply) bool) error {
	start, wait := time.Now(), p.first
	last := errSilence
	for n := 0; p.tries == 0 || n < p.tries; n++ {
		if ctx.Err() != nil {
			return last
		}
		last = errSilence
		if err := e.port.send(send(time.Since(start))); err != nil {
			last = err
		}
		timer := time.NewTimer(wait*9/10 + rand.N(wait/5+1))
		if e.wait(ctx, timer.C, take) {
			timer.Stop()
			return nil
		}
		timer.Stop()
		wait = min(wait*2, p.first*4)
	}
	return last
}

func (e *exchange) wait(ctx context.Context, timeout <-chan time.Time, take func(reply) bool) (taken bool) {
	for {
		select {
		case r := <-e.answers:
			if take(r) {
				return true
			}
		case <-timeout:
			return false
		case <-ctx.Done():
			return false
		}
	}
}
