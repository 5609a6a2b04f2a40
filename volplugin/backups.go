package volplugin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	"github.com/google/uuid"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/keylock"
	"github.com/berth-plugin/berth/shared/notify"
	"github.com/berth-plugin/berth/shared/state"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/mount"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// A BackupConfig says how backups are kept.
type BackupConfig struct {
	// Targets is the directory of the targets' files.
	Targets string
	// Scratch is a directory of this host in which backups are verified.
	Scratch string
	// Version of Berth, for manifests.
	Version string
	// Open makes the engine of a target. It does not speak to the repository.
	Open func(backup.Target) (backup.Engine, error)
}

// backups are what this process does with targets.
type backups struct {
	BackupConfig
	targets *backup.Targets
	// stage is where a volume's snapshot is seen at the same path in each backup.
	stage string
	db    *state.DB
	// locks has one lock per volume, by UUID: one backup of a volume is made at a time.
	locks *keylock.Locker

	mu     sync.Mutex
	active map[string]bool // snapshots that are being backed up, by snapshotKey
}

// errNoBackups is the error of all that has to do with backups where none are kept.
var errNoBackups = fault.Unavailable("this Berth keeps no backups: it was started without a place for what belongs to them")

// openBackups is nil when the Config keeps none.
func openBackups(cfg Config) (*backups, error) {
	if cfg.Backups == nil || cfg.Local == "" {
		return nil, nil
	}
	targets, err := backup.OpenTargets(cfg.Backups.Targets)
	if err != nil {
		return nil, err
	}
	b := &backups{
		BackupConfig: *cfg.Backups, targets: targets, db: cfg.DB, locks: keylock.New(), active: map[string]bool{},
		stage: filepath.Join(cfg.Local, "backups"),
	}
	return b, os.MkdirAll(b.stage, 0o700)
}

// target reads a target by its name; "" is the only one there is. It asks no repository.
func (b *backups) target(name string) (backup.Target, error) {
	if b == nil {
		return backup.Target{}, errNoBackups
	}
	if name == "" {
		names, err := b.targets.Names()
		switch {
		case err != nil:
			return backup.Target{}, err
		case len(names) == 0:
			return backup.Target{}, fault.NotFound("there is no target for backups yet: docker berth target add makes one")
		case len(names) > 1:
			return backup.Target{}, fault.Invalid("there are several targets, so that one has to be named: %s", strings.Join(names, ", "))
		}
		name = names[0]
	}
	return b.targets.Get(name)
}

// engine opens a target, whose place may take a while to answer.
func (b *backups) engine(name string) (backup.Target, backup.Engine, error) {
	target, err := b.target(name)
	if err != nil {
		return target, nil, err
	}
	eng, err := b.Open(target)
	return target, eng, err
}

// snapshotKey names a snapshot whatever its volume is called.
func snapshotKey(uuid, snapshot string) string { return uuid + "@" + snapshot }

// using notes that a snapshot is being backed up, until done is called.
func (b *backups) using(uuid, snapshot string) (done func()) {
	key := snapshotKey(uuid, snapshot)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.active[key] = true
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.active, key)
	}
}

// uses tells whether a snapshot is being backed up.
func (b *backups) uses(uuid, snapshot string) bool {
	if b == nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.active[snapshotKey(uuid, snapshot)]
}

// A backupJob is a backup that is to be made.
type backupJob struct {
	volume string
	// snapshot that is backed up, "" for one that is made for it.
	snapshot string
	// target is "" for the volume's own.
	target string
	tags   []string
	// full reads all files.
	full bool
}

// rereadEvery is how often all files of a volume are read, whose snapshots are copies:
// a file that was changed without a change of size and modification time is not seen
// otherwise.
const rereadEvery = 7 * 24 * time.Hour

// parentTries is how many backups in a row may fail that build on an earlier one, this
// one included.
const parentTries = 3

// tagScheduled marks the backups that a schedule has made, tagDue when they were due.
const (
	tagScheduled = "schedule"
	tagDue       = "due="
)

