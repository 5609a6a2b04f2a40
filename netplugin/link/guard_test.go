package link_test

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

// What the container has, and what others have.
const (
	own4, own6, ownMAC       = "10.1.0.2", "fd00:1::2", "02:00:00:00:00:02"
	ownLocal                 = "fe80::ff:fe00:2"
	other4, other6, otherMAC = "10.1.0.1", "fd00:1::1", "02:00:00:00:00:01"
)

func guarded() link.Veth {
	v := veth()
	v.Guarded, v.Addrs = true, []netip.Addr{netip.MustParseAddr(own4), netip.MustParseAddr(own6)}
	return v
}

func ip(s string) []byte { return netip.MustParseAddr(s).AsSlice() }

func ether(from string, kind uint16, payload []byte) []byte {
	b := slices.Concat(mac("ff:ff:ff:ff:ff:ff"), mac(from))
	return append(binary.BigEndian.AppendUint16(b, kind), payload...)
}

func arpFrame(hardware, addr string) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, 2}
	b = append(append(b, mac(hardware)...), ip(addr)...)
	return ether(ownMAC, unix.ETH_P_ARP, append(append(b, mac(otherMAC)...), ip(other4)...))
}

func ipv4Frame(from string) []byte {
	b := make([]byte, 20)
	b[0] = 0x45
	copy(b[12:], ip(from))
	return ether(ownMAC, unix.ETH_P_IP, b)
}

func ipv6Frame(from string, next byte, payload []byte) []byte {
	b := make([]byte, 40)
	b[0], b[6] = 0x60, next
	copy(b[8:], ip(from))
	return ether(ownMAC, unix.ETH_P_IPV6, slices.Concat(b, payload))
}

// message is one of ICMPv6 about a target.
func message(kind byte, target string) []byte {
	return append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, ip(target)...)
}

// behind is a message behind an extension header of 16 bytes.
func behind(next byte, rest []byte) []byte {
	b := make([]byte, 16)
	b[0], b[1] = next, 1
	return slices.Concat(b, rest)
}

func tagged(vlan byte, f []byte) []byte {
	return slices.Concat(f[:12], []byte{0x81, 0, 0, vlan}, f[12:])
}

func TestGuardLetsInWhatIsTheContainersOwn(t *testing.T) {
	h, ns, container := plugged(t, guarded())
	wire := newWire(t, container, ns)
	const solicitation, advertisement, report, udp, hop, opts, routing, icmp6 = 135, 136, 143, 17, 0, 60, 43, 58
	frames := []struct {
		name  string
		frame []byte
		in    bool
	}{
		{"IPv4", ipv4Frame(own4), true},
		{"IPv4 of another", ipv4Frame(other4), false},
		{"IPv4 of nobody", ipv4Frame("0.0.0.0"), false},
		{"another MAC", slices.Concat(mac("ff:ff:ff:ff:ff:ff"), mac(otherMAC), ipv4Frame(own4)[12:]), false},
		{"MAC that differs at the end", slices.Concat(mac("ff:ff:ff:ff:ff:ff"), mac("02:00:00:00:00:03"), ipv4Frame(own4)[12:]), false},
		{"ARP", arpFrame(ownMAC, own4), true},
		{"ARP probe", arpFrame(ownMAC, "0.0.0.0"), true},
		{"ARP of another", arpFrame(ownMAC, other4), false},
		{"ARP with another MAC", arpFrame(otherMAC, own4), false},
		{"ARP of another kind", func() []byte { f := arpFrame(ownMAC, own4); f[15] = 6; return f }(), false},
		{"IPv6", ipv6Frame(own6, udp, nil), true},
		{"IPv6 link-local", ipv6Frame(ownLocal, udp, nil), true},
		{"IPv6 of nobody yet", ipv6Frame("::", icmp6, message(solicitation, own6)), true},
		{"IPv6 of another", ipv6Frame(other6, udp, nil), false},
		{"link-local of another", ipv6Frame("fe80::1", udp, nil), false},
		{"solicitation", ipv6Frame(own6, icmp6, message(solicitation, other6)), true},
		{"advertisement", ipv6Frame(own6, icmp6, message(advertisement, own6)), true},
		{"advertisement of link-local", ipv6Frame(own6, icmp6, message(advertisement, ownLocal)), true},
		{"advertisement of another", ipv6Frame(own6, icmp6, message(advertisement, other6)), false},
		{"advertisement of a router", ipv6Frame(ownLocal, icmp6, message(advertisement, "fe80::1")), false},
		{"group membership", ipv6Frame(ownLocal, hop, behind(icmp6, message(report, own6))), true},
		{"datagram with options", ipv6Frame(own6, opts, behind(udp, nil)), true},
		{"hidden advertisement", ipv6Frame(own6, hop, behind(icmp6, message(advertisement, other6))), false},
		{"better hidden advertisement", ipv6Frame(own6, routing, behind(opts, behind(icmp6, message(advertisement, other6)))), false},
		{"VLAN", tagged(50, ipv4Frame(own4)), false},
		{"priority", tagged(0, ipv4Frame(own4)), false},
		{"spanning tree", ether(ownMAC, 38, make([]byte, 38)), false},
	}
	for _, f := range frames {
		assert.Equal(t, wire.passes(f.frame, f.in), f.in, f.name)
	}

	// Whatever somebody does to it is repaired, also beside a limit.
	limited := guarded()
	limited.RateOut = 80_000_000
	for _, v := range []link.Veth{guarded(), limited, limited} {
		if tc, err := ns.Try("tc", "qdisc", "del", "dev", "bv1", "ingress"); err != nil {
			t.Log(tc)
		}
		assert.Assert(t, wire.passes(ipv4Frame(other4), true), "without a guard")
		for range 2 {
			_, err := h.EnsureVeth(v)
			assert.NilError(t, err)
			shown := ns.Run("tc", "filter", "show", "dev", "bv1", "ingress")
			assert.Equal(t, strings.Count(shown, "direct-action"), 1, shown)
			assert.Equal(t, strings.Count(shown, "mirred"), map[bool]int{true: 1}[v.RateOut != 0], shown)
			assert.Assert(t, !wire.passes(ipv4Frame(other4), false))
			assert.Assert(t, wire.passes(ipv4Frame(own4), true))
		}
	}
}

