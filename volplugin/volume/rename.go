package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
)

// Rename gives a volume that is in nobody's use another name. Its UUID and its
// snapshots stay. The error is a conflict when the name is taken; then, and whenever
// the data has not moved, the volume is as it was. If this host dies meanwhile Settle
// completes or undoes it.
func (r *Root) Rename(ctx context.Context, name, to string) (Record, error) {
	if err := CheckName(to); err != nil {
		return Record{}, err
	}
	rec, err := r.ready(name)
	if err != nil {
		return Record{}, err
	}
	if name == to {
		return rec, nil
	}
	if rec, err = r.rename(ctx, rec, to); err != nil {
		return Record{}, failed(fmt.Errorf("rename volume %s to %s: %w", name, to, err))
	}
	return rec, nil
}

func (r *Root) rename(ctx context.Context, rec Record, to string) (Record, error) {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return Record{}, err
	}
	if found, err := eng.Find(p, rec.Name); err != nil || !found {
		if now, errNow := r.Record(rec.Name); errors.Is(errNow, ErrNoRecord) || errNow == nil && (now.UUID != rec.UUID || now.Phase != Ready) {
			return Record{}, errTaken
		}
		if err == nil {
			err = missing{}
		}
		return Record{}, fmt.Errorf("its data in %s: %w", r.Path, reason(err))
	}
	if err := r.free(rec, to); err != nil {
		return Record{}, err
	}
	if err := r.step(ctx, "rename.begin", rec.Name); err != nil {
		return Record{}, err
	}
	rec, err = r.begin(ctx, rec, func(old *Record) error {
		old.Phase, old.RenameTo = Renaming, to
		return nil
	})
	if err != nil {
		return Record{}, err
	}
	next, err := r.finishRename(ctx, rec)
	if err != nil {
		return Record{}, errors.Join(err, r.undoRename(ctx, rec))
	}
	return next, nil
}

// finishRename goes on from the old name's record, which says what the new name is: a
// record under the new name, then the data, then the new record is ready, then the old
// one goes. Every part may have happened before.
func (r *Root) finishRename(ctx context.Context, old Record) (Record, error) {
	eng, p, err := r.keeper(old)
	if err != nil {
		return Record{}, err
	}
	next := old
	next.Name, next.RenameTo, next.RenameFrom, next.Host = old.RenameTo, "", old.Name, r.Host
	data, err := next.Encode()
	if err != nil {
		return Record{}, err
	}
	if err := r.step(ctx, "rename.record", old.Name); err != nil {
		return Record{}, err
	}
	err = r.makeFile(ctx, r.volumes, next.Name+suffix, data)
	if errors.Is(err, fs.ErrExist) {
		present, errThere := r.Record(next.Name)
		if errThere != nil || present.UUID != old.UUID {
			return Record{}, fault.Conflict("there is a volume %s already", next.Name)
		}
		next, err = present, nil
	}
	if err != nil {
		return Record{}, err
	}
	if next.Phase == Renaming {
		if next, err = r.renameData(ctx, eng, p, old, next); err != nil {
			return Record{}, err
		}
	}
	if err := r.step(ctx, "rename.drop", old.Name); err != nil {
		return Record{}, err
	}
	return next, r.drop(old)
}

// renameData moves the data and makes the new record ready.
func (r *Root) renameData(ctx context.Context, eng engine.Engine, p engine.Place, old, next Record) (Record, error) {
	there, err := eng.Find(p, old.Name)
	if err != nil {
		return next, err
	}
	moved, err := eng.Find(p, next.Name)
	if err != nil {
		return next, err
	}
	if there && moved {
		return next, fault.Conflict("there is something called %s in %s already", next.Name, r.Path)
	}
	if !there && !moved {
		return next, missing{}
	}
	if there {
		if err := r.step(ctx, "rename.data", old.Name); err != nil {
			return next, err
		}
		if err := eng.Rename(ctx, p, old.volume(), next.Name); err != nil {
			return next, reason(err)
		}
	}
	if err := r.step(ctx, "rename.ready", old.Name); err != nil {
		return next, err
	}
	if next.Host != r.Host {
		// Of the host from which this one has taken the old name over.
		if next, err = r.takeOver(ctx, next); err != nil {
			return next, err
		}
	}
	return r.advance(ctx, next, func(now *Record) { now.Phase, now.Host, now.RenameFrom = Ready, "", "" })
}

// undoRename makes the volume ready under its old name, if its data is still there.
func (r *Root) undoRename(ctx context.Context, rec Record) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	eng, p, err := r.keeper(rec)
	if err != nil {
		return err
	}
	there, err := eng.Find(p, rec.Name)
	if err != nil || !there {
		return err
	}
	next, err := r.Record(rec.RenameTo)
	if err == nil && next.UUID == rec.UUID {
		if err := r.step(ctx, "rename.undo", rec.Name); err != nil {
			return err
		}
		err = r.drop(next)
	}
	if err != nil && !errors.Is(err, ErrNoRecord) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
		return err
	}
	_, err = r.advance(ctx, rec, func(now *Record) { now.Phase, now.Host, now.RenameTo = Ready, "", "" })
	return err
}

// settleRename goes on with a rename whose host was killed, from either record.
func (r *Root) settleRename(ctx context.Context, rec Record) error {
	if rec.RenameFrom != "" {
		old, err := r.Record(rec.RenameFrom)
		switch {
		case err == nil && old.UUID == rec.UUID && old.Phase == Renaming:
			return r.settle(ctx, old)
		case err == nil && old.UUID == rec.UUID:
			// The old name is ready: the rename was undone.
			return r.drop(rec)
		case err != nil && !errors.Is(err, ErrNoRecord):
			return err
		}
		_, err = r.advance(ctx, rec, func(now *Record) { now.Phase, now.Host, now.RenameFrom = Ready, "", "" })
		return err
	}
	_, err := r.finishRename(ctx, rec)
	if err == nil || ctx.Err() != nil || errors.Is(err, errTaken) {
		return err
	}
	if undo := r.undoRename(ctx, rec); undo != nil {
		return errors.Join(err, undo)
	}
	present, errNow := r.Record(rec.Name)
	if errNow == nil && present.Phase == Ready {
		return nil
	}
	return errors.Join(err, errNow)
}
