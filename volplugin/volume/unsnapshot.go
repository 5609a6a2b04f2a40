package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/keep"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// undoSnapshot removes a snapshot, its record last.
func (r *Root) undoSnapshot(ctx context.Context, dir *rooted.Dir, rec Record, snap Snapshot) error {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return err
	}
	release, err := r.hold(ctx, rec)
	if err != nil {
		return err
	}
	err = r.step(ctx, "unsnapshot.data", rec.Name)
	if err == nil {
		err = eng.RemoveSnapshot(ctx, p, rec.volume(), snap.Name)
	}
	if err := errors.Join(err, release()); err != nil {
		return err
	}
	return r.dropSnapshot(ctx, dir, snap)
}

// dropSnapshot removes the record of a snapshot and, with the last one, what is left
// of a volume whose data was kept.
func (r *Root) dropSnapshot(ctx context.Context, dir *rooted.Dir, snap Snapshot) error {
	if err := r.step(ctx, "unsnapshot.record", snap.Volume); err != nil {
		return err
	}
	if err := dir.Remove(snap.Name + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := dir.Sync(); err != nil {
		return err
	}
	return r.tidySnapshots(ctx, dir, snap.UUID)
}

// tidySnapshots removes the directory of snapshots that a volume does not have any
// more.
func (r *Root) tidySnapshots(ctx context.Context, dir *rooted.Dir, uuid string) error {
	names, err := dir.Names()
	if err != nil || len(names) > 1 || len(names) == 1 && names[0] != tombName {
		return err
	}
	if len(names) == 1 {
		if err := r.step(ctx, "unsnapshot.tomb", ""); err != nil {
			return err
		}
		if err := dir.Remove(tombName); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	err = r.snapshots.Rmdir(uuid)
	// Another host may make the next snapshot at this moment.
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// RemoveSnapshot removes a snapshot that nobody has mounted. The error is not-found,
// and wraps ErrNoSnapshot or ErrNoRecord, when there is none.
func (r *Root) RemoveSnapshot(ctx context.Context, volume, name string) error {
	rec, snap, err := r.findSnapshot(ctx, volume, name)
	if err != nil {
		return err
	}
	if rec.Phase == RollingBack && (rec.Rollback.Snapshot == name || rec.Rollback.Keep == name) {
		return r.busy(rec)
	}
	if snap.Phase == Creating && snap.Host != r.Host {
		if stale, err := r.staleSnapshot(snap); err != nil || !stale {
			return errors.Join(err, snap.whole(rec.Name))
		}
	}
	if err := r.removeSnapshot(ctx, rec, snap); err != nil {
		return failed(fmt.Errorf("remove snapshot %s@%s: %w", rec.Name, name, err))
	}
	return nil
}

func (r *Root) removeSnapshot(ctx context.Context, rec Record, snap Snapshot) error {
	dir, err := r.snapshotsOf(rec.UUID)
	if err != nil {
		return err
	}
	defer dir.Close()
	if _, err := r.engine(rec); err != nil {
		return err
	}
	if snap.Phase != Removing {
		if snap, err = r.condemn(ctx, dir, rec, snap); err != nil {
			return err
		}
	}
	return r.undoSnapshot(ctx, dir, rec, snap)
}

// condemn marks a snapshot as one that is removed. A rollback to it does not begin
// meanwhile on any host.
func (r *Root) condemn(ctx context.Context, dir *rooted.Dir, rec Record, snap Snapshot) (_ Snapshot, err error) {
	release, err := r.claim(ctx, rec.Name)
	if err != nil {
		return snap, err
	}
	defer func() { err = errors.Join(err, release()) }()
	now, err := r.Record(rec.Name)
	if err != nil && !errors.Is(err, ErrNoRecord) {
		return snap, err
	}
	if err == nil && now.UUID == rec.UUID && now.Phase == RollingBack && (now.Rollback.Snapshot == snap.Name || now.Rollback.Keep == snap.Name) {
		return snap, r.busy(now)
	}
	snap.Phase, snap.Host = Removing, r.Host
	if err := r.step(ctx, "unsnapshot.mark", rec.Name); err != nil {
		return snap, err
	}
	return snap, r.putSnapshot(ctx, dir, snap)
}

// PruneSnapshots removes those snapshots of a volume that its schedule has made and
// that the policy drops, except those that used says are in use, and returns the names
// of those it removed. Snapshots that users made are never removed.
func (r *Root) PruneSnapshots(ctx context.Context, volume string, policy keep.Policy, used func(snapshot string) bool) ([]string, error) {
	list, err := r.Snapshots(ctx, volume)
	if err != nil {
		return nil, err
	}
	var scheduled []Snapshot
	var times []time.Time
	for _, entry := range list {
		if entry.Err == nil && entry.Snapshot.Phase == Ready && entry.Snapshot.Trigger == Scheduled {
			scheduled, times = append(scheduled, entry.Snapshot), append(times, entry.Snapshot.CreatedAt)
		}
	}
	_, drop := policy.Select(times, r.Now())
	var removed []string
	var errs []error
	for _, i := range drop {
		name := scheduled[i].Name
		if used != nil && used(name) {
			continue
		}
		if err := r.RemoveSnapshot(ctx, volume, name); err != nil && !errors.Is(err, ErrNoSnapshot) {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, name)
	}
	return removed, errors.Join(errs...)
}

// KeepPolicy is which of the snapshots that the schedule makes stay; the zero policy
// keeps all.
func (r Record) KeepPolicy() (keep.Policy, error) {
	if r.Keep == "" {
		return keep.Policy{}, nil
	}
	return keep.Parse(r.Keep)
}

func (r *Root) staleSnapshot(snap Snapshot) (bool, error) {
	dir, err := r.snapshotsOf(snap.UUID)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	stamp, err := dir.Stat(snap.Name + suffix)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && r.Now().Sub(time.Unix(0, stamp.Mtime)) > staleAfter, err
}

// UnsettledSnapshots lists the volumes that have snapshots which this host, or one
// that is gone, has begun to make or to remove and not brought to an end, by name.
func (r *Root) UnsettledSnapshots(ctx context.Context) ([]string, error) {
	all, err := r.Snapshots(ctx, "")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range all {
		unsettled, err := r.unsettled(ctx, entry)
		if err != nil {
			return nil, failed(err)
		}
		if unsettled {
			names = append(names, entry.Volume)
		}
	}
	return slices.Compact(names), nil
}

// unsettled tells whether a snapshot is to be removed. What a rollback is making is
// the rollback's.
func (r *Root) unsettled(ctx context.Context, entry SnapshotEntry) (bool, error) {
	snap := entry.Snapshot
	if snap.Name == "" { // its record cannot be used
		return false, nil
	}
	if snap.Phase == Ready && snap.Trigger == ForClone {
		// The volume it was made for is complete, or nobody makes it any more.
		made, err := r.byUUID(ctx, snap.For)
		if errors.Is(err, ErrNoRecord) {
			err = nil
		}
		return made.Phase != Restoring, err
	}
	if snap.Phase == Ready && snap.Trigger == ForBackup && snap.Host == r.Host {
		return !r.Now().Before(snap.Until) && (r.BackedUp == nil || !r.BackedUp(snap)), nil
	}
	if snap.Phase == Ready {
		return false, nil
	}
	if snap.Host == r.Host {
		return true, nil
	}
	return r.staleSnapshot(snap)
}

// SettleSnapshots removes the half-made and half-removed snapshots of one volume. The
// caller sees to it that this host makes none of that volume at the same time.
func (r *Root) SettleSnapshots(ctx context.Context, volume string) error {
	rec, _, err := r.owner(ctx, volume)
	if fault.Kind(err) == "notfound" {
		return nil
	}
	if err != nil {
		return err
	}
	list, err := r.snapshotEntries(rec)
	if err != nil {
		return failed(err)
	}
	var errs []error
	for _, entry := range list {
		if rec.Phase == RollingBack && entry.Name == rec.Rollback.Keep {
			continue
		}
		unsettled, err := r.unsettled(ctx, entry)
		if err == nil && unsettled {
			err = r.settleSnapshot(ctx, rec, entry.Snapshot)
		}
		errs = append(errs, err)
	}
	return failed(errors.Join(errs...))
}

func (r *Root) settleSnapshot(ctx context.Context, rec Record, snap Snapshot) error {
	if snap.Trigger == BeforeRollback && snap.Phase == Creating {
		// A rollback that was given up before it began; data that is there
		// all the same is the volume's own.
		found, err := r.hasSnapshot(ctx, rec, snap.Name)
		if err != nil {
			return err
		}
		dir, err := r.snapshotsOf(rec.UUID)
		if err != nil {
			return err
		}
		defer dir.Close()
		if !found {
			return r.dropSnapshot(ctx, dir, snap)
		}
		snap.Phase, snap.Consistency = Ready, engine.Frozen
		return r.putSnapshot(ctx, dir, snap)
	}
	return r.removeSnapshot(ctx, rec, snap)
}

// hasSnapshot tells whether a snapshot's data is there.
func (r *Root) hasSnapshot(ctx context.Context, rec Record, name string) (bool, error) {
	data, done, err := r.openSnapshot(ctx, rec, name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	_ = data
	return true, done()
}
