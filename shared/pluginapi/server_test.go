package pluginapi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/docker/go-plugins-helpers/volume"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
)

// netStub and volStub answer what a test sets; the embedded interface panics for
// every other call.
type netStub struct {
	NetworkDriver
	createNetwork func(context.Context, *network.CreateNetworkRequest) error
	join          func(context.Context, *network.JoinRequest) (*JoinResponse, error)
}

func (n *netStub) CreateNetwork(ctx context.Context, r *network.CreateNetworkRequest) error {
	return n.createNetwork(ctx, r)
}

func (n *netStub) Join(ctx context.Context, r *network.JoinRequest) (*JoinResponse, error) {
	return n.join(ctx, r)
}

type volStub struct {
	VolumeDriver
	get   func(context.Context, *volume.GetRequest) (*volume.GetResponse, error)
	mount func(context.Context, *volume.MountRequest) (*volume.MountResponse, error)
}

func (v *volStub) Get(ctx context.Context, r *volume.GetRequest) (*volume.GetResponse, error) {
	return v.get(ctx, r)
}

func (v *volStub) Mount(ctx context.Context, r *volume.MountRequest) (*volume.MountResponse, error) {
	return v.mount(ctx, r)
}

// plugin is a served Server and a client for it.
type plugin struct {
	t       *testing.T
	server  *Server
	client  *http.Client
	log     *bytes.Buffer
	metrics *prometheus.Registry
	served  chan error
}

func start(t *testing.T, cfg Config) *plugin {
	t.Helper()
	p := &plugin{t: t, log: new(bytes.Buffer), metrics: prometheus.NewRegistry(), served: make(chan error, 1)}
	logger := logrus.New()
	logger.SetOutput(p.log)
	cfg.Log = logrus.NewEntry(logger)
	cfg.Metrics = p.metrics
	var err error
	p.server, err = New(cfg)
	assert.NilError(t, err)
	sock := filepath.Join(t.TempDir(), "p.sock")
	l, err := net.Listen("unix", sock)
	assert.NilError(t, err)
	go func() { p.served <- p.server.Serve(l) }()
	p.client = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", sock)
	}}}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 5*time.Second)
		defer cancel()
		if err := p.server.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		p.client.CloseIdleConnections()
	})
	return p
}

// stop ends the server, after which the log may be read.
func (p *plugin) stop() string {
	p.t.Helper()
	assert.NilError(p.t, p.server.Shutdown(p.t.Context()))
	assert.NilError(p.t, <-p.served)
	return p.log.String()
}

func (p *plugin) try(method, body string) (int, string, error) {
	req, err := http.NewRequestWithContext(p.t.Context(), http.MethodPost, "http://plugin/"+method, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp.StatusCode, strings.TrimSpace(string(answer)), err
}

func (p *plugin) post(method, body string) (int, string) {
	p.t.Helper()
	status, answer, err := p.try(method, body)
	assert.NilError(p.t, err)
	return status, answer
}

func networks(d NetworkDriver) *Service[NetworkDriver] {
	s := NewService[NetworkDriver]()
	s.Set(d)
	return s
}

func volumes(d VolumeDriver) *Service[VolumeDriver] {
	s := NewService[VolumeDriver]()
	s.Set(d)
	return s
}

func TestManifestNamesWhatIsOffered(t *testing.T) {
	p := start(t, Config{Network: networks(&netStub{}), Volume: volumes(&volStub{})})
	status, answer := p.post("Plugin.Activate", "")
	assert.Equal(t, status, 200)
	assert.Equal(t, answer, `{"Implements":["NetworkDriver","VolumeDriver"]}`)
	status, answer = p.post("IpamDriver.RequestPool", "{}")
	assert.Equal(t, status, 404)
	assert.Equal(t, answer, `{"Err":"berth does not know the call /IpamDriver.RequestPool"}`)
}

func TestCapabilitiesAnswerBeforeRecovery(t *testing.T) {
	p := start(t, Config{Network: NewService[NetworkDriver](), NetworkCapabilities: NetworkCapabilities{
		CapabilitiesResponse: network.CapabilitiesResponse{Scope: "local"}, GwAllocChecker: true,
	}})
	status, answer := p.post("NetworkDriver.GetCapabilities", "")
	assert.Equal(t, status, 200)
	assert.Equal(t, answer, `{"Scope":"local","ConnectivityScope":"","GwAllocChecker":true}`)
}

func TestBadBodiesAreRefusedWithoutACall(t *testing.T) {
	p := start(t, Config{Network: networks(&netStub{createNetwork: func(context.Context, *network.CreateNetworkRequest) error {
		t.Error("the driver was called")
		return nil
	}})})
	for name, tc := range map[string]struct{ body, want string }{
		"empty":    {"", "request body is empty"},
		"null":     {"null", "request body is null"},
		"cut":      {`{"NetworkID":"a`, "unexpected end of JSON input"},
		"list":     {`[]`, "cannot unmarshal array"},
		"trailing": {`{} {}`, "invalid character"},
		"type":     {`{"NetworkID":7}`, "cannot unmarshal number"},
		"large":    {`{"NetworkID":"` + strings.Repeat("x", maxBody) + `"}`, "want at most 16777216 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			status, answer := p.post("NetworkDriver.CreateNetwork", tc.body)
			assert.Equal(t, status, 400)
			assert.Assert(t, strings.HasPrefix(answer, `{"Err":"`) && strings.Contains(answer, tc.want), answer)
		})
	}
}

