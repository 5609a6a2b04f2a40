package hostport

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

var cmpAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// A world is a host with a network and a container in it.
type world struct {
	*testing.T
	host, box *testkit.Netns
	m         *Manager
}

// newWorld makes a host with 192.0.2.1 and 2001:db8::1 for its own and a link to a
// container at addr4 and addr6.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, host: testkit.NewNetns(t), box: testkit.NewNetns(t)}
	w.host.Run("ip", "link", "add", "br0", "type", "veth", "peer", "name", "eth0")
	w.host.Run("ip", "link", "set", "eth0", "netns", w.box.Path())
	for _, a := range []string{"10.1.0.1/24", "fd00:1::1/64", "192.0.2.1/32", "2001:db8::1/128"} {
		w.host.Run("ip", "addr", "add", a, "dev", "br0", "nodad")
	}
	w.box.Run("ip", "addr", "add", "10.1.0.2/24", "dev", "eth0")
	w.box.Run("ip", "addr", "add", "fd00:1::2/64", "dev", "eth0", "nodad")
	w.host.Run("ip", "link", "set", "br0", "up")
	w.box.Run("ip", "link", "set", "eth0", "up")
	w.box.Run("ip", "route", "add", "default", "via", "10.1.0.1")
	w.box.Run("ip", "-6", "route", "add", "default", "via", "fd00:1::1")
	w.m = w.newManager()
	return w
}

// onHost is a world without a container.
func onHost(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, host: testkit.NewNetns(t)}
	w.m = w.newManager()
	return w
}

func (w *world) newManager() *Manager {
	w.Helper()
	m, err := New(Options{NetNS: w.host.File()})
	assert.NilError(w, err)
	w.Cleanup(func() { assert.NilError(w, m.Close()) })
	return m
}

// restart makes a new Manager in the place of the old one.
func (w *world) restart() {
	w.Helper()
	assert.NilError(w, w.m.Close())
	w.m = w.newManager()
}

func (w *world) reserve(target Target, want ...options.PortRequest) []options.PublishedPort {
	w.Helper()
	ports, err := w.m.Reserve(w.Context(), target, want)
	assert.NilError(w, err)
	return ports
}

func (w *world) serve(target Target, ports []options.PublishedPort) {
	w.Helper()
	assert.NilError(w, w.m.Serve(w.Context(), target, ports))
}

// publish reserves and serves.
func (w *world) publish(target Target, want ...options.PortRequest) []options.PublishedPort {
	w.Helper()
	ports := w.reserve(target, want...)
	w.serve(target, ports)
	return ports
}

func (w *world) listen(ns *testkit.Netns, addr string) net.Listener {
	w.Helper()
	var (
		l   net.Listener
		err error
	)
	ns.Do(func() { l, err = net.Listen("tcp"+familyOf(addr), addr) })
	assert.NilError(w, err)
	w.Cleanup(func() { l.Close() })
	return l
}

func (w *world) listenUDP(ns *testkit.Netns, addr string) net.PacketConn {
	w.Helper()
	var (
		c   net.PacketConn
		err error
	)
	ns.Do(func() { c, err = net.ListenPacket("udp"+familyOf(addr), addr) })
	assert.NilError(w, err)
	w.Cleanup(func() { _ = c.Close() })
	return c
}

// familyOf keeps Go from listening in both families.
func familyOf(addr string) string {
	if netip.MustParseAddrPort(addr).Addr().Is4() {
		return "4"
	}
	return "6"
}

func (w *world) dial(ns *testkit.Netns, network, addr string) (net.Conn, error) {
	w.Helper()
	var (
		c   net.Conn
		err error
	)
	ns.Do(func() {
		d := net.Dialer{Timeout: 500 * time.Millisecond}
		c, err = d.DialContext(w.Context(), network, addr)
	})
	if err == nil {
		w.Cleanup(func() { c.Close() })
		err = c.SetDeadline(time.Now().Add(10 * time.Second))
	}
	return c, err
}

func (w *world) mustDial(ns *testkit.Netns, network, addr string) net.Conn {
	w.Helper()
	c, err := w.dial(ns, network, addr)
	assert.NilError(w, err)
	return c
}

// free reports whether a process could have the port.
func (w *world) free(network, addr string) bool {
	w.Helper()
	free := false
	w.host.Do(func() {
		if network == "udp" {
			if c, err := net.ListenPacket("udp"+familyOf(addr), addr); err == nil {
				free = true
				_ = c.Close()
			}
			return
		}
		if l, err := net.Listen("tcp"+familyOf(addr), addr); err == nil {
			free = true
			l.Close()
		}
	})
	return free
}

// endpoint is a target with both addresses.
func endpoint(id string) Target { return Target{Endpoint: id, Addr4: addr4, Addr6: addr6} }

func tcp(hostIP string, first, last, port uint16) options.PortRequest {
	return options.PortRequest{Proto: options.TCP, HostIP: ip(hostIP), HostPort: first, HostPortEnd: last, ContainerPort: port}
}

func udp(hostIP string, first, last, port uint16) options.PortRequest {
	r := tcp(hostIP, first, last, port)
	r.Proto = options.UDP
	return r
}

// words are ports as strings.
func words(ports []options.PublishedPort) []string {
	var out []string
	for _, p := range ports {
		out = append(out, p.String())
	}
	return out
}

// openFiles counts those of the process.
func openFiles(tb testing.TB) int {
	tb.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	assert.NilError(tb, err)
	return len(list) - 1 // without the one for reading the list
}
