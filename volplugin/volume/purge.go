package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/options"
)

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

// sweep removes what a host left in tmp when it was killed: at once a file of an earlier
// process of this host, and all else after a while. It goes by the time of the
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
		if r.Now().Sub(time.Unix(0, stamp.Ctime)) < keep && !r.orphaned(name) {
			continue
		}
		err = r.tmp.RemoveTree(ctx, name)
		if !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return failed(errors.Join(errs...))
}