// backUp makes a backup and notes what came of it.
func (d *Driver) backUp(ctx context.Context, job backupJob, report *reporter) (out control.Backup, err error) {
	b := d.backups
	if b == nil {
		return out, errNoBackups
	}
	if err := volume.CheckName(job.volume); err != nil {
		return out, err
	}
	s, err := d.storeOf(ctx, job.volume)
	if err != nil {
		return out, fmt.Errorf("volume %s: %w", job.volume, err)
	}
	found, _, err := s.find(ctx, job.volume)
	if err != nil {
		return out, err
	}
	if found.Broken != "" {
		return out, fault.Unavailable("volume %s: %s", job.volume, found.Broken)
	}
	rec := found.Record
	if job.target == "" {
		job.target = b.targetOf(rec)
	}
	target, eng, err := b.engine(job.target)
	if err != nil {
		return out, fmt.Errorf("volume %s: %w", job.volume, err)
	}
	unlock, err := d.lockBackup(ctx, job.volume, rec.UUID)
	if err != nil {
		return out, err
	}
	begin, before := d.cfg.Now(), b.state(rec.UUID)
	// What is stored now is what is known of it if this process is killed.
	if err := b.change(rec.UUID, func(st *backupState) {
		st.Last, st.Error = begin, "it was interrupted"
		st.Failures++
	}); err != nil {
		unlock()
		return out, err
	}
	done, err := d.backUpTo(ctx, s, rec, job, target, eng, unlock, report)
	if err != nil && ctx.Err() != nil {
		// Whoever ended it knows, and nothing is wrong with what the next one builds on.
		return out, errors.Join(err, b.change(rec.UUID, func(st *backupState) {
			st.Error = "it was cancelled"
			st.Failures--
		}))
	}
	if job.snapshot != "" && errors.Is(err, volume.ErrNoSnapshot) {
		// A slip of whoever asks says nothing of the volume's backups.
		return out, errors.Join(fmt.Errorf("back up volume %s to %s: %w", job.volume, target.Name, err), b.change(rec.UUID, func(st *backupState) { *st = before }))
	}
	d.tellBackup(job.volume, target.Name, done.Backup, err)
	if err != nil {
		return out, errors.Join(fmt.Errorf("back up volume %s to %s: %w", job.volume, target.Name, err), b.failed(rec.UUID, err))
	}
	done.Took = d.cfg.Now().Sub(begin)
	return done.Backup, b.ended(rec.UUID, done)
}

// tellBackup tells people how a backup went.
func (d *Driver) tellBackup(name, target string, done control.Backup, err error) {
	e := notify.Event{Key: "backup " + name, Title: fmt.Sprintf("Volume %s is backed up to %s", name, target)}
	switch {
	case err != nil:
		e.Failed, e.Title, e.Text = true, fmt.Sprintf("Volume %s could not be backed up to %s", name, target), err.Error()
	case done.Incomplete:
		e.Failed, e.Title = true, fmt.Sprintf("The backup of volume %s to %s is incomplete", name, target)
		e.Text = done.Reference + " lacks " + strings.Join(done.Missing, "; ")
	case done.Unchanged:
		e.Text = fmt.Sprintf("%s: nothing has changed since it was made at %s", done.Reference, done.Time.UTC().Format(time.RFC3339))
	default:
		e.Text = fmt.Sprintf("%s: %d files, %s, of which %s are new", done.Reference, done.Files, units.HumanSize(float64(done.Bytes)), units.HumanSize(float64(done.Added)))
	}
	d.cfg.Tell(e)
}

func (d *Driver) lockBackup(ctx context.Context, name, id string) (unlock func(), err error) {
	wait, cancel := context.WithTimeout(ctx, d.cfg.request)
	defer cancel()
	if unlock, err = d.backups.locks.Lock(wait, id); err != nil {
		return nil, fault.Conflict("volume %s is being backed up already", name)
	}
	return unlock, nil
}

