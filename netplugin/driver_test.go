package netplugin

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/pluginapi"
)

func mustNetwork(t testing.TB, e *testEnv, name, subnet string) *dockerNet {
	t.Helper()
	n, err := e.createNetwork(name, subnet, nil)
	assert.NilError(t, err)
	return n
}

func mustRun(t testing.TB, e *testEnv, n *dockerNet, name, ip string) *container {
	t.Helper()
	c, err := e.run(n, name, ip)
	assert.NilError(t, err)
	return c
}

func TestLifeOfAContainer(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "")
	assert.Equal(t, n.pool, "10.208.0.0/24")
	assert.Equal(t, n.gateway, "10.208.0.1/24")
	e.healthy()
	bound, ok := e.d.store.leases.pool(n.poolID)
	assert.Assert(t, ok && bound.Network == n.id, "after a restart the pool belongs to nobody: %+v", bound)

	c := mustRun(t, e, n, "c1", "")
	assert.Equal(t, c.addr, "10.208.0.2/24")
	mac := c.mac
	joined, err := e.net.Join(t.Context(), &network.JoinRequest{NetworkID: n.id, EndpointID: c.endpoint})
	assert.NilError(t, err)
	assert.DeepEqual(t, joined, &pluginapi.JoinResponse{
		InterfaceName: &pluginapi.InterfaceName{InterfaceName: network.InterfaceName{SrcName: "bc" + c.endpoint[:12], DstPrefix: "eth"}},
		Gateway:       "10.208.0.1",
	})
	info, err := e.net.EndpointInfo(t.Context(), &network.InfoRequest{NetworkID: n.id, EndpointID: c.endpoint})
	assert.NilError(t, err)
	assert.DeepEqual(t, info, &pluginapi.EndpointInfoResponse{Value: map[string]any{}})
	e.healthy()

	assert.NilError(t, e.stop(c))
	again := mustRun(t, e, n, "c2", "10.208.0.2")
	assert.Equal(t, again.mac, mac, "the same address has the same MAC address")
	other := mustRun(t, e, n, "c3", "")
	assert.Assert(t, other.mac != mac)
	assert.NilError(t, e.stop(again))
	assert.NilError(t, e.stop(other))
	assert.NilError(t, e.removeNetwork(n))
	e.empty()
}

func TestRepeatedCallsGiveTheSameAnswer(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	assert.NilError(t, e.net.CreateNetwork(ctx, n.request(nil)))
	err := e.net.CreateNetwork(ctx, n.request(map[string]any{"mtu": "1400"}))
	assert.ErrorContains(t, err, "exists with other options or subnets")
	assert.Assert(t, errdefs.IsConflict(err))

	c := mustRun(t, e, n, "c", "")
	resp, err := e.net.CreateEndpoint(ctx, c.request())
	assert.NilError(t, err)
	assert.Equal(t, resp.Interface.MacAddress, c.mac)
	other := c.request()
	other.Interface.MacAddress = "02:00:00:00:00:01"
	_, err = e.net.CreateEndpoint(ctx, other)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)

	for range 2 {
		assert.NilError(t, e.stop(c))
	}
	for range 2 {
		assert.NilError(t, e.removeNetwork(n))
	}
	e.empty()
}

func TestAGivenMACAddressIsNotEchoed(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	req := &network.CreateEndpointRequest{
		NetworkID: n.id, EndpointID: id("c"),
		Interface: &network.EndpointInterface{Address: "10.1.0.9/24", MacAddress: "02:42:00:00:00:09"},
		Options:   map[string]any{"com.docker.network.endpoint.macaddress": "AkIAAAAJ"},
	}
	resp, err := e.net.CreateEndpoint(t.Context(), req)
	assert.NilError(t, err)
	assert.DeepEqual(t, resp, &network.CreateEndpointResponse{})
	assert.Equal(t, e.host.endpoints[id("c")].MAC.String(), "02:42:00:00:00:09")

	// Given by driver option only, dockerd has to hear of it.
	req = &network.CreateEndpointRequest{
		NetworkID: n.id, EndpointID: id("d"),
		Interface: &network.EndpointInterface{Address: "10.1.0.10/24"},
		Options:   map[string]any{"mac": "02:42:00:00:00:0a", "ifname": "lan0"},
	}
	resp, err = e.net.CreateEndpoint(t.Context(), req)
	assert.NilError(t, err)
	assert.Equal(t, resp.Interface.MacAddress, "02:42:00:00:00:0a")
	joined, err := e.net.Join(t.Context(), &network.JoinRequest{NetworkID: n.id, EndpointID: id("d")})
	assert.NilError(t, err)
	assert.Equal(t, joined.InterfaceName.DstName, "lan0")
}

