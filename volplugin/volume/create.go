package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/options"
)

const (
	// patience is how long a call waits for another host to finish what it has
	// begun with the same volume.
	patience = 5 * time.Second
	pollTime = 100 * time.Millisecond
	// staleAfter is the age of a step at which its host must be gone: every call
	// is over in less than a minute, and clocks of hosts that share files do not
	// differ by minutes.
	staleAfter = 10 * time.Minute
)

// Create makes the volume name, or takes over a directory of that name, and
// returns its record. An existing volume is returned as it is, whatever spec says.
// When it fails nothing of the volume is left, or, if this host dies meanwhile,
// nothing after Settle. Data that is made from something else is made before it
// returns, however long that takes; see CreateBegin for the other way.
func (r *Root) Create(ctx context.Context, name string, spec options.Spec) (Record, error) {
	rec, begun, err := r.CreateBegin(ctx, name, spec)
	if err != nil || !begun {
		return rec, err
	}
	return r.fillOrAbort(ctx, rec, nil)
}

// errTaken says that another host was faster.
var errTaken = fault.Conflict("another host was faster; try again")

// plan is the record that a new volume begins with.
func (r *Root) plan(ctx context.Context, p engine.Place, name string, spec options.Spec) (Record, choice, error) {
	to, err := r.choose(ctx, p, name, spec)
	if refusedData(err) {
		return Record{}, choice{}, fmt.Errorf("create volume %s: %s in %s cannot become its data: %w", name, name, r.Path, reason(err))
	}
	if err != nil {
		return Record{}, choice{}, fmt.Errorf("create volume %s: %w", name, err)
	}
	if _, given := spec.Given["exclusive"]; given && !spec.Exclusive && to.able.Exclusive {
		return Record{}, choice{}, fault.Invalid("option exclusive=%s: only one host at a time can have a volume of engine %s", asked(spec, "exclusive"), to.engine.Name())
	}
	rec := newRecord(name, r.Host, spec, to.found, r.Now())
	rec.Engine, rec.EngineReason = to.engine.Name(), to.reason
	rec.Exclusive = rec.Exclusive || to.able.Exclusive
	if !to.found {
		return rec, to, nil
	}
	// Data that a removal has kept gets its snapshots back.
	old, found, err := r.tomb(ctx, name)
	if err != nil {
		return Record{}, choice{}, failed(fmt.Errorf("create volume %s: %w", name, err))
	}
	if found && old.Engine == rec.Engine {
		rec.UUID = old.UUID
	}
	return rec, to, nil
}

func (r *Root) create(ctx context.Context, name string, spec options.Spec) (_ Record, err error) {
	p, err := r.place()
	if err != nil {
		return Record{}, err
	}
	rec, to, err := r.plan(ctx, p, name, spec)
	if err != nil {
		return Record{}, err
	}
	data, err := rec.Encode()
	if err != nil {
		return Record{}, err
	}
	if err := r.step(ctx, "create.claim", name); err != nil {
		return Record{}, err
	}
	if err := r.makeFile(ctx, r.volumes, name+suffix, data); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return Record{}, errTaken
		}
		return Record{}, fmt.Errorf("create volume %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			// The caller's time may be over; half a volume must not stay.
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
			defer cancel()
			err = errors.Join(fmt.Errorf("create volume %s: %w", name, err), r.undoCreate(undo, rec))
		}
	}()

	if err := r.step(ctx, "create.data", name); err != nil {
		return Record{}, err
	}
	created, err := to.engine.Create(ctx, p, rec.volume(), rec.attributes())
	if err != nil {
		return Record{}, err
	}
	ready := rec
	if created == rec.Adopted {
		// The directory came up after Find looked, or went with another host's volume.
		ready.Adopted = !created
		ready.OnRemove = onRemove(name, spec, ready.Adopted)
	}
	if err := r.step(ctx, "create.ready", name); err != nil {
		return Record{}, err
	}
	ready.Phase, ready.Host = Ready, ""
	if err := r.put(ctx, ready); err != nil {
		return ready, err
	}
	return ready, r.untomb(ctx, ready)
}

