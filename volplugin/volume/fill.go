package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// CreateBegin makes the volume name as far as that is quick. A volume whose data is
// made from something else is restoring then, and CreateFill makes it ready. An
// existing volume is returned as it is, whatever spec says; one that is broken is an
// error. begun tells that there is something for CreateFill to do which nobody else
// does.
func (r *Root) CreateBegin(ctx context.Context, name string, spec options.Spec) (rec Record, begun bool, err error) {
	limit := time.Now().Add(patience)
	for {
		rec, err := r.Record(name)
		switch {
		case errors.Is(err, ErrNoRecord):
			rec, begun, err = r.createNew(ctx, name, spec)
			if errors.Is(err, errTaken) {
				continue
			}
			return rec, begun, failed(err)
		case errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
			return Record{}, false, r.unusable(name, err)
		case err != nil:
			return Record{}, false, err
		case rec.Phase == Broken:
			return rec, false, r.busy(rec)
		case rec.Visible():
			return rec, false, nil
		}
		if err := r.settleWithin(ctx, rec, limit); err != nil {
			return Record{}, false, failed(err)
		}
	}
}

func (r *Root) createNew(ctx context.Context, name string, spec options.Spec) (Record, bool, error) {
	source, from, err := r.sourceOf(spec)
	if err != nil {
		return Record{}, false, fmt.Errorf("create volume %s: %w", name, err)
	}
	if source == nil {
		rec, err := r.create(ctx, name, spec)
		return rec, false, err
	}
	p, err := r.place()
	if err != nil {
		return Record{}, false, err
	}
	same := spec.From != nil && r.like(ctx, p, *from, &spec)
	rec, to, err := r.plan(ctx, p, name, spec)
	if err != nil {
		return Record{}, false, err
	}
	if to.found {
		// Of another host that was faster, or of nobody.
		if _, err := r.Record(name); !errors.Is(err, ErrNoRecord) {
			return Record{}, false, errTaken
		}
		return Record{}, false, fault.Conflict("create volume %s: there is data of that name in %s already; it is taken over without option from or seed", name, r.Path)
	}
	if same && spec.Given["engine"] == "" {
		rec.EngineReason = "that of volume " + from.Name + ", from which it is cloned"
	}
	rec, err = r.beginFill(ctx, rec, source)
	return rec, err == nil, err
}

// beginFill makes the record of a volume that is restoring.
func (r *Root) beginFill(ctx context.Context, rec Record, source *Source) (Record, error) {
	if err := r.MakeRoom(ctx); err != nil {
		return Record{}, fmt.Errorf("create volume %s: %w", rec.Name, err)
	}
	rec.Phase, rec.Source = Restoring, source
	data, err := rec.Encode()
	if err != nil {
		return Record{}, err
	}
	if err := r.step(ctx, "create.claim", rec.Name); err != nil {
		return Record{}, err
	}
	if err := r.makeFile(ctx, r.volumes, rec.Name+suffix, data); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return Record{}, errTaken
		}
		return Record{}, fmt.Errorf("create volume %s: %w", rec.Name, err)
	}
	return rec, nil
}

// CreateFill makes the data of a volume that is restoring and makes it ready. One that
// was interrupted starts over. When ctx ends, or the storage is away, the volume stays
// restoring; when its data can never be made it is broken, for the reason that the
// error tells: that of an archive is sent once, and not again after an interruption. It
// never becomes an empty volume. A volume that is ready is no error.
func (r *Root) CreateFill(ctx context.Context, name string, progress func(engine.Progress)) (Record, error) {
	rec, err := r.Record(name)
	switch {
	case errors.Is(err, ErrNoRecord):
		return Record{}, r.noVolume(name)
	case errors.Is(err, ErrDamaged), errors.Is(err, ErrNewer):
		return Record{}, r.unusable(name, err)
	case err != nil:
		return Record{}, err
	case rec.Phase != Restoring:
		return rec, r.busy(rec) // nil for a ready one
	}
	if rec.Host != r.Host {
		mine, err := r.takeOver(ctx, rec)
		if errors.Is(err, errTaken) {
			err = r.busy(rec)
		}
		if err != nil {
			return Record{}, failed(err)
		}
		rec = mine
	}
	ready, err := r.fill(ctx, rec, progress)
	if err != nil {
		return Record{}, failed(fmt.Errorf("create volume %s: %w", name, errors.Join(err, r.breakOff(ctx, rec, err))))
	}
	return ready, nil
}

