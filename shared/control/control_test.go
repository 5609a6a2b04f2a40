package control

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
)

// records are Networks without a daemon.
type records struct {
	networks  []Network
	endpoints []Endpoint
	// fail is what every method answers.
	fail      error
	panics    bool
	removed   []string
	collected []CollectRequest
	findings  []Finding
	leases    []Lease
	pools     []Pool
	reserved  []ReserveRequest
	released  []ReleaseRequest
}

func (r *records) Networks(context.Context) ([]Network, error) {
	if r.panics {
		panic("broken")
	}
	return r.networks, r.fail
}

func (r *records) Network(_ context.Context, id string) (Network, error) {
	for _, n := range r.networks {
		if n.ID == id {
			return n, r.fail
		}
	}
	return Network{}, fault.NotFound("network %s is not known to Berth", id)
}

func (r *records) RemoveNetwork(_ context.Context, id string) error {
	r.removed = append(r.removed, id)
	return r.fail
}

func (r *records) Endpoints(_ context.Context, network string) (found []Endpoint, _ error) {
	for _, ep := range r.endpoints {
		if network == "" || ep.NetworkID == network {
			found = append(found, ep)
		}
	}
	return found, r.fail
}

func (r *records) Collect(_ context.Context, req CollectRequest) (CollectReport, error) {
	r.collected = append(r.collected, req)
	return CollectReport{Endpoints: r.endpoints}, r.fail
}

func (r *records) Leases(_ context.Context, network string) (found []Lease, _ error) {
	for _, l := range r.leases {
		if network == "" || l.NetworkID == network {
			found = append(found, l)
		}
	}
	return found, r.fail
}

func (r *records) Pools(context.Context) ([]Pool, error) { return r.pools, r.fail }

func (r *records) ReserveLease(_ context.Context, req ReserveRequest) (Lease, error) {
	r.reserved = append(r.reserved, req)
	return r.leases[0], r.fail
}

func (r *records) ReleaseLease(_ context.Context, req ReleaseRequest) (Lease, error) {
	r.released = append(r.released, req)
	return r.leases[0], r.fail
}

func (r *records) Findings(context.Context) []Finding { return r.findings }

func quiet() *logrus.Entry {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return logrus.NewEntry(log)
}

// serve starts a Server on a socket and returns it with a Client.
func serve(t *testing.T, cfg Config) (*Server, *Client) {
	t.Helper()
	cfg.Log = quiet()
	if cfg.Info.Services == nil {
		cfg.Info.Services = []Service{{Name: NetworkService}}
	}
	server := New(cfg)
	return server, dial(t, server)
}

func dial(t *testing.T, handler http.Handler) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "berth.sock")
	l, err := net.Listen("unix", path)
	assert.NilError(t, err)
	s := &http.Server{Handler: handler, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	client := NewClient(path)
	t.Cleanup(func() {
		client.Close()
		assert.Check(t, s.Close())
		<-done
	})
	return client
}

// cmpAddrs compares addresses, whose fields are hidden.
var cmpAddrs = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

