package volume

import (
	"context"
	"errors"
	"fmt"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/engine"
)

// RestoreBegin makes a ready volume one that is restoring: CreateFill puts the backup,
// which the reference has been found to mean, in the place of its data, or of the paths
// in it if there are any. What is there stays as a snapshot called
// pre-restore-TIME. The volume is in nobody's use, on no host, which the caller sees
// to. When the backup cannot be restored the volume is broken, and Rollback to that
// snapshot makes it ready again.
func (r *Root) RestoreBegin(ctx context.Context, name, reference string, found backup.Backup, paths []string, progress func(engine.Progress)) (Record, Snapshot, error) {
	rec, err := r.ready(name)
	if err != nil {
		return Record{}, Snapshot{}, err
	}
	if r.Restore == nil {
		return Record{}, Snapshot{}, fault.Unavailable("volume %s: this Berth keeps no backups", name)
	}
	if err := r.unprotected(rec, "restored"); err != nil {
		return Record{}, Snapshot{}, err
	}
	rec, kept, err := r.restoreBegin(ctx, rec, Source{Backup: reference, Found: foundBackup(&found), Paths: paths}, progress)
	if err != nil {
		return Record{}, Snapshot{}, failed(fmt.Errorf("restore volume %s: %w", name, err))
	}
	return rec, kept, nil
}

func (r *Root) restoreBegin(ctx context.Context, rec Record, source Source, progress func(engine.Progress)) (Record, Snapshot, error) {
	if err := r.MakeRoom(ctx); err != nil {
		return rec, Snapshot{}, err
	}
	base, err := r.freeSnapshotName(rec, "pre-restore-"+r.timeName())
	if err != nil {
		return rec, Snapshot{}, err
	}
	kept, err := r.createSnapshot(ctx, rec, SnapshotOptions{Name: base, Trigger: BeforeRestore}, progress)
	if err != nil {
		return rec, kept, err
	}
	err = r.step(ctx, "restore.begin", rec.Name)
	if err == nil {
		rec, err = r.begin(ctx, rec, func(to *Record) error {
			if err := r.unprotected(*to, "restored"); err != nil {
				return err
			}
			source.Kept = kept.Name
			to.Phase, to.Source = Restoring, &source
			return nil
		})
	}
	if err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		return rec, kept, errors.Join(err, r.removeSnapshot(undo, rec, kept))
	}
	return rec, kept, nil
}

// fillInPlace replaces the data of a volume by a backup.
func (r *Root) fillInPlace(ctx context.Context, rec Record, progress func(engine.Progress)) (Record, error) {
	if r.Restore == nil {
		return Record{}, fault.Unavailable("this Berth keeps no backups")
	}
	// Without what is kept nothing is deleted.
	kept, err := r.hasSnapshot(ctx, rec, rec.Source.Kept)
	if err != nil {
		return Record{}, err
	}
	if !kept {
		return Record{}, gone("snapshot %s@%s, which keeps what was there before, is gone", rec.Name, rec.Source.Kept)
	}
	release, err := r.hold(ctx, rec)
	if err != nil {
		return Record{}, err
	}
	if len(rec.Source.Paths) > 0 {
		rec, err = r.restorePaths(ctx, rec, progress)
	} else {
		err = r.restoreOver(ctx, rec, progress)
	}
	if err := errors.Join(err, release()); err != nil {
		return Record{}, err
	}
	if err := r.step(ctx, "restore.ready", rec.Name); err != nil {
		return Record{}, err
	}
	_, before := r.keptBefore(rec)
	return r.advance(ctx, rec, func(now *Record) {
		now.Phase, now.Host = Ready, ""
		if len(now.Source.Paths) > 0 {
			now.Source = before // most of the data is what it was
		} else {
			now.Source.Kept = ""
		}
	})
}

// restoreOver empties the data and restores into it.
func (r *Root) restoreOver(ctx context.Context, rec Record, progress func(engine.Progress)) error {
	dst, err := r.openData(rec)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := r.step(ctx, "restore.empty", rec.Name); err != nil {
		return err
	}
	names, err := dst.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := dst.RemoveTree(ctx, name); err != nil {
			return err
		}
	}
	if err := r.step(ctx, "restore.data", rec.Name); err != nil {
		return err
	}
	return r.Restore(ctx, rec, dst, progress)
}

// GiveUpRestore marks a volume broken that is being restored in place, so that it can
// be rolled back to kept. undone tells that it need not be: its data is as it was, and
// kept is gone. The caller has ended this host's CreateFill of it.
func (r *Root) GiveUpRestore(ctx context.Context, name, kept string) (undone bool, err error) {
	rec, err := r.Record(name)
	if err != nil {
		return false, err
	}
	if rec.Phase == Restoring && rec.halfRestored() {
		if err := r.breakOff(ctx, rec, errGivenUp); err != nil {
			return false, err
		}
		if rec, err = r.Record(name); err != nil {
			return false, err
		}
	}
	if rec.Phase != Ready {
		return false, nil
	}
	_, err = r.snapshotOf(rec, kept)
	if errors.Is(err, ErrNoSnapshot) {
		return true, nil
	}
	return false, err
}

// errGivenUp is why a volume is broken whose restore was cancelled.
var errGivenUp = fault.Conflict("restoring was given up")
