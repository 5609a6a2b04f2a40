package presence

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/google/uuid"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// attempts are how often Acquire looks again because others were at it too.
const attempts = 10

// A Lease is what is known of who may use a volume that only one host can have.
type Lease struct {
	// Generation grows each time the lease is taken; 0 when it never was.
	Generation uint64
	// Host and Name of the owner, "" when nobody has it.
	Host, Name string
	// Mine: this host is the owner.
	Mine bool
	// Since when, by the owner's clock.
	Since time.Time
	// Alive, Stopped and Silent are those of the owner as in Host.
	Alive, Stopped bool
	Silent         time.Duration
	// Unreadable: the file is damaged or of a newer Berth. Somebody may have it.
	Unreadable bool
}

// Acquire takes the volume's lease for this host, or finds that this host has it
// already, as after a restart. It is taken when nobody has it, and when its owner is
// dead; else the error is a conflict that says in words who has it and what can
// be done. force takes it from a living owner, which is told so at its next
// heartbeat, up to 15 seconds later: until then both may write.
//
// Run must be running, or the lease ends when the others take this host for dead.
func (p *Presence) Acquire(ctx context.Context, volume string, force bool) (Lease, error) {
	if err := checkUUID(volume); err != nil {
		return Lease{}, err
	}
	if err := p.fresh(ctx); err != nil {
		return Lease{}, err
	}
	p.mu.Lock()
	copied := p.foreign >= twice
	p.mu.Unlock()
	if copied {
		return Lease{}, fault.Conflict("another host calls itself %q, and would take this host's leases for its own: is this machine a copy of it? Each needs a state file of its own", p.cfg.ID)
	}
	unlock, err := p.lease(ctx)
	if err != nil {
		return Lease{}, err
	}
	defer unlock()
	d, err := p.open(ctx)
	if err != nil {
		return Lease{}, err
	}
	defer d.Close()
	p.mu.Lock()
	delete(p.releasing, volume)
	p.mu.Unlock()
	for range attempts {
		if err := ctx.Err(); err != nil {
			return Lease{}, unavailable(err)
		}
		l, err := p.acquire(d, volume, force)
		if errors.Is(err, errAgain) {
			continue
		}
		if err != nil {
			return Lease{}, err
		}
		p.mu.Lock()
		p.held[volume] = lease{generation: l.Generation}
		p.mu.Unlock()
		p.rouse()
		return l, nil
	}
	return Lease{}, fault.Conflict("several hosts try to take the volume at once; try again")
}

// Resume takes the lease of a volume that an earlier process of this host has left
// attached, if it is this host's still. Otherwise lost says in words why it is not, as
// Changed would have said.
func (p *Presence) Resume(ctx context.Context, volume string) (lost string, err error) {
	if err := checkUUID(volume); err != nil {
		return "", err
	}
	if p.Holds(volume) {
		return "", nil
	}
	d, err := p.open(ctx)
	if err != nil {
		return "", err
	}
	defer d.Close()
	if err := d.leases.Refresh(); err != nil {
		return "", unavailable(err)
	}
	if lost, err = p.lostTo(d, volume, anyGeneration); err != nil || lost != "" {
		return lost, err
	}
	_, err = p.Acquire(ctx, volume, false)
	return "", err
}

// Holds tells whether this process has the volume's lease, as far as it knows: it does no
// I/O.
func (p *Presence) Holds(volume string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.held[volume]
	return ok
}

// anyGeneration is for those who do not know which generation they had.
const anyGeneration = 0

// errAgain says that what was read is no longer so.
var errAgain = errors.New("again")

// lease waits for the place in which leases are changed.
func (p *Presence) lease(ctx context.Context) (unlock func(), err error) {
	select {
	case p.leasing <- struct{}{}:
		return func() { <-p.leasing }, nil
	case <-ctx.Done():
		return nil, unavailable(fmt.Errorf("an earlier request has not ended: %w", ctx.Err()))
	}
}

// acquire tries once.
func (p *Presence) acquire(d dirs, volume string, force bool) (Lease, error) {
	dir, err := ensure(d.leases, volume)
	if errors.Is(err, fs.ErrNotExist) {
		return Lease{}, errAgain // dropped this moment
	}
	if err != nil {
		return Lease{}, unavailable(err)
	}
	defer dir.Close()
	generation, rec, err := current(dir)
	switch {
	case errors.Is(err, errDamaged):
		if !force {
			return Lease{}, fault.Conflict("%w, and a host may have the volume: when none has, take it by force", err)
		}
		return p.take(d, dir, generation+1, nil)
	case err != nil:
		return Lease{}, err
	case generation == 0, rec.State == free:
		return p.take(d, dir, generation+1, nil)
	case rec.Host == p.cfg.ID && rec.State == taking:
		return p.confirm(d, dir, generation, rec)
	case rec.Host == p.cfg.ID:
		p.mu.Lock()
		mine := p.held[volume].generation == generation
		p.mu.Unlock()
		if mine {
			return p.owned(generation, rec), nil
		}
		// An earlier process's. What that one has begun, and a file server carries out
		// late, must not touch this one's.
		return p.take(d, dir, generation+1, nil)
	case force:
		return p.take(d, dir, generation+1, nil)
	}
	file := fileName(rec.Host)
	dead, silent, stamp := p.judge(file)
	if !dead {
		return Lease{}, fault.Conflict("host %s has it, and gave a sign of life %s ago; it is taken over when that host has been silent for %s, or by force", nameOf(rec), silent.Round(time.Second), deadAfter)
	}
	owner, err := readHost(d.hosts, file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return Lease{}, fault.Conflict("host %s has it, was last heard of %s ago, and what it has left cannot be read (%w); it is taken over by force only", nameOf(rec), silent.Round(time.Second), err)
	case owner.Stopped:
		return Lease{}, fault.Conflict("host %s has it, and its Berth was ended %s ago while containers may have gone on with it; when they have not, take it over by force", nameOf(rec), silent.Round(time.Second))
	}
	return p.take(d, dir, generation+1, &previous{File: file, Stamp: stamp})
}