// A container without IPv4 or IPv6 addresses speaks none, but for link-local.
func TestGuardOfOneFamily(t *testing.T) {
	v := guarded()
	v.Addrs = v.Addrs[1:]
	h, ns, container := plugged(t, v)
	wire := newWire(t, container, ns)
	assert.Assert(t, !wire.passes(ipv4Frame(own4), false))
	assert.Assert(t, wire.passes(ipv6Frame(own6, 17, nil), true))
	v.Addrs = guarded().Addrs[:1]
	_, err := h.EnsureVeth(v)
	assert.NilError(t, err)
	assert.Assert(t, wire.passes(ipv4Frame(own4), true))
	assert.Assert(t, !wire.passes(ipv6Frame(own6, 17, nil), false))
	assert.Assert(t, wire.passes(ipv6Frame(ownLocal, 17, nil), true))
}

// A wire sends frames from a container and hears those that reach the bridge.
type wire struct {
	t             *testing.T
	in, out, link int
	// number makes frames differ.
	number uint32
}

func newWire(t *testing.T, container, host *testkit.Netns) *wire {
	w := &wire{t: t}
	// The frames are not whole enough for br_netfilter.
	host.Run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=0", "net.bridge.bridge-nf-call-ip6tables=0")
	socket := func(ns *testkit.Netns, name string) (fd int) {
		ns.Do(func() {
			var err error
			fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			assert.NilError(t, err)
		})
		t.Cleanup(func() { unix.Close(fd) })
		req, err := unix.NewIfreq(name)
		assert.NilError(t, err)
		assert.NilError(t, unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req))
		w.link = int(req.Uint32())
		const all = unix.ETH_P_ALL << 8 // in network order
		assert.NilError(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: w.link}))
		return fd
	}
	w.in = socket(host, "bth1")
	w.out = socket(container, "eth0")
	// The bridge takes a moment to see that the link is up.
	for end := time.Now().Add(5 * time.Second); !w.passes(ipv6Frame(ownLocal, 17, nil), false); {
		assert.Assert(t, time.Now().Before(end), "nothing passes")
	}
	return w
}

func (w *wire) send(f []byte) []byte {
	w.t.Helper()
	w.number++
	f = append(binary.BigEndian.AppendUint32(append([]byte{}, f...), w.number), make([]byte, 32)...)
	assert.NilError(w.t, unix.Sendto(w.out, f, 0, &unix.SockaddrLinklayer{Ifindex: w.link}))
	return f
}

// passes reports whether a frame reaches the bridge, which takes moments.
func (w *wire) passes(f []byte, want bool) bool {
	w.t.Helper()
	patience := 100 * time.Millisecond
	if want {
		patience = 2 * time.Second
	}
	f = w.send(f)
	b := make([]byte, 2048)
	for end := time.Now().Add(patience); time.Now().Before(end); {
		tv := unix.NsecToTimeval(int64(patience))
		assert.NilError(w.t, unix.SetsockoptTimeval(w.in, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
		if n, _, err := unix.Recvfrom(w.in, b, 0); err == nil && bytes.Equal(b[:n], f) {
			return true
		}
	}
	return false
}
