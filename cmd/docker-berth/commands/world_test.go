package commands

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker/cli/cli"
	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/network"
	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/quiesce"
)

// long makes an ID of Docker's form.
func long(digit string) string { return strings.Repeat(digit, 64) }

// pluginID makes the ID of a plugin. It is in the path of its socket, which has at
// most 107 bytes, so it is shorter than Docker's.
func pluginID(digit string) string { return strings.Repeat(digit, 16) }

// unneeded is the part of Docker's API that no test here needs.
type unneeded interface{ quiesce.API }

// A world is a Docker engine with a Berth plugin, at the wire: the client, the
// server and the socket are real, what they tell is fixed.
type world struct {
	unneeded

	t        *testing.T
	dir      string
	host     string
	in       bytes.Buffer
	out, err bytes.Buffer

	// What Docker tells.
	apiErr     error
	plugins    types.PluginsListResponse
	networks   []network.Summary
	containers []container.Summary
	version    types.Version

	// What Berth tells.
	server    *control.Server
	berth     []control.Network
	endpoints []control.Endpoint
	findings  []control.Finding
	removed   []string
	collected []control.CollectRequest
	removeErr error
	settings  []control.Setting
	lan       lan
	shelf     *shelf
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), host: "unix:///var/run/docker.sock"}
	w.settings = []control.Setting{{Name: "BERTH_LOG_LEVEL", Value: "info"}}
	w.version = types.Version{Version: "29.0.1", APIVersion: "1.52"}
	w.fill()
	return w.start()
}

// start makes the plugin answer.
func (w *world) start() *world {
	w.t.Helper()
	w.server = w.newServer(control.NetworkService)
	w.server.SetNetworks(w)
	w.install("berth-net:latest", pluginID("f"), true, "networkdriver", w.server)
	return w
}

// fill sets two networks with three containers, as a user might have them.
func (w *world) fill() {
	now := time.Now()
	front, back, lost := long("a"), long("b"), long("c")
	w.networks = []network.Summary{
		{ID: back, Name: "app10", Driver: "berth-net:latest", Scope: "local"},
		{ID: front, Name: "app9", Driver: "berth-net:latest", Scope: "local"},
		{ID: long("d"), Name: "bridge", Driver: "bridge", Scope: "local"},
	}
	w.containers = []container.Summary{
		{ID: long("1"), Names: []string{"/web"}, NetworkSettings: on(front, long("5"))},
		{ID: long("2"), Names: []string{"/db", "/web/db"}, NetworkSettings: on(back, long("6"))},
	}
	w.berth = []control.Network{
		{
			ID: back, State: control.NetworkReady, Mode: "bridge", Bridge: "bthbbbbbbbbbbbb", Created: now.Add(-3 * time.Hour),
			Subnets: []control.Subnet{{Pool: netip.MustParsePrefix("10.2.0.0/24"), Gateway: netip.MustParseAddr("10.2.0.1")}},
			IPv4:    control.Family{GatewayMode: "routed"}, Endpoints: 1, Ports: 1, ICC: true,
		},
		{
			ID: front, State: control.NetworkBroken, Mode: "bridge", Bridge: "front0", Created: now.Add(-50 * time.Hour),
			Subnets: []control.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/24")}, {Pool: netip.MustParsePrefix("fd00:1::/64")}},
			IPv4:    control.Family{GatewayMode: "nat"}, IPv6: control.Family{GatewayMode: "nat"}, Endpoints: 1, Ports: 11, ICC: true,
		},
		{
			ID: lost, State: control.NetworkReady, Mode: "bridge", Bridge: "bthcccccccccccc", Created: now.Add(-5 * time.Minute),
			Subnets: []control.Subnet{{Pool: netip.MustParsePrefix("10.3.0.0/24")}}, IPv4: control.Family{GatewayMode: "nat"}, Endpoints: 1, ICC: true,
		},
	}
	web, db := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.2.0.2")
	w.endpoints = []control.Endpoint{
		{
			ID: long("5"), NetworkID: front, State: control.EndpointAlive, Created: now.Add(-2 * time.Hour), MAC: "02:00:00:00:00:05",
			IPv4: netip.MustParsePrefix("10.1.0.2/24"), IPv6: netip.MustParsePrefix("fd00:1::2/64"), HostLink: "bv555555555555", ContainerLink: "bc555555555555",
			Ports: []control.Port{
				{NetworkID: front, EndpointID: long("5"), Proto: "tcp", HostIP: netip.IPv4Unspecified(), HostPort: 8080, ContainerIP: web, ContainerPort: 80, Count: 10},
				{NetworkID: front, EndpointID: long("5"), Proto: "udp", HostIP: netip.MustParseAddr("::1"), HostPort: 53, ContainerIP: web, ContainerPort: 5353, Count: 1, Proxied: true},
			},
		},
		{
			ID: long("6"), NetworkID: back, State: control.EndpointAlive, Created: now.Add(-30 * time.Minute), MAC: "02:00:00:00:00:06",
			IPv4: netip.MustParsePrefix("10.2.0.2/24"), HostLink: "bv666666666666", ContainerLink: "bc666666666666",
			Ports: []control.Port{{NetworkID: back, EndpointID: long("6"), Proto: "tcp", ContainerIP: db, ContainerPort: 5432, Count: 1}},
		},
		{
			ID: long("7"), NetworkID: lost, State: control.EndpointGone, Created: now.Add(-4 * time.Minute), GoneSince: now.Add(-2 * time.Minute),
			MAC: "02:00:00:00:00:07", IPv4: netip.MustParsePrefix("10.3.0.2/24"),
		},
	}
	w.findings = []control.Finding{
		{ID: "kernel", Status: control.StatusOK, Summary: "the kernel has all that Berth uses"},
	}
}