// take makes the given generation this host's.
func (p *Presence) take(d dirs, dir *rooted.Dir, generation uint64, from *previous) (Lease, error) {
	if generation > maxGeneration {
		return Lease{}, fault.Conflict("the lease in %s is damaged: its generation cannot be followed by another", dir.Path())
	}
	rec := leaseRecord{Schema: schema, Host: p.cfg.ID, Name: p.cfg.Name, Made: uuid.NewString(), State: held, Since: p.cfg.Now().UTC().Truncate(time.Second), From: from}
	if from != nil {
		rec.State = taking
	}
	data, err := encode(rec)
	if err != nil {
		return Lease{}, err
	}
	name := leaseName(generation)
	if err := d.tmp.WriteNew(rec.Made, data, 0o600); err != nil {
		return Lease{}, unavailable(err)
	}
	err = p.step("lease.link")
	if err == nil {
		err = d.tmp.Link(rec.Made, dir, name)
	}
	if errRemove := d.tmp.Remove(rec.Made); err == nil && errRemove != nil && !errors.Is(errRemove, fs.ErrNotExist) {
		err = errRemove
	}
	switch {
	case errors.Is(err, fs.ErrExist):
		// A file server may carry out a call twice when its first answer was lost. Then
		// it is ours.
		if there, errRead := readLease(dir, name); errRead != nil || there.Made != rec.Made {
			return Lease{}, errAgain
		}
	case errors.Is(err, fs.ErrNotExist):
		return Lease{}, errAgain // the directory was dropped
	case err != nil:
		return Lease{}, unavailable(err)
	}
	if err := p.step("lease.check"); err != nil {
		return Lease{}, err
	}
	if err := dir.Sync(); err != nil {
		return Lease{}, unavailable(err)
	}
	// Who was slow may have made a generation that was used and deleted before.
	highest, now, err := current(dir)
	if err != nil && !errors.Is(err, errDamaged) {
		return Lease{}, err
	}
	if highest != generation || now.Made != rec.Made {
		return Lease{}, p.withdraw(dir, generation, rec)
	}
	return p.confirm(d, dir, generation, rec)
}

// confirm completes what take has begun, as this or an earlier process.
func (p *Presence) confirm(d dirs, dir *rooted.Dir, generation uint64, rec leaseRecord) (Lease, error) {
	if rec.State == taking && rec.From != nil {
		if err := d.hosts.Refresh(); err != nil {
			return Lease{}, unavailable(err)
		}
		stamp, err := stampOf(d.hosts, rec.From.File)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return Lease{}, unavailable(err)
		}
		if stamp != rec.From.Stamp {
			// The owner is back. It may have seen that it lost, or not.
			p.mu.Lock()
			p.seeLocked(rec.From.File, stamp, p.cfg.boot())
			p.mu.Unlock()
			return Lease{}, p.withdraw(dir, generation, rec)
		}
		rec.State, rec.From = held, nil
		data, err := encode(rec)
		if err != nil {
			return Lease{}, err
		}
		if err := p.replace(d, dir, leaseName(generation), data, "lease.confirm"); err != nil {
			return Lease{}, unavailable(err)
		}
	}
	clean(dir, generation)
	return p.owned(generation, rec), nil
}

// withdraw deletes a generation that this host made and does not want. It gives the
// error to go on with.
func (p *Presence) withdraw(dir *rooted.Dir, generation uint64, rec leaseRecord) error {
	if err := p.step("lease.withdraw"); err != nil {
		return err
	}
	name := leaseName(generation)
	there, err := readLease(dir, name)
	if errors.Is(err, fs.ErrNotExist) {
		return errAgain
	}
	if err != nil || there.Made != rec.Made {
		return errAgain
	}
	if err := dir.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return unavailable(err)
	}
	return errAgain
}

// clean deletes the generations below one. What it cannot delete is no harm.
func clean(dir *rooted.Dir, generation uint64) {
	names, err := dir.Names()
	if err != nil {
		return
	}
	for _, name := range names {
		if g, ok := parseLeaseName(name); ok && g < generation {
			_ = dir.Remove(name)
		}
	}
}
