package dhcp

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/netplugin/link"
)

// answer is a frame of a server with an acknowledgement for the identity.
func answer(id Identity, xid dhcpv4.TransactionID, options ...dhcpv4.Option) []byte {
	e := &exchange{xid: xid}
	m := e.message(dhcpv4.MessageTypeAck, id, 0, options...)
	m.OpCode, m.YourIPAddr = dhcpv4.OpcodeBootReply, addr("10.9.0.123").AsSlice()
	b := frame(m, route{fromMAC: slot(99).MAC, toMAC: broadcastMAC(), from: addr("10.9.0.1"), to: broadcastIP()})
	udp := b[ethernetHeader+ipHeader:]
	binary.BigEndian.PutUint16(udp, serverPort)
	binary.BigEndian.PutUint16(udp[2:], clientPort)
	return b
}

func usualOptions() []dhcpv4.Option {
	return []dhcpv4.Option{
		dhcpv4.OptServerIdentifier(addr("10.9.0.1").AsSlice()), dhcpv4.OptIPAddressLeaseTime(time.Hour),
		dhcpv4.OptSubnetMask([]byte{255, 255, 255, 0}), dhcpv4.OptRouter(addr("10.9.0.254").AsSlice()),
		dhcpv4.OptDNS(addr("10.9.0.53").AsSlice()), dhcpv4.OptDomainName("lan.test"),
	}
}

func TestParseTakesOnlyWholeAnswers(t *testing.T) {
	whole := answer(slot(1), dhcpv4.TransactionID{1, 2, 3, 4}, usualOptions()...)
	r, ok := parse(whole)
	assert.Assert(t, ok)
	assert.Equal(t, r.from.String(), slot(99).MAC.String())
	assert.Equal(t, r.server(), addr("10.9.0.1"))
	// Ethernet pads short frames; the IP header says where the packet ends.
	_, ok = parse(append(whole[:len(whole):len(whole)], make([]byte, 30)...))
	assert.Assert(t, ok)
	for n := range whole {
		_, ok := parse(whole[:n])
		assert.Assert(t, !ok, "the first %d bytes", n)
	}
	for name, at := range map[string]int{
		"EtherType": 12, "IP version": ethernetHeader, "protocol": ethernetHeader + 9, "fragment": ethernetHeader + 7,
		"source port": ethernetHeader + ipHeader, "port": ethernetHeader + ipHeader + 2, "UDP length": ethernetHeader + ipHeader + 4,
		"operation": ethernetHeader + ipHeader + udpHeader, "cookie": ethernetHeader + ipHeader + udpHeader + 236,
	} {
		broken := append([]byte(nil), whole...)
		broken[at] ^= 0x21
		_, ok := parse(broken)
		assert.Assert(t, !ok, name)
	}
}

// Whatever is on the LAN: no panic, and a lease that comes of it can be used.
func FuzzParse(f *testing.F) {
	for _, options := range [][]dhcpv4.Option{
		usualOptions(),
		nil,
		{dhcpv4.OptServerIdentifier([]byte{1}), dhcpv4.OptIPAddressLeaseTime(0)},
		append(usualOptions(), dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{5, 220}),
			dhcpv4.OptGeneric(dhcpv4.OptionRenewTimeValue, []byte{0, 0, 0}), dhcpv4.OptGeneric(dhcpv4.OptionRebindingTimeValue, []byte{255, 255, 255, 255})),
		append(usualOptions(), dhcpv4.OptGeneric(dhcpv4.OptionDomainName, []byte("a\x00\n\x1b[31m")), dhcpv4.OptMessage("no\nmore")),
		append(usualOptions(), dhcpv4.OptGeneric(dhcpv4.OptionSubnetMask, []byte{255, 0, 255, 0}), dhcpv4.OptGeneric(dhcpv4.OptionRouter, []byte{1, 2, 3})),
	} {
		f.Add(answer(slot(1), dhcpv4.TransactionID{1, 2, 3, 4}, options...))
	}
	f.Fuzz(func(t *testing.T, b []byte) { sane(t, b) })
}

// The same with whole frames, whose options are anything.
func FuzzOptions(f *testing.F) {
	f.Add([]byte{54, 4, 10, 9, 0, 1, 51, 4, 0, 0, 14, 16, 58, 4, 255, 255, 255, 255, 1, 4, 255, 0, 255, 0, 26, 2, 0, 1, 255})
	f.Add([]byte{54, 4, 10, 9, 0, 1, 51, 4, 0, 0, 0, 2, 6, 3, 1, 2, 3, 15, 2, 27, 10, 56, 1, 0, 52, 1, 3, 51, 4})
	f.Fuzz(func(t *testing.T, options []byte) {
		const most = 1000
		b := answer(slot(1), dhcpv4.TransactionID{1, 2, 3, 4})
		b = append(b[:ethernetHeader+ipHeader+udpHeader+240], options[:min(len(options), most)]...)
		binary.BigEndian.PutUint16(b[ethernetHeader+2:], uint16(len(b)-ethernetHeader))
		binary.BigEndian.PutUint16(b[ethernetHeader+ipHeader+4:], uint16(len(b)-ethernetHeader-ipHeader))
		sane(t, b)
	})
}