func TestUndoingTheUnknownSucceeds(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	for _, known := range []string{"", "no such", id("net"), strings.Repeat("x", 1000)} {
		assert.NilError(t, e.net.DeleteEndpoint(ctx, &network.DeleteEndpointRequest{NetworkID: known, EndpointID: known}))
		assert.NilError(t, e.net.Leave(ctx, &network.LeaveRequest{NetworkID: known, EndpointID: known}))
		assert.NilError(t, e.net.RevokeExternalConnectivity(ctx, &network.RevokeExternalConnectivityRequest{NetworkID: known, EndpointID: known}))
		assert.NilError(t, e.net.DeleteNetwork(ctx, &network.DeleteNetworkRequest{NetworkID: known}))
		assert.NilError(t, e.net.FreeNetwork(ctx, &network.FreeNetworkRequest{NetworkID: known}))
		assert.NilError(t, e.ipam.ReleaseAddress(ctx, &ipam.ReleaseAddressRequest{PoolID: known, Address: "10.0.0.1"}))
		assert.NilError(t, e.ipam.ReleasePool(ctx, &ipam.ReleasePoolRequest{PoolID: known}))
		_, err := e.net.EndpointInfo(ctx, &network.InfoRequest{NetworkID: known, EndpointID: known})
		assert.NilError(t, err)
	}
	_, err := e.net.Join(ctx, &network.JoinRequest{NetworkID: id("net"), EndpointID: id("c")})
	assert.Assert(t, errdefs.IsNotFound(err))
	_, err = e.net.CreateEndpoint(ctx, &network.CreateEndpointRequest{NetworkID: id("net"), EndpointID: id("c")})
	assert.ErrorContains(t, err, "remove the network and create it again")
	e.empty()
}

func TestNetworksWithDockersOwnIPAM(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	assert.NilError(t, e.net.CreateNetwork(ctx, &network.CreateNetworkRequest{
		NetworkID: id("default"), Options: map[string]any{},
		IPv4Data: []*network.IPAMData{{AddressSpace: "LocalDefault", Pool: "172.30.0.0/16", Gateway: "172.30.0.1/16"}},
		IPv6Data: []*network.IPAMData{{AddressSpace: "LocalDefault", Pool: "fd00:1::/64", Gateway: "fd00:1::1/64"}},
	}))
	_, err := e.net.CreateEndpoint(ctx, &network.CreateEndpointRequest{
		NetworkID: id("default"), EndpointID: id("c"),
		Interface: &network.EndpointInterface{Address: "172.30.0.2/16", AddressIPv6: "fd00:1::2/64"},
	})
	assert.NilError(t, err)
	joined, err := e.net.Join(ctx, &network.JoinRequest{NetworkID: id("default"), EndpointID: id("c")})
	assert.NilError(t, err)
	assert.Equal(t, joined.Gateway, "172.30.0.1")
	assert.Equal(t, joined.GatewayIPv6, "fd00:1::1")
	assert.Equal(t, joined.DisableGatewayService, false)

	for _, name := range []string{"null", "null2"} {
		assert.NilError(t, e.net.CreateNetwork(ctx, &network.CreateNetworkRequest{
			NetworkID: id(name), Options: map[string]any{},
			IPv4Data: []*network.IPAMData{{AddressSpace: "null", Pool: "0.0.0.0/0"}},
		}))
	}
	assert.Equal(t, len(e.host.networks[id("null")].Subnets), 0)
	resp, err := e.net.CreateEndpoint(ctx, &network.CreateEndpointRequest{
		NetworkID: id("null"), EndpointID: id("d"), Interface: &network.EndpointInterface{},
	})
	assert.NilError(t, err)
	assert.Assert(t, resp.Interface.MacAddress != "")
	joined, err = e.net.Join(ctx, &network.JoinRequest{NetworkID: id("null"), EndpointID: id("d")})
	assert.NilError(t, err)
	assert.Equal(t, joined.Gateway, "")
	assert.Equal(t, joined.DisableGatewayService, true)
	e.healthy()
}

func TestInternalNetworksHaveNoGateway(t *testing.T) {
	e := newEnv(t)
	n := &dockerNet{id: id("net"), pool: "10.1.0.0/24", gateway: "10.1.0.1/24"}
	req := n.request(nil)
	req.Options["com.docker.network.internal"] = true
	assert.NilError(t, e.net.CreateNetwork(t.Context(), req))
	c := &container{net: n, endpoint: id("c"), addr: "10.1.0.2/24"}
	_, err := e.net.CreateEndpoint(t.Context(), c.request())
	assert.NilError(t, err)
	joined, err := e.net.Join(t.Context(), &network.JoinRequest{NetworkID: n.id, EndpointID: c.endpoint})
	assert.NilError(t, err)
	assert.Equal(t, joined.Gateway, "")
	assert.Assert(t, e.host.networks[n.id].Internal)
}

