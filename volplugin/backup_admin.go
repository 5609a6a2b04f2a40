package volplugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/keep"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// targetOf is the configuration that an operator asks for.
func targetOf(spec control.TargetSpec) backup.Target {
	return backup.Target{
		Name: spec.Name, Engine: spec.Engine, Repository: spec.Repository, Password: spec.Password,
		Environment: spec.Environment, Files: spec.Files, UploadLimit: spec.UploadLimit, DownloadLimit: spec.DownloadLimit,
		PruneSchedule: spec.PruneSchedule, CheckSchedule: spec.CheckSchedule, CheckShare: spec.CheckShare,
		VerifySchedule: spec.VerifySchedule,
	}
}

// AddTarget implements control.BackupAdmin.
func (d *Driver) AddTarget(ctx context.Context, spec control.TargetSpec, tell func(control.Progress)) (out control.TargetReport, err error) {
	b := d.backups
	if b == nil {
		return out, errNoBackups
	}
	target := targetOf(spec)
	if err := target.Check(); err != nil {
		return out, err
	}
	_, err = b.targets.Get(target.Name)
	if kind := fault.Kind(err); kind != "notfound" && !spec.Replace {
		return out, fault.Conflict("target %s exists already", target.Name)
	}
	eng, err := b.Open(target)
	if err != nil {
		return out, err
	}
	report := newReporter(tell)
	defer report.end()
	report.send(control.Progress{Step: "opening the repository"})
	begin := d.cfg.Now()
	list, err := eng.List(ctx, backup.Filter{})
	if errors.Is(err, backup.ErrNoRepository) {
		report.send(control.Progress{Step: "making the repository"})
		out.Made = true
		if err = eng.Init(ctx); err == nil {
			list, err = eng.List(ctx, backup.Filter{})
		}
	}
	if err != nil {
		return control.TargetReport{}, fmt.Errorf("target %s: %w", target.Name, err)
	}
	out.Took = d.cfg.Now().Sub(begin)
	out.Backups, out.Volumes = counted(list)
	if err := d.keepChosen(); err != nil {
		return control.TargetReport{}, err
	}
	if err := b.targets.Put(target); err != nil {
		return control.TargetReport{}, err
	}
	d.backupRuns.Wake()
	out.Target = d.shownTarget(target)
	return out, nil
}

