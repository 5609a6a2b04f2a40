package vmlab

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/bridge"
	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/hostport"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/modetest"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/testkit"
)

// TestSCTP publishes a port of SCTP, which the kernels of many build machines lack.
func TestSCTP(t *testing.T) {
	InGuest(t, Options{Modules: []string{"sctp", "veth", "bridge"}}, func(t *testing.T) {
		host := testkit.NewNetns(t)
		links, err := link.Open(link.Options{NetNS: host.File()})
		assert.NilError(t, err)
		t.Cleanup(links.Close)
		rules, err := firewall.New(firewall.Options{Links: links})
		assert.NilError(t, err)
		t.Cleanup(func() { assert.Check(t, rules.Close()) })
		ports, err := hostport.New(hostport.Options{NetNS: host.File()})
		assert.NilError(t, err)
		t.Cleanup(func() { assert.Check(t, ports.Close()) })
		mode := bridge.New(links, rules, ports)

		n := modetest.Network(1)
		ep := modetest.Endpoint(n, 1)
		assert.NilError(t, mode.EnsureNetwork(t.Context(), n))
		assert.NilError(t, mode.EnsureEndpoint(t.Context(), n, ep))
		container := testkit.NewNetns(t)
		host.Run("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
		host.Run("ip", "link", "set", ep.ContainerLink, "netns", container.Path(), "name", "eth0")
		container.Run("ip", "addr", "add", ep.IPv4.String(), "dev", "eth0")
		container.Run("ip", "link", "set", "eth0", "up")
		container.Run("ip", "route", "add", "default", "via", n.Subnets[0].Gateway.String())

		const hostPort, containerPort = 9999, 80
		ep.Ports, err = mode.ReservePorts(t.Context(), n, ep, []options.PortRequest{{
			Proto: options.SCTP, HostIP: netip.IPv4Unspecified(), HostPort: hostPort, HostPortEnd: hostPort, ContainerPort: containerPort,
		}})
		assert.NilError(t, err)
		assert.NilError(t, mode.EnsurePorts(t.Context(), n, ep))
		serveSCTP(t, container, containerPort, "over SCTP")
		for _, addr := range []string{"192.0.2.1", "127.0.0.1"} {
			assert.Equal(t, askSCTP(t, host, netip.MustParseAddr(addr), hostPort), "over SCTP", addr)
		}
		host.Do(func() {
			fd, err := listenSCTP(hostPort)
			if err == nil {
				unix.Close(fd)
			}
			assert.Check(t, errors.Is(err, unix.EADDRINUSE), "a process of the host gets the port: %v", err)
		})
		assert.NilError(t, mode.RemoveNetwork(t.Context(), n))
		host.Do(func() {
			fd, err := listenSCTP(hostPort)
			assert.NilError(t, err, "the port is still held")
			unix.Close(fd)
		})
	})
}

func listenSCTP(port int) (fd int, _ error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
	if err != nil {
		return -1, err
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Port: port}), unix.Listen(fd, 8)); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// serveSCTP answers everybody with these words until the test ends.
func serveSCTP(t *testing.T, in *testkit.Netns, port int, words string) {
	t.Helper()
	var listener int
	in.Do(func() {
		var err error
		listener, err = listenSCTP(port)
		assert.NilError(t, err)
	})
	// A listener of SCTP cannot be woken.
	look := unix.NsecToTimeval((100 * time.Millisecond).Nanoseconds())
	assert.NilError(t, unix.SetsockoptTimeval(listener, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &look))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			fd, _, err := unix.Accept(listener)
			if err != nil {
				continue
			}
			_, _ = unix.Write(fd, []byte(words)) // a client that is gone misses it
			unix.Close(fd)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		unix.Close(listener)
	})
}

// askSCTP connects and reads what the server has to say.
func askSCTP(t *testing.T, from *testkit.Netns, addr netip.Addr, port int) string {
	t.Helper()
	answer := ""
	from.Do(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
		assert.NilError(t, err)
		defer unix.Close(fd)
		limit := unix.NsecToTimeval((10 * time.Second).Nanoseconds())
		assert.NilError(t, errors.Join(
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		))
		assert.NilError(t, unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: addr.As4()}))
		buf := make([]byte, 64)
		n, err := unix.Read(fd, buf)
		assert.NilError(t, err)
		answer = string(buf[:n])
	})
	return answer
}
