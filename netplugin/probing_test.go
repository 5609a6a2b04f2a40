package netplugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	dockeripam "github.com/docker/go-plugins-helpers/ipam"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/lan"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/probe"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/testkit"
)

// probing lets this daemon and those after it ask on LANs. The hook has what they log.
func (e *testEnv) probing(t *testing.T) *logtest.Hook {
	t.Helper()
	links, ok := e.links.(*link.Handle)
	assert.Assert(t, ok)
	logs := new(logtest.Hook)
	var p *probe.Prober
	e.with = func(cfg *Config) {
		lans, ok := cfg.LAN.(*lan.Mode)
		assert.Assert(t, ok)
		p = probe.New(probe.Options{
			Link:  links,
			Ours:  func(parent string, mac net.HardwareAddr) bool { return e.d.OwnMAC(parent, mac) },
			Child: lans.AccessLink,
		})
		cfg.Prober = p
		cfg.Log.Logger.AddHook(logs)
	}
	e.after = func() error {
		if p == nil {
			return nil
		}
		return p.Close()
	}
	e.restart()
	return logs
}

// A probeEnv is lanEnv with a daemon that asks.
type probeEnv struct {
	*testEnv
	host, neighbour *testkit.Netns
	sandboxes       map[string]*testkit.Netns
	logs            *logtest.Hook
}

func newProbeEnv(t *testing.T) *probeEnv {
	t.Helper()
	e := new(probeEnv)
	e.testEnv, e.host, e.neighbour, e.sandboxes = lanEnv(t)
	e.logs = e.probing(t)
	return e
}

// pool is one of the LAN that no network uses, so that nobody asks for its addresses
// in advance.
func (e *probeEnv) pool(t *testing.T, ipRange string, opts map[string]string) *dockerNet {
	t.Helper()
	all := map[string]string{"parent": "eth1"}
	for k, v := range opts {
		all[k] = v
	}
	pool, err := e.ipam.RequestPool(t.Context(), &dockeripam.RequestPoolRequest{
		AddressSpace: localSpace, Pool: "10.9.0.0/24", SubPool: ipRange, Options: all,
	})
	assert.NilError(t, err)
	return &dockerNet{poolID: pool.PoolID, pool: pool.Pool}
}

// neighbourHas adds addresses to the neighbour, who has 10.9.0.1 already.
func (e *probeEnv) neighbourHas(addrs ...string) {
	for _, a := range addrs {
		e.neighbour.Run("ip", "addr", "add", a+"/24", "dev", "eth0")
	}
}

func (e *probeEnv) neighbourLoses(addr string) {
	e.neighbour.Run("ip", "addr", "del", addr+"/24", "dev", "eth0")
}

// macOf is the MAC address of a link.
func macOf(ns *testkit.Netns, dev string) string {
	_, after, _ := strings.Cut(ns.Run("ip", "-o", "link", "show", "dev", dev), "link/ether ")
	mac, _, _ := strings.Cut(after, " ")
	return mac
}

// leases are what an operator sees, by address.
func (e *testEnv) leases() map[string]control.Lease {
	e.t.Helper()
	leases, err := e.d.Admin().Leases(e.t.Context(), "")
	assert.NilError(e.t, err)
	byAddr := make(map[string]control.Lease)
	for _, l := range leases {
		byAddr[l.Addr.String()] = l
	}
	return byAddr
}

// logged reports whether a line of the level and with the text was logged.
func (e *probeEnv) logged(level logrus.Level, text string) bool {
	for _, entry := range e.logs.AllEntries() {
		if entry.Level == level && strings.Contains(entry.Message, text) {
			return true
		}
	}
	return false
}

