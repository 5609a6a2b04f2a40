package link

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// allowed is the guard in plain words, for frames that are long enough.
func allowed(f []byte, mac net.HardwareAddr, own4, own6 []netip.Addr) bool {
	at4 := func(at int) netip.Addr { a, _ := netip.AddrFromSlice(f[at : at+4]); return a }
	at6 := func(at int) netip.Addr { a, _ := netip.AddrFromSlice(f[at : at+16]); return a }
	own6 = append(slices.Clone(own6), linkLocal(mac))
	if !bytes.Equal(f[6:12], mac) {
		return false
	}
	switch binary.BigEndian.Uint16(f[12:]) {
	case unix.ETH_P_ARP:
		return bytes.Equal(f[14:20], []byte{0, 1, 8, 0, 6, 4}) && bytes.Equal(f[22:28], mac) &&
			(at4(28).IsUnspecified() || slices.Contains(own4, at4(28)))
	case unix.ETH_P_IP:
		return slices.Contains(own4, at4(26))
	case unix.ETH_P_IPV6:
	default:
		return false
	}
	if from := at6(22); !from.IsUnspecified() && !slices.Contains(own6, from) {
		return false
	}
	isExtension := func(next byte) bool { return next == 0 || next == 43 || next == 60 }
	next, at := f[20], 54
	if isExtension(next) {
		next, at = f[at], at+8*(int(f[at+1])+1)
		return !isExtension(next) && (next != icmpv6 || f[at] != 136)
	}
	return next != icmpv6 || f[at] != 136 || slices.Contains(own6, at6(at+8))
}

// What passes is what the words say, whatever is in a frame.
func TestGuardProgramDoesWhatItSays(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 2}
	others := []net.HardwareAddr{{2, 0, 0, 0, 0, 3}, {3, 0, 0, 0, 0, 2}}
	addr := netip.MustParseAddr
	all4 := []netip.Addr{addr("10.1.0.2"), addr("10.1.0.3"), addr("10.1.0.1"), addr("0.0.0.0")}
	all6 := []netip.Addr{addr("fd00::2"), addr("fd00::3"), addr("fd00::1:2"), addr("fd01::2"), addr("fe80::1"), linkLocal(mac), addr("::"), addr("::1")}
	const vlan = 3 // instructions that look at the tag, which a VM has not
	rapid.Check(t, func(t *rapid.T) {
		own4, own6 := all4[:rapid.IntRange(0, 2).Draw(t, "IPv4 addresses")], all6[:rapid.IntRange(0, 2).Draw(t, "IPv6 addresses")]
		program := guardProgram(mac, slices.Concat(own4, own6))
		vm, err := bpf.NewVM(program[vlan:])
		if err != nil {
			t.Fatal(err)
		}
		macs := rapid.SampledFrom([]net.HardwareAddr{mac, mac, mac, others[0], others[1]})
		next := rapid.SampledFrom([]byte{icmpv6, icmpv6, hopByHop, routingHeader, destOptions, 17, 44})
		kinds := rapid.SampledFrom([]byte{136, 136, 135, 143})
		f := rapid.SliceOfN(rapid.Byte(), 200, 200).Draw(t, "frame")
		copy(f[6:], macs.Draw(t, "sender"))
		kind := rapid.SampledFrom([]uint16{unix.ETH_P_ARP, unix.ETH_P_IP, unix.ETH_P_IPV6, unix.ETH_P_IPV6, unix.ETH_P_IPV6, 38}).Draw(t, "type")
		binary.BigEndian.PutUint16(f[12:], kind)
		switch kind {
		case unix.ETH_P_ARP:
			copy(f[14:], []byte{0, 1, 8, 0, 6, 4})
			copy(f[22:], macs.Draw(t, "hardware"))
			copy(f[28:], rapid.SampledFrom(all4).Draw(t, "protocol").AsSlice())
		case unix.ETH_P_IP:
			copy(f[26:], rapid.SampledFrom(all4).Draw(t, "from").AsSlice())
		case unix.ETH_P_IPV6:
			copy(f[22:], rapid.SampledFrom(all6).Draw(t, "from").AsSlice())
			f[20], f[54], f[55] = next.Draw(t, "next"), next.Draw(t, "next or message"), rapid.ByteRange(0, 8).Draw(t, "length")
			if f[20] == icmpv6 {
				f[54] = kinds.Draw(t, "message")
			}
			f[54+8*(int(f[55])+1)] = kinds.Draw(t, "message behind")
			copy(f[62:], rapid.SampledFrom(all6).Draw(t, "target").AsSlice())
		}
		got, err := vm.Run(f)
		if err != nil {
			t.Fatal(err)
		}
		if want := allowed(f, mac, own4, own6); (uint32(got) == goOn) != want || !want && got != drop {
			t.Fatalf("%x: answer is %#x, want it let in: %t", f, got, want)
		}
		// One that is cut short does not stop it.
		if _, err := vm.Run(f[:rapid.IntRange(0, len(f)).Draw(t, "cut")]); err != nil {
			t.Fatal(err)
		}
	})
}
