package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/options"
)

// TrashKeep is how long the data of removed volumes stays in the trash unless they
// say otherwise.
const TrashKeep = 7 * 24 * time.Hour

// tempKeep is the age of files in tmp at which nobody writes them any more, and
// tempTreeKeep that of directories, into which large volumes may be copied.
const (
	tempKeep     = 24 * time.Hour
	tempTreeKeep = 7 * 24 * time.Hour
)

// A TrashEntry is a removed volume whose data is still there.
type TrashEntry struct {
	// ID is the volume's UUID.
	ID     string
	Record Record
	// Expires is when the data is deleted.
	Expires time.Time
	// Err wraps ErrDamaged or ErrNewer; Record is empty then, and the entry is left
	// alone.
	Err error
}

// trashRecord reads the record of an entry of the trash.
func (r *Root) trashRecord(id string) (Record, error) {
	data, err := r.trash.ReadFile(id+suffix, maxRecord)
	if isNoFile(err) {
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, reason(err))
	}
	if err != nil {
		return Record{}, err
	}
	rec, err := decode(data)
	if err != nil {
		return Record{}, err
	}
	if rec.UUID != id || rec.RemovedAt == nil {
		return Record{}, fmt.Errorf("%w: it is not of this trash entry", ErrDamaged)
	}
	return rec, nil
}

// putTrash replaces the record of an entry of the trash.
func (r *Root) putTrash(ctx context.Context, rec Record) error {
	data, err := rec.Encode()
	if err != nil {
		return err
	}
	return r.replaceFile(ctx, r.trash, rec.UUID+suffix, data)
}

// trashIDs lists the entries of the trash that have a record.
func (r *Root) trashIDs() ([]string, error) {
	if err := r.trash.Refresh(); err != nil {
		return nil, failed(err)
	}
	names, err := r.trash.Names()
	if err != nil {
		return nil, failed(err)
	}
	var ids []string
	for _, name := range names {
		if id, ok := strings.CutSuffix(name, suffix); ok && isUUID(id) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// removed tells whether the removal that an entry belongs to has ended. One that was
// claimed and never begun leaves an entry of a volume that lives on, maybe under another
// name, and whose snapshots must not go.
func (r *Root) removed(ctx context.Context, rec Record) (bool, error) {
	present, err := r.record(rec.Name)
	switch {
	case errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
		return false, nil
	case err == nil && present.UUID == rec.UUID:
		return false, nil
	case err != nil && !errors.Is(err, ErrNoRecord):
		return false, err
	}
	if _, err := r.trash.Stat(rec.UUID); !errors.Is(err, fs.ErrNotExist) {
		return err == nil, err
	}
	_, err = r.byUUID(ctx, rec.UUID)
	if errors.Is(err, ErrNoRecord) {
		return true, nil
	}
	return false, err
}

// Trash lists what is in the trash, the newest first and last those whose record cannot
// be used. Entries that are restored or
// deleted at this moment are among them, with their phase.
func (r *Root) Trash(ctx context.Context) ([]TrashEntry, error) {
	ids, err := r.trashIDs()
	if err != nil {
		return nil, err
	}
	if err := r.volumes.Refresh(); err != nil {
		return nil, failed(err)
	}
	entries := []TrashEntry{}
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		rec, err := r.trashRecord(id)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
			entries = append(entries, TrashEntry{ID: id, Err: err})
			continue
		case err != nil:
			return nil, failed(err)
		case rec.OnRemove == options.Keep:
			continue // only a claim: the data stays where it is
		}
		removed, err := r.removed(ctx, rec)
		if err != nil {
			return nil, failed(err)
		}
		if removed {
			entries = append(entries, TrashEntry{ID: id, Record: rec, Expires: rec.expires(TrashKeep)})
		}
	}
	slices.SortStableFunc(entries, func(a, b TrashEntry) int {
		switch {
		case a.Err != nil && b.Err != nil:
			return strings.Compare(a.ID, b.ID)
		case a.Err != nil:
			return 1
		case b.Err != nil:
			return -1
		}
		return b.Record.RemovedAt.Compare(*a.Record.RemovedAt)
	})
	return entries, nil
}

// expires is when a removed volume's data is due.
func (r Record) expires(keep time.Duration) time.Time {
	switch {
	case r.OnRemove == options.Purge, r.Phase == Purging:
		keep = 0
	case r.TrashKeep != nil:
		keep = time.Duration(*r.TrashKeep)
	}
	return r.RemovedAt.Add(keep)
}

// findTrash finds an entry by its ID, or the newest of a volume's name.
func (r *Root) findTrash(ctx context.Context, ref string) (Record, error) {
	entries, err := r.Trash(ctx)
	if err != nil {
		return Record{}, err
	}
	for _, entry := range entries {
		switch {
		case entry.ID == ref && entry.Err != nil:
			return Record{}, fault.Unavailable("trash entry %s cannot be used, its data is untouched: %w", ref, entry.Err)
		case entry.ID == ref, entry.Err == nil && entry.Record.Name == ref:
			return entry.Record, nil
		}
	}
	return Record{}, fault.NotFound("the trash of %s has no volume %.210q", r.Path, ref)
}

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

