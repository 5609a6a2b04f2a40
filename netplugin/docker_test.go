package netplugin

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
)

// id makes a network or endpoint ID of dockerd's form of a short name.
func id(name string) string {
	s := fmt.Sprintf("%x", name)
	for len(s) < 64 {
		s += "0"
	}
	return s[:64]
}

// A dockerNet is a network as dockerd remembers it.
type dockerNet struct {
	id, poolID, pool, gateway string
}

// createNetwork does what dockerd does for `docker network create`, with its way
// back after an error.
func (e *testEnv) createNetwork(name, subnet string, opts map[string]any) (*dockerNet, error) {
	ctx := e.t.Context()
	pool, err := e.ipam.RequestPool(ctx, &ipam.RequestPoolRequest{AddressSpace: localSpace, Pool: subnet, Options: e.poolOpts})
	if err != nil {
		return nil, err
	}
	n := &dockerNet{id: id(name), poolID: pool.PoolID, pool: pool.Pool}
	gw, err := e.ipam.RequestAddress(ctx, &ipam.RequestAddressRequest{
		PoolID: n.poolID, Options: map[string]string{optRequestType: requestGateway},
	})
	if err != nil {
		return nil, errors.Join(err, e.ipam.ReleasePool(ctx, &ipam.ReleasePoolRequest{PoolID: n.poolID}))
	}
	n.gateway = gw.Address
	if err := e.net.CreateNetwork(ctx, n.request(opts)); err != nil {
		return nil, errors.Join(err, e.releaseNetwork(n))
	}
	return n, nil
}

// ask does what an engine does for the address of a container, before 29 if the name
// is "". ip is the user's --ip, "" for none.
func (e *testEnv) ask(n *dockerNet, name, ip string) (netip.Addr, error) {
	req := &ipam.RequestAddressRequest{PoolID: n.poolID, Address: ip}
	if name != "" {
		req.Options = map[string]string{optEndpointName: name}
	}
	got, err := e.ipam.RequestAddress(e.t.Context(), req)
	if err != nil {
		return netip.Addr{}, err
	}
	return netip.MustParsePrefix(got.Address).Addr(), nil
}

// giveBack is what an engine does with an address that it does not need any more.
func (e *testEnv) giveBack(n *dockerNet, addr netip.Addr) error {
	return e.ipam.ReleaseAddress(e.t.Context(), &ipam.ReleaseAddressRequest{PoolID: n.poolID, Address: addr.String()})
}

// attach makes an endpoint with an address and returns its MAC address.
func (e *testEnv) attach(n *dockerNet, name string, addr netip.Addr) (*container, error) {
	c := &container{net: n, endpoint: id(name), addr: netip.PrefixFrom(addr, netip.MustParsePrefix(n.pool).Bits()).String()}
	resp, err := e.net.CreateEndpoint(e.t.Context(), c.request())
	if err != nil {
		return nil, err
	}
	if resp.Interface != nil {
		c.mac = resp.Interface.MacAddress
	}
	return c, nil
}

// detach ends it.
func (e *testEnv) detach(c *container) {
	e.t.Helper()
	assert.NilError(e.t, e.net.DeleteEndpoint(e.t.Context(), &network.DeleteEndpointRequest{NetworkID: c.net.id, EndpointID: c.endpoint}))
	assert.NilError(e.t, e.release(c))
}

// shown is the lease of an address as operators see it.
func (e *testEnv) shown(n *dockerNet, addr netip.Addr) control.Lease {
	e.t.Helper()
	leases, err := e.d.Admin().Leases(e.t.Context(), n.id)
	assert.NilError(e.t, err)
	for _, l := range leases {
		if l.Addr == addr {
			return l
		}
	}
	e.t.Fatalf("no lease of %s: %+v", addr, leases)
	return control.Lease{}
}

func (n *dockerNet) request(opts map[string]any) *network.CreateNetworkRequest {
	if opts == nil {
		opts = map[string]any{}
	}
	return &network.CreateNetworkRequest{
		NetworkID: n.id,
		Options:   map[string]any{"com.docker.network.generic": opts, "com.docker.network.enable_ipv6": false},
		IPv4Data:  []*network.IPAMData{{AddressSpace: localSpace, Pool: n.pool, Gateway: n.gateway}},
	}
}