// The state of an address that somebody has is shown, survives the daemon, and ends.
func TestAddressesThatOthersHaveAreNotGivenOut(t *testing.T) {
	for name, create := range map[string]func(*testing.T, *probeEnv) *dockerNet{
		"asked in advance": func(t *testing.T, e *probeEnv) *dockerNet {
			n, err := e.createNetwork("lan", "10.9.0.0/24", map[string]any{"parent": "eth1"})
			assert.NilError(t, err)
			return n
		},
		"asked at the request": func(t *testing.T, e *probeEnv) *dockerNet { return e.pool(t, "", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			e := newProbeEnv(t)
			e.neighbourHas("10.9.0.2", "10.9.0.3")
			n := create(t, e)
			got, err := e.ask(n, "", "")
			assert.NilError(t, err)
			assert.Equal(t, got.String(), "10.9.0.4") // 1 is the gateway's, or the neighbour's too
			mac := macOf(e.neighbour, "eth0")
			for range 2 { // the second time a daemon that starts anew
				leases := e.leases()
				assert.Equal(t, leases["10.9.0.4"].State, control.LeasePending)
				for _, addr := range []string{"10.9.0.2", "10.9.0.3"} {
					l := leases[addr]
					assert.Equal(t, l.State, control.LeaseConflict, addr)
					assert.Equal(t, l.MAC, mac)
					assert.Equal(t, l.NetworkID, n.id)
					assert.Assert(t, l.Until.Equal(e.t0.Add(conflictTime)), "%s", l.Until)
				}
				e.restart()
			}
			// Then it is looked at again.
			e.neighbourLoses("10.9.0.2")
			e.later(conflictTime)
			got, err = e.ask(n, "a", "10.9.0.2")
			assert.NilError(t, err)
			assert.Equal(t, got.String(), "10.9.0.2")
			_, err = e.ask(n, "b", "10.9.0.3")
			assert.ErrorContains(t, err, "is in use on the LAN by "+mac)
		})
	}
}

func TestAnAddressByNameThatSomebodyHas(t *testing.T) {
	e := newProbeEnv(t)
	e.neighbourHas("10.9.0.7")
	n := e.pool(t, "", nil)
	heard := hear(t, e.neighbour)
	for i := range 2 { // the second time it is known, and asked for again
		_, err := e.ask(n, "a", "10.9.0.7")
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.Error(t, err, "address 10.9.0.7 of subnet 10.9.0.0/24 is in use on the LAN by "+macOf(e.neighbour, "eth0")+
			"; choose another one, or give --ipam-opt conflict=warn with the network")
		assert.Assert(t, len(heard.probes("10.9.0.7")) > i)
		assert.Equal(t, e.leases()["10.9.0.7"].State, control.LeaseConflict)
	}
	assert.Assert(t, e.logged(logrus.WarnLevel, "address is in use by somebody else on the LAN"))

	// It goes, and nothing of it is left.
	e.neighbourLoses("10.9.0.7")
	got, err := e.ask(n, "a", "10.9.0.7")
	assert.NilError(t, err)
	assert.Equal(t, got.String(), "10.9.0.7")
	lease := e.leases()["10.9.0.7"]
	assert.Equal(t, lease.State, control.LeasePending)
	assert.Equal(t, lease.MAC, "")
	assert.NilError(t, e.giveBack(n, got))
	assert.Equal(t, e.leases()["10.9.0.7"].State, control.LeaseQuarantined)
}

func TestConflictWarnGivesTheAddressOut(t *testing.T) {
	e := newProbeEnv(t)
	e.neighbourHas("10.9.0.7", "10.9.0.2")
	n := e.pool(t, "", map[string]string{"conflict": "warn"})
	for range 2 { // the second time it is known
		got, err := e.ask(n, "a", "10.9.0.7")
		assert.NilError(t, err)
		assert.Equal(t, got.String(), "10.9.0.7")
		assert.Assert(t, e.logged(logrus.WarnLevel, "given out all the same"))
		e.logs.Reset()
		assert.NilError(t, e.giveBack(n, got))
	}
	// One that the user did not ask for is not.
	got, err := e.ask(n, "b", "")
	assert.NilError(t, err)
	assert.Equal(t, got.String(), "10.9.0.3")
}

