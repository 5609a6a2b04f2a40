package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

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