// backUpTo makes the snapshot, unless there is one, and backs it up. unlock is called when
// nothing works on the backup any more.
func (d *Driver) backUpTo(ctx context.Context, s *store, rec volume.Record, job backupJob, target backup.Target, eng backup.Engine, unlock func(), report *reporter) (madeBackup, error) {
	kept := job.snapshot != ""
	var out madeBackup
	err := d.onSnapshot(ctx, s, rec, job.snapshot, unlock, report, func(ctx context.Context, root *volume.Root, snapshot string) (err error) {
		job.snapshot = snapshot
		out, err = d.backUpSnapshot(ctx, s, root, job, kept, target, eng, report)
		return err
	})
	if err != nil {
		return madeBackup{}, err // out may be written to still
	}
	return out, nil
}

// onSnapshot calls fn with a snapshot of a volume, or, if it is "", with one that is
// made for that and removed afterwards. When ctx ends it waits for fn, but not for
// storage that hangs. unlock is called when fn has ended, whenever that is.
func (d *Driver) onSnapshot(ctx context.Context, s *store, rec volume.Record, snapshot string, unlock func(), report *reporter, fn func(ctx context.Context, root *volume.Root, snapshot string) error) error {
	own := snapshot == ""
	if own {
		snapshot = "backup-" + d.cfg.Now().UTC().Format(dueName) + "-" + uuid.NewString()[:8]
	}
	unused := d.backups.using(rec.UUID, snapshot)
	tidy := func() {
		defer unlock()
		defer unused()
		if !own {
			return
		}
		if err := d.dropBackupSnapshot(context.WithoutCancel(ctx), rec.UUID, snapshot); err != nil {
			d.cfg.Log.WithField("volume", rec.Name).WithError(err).Warn("remove the snapshot that was read: tried again in the background")
		}
	}
	if own {
		o := volume.SnapshotOptions{Name: snapshot, Trigger: volume.ForBackup}
		tell := func(p control.Progress) {
			p.Step = "taking a snapshot"
			report.send(p)
		}
		if err := d.backupSnapshot(ctx, s, rec, o, tell); err != nil {
			unused()
			unlock()
			return err
		}
	}
	ended := make(chan struct{})
	var begun bool
	var result error
	err := s.inRoot(ctx, func() { close(ended) }, func(ctx context.Context, root *volume.Root) error {
		begun = true
		result = fn(ctx, root, snapshot)
		return result
	})
	hangs := time.NewTimer(d.cfg.request)
	defer hangs.Stop()
	select {
	case <-ended:
		tidy()
		if begun {
			return result // a backup that was complete when ctx ended is one
		}
		return err
	case <-hangs.C:
		go func() {
			<-ended
			tidy()
		}()
		return err
	}
}

// dropBackupSnapshot removes a snapshot of a volume that may have another name now, or
// may be in the trash; then it goes with that.
func (d *Driver) dropBackupSnapshot(ctx context.Context, uuid, snapshot string) error {
	ctx, cancel := context.WithTimeout(ctx, expireTime)
	defer cancel()
	name, _, ok := d.named(uuid)
	if !ok {
		return nil
	}
	return d.operate(ctx, name, beside, func(ctx context.Context, _ *store, root *volume.Root) error {
		err := root.RemoveSnapshot(ctx, name, snapshot)
		if errors.Is(err, volume.ErrNoSnapshot) {
			return nil
		}
		return err
	})
}