// What a container of Berth says is no conflict, what another one on the same parent
// says is, and what the host says.
func TestOwnContainersAreNoConflict(t *testing.T) {
	e := newProbeEnv(t)
	e.host.Run("ip", "addr", "add", "10.9.0.200/24", "dev", "eth1")
	n, err := e.createNetwork("lan", "10.9.0.0/24", map[string]any{"parent": "eth1", "host-access": "true"})
	assert.NilError(t, err)
	a := mustRun(t, e.testEnv, n, "a", "")
	sandbox := e.sandboxes[a.endpoint]
	sandbox.Run("ip", "addr", "add", "10.9.0.50/24", "dev", "eth0")
	stranger := testkit.NewNetns(t)
	e.host.Run("ip", "link", "add", "mv0", "link", "eth1", "type", "macvlan", "mode", "bridge")
	e.host.Run("ip", "link", "set", "mv0", "netns", stranger.Path())
	stranger.Run("ip", "addr", "add", "10.9.0.51/24", "dev", "mv0")
	stranger.Run("ip", "link", "set", "mv0", "up")

	_, err = e.ask(n, "", "10.9.0.51")
	assert.ErrorContains(t, err, "is in use on the LAN by "+macOf(stranger, "mv0"))
	_, err = e.ask(n, "", "10.9.0.50")
	assert.NilError(t, err)
	_, err = e.ask(n, "", "10.9.0.200")
	assert.ErrorContains(t, err, "10.9.0.200 of subnet 10.9.0.0/24 is in use on the LAN by this host")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	_, err = e.ask(n, "", "10.9.0.200")
	assert.ErrorContains(t, err, "by this host", "known")

	// The records tell a daemon that starts anew whose MAC addresses are its own.
	e.restart()
	sandbox.Run("ip", "addr", "add", "10.9.0.52/24", "dev", "eth0")
	_, err = e.ask(n, "", "10.9.0.52")
	assert.NilError(t, err)
	mac, err := net.ParseMAC(a.mac)
	assert.NilError(t, err)
	assert.Assert(t, e.d.OwnMAC("eth1", mac))
	assert.NilError(t, e.stop(a))
	assert.Assert(t, !e.d.OwnMAC("eth1", mac))
}

// The usual request is answered from what was asked in advance: nobody waits.
func TestTheUsualRequestAsksNobody(t *testing.T) {
	e := newProbeEnv(t)
	heard := hear(t, e.neighbour)
	n, err := e.createNetwork("lan", "10.9.0.0/24", map[string]any{"parent": "eth1"})
	assert.NilError(t, err)
	tries := 0
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		tries++
		begin := time.Now()
		got, err := e.ask(n, fmt.Sprint("c", tries), "")
		assert.NilError(t, err)
		time.Sleep(20 * time.Millisecond) // for what is on its way
		probes := heard.probes(got.String())
		if len(probes) == 0 || probes[len(probes)-1].After(begin) {
			return poll.Continue("%s was asked for after the request", got)
		}
		return poll.Success()
	}, poll.WithDelay(300*time.Millisecond))
}

// An address is nobody's again when the request for it ends while the LAN is asked.
func TestARequestThatEndsWhileTheLANIsAsked(t *testing.T) {
	e := newProbeEnv(t)
	e.neighbourLoses("10.9.0.1")
	heard := hear(t, e.neighbour)
	n := e.pool(t, "", map[string]string{"probe": "full"})
	for _, addr := range []string{"10.9.0.9", ""} {
		ctx, cancel := context.WithCancel(t.Context())
		answer := make(chan error, 1)
		go func() {
			_, err := e.ipam.RequestAddress(ctx, &dockeripam.RequestAddressRequest{
				PoolID: n.poolID, Address: addr, Options: map[string]string{optEndpointName: "a"},
			})
			answer <- err
		}()
		var held netip.Addr
		poll.WaitOn(t, func(poll.LogT) poll.Result {
			for _, l := range e.leases() {
				if held = l.Addr; l.State == control.LeasePending && len(heard.probes(held.String())) > 0 {
					return poll.Success()
				}
			}
			return poll.Continue("nobody is asked")
		}, poll.WithDelay(5*time.Millisecond))
		// Meanwhile nobody else gets it, by name or by chance.
		_, err := e.ask(n, "other", held.String())
		assert.Error(t, err, "address "+held.String()+" of subnet 10.9.0.0/24 is already in use by a container that is starting of container a")
		for _, next := range e.d.store.leases.peek(n.poolID, 300) {
			assert.Assert(t, next != held)
		}
		cancel()
		err = <-answer
		assert.Assert(t, errors.Is(err, context.Canceled), "%v", err)
		assert.Equal(t, len(e.leases()), 0, "%v", e.leases())
		lease, err := e.d.store.leases.hold(ipam.AddressRequest{Pool: n.poolID, Addr: held})
		assert.NilError(t, err)
		e.d.store.leases.cancel(n.poolID, lease.Addr)
		// Nothing of it is on disk.
		e.restart()
		assert.Equal(t, len(e.leases()), 0)
	}
}

