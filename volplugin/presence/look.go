package presence

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

type lostLease struct {
	generation uint64
	why        string
}

// Lease tells who has the volume.
func (p *Presence) Lease(ctx context.Context, volume string) (Lease, error) {
	if err := checkUUID(volume); err != nil {
		return Lease{}, err
	}
	if err := p.fresh(ctx); err != nil {
		return Lease{}, err
	}
	d, err := p.open(ctx)
	if err != nil {
		return Lease{}, err
	}
	defer d.Close()
	return p.look(d, volume)
}

// Leases lists the leases that somebody has, by volume.
func (p *Presence) Leases(ctx context.Context) (map[string]Lease, error) {
	if err := p.fresh(ctx); err != nil {
		return nil, err
	}
	d, err := p.open(ctx)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if err := d.leases.Refresh(); err != nil {
		return nil, unavailable(err)
	}
	names, err := d.leases.Names()
	if err != nil {
		return nil, unavailable(err)
	}
	leases := make(map[string]Lease)
	for _, volume := range names {
		if err := ctx.Err(); err != nil {
			return nil, unavailable(err)
		}
		if checkUUID(volume) != nil {
			continue
		}
		l, err := p.look(d, volume)
		if err != nil {
			return nil, err
		}
		if l.Host != "" || l.Unreadable {
			leases[volume] = l
		}
	}
	return leases, nil
}

func (p *Presence) look(d dirs, volume string) (Lease, error) {
	dir, err := d.leases.Dir(volume)
	if errors.Is(err, fs.ErrNotExist) {
		return Lease{}, nil
	}
	if misplaced(err) {
		return Lease{Unreadable: true}, nil
	}
	if err != nil {
		return Lease{}, unavailable(err)
	}
	defer dir.Close()
	generation, rec, err := current(dir)
	if errors.Is(err, errDamaged) {
		return Lease{Generation: generation, Unreadable: true}, nil
	}
	if err != nil {
		return Lease{}, err
	}
	if generation == 0 || rec.State == free {
		return Lease{Generation: generation}, nil
	}
	l := p.owned(generation, rec)
	if l.Mine {
		return l, nil
	}
	dead, silent, _ := p.judge(fileName(rec.Host))
	l.Alive, l.Silent = !dead, silent
	if owner, err := readHost(d.hosts, fileName(rec.Host)); err == nil {
		l.Stopped = owner.Stopped
	}
	return l, nil
}

// misplaced tells whether there is something else where a lease should be.
func misplaced(err error) bool {
	return errors.Is(err, rooted.ErrNotDir) || errors.Is(err, rooted.ErrSymlink) || errors.Is(err, rooted.ErrMountPoint)
}

// owned is a lease that somebody has.
func (p *Presence) owned(generation uint64, rec leaseRecord) Lease {
	mine := rec.Host == p.cfg.ID
	return Lease{Generation: generation, Host: rec.Host, Name: rec.Name, Mine: mine, Since: rec.Since, Alive: mine}
}

// lostLeases finds out which leases of this process are not its own any more.
func (p *Presence) lostLeases(d dirs) (map[string]lostLease, error) {
	p.mu.Lock()
	mine := maps.Clone(p.held)
	p.mu.Unlock()
	if len(mine) == 0 {
		return nil, nil
	}
	if err := d.leases.Refresh(); err != nil {
		return nil, unavailable(err)
	}
	lost := make(map[string]lostLease)
	for volume, l := range mine {
		why, err := p.lostTo(d, volume, l.generation)
		if err != nil {
			return nil, err
		}
		if why != "" {
			lost[volume] = lostLease{l.generation, why}
		}
	}
	return lost, nil
}

// lostTo says in words why a lease is not this host's any more, "" when it is.
func (p *Presence) lostTo(d dirs, volume string, generation uint64) (string, error) {
	dir, err := d.leases.Dir(volume)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "its lease was deleted", nil
	case misplaced(err):
		return "its lease was replaced by something else", nil
	case err != nil:
		return "", unavailable(err)
	}
	defer dir.Close()
	highest, rec, err := current(dir)
	switch {
	case errors.Is(err, errDamaged):
		return "its lease is damaged", nil
	case err != nil:
		return "", err
	case highest == 0, highest < generation:
		return "its lease was deleted", nil
	case rec.Host == p.cfg.ID && rec.State == held && (generation == highest || generation == anyGeneration):
		return "", nil
	case rec.State == free:
		return "another host had it meanwhile", nil
	}
	return fmt.Sprintf("host %s took it over", nameOf(rec)), nil
}
