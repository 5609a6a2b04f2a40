package netplugin

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/netplugin/dhcp"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/probe"
	"github.com/berth-plugin/berth/shared/testkit"
)

// A dhcpEnv is lanEnv where the neighbour is a DHCP server.
type dhcpEnv struct {
	*testEnv
	t         *testing.T
	host, lan *testkit.Netns
	sandboxes map[string]*testkit.Netns
	leases    string // the server's file
	server    *exec.Cmd
	manager   *dhcp.Manager
	prober    *probe.Prober

	said testkit.Output // of the server
}

// usualRange has room for 50, for two minutes each: dnsmasq knows no shorter time.
const usualRange = "10.9.0.100,10.9.0.149,255.255.255.0,2m"

// newDHCPEnv has no server yet.
func newDHCPEnv(t *testing.T) *dhcpEnv {
	t.Helper()
	e := &dhcpEnv{t: t, leases: filepath.Join(t.TempDir(), "leases")}
	closeBoth := func() error {
		if e.manager == nil {
			return nil
		}
		e.manager.Close()
		return e.prober.Close()
	}
	t.Cleanup(func() { assert.Check(t, closeBoth()) }) // after the driver
	e.testEnv, e.host, e.lan, e.sandboxes = lanEnv(t)
	links, ok := e.links.(*link.Handle)
	assert.Assert(t, ok)
	log := logrus.New()
	log.SetOutput(io.Discard)
	e.poolOpts = map[string]string{"dhcp": "true", "parent": "eth1"}
	e.with = func(cfg *Config) {
		assert.NilError(t, closeBoth())
		e.manager = dhcp.New(dhcp.Options{
			NetNS: e.host.File(), Log: logrus.NewEntry(log), Notify: func(event dhcp.Event) { e.d.HearDHCP(event) },
			Timeout: 3 * time.Second, Retry: 200 * time.Millisecond,
		})
		e.prober = probe.New(probe.Options{Link: links})
		cfg.DHCP, cfg.Prober = e.manager, e.prober
	}
	e.restart()
	return e
}

// hears waits until the server has said this.
func (e *dhcpEnv) hears(words string) {
	e.t.Helper()
	e.said.WaitFor(e.t, words)
}

// serve starts the server.
func (e *dhcpEnv) serve(addresses string, args ...string) {
	e.t.Helper()
	e.said.Reset()
	e.lan.Do(func() {
		e.server = exec.CommandContext(context.Background(), "/usr/sbin/dnsmasq", append([]string{
			"--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts", "--no-resolv", "--port=0", "--interface=eth0",
			"--bind-interfaces", "--user=root", "--pid-file=", "--log-facility=-", "--log-dhcp", "--no-ping",
			"--dhcp-leasefile=" + e.leases, "--dhcp-authoritative", "--dhcp-range=" + addresses,
		}, args...)...)
		e.server.Stdout, e.server.Stderr = &e.said, &e.said
		assert.NilError(e.t, e.server.Start())
	})
	e.t.Cleanup(e.die)
	e.hears("DHCP, ")
}

// die ends the server, if there is one.
func (e *dhcpEnv) die() {
	if e.server != nil {
		_ = e.server.Process.Kill()
		_ = e.server.Wait()
		e.server = nil
	}
}

// leased is the server's line about an address, which it has leased. It writes the
// whole file anew each time.
func (e *dhcpEnv) leased(addr string) (line string) {
	e.t.Helper()
	poll.WaitOn(e.t, func(poll.LogT) poll.Result {
		text, err := os.ReadFile(e.leases)
		for line = range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 2 && fields[2] == addr {
				return poll.Success()
			}
		}
		return poll.Continue("%s is not in: %s%v", addr, text, err)
	}, poll.WithDelay(5*time.Millisecond), poll.WithTimeout(5*time.Second))
	return line
}

// create makes the network of the LAN.
func (e *dhcpEnv) create(opts map[string]any) (*dockerNet, error) { return e.createAs("lan", opts) }

func (e *dhcpEnv) createAs(name string, opts map[string]any) (*dockerNet, error) {
	ctx := e.t.Context()
	pool, err := e.ipam.RequestPool(ctx, &ipam.RequestPoolRequest{AddressSpace: localSpace, Pool: "10.9.0.0/24", Options: e.poolOpts})
	if err != nil {
		return nil, err
	}
	n := &dockerNet{id: id(name), poolID: pool.PoolID, pool: pool.Pool, gateway: "10.9.0.1/24"}
	_, err = e.ipam.RequestAddress(ctx, &ipam.RequestAddressRequest{
		PoolID: n.poolID, Address: "10.9.0.1", Options: map[string]string{optRequestType: requestGateway},
	})
	if err == nil {
		err = e.net.CreateNetwork(ctx, n.request(opts))
	}
	if err != nil {
		return nil, errors.Join(err, e.releaseNetwork(n))
	}
	return n, nil
}

func (e *dhcpEnv) mustCreate() *dockerNet {
	e.t.Helper()
	n, err := e.create(map[string]any{"parent": "eth1"})
	assert.NilError(e.t, err)
	return n
}

// request asks for an address with what an engine of version 29 or later says of the
// container.
func (e *dhcpEnv) request(n *dockerNet, opts map[string]string) (netip.Addr, error) {
	got, err := e.ipam.RequestAddress(e.t.Context(), &ipam.RequestAddressRequest{PoolID: n.poolID, Options: opts})
	if err != nil {
		return netip.Addr{}, err
	}
	return netip.MustParsePrefix(got.Address).Addr(), nil
}

// part tells the server of all that has ended.
func (e *dhcpEnv) part() {
	e.d.partings.tell(func(dhcp.Lease) bool { return true })
}

func (c *container) ip() netip.Addr { return netip.MustParsePrefix(c.addr).Addr() }

func (e *dhcpEnv) ping(c *container) {
	e.t.Helper()
	e.sandboxes[c.endpoint].Run("busybox", "ping", "-c", "1", "-W", "5", "10.9.0.1")
}

func (e *dhcpEnv) mac(c *container) net.HardwareAddr {
	e.t.Helper()
	mac, err := net.ParseMAC(c.mac)
	assert.NilError(e.t, err)
	return mac
}

// forgetLeases has the server begin anew, which does not run.
func (e *dhcpEnv) forgetLeases() error { return os.Remove(e.leases) }