// Requests at once: no address is given twice, and none is asked for twice.
func TestRequestsAtOnceAskForDifferentAddresses(t *testing.T) {
	e := newProbeEnv(t)
	e.neighbourLoses("10.9.0.1")
	heard := hear(t, e.neighbour)
	n := e.pool(t, "", nil)
	const count, probesOfFast = 16, 2
	got := make([]netip.Addr, count)
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() {
			addr, err := e.ask(n, "", "")
			assert.Check(t, err)
			got[i] = addr
		})
	}
	wg.Wait()
	seen := make(map[netip.Addr]bool)
	for _, addr := range got {
		assert.Assert(t, !seen[addr], "%s is given twice", addr)
		seen[addr] = true
		assert.Equal(t, len(heard.probes(addr.String())), probesOfFast, "%s", addr)
	}
}

// A LAN where nobody can be asked keeps no container from starting.
func TestAddressesOfALANThatIsDown(t *testing.T) {
	e := newProbeEnv(t)
	n := e.pool(t, "", nil)
	e.host.Run("ip", "link", "set", "eth1", "down")
	for _, ip := range []string{"", "10.9.0.7"} {
		_, err := e.ask(n, "a"+ip, ip)
		assert.NilError(t, err)
		assert.Assert(t, e.logged(logrus.WarnLevel, "given out unasked"))
		e.logs.Reset()
	}
}

// What is known to be in use stays so while nobody can be asked again.
func TestAKnownConflictOnALANThatIsDown(t *testing.T) {
	e := newProbeEnv(t)
	e.neighbourHas("10.9.0.7")
	n := e.pool(t, "", nil)
	_, err := e.ask(n, "a", "10.9.0.7")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	e.host.Run("ip", "link", "set", "eth1", "down")
	_, err = e.ask(n, "a", "10.9.0.7")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "address 10.9.0.7 of subnet 10.9.0.0/24 is in use on the LAN by "+macOf(e.neighbour, "eth0"))
	assert.ErrorContains(t, err, `link "eth1": it is down`)
}

// A LAN where nearly all addresses are others': the free ones are found in time.
func TestAFullLAN(t *testing.T) {
	e := newProbeEnv(t)
	for i := 2; i < 60; i++ {
		e.neighbourHas(fmt.Sprint("10.9.0.", i))
	}
	n := e.pool(t, "10.9.0.0/26", nil)
	for _, want := range []string{"10.9.0.60", "10.9.0.61", "10.9.0.62", "10.9.0.63"} {
		got, err := e.ask(n, "", "")
		assert.NilError(t, err)
		assert.Equal(t, got.String(), want)
	}
	_, err := e.ask(n, "", "")
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
	pools, err := e.d.Admin().Pools(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, pools[0].Conflicts, uint64(59))
	assert.Equal(t, pools[0].Used, uint64(4))
	assert.Equal(t, pools[0].Free, uint64(0))
}

// Somebody who takes the address of a container is noticed, and the container keeps
// it.
func TestAStrangerWithTheAddressOfAContainer(t *testing.T) {
	e := newProbeEnv(t)
	n, err := e.createNetwork("lan", "10.9.0.0/24", map[string]any{"parent": "eth1"})
	assert.NilError(t, err)
	a := mustRun(t, e.testEnv, n, "a", "")
	addr := a.ip().String()
	e.neighbourHas(addr)
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		_, _ = e.neighbour.Try("busybox", "arping", "-U", "-c", "1", "-w", "1", "-I", "eth0", addr)
		if !e.logged(logrus.ErrorLevel, "somebody else on the LAN uses the address of a container") {
			return poll.Continue("nobody has noticed")
		}
		return poll.Success()
	})
	assert.Equal(t, e.leases()[addr].State, control.LeaseActive)
	assert.Assert(t, e.d.conflicts.Load() > 0)
}
