package probe

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/testkit"
)

// A lan is a switch with hosts, each in a namespace of its own with the link eth1.
type lan struct {
	*testing.T
	sw *testkit.Netns
	n  int
}

type host struct {
	*testkit.Netns
	*lan
	h *link.Handle
	p *Prober
	// port is the switch's end of eth1.
	port string
}

func newLAN(t *testing.T) *lan {
	t.Helper()
	l := &lan{T: t, sw: testkit.NewNetns(t)}
	l.sw.Run("ip", "link", "add", "br0", "up", "type", "bridge", "mcast_snooping", "0")
	return l
}

// host adds a host with these addresses; the n-th one has the MAC 02:00:00:00:00:n.
func (l *lan) host(addrs ...string) *host {
	l.Helper()
	l.n++
	x := &host{Netns: testkit.NewNetns(l.T), lan: l, port: "p" + strconv.Itoa(l.n)}
	l.sw.Run("ip", "link", "add", x.port, "type", "veth", "peer", "name", "eth1", "address", macOf(l.n).String())
	l.sw.Run("ip", "link", "set", "eth1", "netns", x.Path())
	l.sw.Run("ip", "link", "set", x.port, "master", "br0", "up")
	for _, a := range addrs {
		x.addr("eth1", a)
	}
	x.Run("ip", "link", "set", "eth1", "up")
	l.forwards(x.port)
	var err error
	x.h, err = link.Open(link.Options{NetNS: x.File()})
	assert.NilError(l, err)
	l.Cleanup(x.h.Close)
	x.prober(Options{})
	return x
}

// forwards waits until the switch does, from and to a port: the kernel learns of a
// carrier in the background, and its bridge drops frames until then.
func (l *lan) forwards(port string) {
	l.Helper()
	l.sw.Run("sh", "-c", "for i in $(seq 500); do ip -d link show dev "+port+" | grep -q 'state forwarding' && exit; sleep 0.01; done; exit 1")
}

// prober makes the host's Prober anew.
func (x *host) prober(opts Options) {
	x.Helper()
	if x.p != nil {
		assert.NilError(x.T, x.p.Close())
	}
	opts.Link = x.h
	x.p = New(opts)
	x.Cleanup(func() { assert.NilError(x.T, x.p.Close()) })
}

func (x *host) addr(dev, addr string) {
	x.Helper()
	if netip.MustParsePrefix(addr).Addr().Is6() {
		x.Run("ip", "addr", "add", addr, "dev", dev, "nodad")
		return
	}
	x.Run("ip", "addr", "add", addr, "dev", dev)
}

// child adds a macvlan link on eth1 in a namespace of its own.
func (x *host) child(mode string, hw net.HardwareAddr, addrs ...string) *host {
	x.Helper()
	c := &host{Netns: testkit.NewNetns(x.T), lan: x.lan}
	x.Run("ip", "link", "add", "mv0", "link", "eth1", "address", hw.String(), "type", "macvlan", "mode", mode)
	x.Run("ip", "link", "set", "mv0", "netns", c.Path())
	for _, a := range addrs {
		c.addr("mv0", a)
	}
	c.Run("ip", "link", "set", "mv0", "up")
	return c
}

// probe asks with the fast mode and does not expect an error.
func (x *host) probe(addr string) *Conflict {
	x.Helper()
	c, err := x.p.Probe(x.Context(), "eth1", netip.MustParseAddr(addr), Fast)
	assert.NilError(x.T, err)
	return c
}

// whileProbing does something while a probe waits for answers, and returns the error of
// that.
func (x *host) whileProbing(addr string, do func()) error {
	x.Helper()
	errs := make(chan error, 1)
	go func() {
		_, err := x.p.Probe(x.Context(), "eth1", netip.MustParseAddr(addr), Full) // seconds
		errs <- err
	}()
	poll.WaitOn(x.T, func(poll.LogT) poll.Result {
		x.p.mu.Lock()
		defer x.p.mu.Unlock()
		if s := x.p.segments["eth1"]; s != nil && len(s.queries) > 0 {
			return poll.Success()
		}
		return poll.Continue("no probe has begun")
	}, poll.WithDelay(time.Millisecond))
	do()
	return <-errs
}