func sane(t *testing.T, b []byte) {
	now := time.Unix(1_700_000_000, 0)
	r, ok := parse(b)
	if !ok {
		return
	}
	assert.Assert(t, len(r.from) == 6 && r.source.Is4() && r.msg.OpCode == dhcpv4.OpcodeBootReply)
	words := refusal(r, addr("10.9.0.123")).Error()
	assert.Assert(t, !strings.ContainsAny(words, "\n\x00\x1b"), "%q", words)
	l, err := leaseFrom(r, parent, slot(1), subnet(), now)
	if err != nil {
		return
	}
	assert.Assert(t, l.Addr.Is4() && !l.Addr.IsUnspecified() && l.Server.Is4() && l.Prefix.IsValid() && l.Prefix.Addr() == l.Addr)
	assert.Assert(t, l.MTU == 0 || l.MTU >= 68)
	assert.Assert(t, !strings.ContainsAny(l.Domain, "\n\x00\x1b") && len(l.Domain) <= 200)
	if l.Expires.IsZero() {
		assert.Assert(t, l.T1.IsZero() && l.T2.IsZero())
		return
	}
	assert.Assert(t, now.Before(l.T1) && l.T1.Before(l.T2) && l.T2.Before(l.Expires), "%v %v %v", l.T1, l.T2, l.Expires)
	for at := l.T1; at.Before(l.Expires); at = at.Add(l.Expires.Sub(l.T1)/7 + 1) {
		next := retryAt(l, at)
		assert.Assert(t, next.After(at) && !next.After(l.Expires))
	}
}

// Broken frames and answers for others, between those that are meant.
func TestALANFullOfRubbish(t *testing.T) {
	w := newWorld(t)
	w.dnsmasq(w.leaseFile(), usualRange)
	var fd int
	var err error
	assert.NilError(t, link.InNamespace(w.lan.File(), func() { fd, _, err = openSocket("srv") }))
	assert.NilError(t, err)
	defer unix.Close(fd)
	send := func(b []byte) {
		_, err := unix.Write(fd, b)
		assert.NilError(t, err)
	}
	w.acquire(request(slot(1))) // opens the socket, which lingers
	good := answer(slot(2), dhcpv4.TransactionID{9, 9, 9, 9}, usualOptions()...)
	short := append([]byte(nil), good[:ethernetHeader+ipHeader+udpHeader+20]...)
	noCookie := append([]byte(nil), good...)
	noCookie[ethernetHeader+ipHeader+udpHeader+236] = 0
	for range 50 {
		send(good)
		send(short)
		send(noCookie)
	}
	l := w.acquire(request(slot(2)))
	assert.Assert(t, l.Addr != addr("10.9.0.123"))
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if n := w.m.Counts().Malformed; n != 100 {
			return poll.Continue("%d malformed", n)
		}
		return poll.Success()
	}, poll.WithDelay(5*time.Millisecond))
	assert.Equal(t, w.m.Counts().Acks, uint64(2))
}

// Frames with a priority are for the parent; those of a VLAN above it are not.
func TestVLANs(t *testing.T) {
	w := newWorld(t)
	var fd int
	var err error
	assert.NilError(t, link.InNamespace(w.lan.File(), func() { fd, _, err = openSocket("srv") }))
	assert.NilError(t, err)
	defer unix.Close(fd)
	const priority = 5 << 13
	for tag, found := range map[uint16]bool{priority: true, 0: true, 50: false, priority | 50: false} {
		e, err := w.m.join(parent, slot(1))
		assert.NilError(t, err)
		b := answer(slot(1), e.xid, usualOptions()...)
		tagged := binary.BigEndian.AppendUint16(slices.Clone(b[:12]), unix.ETH_P_8021Q)
		tagged = append(binary.BigEndian.AppendUint16(tagged, tag), b[12:]...)
		// It is ready to hear when its first frame is out.
		first := true
		err = e.ask(t.Context(), pace{first: 50 * time.Millisecond, tries: 2}, func(time.Duration) []byte {
			if !first {
				_, err := unix.Write(fd, tagged)
				assert.NilError(t, err)
			}
			first = false
			return frame(discover(e, slot(1), 0, netip.Addr{}), everybody(slot(1).MAC))
		}, func(reply) bool { return true })
		e.leave()
		assert.Equal(t, err == nil, found, "tag %#x: %v", tag, err)
	}
}