func full() *records {
	ep := Endpoint{
		ID: "e1", NetworkID: "n1", State: EndpointGone, Created: time.Unix(100, 0).UTC(), GoneSince: time.Unix(200, 0).UTC(),
		MAC: "02:00:00:00:00:01", IPv4: netip.MustParsePrefix("10.1.0.2/24"), HostLink: "bve1", ContainerLink: "bce1",
		Ports: []Port{{
			NetworkID: "n1", EndpointID: "e1", Proto: "tcp", HostIP: netip.IPv4Unspecified(), HostPort: 8080,
			ContainerIP: netip.MustParseAddr("10.1.0.2"), ContainerPort: 80, Count: 2,
		}},
	}
	return &records{
		networks: []Network{{
			ID: "n1", State: NetworkReady, Mode: "macvlan", Bridge: "bth1", Uplink: "eth2", Parent: "eth1", LANType: "private", HostAccess: true, Created: time.Unix(50, 0).UTC(),
			Subnets: []Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/24"), Gateway: netip.MustParseAddr("10.1.0.1")}, {Pool: netip.MustParsePrefix("10.2.0.0/24")}},
			ICC:     true, IPv4: Family{GatewayMode: "nat", Source: netip.MustParseAddr("192.0.2.1")}, Endpoints: 1, Ports: 2,
			Publish: PublishPolicy{Sources: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}},
			Routes:  []Route{{Destination: netip.MustParsePrefix("10.9.0.0/16"), NextHop: netip.MustParseAddr("10.1.0.9")}},
		}},
		endpoints: []Endpoint{ep, {ID: "e2", NetworkID: "n2", State: EndpointAlive}},
		leases: []Lease{
			{
				NetworkID: "n1", PoolID: "p1", Addr: netip.MustParseAddr("10.1.0.2"), State: LeaseActive, Key: "web", Reserved: true, Pinned: true,
				MAC: "02:00:00:00:00:01", EndpointID: "e1", Since: time.Unix(100, 0).UTC(), Until: time.Unix(900, 0).UTC(),
				DHCP: &DHCPLease{
					Server: netip.MustParseAddr("10.1.0.254"), ClientID: "ff00", Hostname: "web", State: DHCPBound,
					Renews: time.Unix(500, 0).UTC(), Expires: time.Unix(900, 0).UTC(),
				},
			},
			{NetworkID: "n2", PoolID: "p2", Addr: netip.MustParseAddr("fd00::1"), State: LeaseGateway},
		},
		pools: []Pool{
			{
				ID: "p1", NetworkID: "n1", Prefix: netip.MustParsePrefix("10.1.0.0/24"), Range: netip.MustParsePrefix("10.1.0.0/28"), Parent: "eth1",
				Since: time.Unix(40, 0).UTC(), Sticky: true, Quarantine: time.Minute, Probe: "fast", Conflict: "warn",
				Exclude: []string{"10.1.0.9"}, DHCP: true, Size: 14, Used: 1, Reserved: 2, Quarantined: 3, Conflicts: 4, Free: 4, Released: 2,
			},
			{ID: "p2", Prefix: netip.MustParsePrefix("fd00::/64"), Size: math.MaxUint64, Free: math.MaxUint64},
		},
		findings: []Finding{{ID: "networks", Status: StatusWarn, Summary: "one", Detail: "two", Cure: "three"}},
	}
}

// What the service gives is what the client gets: the wire loses nothing.
func TestAnswersArriveWhole(t *testing.T) {
	ctx, want := t.Context(), full()
	server, client := serve(t, Config{
		Info:    Info{Version: "v1", Socket: "/s", StateDir: "/d", Settings: []Setting{{"A", "b"}}, Services: []Service{{Name: NetworkService}}},
		Checks:  []func(context.Context) []Finding{func(context.Context) []Finding { return []Finding{{ID: "host", Status: StatusOK, Summary: "fine"}} }},
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("berth 1\n")) }),
	})
	server.SetNetworks(want)

	networks, err := client.Networks(ctx)
	assert.NilError(t, err)
	assert.DeepEqual(t, networks, want.networks, cmpAddrs)
	network, err := client.Network(ctx, "n1")
	assert.NilError(t, err)
	assert.DeepEqual(t, network, want.networks[0], cmpAddrs)
	endpoints, err := client.Endpoints(ctx, "")
	assert.NilError(t, err)
	assert.DeepEqual(t, endpoints, want.endpoints, cmpAddrs)
	endpoints, err = client.Endpoints(ctx, "n2")
	assert.NilError(t, err)
	assert.DeepEqual(t, endpoints, want.endpoints[1:], cmpAddrs)
	ports, err := client.Ports(ctx, "n1")
	assert.NilError(t, err)
	assert.DeepEqual(t, ports, want.endpoints[0].Ports, cmpAddrs)
	ports, err = client.Ports(ctx, "n2")
	assert.NilError(t, err)
	assert.Assert(t, ports != nil && len(ports) == 0, "an empty list is [], not null")

	report, err := client.Collect(ctx, CollectRequest{Network: "n1", DryRun: true})
	assert.NilError(t, err)
	assert.DeepEqual(t, report.Endpoints, want.endpoints, cmpAddrs)
	assert.DeepEqual(t, want.collected, []CollectRequest{{Network: "n1", DryRun: true}})
	assert.NilError(t, client.RemoveNetwork(ctx, "n1"))
	assert.DeepEqual(t, want.removed, []string{"n1"})

	leases, err := client.Leases(ctx, "")
	assert.NilError(t, err)
	assert.DeepEqual(t, leases, want.leases, cmpAddrs)
	leases, err = client.Leases(ctx, "n2")
	assert.NilError(t, err)
	assert.DeepEqual(t, leases, want.leases[1:], cmpAddrs)
	leases, err = client.Leases(ctx, "n3")
	assert.NilError(t, err)
	assert.Assert(t, leases != nil && len(leases) == 0, "an empty list is [], not null")
	pools, err := client.Pools(ctx)
	assert.NilError(t, err)
	assert.DeepEqual(t, pools, want.pools, cmpAddrs)
	addr := netip.MustParseAddr("10.1.0.2")
	lease, err := client.ReserveLease(ctx, ReserveRequest{Network: "n1", Addr: addr, Key: "web"})
	assert.NilError(t, err)
	assert.DeepEqual(t, lease, want.leases[0], cmpAddrs)
	assert.DeepEqual(t, want.reserved, []ReserveRequest{{Network: "n1", Addr: addr, Key: "web"}}, cmpAddrs)
	lease, err = client.ReleaseLease(ctx, ReleaseRequest{Network: "n1", Addr: addr})
	assert.NilError(t, err)
	assert.DeepEqual(t, lease, want.leases[0], cmpAddrs)
	assert.DeepEqual(t, want.released, []ReleaseRequest{{Network: "n1", Addr: addr}}, cmpAddrs)

	findings, err := client.Doctor(ctx)
	assert.NilError(t, err)
	assert.DeepEqual(t, findings, []Finding{
		{ID: "network-service", Status: StatusOK, Summary: "the network service is ready"},
		{ID: "host", Status: StatusOK, Summary: "fine"},
		want.findings[0],
	})
	text, err := client.Metrics(ctx)
	assert.NilError(t, err)
	assert.Equal(t, string(text), "berth 1\n")

	info, err := client.Info(ctx)
	assert.NilError(t, err)
	assert.Equal(t, info.Version, "v1")
	assert.DeepEqual(t, info.Settings, []Setting{{"A", "b"}})
	assert.Equal(t, info.Services[0].State, ServiceReady)
	assert.Assert(t, info.PID > 0 && info.GoVersion != "" && !info.Started.IsZero())
}