func on(network_, endpoint string) *container.NetworkSettingsSummary {
	return &container.NetworkSettingsSummary{Networks: map[string]*network.EndpointSettings{"n": {NetworkID: network_, EndpointID: endpoint}}}
}

func (w *world) newServer(services ...string) *control.Server {
	log := logrus.New()
	log.SetOutput(io.Discard)
	info := control.Info{
		Version: "v1.2.3", GoVersion: "go1.26", PID: 42, Started: time.Now().Add(-90 * time.Minute), Socket: "/run/docker/plugins/berth.sock",
		StateDir: "/state", Settings: w.settings,
	}
	for _, name := range services {
		info.Services = append(info.Services, control.Service{Name: name})
	}
	return control.New(control.Config{
		Info: info, Log: logrus.NewEntry(log),
		Metrics: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write([]byte("berth_networks 3\n")) }),
	})
}

// install adds a plugin to Docker, and its socket if it is enabled.
func (w *world) install(name, id string, enabled bool, capability string, handler http.Handler) string {
	w.t.Helper()
	p := &types.Plugin{Name: name, ID: id, Enabled: enabled}
	p.Config.Entrypoint = []string{"/usr/bin/berthd", "network"}
	p.Config.Interface.Socket = "berth.sock"
	p.Config.Interface.Types = []types.PluginInterfaceType{{Prefix: "docker", Capability: capability, Version: "1.0"}}
	w.plugins = append(w.plugins, p)
	socket := filepath.Join(w.dir, id, "berth.sock")
	if enabled {
		w.listen(socket, handler)
	}
	return socket
}

func (w *world) listen(socket string, handler http.Handler) {
	w.t.Helper()
	assert.NilError(w.t, os.MkdirAll(filepath.Dir(socket), 0o700))
	l, err := net.Listen("unix", socket)
	assert.NilError(w.t, err)
	s := &http.Server{Handler: handler, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	w.t.Cleanup(func() {
		assert.Check(w.t, s.Close())
		<-done
	})
}

// try runs a command and returns what it wrote and its error.
func (w *world) try(args ...string) (stdout, stderr string, _ error) {
	w.t.Helper()
	w.out.Reset()
	w.err.Reset()
	root := New(Config{Docker: w, Version: "v1.2.4", SocketDir: w.dir, Alone: true})
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetFlagErrorFunc(cli.FlagErrorFunc)
	root.SetOut(&w.out)
	root.SetErr(&w.err)
	root.SetArgs(args)
	err := root.ExecuteContext(w.t.Context())
	return w.out.String(), w.err.String(), err
}

// run is try for commands that succeed.
func (w *world) run(args ...string) string {
	w.t.Helper()
	stdout, _, err := w.try(args...)
	assert.NilError(w.t, err)
	return stdout
}

// wantJSONLines checks that each of these lists has one object for each line, and a line.
func (w *world) wantJSONLines(lists ...string) {
	w.t.Helper()
	for _, args := range lists {
		text := strings.TrimSpace(w.run(append(words(args), "--format", "json")...))
		for line := range strings.SplitSeq(text, "\n") {
			var object map[string]any
			assert.NilError(w.t, json.Unmarshal([]byte(line), &object), "%s: %s", args, line)
			assert.Assert(w.t, len(object) > 3, "%s: %s", args, line)
		}
	}
}

func (w *world) In() io.Reader   { return &w.in }
func (w *world) Out() io.Writer  { return &w.out }
func (w *world) Err() io.Writer  { return &w.err }
func (w *world) API() engine.API { return w }
func (w *world) Host() string    { return w.host }
func (w *world) Context() string { return "default" }

func (w *world) PluginList(context.Context, filters.Args) (types.PluginsListResponse, error) {
	return w.plugins, w.apiErr
}

func (w *world) NetworkList(context.Context, network.ListOptions) ([]network.Summary, error) {
	return w.networks, w.apiErr
}

func (w *world) ContainerList(context.Context, container.ListOptions) ([]container.Summary, error) {
	return w.containers, w.apiErr
}

func (w *world) ServerVersion(context.Context) (types.Version, error) { return w.version, w.apiErr }

func (w *world) Networks(context.Context) ([]control.Network, error) { return w.berth, nil }

func (w *world) Network(_ context.Context, id string) (control.Network, error) {
	for _, n := range w.berth {
		if n.ID == id {
			return n, nil
		}
	}
	return control.Network{}, fault.NotFound("network %s is not known to Berth", id)
}

func (w *world) RemoveNetwork(_ context.Context, id string) error {
	w.removed = append(w.removed, id)
	return w.removeErr
}

func (w *world) Endpoints(_ context.Context, id string) (found []control.Endpoint, _ error) {
	for _, ep := range w.endpoints {
		if id == "" || ep.NetworkID == id {
			found = append(found, ep)
		}
	}
	return found, nil
}

func (w *world) Collect(_ context.Context, req control.CollectRequest) (control.CollectReport, error) {
	w.collected = append(w.collected, req)
	var report control.CollectReport
	for _, ep := range w.endpoints {
		if ep.State == control.EndpointGone && (req.Network == "" || req.Network == ep.NetworkID) {
			report.Endpoints = append(report.Endpoints, ep)
		}
	}
	return report, nil
}

func (w *world) Findings(context.Context) []control.Finding { return w.findings }

var errNoDocker = errors.New("cannot connect to the Docker daemon")