func TestNamesOfEqualPrefixesDoNotCollide(t *testing.T) {
	e := newEnv(t)
	prefix := strings.Repeat("a", 12)
	first := &dockerNet{id: prefix + "1", pool: "10.1.0.0/24", gateway: "10.1.0.1/24"}
	second := &dockerNet{id: prefix + "2", pool: "10.2.0.0/24", gateway: "10.2.0.1/24"}
	for _, n := range []*dockerNet{first, second} {
		assert.NilError(t, e.net.CreateNetwork(t.Context(), n.request(nil)))
	}
	assert.Equal(t, e.host.networks[first.id].Bridge, "bth"+prefix)
	assert.Assert(t, e.host.networks[second.id].Bridge != "bth"+prefix)
	for i := range 3 {
		c := &container{net: first, endpoint: prefix + fmt.Sprint(i), addr: fmt.Sprintf("10.1.0.%d/24", i+2)}
		_, err := e.net.CreateEndpoint(t.Context(), c.request())
		assert.NilError(t, err)
	}
	e.healthy()
	// The repeat knows the name that the first try chose.
	assert.NilError(t, e.net.CreateNetwork(t.Context(), second.request(nil)))
}

func TestNetworksThatCannotBeBesideEachOther(t *testing.T) {
	e := newEnv(t)
	_, err := e.createNetwork("first", "10.1.0.0/24", map[string]any{"bridge": "br-lan"})
	assert.NilError(t, err)
	_, err = e.createNetwork("second", "10.2.0.0/24", map[string]any{"com.docker.network.bridge.name": "br-lan"})
	assert.ErrorContains(t, err, `bridge "br-lan" belongs to Berth network `+id("first")[:12])
	_, err = e.createNetwork("third", "10.1.0.128/25", nil)
	assert.ErrorContains(t, err, "subnet 10.1.0.128/25 overlaps subnet 10.1.0.0/24 of Berth network")
	overlapping := &dockerNet{id: id("fourth"), pool: "10.1.0.0/16", gateway: "10.1.0.1/16"}
	req := overlapping.request(nil)
	req.IPv4Data[0].AddressSpace = "LocalDefault"
	err = e.net.CreateNetwork(t.Context(), req)
	assert.ErrorContains(t, err, "subnet 10.1.0.0/16 overlaps subnet 10.1.0.0/24 of Berth network")
	e.healthy()
	assert.Equal(t, len(e.host.networks), 1)

	_, err = e.createNetwork("fifth", "10.2.0.0/24", nil)
	assert.NilError(t, err, "a refused network leaves its subnet free")
}

func TestAutomaticPoolsKeepClearOfTheHostAndOtherNetworks(t *testing.T) {
	e := newEnv(t)
	e.host.routes = []link.Route{
		{Dst: netip.MustParsePrefix("0.0.0.0/0")},
		{Dst: netip.MustParsePrefix("10.208.0.0/23"), OnLink: true, Link: 2},
		{Dst: netip.MustParsePrefix("10.208.3.0/24"), Link: 3},
		{Dst: netip.MustParsePrefix("0.0.0.0/1"), OnLink: true, Link: 4},
	}
	// A network with Docker's IPAM that happens to use our range.
	theirs := (&dockerNet{id: id("theirs"), pool: "10.208.2.0/24", gateway: "10.208.2.1/24"}).request(nil)
	theirs.IPv4Data[0].AddressSpace = "LocalDefault"
	assert.NilError(t, e.net.CreateNetwork(t.Context(), theirs))
	assert.Equal(t, mustNetwork(t, e, "net", "").pool, "10.208.4.0/24")
}