// The kind and the text of an error are the same on both sides.
func TestErrorsKeepTheirKind(t *testing.T) {
	service := full()
	server, client := serve(t, Config{})
	server.SetNetworks(service)
	for _, want := range []error{
		fault.Invalid("a %d", 1), fault.NotFound("b"), fault.Conflict("c"), fault.Exhausted("d"), fault.Unavailable("e"),
		errors.New("f"), context.DeadlineExceeded,
	} {
		service.fail = want
		err := client.RemoveNetwork(t.Context(), "n1")
		assert.Equal(t, fault.Kind(err), fault.Kind(want), "%v", err)
		assert.ErrorContains(t, err, want.Error())
	}
}

func TestPanicIsAnAnswer(t *testing.T) {
	service := full()
	server, client := serve(t, Config{Checks: []func(context.Context) []Finding{func(context.Context) []Finding { panic("check") }}})
	server.SetNetworks(service)
	service.panics = true
	_, err := client.Networks(t.Context())
	assert.ErrorContains(t, err, "internal error")
	findings, err := client.Doctor(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, findings[1].Status, StatusFail)
}

// A daemon that cannot start still says why.
func TestRefusingServiceIsExplained(t *testing.T) {
	ctx := t.Context()
	server, client := serve(t, Config{})
	_, err := client.Networks(ctx)
	assert.Assert(t, errdefs.IsUnavailable(err))
	assert.ErrorContains(t, err, "still starting")
	findings, err := client.Doctor(ctx)
	assert.NilError(t, err)
	assert.Equal(t, findings[0].Status, StatusWarn)

	server.Refuse(NetworkService, errors.New("the state is damaged"))
	before, err := client.Info(ctx)
	assert.NilError(t, err)
	server.Refuse(NetworkService, errors.New("the state is damaged"))
	info, err := client.Info(ctx)
	assert.NilError(t, err)
	assert.DeepEqual(t, info, before)
	assert.Equal(t, info.Services[0].State, ServiceRefusing)
	assert.Equal(t, info.Services[0].Reason, "the state is damaged")
	_, err = client.Endpoints(ctx, "")
	assert.Assert(t, errdefs.IsUnavailable(err))
	assert.ErrorContains(t, err, "the state is damaged")
	findings, err = client.Doctor(ctx)
	assert.NilError(t, err)
	assert.Equal(t, findings[0].Status, StatusFail)
	assert.ErrorContains(t, errors.New(findings[0].Summary), "the state is damaged")

	server.SetNetworks(full())
	assert.Equal(t, server.State(NetworkService), ServiceReady)
	info, err = client.Info(ctx)
	assert.NilError(t, err)
	assert.Equal(t, info.Services[0].Reason, "")
	_, err = client.Networks(ctx)
	assert.NilError(t, err)
}

func TestDaemonWithoutNetworks(t *testing.T) {
	server, client := serve(t, Config{Info: Info{Services: []Service{{Name: VolumeService}}}})
	server.Ready(VolumeService)
	_, err := client.Networks(t.Context())
	assert.ErrorContains(t, err, "serves no networks")
	assert.Equal(t, server.State(NetworkService), ServiceState(""))
}

