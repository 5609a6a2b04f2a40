package volplugin

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/berth-plugin/berth/volplugin/volume"
)

// Recover makes good what an earlier process has left: counts whose mounts are
// gone, mounts that nobody counts, volumes that are half made or half removed.
// Requests that change or mount volumes wait for it. The storage gets five
// seconds; what it does not answer by then is done by Run.
func (d *Driver) Recover(ctx context.Context) error {
	if err := d.engines.recover(ctx); err != nil {
		d.cfg.Log.WithError(err).Error("volumes of engine thin: devices that a killed process left suspended")
	}
	if err := d.voidCounts(); err != nil {
		return fmt.Errorf("recover mounts: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, recoverTime)
	defer cancel()
	if err := errors.Join(d.unmountOrphans(ctx), d.tidy(), d.backups.sweep()); err != nil {
		d.cfg.Log.WithError(err).Warn("recover mounts: tried again in the background")
	}
	d.each(func(s *store) {
		if err := s.settle(ctx); err != nil {
			d.cfg.Log.WithError(err).Warnf("recover volumes of root %s: tried again in the background", s)
		}
	})
	return nil
}

// voidCounts drops the counts of an earlier boot and those whose mount is gone.
// It reads mountinfo and the state file only.
func (d *Driver) voidCounts() error {
	boot, err := d.cfg.BootID()
	if err != nil {
		return fmt.Errorf("boot ID: %w", err)
	}
	mounted, err := d.mounted()
	if err != nil {
		return err
	}
	for name, m := range d.ledger.allMounts() {
		if m.Boot == boot && (d.binder == nil && !m.Bound || mounted[name]) {
			continue
		}
		d.cfg.Log.WithField("volume", name).Infof("forgetting %d mounts that are gone", m.IDs.Total())
		if err := d.ledger.setMounts(name, volumeMounts{}); err != nil {
			return err
		}
	}
	return nil
}

// mounted are the names that something is mounted for.
func (d *Driver) mounted() (map[string]bool, error) {
	switch {
	case d.binder != nil:
		return d.binder.List()
	case d.special != nil:
		return d.special.List()
	}
	return nil, nil
}

// unmountOrphans unmounts what no Mount is counted on.
func (d *Driver) unmountOrphans(ctx context.Context) error {
	mounted, err := d.mounted()
	if err != nil {
		return err
	}
	var errs []error
	for name := range mounted {
		if d.ledger.mountsOf(name).IDs.Total() > 0 || volume.CheckReference(name) != nil {
			continue
		}
		errs = append(errs, d.mountedIn(name).background(ctx, name, func(context.Context) error {
			// Looked at again, now that nobody else works on it.
			if d.ledger.mountsOf(name).IDs.Total() > 0 {
				return nil
			}
			d.cfg.Log.WithField("volume", name).Info("unmounting what no container uses")
			return d.unbind(name)
		}))
	}
	return errors.Join(errs...)
}

// tidy removes mount points that are left. Only before requests are let in: a
// Mount makes its directory before it mounts there.
func (d *Driver) tidy() error {
	switch {
	case d.binder != nil:
		return d.binder.Tidy()
	case d.special != nil:
		return d.special.Tidy()
	}
	return nil
}

const (
	// tendEvery is how often Run reads the root and looks after mounts.
	tendEvery = time.Minute
	// expireEvery is how often Run looks for data in the trash that is due, and for
	// what is known of volumes that are gone.
	expireEvery = time.Hour
	// expireTime bounds one deletion of data; the next one goes on from there.
	expireTime = 10 * time.Minute
)

// Run works in the background until ctx ends: it keeps up with volumes that
// other hosts make and remove, finishes what Recover could not, and deletes from
// the trash what is due. It may be called once.
func (d *Driver) Run(ctx context.Context) error {
	var stores sync.WaitGroup
	defer d.running.Wait()
	defer stores.Wait()
	defer d.endTasks()
	d.mu.Lock()
	d.start = func(s *store) { stores.Go(func() { s.run(ctx) }) }
	for _, s := range d.stores {
		d.start(s)
	}
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.start = nil
		d.mu.Unlock()
	}()
	stores.Go(func() {
		if err := d.schedules.Run(ctx); err != nil {
			d.cfg.Log.WithError(err).Error("no scheduled snapshots are made")
		}
	})
	stores.Go(func() {
		if err := d.backupRuns.Run(ctx); err != nil {
			d.cfg.Log.WithError(err).Error("no scheduled backups are made")
		}
	})
	tend, expire := time.NewTicker(tendEvery), time.NewTicker(expireEvery)
	defer tend.Stop()
	defer expire.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tend.C:
			d.tendMounts(ctx)
		case <-expire.C:
			if err := d.forgetBackups(); err != nil {
				d.cfg.Log.WithError(err).Warn("forget the backups of volumes that are gone")
			}
		}
	}
}

// tendMounts is one round of Run.
func (d *Driver) tendMounts(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.request)
	defer cancel()
	if err := d.unmountOrphans(ctx); err != nil {
		d.cfg.Log.WithError(err).Debug("look after mounts")
	}
}