func TestUnknownFieldsAreLeftAlone(t *testing.T) {
	p := start(t, Config{Network: networks(&netStub{createNetwork: func(_ context.Context, r *network.CreateNetworkRequest) error {
		assert.Check(t, r.NetworkID == "n1")
		return nil
	}})})
	status, answer := p.post("NetworkDriver.CreateNetwork", `{"NetworkID":"n1","FutureField":{"a":1}}`)
	assert.Equal(t, status, 200)
	assert.Equal(t, answer, `{}`)
}

func TestKindsBecomeStatuses(t *testing.T) {
	for want, err := range map[int]error{
		400: fault.Invalid("bad"), 410: fault.NotFound("gone"), 409: fault.Conflict("busy"), 507: fault.Exhausted("full"),
		503: fault.Unavailable("away"), 500: errors.New("broken"),
	} {
		p := start(t, Config{Network: networks(&netStub{createNetwork: func(context.Context, *network.CreateNetworkRequest) error { return err }})})
		status, answer := p.post("NetworkDriver.CreateNetwork", `{"NetworkID":"n1"}`)
		assert.Equal(t, status, want)
		assert.Equal(t, answer, `{"Err":"`+err.Error()+`"}`)
		got := testutil.ToFloat64(p.server.total.WithLabelValues("NetworkDriver.CreateNetwork", fault.Kind(err)))
		assert.Equal(t, got, 1.0)
	}
}

func TestPanicAnswersJSONAndTheServerGoesOn(t *testing.T) {
	p := start(t, Config{Network: networks(&netStub{createNetwork: func(context.Context, *network.CreateNetworkRequest) error { panic("boom") }})})
	for range 2 {
		status, answer := p.post("NetworkDriver.CreateNetwork", `{"NetworkID":"n1"}`)
		assert.Equal(t, status, 500)
		assert.Equal(t, answer, `{"Err":"internal error in NetworkDriver.CreateNetwork, see the plugin's log"}`)
	}
	assert.Assert(t, strings.Contains(p.stop(), "panic: boom"))
}

func TestAnswerComesWhenTheDriverIsStuck(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	p := start(t, Config{Timeout: 20 * time.Millisecond, Network: networks(&netStub{createNetwork: func(context.Context, *network.CreateNetworkRequest) error {
		<-release // as a system call on a dead NFS server, which no context ends
		return nil
	}})})
	status, answer := p.post("NetworkDriver.CreateNetwork", `{"NetworkID":"n1"}`)
	assert.Equal(t, status, 503)
	assert.Assert(t, strings.Contains(answer, "did not finish within 20ms"), answer)
}

func TestCallsWaitForRecovery(t *testing.T) {
	service := NewService[NetworkDriver]()
	p := start(t, Config{Network: service})
	answered := make(chan int)
	go func() {
		status, _, err := p.try("NetworkDriver.CreateNetwork", `{"NetworkID":"n1"}`)
		if err != nil {
			t.Error(err)
		}
		answered <- status
	}()
	select {
	case <-answered:
		t.Fatal("answered before recovery")
	case <-time.After(50 * time.Millisecond):
	}
	service.Set(&netStub{createNetwork: func(context.Context, *network.CreateNetworkRequest) error { return nil }})
	assert.Equal(t, <-answered, 200)
}

