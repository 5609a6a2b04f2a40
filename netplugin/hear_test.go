package netplugin

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/testkit"
)

// A hearing knows who was asked for on a LAN.
type hearing struct {
	mu    sync.Mutex
	times map[string][]time.Time
}

// probes are the times of the ARP probes for an address.
func (h *hearing) probes(addr string) []time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.times[addr]
}

// hear begins to hear ARP probes at the neighbour.
func hear(t *testing.T, neighbour *testkit.Netns) *hearing {
	t.Helper()
	const (
		header = 14 // of Ethernet
		length = header + 28
	)
	arp := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ARP))
	fd := -1
	neighbour.Do(func() {
		dev, err := net.InterfaceByName("eth0")
		assert.NilError(t, err)
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(arp))
		assert.NilError(t, err)
		assert.NilError(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: arp, Ifindex: dev.Index}))
	})
	assert.NilError(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 10000}))
	h := &hearing{times: make(map[string][]time.Time)}
	var (
		stop atomic.Bool
		done sync.WaitGroup
	)
	done.Go(func() {
		frame := make([]byte, 256)
		for !stop.Load() {
			n, err := unix.Read(fd, frame)
			if err != nil || n < length {
				continue
			}
			// RFC 5227: a request whose sender has no address yet.
			m := frame[header:length]
			if binary.BigEndian.Uint16(m[6:]) != 1 || binary.BigEndian.Uint32(m[14:]) != 0 {
				continue
			}
			target := netip.AddrFrom4([4]byte(m[24:28])).String()
			h.mu.Lock()
			h.times[target] = append(h.times[target], time.Now())
			h.mu.Unlock()
		}
	})
	t.Cleanup(func() {
		stop.Store(true)
		done.Wait()
		assert.Check(t, unix.Close(fd))
	})
	return h
}
