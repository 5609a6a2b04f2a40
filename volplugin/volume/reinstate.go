package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/options"
)

// Claims lists the volumes whose removal, or whose way out of the trash, this host, or
// one that is gone, has begun and not brought to an end, by name, with the entry's
// UUID.
func (r *Root) Claims(ctx context.Context) (map[string]string, error) {
	ids, err := r.trashIDs()
	if err != nil {
		return nil, err
	}
	claims := map[string]string{}
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		rec, err := r.trashRecord(id)
		if err != nil {
			continue
		}
		if mine, err := r.mine(rec); err != nil || !mine || rec.Phase == Purging {
			continue
		}
		if rec.Phase == Restoring {
			claims[rec.RenameTo] = id
			continue
		}
		removed, err := r.removed(ctx, rec)
		if err != nil || !removed || rec.OnRemove == options.Keep {
			claims[rec.Name] = id
		}
	}
	return claims, nil
}

// mine tells whether this host is to go on with what was begun with an entry.
func (r *Root) mine(rec Record) (bool, error) {
	if rec.Host == r.Host {
		return true, nil
	}
	stamp, err := r.trash.Stat(rec.UUID + suffix)
	return err == nil && r.Now().Sub(time.Unix(0, stamp.Mtime)) > staleAfter, err
}

// SettleClaim brings what Claims listed to an end: a removal that was marked is
// finished, one that was only claimed has not begun.
func (r *Root) SettleClaim(ctx context.Context, name, id string) error {
	if err := r.Settle(ctx, name); err != nil {
		return err
	}
	rec, err := r.trashRecord(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return failed(err)
	}
	if rec.Phase == Restoring {
		if mine, err := r.mine(rec); err != nil || !mine {
			return failed(err)
		}
		return failed(r.settleRestore(ctx, rec))
	}
	if mine, err := r.mine(rec); err != nil || !mine || rec.Phase == Purging {
		return failed(err)
	}
	return failed(r.settleClaim(ctx, rec))
}

