package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/volplugin/options"
)

// TrashKeep is how long the data of removed volumes stays in the trash.
const TrashKeep = 7 * 24 * time.Hour

// tempKeep is the age of files in tmp at which nobody writes them any more.
const tempKeep = 24 * time.Hour

// trashRecord reads the record of an entry of the trash.
func (r *Root) trashRecord(id string) (Record, error) {
	data, err := r.trash.ReadFile(id+suffix, maxRecord)
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

// trashIDs lists the entries of the trash that have a record.
func (r *Root) trashIDs() ([]string, error) {
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

// Claims lists the volumes whose removal this host has begun and not brought to
// an end, by name, with the entry's UUID.
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
		if err != nil || rec.Host != r.Host {
			continue
		}
		present, err := r.record(rec.Name)
		finished := errors.Is(err, ErrNoRecord) || err == nil && present.UUID != id
		if !finished || rec.OnRemove == options.Keep {
			claims[rec.Name] = id
		}
	}
	return claims, nil
}

// SettleClaim brings a removal that Claims listed to an end: one that was marked
// is finished, one that was only claimed has not begun.
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
	return failed(r.unclaim(rec))
}

// Expire deletes what is due in the trash: entries that are to be purged, and
// those that are older than keep. It returns the names of the volumes it deleted.
// Entries whose record cannot be read are left alone.
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
	return deleted, errors.Join(append(errs, r.sweep())...)
}

func (r *Root) expire(ctx context.Context, id string, keep time.Duration) (name string, err error) {
	rec, err := r.trashRecord(id)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if rec.OnRemove == options.Keep || rec.OnRemove != options.Purge && r.Now().Sub(*rec.RemovedAt) < keep {
		return "", nil
	}
	// A removal that has not ended still needs the entry.
	if present, err := r.Record(rec.Name); err == nil && present.UUID == id {
		return "", nil
	} else if err != nil && !errors.Is(err, ErrNoRecord) {
		return "", err
	}
	if err := r.step(ctx, "expire.data", rec.Name); err != nil {
		return "", err
	}
	if err := r.Engine.Destroy(ctx, r.trash, id); err != nil {
		return "", err
	}
	if err := r.step(ctx, "expire.record", rec.Name); err != nil {
		return "", err
	}
	if err := r.trash.Remove(id + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return rec.Name, r.trash.Sync()
}

// sweep removes files that a host left in tmp when it was killed.
func (r *Root) sweep() error {
	names, err := r.tmp.Names()
	if err != nil {
		return failed(err)
	}
	var errs []error
	for _, name := range names {
		stamp, err := r.tmp.Stat(name)
		if err != nil || r.Now().Sub(time.Unix(0, stamp.Mtime)) < tempKeep {
			continue
		}
		if err := r.tmp.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return failed(errors.Join(errs...))
}
