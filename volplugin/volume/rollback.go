package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
)

// RolledBack tells how a rollback went.
type RolledBack struct {
	Record Record
	// Kept is the snapshot of what was there before.
	Kept Snapshot
	// Copy of the snapshot into the volume.
	Copy engine.Copy
}

// Rollback puts a copy of a snapshot in the place of a volume's data; what was there
// becomes a snapshot called pre-rollback-TIME. The volume is in nobody's use, on no
// host, which the caller sees to. When it fails, or ctx ends, before the data was
// exchanged, the volume is as it was. If this host dies meanwhile Settle completes it.
func (r *Root) Rollback(ctx context.Context, name, snapshot string, progress func(engine.Progress)) (RolledBack, error) {
	rec, err := r.rollable(name)
	if err != nil {
		return RolledBack{}, err
	}
	if err := r.unprotected(rec, "rolled back"); err != nil {
		return RolledBack{}, err
	}
	snap, err := r.snapshotOf(rec, snapshot)
	if err != nil {
		return RolledBack{}, err
	}
	if err := snap.whole(name); err != nil {
		return RolledBack{}, err
	}
	done, err := r.rollback(ctx, rec, snapshot, progress)
	if err != nil {
		return RolledBack{}, failed(fmt.Errorf("roll volume %s back to %s: %w", name, snapshot, err))
	}
	return done, nil
}

func (r *Root) rollback(ctx context.Context, rec Record, snapshot string, progress func(engine.Progress)) (RolledBack, error) {
	if err := r.MakeRoom(ctx); err != nil {
		return RolledBack{}, err
	}
	keep, err := r.freeSnapshotName(rec, "pre-rollback-"+r.timeName())
	if err != nil {
		return RolledBack{}, err
	}
	if err := r.step(ctx, "rollback.begin", rec.Name); err != nil {
		return RolledBack{}, err
	}
	rec, err = r.begin(ctx, rec, func(to *Record) error {
		if err := r.unprotected(*to, "rolled back"); err != nil {
			return err
		}
		// Nobody removes the snapshot from here on.
		snap, err := r.snapshotOf(*to, snapshot)
		if err == nil {
			err = snap.whole(to.Name)
		}
		if err != nil {
			return err
		}
		to.Phase, to.Rollback = RollingBack, &Rollback{Snapshot: snapshot, Keep: keep}
		return nil
	})
	if err != nil {
		return RolledBack{}, err
	}
	done, err := r.finishRollback(ctx, rec, progress)
	if err != nil {
		return done, errors.Join(err, r.undoRollback(ctx, rec))
	}
	return done, nil
}

// freeSnapshotName adds a number to a name that is taken.
func (r *Root) freeSnapshotName(rec Record, base string) (string, error) {
	list, err := r.snapshotEntries(rec)
	if err != nil {
		return "", err
	}
	taken := map[string]bool{}
	for _, entry := range list {
		taken[entry.Name] = true
	}
	name := base
	for n := 2; taken[name]; n++ {
		name = fmt.Sprintf("%s-%d", base, n)
	}
	return name, nil
}