// undoCreate removes a volume that never became ready. The data goes first: left
// alone it would be adopted by a later Create. Data that has content is nobody's
// to remove and stays.
func (r *Root) undoCreate(ctx context.Context, rec Record) error {
	now, err := r.Record(rec.Name)
	if errors.Is(err, ErrNoRecord) {
		return nil
	}
	if err != nil {
		return err
	}
	if now.UUID != rec.UUID || now.Phase != Creating {
		return nil
	}
	eng, p, err := r.keeper(rec)
	if err != nil {
		return err
	}
	if !rec.Adopted {
		if err := r.step(ctx, "undo.data", rec.Name); err != nil {
			return err
		}
		if err := errors.Join(eng.Abandon(p, rec.volume()), r.top.Sync()); err != nil {
			return err
		}
	}
	if err := r.step(ctx, "undo.record", rec.Name); err != nil {
		return err
	}
	return r.drop(rec)
}

// settleWithin finishes or undoes what a host has begun with a volume and not
// brought to an end: at once if it was this host, which does one thing at a time,
// else when it is stale. Until then it waits for that host, at most up to limit.
func (r *Root) settleWithin(ctx context.Context, rec Record, limit time.Time) error {
	if rec.Host == r.Host {
		return r.settle(ctx, rec)
	}
	stale, age, err := r.stale(rec)
	if err != nil {
		return err
	}
	if stale {
		err := r.settle(ctx, rec)
		if errors.Is(err, errTaken) {
			return nil
		}
		return err
	}
	if time.Now().After(limit) {
		return fault.Conflict("%w for %s; if that host is gone, try again when that is %s", r.busy(rec), age.Round(time.Second), staleAfter)
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pollTime):
		return nil
	}
}

// stale tells whether a record was written so long ago that its host must be
// gone. A record that is gone is not stale.
func (r *Root) stale(rec Record) (bool, time.Duration, error) {
	stamp, err := r.volumes.Stat(rec.Name + suffix)
	if errors.Is(err, fs.ErrNotExist) {
		return false, 0, nil
	}
	if err != nil {
		return false, 0, err
	}
	age := r.Now().Sub(time.Unix(0, stamp.Mtime))
	return age > staleAfter, max(age, 0), nil
}

// Settle finishes or undoes what this host began with the volume and has not
// brought to an end, because it was killed. What other hosts have begun is left
// alone unless it is stale.
func (r *Root) Settle(ctx context.Context, name string) error {
	rec, err := r.Record(name)
	switch {
	case errors.Is(err, ErrNoRecord):
		return nil
	case err != nil:
		return err
	case rec.atRest():
		return nil
	case rec.Host != r.Host:
		if stale, _, err := r.stale(rec); err != nil || !stale {
			return err
		}
	}
	err = r.settle(ctx, rec)
	if errors.Is(err, errTaken) {
		return nil // by another host, which goes on with it
	}
	return failed(err)
}

// settle brings what was begun with a volume to an end, by this host or by one that
// is gone.
func (r *Root) settle(ctx context.Context, rec Record) error {
	stale, _, err := r.stale(rec)
	if err != nil {
		return err
	}
	if rec.Host != r.Host || stale {
		if rec, err = r.takeOver(ctx, rec); err != nil {
			return err
		}
	}
	switch rec.Phase {
	case Creating:
		return r.undoCreate(ctx, rec)
	case Removing:
		return r.finishRemove(ctx, rec)
	case Restoring:
		_, err := r.CreateFill(ctx, rec.Name, nil)
		return err
	case RollingBack:
		return r.settleRollback(ctx, rec)
	case Renaming:
		return r.settleRename(ctx, rec)
	case Ready, Broken, Purging:
	}
	return fault.Conflict("volume %s is %s", rec.Name, rec.Phase)
}

// unusable words the refusal to change a volume whose record cannot be used.
func (r *Root) unusable(name string, err error) error {
	return fault.Unavailable("volume %s cannot be used, its data is untouched: %s/%s/%s/%s: %w", name, r.Path, metaName, volumesName, name+suffix, err)
}
