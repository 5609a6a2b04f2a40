package netplugin

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/control"
)

// operator returns a client of the environment's driver, over a socket.
func operator(e *testEnv) *control.Client {
	e.t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	server := control.New(control.Config{
		Info: control.Info{Services: []control.Service{{Name: control.NetworkService}}}, Log: logrus.NewEntry(log),
	})
	server.SetNetworks(e.d.Admin())
	path := filepath.Join(e.t.TempDir(), "berth.sock")
	l, err := net.Listen("unix", path)
	assert.NilError(e.t, err)
	s := &http.Server{Handler: server, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	client := control.NewClient(path)
	e.t.Cleanup(func() {
		client.Close()
		assert.Check(e.t, s.Close())
		<-done
	})
	return client
}

func TestOperatorSeesNetworksEndpointsAndPorts(t *testing.T) {
	e := newEnv(t)
	front, err := e.createNetwork("front", "10.1.0.0/24", nil)
	assert.NilError(t, err)
	back, err := e.createNetwork("back", "10.2.0.0/24", map[string]any{"com.docker.network.bridge.name": "back0"})
	assert.NilError(t, err)
	web, err := e.run(front, "web", "10.1.0.7")
	assert.NilError(t, err)
	assert.NilError(t, e.program(web, port{from: 8080, to: 80}))
	client, ctx := operator(e), t.Context()

	networks, err := client.Networks(ctx)
	assert.NilError(t, err)
	assert.Equal(t, len(networks), 2)
	i := slices.IndexFunc(networks, func(n control.Network) bool { return n.ID == front.id })
	n := networks[i]
	assert.Equal(t, n.State, control.NetworkReady)
	assert.Equal(t, n.Mode, "bridge")
	assert.Equal(t, n.Subnets[0], control.Subnet{Pool: netip.MustParsePrefix("10.1.0.0/24"), Gateway: netip.MustParseAddr("10.1.0.1")})
	assert.Equal(t, n.IPv4.GatewayMode, "nat")
	assert.Equal(t, n.IPv6.GatewayMode, "")
	assert.Assert(t, n.ICC && n.Masquerade && !n.Internal)
	assert.Equal(t, n.Endpoints, 1)
	assert.Equal(t, n.Ports, 1)
	one, err := client.Network(ctx, back.id)
	assert.NilError(t, err)
	assert.Equal(t, one.Bridge, "back0")
	_, err = client.Network(ctx, id("none"))
	assert.Assert(t, errdefs.IsNotFound(err))

	endpoints, err := client.Endpoints(ctx, front.id)
	assert.NilError(t, err)
	assert.Equal(t, len(endpoints), 1)
	ep := endpoints[0]
	assert.Equal(t, ep.ID, web.endpoint)
	assert.Equal(t, ep.State, control.EndpointAlive)
	assert.Equal(t, ep.IPv4, netip.MustParsePrefix("10.1.0.7/24"))
	assert.Equal(t, ep.MAC, web.mac)
	none, err := client.Endpoints(ctx, back.id)
	assert.NilError(t, err)
	assert.Equal(t, len(none), 0)
	_, err = client.Endpoints(ctx, id("none"))
	assert.Assert(t, errdefs.IsNotFound(err))

	ports, err := client.Ports(ctx, "")
	assert.NilError(t, err)
	assert.DeepEqual(t, ports, ep.Ports, cmpopts.EquateComparable(netip.Addr{}))
	assert.Equal(t, ports[0], control.Port{
		NetworkID: front.id, EndpointID: web.endpoint, Proto: "tcp", HostIP: netip.IPv4Unspecified(), HostPort: 8080,
		ContainerIP: netip.MustParseAddr("10.1.0.7"), ContainerPort: 80, Count: 1,
	})
}

// gone makes the container of an endpoint vanish without a word from dockerd.
func gone(e *testEnv, c *container) {
	e.host.mu.Lock()
	defer e.host.mu.Unlock()
	delete(e.host.moved, c.endpoint)
}

func TestOperatorCollectsWhatIsGoneAndNothingElse(t *testing.T) {
	e := newEnv(t)
	front, err := e.createNetwork("front", "10.1.0.0/24", nil)
	assert.NilError(t, err)
	back, err := e.createNetwork("back", "10.2.0.0/24", nil)
	assert.NilError(t, err)
	alive, err := e.run(front, "alive", "")
	assert.NilError(t, err)
	dead, err := e.run(front, "dead", "")
	assert.NilError(t, err)
	other, err := e.run(back, "other", "")
	assert.NilError(t, err)
	gone(e, dead)
	gone(e, other)
	client, ctx := operator(e), t.Context()

	// dockerd moves a link only after it was made.
	report, err := client.Collect(ctx, control.CollectRequest{})
	assert.NilError(t, err)
	assert.Equal(t, len(report.Endpoints), 0)

	e.t0 = e.t0.Add(settleTime)
	late, err := e.run(front, "late", "")
	assert.NilError(t, err)
	gone(e, late)
	report, err = client.Collect(ctx, control.CollectRequest{Network: front.id, DryRun: true})
	assert.NilError(t, err)
	assert.Equal(t, len(report.Endpoints), 1)
	assert.Equal(t, report.Endpoints[0].ID, dead.endpoint)
	assert.Equal(t, report.Endpoints[0].State, control.EndpointGone)
	assert.Assert(t, e.knows(dead.endpoint), "a dry run removed an endpoint")
	findings, err := client.Doctor(ctx)
	assert.NilError(t, err)
	assert.Assert(t, slices.ContainsFunc(findings, func(f control.Finding) bool {
		return f.ID == "endpoints-gone" && strings.Contains(f.Summary, "2") && f.Cure != ""
	}), "%v", findings)

	report, err = client.Collect(ctx, control.CollectRequest{Network: front.id})
	assert.NilError(t, err)
	assert.Equal(t, len(report.Endpoints), 1)
	assert.Equal(t, len(report.Failed), 0)
	assert.Assert(t, !e.knows(dead.endpoint))
	assert.Assert(t, e.knows(alive.endpoint) && e.knows(late.endpoint) && e.knows(other.endpoint))

	// What cannot be removed is said, and the rest is.
	e.host.at(1, failBefore)
	report, err = client.Collect(ctx, control.CollectRequest{})
	assert.NilError(t, err)
	assert.Equal(t, len(report.Endpoints), 0)
	assert.ErrorContains(t, stringError(report.Failed[other.endpoint]), errInjected.Error())
	_, err = client.Collect(ctx, control.CollectRequest{Network: id("none")})
	assert.Assert(t, errdefs.IsNotFound(err))
}

type stringError string

func (s stringError) Error() string { return string(s) }

func TestOperatorRemovesForgottenNetworks(t *testing.T) {
	e := newEnv(t)
	n, err := e.createNetwork("front", "10.1.0.0/24", nil)
	assert.NilError(t, err)
	client, ctx := operator(e), t.Context()
	err = client.RemoveNetwork(ctx, n.id)
	assert.Assert(t, errdefs.IsConflict(err), "a new network was removed: %v", err)
	e.t0 = e.t0.Add(settleTime)
	web, err := e.run(n, "web", "")
	assert.NilError(t, err)
	err = client.RemoveNetwork(ctx, n.id)
	assert.Assert(t, errdefs.IsConflict(err), "a network with a container was removed: %v", err)
	assert.ErrorContains(t, err, short(web.endpoint))

	e.t0 = e.t0.Add(settleTime)
	gone(e, web)
	assert.NilError(t, client.RemoveNetwork(ctx, n.id))
	err = client.RemoveNetwork(ctx, n.id)
	assert.Assert(t, errdefs.IsNotFound(err))
	e.empty()
	// Its subnet is free for another one.
	_, err = e.createNetwork("again", "10.1.0.0/24", nil)
	assert.NilError(t, err)
}

func TestOperatorSeesWhatIsBroken(t *testing.T) {
	e := newEnv(t)
	n, err := e.createNetwork("front", "10.1.0.0/24", nil)
	assert.NilError(t, err)
	web, err := e.run(n, "web", "")
	assert.NilError(t, err)
	assert.NilError(t, e.program(web, port{from: 8080, to: 80}))
	client, ctx := operator(e), t.Context()
	status := func() (ids []string) {
		for _, f := range e.d.Admin().Findings(ctx) {
			ids = append(ids, f.ID+" "+string(f.Status))
		}
		return ids
	}
	assert.DeepEqual(t, status(), []string{"networks ok"})

	e.host.portsBroken = errInjected
	assert.NilError(t, e.d.settle(ctx, n.id, true))
	assert.DeepEqual(t, status(), []string{"ports-missing fail"})
	endpoints, err := client.Endpoints(ctx, "")
	assert.NilError(t, err)
	assert.Assert(t, endpoints[0].PortsMissing)
	e.host.broken = errInjected
	assert.ErrorIs(t, e.d.settle(ctx, n.id, true), errInjected)
	assert.DeepEqual(t, status(), []string{"network-broken fail", "ports-missing fail"})
	got, err := client.Network(ctx, n.id)
	assert.NilError(t, err)
	assert.Equal(t, got.State, control.NetworkBroken)

	assert.NilError(t, testutil.CollectAndCompare(e.d.Metrics(), strings.NewReader(`
# HELP berth_networks Networks by state: ready, broken (could not be made as it should be), creating, removing.
# TYPE berth_networks gauge
berth_networks{state="broken"} 1
berth_networks{state="creating"} 0
berth_networks{state="ready"} 0
berth_networks{state="removing"} 0
# HELP berth_endpoints_ports_missing Endpoints of which some ports are not published, since another process has them.
# TYPE berth_endpoints_ports_missing gauge
berth_endpoints_ports_missing 1
`), "berth_networks", "berth_endpoints_ports_missing"))

	e.host.broken, e.host.portsBroken = nil, nil
	assert.NilError(t, e.d.settle(ctx, n.id, true))
	assert.DeepEqual(t, status(), []string{"networks ok"})
}

func TestMetricsCount(t *testing.T) {
	e := newEnv(t)
	n, err := e.createNetwork("front", "10.1.0.0/24", nil)
	assert.NilError(t, err)
	web, err := e.run(n, "web", "")
	assert.NilError(t, err)
	_, err = e.run(n, "db", "")
	assert.NilError(t, err)
	assert.NilError(t, e.program(web, port{from: 8080, to: 80}, port{from: 8443, to: 443}))
	problems, err := testutil.CollectAndLint(e.d.Metrics())
	assert.NilError(t, err)
	assert.Equal(t, len(problems), 0, "%v", problems)
	// web's two, and db's one from run.
	assert.NilError(t, testutil.CollectAndCompare(e.d.Metrics(), strings.NewReader(`
# HELP berth_endpoints Endpoints of all networks.
# TYPE berth_endpoints gauge
berth_endpoints 2
# HELP berth_leases Addresses in use by family of their pool.
# TYPE berth_leases gauge
berth_leases{family="ipv4"} 3
berth_leases{family="ipv6"} 0
# HELP berth_pools Address pools by family.
# TYPE berth_pools gauge
berth_pools{family="ipv4"} 1
berth_pools{family="ipv6"} 0
# HELP berth_published_ports Published ports by protocol.
# TYPE berth_published_ports gauge
berth_published_ports{proto="sctp"} 0
berth_published_ports{proto="tcp"} 3
berth_published_ports{proto="udp"} 0
`), "berth_endpoints", "berth_leases", "berth_pools", "berth_published_ports"))
}

func TestDoctorIsToldOfTheRecords(t *testing.T) {
	e := newEnv(t)
	n, err := e.createNetwork("front", "10.1.0.0/24", map[string]any{"com.docker.network.bridge.name": "front0"})
	assert.NilError(t, err)
	web, err := e.run(n, "web", "")
	assert.NilError(t, err)
	assert.NilError(t, e.program(web, port{from: 8080, to: 80}))
	e.host.stray["bv0"] = link.Link{Name: "bv0", Kind: "veth", Owner: link.OfEndpoint(id("forgotten"))}
	facts, err := e.d.HostFacts()
	assert.NilError(t, err)
	assert.DeepEqual(t, facts, HostFacts{Bridges: []string{"front0"}, PublishedPorts: 1, Leftovers: []string{"bv0"}})
}
