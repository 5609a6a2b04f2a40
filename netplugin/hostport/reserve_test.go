package hostport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

func TestPortsAreHeldUntilReleased(t *testing.T) {
	w := onHost(t)
	ports := w.reserve(endpoint("one"), tcp("", 8080, 8080, 80), udp("127.0.0.1", 8080, 8080, 81))
	assert.DeepEqual(t, words(ports), []string{"0.0.0.0:8080->80/tcp", "[::]:8080->80/tcp", "127.0.0.1:8080->81/udp"})
	for _, addr := range []string{"0.0.0.0:8080", "127.0.0.1:8080", "[::]:8080", "[::1]:8080"} {
		assert.Assert(t, !w.free("tcp", addr), "%s is free", addr)
	}
	assert.Assert(t, !w.free("udp", "0.0.0.0:8080"))
	assert.Assert(t, w.free("udp", "[::]:8080"))
	w.m.Release("two")
	assert.Assert(t, !w.free("tcp", "127.0.0.1:8080"))
	w.m.Release("one")
	assert.Assert(t, w.free("tcp", "0.0.0.0:8080") && w.free("tcp", "[::]:8080") && w.free("udp", "0.0.0.0:8080"))
	assert.Equal(t, len(w.m.table)+len(w.m.held), 0)
}

// Whoever comes first has the port, whatever the order and the address.
func TestAPortOfAnotherProcessIsAConflict(t *testing.T) {
	for _, c := range []struct{ theirs, ours, named string }{
		{"0.0.0.0:8080", "", "0.0.0.0:8080"},
		{"127.0.0.1:8080", "", "0.0.0.0:8080"},
		{"127.0.0.1:8080", "127.0.0.1", "127.0.0.1:8080"},
		{"0.0.0.0:8080", "127.0.0.1", "127.0.0.1:8080"},
		{"[::]:8080", "", "[::]:8080"},
		{"[::1]:8080", "::", "[::]:8080"},
	} {
		for network, request := range map[string]options.PortRequest{
			"tcp": tcp(c.ours, 8080, 8080, 80), "udp": udp(c.ours, 8080, 8080, 80),
		} {
			t.Run(fmt.Sprintf("%s %s, then %q", network, c.theirs, c.ours), func(t *testing.T) {
				w := onHost(t)
				if network == "tcp" {
					w.listen(w.host, c.theirs)
				} else {
					w.listenUDP(w.host, c.theirs)
				}
				before := openFiles(t)
				_, err := w.m.Reserve(t.Context(), endpoint("one"), []options.PortRequest{tcp("", 9090, 9090, 90), request})
				assert.Assert(t, errdefs.IsConflict(err), "%v", err)
				assert.ErrorContains(t, err, "Bind for "+c.named+" failed: port is already allocated")
				assert.ErrorContains(t, err, c.named+"/"+network+" is in use by another process")
				assert.ErrorContains(t, err, "address already in use")
				assert.Assert(t, w.free("tcp", "0.0.0.0:9090") && w.free("tcp", "[::]:9090"))
				assert.Equal(t, openFiles(t), before)
				assert.Equal(t, len(w.m.table)+len(w.m.held), 0)
			})
		}
	}
}

func TestAPortOfAnotherEndpointIsNamed(t *testing.T) {
	w := onHost(t)
	first, second := strings.Repeat("1", 64), strings.Repeat("2", 64)
	w.reserve(endpoint(first), tcp("127.0.0.1", 8080, 8080, 80))
	for host, on := range map[string]string{"": " on 127.0.0.1:8080", "127.0.0.1": ": "} {
		_, err := w.m.Reserve(t.Context(), endpoint(second), []options.PortRequest{tcp(host, 8080, 8080, 80)})
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.ErrorContains(t, err, "port is already allocated")
		assert.ErrorContains(t, err, "published by endpoint 111111111111"+on)
	}
	w.m.Release(first)
	w.reserve(endpoint(second), tcp("", 8080, 8080, 80))
}

func TestOneHostPortCannotLeadToTwoPorts(t *testing.T) {
	w := onHost(t)
	_, err := w.m.Reserve(t.Context(), endpoint("one"), []options.PortRequest{tcp("", 8080, 8080, 80), tcp("", 8080, 8080, 81)})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "to lead to port 80 and to port 81 of the same container")
	w.reserve(endpoint("one"), tcp("", 8080, 8080, 80), tcp("", 8080, 8080, 80))
}

func TestAnAddressThatTheHostLacks(t *testing.T) {
	w := onHost(t)
	for _, addr := range []string{"192.0.2.77", "2001:db8::77"} {
		_, err := w.m.Reserve(t.Context(), endpoint("one"), []options.PortRequest{tcp(addr, 8080, 8080, 80)})
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		assert.ErrorContains(t, err, addr+" is not an address of this host: cannot assign requested address")
	}
}

