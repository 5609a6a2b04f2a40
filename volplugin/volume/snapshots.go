package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// ErrNoSnapshot says that the volume was looked at and has no snapshot of the name.
var ErrNoSnapshot = errors.New("there is no such snapshot")

// A SnapshotEntry is one snapshot of a listing: its record, or why that cannot be
// used.
type SnapshotEntry struct {
	// Volume is the name of the volume now, UUID its UUID and Name the snapshot's.
	Volume, UUID, Name string
	Snapshot           Snapshot
	// Err wraps ErrDamaged or ErrNewer; Snapshot is empty then.
	Err error
	// Kept: the volume is gone but for its data and its snapshots.
	Kept bool
}

// SnapshotOptions say more of a snapshot that is to be made.
type SnapshotOptions struct {
	// Name of the snapshot; "" makes one of the time.
	Name    string
	Trigger Trigger
	Labels  map[string]string
	// Consistency that the caller has seen to by bringing to rest what uses the volume;
	// "" is the engine's.
	Consistency engine.Consistency
	// Wait is for how long a snapshot that is made ForBackup stays before its backup begins.
	Wait time.Duration

	forVolume string
}

// snapshotsOf opens the directory of a volume's snapshots. The error wraps
// fs.ErrNotExist when the volume has never had any.
func (r *Root) snapshotsOf(uuid string) (*rooted.Dir, error) {
	p, err := r.place()
	if err != nil {
		return nil, err
	}
	return p.Snapshots.Dir(uuid)
}

// ensureSnapshots is snapshotsOf for the first snapshot.
func (r *Root) ensureSnapshots(uuid string) (*rooted.Dir, error) {
	dir, err := r.snapshotsOf(uuid)
	if !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	if err := errors.Join(r.snapshots.EnsureDir(uuid, 0o700), r.snapshots.Sync()); err != nil {
		return nil, err
	}
	return r.snapshots.Dir(uuid)
}

// readSnapshot reads a snapshot's record. The error is ErrNoSnapshot when there is
// certainly none.
func readSnapshot(dir *rooted.Dir, uuid, name string) (Snapshot, error) {
	data, err := dir.ReadFile(name+suffix, maxRecord)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Snapshot{}, ErrNoSnapshot
	case isNoFile(err):
		return Snapshot{}, fmt.Errorf("%w: %w", ErrDamaged, reason(err))
	case err != nil:
		return Snapshot{}, err
	}
	return DecodeSnapshot(uuid, name, data)
}