// PurgeTrash deletes an entry of the trash, by its ID or as the newest of a name, with
// its snapshots, and returns its name.
func (r *Root) PurgeTrash(ctx context.Context, ref string) (string, error) {
	rec, err := r.findTrash(ctx, ref)
	if err != nil {
		return "", err
	}
	if rec.Phase == Restoring {
		return "", fault.Conflict("host %s is restoring volume %s from the trash", rec.Host, rec.Name)
	}
	name, err := r.purge(ctx, rec.UUID)
	if err != nil {
		return "", failed(fmt.Errorf("delete volume %s from the trash: %w", rec.Name, err))
	}
	return name, nil
}

// Expire deletes what is due in the trash: entries that are to be purged, and those
// that are older than their volume was to be kept, or than keep where it did not say.
// It returns the names of the volumes it deleted. Entries whose record cannot be read
// are left alone.
func (r *Root) Expire(ctx context.Context, keep time.Duration) ([]string, error) {
	ids, err := r.trashIDs()
	if err != nil {
		return nil, err
	}
	var deleted []string
	var errs []error
	for _, id := range ids {
		if ctx.Err() != nil {
			return deleted, errors.Join(append(errs, ctx.Err())...)
		}
		ok, err := r.expire(ctx, id, keep)
		if err != nil {
			errs = append(errs, failed(fmt.Errorf("trash entry %s: %w", id, err)))
		}
		if ok != "" {
			deleted = append(deleted, ok)
		}
	}
	return deleted, errors.Join(append(errs, r.sweep(ctx))...)
}

func (r *Root) expire(ctx context.Context, id string, keep time.Duration) (name string, err error) {
	rec, err := r.trashRecord(id)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if rec.OnRemove == options.Keep || rec.Phase == Restoring || r.Now().Before(rec.expires(keep)) {
		return "", nil
	}
	return r.purge(ctx, id)
}

// purge deletes an entry of the trash with all snapshots, and tells the volume's name
// if there was one to delete.
func (r *Root) purge(ctx context.Context, id string) (name string, err error) {
	rec, err := r.trashRecord(id)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	// A removal that has not ended still needs the entry.
	if removed, err := r.removed(ctx, rec); err != nil || !removed || rec.OnRemove == options.Keep {
		return "", err
	}
	eng, p, err := r.keeper(rec)
	if err != nil {
		return "", err
	}
	if rec.Phase != Purging {
		rec, err = r.claimTrash(ctx, id, func(now *Record) error {
			if now.Phase == Restoring {
				return errTaken
			}
			now.Phase, now.Host = Purging, r.Host
			return nil
		})
		if errors.Is(err, errTaken) || errors.Is(err, fs.ErrNotExist) {
			return "", nil
		}
		if err != nil {
			return "", err
		}
	}
	if err := r.step(ctx, "expire.data", rec.Name); err != nil {
		return "", err
	}
	if err := eng.Destroy(ctx, p, rec.volume()); err != nil {
		return "", err
	}
	if err := r.step(ctx, "expire.snapshots", rec.Name); err != nil {
		return "", err
	}
	if err := r.dropSnapshots(rec.UUID); err != nil {
		return "", err
	}
	if r.Forget != nil {
		if err := r.step(ctx, "expire.lease", rec.Name); err != nil {
			return "", err
		}
		if err := r.Forget(ctx, r, rec.UUID); err != nil {
			return "", err
		}
	}
	if err := r.step(ctx, "expire.record", rec.Name); err != nil {
		return "", err
	}
	if err := r.trash.Remove(id + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return rec.Name, r.trash.Sync()
}

// dropSnapshots removes the records of all snapshots of a volume, whose data is gone.
func (r *Root) dropSnapshots(uuid string) error {
	dir, err := r.snapshotsOf(uuid)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	files, err := dir.Names()
	if err != nil {
		return err
	}
	for _, file := range files {
		if !strings.HasSuffix(file, suffix) {
			continue // what no engine knows is left alone
		}
		if err := dir.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	err = r.snapshots.Rmdir(uuid)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// sweep removes what a host left in tmp when it was killed. It goes by the time of the
// last change of the inode: a copy that is nearly complete has the times of its original.
func (r *Root) sweep(ctx context.Context) error {
	names, err := r.tmp.Names()
	if err != nil {
		return failed(err)
	}
	var errs []error
	for _, name := range names {
		stamp, err := r.tmp.Stat(name)
		if err != nil {
			continue
		}
		keep := tempKeep
		tree, err := r.tmp.Handle(name)
		if err == nil {
			keep = tempTreeKeep
			errs = append(errs, tree.Close())
		}
		if r.Now().Sub(time.Unix(0, stamp.Ctime)) < keep {
			continue
		}
		err = r.tmp.RemoveTree(ctx, name)
		if !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return failed(errors.Join(errs...))
}