// What is at the other end may be anything.
func TestClientOfSomethingElse(t *testing.T) {
	ctx := t.Context()
	client := NewClient(filepath.Join(t.TempDir(), "no.sock"))
	_, err := client.Info(ctx)
	assert.Assert(t, errdefs.IsUnavailable(err))
	assert.ErrorContains(t, err, "there is no such socket")

	path := filepath.Join(t.TempDir(), "dead.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	assert.NilError(t, err)
	l.SetUnlinkOnClose(false)
	assert.NilError(t, l.Close())
	_, err = NewClient(path).Info(ctx)
	assert.Assert(t, errdefs.IsUnavailable(err))
	assert.ErrorContains(t, err, "nobody listens")

	for name, handler := range map[string]http.HandlerFunc{
		"another plugin": func(w http.ResponseWriter, _ *http.Request) { http.NotFound(w, nil) },
		"older Berth": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			_, _ = w.Write([]byte(`{"Err":"berth does not know the call /Berth/v1/info"}`))
		},
		"not JSON": func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello")) },
		"cut off":  func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		_, err := dial(t, handler).Info(ctx)
		assert.Assert(t, errdefs.IsUnavailable(err), "%s: %v", name, err)
	}
	_, err = dial(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = w.Write([]byte(`{"Err":"berthd is stopping; try again"}`))
	})).Info(ctx)
	assert.Assert(t, errdefs.IsUnavailable(err))
	assert.ErrorContains(t, err, "berthd is stopping")
}

func TestClientGivesUp(t *testing.T) {
	release := make(chan struct{})
	client := dial(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer close(release)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := client.Info(ctx)
	assert.Equal(t, fault.Kind(err), "timeout", "%v", err)
	_, err = client.Metrics(ctx)
	assert.Equal(t, fault.Kind(err), "timeout", "%v", err)
}

func TestWrongRequests(t *testing.T) {
	server := New(Config{Log: quiet(), Info: Info{Services: []Service{{Name: NetworkService}}}})
	service := full()
	server.SetNetworks(service)
	for _, c := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", "/Berth/v2/info", "", 404, "does not know GET /Berth/v2/info"},
		{"POST", "/Berth/v1/info", "{}", 404, "does not know POST"},
		{"DELETE", "/Berth/v1/networks", "", 404, "does not know DELETE"},
		{"POST", "/Berth/v1/endpoints/collect", "", 400, "want a JSON object"},
		{"POST", "/Berth/v1/endpoints/collect", "null", 400, "want a JSON object"},
		{"POST", "/Berth/v1/endpoints/collect", "[]", 400, "want a JSON object"},
		{"POST", "/Berth/v1/endpoints/collect", `{"DryRun":"yes"}`, 400, "request body"},
		{"POST", "/Berth/v1/endpoints/collect", "{" + strings.Repeat(" ", maxRequest), 400, "at most"},
		{"GET", "/Berth/v1/networks/none", "", 404, "not known"},
	} {
		w := httptest.NewRecorder()
		server.ServeHTTP(w, httptest.NewRequest(c.method, c.path, strings.NewReader(c.body)))
		assert.Equal(t, w.Code, c.status, "%s %s", c.method, c.path)
		var body errorBody
		assert.NilError(t, json.Unmarshal(w.Body.Bytes(), &body))
		assert.ErrorContains(t, errors.New(body.Err), c.want)
		assert.Assert(t, body.Kind != "")
	}
	assert.Equal(t, len(service.collected), 0, "a wrong request reached the service")
}

// No request makes the server panic, and only a JSON object is taken for one.
func FuzzCollect(f *testing.F) {
	for _, seed := range []string{`{}`, `{"DryRun":true,"Network":"x"}`, ` {"Network":null}`, `{"Network":"a"}x`, ``, `nul`, `{"dryrun":1}`, "\v{}"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		server := New(Config{Log: quiet(), Info: Info{Services: []Service{{Name: NetworkService}}}})
		service := full()
		server.SetNetworks(service)
		w := httptest.NewRecorder()
		server.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/Berth/v1/endpoints/collect", strings.NewReader(string(body))))
		var object map[string]any
		valid := json.Unmarshal(body, &object) == nil && object != nil
		switch w.Code {
		case http.StatusOK:
			assert.Assert(t, valid, "%q was taken", body)
			assert.Equal(t, len(service.collected), 1)
		case http.StatusBadRequest:
			assert.Equal(t, len(service.collected), 0)
		default:
			t.Fatalf("status %d for %q", w.Code, body)
		}
	})
}
