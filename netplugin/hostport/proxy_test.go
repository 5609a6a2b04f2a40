package hostport

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"
)

// echo sends every connection what it gets, and an end when it has ended.
func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return // closed by the test
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

func echoUDP(c net.PacketConn) {
	b := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return // closed by the test
		}
		_, _ = c.WriteTo(b[:n], from)
	}
}

// ask sends a line and returns what comes back.
func ask(c net.Conn, line string) (string, error) {
	if _, err := io.WriteString(c, line); err != nil {
		return "", err
	}
	b := make([]byte, len(line))
	_, err := io.ReadFull(c, b)
	return string(b), err
}

func (w *world) answers(addr string) bool {
	w.Helper()
	c, err := w.dial(w.host, "tcp", addr)
	if err != nil {
		return false
	}
	defer c.Close()
	got, err := ask(c, "hello")
	return err == nil && got == "hello"
}

func TestLoopbackIsCarriedInTheContainersFamily(t *testing.T) {
	w := newWorld(t)
	for i, target := range []Target{
		{Endpoint: "dual", Addr4: addr4, Addr6: addr6}, {Endpoint: "v4", Addr4: addr4}, {Endpoint: "v6", Addr6: addr6},
	} {
		inner := addr6
		if !target.Addr6.IsValid() {
			inner = addr4
		}
		port := uint16(8080 + i)
		w.publish(target, tcp("", port, port, port), udp("", port, port, port))
		at := netip.AddrPortFrom(inner, port).String()
		go echo(w.listen(w.box, at))
		go echoUDP(w.listenUDP(w.box, at))
		assert.Assert(t, w.answers(fmt.Sprintf("[::1]:%d", port)), "%s", target.Endpoint)
		got, err := ask(w.mustDial(w.host, "udp", fmt.Sprintf("[::1]:%d", port)), "datagram")
		assert.NilError(t, err)
		assert.Equal(t, got, "datagram")
		// The host's other addresses belong to the rules where there can be one.
		assert.Equal(t, w.answers(fmt.Sprintf("[2001:db8::1]:%d", port)), target.Endpoint == "v4")
		assert.Assert(t, !w.answers(fmt.Sprintf("127.0.0.1:%d", port)))
	}
}

func TestWithoutProxyNothingIsServed(t *testing.T) {
	w := newWorld(t)
	e := endpoint("one")
	e.Network.NoProxy = true
	w.publish(e, tcp("", 8080, 8080, 80))
	go echo(w.listen(w.box, "[fd00:1::2]:80"))
	assert.Assert(t, !w.answers("[::1]:8080"))
	assert.Equal(t, w.m.proxy.poll, -1)
}

func TestUDPAnswersComeFromTheAddressAsked(t *testing.T) {
	w := newWorld(t)
	w.publish(Target{Endpoint: "v4", Addr4: addr4}, udp("", 8080, 8080, 80))
	go echoUDP(w.listenUDP(w.box, "10.1.0.2:80"))
	// From the container's side, where fd00:1::1 would be the address by route.
	c := w.mustDial(w.box, "udp", "[2001:db8::1]:8080") // connected: takes answers from there only
	for _, line := range []string{"one", "two"} {
		got, err := ask(c, line)
		assert.NilError(t, err)
		assert.Equal(t, got, line)
	}
	assert.Equal(t, w.sessions(), 1)
}

func (w *world) sessions() int {
	w.m.proxy.mu.Lock()
	defer w.m.proxy.mu.Unlock()
	return w.m.proxy.sessions.Len()
}

func TestUDPSessionsEnd(t *testing.T) {
	w := newWorld(t)
	w.m.proxy.idle, w.m.proxy.room = 2*time.Second, 3
	w.publish(Target{Endpoint: "v4", Addr4: addr4}, udp("", 8080, 8080, 80))
	server := w.listenUDP(w.box, "10.1.0.2:80")
	go echoUDP(server)
	files := openFiles(t)
	var clients []net.Conn
	for range 5 {
		c := w.mustDial(w.host, "udp", "[::1]:8080")
		_, err := ask(c, "hello")
		assert.NilError(t, err)
		clients = append(clients, c)
	}
	assert.Equal(t, w.sessions(), 3)
	// Who has lost his session gets another.
	_, err := ask(clients[0], "hello")
	assert.NilError(t, err)
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if n := w.sessions(); n > 0 {
			return poll.Continue("%d sessions", n)
		}
		return poll.Success()
	})
	assert.Equal(t, openFiles(t), files+len(clients))
	_, err = ask(clients[1], "hello")
	assert.NilError(t, err)
}

