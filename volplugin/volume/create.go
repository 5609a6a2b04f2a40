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
// nothing after Settle.
func (r *Root) Create(ctx context.Context, name string, spec options.Spec) (Record, error) {
	limit := time.Now().Add(patience)
	for {
		rec, err := r.Record(name)
		switch {
		case errors.Is(err, ErrNoRecord):
			rec, err = r.create(ctx, name, spec)
			if errors.Is(err, errTaken) {
				continue
			}
			return rec, failed(err)
		case errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
			return Record{}, r.unusable(name, err)
		case err != nil:
			return Record{}, err
		case rec.Phase == Ready:
			return rec, nil
		}
		if err := r.settleWithin(ctx, rec, limit); err != nil {
			return Record{}, failed(err)
		}
	}
}

// errTaken says that another host made the record first.
var errTaken = errors.New("taken")

func (r *Root) create(ctx context.Context, name string, spec options.Spec) (_ Record, err error) {
	adopted, err := r.Engine.Find(r.top, name)
	if err != nil {
		return Record{}, fmt.Errorf("create volume %s: %s in %s cannot become its data: %w", name, name, r.Path, reason(err))
	}
	rec := newRecord(name, r.Engine.Name(), r.Host, spec, adopted, r.Now())
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
	created, err := r.Engine.Create(r.top, name, engine.Attributes{UID: spec.UID, GID: spec.GID, Mode: spec.Mode})
	if err != nil {
		return Record{}, err
	}
	ready := rec
	if !created && !adopted {
		// The directory came up after Find looked: it is someone else's.
		ready.Adopted = true
		if spec.OnRemove == nil {
			ready.OnRemove = options.Keep
		}
	}
	if err := r.step(ctx, "create.ready", name); err != nil {
		return Record{}, err
	}
	ready.Phase, ready.Host = Ready, ""
	return ready, r.put(ctx, ready)
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
	if !rec.Adopted {
		if err := r.step(ctx, "undo.data", rec.Name); err != nil {
			return err
		}
		if err := errors.Join(r.Engine.Abandon(r.top, rec.Name), r.top.Sync()); err != nil {
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
		return r.settle(ctx, rec)
	}
	if time.Now().After(limit) {
		return fault.Conflict("volume %s: host %s is %s it for %s; if that host is gone, try again when that is %s", rec.Name, rec.Host, rec.Phase, age.Round(time.Second), staleAfter)
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
	case rec.Phase == Ready:
		return nil
	case rec.Host != r.Host:
		if stale, _, err := r.stale(rec); err != nil || !stale {
			return err
		}
	}
	return failed(r.settle(ctx, rec))
}

func (r *Root) settle(ctx context.Context, rec Record) error {
	if rec.Phase == Removing {
		return r.finishRemove(ctx, rec)
	}
	return r.undoCreate(ctx, rec)
}

// unusable words the refusal to change a volume whose record cannot be used.
func (r *Root) unusable(name string, err error) error {
	return fault.Unavailable("volume %s cannot be used, its data is untouched: %s/%s/%s/%s: %w", name, r.Path, metaName, volumesName, name+suffix, err)
}