// snapshotNames lists the snapshots in a directory that have a record.
func snapshotNames(dir *rooted.Dir) ([]string, error) {
	files, err := dir.Names()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, file := range files {
		if name, ok := strings.CutSuffix(file, suffix); ok && CheckSnapshotName(name) == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Snapshots lists those of one volume, or of all that exist for users if volume is
// "", by volume and then by time. Half-made and half-removed ones are among them,
// with their phase; snapshots of volumes in the trash are not.
func (r *Root) Snapshots(ctx context.Context, volume string) ([]SnapshotEntry, error) {
	var owners []Record
	kept := map[string]bool{}
	if volume != "" {
		rec, isKept, err := r.owner(ctx, volume)
		if err != nil {
			return nil, err
		}
		owners, kept[rec.UUID] = append(owners, rec), isKept
	} else {
		entries, err := r.Entries(ctx, nil)
		if err != nil {
			return nil, err
		}
		for _, entry := range entries {
			if entry.Err == nil && entry.Record.Visible() {
				owners = append(owners, entry.Record)
			}
		}
		if err := r.eachTomb(ctx, func(tomb Record) {
			if !slices.ContainsFunc(owners, func(rec Record) bool { return rec.UUID == tomb.UUID }) {
				owners, kept[tomb.UUID] = append(owners, tomb), true
			}
		}); err != nil {
			return nil, failed(err)
		}
	}
	var all []SnapshotEntry
	for _, rec := range owners {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		list, err := r.snapshotEntries(rec)
		if err != nil {
			return nil, failed(fmt.Errorf("snapshots of volume %s: %w", rec.Name, err))
		}
		for i := range list {
			list[i].Kept = kept[rec.UUID]
		}
		all = append(all, list...)
	}
	slices.SortStableFunc(all, func(a, b SnapshotEntry) int {
		if c := strings.Compare(a.Volume, b.Volume); c != 0 {
			return c
		}
		if c := a.Snapshot.CreatedAt.Compare(b.Snapshot.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	return all, nil
}

// snapshotEntries lists the snapshots of one volume by name.
func (r *Root) snapshotEntries(rec Record) ([]SnapshotEntry, error) {
	dir, err := r.snapshotsOf(rec.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := dir.Refresh(); err != nil {
		return nil, err
	}
	names, err := snapshotNames(dir)
	if err != nil {
		return nil, err
	}
	var list []SnapshotEntry
	for _, name := range names {
		snap, err := readSnapshot(dir, rec.UUID, name)
		entry := SnapshotEntry{Volume: rec.Name, UUID: rec.UUID, Name: name, Snapshot: snap}
		switch {
		case errors.Is(err, ErrNoSnapshot):
			continue
		case errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
			entry.Err = err
		case err != nil:
			return nil, err
		}
		list = append(list, entry)
	}
	return list, nil
}

// CountSnapshots tells how many snapshots a volume has. It reads no records.
func (r *Root) CountSnapshots(rec Record) (int, error) {
	all, err := r.meta.Dir(snapsName)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, failed(err)
	}
	defer all.Close()
	dir, err := all.Dir(rec.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, failed(err)
	}
	defer dir.Close()
	names, err := snapshotNames(dir)
	return len(names), failed(err)
}

// Snapshot reads the record of one. The error is not-found, and wraps ErrNoSnapshot
// or ErrNoRecord, when there is certainly none.
func (r *Root) Snapshot(ctx context.Context, volume, name string) (Snapshot, error) {
	_, snap, err := r.findSnapshot(ctx, volume, name)
	return snap, err
}

// findSnapshot returns a snapshot and the record of its volume.
func (r *Root) findSnapshot(ctx context.Context, volume, name string) (Record, Snapshot, error) {
	rec, _, err := r.owner(ctx, volume)
	if err != nil {
		return rec, Snapshot{}, err
	}
	snap, err := r.snapshotOf(rec, name)
	return rec, snap, err
}

// snapshotOf reads the record of a snapshot of a volume, with errors for users.
func (r *Root) snapshotOf(rec Record, name string) (Snapshot, error) {
	if err := CheckSnapshotName(name); err != nil {
		return Snapshot{}, err
	}
	dir, err := r.snapshotsOf(rec.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return Snapshot{}, noSnapshot(rec.Name, name)
	}
	if err != nil {
		return Snapshot{}, failed(err)
	}
	defer dir.Close()
	if err := dir.Refresh(); err != nil {
		return Snapshot{}, failed(err)
	}
	snap, err := readSnapshot(dir, rec.UUID, name)
	switch {
	case errors.Is(err, ErrNoSnapshot):
		return Snapshot{}, noSnapshot(rec.Name, name)
	case errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
		return Snapshot{}, fault.Unavailable("snapshot %s@%s cannot be used, its data is untouched: %s/%s/%s/%s/%s: %w", rec.Name, name, r.Path, metaName, snapsName, rec.UUID, name+suffix, err)
	}
	return snap, failed(err)
}

// whole refuses a snapshot that is not all there.
func (s Snapshot) whole(volume string) error {
	if s.Phase != Ready {
		return fault.Conflict("snapshot %s@%s: host %s is %s it", volume, s.Name, s.Host, s.Phase)
	}
	return nil
}

// OpenSnapshot opens the top directory of a snapshot, to be read or to be mounted
// read-only. done must be called when nothing of it is mounted any more.
func (r *Root) OpenSnapshot(ctx context.Context, volume, name string) (data *rooted.Dir, done func() error, err error) {
	rec, snap, err := r.findSnapshot(ctx, volume, name)
	if err != nil {
		return nil, nil, err
	}
	if err := snap.whole(rec.Name); err != nil {
		return nil, nil, err
	}
	data, done, err = r.openSnapshot(ctx, rec, name)
	if err != nil {
		return nil, nil, failed(fmt.Errorf("snapshot %s@%s: %w", rec.Name, name, dataReason(err)))
	}
	return data, done, nil
}

func (r *Root) openSnapshot(ctx context.Context, rec Record, name string) (*rooted.Dir, func() error, error) {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return nil, nil, err
	}
	release, err := r.hold(ctx, rec)
	if err != nil {
		return nil, nil, err
	}
	data, err := eng.OpenSnapshot(ctx, p, rec.volume(), name)
	if err != nil {
		return nil, nil, errors.Join(err, release())
	}
	return data, func() error {
		err := data.Close()
		return errors.Join(err, eng.CloseSnapshot(context.WithoutCancel(ctx), p, rec.volume(), name), release())
	}, nil
}

// CreateSnapshot makes a snapshot of a ready volume. It does not fail because files
// change while it is made; the record tells what it is worth. When it fails nothing
// of the snapshot is left or, if this host dies meanwhile, nothing after
// SettleSnapshots.
func (r *Root) CreateSnapshot(ctx context.Context, volume string, o SnapshotOptions, progress func(engine.Progress)) (Snapshot, error) {
	rec, err := r.ready(volume)
	if err != nil {
		return Snapshot{}, err
	}
	if err := r.MakeRoom(ctx); err != nil {
		return Snapshot{}, fmt.Errorf("snapshot volume %s: %w", volume, err)
	}
	snap, err := r.createSnapshot(ctx, rec, o, progress)
	if err != nil {
		return Snapshot{}, failed(fmt.Errorf("snapshot volume %s: %w", volume, err))
	}
	return snap, nil
}

func (r *Root) createSnapshot(ctx context.Context, rec Record, o SnapshotOptions, progress func(engine.Progress)) (_ Snapshot, err error) {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return Snapshot{}, err
	}
	if o.Name != "" {
		if err := CheckSnapshotName(o.Name); err != nil {
			return Snapshot{}, err
		}
	}
	var dir *rooted.Dir
	var snap Snapshot
	for range 10 {
		if dir, err = r.ensureSnapshots(rec.UUID); err != nil {
			return Snapshot{}, err
		}
		if snap, err = r.beginSnapshot(ctx, dir, rec, o); err == nil {
			break
		}
		err = errors.Join(err, dir.Close())
		if !errors.Is(err, fs.ErrNotExist) {
			break // else: the directory went with the last snapshot that was in it
		}
	}
	if err != nil {
		return Snapshot{}, err
	}
	defer dir.Close()
	foreign := false // data that is there already is not ours to remove
	defer func() {
		if err == nil {
			return
		}
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		if foreign {
			err = errors.Join(err, r.dropSnapshot(undo, dir, snap))
		} else {
			err = errors.Join(err, r.undoSnapshot(undo, dir, rec, snap))
		}
	}()
	release, err := r.hold(ctx, rec)
	if err != nil {
		return Snapshot{}, err
	}
	defer func() { err = errors.Join(err, release()) }()
	if err := r.step(ctx, "snapshot.data", rec.Name); err != nil {
		return Snapshot{}, err
	}
	fresh := r.keepFresh(ctx, dir, snap.Name+suffix)
	copied, err := eng.Snapshot(ctx, p, rec.volume(), snap.Name, progress)
	fresh()
	if errors.Is(err, fs.ErrExist) {
		foreign = true
		return Snapshot{}, fault.Conflict("there is data at %s/%s/%s/%s/%s that no record tells of", r.Path, metaName, snapsName, rec.UUID, snap.Name)
	}
	if errors.Is(err, fs.ErrNotExist) {
		if now, errNow := r.Record(rec.Name); errors.Is(errNow, ErrNoRecord) || errNow == nil && (now.UUID != rec.UUID || now.Phase != Ready) {
			err = errTaken // the data is on its way elsewhere
		}
	}
	if err != nil {
		return Snapshot{}, dataReason(err)
	}
	// A volume that was deleted meanwhile must not leave a snapshot behind.
	if alive, err := r.alive(ctx, rec); err != nil {
		return Snapshot{}, err
	} else if !alive {
		return Snapshot{}, fault.Conflict("it was removed meanwhile")
	}
	ready := snap
	ready.Phase = Ready
	ready.Consistency, ready.Files, ready.Bytes, ready.Unstable = copied.Consistency, copied.Files, copied.Bytes, copied.Unstable
	ready.Consistency = cmp.Or(o.Consistency, ready.Consistency)
	if o.Wait > 0 {
		ready.Until = r.Now().UTC().Add(o.Wait).Truncate(time.Second)
	}
	if err := r.step(ctx, "snapshot.ready", rec.Name); err != nil {
		return Snapshot{}, err
	}
	return ready, r.putSnapshot(ctx, dir, ready)
}

// alive tells whether all of a volume's data is still somewhere: under a name, or in
// the trash and not being deleted. What was read from it before is complete then.
func (r *Root) alive(ctx context.Context, rec Record) (bool, error) {
	now, err := r.Record(rec.Name)
	if err == nil && now.UUID == rec.UUID {
		return true, nil
	}
	if err != nil && !errors.Is(err, ErrNoRecord) {
		return false, err
	}
	entry, err := r.trashRecord(rec.UUID)
	if err == nil {
		return entry.Phase != Purging, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	_, err = r.byUUID(ctx, rec.UUID)
	if errors.Is(err, ErrNoRecord) {
		return false, nil
	}
	return err == nil, err
}

// byUUID finds the volume that has a UUID, whatever its name is now.
func (r *Root) byUUID(ctx context.Context, uuid string) (Record, error) {
	entries, err := r.Entries(ctx, nil)
	if err != nil {
		return Record{}, err
	}
	for _, entry := range entries {
		if entry.Err == nil && entry.Record.UUID == uuid {
			return entry.Record, nil
		}
	}
	return Record{}, ErrNoRecord
}

// timeName is the name of a snapshot that was given none.
func (r *Root) timeName() string { return r.Now().UTC().Format("20060102T150405Z") }

// beginSnapshot makes the record that a snapshot begins with.
func (r *Root) beginSnapshot(ctx context.Context, dir *rooted.Dir, rec Record, o SnapshotOptions) (Snapshot, error) {
	snap := Snapshot{
		Schema: snapshotSchema, Name: o.Name, UUID: rec.UUID, Volume: rec.Name, Engine: rec.Engine,
		CreatedAt: r.Now().UTC().Truncate(time.Second), Phase: Creating, Host: r.Host,
		Trigger: o.Trigger, Labels: o.Labels, Source: rec.madeFrom(), For: o.forVolume,
	}
	if snap.Trigger == "" {
		snap.Trigger = Manual
	}
	base := r.timeName()
	for try := 1; ; try++ {
		if o.Name == "" {
			snap.Name = base
			if try > 1 {
				snap.Name = fmt.Sprintf("%s-%d", base, try)
			}
		}
		data, err := snap.Encode()
		if err != nil {
			return Snapshot{}, err
		}
		if err := r.step(ctx, "snapshot.begin", rec.Name); err != nil {
			return Snapshot{}, err
		}
		err = r.makeFile(ctx, dir, snap.Name+suffix, data)
		if err == nil {
			return snap, nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return Snapshot{}, err
		}
		there, err := readSnapshot(dir, rec.UUID, snap.Name)
		if err == nil && there.Phase != Ready && there.Host == r.Host && there.Trigger != BeforeRollback && try < 100 {
			// What this host left when it was killed.
			if err := r.undoSnapshot(ctx, dir, rec, there); err != nil {
				return Snapshot{}, err
			}
			continue
		}
		if o.Name != "" || try >= 100 {
			return Snapshot{}, fault.Conflict("there is a snapshot %s already", snap.Name)
		}
	}
}

// putSnapshot replaces a snapshot's record.
func (r *Root) putSnapshot(ctx context.Context, dir *rooted.Dir, snap Snapshot) error {
	data, err := snap.Encode()
	if err != nil {
		return err
	}
	return r.replaceFile(ctx, dir, snap.Name+suffix, data)
}

// freshEvery is how often what takes long says that its host is still at it.
const freshEvery = time.Minute

// keepFresh keeps the time of a record near the present until stop is called, so
// that other hosts do not take what takes long for what a dead host has left.
func (r *Root) keepFresh(ctx context.Context, dir *rooted.Dir, name string) (stop func()) {
	return r.keepFreshEvery(ctx, dir, name, freshEvery)
}

func (r *Root) keepFreshEvery(ctx context.Context, dir *rooted.Dir, name string, every time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				// The file server's time, which others see.
				_ = unix.UtimesNanoAt(dir.FD(), name, nil, unix.AT_SYMLINK_NOFOLLOW) // the next one may succeed
			}
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}