// A server that is not there yet, and ICMP that says so, end nothing.
func TestUDPServerThatComesLater(t *testing.T) {
	w := newWorld(t)
	w.publish(Target{Endpoint: "v4", Addr4: addr4}, udp("", 8080, 8080, 80))
	c := w.mustDial(w.host, "udp", "[::1]:8080")
	for range 3 {
		_, err := c.Write([]byte("early"))
		assert.NilError(t, err)
		time.Sleep(10 * time.Millisecond)
	}
	go echoUDP(w.listenUDP(w.box, "10.1.0.2:80"))
	got, err := ask(c, "there")
	for err == nil && got == "early" {
		// On a busy machine the last of these comes late.
		got, err = ask(c, "there")
	}
	assert.NilError(t, err)
	assert.Equal(t, got, "there")
}

func TestHalfClosedConnectionsGoOn(t *testing.T) {
	w := newWorld(t)
	w.publish(Target{Endpoint: "v4", Addr4: addr4}, tcp("", 8080, 8080, 80))
	l := w.listen(w.box, "10.1.0.2:80")
	sent := make([]byte, 8<<20)
	_, _ = rand.Read(sent)
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		defer c.Close()
		got, err := io.ReadAll(c) // until the client has closed its half
		if err == nil && !bytes.Equal(got, sent) {
			err = errors.New("the server got something else")
		}
		if err == nil {
			_, err = c.Write(got)
		}
		done <- err
	}()
	c := w.mustDial(w.host, "tcp", "[::1]:8080")
	_, err := c.Write(sent)
	assert.NilError(t, err)
	assert.NilError(t, c.(*net.TCPConn).CloseWrite())
	got, err := io.ReadAll(c)
	assert.NilError(t, err)
	assert.NilError(t, <-done)
	assert.Assert(t, bytes.Equal(got, sent))
	w.noConnections()
}

func (w *world) noConnections() {
	w.Helper()
	poll.WaitOn(w, func(poll.LogT) poll.Result {
		w.m.proxy.mu.Lock()
		defer w.m.proxy.mu.Unlock()
		if n := w.m.proxy.connections; n > 0 {
			return poll.Continue("%d connections", n)
		}
		return poll.Success()
	})
}

// A broken connection is an error on the other side, too, not an end of the data.
func TestResetIsPassedOn(t *testing.T) {
	w := newWorld(t)
	w.publish(Target{Endpoint: "v4", Addr4: addr4}, tcp("", 8080, 8080, 80))
	l := w.listen(w.box, "10.1.0.2:80")
	c := w.mustDial(w.host, "tcp", "[::1]:8080")
	s, err := l.Accept()
	assert.NilError(t, err)
	assert.NilError(t, s.(*net.TCPConn).SetLinger(0))
	assert.NilError(t, s.Close())
	_, err = c.Read(make([]byte, 1))
	assert.ErrorIs(t, err, syscall.ECONNRESET)
	// And so is a container that does not listen.
	assert.NilError(t, l.Close())
	c, err = w.dial(w.host, "tcp", "[::1]:8080")
	if err == nil { // the reset may come before the client is told that it is connected
		_, err = c.Read(make([]byte, 1))
	}
	assert.ErrorIs(t, err, syscall.ECONNRESET)
	w.noConnections()
}

func TestReleaseEndsConnections(t *testing.T) {
	w := newWorld(t)
	v4 := Target{Endpoint: "v4", Addr4: addr4}
	ports := w.publish(v4, tcp("", 8080, 8080, 80), udp("", 8080, 8080, 80), tcp("", 8090, 8090, 80))
	go echo(w.listen(w.box, "10.1.0.2:80"))
	go echoUDP(w.listenUDP(w.box, "10.1.0.2:80"))
	files := openFiles(t)
	c, other := w.mustDial(w.host, "tcp", "[::1]:8080"), w.mustDial(w.host, "tcp", "[::1]:8090")
	u := w.mustDial(w.host, "udp", "[::1]:8080")
	for _, c := range []net.Conn{c, other, u} {
		_, err := ask(c, "hello")
		assert.NilError(t, err)
	}
	// Serving the same again touches nothing; fewer ports end those that are gone.
	w.serve(v4, ports)
	_, err := ask(c, "hello")
	assert.NilError(t, err)
	var fewer = ports[:0:0]
	for _, p := range ports {
		if p.HostPort == 8090 {
			fewer = append(fewer, p)
		}
	}
	w.serve(v4, fewer)
	_, err = c.Read(make([]byte, 1))
	assert.Assert(t, err != nil)
	_, err = ask(other, "hello")
	assert.NilError(t, err)
	assert.Equal(t, w.sessions(), 0)
	assert.Assert(t, w.free("tcp", "0.0.0.0:8080") && w.free("udp", "[::]:8080"))
	w.m.Release("v4")
	_, err = other.Read(make([]byte, 1))
	assert.Assert(t, err != nil)
	w.noConnections()
	for _, c := range []net.Conn{c, other, u} {
		c.Close()
	}
	waitFiles(t, files)
}

