package presence

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Release gives up this host's lease, after the volume was detached. What is not this
// host's is left alone. When it cannot be written down now, Run tries again, and the
// error is for the log only.
func (p *Presence) Release(ctx context.Context, volume string) error {
	if err := checkUUID(volume); err != nil {
		return err
	}
	p.mu.Lock()
	delete(p.held, volume)
	p.releasing[volume] = true
	p.mu.Unlock()
	unlock, err := p.lease(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	d, err := p.open(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	return p.release(d, volume)
}

// release says that nobody has the volume, if this host has it.
func (p *Presence) release(d dirs, volume string) error {
	dir, err := d.leases.Dir(volume)
	if err == nil {
		defer dir.Close()
		err = p.releaseIn(d, dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return unavailable(err)
	}
	p.mu.Lock()
	delete(p.releasing, volume)
	p.mu.Unlock()
	return nil
}

func (p *Presence) releaseIn(d dirs, dir *rooted.Dir) error {
	generation, rec, err := current(dir)
	if errors.Is(err, errDamaged) || err == nil && (generation == 0 || rec.Host != p.cfg.ID || rec.State == free) {
		return nil
	}
	if err != nil {
		return err
	}
	rec.State, rec.From, rec.Since = free, nil, p.cfg.Now().UTC().Truncate(time.Second)
	data, err := encode(rec)
	if err != nil {
		return err
	}
	return p.replace(d, dir, leaseName(generation), data, "lease.free")
}

// retryReleases writes down what Release could not.
func (p *Presence) retryReleases(ctx context.Context, d dirs) {
	select {
	case p.leasing <- struct{}{}:
		defer func() { <-p.leasing }()
	default:
		return
	}
	p.mu.Lock()
	volumes := slices.Collect(maps.Keys(p.releasing))
	p.mu.Unlock()
	for _, volume := range volumes {
		if ctx.Err() != nil {
			return
		}
		if err := p.release(d, volume); err != nil {
			p.cfg.Log.WithField("volume", volume).WithError(err).Debug("release lease")
		}
	}
}

// Drop deletes all that is kept of a volume's lease, when its data is deleted for
// good. It is a conflict while another host has it that is not dead.
func (p *Presence) Drop(ctx context.Context, volume string) error {
	if err := checkUUID(volume); err != nil {
		return err
	}
	unlock, err := p.lease(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	d, err := p.open(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	dir, err := d.leases.Dir(volume)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return unavailable(err)
	}
	defer dir.Close()
	generation, rec, err := current(dir)
	if err != nil && !errors.Is(err, errDamaged) {
		return err
	}
	if err == nil && generation > 0 && rec.State != free && rec.Host != p.cfg.ID {
		if dead, _, _ := p.judge(fileName(rec.Host)); !dead {
			return fault.Conflict("host %s has it", nameOf(rec))
		}
	}
	p.mu.Lock()
	delete(p.held, volume)
	delete(p.releasing, volume)
	p.mu.Unlock()
	names, err := dir.Names()
	if err != nil {
		return unavailable(err)
	}
	for _, name := range names {
		if err := dir.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return unavailable(err)
		}
	}
	if err := d.leases.Rmdir(volume); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return unavailable(err)
	}
	return d.leases.Sync()
}