// Connections that were closed by the host's side block nothing.
func TestTimeWaitDoesNotBlock(t *testing.T) {
	w := onHost(t)
	l := w.listen(w.host, "0.0.0.0:8080")
	c := w.mustDial(w.host, "tcp", "127.0.0.1:8080")
	s, err := l.Accept()
	assert.NilError(t, err)
	assert.NilError(t, s.Close()) // the side that closes first stays in TIME_WAIT
	_, err = c.Read(make([]byte, 1))
	assert.ErrorContains(t, err, "EOF")
	assert.NilError(t, c.Close())
	assert.NilError(t, l.Close())
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		out := w.host.Run("ss", "-tan", "state", "time-wait")
		if strings.Contains(out, "127.0.0.1:8080") {
			return poll.Success()
		}
		return poll.Continue("%s", out)
	})
	w.reserve(endpoint("one"), tcp("", 8080, 8080, 80))
}

// What the rules should have taken is not answered, and nothing tells the client
// that there is a socket.
func TestSocketsWithoutProxyTakeNothing(t *testing.T) {
	w := newWorld(t)
	w.publish(endpoint("one"), tcp("", 8080, 8080, 80), udp("", 8080, 8080, 80))
	for _, addr := range []string{"127.0.0.1:8080", "192.0.2.1:8080", "[2001:db8::1]:8080"} {
		_, err := w.dial(w.host, "tcp", addr)
		var ne net.Error
		assert.Assert(t, errors.As(err, &ne) && ne.Timeout(), "%s: %v", addr, err)
	}
	c := w.mustDial(w.host, "udp", "127.0.0.1:8080")
	for range 2 { // a refusal would show in the second write
		_, err := c.Write([]byte("x"))
		assert.NilError(t, err)
	}
	assert.Equal(t, strings.TrimSpace(w.host.Run("ss", "-Huln", "sport", "=", ":8080", "src", "0.0.0.0"))[:9], "UNCONN 0 ")
}

func TestEphemeralPortsAreTheSameInBothFamilies(t *testing.T) {
	w := onHost(t)
	w.host.Run("sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40009", "net.ipv4.ip_local_reserved_ports=40003-40004")
	w.listen(w.host, "[::1]:40005")
	var want []options.PortRequest
	for port := range uint16(7) {
		want = append(want, tcp("", 0, 0, 80+port))
	}
	ports := w.reserve(endpoint("one"), want...)
	of := func(host netip.Addr) []uint16 {
		var list []uint16
		each(ports, func(k key, _ destination) {
			if k.host == host {
				list = append(list, k.port)
			}
		})
		slices.Sort(list)
		return list
	}
	assert.DeepEqual(t, of(netip.IPv4Unspecified()), []uint16{40000, 40001, 40002, 40006, 40007, 40008, 40009})
	assert.DeepEqual(t, of(netip.IPv4Unspecified()), of(netip.IPv6Unspecified()))
	_, err := w.m.Reserve(t.Context(), endpoint("two"), []options.PortRequest{tcp("", 0, 0, 80)})
	assert.Equal(t, fault.Kind(err), "exhausted")
	assert.ErrorContains(t, err, "40000-40009/tcp (net.ipv4.ip_local_port_range) is free on 0.0.0.0 and ::")
	w.reserve(endpoint("two"), udp("", 0, 0, 80))
}

// A port that was let go of is not picked again at once.
func TestEphemeralPortsRotate(t *testing.T) {
	w := onHost(t)
	seen := map[uint16]bool{}
	for range 20 {
		port := w.reserve(endpoint("one"), tcp("127.0.0.1", 0, 0, 80))[0].HostPort
		assert.Assert(t, !seen[port])
		seen[port] = true
		w.m.Release("one")
	}
}

func TestRangesAreSharedOut(t *testing.T) {
	w := onHost(t)
	w.listen(w.host, "127.0.0.1:8002")
	requests := []options.PortRequest{
		tcp("", 8000, 8005, 80), tcp("", 8000, 8005, 81), tcp("", 8000, 8005, 82), tcp("", 8000, 8001, 83), tcp("", 8000, 8000, 84),
	}
	ports := w.reserve(endpoint("one"), requests...)
	assert.DeepEqual(t, words(ports)[:len(words(ports))/2], []string{
		"0.0.0.0:8000->84/tcp", "0.0.0.0:8001->83/tcp", "0.0.0.0:8003-8005->80-82/tcp",
	})
	_, err := w.m.Reserve(t.Context(), endpoint("two"), requests[:1])
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "Bind for 0.0.0.0:8000-8005 failed: port is already allocated: none of 8000-8005/tcp is free on 0.0.0.0 and ::")
	// The same again is what is held.
	assert.DeepEqual(t, w.reserve(endpoint("one"), requests...), ports, cmpAddr)
}

