package volplugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/schedule"
	"github.com/berth-plugin/berth/volplugin/volume"
)

var _ control.VolumeAdmin = (*Driver)(nil)

// Volumes implements control.VolumeAdmin.
func (d *Driver) Volumes(ctx context.Context) ([]control.Volume, error) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.look)
	defer cancel()
	d.each(func(s *store) {
		if err := s.scan(ctx); err != nil {
			d.cfg.Log.WithError(err).Debugf("list volumes of root %s from what was seen last", s)
		}
	})
	names := d.ledger.names()
	list := make([]control.Volume, 0, len(names))
	for _, name := range names {
		s := d.mountedIn(name)
		var away error
		if s.hung.Load() {
			away = s.looks.hangs()
		}
		list = append(list, d.shown(s, name, d.ledger.view(s.key, name).seenVolume, away))
	}
	return list, nil
}

// Volume implements control.VolumeAdmin.
func (d *Driver) Volume(ctx context.Context, name string) (control.Volume, error) {
	if err := volume.CheckName(name); err != nil {
		return control.Volume{}, err
	}
	s, v, away, err := d.find(ctx, name)
	if err != nil {
		return control.Volume{}, err
	}
	var others []control.VolumeUser
	if away == nil && v.Broken == "" {
		away = s.withLook(ctx, func(ctx context.Context, root *volume.Root) (err error) {
			s.learnAbilities(ctx, root)
			others, err = s.usersElsewhere(ctx, root, v.Record.UUID)
			return err
		})
	}
	shown := d.shown(s, name, v, away)
	shown.Users = append(shown.Users, others...)
	if away != nil || v.Broken != "" {
		return shown, nil //nolint:nilerr // it is shown
	}
	snaps, err := d.snapshotsIn(ctx, s, name)
	if err != nil {
		shown.Error = err.Error()
		return shown, nil //nolint:nilerr // it is shown
	}
	shown.Snapshots, shown.SnapshotCount = snaps, len(snaps)
	return shown, nil
}

// withLook is lookIn bounded by the time that a look may take.
func (s *store) withLook(ctx context.Context, fn func(ctx context.Context, root *volume.Root) error) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.look)
	defer cancel()
	return s.lookIn(ctx, fn)
}

// shown is a volume as this host saw it last.
func (d *Driver) shown(s *store, name string, v seenVolume, away error) control.Volume {
	mounts := d.ledger.mountsOf(name).IDs.Total()
	rec := v.Record
	out := control.Volume{
		Name: name, Root: s.name, RootPath: s.location.Path, State: control.VolumeReady,
		Mountpoint: d.mountpoint(s, volume.Reference{Volume: name}, rec), Mounted: mounts > 0,
	}
	if mounts > 0 {
		out.Users = append(out.Users, control.VolumeUser{Host: s.ledger.hostID, Here: true, Mounts: mounts})
	}
	if v.Broken != "" {
		out.State, out.Error = control.VolumeBroken, v.Broken
		return out
	}
	out.UUID, out.Engine, out.Created = rec.UUID, rec.Engine, rec.CreatedAt
	out.Size, out.OnRemove, out.Protect = rec.Size, string(rec.OnRemove), rec.Protect
	out.ReadOnly, out.Exclusive, out.Adopted = rec.ReadOnly, rec.Exclusive, rec.Adopted
	out.Labels, out.Options = rec.Labels, rec.Options
	if rec.TrashKeep != nil {
		out.TrashKeep = time.Duration(*rec.TrashKeep)
	}
	if src := rec.Source; src != nil {
		out.Source = &control.VolumeSource{Volume: src.Volume, Snapshot: src.Snapshot, Path: src.Seed + src.Adopt, Backup: backupReference(src), Archive: src.Archive}
	}
	if able, ok := s.abilities.get(rec.Engine); ok {
		out.FileSystem, out.Instant, out.Consistency = able.FileSystem, able.Instant, control.Consistency(able.Consistency)
	}
	if rec.FS != "" {
		out.FileSystem = rec.FS
	}
	if used, ok := s.used.get(rec.UUID); ok {
		out.Used, out.UsedAt = used.Used, used.at
	}
	if v.snapshots != nil {
		out.SnapshotCount = *v.snapshots
	}
	if rec.Schedule != "" {
		out.Schedule = s.schedule(rec)
	}
	out.Backup = d.shownBackups(rec)
	switch rec.Phase {
	case volume.Broken:
		out.State, out.Error = control.VolumeBroken, rec.Reason
	case volume.Restoring:
		out.State = control.VolumeRestoring
		if p, ok := s.fills.get(rec.UUID); ok {
			shown := progressOf("copying", p)
			out.Progress = &shown
		}
	case volume.Creating:
		out.State = control.VolumeCreating
	case volume.Removing:
		out.State = control.VolumeRemoving
	default: // ready, also while a host gives it other content or another name
	}
	if trouble, ok := s.leaseTrouble(rec.UUID); ok {
		out.Error = trouble.String()
	}
	if away != nil {
		out.State, out.Error = control.VolumeAway, away.Error()
	}
	return out
}

