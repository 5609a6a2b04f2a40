package volplugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/backup/convoy"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/mount"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// restoreInto is volume.Location's Restore. What is wrong with a network is told from
// what is wrong with the backup: a volume waits for the first, and is broken by the
// second.
func (d *Driver) restoreInto(ctx context.Context, rec volume.Record, dst *rooted.Dir, progress func(engine.Progress)) error {
	switch {
	case rec.Source.Archive:
		return d.importInto(ctx, rec, dst, progress)
	case convoy.IsURL(rec.Source.Backup):
		return d.convoyInto(ctx, rec, dst, progress)
	}
	found, eng, err := d.foundOf(rec)
	if err != nil {
		return restoreError(err)
	}
	st, err := d.backups.openStage("restore-"+rec.UUID, dst, mount.Flags{})
	if err != nil {
		return err
	}
	flushes := startFlusher(func() error { return unix.Syncfs(dst.FD()) })
	log := d.cfg.Log.WithField("volume", rec.Name)
	log.Infof("restoring from backup %s of %s", shortReference(backupReference(rec.Source)), found.Time.UTC())
	err = restoreChecked(ctx, eng, found, st.dir, rec.Source.Paths, func(p backup.Progress) {
		flushes.wrote(p.Bytes)
		if progress != nil {
			progress(engine.Progress{Files: p.Files, TotalFiles: p.TotalFiles, Bytes: p.Bytes, TotalBytes: p.TotalBytes})
		}
	})
	if flushErr := flushes.stop(); err == nil {
		err = flushErr
	}
	if err == nil {
		err = unix.Syncfs(dst.FD())
	}
	return errors.Join(restoreError(err), st.close())
}

// findBackup is volume.Location's FindBackup. A URL of convoy's names one backup for good.
func (d *Driver) findBackup(ctx context.Context, rec volume.Record) (*backup.Backup, error) {
	if convoy.IsURL(rec.Source.Backup) {
		return nil, nil
	}
	_, _, found, err := d.resolve(ctx, rec.Source.Backup)
	if err != nil {
		return nil, restoreError(err)
	}
	return &found, nil
}

// foundOf is the backup that a volume's record has found, and the engine that has it.
func (d *Driver) foundOf(rec volume.Record) (backup.Backup, backup.Engine, error) {
	ref, err := backup.ParseReference(rec.Source.Backup)
	if err != nil {
		return backup.Backup{}, nil, err
	}
	f := rec.Source.Found
	if f == nil {
		return backup.Backup{}, nil, fault.Conflict("%w: %s", backup.ErrNoBackup, ref)
	}
	_, eng, err := d.backups.engine(ref.Target)
	return backup.Backup{ID: f.ID, Volume: ref.Volume, UUID: f.UUID, Host: f.Host, Time: f.Time, Files: f.Files, Bytes: f.Bytes}, eng, err
}

// backupReference names the backup that a volume is made from, by its full ID as soon as
// that is known.
func backupReference(s *volume.Source) string {
	if s.Found == nil {
		return s.Backup
	}
	ref, err := backup.ParseReference(s.Backup)
	if err != nil {
		return s.Backup
	}
	ref.Pick = s.Found.ID
	return ref.String()
}

// restoreError makes an error of the network unavailable: the same may succeed later.
func restoreError(err error) error {
	switch {
	case err == nil, errors.Is(err, errUnlike), errors.Is(err, backup.ErrNoBackup), errors.Is(err, backup.ErrPassword), errors.Is(err, backup.ErrNoRepository):
		return err
	}
	if kind := fault.Kind(err); kind != "internal" {
		return err
	}
	return fault.Unavailable("%w", err)
}

// errUnlike says that what was restored is not what the repository has on record.
var errUnlike = errors.New("what was restored is not what was backed up")

// restoreChecked restores a backup and compares what came with what there should be.
func restoreChecked(ctx context.Context, eng backup.Engine, b backup.Backup, dir string, paths []string, progress func(backup.Progress)) error {
	done, err := eng.Restore(ctx, b, dir, paths, progress)
	if err != nil {
		return err
	}
	if len(paths) == 0 && b.Files > 0 && done.Files != b.Files {
		return fmt.Errorf("backup %s: %w: %d files instead of %d", b.ID, errUnlike, done.Files, b.Files)
	}
	return nil
}

