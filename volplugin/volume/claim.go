package volume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/google/uuid"

	"github.com/berth-plugin/berth/shared/fault"
)

// claimPrefix begins the names of claims in tmp. What begins with a UUID is an engine's.
const claimPrefix = "claim."

// A claim is the right to replace the record of a volume that several hosts may
// want to change. It is held for the time of that one step only: what takes long is
// then guarded by the phase in the record.
type claim struct {
	Host    string    `json:"host"`
	Process string    `json:"process"`
	At      time.Time `json:"at"`
}

// process is this one, unlike any before it on this host.
var process = uuid.NewString()

// claim takes the claim on key, a volume's name or the UUID of an entry of the
// trash, and waits for another host, or another goroutine, that has it. One of another
// process of this host was left when that was killed.
func (r *Root) claim(ctx context.Context, key string) (release func() error, err error) {
	limit := time.Now().Add(patience)
	data, err := json.Marshal(claim{Host: r.Host, Process: process, At: r.Now().UTC()})
	if err != nil {
		return nil, err
	}
	for {
		err := r.makeFile(ctx, r.tmp, claimPrefix+key, data)
		if err == nil {
			return func() error {
				if err := r.tmp.Remove(claimPrefix + key); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				return nil
			}, nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		holder, broken, err := r.breakClaim(key)
		switch {
		case err != nil:
			return nil, err
		case broken:
			continue
		case time.Now().After(limit):
			return nil, fault.Conflict("volume %s: host %s is changing it; try again", key, holder)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(pollTime):
		}
	}
}

// breakClaim removes a claim whose holder is gone, or tells whose it is.
func (r *Root) breakClaim(key string) (holder string, broken bool, err error) {
	name := claimPrefix + key
	stamp, err := r.tmp.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", true, nil
	}
	if err != nil {
		return "", false, err
	}
	var c claim
	data, err := r.tmp.ReadFile(name, maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return "", true, nil
	}
	if err != nil {
		return "", false, err
	}
	_ = json.Unmarshal(data, &c) // a damaged one is broken when it is old
	alive := c.Host != r.Host || c.Process == process
	if alive && r.Now().Sub(time.Unix(0, stamp.Mtime)) < staleAfter {
		return c.Host, false, nil
	}
	// Taken away under a name of its own, so that a new claim that came meanwhile
	// is noticed and given back.
	away := uuid.NewString()
	if err := r.tmp.Rename(name, r.tmp, away); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", true, nil
		}
		return "", false, err
	}
	taken, err := r.tmp.Stat(away)
	if err == nil && taken.Ino != stamp.Ino {
		err = r.tmp.Link(away, r.tmp, name)
	}
	return "", true, errors.Join(err, r.tmp.Remove(away))
}

// change replaces the record of a volume by what fn makes of it. Of all hosts only
// this one does, from the moment that fn sees the record. An error of fn is returned
// as it is and leaves the record.
func (r *Root) change(ctx context.Context, name string, fn func(*Record) error) (rec Record, err error) {
	release, err := r.claim(ctx, name)
	if err != nil {
		return Record{}, err
	}
	defer func() { err = errors.Join(err, release()) }()
	rec, err = r.Record(name)
	if err != nil {
		return Record{}, err
	}
	if err := fn(&rec); err != nil {
		return Record{}, err
	}
	if err := r.step(ctx, "record.change", name); err != nil {
		return Record{}, err
	}
	return rec, r.put(ctx, rec)
}

// begin takes a ready volume into another phase. It is what an operation on a volume
// begins with: from then on no other host touches it until the record is old.
func (r *Root) begin(ctx context.Context, rec Record, fn func(*Record) error) (Record, error) {
	now, err := r.change(ctx, rec.Name, func(now *Record) error {
		if now.UUID != rec.UUID {
			return errTaken
		}
		if now.Phase != Ready && (now.Phase != Broken || rec.Phase != Broken) {
			return r.busy(*now)
		}
		now.Host = r.Host
		return fn(now)
	})
	if errors.Is(err, ErrNoRecord) {
		err = errTaken
	}
	return now, err
}