// again reads a volume that an operation has just changed, and learns from it.
func (d *Driver) again(s *store, root *volume.Root, name string) (control.Volume, error) {
	if err := s.relearn(root, name); err != nil {
		return control.Volume{}, err
	}
	return d.shown(s, name, d.ledger.view(s.key, name).seenVolume, nil), nil
}

// unused refuses a volume that a container has, on this host or on another.
func (d *Driver) unused(ctx context.Context, s *store, root *volume.Root, name string) error {
	if err := d.release(ctx, root, name); err != nil {
		return err
	}
	return s.elsewhere(ctx, root, name)
}

// RollbackVolume implements control.VolumeAdmin.
func (d *Driver) RollbackVolume(ctx context.Context, req control.RollbackRequest, tell func(control.Progress)) (out control.Rollback, err error) {
	if err := volume.CheckSnapshotName(req.Snapshot); err != nil {
		return out, err
	}
	report := newReporter(tell)
	defer report.end()
	err = d.operate(ctx, req.Volume, alone, func(ctx context.Context, s *store, root *volume.Root) error {
		err := s.elsewhere(ctx, root, req.Volume)
		if err == nil && !req.Force {
			err = d.unused(ctx, s, root, req.Volume)
		}
		if err != nil {
			return err
		}
		done, err := root.Rollback(ctx, req.Volume, req.Snapshot, report.step("rolling back"))
		if err != nil {
			return errors.Join(err, s.relearn(root, req.Volume))
		}
		out.Kept = d.shownSnapshot(volume.SnapshotEntry{Volume: req.Volume, UUID: done.Kept.UUID, Name: done.Kept.Name, Snapshot: done.Kept})
		out.Volume, err = d.again(s, root, req.Volume)
		return err
	})
	return out, err
}

// RenameVolume implements control.VolumeAdmin.
func (d *Driver) RenameVolume(ctx context.Context, req control.RenameRequest) (out control.Volume, err error) {
	if err := volume.CheckName(req.Name); err != nil {
		return out, err
	}
	// In the order of names, so that two renamings cannot wait for each other.
	unlock, err := d.lockOperation(ctx, max(req.Volume, req.Name), alone)
	if err != nil {
		return out, err
	}
	defer unlock()
	if req.Volume == req.Name {
		return d.Volume(ctx, req.Name)
	}
	first := min(req.Volume, req.Name)
	unlockFirst, err := d.lockOperation(ctx, first, alone)
	if err != nil {
		return out, err
	}
	s, err := d.storeOf(ctx, req.Volume)
	if err != nil {
		unlockFirst()
		return out, err
	}
	if other := d.ledger.owner(req.Name); other != "" {
		unlockFirst()
		return out, fault.Conflict("volume %s exists already", req.Name)
	}
	err = s.inRoot(ctx, unlockFirst, func(ctx context.Context, root *volume.Root) error {
		if err := d.unused(ctx, s, root, req.Volume); err != nil {
			return err
		}
		if err := d.checkNested(s, req.Name); err != nil {
			return err
		}
		if _, err := root.Rename(ctx, req.Volume, req.Name); err != nil {
			return errors.Join(err, s.relearn(root, req.Volume), s.relearn(root, req.Name))
		}
		if err := s.relearn(root, req.Volume); err != nil {
			return err
		}
		out, err = d.again(s, root, req.Name)
		return err
	})
	return out, err
}