// keepChosen notes what the schedules back up to now, before there is another target.
func (d *Driver) keepChosen() error {
	for _, s := range d.all() {
		for _, v := range d.ledger.seen(s.key) {
			if v.Record.BackupSchedule == "" {
				continue
			}
			if target := d.backups.targetOf(v.Record); target != "" {
				if err := d.backups.chosen(v.Record, target); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// counted tells how many backups there are, of how many volumes.
func counted(list []backup.Backup) (backups, volumes int) {
	seen := map[string]bool{}
	for _, b := range list {
		seen[b.UUID] = true
	}
	return len(list), len(seen)
}

// shownTarget is a target for an operator.
func (d *Driver) shownTarget(t backup.Target) control.Target {
	return control.Target{
		Name: t.Name, Engine: t.EngineName(), Repository: backup.Redact(t.Repository),
		Variables: slices.Sorted(maps.Keys(t.Environment)), Files: slices.Sorted(maps.Keys(t.Files)),
		UploadLimit: t.UploadLimit, DownloadLimit: t.DownloadLimit, CheckShare: t.CheckShare,
		Prune: d.careOf(pruneJob+t.Name, t.PruneSchedule), Check: d.careOf(checkJob+t.Name, t.CheckSchedule),
		Verify:  d.careOf(verifyJob+t.Name, cmp.Or(t.VerifySchedule, backup.Never)),
		Volumes: d.backedUpTo(t.Name),
	}
}

// backedUpTo lists the volumes whose schedule backs up to a target.
func (d *Driver) backedUpTo(target string) []string {
	var list []string
	for _, s := range d.all() {
		for name, v := range d.ledger.seen(s.key) {
			if v.Record.BackupSchedule != "" && d.backups.targetOf(v.Record) == target && d.ledger.owner(name) == s.key {
				list = append(list, name)
			}
		}
	}
	slices.Sort(list)
	return list
}

// Targets implements control.BackupAdmin.
func (d *Driver) Targets(context.Context) ([]control.Target, error) {
	if d.backups == nil {
		return nil, errNoBackups
	}
	names, err := d.backups.targets.Names()
	if err != nil {
		return nil, err
	}
	list := []control.Target{}
	for _, name := range names {
		target, err := d.backups.targets.Get(name)
		if err != nil {
			list = append(list, control.Target{Name: name, Error: err.Error(), Volumes: d.backedUpTo(name)})
			continue
		}
		list = append(list, d.shownTarget(target))
	}
	return list, nil
}

// TestTarget implements control.BackupAdmin.
func (d *Driver) TestTarget(ctx context.Context, ref control.TargetRef, tell func(control.Progress)) (out control.TargetReport, err error) {
	report := newReporter(tell)
	defer report.end()
	target, eng, err := d.backups.engine(ref.Name)
	if err != nil {
		return out, err
	}
	report.send(control.Progress{Step: "opening the repository"})
	begin := d.cfg.Now()
	list, err := eng.List(ctx, backup.Filter{})
	if err != nil {
		return out, fmt.Errorf("target %s: %w", ref.Name, err)
	}
	out.Took, out.Target = d.cfg.Now().Sub(begin), d.shownTarget(target)
	out.Backups, out.Volumes = counted(list)
	return out, nil
}

// RemoveTarget implements control.BackupAdmin.
func (d *Driver) RemoveTarget(_ context.Context, ref control.TargetRef) (none struct{}, err error) {
	if d.backups == nil {
		return none, errNoBackups
	}
	if used := d.backedUpTo(ref.Name); len(used) > 0 {
		return none, fault.Conflict("target %s is where the schedule of %s backs up to", ref.Name, strings.Join(used, ", "))
	}
	if err := d.backups.targets.Delete(ref.Name); err != nil {
		return none, err
	}
	d.backupRuns.Wake()
	return none, nil
}

// CreateBackup implements control.BackupAdmin.
func (d *Driver) CreateBackup(ctx context.Context, req control.BackupRequest, tell func(control.Progress)) (control.Backup, error) {
	for _, tag := range req.Tags {
		if err := checkTag(tag); err != nil {
			return control.Backup{}, err
		}
	}
	if req.Snapshot != "" {
		if err := volume.CheckSnapshotName(req.Snapshot); err != nil {
			return control.Backup{}, err
		}
	}
	report := newReporter(tell)
	defer report.end()
	return d.backUp(ctx, backupJob{volume: req.Volume, snapshot: req.Snapshot, target: req.Target, tags: req.Tags, full: req.Full}, report)
}

// checkTag refuses what an engine cannot store, and what would be taken for Berth's.
func checkTag(tag string) error {
	const most = 100
	if tag == "" || len(tag) > most || strings.ContainsFunc(tag, func(r rune) bool { return r <= ' ' || r == ',' || r == 0x7f }) {
		return fault.Invalid("tag %.120q: want at most %d bytes without white space and commas", tag, most)
	}
	if tag == tagScheduled || strings.HasPrefix(tag, tagDue) {
		return fault.Invalid("tag %s is Berth's own, for what a schedule has made", tag)
	}
	return nil
}

// shownBackup is a backup for an operator.
func shownBackup(target string, b backup.Backup) control.Backup {
	return control.Backup{
		Reference: referenceTo(target, b.Volume, b.ID), Target: target, ID: b.ID, Volume: b.Volume, UUID: b.UUID, Host: b.Host,
		Time: b.Time.UTC(), Tags: b.Tags, Files: b.Files, Bytes: b.Bytes, Added: b.Added, Incomplete: b.Incomplete,
	}
}

// asked are the targets that a call is about: one, or all if name is "".
func (b *backups) asked(name string) ([]string, error) {
	if b == nil {
		return nil, errNoBackups
	}
	if name == "" {
		return b.targets.Names()
	}
	_, err := b.targets.Get(name)
	return []string{name}, err
}

// Backups implements control.BackupAdmin.
func (d *Driver) Backups(ctx context.Context, req control.BackupsRequest, tell func(control.Progress)) (out control.BackupList, err error) {
	report := newReporter(tell)
	defer report.end()
	names, err := d.backups.asked(req.Target)
	if err != nil {
		return out, err
	}
	report.send(control.Progress{Step: "asking " + strings.Join(names, ", ")})
	var mu sync.Mutex
	var wg sync.WaitGroup
	out.Backups, out.Failed = []control.Backup{}, map[string]string{}
	for _, name := range names {
		wg.Go(func() {
			list, err := d.listIn(ctx, name, backup.Filter{Volume: req.Volume})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				out.Failed[name] = err.Error()
				return
			}
			for _, b := range list {
				out.Backups = append(out.Backups, shownBackup(name, b))
			}
		})
	}
	wg.Wait()
	slices.SortStableFunc(out.Backups, func(a, b control.Backup) int {
		if c := a.Time.Compare(b.Time); c != 0 {
			return c
		}
		return strings.Compare(a.Reference, b.Reference)
	})
	return out, ctx.Err()
}

func (d *Driver) listIn(ctx context.Context, target string, filter backup.Filter) ([]backup.Backup, error) {
	_, eng, err := d.backups.engine(target)
	if err != nil {
		return nil, err
	}
	return eng.List(ctx, filter)
}

// resolve finds the backup that a reference means.
func (d *Driver) resolve(ctx context.Context, reference string) (ref backup.Reference, eng backup.Engine, found backup.Backup, err error) {
	if ref, err = backup.ParseReference(reference); err != nil {
		return ref, nil, found, err
	}
	if _, eng, err = d.backups.engine(ref.Target); err != nil {
		return ref, nil, found, err
	}
	list, err := eng.List(ctx, backup.Filter{Volume: ref.Volume})
	if err != nil {
		return ref, nil, found, fmt.Errorf("backup %s: %w", ref, err)
	}
	found, err = ref.Select(list)
	return ref, eng, found, err
}

// Backup implements control.BackupAdmin.
func (d *Driver) Backup(ctx context.Context, req control.BackupRef, tell func(control.Progress)) (out control.Backup, err error) {
	report := newReporter(tell)
	defer report.end()
	report.send(control.Progress{Step: "asking the repository"})
	ref, eng, found, err := d.resolve(ctx, req.Reference)
	if err != nil {
		return out, err
	}
	manifest, err := eng.Manifest(ctx, found.ID)
	if err != nil {
		return out, fmt.Errorf("backup %s: %w", ref, err)
	}
	out = shownBackup(ref.Target, found)
	out.Consistency = control.Consistency(manifest.Consistency)
	out.Manifest, err = manifest.Fields()
	return out, err
}

// RemoveBackups implements control.BackupAdmin.
func (d *Driver) RemoveBackups(ctx context.Context, req control.RemoveBackupsRequest, tell func(control.Progress)) (out control.RemoveBackupsReport, err error) {
	report := newReporter(tell)
	defer report.end()
	if d.backups == nil {
		return out, errNoBackups
	}
	byTarget := map[string][]backup.Reference{}
	for _, text := range req.References {
		ref, err := backup.ParseReference(text)
		if err != nil {
			return out, err
		}
		if !ref.ByID() {
			return out, fault.Invalid("backup %s: want its ID, as TARGET/VOLUME@ID", text)
		}
		byTarget[ref.Target] = append(byTarget[ref.Target], ref)
	}
	out.Failed = map[string]string{}
	for _, target := range slices.Sorted(maps.Keys(byTarget)) {
		report.send(control.Progress{Step: "removing from " + target})
		d.removeIn(ctx, target, byTarget[target], &out)
	}
	return out, ctx.Err()
}

// removeIn removes backups from one target.
func (d *Driver) removeIn(ctx context.Context, target string, refs []backup.Reference, out *control.RemoveBackupsReport) {
	fail := func(refs []backup.Reference, err error) {
		for _, ref := range refs {
			out.Failed[ref.String()] = err.Error()
		}
	}
	_, eng, err := d.backups.engine(target)
	var list []backup.Backup
	if err == nil {
		list, err = eng.List(ctx, backup.Filter{})
	}
	if err != nil {
		fail(refs, err)
		return
	}
	var ids []string
	var found []backup.Reference
	for _, ref := range refs {
		b, err := ref.Select(list)
		if err != nil {
			fail([]backup.Reference{ref}, err)
			continue
		}
		ids, found = append(ids, b.ID), append(found, ref)
	}
	if len(ids) == 0 {
		return
	}
	if err := eng.Forget(ctx, ids); err != nil {
		fail(found, err)
		return
	}
	for _, ref := range found {
		out.Removed = append(out.Removed, ref.String())
	}
}

// PruneBackups implements control.BackupAdmin.
func (d *Driver) PruneBackups(ctx context.Context, req control.PruneBackupsRequest, tell func(control.Progress)) (out control.PruneBackupsReport, err error) {
	report := newReporter(tell)
	defer report.end()
	var given keep.Policy
	if req.Keep != "" {
		if given, err = keep.Parse(req.Keep); err != nil {
			return out, fault.Invalid("policy %.60q: %w", req.Keep, err)
		}
	}
	names, err := d.backups.asked(req.Target)
	if err != nil {
		return out, err
	}
	out.Removed, out.Failed = []control.Backup{}, map[string]string{}
	for _, name := range names {
		report.send(control.Progress{Step: "looking at " + name})
		drop, err := d.pruneIn(ctx, name, req, given, report)
		if err != nil {
			out.Failed[name] = err.Error()
		}
		for _, b := range drop {
			out.Removed = append(out.Removed, shownBackup(name, b))
		}
	}
	return out, ctx.Err()
}

// pruneIn applies policies to one target and frees the space. It returns what is
// removed, also beside an error.
func (d *Driver) pruneIn(ctx context.Context, target string, req control.PruneBackupsRequest, given keep.Policy, report *reporter) ([]backup.Backup, error) {
	_, eng, err := d.backups.engine(target)
	if err != nil {
		return nil, err
	}
	list, err := eng.List(ctx, backup.Filter{Volume: req.Volume})
	if err != nil {
		return nil, err
	}
	if !req.All {
		list = scheduledOnly(list)
	}
	byVolume := map[string][]backup.Backup{}
	for _, b := range list {
		byVolume[b.UUID] = append(byVolume[b.UUID], b)
	}
	var drop []backup.Backup
	for _, uuid := range slices.Sorted(maps.Keys(byVolume)) {
		policy := given
		if req.Keep == "" {
			_, rec, ok := d.named(uuid)
			if !ok || rec.BackupKeep == "" {
				continue
			}
			if policy, err = keep.Parse(rec.BackupKeep); err != nil {
				return nil, fmt.Errorf("volume %s: policy %.60q: %w", rec.Name, rec.BackupKeep, err)
			}
		}
		drop = append(drop, droppedBackups(byVolume[uuid], policy, d.cfg.Now())...)
	}
	if req.DryRun {
		return drop, nil
	}
	if len(drop) > 0 {
		report.send(control.Progress{Step: "removing from " + target})
		if err := eng.Forget(ctx, idsOf(drop)); err != nil {
			return nil, err
		}
	}
	report.send(control.Progress{Step: "freeing space in " + target})
	if err := eng.Prune(ctx, report.backup); err != nil {
		return drop, fmt.Errorf("%d backups are removed, but their space is not free yet: %w", len(drop), err)
	}
	return drop, nil
}

// VerifyBackups implements control.BackupAdmin.
func (d *Driver) VerifyBackups(ctx context.Context, req control.VerifyRequest, tell func(control.Progress)) (out control.VerifyReport, err error) {
	report := newReporter(tell)
	defer report.end()
	if req.Reference != "" {
		return d.verifyRestore(ctx, req.Reference, report)
	}
	_, eng, err := d.backups.engine(req.Target)
	if err != nil {
		return out, err
	}
	found, err := eng.Check(ctx, req.Share, report.backup)
	if err != nil {
		return out, fmt.Errorf("target %s: %w", req.Target, err)
	}
	return control.VerifyReport{Errors: found.Errors, Hint: found.Hint}, nil
}

// backupFindings are targets that cannot be used, or that are damaged, and volumes whose
// last backup is not good. It asks no repository.
func (d *Driver) backupFindings() []control.Finding {
	if d.backups == nil {
		return nil
	}
	targets, err := d.Targets(context.Background())
	if err != nil {
		return []control.Finding{{ID: "backup-target", Status: control.StatusFail, Summary: err.Error()}}
	}
	var list []control.Finding
	for _, t := range targets {
		if t.Error != "" {
			list = append(list, control.Finding{ID: "backup-target", Status: control.StatusFail, Summary: t.Error})
		}
		for _, care := range []*control.Schedule{t.Prune, t.Check, t.Verify} {
			if care != nil && care.LastError != "" {
				list = append(list, control.Finding{ID: "backup-target", Status: control.StatusWarn, Summary: care.LastError})
			}
		}
	}
	for _, s := range d.all() {
		for name, v := range d.ledger.seen(s.key) {
			shown := d.shownBackups(v.Record)
			if v.Record.BackupSchedule != "" && d.ledger.owner(name) == s.key {
				if _, err := d.backups.target(d.backups.targetOf(v.Record)); err != nil {
					list = append(list, control.Finding{ID: "backup-target", Status: control.StatusWarn, Summary: fmt.Sprintf("volume %s has a schedule for backups that cannot be kept: %s", name, err)})
				}
			}
			if shown == nil || shown.LastError == "" || d.ledger.owner(name) != s.key {
				continue
			}
			good := "it has no good backup of this host"
			if shown.Good != "" {
				good = fmt.Sprintf("the last good one is %s of %s", shown.Good, shown.GoodTime.UTC().Format(time.RFC3339))
			}
			list = append(list, control.Finding{
				ID: "backup-failed", Status: control.StatusWarn,
				Summary: fmt.Sprintf("the last backup of volume %s failed; %s", name, good), Detail: shown.LastError,
			})
		}
	}
	slices.SortStableFunc(list, func(a, b control.Finding) int { return strings.Compare(a.Summary, b.Summary) })
	return list
}