// takeOver makes this host the one that goes on with what was begun with a volume
// and not ended. The error is errTaken when another host was faster.
func (r *Root) takeOver(ctx context.Context, rec Record) (Record, error) {
	now, err := r.change(ctx, rec.Name, func(now *Record) error {
		if now.UUID != rec.UUID || now.Phase != rec.Phase || now.Host != rec.Host {
			return errTaken
		}
		if now.Host != r.Host {
			stale, _, err := r.stale(*now)
			if err != nil {
				return err
			}
			if !stale {
				return errTaken
			}
		}
		now.Host = r.Host
		return nil
	})
	if errors.Is(err, ErrNoRecord) {
		err = errTaken
	}
	return now, err
}

// advance takes a volume that this host works on into its next phase, unless another
// host has taken it over.
func (r *Root) advance(ctx context.Context, rec Record, fn func(*Record)) (Record, error) {
	now, err := r.change(ctx, rec.Name, func(now *Record) error {
		if now.UUID != rec.UUID || now.Phase != rec.Phase || now.Host != r.Host {
			return errTaken
		}
		fn(now)
		return nil
	})
	if errors.Is(err, ErrNoRecord) {
		err = errTaken
	}
	return now, err
}

// busy words the refusal to do anything with a volume that is not ready.
func (r *Root) busy(rec Record) error {
	switch rec.Phase {
	case Ready:
		return nil
	case Broken:
		if rec.halfRestored() {
			return fault.Conflict("volume %s is broken: %s", rec.Name, rec.Reason)
		}
		return fault.Conflict("volume %s is broken: %s; remove it", rec.Name, rec.Reason)
	case Renaming:
		if rec.RenameFrom != "" {
			return fault.Conflict("volume %s: host %s is renaming it from %s", rec.Name, rec.Host, rec.RenameFrom)
		}
		return fault.Conflict("volume %s: host %s is renaming it to %s", rec.Name, rec.Host, rec.RenameTo)
	case RollingBack:
		return fault.Conflict("volume %s: host %s is rolling it back to %s", rec.Name, rec.Host, rec.Rollback.Snapshot)
	case Creating, Restoring, Removing, Purging:
	}
	return fault.Conflict("volume %s: host %s is %s it", rec.Name, rec.Host, rec.Phase)
}

// ready reads the record of a volume that can be worked with.
func (r *Root) ready(name string) (Record, error) {
	rec, err := r.Record(name)
	switch {
	case errors.Is(err, ErrNoRecord):
		return rec, r.noVolume(name)
	case errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
		return rec, r.unusable(name, err)
	case err != nil:
		return rec, err
	}
	return rec, r.busy(rec)
}

// Update changes what is recorded about how a volume is used: its protection, trash,
// schedule, options of mounts, labels. fn sees the record as it is now and no other
// host changes it meanwhile; its error is returned as it is and nothing is changed.
// What the volume is, and where, fn must leave as it is.
func (r *Root) Update(ctx context.Context, name string, fn func(*Record) error) (Record, error) {
	if _, err := r.ready(name); err != nil {
		return Record{}, err
	}
	rec, err := r.change(ctx, name, func(rec *Record) error {
		if err := r.busy(*rec); err != nil {
			return err
		}
		before := *rec
		if err := fn(rec); err != nil {
			return err
		}
		if rec.UUID != before.UUID || rec.Name != before.Name || rec.Engine != before.Engine || rec.Phase != before.Phase ||
			rec.Host != before.Host || !rec.CreatedAt.Equal(before.CreatedAt) {
			return errors.New("what a volume is cannot be updated")
		}
		if err := rec.check(); err != nil {
			return fault.Invalid("volume %s: %w", name, err)
		}
		return nil
	})
	if errors.Is(err, ErrNoRecord) {
		err = r.noVolume(name)
	}
	if err != nil {
		return Record{}, failed(fmt.Errorf("update volume %s: %w", name, err))
	}
	return rec, nil
}