// CreateAbort removes a volume that is restoring or broken, with what has been made of
// its data. The caller sees to it that no CreateFill of this host is at work on it. A
// volume that is on its way out of the trash, or that is a directory which was moved,
// is completed instead.
func (r *Root) CreateAbort(ctx context.Context, name string) error {
	rec, err := r.Record(name)
	if errors.Is(err, ErrNoRecord) {
		return nil
	}
	if err != nil {
		return err
	}
	if rec.Phase != Restoring && rec.Phase != Broken {
		return r.busy(rec) // nil for a ready one
	}
	err = r.abort(ctx, rec)
	if errors.Is(err, errTaken) {
		return r.busy(rec)
	}
	if err != nil {
		return failed(fmt.Errorf("remove volume %s: %w", name, err))
	}
	return nil
}

// breakOff records that a volume's data can never be made, unless the next attempt may
// succeed. A volume whose data is as it was before single paths were to be restored is
// ready instead.
func (r *Root) breakOff(ctx context.Context, rec Record, cause error) error {
	switch fault.Kind(failed(cause)) {
	case "unavailable", "timeout":
		return nil
	}
	if ctx.Err() != nil || errors.Is(cause, errTaken) || rec.Source.Trash {
		return nil
	}
	// fill may have gone on since rec.
	if now, err := r.Record(rec.Name); err == nil && now.UUID == rec.UUID && now.Host == r.Host && now.untouched() {
		return r.unplace(ctx, now)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	if err := r.step(ctx, "fill.broken", rec.Name); err != nil {
		return err
	}
	reason := cause.Error()
	if kept := rec.Source.Kept; kept != "" {
		reason += fmt.Sprintf("; what was there before is snapshot %s@%s: roll back to it", rec.Name, kept)
	}
	_, err := r.advance(ctx, rec, func(now *Record) { now.Phase, now.Host, now.Reason = Broken, "", reason })
	if err != nil {
		return err
	}
	return nil
}

// abort removes a restoring or broken volume: what was made of its data, then its
// record.
func (r *Root) abort(ctx context.Context, rec Record) error {
	if rec.Source != nil && rec.Source.Kept != "" {
		return fault.Conflict("volume %s: restoring backup %s in its place has not succeeded; what was there before is snapshot %s@%s: roll back to it first", rec.Name, rec.Source.Backup, rec.Name, rec.Source.Kept)
	}
	if rec.Phase == Restoring {
		if rec.Host != r.Host {
			var err error
			if rec, err = r.takeOver(ctx, rec); err != nil {
				return err
			}
		}
		if rec.Source.Trash || rec.Source.moves() {
			_, err := r.fill(ctx, rec, nil)
			if err == nil || !errors.Is(err, errGone) {
				return err
			}
		}
	}
	if rec.Source != nil && rec.Source.Filling && !rec.Source.moves() {
		if err := r.discard(ctx, rec); err != nil {
			return err
		}
	}
	if err := r.step(ctx, "abort.record", rec.Name); err != nil {
		return err
	}
	return r.drop(rec)
}

// moves tells whether the data itself becomes the volume's.
func (s Source) moves() bool { return s.Adopt != "" && !s.Copy }

// discard deletes the data of a volume that was never ready.
func (r *Root) discard(ctx context.Context, rec Record) error {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return err
	}
	v := rec.volume()
	if err := r.step(ctx, "fill.discard", rec.Name); err != nil {
		return err
	}
	// Data in the trash is from an earlier attempt to discard.
	if err := eng.Destroy(ctx, p, v); err != nil {
		return err
	}
	if err := eng.Detach(ctx, p, v); err != nil {
		return err
	}
	if err := eng.Abandon(p, v); err != nil {
		return err
	}
	if err := eng.Retire(ctx, p, v); err != nil {
		return err
	}
	return eng.Destroy(ctx, p, v)
}

