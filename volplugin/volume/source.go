package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// errGone says that what a volume is made from is not there any more.
var errGone = errors.New("source is gone")

// gone is the error of a source that will not come back.
func gone(format string, args ...any) error {
	return fault.NotFound("%w", absent{fmt.Sprintf(format, args...), errGone})
}

// sourceOf finds what a new volume is made from, nil for nothing, and the volume if it
// is one.
func (r *Root) sourceOf(spec options.Spec) (*Source, *Record, error) {
	switch {
	case spec.FromArchive:
		if r.Restore == nil {
			return nil, nil, fault.Unavailable("this Berth imports no archives")
		}
		return &Source{Archive: true}, nil, nil
	case spec.FromBackup != "":
		if r.Restore == nil {
			return nil, nil, fault.Unavailable("option from-backup=%s: this Berth keeps no backups", spec.FromBackup)
		}
		return &Source{Backup: spec.FromBackup, Found: foundBackup(spec.BackupFound), Paths: spec.BackupPaths}, nil, nil
	case spec.From != nil:
		return r.volumeSource("from", spec.From.String())
	case spec.Seed == "":
		return nil, nil, nil
	case !strings.Contains(spec.Seed, "/"):
		source, rec, err := r.volumeSource("seed", spec.Seed)
		if !errors.Is(err, errNoSource) {
			return source, rec, err
		}
	}
	dir, err := r.seed(spec.Seed)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil, fault.Invalid("option seed=%s: there is no such directory in %s, and no such volume", spec.Seed, r.Path)
		}
		return nil, nil, fmt.Errorf("option seed=%s: %w", spec.Seed, failed(err))
	}
	return &Source{Seed: spec.Seed}, nil, dir.Close()
}

// foundBackup is what records keep of a backup; nil stays nil.
func foundBackup(b *backup.Backup) *FoundBackup {
	if b == nil {
		return nil
	}
	return &FoundBackup{ID: b.ID, UUID: b.UUID, Host: b.Host, Time: b.Time.UTC(), Files: b.Files, Bytes: b.Bytes}
}

// findBackup puts the backup on record that a volume is made from.
func (r *Root) findBackup(ctx context.Context, rec Record) (Record, error) {
	if r.FindBackup == nil {
		return Record{}, fault.Unavailable("this Berth keeps no backups")
	}
	found, err := r.FindBackup(ctx, rec)
	if err != nil || found == nil {
		return rec, err
	}
	if err := r.step(ctx, "fill.found", rec.Name); err != nil {
		return Record{}, err
	}
	return r.advance(ctx, rec, func(now *Record) { now.Source.Found = foundBackup(found) })
}

// errNoSource says that a volume named as a source does not exist.
var errNoSource = errors.New("no such source")

// volumeSource looks at a volume, or its snapshot, that an option names.
func (r *Root) volumeSource(option, value string) (*Source, *Record, error) {
	ref, err := ParseReference(value)
	if err != nil {
		return nil, nil, fault.Invalid("option %s=%.210q: %w", option, value, absent{err.Error(), errNoSource})
	}
	rec, err := r.ready(ref.Volume)
	if errors.Is(err, ErrNoRecord) {
		return nil, nil, fault.Invalid("option %s=%s: %w", option, value, absent{err.Error(), errNoSource})
	}
	if err != nil {
		return nil, nil, fmt.Errorf("option %s=%s: %w", option, value, err)
	}
	if ref.Snapshot != "" {
		snap, err := r.snapshotOf(rec, ref.Snapshot)
		if errors.Is(err, ErrNoSnapshot) {
			return nil, nil, fault.Invalid("option %s=%s: %s", option, value, err.Error())
		}
		if err == nil {
			err = snap.whole(rec.Name)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("option %s=%s: %w", option, value, err)
		}
	}
	return &Source{Volume: rec.Name, UUID: rec.UUID, Snapshot: ref.Snapshot}, &rec, nil
}

// like fills in what a clone has from its original unless it was asked for, and tells
// whether the original's engine makes it.
func (r *Root) like(ctx context.Context, p engine.Place, from Record, spec *options.Spec) bool {
	if spec.Engine != "" && spec.Engine != from.Engine {
		return false
	}
	eng, ok := r.Engines.Get(from.Engine)
	if !ok {
		return false
	}
	able, err := eng.Probe(ctx, p)
	if err != nil || spec.Size > 0 && !able.Limit || spec.FS != "" && spec.FS != from.FS {
		return false
	}
	if spec.Size == 0 {
		spec.Size = from.Size
	}
	spec.Engine, spec.FS = from.Engine, from.FS
	spec.Sparse, spec.NoCOW = spec.Sparse || from.Sparse, spec.NoCOW || from.NoCOW
	return true
}

