package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/berth-plugin/berth/shared/notify"
	"github.com/berth-plugin/berth/shared/quiesce"
	"github.com/berth-plugin/berth/shared/settings"
	"github.com/berth-plugin/berth/volplugin"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/archive"
	"github.com/berth-plugin/berth/volplugin/backup/restic"
	"github.com/berth-plugin/berth/volplugin/engine/thin"
	"github.com/berth-plugin/berth/volplugin/mount"
)

// startVolume opens the volume driver's records and recovers.
func (d *daemon) startVolume(ctx context.Context) (s started, err error) {
	if d.settingsErr != nil {
		return started{}, d.settingsErr
	}
	roots, err := volplugin.ParseRoots(d.settings.Roots)
	if err != nil {
		return started{}, fmt.Errorf("%s: %w", settings.EnvRoots, err)
	}
	pool, err := thin.ParseSettings(d.settings.ThinPool)
	if err != nil {
		return started{}, fmt.Errorf("%s: %w", settings.EnvThinPool, err)
	}
	var open closers
	defer func() {
		if err != nil {
			err = errors.Join(err, open.close())
		}
	}()
	db, err := volplugin.OpenState(filepath.Join(d.stateDir, "vol", "state.db"))
	if err != nil {
		return started{}, err
	}
	open.add(db.Close)
	counts, err := volplugin.OpenCounts(filepath.Join(d.stateDir, "vol"))
	if err != nil {
		return started{}, err
	}
	open.add(counts.Close)
	cfg := volplugin.Config{
		Root: d.dataDir, Roots: roots, ThinPool: pool, ShareBase: filepath.Join(d.stateDir, "vol", "shares"),
		DB: db, Counts: counts, Log: d.log,
		Local: d.runDir("attached"), SpecialBase: d.runDir("mounted"), Backups: d.backups(),
	}
	people := notify.New(filepath.Join(d.stateDir, "notifications"), hostname(), d.log, time.Now)
	cfg.Tell = people.Tell
	watch := func(context.Context) {}
	if d.mountsDir != "" {
		stage, err := mount.OpenStage(d.mountsDir, d.hostMounts)
		if err != nil {
			return started{}, err
		}
		v := &visibility{
			seen: stage.Seen, log: d.log, file: startsFile, begin: time.Now(),
			startAnew: func() { d.end(errStartAnew) },
		}
		// The driver starts all the same: only Mount needs the host to see.
		if err := v.check(); err != nil {
			d.log.WithError(err).Error("mounts")
		}
		cfg.MountBase, cfg.CheckMounts, watch = stage.Base(), v.check, v.watch
	}
	tend := d.quiesce(&cfg)
	driver, err := volplugin.New(cfg)
	if err != nil {
		return started{}, err
	}
	if err := driver.Recover(ctx); err != nil {
		return started{}, err
	}
	metrics := driver.Metrics()
	if err := d.registry.Register(metrics); err != nil {
		return started{}, err
	}
	open.add(func() error {
		d.registry.Unregister(metrics)
		return nil
	})
	run := func(ctx context.Context) {
		var tasks sync.WaitGroup
		tasks.Go(func() { watch(ctx) })
		tasks.Go(func() { people.Run(ctx) })
		tasks.Go(func() { tend(ctx) })
		if err := driver.Run(ctx); err != nil {
			d.log.WithError(err).Error("volumes are no longer looked after in the background")
		}
		tasks.Wait()
	}
	return started{volumes: driver, volumeAdmin: driver, run: run, close: open.close}, nil
}

// backups says how this daemon keeps backups.
func (d *daemon) backups() *volplugin.BackupConfig {
	dir := filepath.Join(d.stateDir, "vol", "backup")
	// Names of hosts that run several daemons differ by the daemons' sockets.
	host := hostname() + "-" + strings.TrimSuffix(filepath.Base(d.socket), ".sock")
	return &volplugin.BackupConfig{
		Targets: filepath.Join(d.stateDir, "targets"), Scratch: filepath.Join(dir, "scratch"), Version: version,
		Open: func(target backup.Target) (backup.Engine, error) {
			if err := d.checkPlace(target); err != nil {
				return nil, err
			}
			if target.EngineName() == backup.Archive {
				return archive.New(target)
			}
			return restic.New(restic.Config{Target: target, Dir: dir, Host: host, Nice: backupNice, Log: d.log})
		},
	}
}

func hostname() string {
	host, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return host
}

// backupNice keeps backups out of the way of containers.
const backupNice = 10

// quiesce lets the hooks of containers be run where Docker's socket was given. What it
// returns undoes in the background what a process has left that was killed: not before
// the service runs, because Docker may be waiting for that.
func (d *daemon) quiesce(cfg *volplugin.Config) (tend func(context.Context)) {
	if d.dockerSocket == "" {
		return func(context.Context) {}
	}
	q := quiesce.New(d.dockerSocket, filepath.Join(d.stateDir, "vol", "quiesced"), d.log)
	cfg.Quiesce = func(ctx context.Context, volume string) (volplugin.Rest, error) {
		rest, err := q.Quiesce(ctx, volume)
		if err != nil || rest == nil {
			return nil, err
		}
		return rest, nil
	}
	return q.Run
}

// runDir is a directory of this daemon's that a reboot may empty. In a managed plugin it
// is in the plugin's own root.
func (d *daemon) runDir(name string) string {
	return filepath.Join("/run/berth", strings.TrimSuffix(filepath.Base(d.socket), ".sock"), name)
}