// finishRollback goes on from the record that says what is rolled back to what. Every
// part may have happened before.
func (r *Root) finishRollback(ctx context.Context, rec Record, progress func(engine.Progress)) (done RolledBack, err error) {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return done, err
	}
	dir, err := r.ensureSnapshots(rec.UUID)
	if err != nil {
		return done, err
	}
	defer dir.Close()
	keep := Snapshot{
		Schema: snapshotSchema, Name: rec.Rollback.Keep, UUID: rec.UUID, Volume: rec.Name, Engine: rec.Engine,
		CreatedAt: r.Now().UTC().Truncate(time.Second), Phase: Creating, Host: r.Host, Trigger: BeforeRollback,
		Source: rec.madeFrom(),
	}
	data, err := keep.Encode()
	if err != nil {
		return done, err
	}
	if err := r.step(ctx, "rollback.keep", rec.Name); err != nil {
		return done, err
	}
	err = r.makeFile(ctx, dir, keep.Name+suffix, data)
	if errors.Is(err, fs.ErrExist) {
		there, errThere := readSnapshot(dir, rec.UUID, keep.Name)
		if errThere != nil || there.Trigger != BeforeRollback {
			return done, errors.Join(fault.Conflict("there is a snapshot %s already", keep.Name), errThere)
		}
		keep, err = there, nil // of the attempt that was interrupted
	}
	if err != nil {
		return done, err
	}
	if err := r.step(ctx, "rollback.data", rec.Name); err != nil {
		return done, err
	}
	release, err := r.hold(ctx, rec)
	if err != nil {
		return done, err
	}
	fresh := r.keepFresh(ctx, r.volumes, rec.Name+suffix)
	done.Copy, err = eng.Rollback(ctx, p, rec.volume(), rec.Rollback.Snapshot, rec.Rollback.Keep, progress)
	fresh()
	if err := errors.Join(err, release()); err != nil {
		return done, dataReason(err)
	}
	if keep.Phase != Ready {
		if err := r.step(ctx, "rollback.kept", rec.Name); err != nil {
			return done, err
		}
		// Nobody was using the data, so all that was written is in it.
		keep.Phase, keep.Consistency = Ready, engine.Frozen
		if err := r.putSnapshot(ctx, dir, keep); err != nil {
			return done, err
		}
	}
	done.Kept = keep
	if err := r.step(ctx, "rollback.ready", rec.Name); err != nil {
		return done, err
	}
	// A record that cannot be read any more keeps no volume from its data.
	to, errTo := r.snapshotOf(rec, rec.Rollback.Snapshot)
	done.Record, err = r.advance(ctx, rec, func(now *Record) {
		now.Phase, now.Host, now.Rollback = Ready, "", nil
		switch {
		case errTo == nil && to.Source != nil && to.Source.isZero(), errTo == nil && to.Source == nil && to.Trigger == BeforeRestore:
			now.Source = nil
		case errTo == nil && to.Source != nil:
			now.Source = to.Source
		case now.halfRestored():
			now.Source = nil
		}
		now.Reason = ""
	})
	return done, err
}

// madeFrom is what snapshots keep of a volume's Source.
func (r Record) madeFrom() *Source {
	if r.Source == nil {
		return &Source{}
	}
	made := *r.Source
	made.Kept, made.Filling, made.Placing = "", false, false
	return &made
}

// undoRollback makes the volume ready as it was, if its data has not been exchanged.
// If it has, Settle completes the rollback.
func (r *Root) undoRollback(ctx context.Context, rec Record) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	present, err := r.Record(rec.Name)
	if err != nil || present.UUID != rec.UUID || present.Phase != RollingBack || present.Host != r.Host {
		return err
	}
	exchanged, err := r.hasSnapshot(ctx, rec, rec.Rollback.Keep)
	if err != nil || exchanged {
		return err
	}
	dir, err := r.snapshotsOf(rec.UUID)
	if err == nil {
		defer dir.Close()
		there, errThere := readSnapshot(dir, rec.UUID, rec.Rollback.Keep)
		if errThere == nil && there.Trigger == BeforeRollback && there.Phase == Creating {
			err = r.dropSnapshot(ctx, dir, there)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	_, err = r.advance(ctx, rec, func(now *Record) { now.Phase, now.Host, now.Rollback = now.unrolled(), "", nil })
	return err
}

// settleRollback completes a rollback whose host was killed. One that cannot be
// completed and has not exchanged the data is given up.
func (r *Root) settleRollback(ctx context.Context, rec Record) error {
	_, err := r.finishRollback(ctx, rec, nil)
	if err == nil || ctx.Err() != nil || errors.Is(err, errTaken) {
		return err
	}
	if undo := r.undoRollback(ctx, rec); undo != nil {
		return errors.Join(err, undo)
	}
	present, errNow := r.Record(rec.Name)
	if errNow == nil && present.Phase == Ready {
		return nil
	}
	return errors.Join(err, errNow)
}

// halfRestored tells whether the data is what a restore in place has left that did not
// succeed.
func (r Record) halfRestored() bool { return r.Source != nil && r.Source.Kept != "" }

// unrolled is the phase of a volume whose rollback is given up.
func (r Record) unrolled() Phase {
	if r.halfRestored() {
		return Broken
	}
	return Ready
}

// rollable reads the record of a volume that can be rolled back: a ready one, or one
// that a restore in place has broken.
func (r *Root) rollable(name string) (Record, error) {
	rec, err := r.Record(name)
	if err == nil && rec.Phase == Broken && rec.halfRestored() {
		return rec, nil
	}
	return r.ready(name)
}