func TestTheLastCallCounts(t *testing.T) {
	w := onHost(t)
	e := endpoint("one")
	first := w.reserve(e, tcp("", 0, 0, 80), tcp("", 8000, 8009, 81), tcp("", 9000, 9000, 90))
	fds := map[key]int{}
	for k, s := range w.m.held["one"] {
		fds[k] = s.fd
	}
	// What fits is kept, as the same sockets.
	second := w.reserve(e, tcp("", 8000, 8009, 82), tcp("", 8000, 8009, 81), tcp("", 0, 0, 80))
	for _, p := range first[:len(first)/2] {
		if p.ContainerPort == 90 {
			continue
		}
		assert.Assert(t, slices.Contains(words(second), p.String()) || p.ContainerPort == 81, "%v: %v", p, words(second))
		k := key{p.Proto, p.HostPort, p.Host}
		assert.Equal(t, w.m.held["one"][k].fd, fds[k])
	}
	assert.Assert(t, w.free("tcp", "0.0.0.0:9000"))
	// A fixed port goes before what was chosen earlier.
	w.reserve(e, tcp("", 8000, 8001, 81))
	assert.DeepEqual(t, words(w.reserve(e, tcp("0.0.0.0", 8000, 8001, 81), tcp("0.0.0.0", 8000, 8000, 82))),
		[]string{"0.0.0.0:8000->82/tcp", "0.0.0.0:8001->81/tcp"})
	// Its own old ports are in nobody's way.
	w.reserve(e, tcp("127.0.0.1", 9000, 9000, 90))
	assert.DeepEqual(t, words(w.reserve(e, tcp("0.0.0.0", 9000, 9000, 91))), []string{"0.0.0.0:9000->91/tcp"})
	assert.DeepEqual(t, words(w.reserve(e)), []string(nil))
	assert.Equal(t, len(w.m.table)+len(w.m.held), 0)
}

func TestAFailureLeavesWhatWasHeld(t *testing.T) {
	w := onHost(t)
	e := endpoint("one")
	w.reserve(e, tcp("127.0.0.1", 8080, 8080, 80), udp("", 53, 53, 53))
	w.listen(w.host, "127.0.0.1:9090")
	before, files := w.m.held["one"], openFiles(t)
	_, err := w.m.Reserve(t.Context(), e, []options.PortRequest{
		tcp("0.0.0.0", 8080, 8080, 80), tcp("", 8081, 8081, 80), tcp("", 0, 0, 80), tcp("", 9090, 9090, 80),
	})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.Equal(t, len(w.m.held["one"]), len(before))
	assert.Equal(t, openFiles(t), files)
	assert.Assert(t, !w.free("tcp", "127.0.0.1:8080") && w.free("tcp", "0.0.0.0:8081") && !w.free("udp", "[::]:53"))
	// A call that is over before it begins changes nothing either.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = w.m.Reserve(ctx, e, nil)
	assert.ErrorIs(t, err, context.Canceled)
	assert.Equal(t, len(w.m.held["one"]), 3)
}

func TestHostWithoutIPv6(t *testing.T) {
	w := onHost(t)
	w.host.Run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
	v4 := Target{Endpoint: "one", Addr4: addr4}
	assert.DeepEqual(t, words(w.publish(v4, tcp("", 8080, 8080, 80))), []string{"0.0.0.0:8080->80/tcp"})
	assert.DeepEqual(t, words(w.publish(endpoint("two"), tcp("", 8081, 8081, 80))), []string{"0.0.0.0:8081->80/tcp"})
}

func TestRoutedPortsHoldNothing(t *testing.T) {
	w := onHost(t)
	e := endpoint("one")
	e.Network.IPv4.Mode, e.Network.IPv6.Mode = options.GatewayRouted, options.GatewayRouted
	ports := w.publish(e, tcp("", 8080, 8080, 80), tcp("", 0, 0, 81))
	assert.DeepEqual(t, words(ports), []string{"10.1.0.2:80-81/tcp", "[fd00:1::2]:80-81/tcp"})
	assert.Equal(t, len(w.m.held), 0)
}

// The kernel of the test may have SCTP or not: two endpoints conflict in both.
func TestSCTP(t *testing.T) {
	w := onHost(t)
	request := tcp("", 8080, 8080, 80)
	request.Proto = options.SCTP
	w.publish(endpoint("one"), request)
	request.HostIP = ip("127.0.0.1")
	_, err := w.m.Reserve(t.Context(), endpoint("two"), []options.PortRequest{request})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "127.0.0.1:8080/sctp is published by endpoint one on 0.0.0.0:8080")
	w.m.Release("one")
	w.publish(endpoint("two"), request)
}

func TestOutOfOpenFilesIsExplained(t *testing.T) {
	w := onHost(t)
	err := w.m.bindError(key{options.TCP, 8080, ip("::")}, unix.EMFILE)
	assert.Equal(t, fault.Kind(err), "exhausted")
	assert.ErrorContains(t, err, "Bind for [::]:8080 failed: too many open files")
	assert.ErrorContains(t, err, "LimitNOFILE")
}

func TestAfterClose(t *testing.T) {
	w := onHost(t)
	w.publish(endpoint("one"), tcp("", 8080, 8080, 80))
	assert.NilError(t, w.m.Close())
	assert.Assert(t, w.free("tcp", "0.0.0.0:8080"))
	_, err := w.m.Reserve(t.Context(), endpoint("one"), nil)
	assert.Equal(t, fault.Kind(err), "unavailable")
	assert.NilError(t, w.m.Close())
}
