package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// ErrNoRecord says that the root was looked at and holds no volume of the name.
var ErrNoRecord = errors.New("there is no such volume")

// An Entry is one volume of a listing: its record, or why that cannot be used.
type Entry struct {
	Record Record
	// Err wraps ErrDamaged or ErrNewer; Record is empty then.
	Err error
	// Stamp changes with each version of the record.
	Stamp rooted.Stamp
}

// Record reads the record of one volume. The error is ErrNoRecord when there is
// certainly none, wraps ErrDamaged or ErrNewer when it cannot be used, and is
// another one when the root could not be read.
func (r *Root) Record(name string) (Record, error) {
	if err := r.volumes.Refresh(); err != nil {
		return Record{}, failed(err)
	}
	return r.record(name)
}

func (r *Root) record(name string) (Record, error) {
	data, err := r.volumes.ReadFile(name+suffix, maxRecord)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Record{}, ErrNoRecord
	case isNoFile(err):
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, reason(err))
	case err != nil:
		return Record{}, failed(err)
	}
	return DecodeRecord(name, data)
}

// isNoFile tells what no Berth writes from a root that does not answer.
func isNoFile(err error) bool {
	return errors.Is(err, rooted.ErrSymlink) || errors.Is(err, rooted.ErrNotFile) || errors.Is(err, rooted.ErrTooLarge)
}

// Entry is Record in the form of a listing. known is returned as it is while the record
// has its stamp; the zero value stands for nothing known. The error is ErrNoRecord when
// there is certainly no such volume, and another one when the root could not be read.
func (r *Root) Entry(name string, known Entry) (Entry, error) {
	if err := r.volumes.Refresh(); err != nil {
		return Entry{}, failed(err)
	}
	return r.entry(name, known)
}

// entry reads a volume's record unless it is known.
func (r *Root) entry(name string, known Entry) (Entry, error) {
	stamp, err := r.volumes.Stat(name + suffix)
	if errors.Is(err, fs.ErrNotExist) {
		return Entry{}, ErrNoRecord
	}
	if err != nil {
		return Entry{}, failed(err)
	}
	if known.Stamp == stamp {
		return known, nil
	}
	rec, err := r.record(name)
	if errors.Is(err, ErrDamaged) || errors.Is(err, ErrNewer) {
		return Entry{Err: err, Stamp: stamp}, nil
	}
	return Entry{Record: rec, Stamp: stamp}, err
}

// Edition changes with every record that is made, replaced or removed, by whatever
// host. Two changes within a moment that the file system's clock cannot tell apart may
// have one edition.
func (r *Root) Edition() (rooted.Stamp, error) {
	if err := r.volumes.Refresh(); err != nil {
		return rooted.Stamp{}, failed(err)
	}
	stamp, err := r.volumes.Self()
	return stamp, failed(err)
}

// Entries reads the records that are not in known, or differ from it by their
// stamp; those that do not are returned as they are in known. Volumes of all
// phases are in the result, by name. Files that are no records are passed over.
func (r *Root) Entries(ctx context.Context, known map[string]Entry) (map[string]Entry, error) {
	if err := r.volumes.Refresh(); err != nil {
		return nil, failed(err)
	}
	files, err := r.volumes.Names()
	if err != nil {
		return nil, failed(err)
	}
	entries := make(map[string]Entry, len(files))
	for _, file := range files {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		name, ok := strings.CutSuffix(file, suffix)
		if !ok || CheckName(name) != nil {
			continue
		}
		entry, err := r.entry(name, known[name])
		if errors.Is(err, ErrNoRecord) {
			continue
		}
		if err != nil {
			return nil, err
		}
		entries[name] = entry
	}
	return entries, nil
}

// put replaces the record of a volume.
func (r *Root) put(ctx context.Context, rec Record) error {
	data, err := rec.Encode()
	if err != nil {
		return err
	}
	return r.replaceFile(ctx, r.volumes, rec.Name+suffix, data)
}

// drop removes the record of a volume if it is still of rec's UUID and phase.
// Another host that took the volume over meanwhile keeps its record.
func (r *Root) drop(rec Record) error {
	now, err := r.Record(rec.Name)
	if errors.Is(err, ErrNoRecord) {
		return nil
	}
	if err != nil {
		return err
	}
	if now.UUID != rec.UUID || now.Phase != rec.Phase {
		return nil
	}
	if err := r.volumes.Remove(rec.Name + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return r.volumes.Sync()
}

// Data opens the directory that containers of a ready volume see; the volume is
// attached. It never makes one: a container must not start on an empty directory in
// place of lost data.
func (r *Root) Data(rec Record) (*rooted.Dir, error) {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return nil, err
	}
	data, err := eng.Open(p, rec.volume())
	if err != nil {
		return nil, failed(fmt.Errorf("data of volume %s in %s: %w", rec.Name, r.Path, dataReason(err)))
	}
	return data, nil
}

// missing says that a volume's data is not there.
type missing struct{}

func (missing) Error() string { return "the directory is missing" }
func (missing) Unwrap() error { return fs.ErrNotExist }

func dataReason(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return missing{}
	}
	return reason(err)
}

// DataPath is where the data of a volume is on this host.
func (l Location) DataPath(name string) string { return l.Path + "/" + name }
