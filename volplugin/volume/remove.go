package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/options"
)

// Remove ends a volume: its data goes into the trash, or stays where it is when
// the volume says so, and its name is free. Unknown volumes are removed already.
// When it fails before the data has moved the volume is as it was; later failures
// are made good by Settle. If this host dies meanwhile, the volume is whole or
// removed after Settle and SettleClaim. One that is restoring or broken is gone
// without the trash; the caller has ended this host's CreateFill of it.
func (r *Root) Remove(ctx context.Context, name string) error {
	limit := time.Now().Add(patience)
	for {
		rec, err := r.Record(name)
		switch {
		case errors.Is(err, ErrNoRecord):
			return nil
		case errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
			return r.unusable(name, err)
		case err != nil:
			return err
		case rec.Phase == Ready:
			err := r.remove(ctx, rec)
			if errors.Is(err, errTaken) || errors.Is(err, errClaimed) && time.Now().Before(limit) {
				continue
			}
			return failed(err)
		case rec.Phase == Broken, rec.Phase == Restoring && rec.Host == r.Host:
			if err := r.abort(ctx, rec); err != nil {
				return failed(fmt.Errorf("remove volume %s: %w", name, err))
			}
			continue
		}
		if rec.Phase == Restoring {
			// Another host's: it is given up, not completed, when that host is gone.
			stale, _, err := r.stale(rec)
			if err == nil && stale {
				err = r.abort(ctx, rec)
				if err == nil || errors.Is(err, errTaken) {
					continue
				}
			}
			if err != nil {
				return failed(err)
			}
		}
		if err := r.settleWithin(ctx, rec, limit); err != nil {
			return failed(err)
		}
	}
}

func (r *Root) remove(ctx context.Context, rec Record) error {
	if err := r.unprotected(rec, "removed"); err != nil {
		return err
	}
	eng, p, err := r.keeper(rec)
	if err != nil {
		return err
	}
	if rec.OnRemove != options.Keep {
		// Refused before anything was changed.
		if _, err := eng.Find(p, rec.Name); err != nil {
			return fmt.Errorf("remove volume %s: %s in %s: %w", rec.Name, rec.Name, r.Path, reason(err))
		}
	}
	now := r.Now().UTC().Truncate(time.Second)
	ready := rec
	rec.Phase, rec.Host, rec.RemovedAt = Removing, r.Host, &now
	data, err := rec.Encode()
	if err != nil {
		return err
	}
	if err := r.step(ctx, "remove.claim", rec.Name); err != nil {
		return err
	}
	err = r.makeFile(ctx, r.trash, rec.UUID+suffix, data)
	if errors.Is(err, fs.ErrExist) {
		err = r.claimed(ctx, rec)
	}
	if err != nil {
		return fmt.Errorf("remove volume %s: %w", rec.Name, err)
	}
	// The claim is this host's. Nobody else removes this volume now, so its record
	// stays the same one; it may have gone before the claim.
	present, err := r.Record(rec.Name)
	if err != nil && !errors.Is(err, ErrNoRecord) {
		return errors.Join(err, r.unclaim(rec))
	}
	if err != nil || present.UUID != rec.UUID {
		// Removed by another host from end to end; its entry in the trash, if
		// any, was the one we met, and ours is a leftover.
		return errors.Join(r.unclaim(rec), errTaken)
	}
	err = r.step(ctx, "remove.mark", rec.Name)
	if err == nil {
		rec, err = r.begin(ctx, ready, func(to *Record) error {
			if err := r.unprotected(*to, "removed"); err != nil {
				return err
			}
			// What was set since it was read goes into the trash too.
			to.Phase, to.RemovedAt = Removing, &now
			return nil
		})
		if err != nil {
			return errors.Join(fmt.Errorf("remove volume %s: %w", ready.Name, err), r.undoRemove(ctx, ready))
		}
	}
	if err == nil {
		err = r.finishRemove(ctx, rec)
	}
	if err != nil {
		return fmt.Errorf("remove volume %s: %w", rec.Name, errors.Join(err, r.undoRemove(ctx, rec)))
	}
	return nil
}