// verifyRestore restores a backup to a place that is removed afterwards.
func (d *Driver) verifyRestore(ctx context.Context, reference string, report *reporter) (out control.VerifyReport, err error) {
	ref, eng, found, err := d.resolve(ctx, reference)
	if err != nil {
		return out, err
	}
	if err := os.MkdirAll(d.backups.Scratch, 0o700); err != nil {
		return out, err
	}
	var space unix.Statfs_t
	if err := unix.Statfs(d.backups.Scratch, &space); err != nil {
		return out, fault.Unavailable("%s: %w", d.backups.Scratch, err)
	}
	if free := space.Bavail * uint64(space.Bsize); found.Bytes >= free {
		return out, fault.Exhausted("backup %s has %d bytes, and in %s, where it would be verified, are %d free", ref, found.Bytes, d.backups.Scratch, free)
	}
	dir, err := os.MkdirTemp(d.backups.Scratch, "verify-")
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, removeScratch(dir)) }()
	if err := os.Mkdir(filepath.Join(dir, backup.DataName), 0o700); err != nil {
		return out, err
	}
	shown := shownBackup(ref.Target, found)
	out.Backup = &shown
	err = restoreChecked(ctx, eng, found, dir, nil, report.backup)
	if err != nil && ctx.Err() == nil && fault.Kind(restoreError(err)) != "unavailable" {
		out.Errors = append(out.Errors, err.Error())
		return out, nil
	}
	return out, err
}