// ResizeVolume implements control.VolumeAdmin.
func (d *Driver) ResizeVolume(ctx context.Context, req control.ResizeRequest, tell func(control.Progress)) (out control.Volume, err error) {
	report := newReporter(tell)
	defer report.end()
	err = d.operate(ctx, req.Volume, beside, func(ctx context.Context, s *store, root *volume.Root) error {
		report.send(control.Progress{Step: "resizing"})
		if _, err := root.Resize(ctx, req.Volume, req.Size); err != nil {
			return err
		}
		out, err = d.again(s, root, req.Volume)
		return err
	})
	return out, err
}

// UpdateVolume implements control.VolumeAdmin.
func (d *Driver) UpdateVolume(ctx context.Context, req control.UpdateRequest) (out control.Volume, err error) {
	change, err := recordUpdate(req.Set)
	if err != nil {
		return out, fmt.Errorf("volume %s: %w", req.Volume, err)
	}
	err = d.operate(ctx, req.Volume, beside, func(ctx context.Context, s *store, root *volume.Root) error {
		if _, err := root.Update(ctx, req.Volume, change); err != nil {
			return err
		}
		out, err = d.again(s, root, req.Volume)
		d.schedules.Wake()
		d.backupRuns.Wake()
		return err
	})
	return out, err
}

// updatable are the options that can be changed later, and those with a prefix.
func updatable(name string) bool {
	switch name {
	case "snapshot.schedule", "snapshot.keep", "backup.schedule", "backup.target", "backup.keep", "protect", "on-remove", "trash.keep":
		return true
	}
	key, ok := strings.CutPrefix(name, "label.")
	return ok && key != ""
}