// backUpSnapshot hands a snapshot to the engine.
func (d *Driver) backUpSnapshot(ctx context.Context, s *store, root *volume.Root, job backupJob, kept bool, target backup.Target, eng backup.Engine, report *reporter) (out madeBackup, err error) {
	rec, err := root.Record(job.volume)
	if err != nil {
		return out, err
	}
	snap, err := root.Snapshot(ctx, job.volume, job.snapshot)
	if err != nil {
		return out, err
	}
	able, err := root.Abilities(ctx, rec)
	if err != nil {
		return out, err
	}
	data, done, err := root.OpenSnapshot(ctx, job.volume, job.snapshot)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, done()) }()
	host := s.hostName()
	manifest := d.backups.manifest(rec, able, snap, kept, host)
	text, err := manifest.Encode()
	if err != nil {
		return out, err
	}
	out.at, out.seen, out.options = snap.CreatedAt.UTC(), d.sightOf(ctx, root, rec, manifest), manifest.Options
	if !kept {
		if found, ok := d.standing(ctx, s, root, rec, job, out.seen, target.Name, eng); ok {
			out.Backup = shownBackup(target.Name, found)
			out.Consistency, out.Unchanged = control.Consistency(snap.Consistency), true
			return out, nil
		}
	}
	st, err := d.backups.openStage(rec.UUID, data, mount.Flags{ReadOnly: true})
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, st.close()) }()
	if err := os.WriteFile(filepath.Join(st.dir, backup.ManifestName), text, 0o600); err != nil {
		return out, err
	}
	source := backup.Source{
		Dir: st.dir, Volume: rec.Name, UUID: rec.UUID, Host: host, Time: snap.CreatedAt,
		Copied: !able.Instant, Reread: job.full, Tags: job.tags,
	}
	known := d.backups.state(rec.UUID)
	last, ok := known.Targets[target.Name]
	switch {
	case known.Failures > parentTries:
		// What the next backup would build on may be what is wrong.
		source.Reread = true
	case ok:
		source.Parent = last.ID
		source.Reread = source.Reread || source.Copied && d.cfg.Now().Sub(last.Reread) > rereadEvery
	default:
		if source.Parent, err = lastIn(ctx, eng, rec.UUID); err != nil {
			return out, err
		}
	}
	result, err := eng.Backup(ctx, source, report.backup)
	if err != nil {
		return out, err
	}
	out.reread = source.Reread
	out.Backup = control.Backup{
		Target: target.Name, ID: result.ID, Volume: rec.Name, UUID: rec.UUID, Host: host, Time: snap.CreatedAt.UTC(),
		Tags: job.tags, Files: result.Files, Bytes: result.Bytes, Added: result.Added,
		Consistency: control.Consistency(snap.Consistency), Incomplete: !result.Complete(), Missing: result.Missing,
	}
	out.Reference = referenceTo(target.Name, rec.Name, result.ID)
	return out, nil
}

// manifest describes a volume, and the snapshot that its data is read from.
func (b *backups) manifest(rec volume.Record, able engine.Abilities, snap volume.Snapshot, kept bool, host string) backup.Manifest {
	return backup.Manifest{
		Berth: b.Version, Volume: rec.Name, UUID: rec.UUID, Options: rec.CurrentOptions(), Labels: rec.Labels,
		Engine: rec.Engine, FileSystem: able.FileSystem, Size: rec.Size, Snapshot: snap.Name, SnapshotKept: kept && snap.Trigger != volume.ForBackup,
		Time: snap.CreatedAt.UTC(), Consistency: snap.Consistency, Unstable: snap.Unstable, Host: host,
	}
}

// lastIn finds the newest complete backup of a volume, "" for none.
func lastIn(ctx context.Context, eng backup.Engine, uuid string) (string, error) {
	list, err := eng.List(ctx, backup.Filter{UUID: uuid})
	if err != nil {
		return "", err
	}
	for _, b := range slices.Backward(list) {
		if !b.Incomplete {
			return b.ID, nil
		}
	}
	return "", nil
}

// hostName is what other hosts call this one.
func (s *store) hostName() string {
	name, _, _ := strings.Cut(s.ledger.hostID, "/")
	return name
}

// referenceTo names a backup by as much of its ID as people write.
func referenceTo(target, volume, id string) string {
	const short = 8
	return backup.Reference{Target: target, Volume: volume, Pick: id[:min(len(id), short)]}.String()
}

// shortReference is a reference with as much of an ID as people write.
func shortReference(text string) string {
	ref, err := backup.ParseReference(text)
	if err != nil || !ref.ByID() {
		return text
	}
	return referenceTo(ref.Target, ref.Volume, ref.Pick)
}

// backup is progress of an engine.
func (r *reporter) backup(p backup.Progress) {
	r.send(control.Progress{Step: p.Step, Files: p.Files, TotalFiles: p.TotalFiles, Bytes: p.Bytes, TotalBytes: p.TotalBytes})
}