// seed opens a directory of the root by its path. No element is a link or a mount
// point, and none is Berth's own.
func (r *Root) seed(path string) (*rooted.Dir, error) {
	elements := strings.Split(path, "/")
	if slices.Contains(elements, "") || slices.Contains(elements, ".") || slices.Contains(elements, "..") || elements[0] == metaName {
		return nil, fault.Invalid("it is not the path of a directory below the root")
	}
	dir := r.top
	for _, element := range elements {
		next, err := dir.Dir(element)
		if dir != r.top {
			err = errors.Join(err, dir.Close())
		}
		if err != nil {
			return nil, err
		}
		dir = next
	}
	return dir, nil
}

// original is the volume that another one is made from, whatever its name is now.
func (r *Root) original(ctx context.Context, s Source) (Record, error) {
	rec, err := r.Record(s.Volume)
	if err != nil || rec.UUID != s.UUID {
		if err != nil && !errors.Is(err, ErrNoRecord) {
			return rec, err
		}
		if rec, err = r.byUUID(ctx, s.UUID); errors.Is(err, ErrNoRecord) {
			return rec, gone("volume %s, which it is made from, is gone", s.Volume)
		}
		if err != nil {
			return rec, err
		}
	}
	if rec.Phase == Ready {
		return rec, nil
	}
	if rec.Phase == Broken || rec.Phase == Removing {
		return rec, gone("volume %s, which it is made from, is %s", rec.Name, rec.Phase)
	}
	return rec, fault.Unavailable("volume %s, which it is made from, is %s", rec.Name, rec.Phase)
}

// open opens the tree that is copied into a new volume. done must be called.
func (r *Root) openSource(ctx context.Context, rec Record) (src *rooted.Dir, done func() error, err error) {
	s := *rec.Source
	switch {
	case s.Adopt != "":
		parent, base, err := openParent(s.Adopt)
		if err != nil {
			return nil, nil, sourceError(s.Adopt, err)
		}
		dir, err := parent.Dir(base)
		if err := errors.Join(err, parent.Close()); err != nil {
			return nil, nil, sourceError(s.Adopt, err)
		}
		return dir, dir.Close, nil
	case s.Seed != "":
		dir, err := r.seed(s.Seed)
		if err != nil {
			return nil, nil, sourceError(s.Seed, err)
		}
		return dir, dir.Close, nil
	}
	from, err := r.original(ctx, s)
	if err != nil {
		return nil, nil, err
	}
	if s.Snapshot != "" {
		src, done, err := r.openSnapshot(ctx, from, s.Snapshot)
		if errors.Is(err, fs.ErrNotExist) {
			err = gone("snapshot %s@%s, which it is made from, is gone", from.Name, s.Snapshot)
		}
		return src, done, err
	}
	able, err := r.Abilities(ctx, from)
	if err != nil {
		return nil, nil, err
	}
	if able.Instant {
		return r.openMoment(ctx, from, rec)
	}
	release, err := r.hold(ctx, from)
	if err != nil {
		return nil, nil, err
	}
	data, err := r.Data(from)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = gone("the data of volume %s, which it is made from, is gone", from.Name)
		}
		return nil, nil, errors.Join(err, release())
	}
	return data, func() error { return errors.Join(data.Close(), release()) }, nil
}

// openMoment opens a snapshot of a volume that is there only until done is called, so
// that what is copied is the state of one moment. SettleSnapshots removes it when this
// host dies.
func (r *Root) openMoment(ctx context.Context, from, rec Record) (*rooted.Dir, func() error, error) {
	snap, err := r.createSnapshot(ctx, from, SnapshotOptions{Name: "clone-" + rec.UUID, Trigger: ForClone, forVolume: rec.UUID}, nil)
	if fault.Kind(err) == "conflict" {
		// What an earlier attempt has left is as old as that one.
		if there, errThere := r.snapshotOf(from, "clone-"+rec.UUID); errThere == nil && there.For == rec.UUID {
			if err = r.removeSnapshot(ctx, from, there); err == nil {
				snap, err = r.createSnapshot(ctx, from, SnapshotOptions{Name: there.Name, Trigger: ForClone, forVolume: rec.UUID}, nil)
			}
		}
	}
	if err != nil {
		return nil, nil, err
	}
	remove := func() error {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		return r.removeSnapshot(undo, from, snap)
	}
	src, done, err := r.openSnapshot(ctx, from, snap.Name)
	if err != nil {
		return nil, nil, errors.Join(err, remove())
	}
	return src, func() error { return errors.Join(done(), remove()) }, nil
}

// sourceError words what is wrong with a directory that data is made from.
func sourceError(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return gone("directory %s, which it is made from, is gone", path)
	}
	return fmt.Errorf("%s: %w", path, reason(err))
}

// openParent opens the directory that path is an entry of. No element of path is a
// symbolic link.
func openParent(path string) (parent *rooted.Dir, base string, err error) {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return nil, "", fault.Invalid("directory %.200q: want an absolute path without . and ..", path)
	}
	dir, base := filepath.Split(path)
	fd, err := unix.Openat2(unix.AT_FDCWD, dir, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if errors.Is(err, unix.ELOOP) {
		return nil, "", fault.Conflict("%s: %w", dir, rooted.ErrSymlink)
	}
	if err != nil {
		return nil, "", &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	parent, err = rooted.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	return parent, base, err
}
