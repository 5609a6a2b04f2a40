package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"github.com/berth-plugin/berth/netplugin"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/pluginapi"
	"github.com/berth-plugin/berth/shared/settings"
)

func testDaemon(t *testing.T, getenv func(string) string) *daemon {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	d := &daemon{network: true, volume: true, socket: "/run/docker/plugins/berth.sock", stateDir: t.TempDir(), log: logrus.NewEntry(log)}
	d.settings, d.settingsErr = settings.Read(getenv)
	d.registry = prometheus.NewRegistry()
	d.control = d.newControl(d.registry)
	return d
}

func TestSettingsInForceAreListed(t *testing.T) {
	value := func(d *daemon, name string) string {
		for _, s := range d.inForce() {
			if s.Name == name {
				return s.Value
			}
		}
		t.Fatalf("%s is not listed", name)
		return ""
	}
	d := testDaemon(t, func(string) string { return "" })
	assert.Equal(t, value(d, settings.EnvLogLevel), "info", "a default is in force too")
	assert.Equal(t, value(d, settings.EnvIPAMKey), "name")
	assert.Equal(t, value(d, settings.EnvSysctlDir), "/proc/sys/net")

	// One that is wrong keeps all services from starting, and is shown as it is.
	t.Setenv(settings.EnvScope, "galaxy")
	d = testDaemon(t, os.Getenv)
	assert.Assert(t, d.settingsErr != nil)
	assert.Equal(t, value(d, settings.EnvScope), "galaxy")
}

func TestServicesAreMeasured(t *testing.T) {
	d := testDaemon(t, func(string) string { return "" })
	ready := func() (values []float64) {
		families, err := d.registry.Gather()
		assert.NilError(t, err)
		for _, f := range families {
			if f.GetName() == "berth_service_ready" {
				for _, m := range f.GetMetric() {
					values = append(values, m.GetGauge().GetValue())
				}
			}
		}
		return values
	}
	assert.DeepEqual(t, ready(), []float64{0, 0})
	d.control.Ready(control.NetworkService)
	d.control.Refuse(control.VolumeService, errors.New("no"))
	assert.DeepEqual(t, ready(), []float64{1, 0})
}

// Every metric that the dashboard shows is one of this daemon's.
func TestDashboardNamesMetricsThatExist(t *testing.T) {
	d := testDaemon(t, func(string) string { return "" })
	d.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	_, err := pluginapi.New(pluginapi.Config{Log: d.log, Metrics: d.registry})
	assert.NilError(t, err)
	db, err := netplugin.OpenState(filepath.Join(t.TempDir(), "state.db"))
	assert.NilError(t, err)
	defer func() { assert.NilError(t, db.Close()) }()
	driver, err := netplugin.New(netplugin.Config{
		State: db, LeaseLog: filepath.Join(t.TempDir(), "leases.log"), Log: d.log, Links: struct{ netplugin.Links }{}, Bridge: struct{ netplugin.Mode }{}, LAN: struct{ netplugin.Mode }{},
	})
	assert.NilError(t, err)
	defer func() { assert.NilError(t, driver.Close()) }()
	d.registry.MustRegister(driver.Metrics())

	exists := make(map[string]bool)
	descs := make(chan *prometheus.Desc)
	go func() { defer close(descs); d.registry.Describe(descs) }()
	name := regexp.MustCompile(`fqName: "([^"]+)"`)
	for desc := range descs {
		exists[name.FindStringSubmatch(desc.String())[1]] = true
	}
	assert.Assert(t, exists["berth_networks"] && exists["berth_rpc_total"])

	text, err := os.ReadFile("../../packaging/grafana/berth.json")
	assert.NilError(t, err)
	var dashboard struct {
		Title  string
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr string }
		}
	}
	assert.NilError(t, json.Unmarshal(text, &dashboard))
	assert.Equal(t, dashboard.Title, "Berth")
	shown := make(map[string]bool)
	metric := regexp.MustCompile(`\b(?:berth|process|go)_[a-z_]+[a-z]\b`)
	suffix := regexp.MustCompile(`_(bucket|sum|count)$`)
	for _, panel := range dashboard.Panels {
		assert.Assert(t, len(panel.Targets) > 0, "%s", panel.Title)
		for _, target := range panel.Targets {
			found := metric.FindAllString(target.Expr, -1)
			assert.Assert(t, len(found) > 0, "%s: %s", panel.Title, target.Expr)
			for _, m := range found {
				m = suffix.ReplaceAllString(m, "")
				assert.Assert(t, exists[m], "panel %q: there is no metric %s", panel.Title, m)
				shown[m] = true
			}
		}
	}
	// And the other way round: what Berth measures is shown.
	for m := range exists {
		if regexp.MustCompile(`^berth_`).MatchString(m) {
			assert.Assert(t, shown[m], "%s is on no panel", m)
		}
	}
}

// A daemon whose services cannot start says why on its socket.
func TestDaemonThatCannotStartAnswersOperators(t *testing.T) {
	d := testDaemon(t, func(name string) string {
		if name == settings.EnvScope {
			return "galaxy"
		}
		return ""
	})
	d.volume, d.socket = false, filepath.Join(t.TempDir(), "berth.sock")
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- d.run(ctx) }()
	client := control.NewClient(d.socket)
	defer client.Close()
	var service control.Service
	for service.State != control.ServiceRefusing {
		time.Sleep(5 * time.Millisecond)
		info, err := client.Info(ctx)
		if err != nil {
			continue // it does not listen yet
		}
		assert.Equal(t, len(info.Services), 1)
		service = info.Services[0]
	}
	assert.Assert(t, cmp.Contains(service.Reason, "galaxy"))
	_, err := client.Networks(ctx)
	assert.ErrorContains(t, err, "galaxy")
	text, err := client.Metrics(ctx)
	assert.NilError(t, err)
	assert.Assert(t, cmp.Contains(string(text), `berth_service_ready{service="network"} 0`))
	stop()
	assert.NilError(t, <-ended)
}