// settleClaim takes back the claim of a removal that was never marked, or whose data
// stays in its place. No host marks it meanwhile.
func (r *Root) settleClaim(ctx context.Context, rec Record) (err error) {
	release, err := r.claim(ctx, rec.Name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	present, err := r.Record(rec.Name)
	if err != nil && !errors.Is(err, ErrNoRecord) {
		return err
	}
	if err == nil && present.UUID == rec.UUID && present.Phase == Removing {
		return nil
	}
	if err := r.step(ctx, "claim.settle", rec.Name); err != nil {
		return err
	}
	return r.unclaim(rec)
}

// RestoreTrash takes a removed volume out of the trash, by its ID or as the newest of
// a name, with all it had: its snapshots, its options. It gets the name to, or its
// own if that is "". The error is a conflict when the name is taken.
func (r *Root) RestoreTrash(ctx context.Context, ref, to string) (Record, error) {
	rec, err := r.findTrash(ctx, ref)
	if err != nil {
		return Record{}, err
	}
	if to == "" {
		to = rec.Name
	}
	if err := CheckName(to); err != nil {
		return Record{}, err
	}
	if err := r.free(rec, to); err != nil {
		return Record{}, failed(fmt.Errorf("restore volume %s from the trash: %w", rec.Name, err))
	}
	rec, err = r.claimTrash(ctx, rec.UUID, func(now *Record) error {
		if now.Phase == Purging {
			return fault.Conflict("it is being deleted")
		}
		if now.Phase == Restoring {
			if mine, err := r.mine(*now); err != nil || !mine {
				return errors.Join(err, fault.Conflict("host %s is restoring it", now.Host))
			}
			if now.RenameTo != to {
				// This host was killed before it came to an end.
				return fault.Conflict("it is on its way to the name %s", now.RenameTo)
			}
		}
		now.Phase, now.Host, now.RenameTo = Restoring, r.Host, to
		return nil
	})
	if err == nil {
		rec, err = r.finishRestore(ctx, rec)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = fault.NotFound("it is not there any more")
	}
	if err != nil {
		return Record{}, failed(fmt.Errorf("restore volume %s from the trash: %w", ref, err))
	}
	return rec, nil
}

// free refuses a name that a volume, or data without a record, has.
func (r *Root) free(rec Record, name string) error {
	_, err := r.Record(name)
	switch {
	case errors.Is(err, ErrNoRecord):
	case err == nil, errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
		return fault.Conflict("there is a volume %s already", name)
	default:
		return err
	}
	eng, p, err := r.keeper(rec)
	if err != nil {
		return err
	}
	found, err := eng.Find(p, name)
	if err != nil && !refusedData(err) {
		return err
	}
	if found || err != nil {
		return fault.Conflict("there is something called %s in %s already", name, r.Path)
	}
	return nil
}

// claimTrash replaces the record of an entry of the trash by what fn makes of it, of
// all hosts alone.
func (r *Root) claimTrash(ctx context.Context, id string, fn func(*Record) error) (rec Record, err error) {
	release, err := r.claim(ctx, id)
	if err != nil {
		return Record{}, err
	}
	defer func() { err = errors.Join(err, release()) }()
	if rec, err = r.trashRecord(id); err != nil {
		return Record{}, err
	}
	if err := fn(&rec); err != nil {
		return Record{}, err
	}
	if err := r.step(ctx, "trash.change", rec.Name); err != nil {
		return Record{}, err
	}
	return rec, r.putTrash(ctx, rec)
}

// settleRestore goes on with what is on its way out of the trash, or gives it up if
// it has not begun.
func (r *Root) settleRestore(ctx context.Context, rec Record) error {
	present, err := r.Record(rec.RenameTo)
	if err != nil && !errors.Is(err, ErrNoRecord) {
		return err
	}
	if err == nil && present.UUID == rec.UUID {
		return r.settle(ctx, present)
	}
	return r.unrestore(ctx, rec)
}

// unrestore leaves an entry in the trash.
func (r *Root) unrestore(ctx context.Context, rec Record) error {
	_, err := r.claimTrash(ctx, rec.UUID, func(now *Record) error {
		if now.Phase == Restoring && now.RenameTo == rec.RenameTo {
			now.Phase, now.RenameTo = Removing, ""
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// finishRestore goes on from the entry that is marked as restoring: a record under
// the new name, then the data, then the entry goes, then the volume is ready.
func (r *Root) finishRestore(ctx context.Context, entry Record) (Record, error) {
	rec := entry
	rec.Name, rec.RenameTo, rec.RemovedAt = entry.RenameTo, "", nil
	rec.Phase, rec.Host = Restoring, r.Host
	source := Source{}
	if entry.Source != nil {
		source = *entry.Source
	}
	source.Trash = true
	rec.Source = &source
	data, err := rec.Encode()
	if err != nil {
		return Record{}, err
	}
	err = r.step(ctx, "restore.record", rec.Name)
	if err == nil {
		err = r.makeFile(ctx, r.volumes, rec.Name+suffix, data)
	}
	if errors.Is(err, fs.ErrExist) {
		present, errThere := r.Record(rec.Name)
		if errThere == nil && present.UUID == rec.UUID {
			err = nil
		} else {
			err = fault.Conflict("there is a volume %s already", rec.Name)
		}
	}
	if err == nil {
		rec, err = r.reinstate(ctx, rec)
	}
	if err != nil && !errors.Is(err, errTaken) {
		err = errors.Join(err, r.undoRestore(context.WithoutCancel(ctx), entry))
	}
	return rec, err
}

// reinstate is the part of finishRestore after the record.
func (r *Root) reinstate(ctx context.Context, rec Record) (Record, error) {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return rec, err
	}
	if err := r.step(ctx, "restore.data", rec.Name); err != nil {
		return rec, err
	}
	if err := eng.Reinstate(ctx, p, rec.volume()); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return rec, fault.Conflict("there is something called %s in %s already", rec.Name, r.Path)
		}
		return rec, reason(err)
	}
	found, err := eng.Find(p, rec.Name)
	if err != nil {
		return rec, err
	}
	if !found {
		return rec, fault.NotFound("its data is not in the trash")
	}
	if err := r.step(ctx, "restore.entry", rec.Name); err != nil {
		return rec, err
	}
	if err := r.trash.Remove(rec.UUID + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return rec, err
	}
	if err := r.trash.Sync(); err != nil {
		return rec, err
	}
	return r.advance(ctx, rec, func(now *Record) {
		now.Phase, now.Host, now.Source.Trash = Ready, "", false
		if now.Source.isZero() {
			now.Source = nil
		}
	})
}

// undoRestore leaves the volume in the trash if its data is there still.
func (r *Root) undoRestore(ctx context.Context, entry Record) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	eng, p, err := r.keeper(entry)
	if err != nil {
		return err
	}
	present, err := r.Record(entry.RenameTo)
	if err != nil && !errors.Is(err, ErrNoRecord) {
		return err
	}
	if err == nil && present.UUID == entry.UUID {
		if found, err := eng.Find(p, entry.RenameTo); err != nil || found {
			return err // Settle goes on with it
		}
		if err := r.drop(present); err != nil {
			return err
		}
	}
	return r.unrestore(ctx, entry)
}
