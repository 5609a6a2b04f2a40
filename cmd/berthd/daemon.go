package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/go-plugins-helpers/volume"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/netplugin"
	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/pluginapi"
	"github.com/berth-plugin/berth/shared/settings"
)

const (
	// stopTime is what running calls get at the end; dockerd kills a plugin ten
	// seconds after it asked it to stop.
	stopTime = 8 * time.Second
	// retryPause is the time between attempts to start a service that cannot
	// start: another daemon may go, an operator may mend the state.
	retryPause = 5 * time.Second
)

// daemon is one berthd process.
type daemon struct {
	network, volume                      bool
	socket, stateDir, dataDir, mountsDir string
	hostMounts, dockerSocket             string

	// end ends run with a reason.
	end context.CancelCauseFunc

	log         *logrus.Entry
	settings    settings.Settings
	settingsErr error

	registry *prometheus.Registry
	control  *control.Server
	// repairs of the firewall; nil without networks.
	repairs prometheus.Counter
	// patient is nil while the network service does not run.
	patient atomic.Pointer[patient]
}

// errStartAnew ends a daemon that only a new start can help.
var errStartAnew = errors.New("the host does not see what this plugin mounts; ending, to be started anew by Docker")

// run serves until ctx ends. A service that cannot start (state damaged, held by
// another daemon, settings wrong) does not end the process, which dockerd would
// start again at once and for ever: it answers every call with the reason.
func (d *daemon) run(ctx context.Context) error {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	d.registry, d.control = registry, d.newControl(registry)
	cfg := pluginapi.Config{Log: d.log, Metrics: registry, Extra: map[string]http.Handler{control.Prefix: d.control}}
	if d.network {
		cfg.Network = pluginapi.NewService[pluginapi.NetworkDriver]()
		cfg.IPAM = pluginapi.NewService[pluginapi.IPAMDriver]()
		cfg.NetworkCapabilities = netplugin.Capabilities()
		cfg.IPAMCapabilities = netplugin.IPAMCapabilities(d.settings.IPAMKey == settings.IPAMKeyMAC)
		cfg.AddressSpaces = netplugin.AddressSpaces()
	}
	if d.volume {
		cfg.Volume = pluginapi.NewService[pluginapi.VolumeDriver]()
		cfg.VolumeCapabilities = volume.Capability{Scope: d.settings.Scope}
	}
	server, err := pluginapi.New(cfg)
	if err != nil {
		return err
	}
	// Listen before anything that can take time: dockerd gives up on a plugin
	// whose socket does not accept within ten seconds.
	l, err := listen(d.socket)
	if err != nil {
		return err
	}
	d.log.WithFields(logrus.Fields{"version": version, "socket": l.Addr().String()}).Info("berthd listens")

	ctx, d.end = context.WithCancelCause(ctx)
	background, stopBackground := context.WithCancel(ctx)
	defer stopBackground()
	var tasks sync.WaitGroup
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	if d.network {
		tasks.Go(func() {
			d.supervise(background, "network", d.startNetwork, func(err error) {
				cfg.Network.Refuse(err)
				cfg.IPAM.Refuse(err)
			}, func(s started) {
				cfg.Network.Set(s.networks)
				cfg.IPAM.Set(s.addresses)
			})
		})
	}
	if d.volume {
		tasks.Go(func() {
			d.supervise(background, "volume", d.startVolume, cfg.Volume.Refuse, func(s started) { cfg.Volume.Set(s.volumes) })
		})
	}
	if d.settingsErr == nil && d.settings.MetricsAddr != "" {
		tasks.Go(func() { d.serveMetrics(background, registry) })
	}

	select {
	case err = <-served:
	case <-ctx.Done():
		stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
		defer cancel()
		// A clone may take longer than Docker waits.
		d.control.Stop()
		err = server.Shutdown(stopping)
		if errors.Is(context.Cause(ctx), errStartAnew) {
			err = errors.Join(errStartAnew, err)
		}
	}
	stopBackground()
	tasks.Wait()
	d.log.Info("berthd stopped")
	return err
}

// started is a service that runs: its drivers, what it does in the background,
// and how it ends.
type started struct {
	networks  pluginapi.NetworkDriver
	addresses pluginapi.IPAMDriver
	volumes   pluginapi.VolumeDriver
	// admin is nil when there is nothing to administer.
	admin control.Networks
	// volumeAdmin is nil without volumes.
	volumeAdmin control.VolumeAdmin
	run         func(context.Context)
	close       func() error
}

// supervise starts a service, again and again while it cannot start, and then
// runs it until ctx ends.
func (d *daemon) supervise(ctx context.Context, name string, start func(context.Context) (started, error), refuse func(error), set func(started)) {
	log := d.log.WithField("service", name)
	var last string
	for {
		begin := time.Now()
		s, err := start(ctx)
		if err == nil {
			log.WithField("duration", time.Since(begin).Round(time.Millisecond).String()).Info("ready")
			set(s)
			if d.control.Ready(name); s.admin != nil {
				d.control.SetNetworks(s.admin)
			}
			if s.volumeAdmin != nil {
				d.control.SetVolumes(s.volumeAdmin)
			}
			s.run(ctx)
			if err := s.close(); err != nil {
				log.WithError(err).Error("close")
			}
			return
		}
		refuse(err)
		d.control.Refuse(name, err)
		if err.Error() != last {
			last = err.Error()
			log.WithError(err).Error("refusing all calls")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryPause):
		}
	}
}

// serveMetrics serves Prometheus metrics until ctx ends. They are not worth the
// plugin: an address that cannot be had is logged.
func (d *daemon) serveMetrics(ctx context.Context, registry *prometheus.Registry) {
	log := d.log.WithField("address", d.settings.MetricsAddr)
	l, err := net.Listen("tcp", d.settings.MetricsAddr)
	if err != nil {
		log.WithError(err).Errorf("%s: metrics are not served", settings.EnvMetricsAddr)
		return
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", metricsHandler(registry))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() }) // a scrape may be cut
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		log.WithError(fmt.Errorf("serve metrics: %w", err)).Error("metrics ended")
	}
}