func (e *testEnv) releaseNetwork(n *dockerNet) error {
	gw := netip.MustParsePrefix(n.gateway).Addr().String()
	return errors.Join(
		e.ipam.ReleaseAddress(e.t.Context(), &ipam.ReleaseAddressRequest{PoolID: n.poolID, Address: gw}),
		e.ipam.ReleasePool(e.t.Context(), &ipam.ReleasePoolRequest{PoolID: n.poolID}),
	)
}

// removeNetwork does what dockerd does for `docker network rm`.
func (e *testEnv) removeNetwork(n *dockerNet) error {
	return errors.Join(
		e.releaseNetwork(n),
		e.net.DeleteNetwork(e.t.Context(), &network.DeleteNetworkRequest{NetworkID: n.id}),
	)
}

// A container is one as dockerd remembers it.
type container struct {
	net      *dockerNet
	endpoint string
	addr     string // with prefix length
	mac      string
}

// run does what dockerd does for `docker run`, with its way back after an error.
func (e *testEnv) run(n *dockerNet, name, ip string) (*container, error) {
	ctx := e.t.Context()
	got, err := e.ipam.RequestAddress(ctx, &ipam.RequestAddressRequest{PoolID: n.poolID, Address: ip})
	if err != nil {
		return nil, err
	}
	c := &container{net: n, endpoint: id(name), addr: got.Address}
	resp, err := e.net.CreateEndpoint(ctx, c.request())
	if err != nil {
		return nil, errors.Join(err, e.release(c))
	}
	c.mac = resp.Interface.MacAddress
	joined, err := e.net.Join(ctx, &network.JoinRequest{NetworkID: n.id, EndpointID: c.endpoint, SandboxKey: "/run/docker/netns/x"})
	if err != nil {
		return nil, errors.Join(err, e.stop(c))
	}
	if err := e.move(c, joined.InterfaceName.SrcName); err != nil {
		return nil, errors.Join(err, e.stop(c))
	}
	if err := e.program(c, port{to: 80}); err != nil {
		return nil, errors.Join(err, e.stop(c))
	}
	return c, nil
}

// A port is one that a user publishes; from 0 is any.
type port struct{ from, to int }

// program does what dockerd does when the endpoint becomes its container's gateway.
func (e *testEnv) program(c *container, ports ...port) error {
	portmap := make([]any, 0, len(ports))
	for _, p := range ports {
		portmap = append(portmap, map[string]any{
			"Proto": 6.0, "IP": "", "Port": float64(p.to), "HostIP": "0.0.0.0", "HostPort": float64(p.from), "HostPortEnd": float64(p.from),
		})
	}
	return e.net.ProgramExternalConnectivity(e.t.Context(), &network.ProgramExternalConnectivityRequest{
		NetworkID: c.net.id, EndpointID: c.endpoint, Options: map[string]any{
			"com.docker.network.endpoint.exposedports": []any{map[string]any{"Proto": 6.0, "Port": 80.0}},
			"com.docker.network.portmap":               portmap,
		},
	})
}

func (c *container) request() *network.CreateEndpointRequest {
	return &network.CreateEndpointRequest{
		NetworkID: c.net.id, EndpointID: c.endpoint,
		Interface: &network.EndpointInterface{Address: c.addr},
		Options:   map[string]any{},
	}
}

func (e *testEnv) release(c *container) error {
	addr := netip.MustParsePrefix(c.addr).Addr().String()
	return e.ipam.ReleaseAddress(e.t.Context(), &ipam.ReleaseAddressRequest{PoolID: c.net.poolID, Address: addr})
}

// stop does what dockerd does when a container ends.
func (e *testEnv) stop(c *container) error {
	ctx := e.t.Context()
	return errors.Join(
		e.net.RevokeExternalConnectivity(ctx, &network.RevokeExternalConnectivityRequest{NetworkID: c.net.id, EndpointID: c.endpoint}),
		e.net.Leave(ctx, &network.LeaveRequest{NetworkID: c.net.id, EndpointID: c.endpoint}),
		e.net.DeleteEndpoint(ctx, &network.DeleteEndpointRequest{NetworkID: c.net.id, EndpointID: c.endpoint}),
		e.release(c),
	)
}