func TestFailedRecoveryRefusesWithItsReason(t *testing.T) {
	service := NewService[NetworkDriver]()
	service.Refuse(fault.Unavailable("state file x is damaged"))
	p := start(t, Config{Network: service})
	status, answer := p.post("NetworkDriver.CreateNetwork", `{"NetworkID":"n1"}`)
	assert.Equal(t, status, 503)
	assert.Equal(t, answer, `{"Err":"state file x is damaged"}`)
	service.Set(&netStub{createNetwork: func(context.Context, *network.CreateNetworkRequest) error { return nil }})
	status, _ = p.post("NetworkDriver.CreateNetwork", `{"NetworkID":"n1"}`)
	assert.Equal(t, status, 200)
}

func TestGetAnswersOnlyACertainNo(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		body string
		cut  bool
	}{
		"missing":      {err: fault.NotFound("no such volume"), body: `{"Name":"db"}`},
		"hostile name": {err: fault.Invalid(`name "../x"`), body: `{"Name":"../x"}`},
		"storage away": {err: fault.Unavailable("nfs does not answer"), body: `{"Name":"db"}`, cut: true},
		"internal":     {err: errors.New("broken"), body: `{"Name":"db"}`, cut: true},
		"timeout":      {err: context.DeadlineExceeded, body: `{"Name":"db"}`, cut: true},
		"empty body":   {err: nil, body: ``, cut: true},
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, Config{Volume: volumes(&volStub{get: func(context.Context, *volume.GetRequest) (*volume.GetResponse, error) {
				return nil, tc.err
			}})})
			status, answer, err := p.try("VolumeDriver.Get", tc.body)
			if tc.cut {
				assert.Assert(t, err != nil, "answered %d %s", status, answer)
				return
			}
			assert.NilError(t, err)
			assert.Equal(t, status, 200)
			assert.Assert(t, strings.HasPrefix(answer, `{"Err":`), answer)
		})
	}
}

func TestGetIsCutWhileTheStateIsDamaged(t *testing.T) {
	service := NewService[VolumeDriver]()
	service.Refuse(fault.Unavailable("state file x is damaged"))
	p := start(t, Config{Volume: service})
	_, _, err := p.try("VolumeDriver.Get", `{"Name":"db"}`)
	assert.Assert(t, err != nil)
	status, answer := p.post("VolumeDriver.Mount", `{"Name":"db","ID":"1"}`)
	assert.Equal(t, status, 200)
	assert.Equal(t, answer, `{"Err":"state file x is damaged"}`)
}

func TestShutdownLetsRunningCallsFinish(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	p := start(t, Config{Network: networks(&netStub{createNetwork: func(context.Context, *network.CreateNetworkRequest) error {
		close(entered)
		<-release
		return nil
	}})})
	answered := make(chan int)
	go func() {
		status, _, err := p.try("NetworkDriver.CreateNetwork", `{"NetworkID":"n1"}`)
		if err != nil {
			t.Error(err)
		}
		answered <- status
	}()
	<-entered
	stopped := make(chan error)
	go func() { stopped <- p.server.Shutdown(t.Context()) }()
	select {
	case err := <-stopped:
		t.Fatalf("shut down with a call running: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	assert.Equal(t, <-answered, 200)
	assert.NilError(t, <-stopped)
	_, _, err := p.try("NetworkDriver.GetCapabilities", "")
	assert.Assert(t, err != nil, "answered after shutdown")
}

func TestOneLogLineForEachCall(t *testing.T) {
	p := start(t, Config{Network: networks(&netStub{
		join: func(context.Context, *network.JoinRequest) (*JoinResponse, error) {
			return &JoinResponse{InterfaceName: &InterfaceName{InterfaceName: network.InterfaceName{SrcName: "bc1", DstPrefix: "eth"}}, Gateway: "10.0.0.1"}, nil
		},
	})})
	status, answer := p.post("NetworkDriver.Join", `{"NetworkID":"n1","EndpointID":"e1","SandboxKey":"/x"}`)
	assert.Equal(t, status, 200)
	assert.Equal(t, answer, `{"InterfaceName":{"SrcName":"bc1","DstPrefix":"eth"},"Gateway":"10.0.0.1","GatewayIPv6":"","DisableGatewayService":false}`)
	lines := strings.Split(strings.TrimSpace(p.stop()), "\n")
	assert.Equal(t, len(lines), 1, "%q", lines)
	for _, want := range []string{"level=info", "method=NetworkDriver.Join", "network=n1", "endpoint=e1", "kind=ok", "duration="} {
		assert.Assert(t, strings.Contains(lines[0], want), "%s lacks %s", lines[0], want)
	}
}