// fill makes the data of a restoring volume of this host.
func (r *Root) fill(ctx context.Context, rec Record, progress func(engine.Progress)) (Record, error) {
	defer r.keepFresh(ctx, r.volumes, rec.Name+suffix)()
	if rec.Source.Trash {
		return r.reinstate(ctx, rec)
	}
	if rec.Source.Backup != "" && rec.Source.Found == nil {
		var err error
		if rec, err = r.findBackup(ctx, rec); err != nil {
			return Record{}, err
		}
	}
	if rec.Source.Kept != "" {
		return r.fillInPlace(ctx, rec, progress)
	}
	eng, p, err := r.keeper(rec)
	if err != nil {
		return Record{}, err
	}
	first := !rec.Source.Filling
	if first {
		found, err := eng.Find(p, rec.Name)
		if err == nil && found {
			err = fault.Conflict("there is something called %s in %s already", rec.Name, r.Path)
		}
		if err != nil {
			return Record{}, reason(err)
		}
		if err := r.step(ctx, "fill.begin", rec.Name); err != nil {
			return Record{}, err
		}
		// From now on data under the name is this volume's.
		if rec, err = r.advance(ctx, rec, func(now *Record) { now.Source.Filling = true }); err != nil {
			return Record{}, err
		}
	}
	switch {
	case rec.Source.moves():
		err = r.fillByMove(ctx, eng, p, rec)
	default:
		err = r.fillByCopy(ctx, eng, p, rec, first, progress)
	}
	if err == nil && !rec.Source.moves() {
		err = r.sourceStood(ctx, *rec.Source)
	}
	if errors.Is(err, errForeign) {
		// Whoever removes the volume must not take it for the volume's.
		_, errMark := r.advance(context.WithoutCancel(ctx), rec, func(now *Record) { now.Source.Filling = false })
		err = errors.Join(fault.Conflict("there is something called %s in %s already", rec.Name, r.Path), errMark)
	}
	if err != nil {
		return Record{}, err
	}
	if err := r.finishing(ctx, eng, p, rec); err != nil {
		return Record{}, err
	}
	if err := r.step(ctx, "fill.ready", rec.Name); err != nil {
		return Record{}, err
	}
	return r.advance(ctx, rec, func(now *Record) { now.Phase, now.Host, now.Source.Filling = Ready, "", false })
}

// sourceStood errs when another host has begun to delete what was copied before the copy
// was complete: files that were gone already are missing in it.
func (r *Root) sourceStood(ctx context.Context, s Source) error {
	if s.Volume == "" {
		return nil
	}
	from, err := r.Record(s.Volume)
	if err != nil && !errors.Is(err, ErrNoRecord) {
		return err
	}
	if err != nil || from.UUID != s.UUID {
		from = Record{Name: s.Volume, UUID: s.UUID}
	}
	alive, err := r.alive(ctx, from)
	if err == nil && alive && s.Snapshot != "" {
		snap, errSnap := r.snapshotOf(from, s.Snapshot)
		if errSnap != nil && !errors.Is(errSnap, ErrNoSnapshot) {
			return errSnap
		}
		alive = errSnap == nil && snap.Phase == Ready
	}
	if err == nil && !alive {
		err = gone("%s was removed while it was copied", Reference{Volume: s.Volume, Snapshot: s.Snapshot})
	}
	return err
}

// finishing gives the data that is there the limit and the owner that were asked for.
func (r *Root) finishing(ctx context.Context, eng engine.Engine, p engine.Place, rec Record) error {
	found, err := eng.Find(p, rec.Name)
	if err == nil && !found {
		err = gone("what has been made of the data of volume %s is gone", rec.Name)
	}
	attr := rec.attributes()
	limit := rec.Source.moves() && rec.Size > 0
	if err != nil || attr.UID == nil && attr.GID == nil && attr.Mode == nil && !limit {
		return err
	}
	if err := r.step(ctx, "fill.attributes", rec.Name); err != nil {
		return err
	}
	created, err := eng.Create(ctx, p, rec.volume(), attr)
	if err != nil {
		return reason(err)
	}
	if created {
		// It went away between the two calls. An empty volume is never what was asked for.
		return errors.Join(gone("what has been made of the data of volume %s is gone", rec.Name), eng.Abandon(p, rec.volume()))
	}
	return nil
}

// errForeign says that somebody has put data where a volume's was to be made.
var errForeign = errors.New("foreign data")

// fillByCopy clones a volume of the same engine, or copies file by file. first says
// that nothing can be there from an earlier attempt.
func (r *Root) fillByCopy(ctx context.Context, eng engine.Engine, p engine.Place, rec Record, first bool, progress func(engine.Progress)) error {
	if rec.Source.Volume != "" {
		from, err := r.original(ctx, *rec.Source)
		if err != nil {
			return err
		}
		// A seed is copied too where the engine knows a faster way.
		if from.Engine == rec.Engine {
			return r.fillByClone(ctx, eng, p, from, rec, first, progress)
		}
	}
	if rec.Source.Backup != "" || rec.Source.Archive {
		return r.fillInto(ctx, eng, p, rec, first, func(dst *rooted.Dir) error {
			if r.Restore == nil {
				return fault.Unavailable("this Berth keeps no backups")
			}
			return r.Restore(ctx, rec, dst, progress)
		})
	}
	src, done, err := r.openSource(ctx, rec)
	if err != nil {
		return err
	}
	err = r.fillInto(ctx, eng, p, rec, first, func(dst *rooted.Dir) error {
		o := tree.Options{}
		if progress != nil {
			o.Progress = func(files, bytes uint64) { progress(engine.Progress{Files: files, Bytes: bytes}) }
		}
		_, err := tree.Copy(ctx, src, dst, o)
		return err
	})
	return errors.Join(err, done())
}

