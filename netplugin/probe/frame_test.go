package probe

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func TestFrames(t *testing.T) {
	seven, one := macOf(7), macOf(1)
	ndp := func(edit func(b []byte) []byte) []byte { return edit(advertisement(seven, "2001:db8::7")) }
	for _, c := range []struct {
		name  string
		frame []byte
		want  claim
	}{
		{"request", arp(arpRequest, seven, "192.0.2.7", noMAC, "192.0.2.1"), claim{addr: addr("192.0.2.7"), mac: mac(seven)}},
		{"announcement", arp(arpRequest, seven, "192.0.2.7", noMAC, "192.0.2.7"), claim{addr: addr("192.0.2.7"), mac: mac(seven)}},
		{"reply", arp(arpReply, seven, "192.0.2.7", one, "192.0.2.1"), claim{addr: addr("192.0.2.7"), mac: mac(seven)}},
		{"reply to a probe", arp(arpReply, seven, "192.0.2.7", one, "0.0.0.0"), claim{addr: addr("192.0.2.7"), mac: mac(seven)}},
		{"probe", arp(arpRequest, seven, "0.0.0.0", noMAC, "192.0.2.7"), claim{addr: addr("192.0.2.7"), mac: mac(seven), probing: true}},
		{"padded", append(arp(arpReply, seven, "192.0.2.7", one, "0.0.0.0"), make([]byte, 18)...), claim{addr: addr("192.0.2.7"), mac: mac(seven)}},
		{"reply of nobody", arp(arpReply, seven, "0.0.0.0", one, "192.0.2.7"), claim{}},
		{"probe for nothing", arp(arpRequest, seven, "0.0.0.0", noMAC, "0.0.0.0"), claim{}},
		{"RARP", arp(3, seven, "192.0.2.7", one, "192.0.2.1"), claim{}},
		{"no MAC", arp(arpReply, noMAC, "192.0.2.7", one, "0.0.0.0"), claim{}},
		{"MAC of a group", arp(arpReply, allOnes(), "192.0.2.7", one, "0.0.0.0"), claim{}},
		{"address of a group", arp(arpReply, seven, "224.0.0.1", one, "0.0.0.0"), claim{}},
		{"broadcast address", arp(arpReply, seven, "255.255.255.255", one, "0.0.0.0"), claim{}},
		{"cut", arp(arpReply, seven, "192.0.2.7", one, "0.0.0.0")[:41], claim{}},
		{"IPv4", header(nil, broadcast, mac(seven), unix.ETH_P_IP), claim{}},
		{"empty", nil, claim{}},

		{"advertisement", ndp(func(b []byte) []byte { return b }), claim{addr: addr("2001:db8::7"), mac: mac(seven)}},
		{"advertisement by another", ndp(func(b []byte) []byte { copy(b[6:], one); return b }), claim{addr: addr("2001:db8::7"), mac: mac(seven)}},
		{"advertisement without option", ndp(func(b []byte) []byte { b[19] = neighbour; return b[:len(b)-8] }), claim{addr: addr("2001:db8::7"), mac: mac(seven)}},
		{"from afar", ndp(func(b []byte) []byte { b[hopLimitAt] = 254; return b }), claim{}},
		{"not ICMPv6", ndp(func(b []byte) []byte { b[nextHeaderAt] = 17; return b }), claim{}},
		{"length beyond the frame", ndp(func(b []byte) []byte { b[19]++; return b }), claim{}},
		{"option beyond the message", ndp(func(b []byte) []byte { b[len(b)-7] = 2; return b }), claim{}},
		{"option of no length", ndp(func(b []byte) []byte { b[len(b)-7] = 0; return b }), claim{}},
		{"target is a group", ndp(func(b []byte) []byte { b[icmpType+8] = 0xff; return b }), claim{}},
		{"code", ndp(func(b []byte) []byte { b[icmpType+1] = 1; return b }), claim{}},
		{"router advertisement", ndp(func(b []byte) []byte { b[icmpType] = 134; return b }), claim{}},
		{"solicitation of a neighbour", ndp(func(b []byte) []byte {
			b[icmpType], b[len(b)-8] = solicit, sourceLink
			b[len(b)-9] = 8 // it asks for ...::8
			return b
		}), claim{addr: addr("2001:db8::7"), mac: mac(seven)}},
		{"duplicate address detection", solicitation(mac(seven), addr("2001:db8::7"), nonce{1}), claim{addr: addr("2001:db8::7"), mac: mac(seven), probing: true, nonce: nonce{1}}},
		{"duplicate address detection without nonce", func() []byte {
			b := solicitation(mac(seven), addr("2001:db8::7"), nonce{1})
			b[19] = neighbour
			return b[:len(b)-8]
		}(), claim{addr: addr("2001:db8::7"), mac: mac(seven), probing: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, ok := parse(c.frame)
			assert.Equal(t, ok, c.want != claim{})
			if ok {
				assert.Equal(t, got, c.want)
			}
		})
	}
}

func allOnes() []byte { return bytes.Repeat([]byte{0xff}, 6) }

func FuzzARP(f *testing.F) {
	f.Add(arp(arpReply, macOf(7), "192.0.2.7", macOf(1), "0.0.0.0")[ethernetLen:])
	f.Add(arpProbe(mac(macOf(7)), addr("192.0.2.7"))[ethernetLen:])
	f.Fuzz(func(t *testing.T, b []byte) {
		c, ok := parseARP(b)
		if !ok {
			return
		}
		checkClaim(t, c)
		assert.Assert(t, c.addr.Is4())
		if c.probing {
			// What is left out of a probe makes no difference.
			again, ok := parse(arpProbe(c.mac, c.addr))
			assert.Assert(t, ok && again == c)
		}
	})
}

func FuzzNDP(f *testing.F) {
	f.Add([]byte(macOf(7)), advertisement(macOf(7), "2001:db8::7")[ethernetLen:])
	f.Add([]byte(macOf(7)), solicitation(mac(macOf(7)), addr("2001:db8::7"), nonce{1, 2})[ethernetLen:])
	f.Fuzz(func(t *testing.T, from, b []byte) {
		if len(from) < 6 {
			return
		}
		c, ok := parseNDP(mac(from), b)
		if !ok {
			return
		}
		checkClaim(t, c)
		assert.Assert(t, c.addr.Is6())
		if c.probing {
			sent := solicitation(c.mac, c.addr, c.nonce)
			again, ok := parse(sent)
			assert.Assert(t, ok && again == c)
			packet := sent[ethernetLen:]
			sum := binary.BigEndian.Uint16(packet[ipv6Len+2:])
			packet[ipv6Len+2], packet[ipv6Len+3] = 0, 0
			assert.Equal(t, checksum(packet), sum)
		}
	})
}

func checkClaim(t *testing.T, c claim) {
	t.Helper()
	assert.Assert(t, c.mac.single() && !c.addr.IsUnspecified() && !c.addr.IsMulticast() && c.addr.Zone() == "")
	assert.Assert(t, c.probing || c.nonce == nonce{})
}

// The kernel's filter lets through what the parser reads, and nothing else that is
// frequent.
func BenchmarkHear(b *testing.B) {
	p := New(Options{})
	s, err := p.segmentLocked("eth1")
	assert.NilError(b, err)
	s.listeners[&listener{heard: func(claim) {}}] = true
	frame := arp(arpRequest, macOf(3), "198.51.100.9", noMAC, "198.51.100.1")
	b.ReportAllocs()
	for b.Loop() {
		if c, ok := parse(frame); ok {
			p.hear(s, c)
		}
	}
}
