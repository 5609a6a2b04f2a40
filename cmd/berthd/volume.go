package main

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/berth-plugin/berth/volplugin"
)

// startVolume opens the volume driver's records and recovers.
func (d *daemon) startVolume(ctx context.Context) (s started, err error) {
	if d.settingsErr != nil {
		return started{}, d.settingsErr
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
	driver, err := volplugin.New(volplugin.Config{
		Root: d.dataDir, MountBase: d.mountsDir, DB: db, Scope: d.settings.Scope, Log: d.log,
	})
	if err != nil {
		return started{}, err
	}
	if err := driver.Recover(ctx); err != nil {
		return started{}, err
	}
	run := func(ctx context.Context) {
		if err := driver.Run(ctx); err != nil {
			d.log.WithError(err).Error("volumes are no longer looked after in the background")
		}
	}
	return started{volumes: driver, run: run, close: open.close}, nil
}
