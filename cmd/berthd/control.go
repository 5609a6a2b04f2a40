package main

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/berth-plugin/berth/netplugin"
	"github.com/berth-plugin/berth/netplugin/doctor"
	"github.com/berth-plugin/berth/netplugin/firewall"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/settings"
)

// newControl returns the administration of this daemon. What it measures of the
// daemon as a whole is registered.
func (d *daemon) newControl(registry *prometheus.Registry) *control.Server {
	cfg := control.Config{
		Info: control.Info{
			Version: version, Socket: d.socket, StateDir: d.stateDir, DataDir: d.dataDir, Settings: d.inForce(),
		},
		Metrics: metricsHandler(registry),
		Log:     d.log,
	}
	if d.network {
		cfg.Info.Services = append(cfg.Info.Services, control.Service{Name: control.NetworkService})
		cfg.Checks = append(cfg.Checks, d.examine)
		d.repairs = prometheus.NewCounter(prometheus.CounterOpts{
			Name: "berth_firewall_repairs_total", Help: "How often rules that somebody had changed were repaired.",
		})
		registry.MustRegister(d.repairs)
	}
	if d.volume {
		cfg.Info.Services = append(cfg.Info.Services, control.Service{Name: control.VolumeService})
	}
	server := control.New(cfg)
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "berth_build_info", Help: "Always 1; the version is in the label.", ConstLabels: prometheus.Labels{"version": version},
	}, func() float64 { return 1 }))
	for _, service := range cfg.Info.Services {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "berth_service_ready", Help: "1 when the service answers Docker, 0 while it starts or cannot start.",
			ConstLabels: prometheus.Labels{"service": service.Name},
		}, func() float64 {
			if server.State(service.Name) == control.ServiceReady {
				return 1
			}
			return 0
		}))
	}
	return server
}

// A patient is what the doctor looks at when the network service runs.
type patient struct {
	links  *link.Handle
	rules  *firewall.Manager
	driver *netplugin.Driver
}

// examine looks at the host. It can do so when the network service cannot start.
func (d *daemon) examine(ctx context.Context) []control.Finding {
	in := doctor.Input{StateDir: filepath.Join(d.stateDir, "net")}
	failed := func(err error) []control.Finding {
		return []control.Finding{{ID: "host", Status: control.StatusFail, Summary: fmt.Sprintf("the host cannot be looked at: %v", err)}}
	}
	if p := d.patient.Load(); p != nil {
		facts, err := p.driver.HostFacts()
		if err != nil {
			return failed(err)
		}
		in.Links, in.Firewall = p.links, p.rules
		in.Bridges, in.IPv6, in.PublishedPorts, in.Leftovers = facts.Bridges, facts.IPv6, facts.PublishedPorts, facts.Leftovers
		for _, name := range slices.Sorted(maps.Keys(facts.Parents)) {
			in.Parents = append(in.Parents, doctor.Parent{Name: name, OwnMACs: facts.Parents[name]})
		}
		for _, name := range facts.Uplinks {
			in.Parents = append(in.Parents, doctor.Parent{Name: name, OwnMACs: true, OfBridge: true})
		}
		return doctor.Run(ctx, in)
	}
	links, err := link.Open(link.Options{SysctlRoot: d.settings.SysctlDir})
	if err != nil {
		return failed(err)
	}
	defer links.Close()
	in.Links = links
	return doctor.Run(ctx, in)
}

// inForce lists the settings as they hold. When one is wrong, and the services
// refuse for that, it lists what was set.
func (d *daemon) inForce() []control.Setting {
	if d.settingsErr != nil {
		var set []control.Setting
		for _, name := range []string{settings.EnvLogLevel, settings.EnvPools, settings.EnvIPAMKey, settings.EnvScope, settings.EnvMetricsAddr, settings.EnvSysctlDir} {
			set = append(set, control.Setting{Name: name, Value: os.Getenv(name)})
		}
		return set
	}
	s := d.settings
	set := []control.Setting{{Name: settings.EnvLogLevel, Value: s.LogLevel.String()}}
	if d.network {
		set = append(set, control.Setting{Name: settings.EnvPools, Value: s.Pools}, control.Setting{Name: settings.EnvIPAMKey, Value: s.IPAMKey})
	}
	if d.volume {
		set = append(set, control.Setting{Name: settings.EnvScope, Value: s.Scope})
	}
	set = append(set, control.Setting{Name: settings.EnvMetricsAddr, Value: s.MetricsAddr})
	if d.network {
		set = append(set, control.Setting{Name: settings.EnvSysctlDir, Value: s.SysctlDir})
	}
	return set
}

func metricsHandler(registry *prometheus.Registry) http.Handler {
	// A measure that cannot be taken, as of records that are damaged, does not
	// hide the others.
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
}
