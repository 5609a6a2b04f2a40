package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// tombName is the record of a volume that is gone while its data was kept, in the
// directory of its snapshots. No snapshot's name begins with a dot.
const tombName = ".volume" + suffix

// owner is the volume whose snapshots can be looked at: the one of that name, or what
// is left of it after a removal that kept the data.
func (r *Root) owner(ctx context.Context, name string) (rec Record, kept bool, err error) {
	rec, err = r.Record(name)
	switch {
	case err == nil && rec.Visible():
		return rec, false, nil
	case errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
		return rec, false, r.unusable(name, err)
	case err != nil && !errors.Is(err, ErrNoRecord):
		return rec, false, err
	}
	rec, found, err := r.tomb(ctx, name)
	if err != nil {
		return rec, false, failed(err)
	}
	if !found {
		return rec, false, r.noVolume(name)
	}
	return rec, true, nil
}

// tomb finds what is left of a volume whose data was kept. Of several of one name it
// is the one that was removed last.
func (r *Root) tomb(ctx context.Context, name string) (rec Record, found bool, err error) {
	err = r.eachTomb(ctx, func(tomb Record) {
		if tomb.Name == name && (!found || tomb.RemovedAt.After(*rec.RemovedAt)) {
			rec, found = tomb, true
		}
	})
	if err != nil || !found {
		return rec, false, err
	}
	// One whose host was killed after the volume was there again says nothing.
	if _, err := r.byUUID(ctx, rec.UUID); !errors.Is(err, ErrNoRecord) {
		return Record{}, false, err
	}
	return rec, true, nil
}

// bury leaves the record of a volume that is removed while its data is kept with its
// snapshots, if it has any.
func (r *Root) bury(ctx context.Context, rec Record) error {
	dir, err := r.snapshotsOf(rec.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := snapshotNames(dir)
	if err != nil || len(names) == 0 {
		return err
	}
	data, err := rec.Encode()
	if err != nil {
		return err
	}
	if err := r.step(ctx, "remove.bury", rec.Name); err != nil {
		return err
	}
	return r.replaceFile(ctx, dir, tombName, data)
}

// untomb removes what bury left, when the volume is there again.
func (r *Root) untomb(ctx context.Context, rec Record) error {
	if !rec.Adopted {
		return nil
	}
	dir, err := r.snapshotsOf(rec.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if _, err := dir.Stat(tombName); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := r.step(ctx, "create.untomb", rec.Name); err != nil {
		return err
	}
	if err := dir.Remove(tombName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return dir.Sync()
}

func (r *Root) eachTomb(ctx context.Context, fn func(Record)) error {
	p, err := r.place()
	if err != nil {
		return err
	}
	ids, err := p.Snapshots.Names()
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !isUUID(id) {
			continue
		}
		dir, err := p.Snapshots.Dir(id)
		if err != nil {
			continue // no directory of Berth's
		}
		tomb, err := readTomb(dir, id)
		if err := errors.Join(err, dir.Close()); err != nil {
			continue // none, or none that can be used
		}
		fn(tomb)
	}
	return nil
}

func readTomb(dir *rooted.Dir, id string) (Record, error) {
	data, err := dir.ReadFile(tombName, maxRecord)
	if err != nil {
		return Record{}, err
	}
	tomb, err := decode(data)
	if err == nil && (tomb.UUID != id || tomb.RemovedAt == nil) {
		err = fmt.Errorf("%w: it is not of this volume", ErrDamaged)
	}
	return tomb, err
}
