package dhcp

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/testkit"
)

// A world is a host with the link eth1 to a LAN, where DHCP servers run, and a
// Manager on the host.
type world struct {
	t         *testing.T
	host, lan *testkit.Netns
	m         *Manager
	opts      Options
	events    chan Event

	mu sync.Mutex
	// ahead is how much the Manager's clock is ahead.
	ahead time.Duration
}

const parent = "eth1"

func subnet() netip.Prefix { return netip.MustParsePrefix("10.9.0.0/24") }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, host: testkit.NewNetns(t), lan: testkit.NewNetns(t), events: make(chan Event, 100)}
	w.host.Run("ip", "link", "add", parent, "type", "veth", "peer", "name", "srv", "netns", w.lan.Path())
	w.host.Run("ip", "link", "set", parent, "up")
	w.lan.Run("ip", "link", "set", "srv", "up")
	w.lan.Run("ip", "addr", "add", "10.9.0.1/24", "dev", "srv")
	log := logrus.New()
	log.SetOutput(io.Discard)
	w.opts = Options{
		NetNS: w.host.File(), Log: logrus.NewEntry(log), Now: w.now, Notify: func(e Event) { w.events <- e },
		Timeout: 8 * time.Second, Retry: 300 * time.Millisecond,
	}
	w.m = New(w.opts)
	t.Cleanup(func() { w.m.Close() })
	return w
}

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.ahead)
}

// jump puts the Manager's clock forward.
func (w *world) jump(d time.Duration) {
	w.mu.Lock()
	w.ahead += d
	w.mu.Unlock()
	w.m.poke()
}

// restart is berthd's.
func (w *world) restart() {
	w.m.Close()
	w.m = New(w.opts)
}

// impatient makes the Manager give up early.
func (w *world) impatient() {
	w.opts.Timeout, w.opts.Retry = 600*time.Millisecond, 100*time.Millisecond
	w.restart()
}

func slot(n int) Identity { return Space{Host: "host", Parent: parent, Subnet: subnet()}.Slot(n) }

func request(id Identity) Request { return Request{Parent: parent, Identity: id, Subnet: subnet()} }

func (w *world) acquire(r Request) Lease {
	w.t.Helper()
	l, err := w.m.Acquire(w.t.Context(), r)
	assert.NilError(w.t, err)
	return l
}

// fails returns the words.
func (w *world) fails(r Request) string {
	w.t.Helper()
	l, err := w.m.Acquire(w.t.Context(), r)
	assert.Assert(w.t, err != nil, "got %+v", l)
	return err.Error()
}

func (w *world) event() Event {
	w.t.Helper()
	select {
	case e := <-w.events:
		return e
	case <-time.After(15 * time.Second):
		w.t.Fatalf("no event; %+v", w.m.Status())
		return Event{}
	}
}

// container makes a macvlan above the parent as dockerd would, with the lease's MAC
// and IP address.
func (w *world) container(l Lease) *testkit.Netns {
	w.t.Helper()
	c := testkit.NewNetns(w.t)
	w.host.Run("ip", "link", "add", "mv0", "link", parent, "address", l.Identity.MAC.String(), "type", "macvlan", "mode", "bridge")
	w.host.Run("ip", "link", "set", "mv0", "netns", c.Path())
	c.Run("ip", "addr", "add", l.Prefix.String(), "dev", "mv0")
	c.Run("ip", "link", "set", "mv0", "up")
	return c
}

// A server is a DHCP server's process.
type server struct {
	testkit.Output

	t   *testing.T
	cmd *exec.Cmd
}

// waitFor waits until the server has said this.
func (s *server) waitFor(words string) {
	s.t.Helper()
	s.WaitFor(s.t, words)
}

func (s *server) count(words string) int { return strings.Count(s.String(), words) }

// stop kills the server and waits for it.
func (s *server) stop() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

func (w *world) serve(ready string, argv ...string) *server {
	w.t.Helper()
	s := &server{t: w.t}
	w.lan.Do(func() {
		s.cmd = exec.CommandContext(context.Background(), argv[0], argv[1:]...)
		s.cmd.Stdout, s.cmd.Stderr = s, s
		assert.NilError(w.t, s.cmd.Start())
	})
	w.t.Cleanup(func() {
		s.stop()
		if w.t.Failed() {
			w.t.Logf("%s: %s", argv[0], s.String())
		}
	})
	s.waitFor(ready)
	return s
}

// dnsmasq serves addresses of a range, or what the arguments say. leases is its file;
// the shortest lease it knows is two minutes.
func (w *world) dnsmasq(leases string, args ...string) *server {
	w.t.Helper()
	all := append([]string{
		"/usr/sbin/dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts", "--no-resolv", "--port=0",
		"--interface=srv", "--bind-interfaces", "--user=root", "--pid-file=", "--log-facility=-", "--log-dhcp",
		"--no-ping", "--dhcp-leasefile=" + leases, "--dhcp-authoritative",
	}, args...)
	return w.serve("DHCP, ", all...)
}

const usualRange = "--dhcp-range=10.9.0.100,10.9.0.150,255.255.255.0,2m"

func (w *world) leaseFile() string { return filepath.Join(w.t.TempDir(), "leases") }

func (w *world) ping(from *testkit.Netns, to string) {
	w.t.Helper()
	out, err := from.Try("busybox", "ping", "-c", "1", "-W", "2", to)
	assert.NilError(w.t, err, out)
}

func state(m *Manager, a netip.Addr) string {
	for _, s := range m.Status() {
		if s.Lease.Addr == a {
			return fmt.Sprintf("%s %s", s.State, s.Reason)
		}
	}
	return ""
}
