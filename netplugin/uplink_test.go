package netplugin

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	dockeripam "github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"github.com/berth-plugin/berth/shared/control"
)

func TestBridgeOnALAN(t *testing.T) {
	e, host, neighbour, sandboxes := lanEnv(t)
	e.probing(t)
	n, err := e.createNetwork("lan", "10.9.0.0/24", map[string]any{"uplink": "eth1"})
	assert.NilError(t, err)
	pool, _ := e.d.store.leases.pool(n.poolID)
	assert.Equal(t, pool.Options.Parent, "eth1")
	a, b := mustRun(t, e, n, "a", ""), mustRun(t, e, n, "b", "")
	addr := func(c *container) string { return netip.MustParsePrefix(c.addr).Addr().String() }
	ping := func(c *container) {
		t.Helper()
		neighbour.Run("busybox", "ping", "-c", "1", "-W", "5", addr(c))
	}
	ping(a)
	facts, err := e.d.HostFacts()
	assert.NilError(t, err)
	assert.DeepEqual(t, facts.Uplinks, []string{"eth1"})
	sandboxes[a.endpoint].Run("busybox", "ping", "-c", "1", "-W", "5", addr(b))
	endpoints, err := e.d.Admin().Endpoints(t.Context(), "")
	assert.NilError(t, err)
	assert.Equal(t, len(endpoints[0].Ports), 0)

	// An address that somebody on the LAN has is nobody's here.
	neighbour.Run("ip", "addr", "add", "10.9.0.77/24", "dev", "eth0")
	_, err = e.run(n, "c", "10.9.0.77")
	assert.ErrorContains(t, err, "address 10.9.0.77 of subnet 10.9.0.0/24 is in use on the LAN by ")
	before := e.d.conflicts.Load()
	// What the containers say themselves is no conflict.
	sandboxes[b.endpoint].Run("busybox", "arping", "-U", "-c", "2", "-I", "eth0", addr(b))
	assert.Equal(t, e.d.conflicts.Load(), before)
	neighbour.Run("ip", "addr", "add", addr(b)+"/24", "dev", "eth0")
	neighbour.Run("busybox", "arping", "-U", "-c", "2", "-I", "eth0", addr(b))
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if e.d.conflicts.Load() == before {
			return poll.Continue("a stranger that uses the address of a container is not noticed")
		}
		return poll.Success()
	})
	neighbour.Run("ip", "addr", "del", addr(b)+"/24", "dev", "eth0")

	// A daemon that starts anew finds all as it is.
	e.restart()
	e.later(24 * time.Hour)
	e.d.tick(t.Context())
	ping(b)
	networks, err := e.d.Admin().Networks(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, networks[0].Uplink, "eth1")
	assert.Equal(t, networks[0].State, control.NetworkReady)
	assert.Equal(t, networks[0].Endpoints, 2)

	assert.NilError(t, e.stop(a))
	assert.NilError(t, e.stop(b))
	assert.NilError(t, e.removeNetwork(n))
	links := strings.Split(strings.TrimSpace(host.Run("ip", "-o", "link")), "\n")
	assert.Equal(t, len(links), 2, "%v", links) // lo and eth1
	assert.Assert(t, strings.Contains(links[1], ",UP") && !strings.Contains(links[1], "master"), links[1])
	assert.Equal(t, host.Run("nft", "list", "ruleset"), "")
}