// removeScratch removes a tree that was restored, whatever is in it.
func removeScratch(dir string) error {
	parent, err := rooted.Open(filepath.Dir(dir))
	if err != nil {
		return err
	}
	defer parent.Close()
	err = parent.RemoveTree(context.Background(), filepath.Base(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// RestoreBackup implements control.BackupAdmin.
func (d *Driver) RestoreBackup(ctx context.Context, req control.RestoreRequest, tell func(control.Progress)) (out control.Restore, err error) {
	if err := volume.CheckName(req.Name); err != nil {
		return out, err
	}
	if req.InPlace && len(req.Options) > 0 {
		return out, fault.Invalid("options do not go with a restore in place: the volume has its own")
	}
	for _, name := range []string{"from", "seed", "from-backup"} {
		if _, ok := req.Options[name]; ok {
			return out, fault.Invalid("option %s does not go with a restore", name)
		}
	}
	ref, eng, found, err := d.resolve(ctx, req.Reference)
	if err != nil {
		return out, err
	}
	if req.InPlace && req.Name == ref.Volume && !ref.ByID() {
		if err := d.sameVolume(req.Name, ref, found); err != nil {
			return out, err
		}
	}
	ref.Pick = found.ID
	out.Backup = shownBackup(ref.Target, found)
	if req.InPlace {
		report := newReporter(tell)
		defer report.end()
		out.Volume, out.Kept, err = d.restoreInPlace(ctx, req, ref.String(), found, report)
		return out, err
	}
	was, err := d.backups.optionsIn(ctx, eng, ref, found)
	if err != nil {
		return out, err
	}
	given := restoredOptions(was)
	maps.Copy(given, req.Options)
	given["from-backup"] = ref.String()
	out.Volume, err = d.makeFilled(ctx, req.Name, given, tell, func(ctx context.Context, root *volume.Root, spec options.Spec) (volume.Record, error) {
		spec.BackupPaths, spec.BackupFound = req.Paths, &found
		rec, begun, err := root.CreateBegin(ctx, req.Name, spec)
		if err == nil && !begun {
			err = fault.Conflict("volume %s exists already", req.Name)
		}
		return rec, err
	})
	return out, err
}

// optionsIn are the options that a backup's manifest has. Those of the last one that this
// host has made are known here; restic takes most of a second for each question.
func (b *backups) optionsIn(ctx context.Context, eng backup.Engine, ref backup.Reference, found backup.Backup) (map[string]string, error) {
	if last := b.state(found.UUID).Targets[ref.Target]; last.ID == found.ID && last.Options != nil {
		return last.Options, nil
	}
	manifest, err := eng.Manifest(ctx, found.ID)
	if err != nil {
		return nil, fmt.Errorf("backup %s: %w", ref, err)
	}
	return manifest.Options, nil
}

// sameVolume refuses what "latest" or a time has picked for a volume if it is the backup
// of another one: hosts that share a repository may each have a volume of the name.
func (d *Driver) sameVolume(name string, ref backup.Reference, found backup.Backup) error {
	rec := d.ledger.view(d.mountedIn(name).key, name).Record
	if rec.UUID == "" || rec.UUID == found.UUID {
		return nil
	}
	return fault.Conflict("backup %s is of another volume called %s, made on host %s: if it is meant all the same, name it by its ID, %s",
		ref, found.Volume, found.Host, referenceTo(ref.Target, found.Volume, found.ID))
}

// restoreInPlace puts a backup in the place of a volume's data, or of some paths in it.
// When that does not succeed, or ctx ends, the volume has its data of before again.
func (d *Driver) restoreInPlace(ctx context.Context, req control.RestoreRequest, reference string, found backup.Backup, report *reporter) (out control.Volume, kept *control.Snapshot, err error) {
	name := req.Name
	var rec volume.Record
	var in *store
	err = d.operate(ctx, name, alone, func(ctx context.Context, s *store, root *volume.Root) error {
		if err := d.unused(ctx, s, root, name); err != nil {
			return err
		}
		begun, snap, err := root.RestoreBegin(ctx, name, reference, found, req.Paths, report.step("keeping what is there"))
		if err != nil {
			return errors.Join(err, s.relearn(root, name))
		}
		rec, in = begun, s
		shown := d.shownSnapshot(volume.SnapshotEntry{Volume: name, UUID: snap.UUID, Name: snap.Name, Snapshot: snap})
		kept = &shown
		return s.relearn(root, name)
	})
	if err != nil {
		return out, nil, err
	}
	one := d.startFill(in, name, rec.UUID)
	if err := d.followFill(ctx, in, rec.UUID, one, report.step("restoring")); err != nil {
		return out, nil, errors.Join(err, d.undoRestore(ctx, in, name, rec))
	}
	return d.shown(in, name, d.ledger.view(in.key, name).seenVolume, nil), kept, nil
}

// undoRestore gives a volume back the data that it had before a restore in place.
func (d *Driver) undoRestore(ctx context.Context, s *store, name string, rec volume.Record) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), expireTime)
	defer cancel()
	s.fills.stop(ctx, rec.UUID)
	return d.operate(ctx, name, alone, func(ctx context.Context, s *store, root *volume.Root) error {
		undone, err := root.GiveUpRestore(ctx, name, rec.Source.Kept)
		if err != nil || undone {
			return errors.Join(err, s.relearn(root, name))
		}
		done, err := root.Rollback(ctx, name, rec.Source.Kept, nil)
		if err == nil {
			// It is what the restore has left half done.
			err = root.RemoveSnapshot(ctx, name, done.Kept.Name)
		}
		return errors.Join(err, s.relearn(root, name))
	})
}

// restoredOptions are those of a volume's options that are right for it on any host.
// Its place and its engine are not: another host has other roots. Owner and mode are
// in the backup itself.
func restoredOptions(given map[string]string) map[string]string {
	out := map[string]string{}
	for name, value := range given {
		if slices.Contains([]string{"size", "ro", "nosuid", "nodev", "noexec", "owner", "protect", "on-remove", "trash.keep"}, name) ||
			strings.HasPrefix(name, "snapshot.") || strings.HasPrefix(name, "backup.") || strings.HasPrefix(name, "label.") ||
			given["owner"] != "" && slices.Contains([]string{"uid", "gid", "mode"}, name) {
			out[name] = value
		}
	}
	return out
}