func (r *Root) fillByClone(ctx context.Context, eng engine.Engine, p engine.Place, from, rec Record, first bool, progress func(engine.Progress)) error {
	release, err := r.hold(ctx, from)
	if err != nil {
		return err
	}
	if err := r.step(ctx, "fill.clone", rec.Name); err != nil {
		return errors.Join(err, release())
	}
	_, err = eng.Clone(ctx, p, from.volume(), rec.Source.Snapshot, rec.volume(), progress)
	switch {
	case errors.Is(err, fs.ErrExist) && first:
		err = errForeign
	case errors.Is(err, fs.ErrExist):
		// Made by the attempt that was interrupted: an engine has nothing half-made
		// under the final name.
		err = nil
	case errors.Is(err, fs.ErrNotExist):
		err = gone("the data of %s, which it is made from, is gone", Reference{Volume: from.Name, Snapshot: rec.Source.Snapshot})
	}
	return errors.Join(err, release())
}

// fillInto makes the data of rec by what write puts into it. An earlier attempt's data
// is deleted first.
func (r *Root) fillInto(ctx context.Context, eng engine.Engine, p engine.Place, rec Record, first bool, write func(dst *rooted.Dir) error) (err error) {
	if !first {
		if err := r.discard(ctx, rec); err != nil {
			return err
		}
	}
	if err := r.step(ctx, "fill.create", rec.Name); err != nil {
		return err
	}
	created, err := eng.Create(ctx, p, rec.volume(), engine.Attributes{})
	if err != nil {
		return err
	}
	if !created {
		return errForeign
	}
	if err := eng.Attach(ctx, p, rec.volume()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, eng.Detach(context.WithoutCancel(ctx), p, rec.volume())) }()
	handle, err := eng.Open(p, rec.volume())
	if err != nil {
		return err
	}
	defer handle.Close()
	dst, err := rooted.Open(handle.ProcPath()) // a handle that can be read
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := r.step(ctx, "fill.copy", rec.Name); err != nil {
		return err
	}
	return write(dst)
}

// fillByMove makes a directory the volume's data by renaming it.
func (r *Root) fillByMove(ctx context.Context, eng engine.Engine, p engine.Place, rec Record) error {
	found, err := eng.Find(p, rec.Name)
	if err != nil || found {
		return err // by the attempt that was interrupted
	}
	parent, base, err := openParent(rec.Source.Adopt)
	if err != nil {
		return sourceError(rec.Source.Adopt, err)
	}
	defer parent.Close()
	dir, err := parent.Handle(base)
	if err != nil {
		return sourceError(rec.Source.Adopt, err)
	}
	defer dir.Close()
	if err := r.step(ctx, "fill.move", rec.Name); err != nil {
		return err
	}
	err = parent.RenameNew(base, r.top, rec.Name)
	switch {
	case errors.Is(err, unix.EXDEV):
		return fault.Invalid("%s is not on the file system of %s, or on another mount of it; it can only be copied", rec.Source.Adopt, r.Path)
	case errors.Is(err, fs.ErrExist):
		return fault.Conflict("there is something called %s in %s already", rec.Name, r.Path)
	case err != nil:
		return sourceError(rec.Source.Adopt, err)
	}
	return errors.Join(r.top.Sync(), parent.Sync())
}

// fillOrAbort is CreateFill for callers that wait for it: a failure leaves nothing.
func (r *Root) fillOrAbort(ctx context.Context, rec Record, progress func(engine.Progress)) (Record, error) {
	ready, err := r.fill(ctx, rec, progress)
	if err == nil {
		return ready, nil
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	return Record{}, failed(fmt.Errorf("create volume %s: %w", rec.Name, errors.Join(err, r.giveUp(undo, rec))))
}

// giveUp removes a volume whose fill has failed. A directory that was moved and is in
// its place already stays a volume.
func (r *Root) giveUp(ctx context.Context, rec Record) error {
	now, err := r.Record(rec.Name)
	if errors.Is(err, ErrNoRecord) {
		return nil
	}
	if err != nil || now.UUID != rec.UUID || now.Phase != Restoring || now.Host != r.Host {
		return err
	}
	if now.Source.moves() {
		eng, p, err := r.keeper(now)
		if err != nil {
			return err
		}
		if found, err := eng.Find(p, now.Name); err != nil || found {
			return err
		}
		return r.drop(now)
	}
	return r.abort(ctx, now)
}