// The containers keep their links, and are on the LAN again with the uplink.
func TestUplinkGoesAndComes(t *testing.T) {
	e, host, neighbour, _ := lanEnv(t)
	n, err := e.createNetwork("lan", "10.9.0.0/24", map[string]any{"uplink": "eth1"})
	assert.NilError(t, err)
	a := mustRun(t, e, n, "a", "")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.d.Run(ctx)
	}()
	defer func() { cancel(); <-done }()
	state := func(want control.NetworkState) {
		t.Helper()
		poll.WaitOn(t, func(poll.LogT) poll.Result {
			networks, err := e.d.Admin().Networks(t.Context())
			assert.NilError(t, err)
			if networks[0].State != want {
				return poll.Continue("network is %s", networks[0].State)
			}
			return poll.Success()
		})
	}
	reached := func() {
		t.Helper()
		poll.WaitOn(t, func(poll.LogT) poll.Result {
			out, err := neighbour.Try("busybox", "ping", "-c", "1", "-W", "1", netip.MustParsePrefix(a.addr).Addr().String())
			if err != nil {
				return poll.Continue("%s", out)
			}
			return poll.Success()
		})
	}
	reached()
	time.Sleep(200 * time.Millisecond) // the watch begins
	host.Run("ip", "link", "set", "eth1", "down")
	reached()
	host.Run("ip", "link", "set", "eth1", "nomaster")
	reached()
	host.Run("ip", "link", "del", "eth1")
	state(control.NetworkBroken)
	plugIn(host, neighbour)
	state(control.NetworkReady)
	reached()
	// As after a reboot that the uplink has missed.
	host.Run("ip", "link", "del", "eth1")
	state(control.NetworkBroken)
	cancel()
	<-done
	e.restart()
	state(control.NetworkBroken)
	plugIn(host, neighbour)
	e.d.retryLANs(t.Context())
	state(control.NetworkReady)
	reached()
}

func TestUplinkIsForOneNetwork(t *testing.T) {
	e, host, _, _ := lanEnv(t)
	host.Run("ip", "link", "add", "eth2", "type", "veth", "peer", "name", "far2")
	create := func(name string, opts map[string]any) (*dockerNet, error) {
		n := &dockerNet{id: id(name), pool: "10.9.0.0/24", gateway: "10.9.0.1/24"}
		return n, e.net.CreateNetwork(t.Context(), n.request(opts))
	}
	_, err := create("one", map[string]any{"uplink": "eth1"})
	assert.NilError(t, err)
	_, err = create("two", map[string]any{"uplink": "eth1"})
	assert.ErrorContains(t, err, "option uplink=eth1: it is the uplink of Berth network "+id("one")[:12]+", and a link is a port of one bridge")
	_, err = create("two", map[string]any{"parent": "eth1"})
	assert.ErrorContains(t, err, "option parent=eth1: it is the uplink of Berth network "+id("one")[:12])
	// The same addresses on another LAN.
	lan, err := create("two", map[string]any{"parent": "eth2"})
	assert.NilError(t, err)
	_, err = create("three", map[string]any{"uplink": "eth2"})
	assert.ErrorContains(t, err, "option uplink=eth2: it is the parent of Berth network "+id("two")[:12])
	assert.NilError(t, e.net.DeleteNetwork(t.Context(), &network.DeleteNetworkRequest{NetworkID: lan.id}))
	_, err = create("three", map[string]any{"uplink": "eth2"})
	assert.NilError(t, err)
	_, err = create("four", map[string]any{})
	assert.ErrorContains(t, err, "overlaps subnet 10.9.0.0/24 of Berth network")
}

func TestPoolOfAnUplink(t *testing.T) {
	e, host, _, _ := lanEnv(t)
	host.Run("ip", "link", "add", "eth2", "type", "veth", "peer", "name", "far2")
	pool, err := e.ipam.RequestPool(t.Context(), &dockeripam.RequestPoolRequest{
		AddressSpace: localSpace, Pool: "10.9.0.0/24", Options: map[string]string{"parent": "eth2"},
	})
	assert.NilError(t, err)
	n := &dockerNet{id: id("lan"), poolID: pool.PoolID, pool: "10.9.0.0/24", gateway: "10.9.0.1/24"}
	err = e.net.CreateNetwork(t.Context(), n.request(map[string]any{"uplink": "eth1"}))
	assert.ErrorContains(t, err, `IPAM option parent=eth2: the uplink of the network is "eth1", want the same for both`)
}
