package link_test

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

// The neighbours have talked to the last owner of the addresses; the new one has
// another MAC address and says nothing itself.
func TestNeighboursLearnTheNewAddress(t *testing.T) {
	ns := testkit.NewNetns(t)
	h := open(t, ns)
	b := bridge()
	b.IPv6 = true
	ensureBridge(t, h, b)
	old, want := "02:00:00:00:00:aa", "02:00:00:00:00:02"
	containers := map[string]*testkit.Netns{}
	for i, id := range []string{endpointID, "e2", "e3"} {
		v := veth()
		v.EndpointID = id
		v.Host, v.MAC = "bv"+id, mac("02:00:00:00:00:0"+string(rune('2'+i)))
		// Two that may not speak with each other, and one that speaks with both.
		v.Port.Isolated = id != "e2"
		ensureVeth(t, h, v)
		c := testkit.NewNetns(t)
		move(ns, c, "10.1.0.1"+string(rune('0'+i))+"/24")
		c.Run("ip", "addr", "add", "fd00:1::1"+string(rune('0'+i))+"/64", "dev", "eth0", "nodad")
		containers[id] = c
	}
	addrs := []netip.Addr{netip.MustParseAddr("10.1.0.10"), netip.MustParseAddr("fd00:1::10")}
	know := func(n *testkit.Netns, dev string) {
		for _, a := range addrs {
			n.Run("ip", "neigh", "replace", a.String(), "lladdr", old, "dev", dev, "nud", "stale")
		}
	}
	know(ns, "bth1")
	know(containers["e2"], "eth0")
	know(containers["e3"], "eth0")

	heard := map[string]func() int{}
	for id, c := range containers {
		heard[id] = sniff(t, c, mac(want))
	}
	defer heard["e3"]()
	assert.NilError(t, h.CheckAnnounce())
	a := link.Announcement{Bridge: "bth1", EndpointID: endpointID, MAC: mac(want), Addrs: addrs, First: true}
	assert.NilError(t, h.Announce([]link.Announcement{a, {Bridge: "gone", EndpointID: "gone", Addrs: addrs}}))
	neighbour := containers["e2"].Run("ip", "neigh", "show", "dev", "eth0")
	for _, addr := range addrs {
		assert.Assert(t, strings.Contains(neighbour, addr.String()+" lladdr "+want), "%s: %s", addr, neighbour)
	}
	assert.Assert(t, !strings.Contains(ns.Run("ip", "neigh", "show", "dev", "bth1"), old))
	assert.Equal(t, strings.Count(containers["e3"].Run("ip", "neigh", "show", "dev", "eth0"), old), 2)
	// It did not hear of itself, which it would take for a conflict; the other one,
	// to which it may speak, has.
	assert.Equal(t, heard[endpointID](), 0)
	assert.Equal(t, heard["e2"](), 2)
}

// sniff counts the announcements that arrive in the namespace with this source address.
func sniff(t *testing.T, ns *testkit.Netns, from net.HardwareAddr) (count func() int) {
	t.Helper()
	fd := -1
	ns.Do(func() {
		var err error
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})))
		assert.NilError(t, err)
	})
	return func() int {
		defer unix.Close(fd)
		n, buf := 0, make([]byte, 2048)
		for {
			size, sa, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return n
			}
			sender, _ := sa.(*unix.SockaddrLinklayer)
			arp := size > 14 && buf[12] == 8 && buf[13] == 6
			// Its own search for duplicates and routers does not count.
			advertisement := size > 54 && buf[12] == 0x86 && buf[54] == 136
			if (arp || advertisement) && sender.Pkttype != unix.PACKET_OUTGOING && bytes.Equal(buf[6:12], from) {
				n++
			}
		}
	}
}