// wantClear asks for addresses that nobody has.
func (x *host) wantClear(addrs ...string) {
	x.Helper()
	for _, a := range addrs {
		assert.Equal(x.T, x.probe(a) == nil, true, "%s", a)
	}
}

// wantUsed asks for addresses that this MAC has.
func (x *host) wantUsed(by net.HardwareAddr, addrs ...string) {
	x.Helper()
	for _, a := range addrs {
		c := x.probe(a)
		assert.Assert(x.T, c != nil, "nobody has %s", a)
		assert.DeepEqual(x.T, *c, Conflict{Addr: netip.MustParseAddr(a), MAC: by}, cmpAddr)
	}
}

func macOf(n int) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0, byte(n)} }

// frames opens a socket in the namespace that takes and sends all frames of a link,
// until the test ends.
func frames(t testing.TB, ns *testkit.Netns, dev string) (fd int) {
	t.Helper()
	ns.Do(func() {
		i, err := net.InterfaceByName(dev)
		assert.NilError(t, err)
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(networkOrder(unix.ETH_P_ALL)))
		assert.NilError(t, err)
		assert.NilError(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: i.Index}))
	})
	assert.NilError(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 10000}))
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// A frame that was received, and when.
type frame struct {
	at   time.Time
	data []byte
}

// sniff collects the frames of a link, in both directions, until stop is called.
func sniff(t testing.TB, ns *testkit.Netns, dev string) (stop func() []frame) {
	t.Helper()
	fd := frames(t, ns, dev)
	ctx, cancel := context.WithCancel(t.Context())
	var (
		got  []frame
		done sync.WaitGroup
	)
	done.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, err := unix.Read(fd, buf)
			if err == nil {
				got = append(got, frame{at: time.Now(), data: append([]byte(nil), buf[:n]...)})
			} else if ctx.Err() != nil {
				return
			}
		}
	})
	return func() []frame {
		cancel()
		done.Wait()
		return got
	}
}

// respond answers the frames that fn has answers to after a delay, until the test
// ends.
func respond(t testing.TB, ns *testkit.Netns, dev string, delay time.Duration, fn func(claim) []byte) {
	t.Helper()
	fd := frames(t, ns, dev)
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() {
		buf := make([]byte, 2048)
		for ctx.Err() == nil {
			n, err := unix.Read(fd, buf)
			if err != nil {
				continue
			}
			c, ok := parse(buf[:n])
			if !ok {
				continue
			}
			if answer := fn(c); answer != nil {
				done.Go(func() {
					time.Sleep(delay)
					_, _ = unix.Write(fd, answer) // the test waits for it
				})
			}
		}
	})
	t.Cleanup(func() { cancel(); done.Wait() })
}

// send sends frames by a link.
func send(t testing.TB, ns *testkit.Netns, dev string, list ...[]byte) {
	t.Helper()
	fd := frames(t, ns, dev)
	for _, b := range list {
		_, err := unix.Write(fd, b)
		assert.NilError(t, err)
	}
}

// arp is a message with these fields, to everybody.
func arp(op byte, sender net.HardwareAddr, senderIP string, target net.HardwareAddr, targetIP string) []byte {
	b := header(nil, broadcast, mac(sender), unix.ETH_P_ARP)
	b = append(append(b, 0, 1, 8, 0, 6, 4, 0, op), sender...)
	b = append(append(b, netip.MustParseAddr(senderIP).AsSlice()...), target...)
	return append(b, netip.MustParseAddr(targetIP).AsSlice()...)
}

// advertisement says to all nodes that the MAC has the address.
func advertisement(from net.HardwareAddr, addr string) []byte {
	const length = neighbour + 8
	a := netip.MustParseAddr(addr).AsSlice()
	b := header(nil, groupMAC(allNodes), mac(from), unix.ETH_P_IPV6)
	b = append(b, 0x60, 0, 0, 0, 0, length, unix.IPPROTO_ICMPV6, hopLimit)
	b = append(append(b, a...), allNodes.AsSlice()...)
	b = append(append(b, advertise, 0, 0, 0, 0x20, 0, 0, 0), a...)
	return append(append(b, targetLink, 1), from...)
}
