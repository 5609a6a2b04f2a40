package presence

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

const (
	// maxLease bounds a lease's file.
	maxLease = 64 << 10
	// maxGeneration is far from overflow, and no file that Berth wrote has it.
	maxGeneration = 1 << 53
	// attempts are how often Acquire looks again because others were at it too.
	attempts = 10
)

// leaseRecord is the file of one generation. Only the host that made it changes it.
type leaseRecord struct {
	Schema int    `json:"schema"`
	Host   string `json:"host"`
	Name   string `json:"name"`
	// Made tells this file from others of its generation, which another host may
	// have been faster to make.
	Made  string    `json:"made"`
	State state     `json:"state"`
	Since time.Time `json:"since"`
	// From is whom it is taken from, in state taking.
	From *previous `json:"from,omitempty"`
}

type state string

// The states of a lease's file.
const (
	held state = "held"
	// taking: made, but not looked yet whether the dead owner is alive after all. To
	// the owner it is lost already.
	taking state = "taking"
	free   state = "free"
)

// previous is the owner that was judged dead, and its file when it was.
type previous struct {
	File  string       `json:"file"`
	Stamp rooted.Stamp `json:"stamp"`
}

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

type lostLease struct {
	generation uint64
	why        string
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

// current reads the highest generation, 0 when there is none. An error that wraps
// errDamaged comes with the generation.
func current(dir *rooted.Dir) (uint64, leaseRecord, error) {
	for range attempts {
		if err := dir.Refresh(); err != nil {
			return 0, leaseRecord{}, unavailable(err)
		}
		names, err := dir.Names()
		if err != nil {
			return 0, leaseRecord{}, unavailable(err)
		}
		var highest uint64
		for _, name := range names {
			if g, ok := parseLeaseName(name); ok {
				highest = max(highest, g)
			}
		}
		if highest == 0 {
			return 0, leaseRecord{}, nil
		}
		rec, err := readLease(dir, leaseName(highest))
		if errors.Is(err, fs.ErrNotExist) {
			continue // a higher one is there by now, or it was withdrawn
		}
		if err != nil && !errors.Is(err, errDamaged) {
			err = unavailable(err)
		}
		return highest, rec, err
	}
	return 0, leaseRecord{}, fault.Unavailable("the lease in %s changes while it is read, over and over", dir.Path())
}

func readLease(dir *rooted.Dir, name string) (leaseRecord, error) {
	data, err := dir.ReadFile(name, maxLease)
	if errors.Is(err, rooted.ErrNotFile) || errors.Is(err, rooted.ErrSymlink) || errors.Is(err, rooted.ErrTooLarge) {
		return leaseRecord{}, fmt.Errorf("%w: %w", err, errDamaged)
	}
	if err != nil {
		return leaseRecord{}, err
	}
	rec, err := decodeLease(data)
	if err != nil {
		return leaseRecord{}, fmt.Errorf("%s/%s %w", dir.Path(), name, err)
	}
	return rec, nil
}

// decodeLease gives errors that wrap errDamaged.
func decodeLease(data []byte) (leaseRecord, error) {
	var rec leaseRecord
	if err := json.Unmarshal(data, &rec); err != nil {
		return leaseRecord{}, fmt.Errorf("%w: %w", errDamaged, err)
	}
	known := rec.State == held || rec.State == free || rec.State == taking && rec.From != nil && isFileName(rec.From.File)
	if rec.Schema != schema || rec.Host == "" || rec.Made == "" || !known {
		return leaseRecord{}, fmt.Errorf("%w or was written by a newer Berth", errDamaged)
	}
	return rec, nil
}

func encode(rec leaseRecord) ([]byte, error) {
	data, err := json.Marshal(rec)
	if err != nil {
		return nil, fmt.Errorf("encode lease: %w", err)
	}
	return append(data, '\n'), nil
}

func leaseName(generation uint64) string { return strconv.FormatUint(generation, 10) + suffix }

// parseLeaseName takes the one form that leaseName writes.
func parseLeaseName(name string) (uint64, bool) {
	number, ok := strings.CutSuffix(name, suffix)
	if !ok {
		return 0, false
	}
	g, err := strconv.ParseUint(number, 10, 64)
	return g, err == nil && g > 0 && leaseName(g) == name
}

func nameOf(rec leaseRecord) string { return cmp.Or(rec.Name, rec.Host) }