// unprotected refuses what would lose data of a protected volume.
func (r *Root) unprotected(rec Record, what string) error {
	if !rec.Protect {
		return nil
	}
	return fault.Conflict("volume %s cannot be %s: it is protected (option protect=true); set protect=false first", rec.Name, what)
}

// errClaimed says that another host has begun to remove the volume.
var errClaimed = errors.New("claimed")

// claimed looks at a claim that was there already: one of this host is what it
// left when it was killed, and one that is stale is taken over. For another
// host's it waits a moment.
func (r *Root) claimed(ctx context.Context, rec Record) error {
	entry, err := r.trashRecord(rec.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return errTaken // taken back meanwhile
	}
	if err != nil {
		return err
	}
	if entry.Host == r.Host || r.Now().Sub(*entry.RemovedAt) > staleAfter {
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pollTime):
		return fault.Conflict("host %s is removing it since %s (%w)", entry.Host, entry.RemovedAt.Format(time.RFC3339), errClaimed)
	}
}

// unclaim takes a claim back, unless data came into the trash under it.
func (r *Root) unclaim(rec Record) error {
	if _, err := r.trash.Stat(rec.UUID); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := r.trash.Remove(rec.UUID + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return r.trash.Sync()
}

// reclaim makes the claim say what the record does, which may have been updated since
// the claim was made, or taken over.
func (r *Root) reclaim(ctx context.Context, rec Record) error {
	want, err := rec.Encode()
	if err != nil {
		return err
	}
	have, err := r.trash.ReadFile(rec.UUID+suffix, maxRecord)
	if err != nil && !errors.Is(err, fs.ErrNotExist) || bytes.Equal(have, want) {
		return err
	}
	return r.replaceFile(ctx, r.trash, rec.UUID+suffix, want)
}

// finishRemove goes on from the record that is marked as removing. Every part may
// have happened before. The record goes last, so that nobody makes a volume of
// that name while the old data is in its place.
func (r *Root) finishRemove(ctx context.Context, rec Record) error {
	if rec.OnRemove != options.Keep {
		if err := r.reclaim(ctx, rec); err != nil {
			return err
		}
		if err := r.step(ctx, "remove.move", rec.Name); err != nil {
			return err
		}
		if _, err := r.trash.Stat(rec.UUID); errors.Is(err, fs.ErrNotExist) {
			eng, p, err := r.keeper(rec)
			if err != nil {
				return err
			}
			if err := eng.Retire(ctx, p, rec.volume()); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
	}
	if rec.OnRemove == options.Keep {
		if err := r.bury(ctx, rec); err != nil {
			return err
		}
	}
	if err := r.step(ctx, "remove.drop", rec.Name); err != nil {
		return err
	}
	if err := r.drop(rec); err != nil {
		return err
	}
	if rec.OnRemove != options.Keep {
		return nil
	}
	if err := r.step(ctx, "remove.unclaim", rec.Name); err != nil {
		return err
	}
	return r.unclaim(rec)
}

// undoRemove makes the volume ready again when its data has not moved. Once it
// has, the removal is finished by Settle.
func (r *Root) undoRemove(ctx context.Context, rec Record) error {
	if _, err := r.trash.Stat(rec.UUID); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	present, err := r.Record(rec.Name)
	if err != nil && !errors.Is(err, ErrNoRecord) {
		return err
	}
	// Under another name meanwhile, the volume is not to be removed either.
	if err == nil && present.UUID == rec.UUID && present.Phase == Removing {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		present.Phase, present.Host, present.RemovedAt = Ready, "", nil
		if err := r.put(undo, present); err != nil {
			return err
		}
	}
	return r.unclaim(rec)
}