func TestPoolsAreRequestedLikeDockerdDoesIt(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	spaces := AddressSpaces()
	v6, err := e.ipam.RequestPool(ctx, &ipam.RequestPoolRequest{AddressSpace: spaces.LocalDefaultAddressSpace, V6: true})
	assert.NilError(t, err)
	first := netip.MustParsePrefix(v6.Pool)
	assert.Assert(t, first.Bits() == 64 && first.Addr().Is6() && strings.HasPrefix(v6.Pool, "fd"), "%s", v6.Pool)
	e.restart()
	next, err := e.ipam.RequestPool(ctx, &ipam.RequestPoolRequest{AddressSpace: spaces.LocalDefaultAddressSpace, V6: true})
	assert.NilError(t, err)
	assert.Equal(t, netip.MustParsePrefix(next.Pool).Addr().As16()[5], first.Addr().As16()[5], "the host keeps its prefix")
	assert.Assert(t, next.Pool != v6.Pool)

	gw, err := e.ipam.RequestAddress(ctx, &ipam.RequestAddressRequest{
		PoolID: v6.PoolID, Address: first.Addr().Next().Next().String(), Options: map[string]string{optRequestType: requestGateway},
	})
	assert.NilError(t, err)
	assert.Equal(t, gw.Address, first.Addr().Next().Next().String()+"/64")

	for _, tc := range []struct {
		req  ipam.RequestPoolRequest
		want string
	}{
		{ipam.RequestPoolRequest{AddressSpace: globalSpace}, "networks of a swarm are not supported yet"},
		{ipam.RequestPoolRequest{AddressSpace: localSpace, Pool: "10.1.0.0"}, `subnet "10.1.0.0": want an address and a prefix length`},
		{ipam.RequestPoolRequest{AddressSpace: localSpace, Pool: "10.1.0.0/24", SubPool: "x"}, `range "x": want`},
		{ipam.RequestPoolRequest{AddressSpace: localSpace, Options: map[string]string{"quarantin": "1h"}}, `unknown IPAM option "quarantin": did you mean quarantine?`},
		{ipam.RequestPoolRequest{AddressSpace: localSpace, Pool: "10.1.0.0/24", V6: true}, "other address family"},
	} {
		_, err := e.ipam.RequestPool(ctx, &tc.req)
		assert.ErrorContains(t, err, tc.want)
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
	_, err = e.ipam.RequestAddress(ctx, &ipam.RequestAddressRequest{PoolID: "none"})
	assert.ErrorContains(t, err, `address pool "none" is not known to Berth`)
	_, err = e.ipam.RequestAddress(ctx, &ipam.RequestAddressRequest{PoolID: v6.PoolID, Address: "fd00::1%eth0"})
	assert.ErrorContains(t, err, "want an IP address")
}

func TestNothingIsGivenOutWhenNobodyWaitsAnyMore(t *testing.T) {
	e := newEnv(t)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := e.ipam.RequestPool(gone, &ipam.RequestPoolRequest{AddressSpace: localSpace})
	assert.ErrorIs(t, err, context.Canceled)
	e.empty()
	n := mustNetwork(t, e, "net", "10.1.0.0/24")
	_, err = e.ipam.RequestAddress(gone, &ipam.RequestAddressRequest{PoolID: n.poolID, Address: "10.1.0.7"})
	assert.ErrorIs(t, err, context.Canceled)
	mustRun(t, e, n, "c", "10.1.0.7")
}

func TestParallelContainersOnParallelNetworks(t *testing.T) {
	e := newEnv(t)
	var wg sync.WaitGroup
	errs := make(chan error, 100)
	for i := range 4 {
		wg.Go(func() {
			n, err := e.createNetwork(fmt.Sprint("net", i), "", nil)
			if err != nil {
				errs <- err
				return
			}
			var inner sync.WaitGroup
			for j := range 5 {
				inner.Go(func() {
					c, err := e.run(n, fmt.Sprintf("c%d.%d", i, j), "")
					if err == nil && j%2 == 0 {
						err = e.stop(c)
					}
					errs <- err
				})
			}
			inner.Wait()
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		assert.Check(t, err)
	}
	e.healthy()
	assert.Equal(t, len(e.host.endpoints), 8)
}

func TestOptionsAreRefusedBeforeAnyAddressIsTaken(t *testing.T) {
	e := newEnv(t)
	check := func(opts map[string]any) error {
		_, err := e.net.GwAllocCheck(t.Context(), &pluginapi.GwAllocCheckRequest{Options: map[string]any{"com.docker.network.generic": opts}})
		return err
	}
	assert.NilError(t, check(map[string]any{"mtu": "1400"}))
	assert.ErrorContains(t, check(map[string]any{"mtuu": "1400"}), "did you mean mtu or")
}

func TestExhaustionNamesThePoolAndDeadContainersMakeRoom(t *testing.T) {
	e := newEnv(t)
	n := mustNetwork(t, e, "net", "10.1.0.0/29")
	var cs []*container
	for i := range 5 {
		cs = append(cs, mustRun(t, e, n, fmt.Sprint("c", i), ""))
	}
	_, err := e.run(n, "one more", "")
	assert.ErrorContains(t, err, "no free address in pool 10.1.0.0/29")
	assert.Assert(t, errdefs.IsResourceExhausted(err))

	// The namespace of one container dies, and nobody says so.
	dead := cs[3]
	delete(e.host.endpoints, dead.endpoint)
	e.t0 = e.t0.Add(settleTime)
	c := mustRun(t, e, n, "one more", "")
	assert.Equal(t, c.addr, dead.addr)
	assert.NilError(t, e.stop(dead), "dockerd cleans up late")
	e.healthy()
	_, err = e.run(n, "another", dead.addr[:strings.IndexByte(dead.addr, '/')])
	assert.Assert(t, errdefs.IsConflict(err), "the late release took the address from its new holder: %v", err)
}