// waitFiles waits until the process has no more files open than these.
func waitFiles(t *testing.T, files int) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		runtime.GC() // the runtime keeps the pipes that it has moved data by
		if n := openFiles(t); n > files {
			return poll.Continue("%d files open, %d before", n, files)
		}
		return poll.Success()
	})
}

// A client may hang in the middle of being connected.
func TestReleaseWhileDialing(t *testing.T) {
	w := newWorld(t)
	w.host.Run("ip", "route", "add", "10.9.0.0/24", "via", "10.1.0.2")
	w.box.Run("nft", "add table ip t; add chain ip t c { type filter hook prerouting priority 0; }; add rule ip t c ip daddr 10.9.0.9 drop")
	w.publish(Target{Endpoint: "v4", Addr4: ip("10.9.0.9")}, tcp("", 8080, 8080, 80))
	c := w.mustDial(w.host, "tcp", "[::1]:8080")
	time.Sleep(50 * time.Millisecond)
	start := time.Now()
	w.m.Release("v4")
	_, err := c.Read(make([]byte, 1))
	assert.Assert(t, err != nil)
	w.noConnections()
	assert.Assert(t, time.Since(start) < 2*time.Second)
}

func TestOnlyListedSourcesAreCarried(t *testing.T) {
	w := newWorld(t)
	go echo(w.listen(w.box, "10.1.0.2:80"))
	go echoUDP(w.listenUDP(w.box, "10.1.0.2:80"))
	for name, c := range map[string]struct {
		sources []netip.Prefix
		want    bool
	}{
		"everybody":  {nil, true},
		"listed":     {[]netip.Prefix{netip.MustParsePrefix("fd00:1::/64")}, true},
		"others":     {[]netip.Prefix{netip.MustParsePrefix("2001:db8:9::/48")}, false},
		"IPv4 alone": {[]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, false},
	} {
		t.Run(name, func(t *testing.T) {
			v4 := Target{Endpoint: "v4", Addr4: addr4}
			v4.Network.Sources = c.sources
			w.publish(v4, tcp("", 8080, 8080, 80), udp("", 8080, 8080, 80))
			assert.Assert(t, w.answers("[::1]:8080"))
			remote := func(network string) bool {
				conn, err := w.dial(w.box, network, "[fd00:1::1]:8080")
				if err == nil {
					assert.NilError(t, conn.SetDeadline(time.Now().Add(300*time.Millisecond)))
					_, err = ask(conn, "hello")
				}
				return err == nil
			}
			assert.Equal(t, remote("tcp"), c.want)
			assert.Equal(t, remote("udp"), c.want)
		})
	}
}

func TestThousandConnectionsAtOnce(t *testing.T) {
	w := newWorld(t)
	w.publish(Target{Endpoint: "v4", Addr4: addr4}, tcp("", 8080, 8080, 80))
	go echo(w.listen(w.box, "10.1.0.2:80"))
	files := openFiles(t)
	const many = 1000
	conns := make([]net.Conn, many)
	w.host.Do(func() {
		for i := range conns {
			d := net.Dialer{Timeout: 5 * time.Second}
			c, err := d.Dial("tcp", "[::1]:8080")
			if err != nil {
				t.Fatal(err)
			}
			conns[i] = c
		}
	})
	var all sync.WaitGroup
	for i, c := range conns {
		all.Go(func() {
			defer c.Close()
			line := fmt.Sprintf("connection %d", i)
			if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Error(err)
				return
			}
			if got, err := ask(c, line); err != nil || got != line {
				t.Errorf("connection %d: %q, %v", i, got, err)
			}
		})
	}
	all.Wait()
	w.noConnections()
	waitFiles(t, files) // the next test may count them
}

// Where the process has no descriptor left, clients wait; nobody spins.
func TestConnectionsAreBounded(t *testing.T) {
	w := newWorld(t)
	w.publish(Target{Endpoint: "v4", Addr4: addr4}, tcp("", 8080, 8080, 80))
	go echo(w.listen(w.box, "10.1.0.2:80"))
	w.m.proxy.mu.Lock()
	w.m.proxy.limit = 1
	w.m.proxy.mu.Unlock()
	first := w.mustDial(w.host, "tcp", "[::1]:8080")
	_, err := ask(first, "hello")
	assert.NilError(t, err)
	assert.Assert(t, !w.answers("[::1]:8080"))
	first.Close()
	w.noConnections()
	assert.Assert(t, w.answers("[::1]:8080"))
}
