package volplugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/berth-plugin/berth/volplugin/volume"
)

// Recover makes good what an earlier process has left: counts whose mounts are
// gone, mounts that nobody counts, volumes that are half made or half removed.
// Requests that change or mount volumes wait for it. The storage gets five
// seconds; what it does not answer by then is done by Run.
func (d *Driver) Recover(ctx context.Context) error {
	if err := d.voidCounts(); err != nil {
		return fmt.Errorf("recover mounts: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, recoverTime)
	defer cancel()
	if err := errors.Join(d.unmountOrphans(ctx), d.tidy()); err != nil {
		d.cfg.Log.WithError(err).Warn("recover mounts: tried again in the background")
	}
	if err := d.settle(ctx); err != nil {
		d.cfg.Log.WithError(err).Warn("recover volumes: tried again in the background")
	}
	return nil
}

// voidCounts drops the counts of an earlier boot and those whose mount is gone.
// It reads mountinfo and the state file only.
func (d *Driver) voidCounts() error {
	boot, err := d.cfg.BootID()
	if err != nil {
		return fmt.Errorf("boot ID: %w", err)
	}
	var mounted map[string]bool
	if d.binder != nil {
		if mounted, err = d.binder.List(); err != nil {
			return err
		}
	}
	d.mu.Lock()
	counted := maps.Clone(d.mounts)
	d.mu.Unlock()
	for name, m := range counted {
		if m.Boot == boot && (d.binder == nil || mounted[name]) {
			continue
		}
		d.cfg.Log.WithField("volume", name).Infof("forgetting %d mounts that are gone", m.IDs.Total())
		if err := d.setMounts(name, volumeMounts{}); err != nil {
			return err
		}
	}
	return nil
}

// unmountOrphans unmounts what no Mount is counted on.
func (d *Driver) unmountOrphans(ctx context.Context) error {
	if d.binder == nil {
		return nil
	}
	mounted, err := d.binder.List()
	if err != nil {
		return err
	}
	var errs []error
	for name := range mounted {
		if d.mountsOf(name).IDs.Total() > 0 || volume.CheckName(name) != nil {
			continue
		}
		errs = append(errs, d.background(ctx, name, func(context.Context) error {
			// Looked at again, now that nobody else works on it.
			if d.mountsOf(name).IDs.Total() > 0 {
				return nil
			}
			d.cfg.Log.WithField("volume", name).Info("unmounting what no container uses")
			return d.binder.Unbind(name)
		}))
	}
	return errors.Join(errs...)
}

// tidy removes mount points that are left. Only before requests are let in: a
// Mount makes its directory before it mounts there.
func (d *Driver) tidy() error {
	if d.binder == nil {
		return nil
	}
	return d.binder.Tidy()
}

// background is change for work that no request waits for.
func (d *Driver) background(ctx context.Context, name string, fn func(ctx context.Context) error) error {
	// A volume whose request hangs must not take the time of the others.
	wait, cancel := context.WithTimeout(ctx, d.cfg.look)
	defer cancel()
	unlock, err := d.locks.Lock(wait, name)
	if err != nil {
		return err
	}
	return d.changes.run(ctx, unlock, func(ctx context.Context, _ func() bool) error { return fn(ctx) })
}

// settle reads the root and finishes or undoes what this host began with volumes
// and did not bring to an end.
func (d *Driver) settle(ctx context.Context) error {
	if err := d.scan(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	unfinished := maps.Clone(d.unfinished)
	fresh := d.root.ID == ""
	d.mu.Unlock()
	if fresh {
		return nil
	}
	var errs []error
	for name := range unfinished {
		errs = append(errs, d.background(ctx, name, func(ctx context.Context) error {
			root, err := d.open()
			if err != nil {
				return err
			}
			defer root.Close()
			d.cfg.Log.WithField("volume", name).Info("finishing what was interrupted")
			return errors.Join(root.Settle(ctx, name), d.relearn(root, name))
		}))
	}
	return errors.Join(append(errs, d.settleClaims(ctx))...)
}

// relearn stores what the root shows after this process changed a volume.
func (d *Driver) relearn(root *volume.Root, name string) error {
	entry, err := root.Entry(name)
	if errors.Is(err, volume.ErrNoRecord) || err == nil && !isVisible(entry) {
		return d.remember(name, nil)
	}
	if err != nil {
		return err
	}
	v := seen(entry)
	return d.remember(name, &v)
}

// settleClaims takes back, or ends, removals that this host was killed in.
func (d *Driver) settleClaims(ctx context.Context) error {
	var claims map[string]string
	err := d.looks.run(ctx, func() {}, func(ctx context.Context, commit func() bool) error {
		root, err := d.open()
		if err != nil {
			return err
		}
		defer root.Close()
		found, err := root.Claims(ctx)
		if err == nil && commit() {
			claims = found
		}
		return err
	})
	if errors.Is(err, volume.ErrFresh) {
		return nil
	}
	errs := []error{err}
	for name, id := range claims {
		errs = append(errs, d.background(ctx, name, func(ctx context.Context) error {
			root, err := d.open()
			if err != nil {
				return err
			}
			defer root.Close()
			return errors.Join(root.SettleClaim(ctx, name, id), d.relearn(root, name))
		}))
	}
	return errors.Join(errs...)
}

const (
	// tendEvery is how often Run reads the root and looks after mounts.
	tendEvery = time.Minute
	// expireEvery is how often Run looks for data in the trash that is due.
	expireEvery = time.Hour
	// expireTime bounds one deletion of data; the next one goes on from there.
	expireTime = 10 * time.Minute
)

// Run works in the background until ctx ends: it keeps up with volumes that
// other hosts make and remove, finishes what Recover could not, and deletes from
// the trash what is due.
func (d *Driver) Run(ctx context.Context) error {
	tend, expire := time.NewTicker(tendEvery), time.NewTicker(expireEvery)
	defer tend.Stop()
	defer expire.Stop()
	d.wakePurge() // what was due while no process ran
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tend.C:
			d.tend(ctx)
		case <-expire.C:
			d.expire(ctx)
		case <-d.purge:
			d.expire(ctx)
		}
	}
}

// tend is one round of Run.
func (d *Driver) tend(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.request)
	defer cancel()
	if err := errors.Join(d.unmountOrphans(ctx), d.settle(ctx)); err != nil {
		d.cfg.Log.WithError(err).Debug("look after volumes")
	}
	d.forgetChanges()
}

// forgetChanges drops the times of changes that no look can have overtaken any
// more: one that is older than the last whole round has ended or was given up.
func (d *Driver) forgetChanges() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, at := range d.changed {
		if at <= d.lastRound {
			delete(d.changed, name)
		}
	}
	d.lastRound = d.clock
}

// expire deletes what is due in the trash.
func (d *Driver) expire(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, expireTime)
	defer cancel()
	err := d.looks.run(ctx, func() {}, func(ctx context.Context, _ func() bool) error {
		root, err := d.open()
		if errors.Is(err, volume.ErrFresh) {
			return nil
		}
		if err != nil {
			return err
		}
		defer root.Close()
		names, err := root.Expire(ctx, volume.TrashKeep)
		for _, name := range names {
			d.cfg.Log.WithField("volume", name).Info("deleted from the trash")
		}
		return err
	})
	if err != nil {
		d.cfg.Log.WithError(err).Warn("empty the trash")
	}
}

// wakePurge makes Run look at the trash soon.
func (d *Driver) wakePurge() {
	select {
	case d.purge <- struct{}{}:
	default:
	}
}