// recordUpdate checks values as Create does, and returns what puts them on record.
func recordUpdate(set map[string]string) (func(*volume.Record) error, error) {
	given := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(set)) {
		if !updatable(name) {
			return nil, fault.Invalid("%.60q cannot be changed: can be snapshot.schedule, snapshot.keep, backup.schedule, backup.target, backup.keep, protect, on-remove, trash.keep and label.NAME", name)
		}
		if value := set[name]; value != "" {
			given[name] = value
		}
	}
	if len(set) == 0 {
		return nil, fault.Invalid("nothing to change was given")
	}
	spec, err := options.Parse(given)
	if err != nil {
		return nil, err
	}
	return func(rec *volume.Record) error {
		for name, value := range set {
			switch name {
			case "snapshot.schedule":
				rec.Schedule = spec.Schedule
			case "snapshot.keep":
				rec.Keep = spec.Keep.String()
			case "backup.schedule":
				rec.BackupSchedule = spec.BackupSchedule
			case "backup.target":
				rec.BackupTarget = spec.BackupTarget
			case "backup.keep":
				rec.BackupKeep = spec.BackupKeep.String()
			case "protect":
				rec.Protect = spec.Protect
			case "on-remove":
				rec.OnRemove = options.Trash
				if spec.OnRemove != nil {
					rec.OnRemove = *spec.OnRemove
				}
			case "trash.keep":
				rec.TrashKeep = nil
				if spec.TrashKeep != nil {
					keep := volume.Span(*spec.TrashKeep)
					rec.TrashKeep = &keep
				}
			default:
				key := strings.TrimPrefix(name, "label.")
				labels := maps.Clone(rec.Labels)
				if labels == nil {
					labels = map[string]string{}
				}
				if labels[key] = value; value == "" {
					delete(labels, key)
				}
				rec.Labels = labels
			}
		}
		if rec.Schedule != "" {
			if _, err := schedule.Parse(rec.Schedule); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// VolumeUsage implements control.VolumeAdmin.
func (d *Driver) VolumeUsage(ctx context.Context, req control.UsageRequest, tell func(control.Progress)) (out control.UsageReport, err error) {
	report := newReporter(tell)
	defer report.end()
	names := req.Volumes
	for _, name := range names {
		if _, _, _, err := d.find(ctx, name); err != nil {
			return out, err
		}
	}
	if len(names) == 0 {
		names = d.ledger.names()
	}
	used := map[*store]bool{d.home: true}
	for i, name := range names {
		if err := ctx.Err(); err != nil {
			return out, err
		}
		report.send(control.Progress{Step: "measuring " + name, Files: uint64(i), TotalFiles: uint64(len(names))})
		s := d.mountedIn(name)
		used[s] = true
		out.Volumes = append(out.Volumes, d.usage(ctx, s, name))
	}
	for _, s := range d.all() {
		if used[s] {
			out.Roots = append(out.Roots, s.rootUsage(ctx))
		}
	}
	return out, nil
}

// usage measures one volume; its error is in the answer.
func (d *Driver) usage(ctx context.Context, s *store, name string) control.VolumeUsage {
	known := d.ledger.view(s.key, name)
	out := control.VolumeUsage{Name: name, Engine: known.Record.Engine, Root: s.name}
	err := d.operate(ctx, name, beside, func(ctx context.Context, s *store, root *volume.Root) error {
		rec, err := root.Record(name)
		if err != nil {
			return err
		}
		u, err := root.Usage(ctx, rec)
		if err != nil {
			return err
		}
		s.used.set(known.Record.UUID, measured{u, d.cfg.Now()})
		out.Used, out.Files, out.Exclusive, out.Limit, out.Free = u.Used, u.Files, u.Exclusive, u.Limit, u.Free
		snaps, err := root.Snapshots(ctx, name)
		if err != nil {
			return err
		}
		out.Snapshots = len(snaps)
		return nil
	})
	if err != nil {
		out.Error = err.Error()
	}
	return out
}

// rootUsage asks the root's file system.
func (s *store) rootUsage(ctx context.Context) control.RootUsage {
	out := control.RootUsage{Name: s.name, Path: s.location.Path}
	err := s.withLook(ctx, func(ctx context.Context, root *volume.Root) error {
		space, err := root.Space()
		if err != nil {
			return err
		}
		out.Size, out.Free = space.Total, space.Free
		out.Used = space.Total - min(space.Free, space.Total)
		trash, err := root.Trash(ctx)
		out.Trash, out.Volumes = len(trash), len(s.ledger.seen(s.key))
		return err
	})
	if err != nil && !errors.Is(err, volume.ErrFresh) {
		out.Error = err.Error()
	}
	for _, v := range s.ledger.seen(s.key) {
		if able, ok := s.abilities.get(v.Record.Engine); ok {
			out.FileSystem = able.FileSystem
		}
	}
	return out
}

// Findings implements control.VolumeAdmin.
func (d *Driver) Findings(context.Context) []control.Finding {
	var list []control.Finding
	for _, s := range d.all() {
		switch {
		case s.missing != nil:
			list = append(list, control.Finding{ID: "volume-root", Status: control.StatusFail, Summary: s.missing.Error()})
		case s.hung.Load():
			list = append(list, control.Finding{
				ID: "volume-root", Status: control.StatusFail, Summary: fmt.Sprintf("volume root %s does not answer", s),
				Detail: "Docker is answered from what this host has seen last. Volumes cannot be made, mounted or removed there until it answers.",
			})
		default:
			list = append(list, control.Finding{ID: "volume-root", Status: control.StatusOK, Summary: fmt.Sprintf("volume root %s answers", s)})
		}
	}
	return append(list, d.backupFindings()...)
}
