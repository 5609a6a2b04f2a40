package volplugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/notify"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/keep"
	"github.com/berth-plugin/berth/volplugin/schedule"
	"github.com/berth-plugin/berth/volplugin/volume"
)

const (
	// pruneJob, checkJob and verifyJob go before the name of a target in the keys of
	// jobs. UUIDs of volumes have no slash.
	pruneJob  = "prune/"
	checkJob  = "check/"
	verifyJob = "verify/"
	// careEvery is how often targets are looked after where nothing else is asked for.
	careEvery = "@weekly"
)

// newBackupRunner makes the backups of volumes with a schedule and looks after targets.
// Two things at a time at most, so that a repository which hangs does not hold up all others.
func (d *Driver) newBackupRunner() *schedule.Runner {
	return &schedule.Runner{
		Jobs: d.backupJobs, Do: d.backupDue,
		Store: scheduleStore{d.cfg.DB, backupRunsBucket}, Now: d.cfg.Now, Log: d.cfg.Log,
	}
}

// backupJobs are the schedules of all volumes and targets that this host knows.
func (d *Driver) backupJobs() []schedule.Job {
	jobs := []schedule.Job{}
	if d.backups == nil {
		return jobs
	}
	for _, s := range d.all() {
		for name, v := range d.ledger.seen(s.key) {
			if v.Record.BackupSchedule == "" || v.Record.Phase != volume.Ready || d.ledger.owner(name) != s.key {
				continue
			}
			due, err := schedule.Parse(v.Record.BackupSchedule)
			if err != nil {
				d.cfg.Log.WithField("volume", name).WithError(err).Warnf("schedule %.60q", v.Record.BackupSchedule)
				continue
			}
			jobs = append(jobs, schedule.Job{UUID: v.Record.UUID, Schedule: due})
		}
	}
	names, err := d.backups.targets.Names()
	if err != nil {
		d.cfg.Log.WithError(err).Warn("look after targets of backups")
		return nil
	}
	for _, name := range names {
		target, err := d.backups.targets.Get(name)
		if err != nil {
			continue // whoever uses it is told
		}
		for prefix, spec := range map[string]string{
			pruneJob: target.PruneSchedule, checkJob: target.CheckSchedule, verifyJob: cmp.Or(target.VerifySchedule, backup.Never),
		} {
			if due, ok := careSchedule(spec); ok {
				jobs = append(jobs, schedule.Job{UUID: prefix + name, Schedule: due})
			}
		}
	}
	return jobs
}

// careSchedule is when a target is looked after; ok is false for never.
func careSchedule(spec string) (due schedule.Schedule, ok bool) {
	if spec == backup.Never {
		return due, false
	}
	if spec == "" {
		spec = careEvery
	}
	due, err := schedule.Parse(spec)
	return due, err == nil
}

// backupDue does one job.
func (d *Driver) backupDue(ctx context.Context, job schedule.Job) error {
	if target, ok := strings.CutPrefix(job.UUID, pruneJob); ok {
		return d.told("Pruning target "+target, d.pruneDue(ctx, target))
	}
	if target, ok := strings.CutPrefix(job.UUID, checkJob); ok {
		return d.told("Checking target "+target, d.checkDue(ctx, target))
	}
	if target, ok := strings.CutPrefix(job.UUID, verifyJob); ok {
		return d.told("Restoring a backup of target "+target+" for a test", d.verifyDue(ctx, target))
	}
	name, rec, ok := d.named(job.UUID)
	if !ok {
		return nil
	}
	target, eng, err := d.backups.engine(d.backups.targetOf(rec))
	if err == nil {
		err = d.backups.chosen(rec, target.Name)
	}
	if err != nil {
		return d.failedBackup(name, cmp.Or(rec.BackupTarget, "a target"), err)
	}
	log := d.cfg.Log.WithField("volume", name)
	s, err := d.storeOf(ctx, name)
	if err != nil {
		return err
	}
	end, err := d.takeTurn(ctx, s, rec)
	if errors.Is(err, schedule.ErrElsewhere) {
		return err // no failure: whoever is at it tells how it goes
	}
	if err != nil {
		return d.failedBackup(name, target.Name, err)
	}
	defer end()
	due := tagDue + job.Due.UTC().Format(dueName)
	made, err := d.madeElsewhere(ctx, s, rec.UUID, eng, due)
	if err != nil {
		return d.failedBackup(name, target.Name, err)
	}
	if made {
		log.Infof("volume %s was backed up to %s by another host", name, target.Name)
		return nil
	}
	done, err := d.backUp(ctx, backupJob{volume: name, target: target.Name, tags: []string{tagScheduled, due}}, newReporter(nil))
	if err != nil {
		return err
	}
	if done.Unchanged {
		log.Infof("volume %s has not changed since backup %s was made at %s", name, done.Reference, done.Time.Format(time.RFC3339))
	} else {
		log.Infof("backup %s made by schedule, consistency %s, %d bytes added, in %s", done.Reference, done.Consistency, done.Added, done.Took.Round(time.Millisecond))
	}
	if done.Incomplete {
		return fmt.Errorf("backup %s is incomplete: %s", done.Reference, strings.Join(done.Missing, "; "))
	}
	if rec.BackupKeep == "" {
		return nil
	}
	err = d.dropOldBackups(ctx, name, rec, eng)
	e := notify.Event{Key: "keep " + name, Title: "Old backups of volume " + name + " are removed again", Minor: true}
	if err != nil {
		e.Failed, e.Title, e.Text = true, "Old backups of volume "+name+" could not be removed", err.Error()
	}
	d.cfg.Tell(e)
	return err
}

// failedBackup tells people of a backup that could not be begun; its end is told as that of any
// other that failed.
func (d *Driver) failedBackup(name, target string, err error) error {
	d.tellBackup(name, target, control.Backup{}, err)
	return err
}

// targetOf names the target of a volume's backups: its own, or the only one there is.
// What a schedule has backed up to so it goes on with when there are more: a second
// target must not end the backups of volumes that name none. "" is none, or several.
func (b *backups) targetOf(rec volume.Record) string {
	if rec.BackupTarget != "" {
		return rec.BackupTarget
	}
	names, err := b.targets.Names()
	if err != nil || len(names) == 0 {
		return ""
	}
	if len(names) == 1 {
		return names[0]
	}
	if used := b.state(rec.UUID).Scheduled; slices.Contains(names, used) {
		return used
	}
	return ""
}

// chosen notes what targetOf has found.
func (b *backups) chosen(rec volume.Record, target string) error {
	if rec.BackupTarget != "" || b.state(rec.UUID).Scheduled == target {
		return nil
	}
	return b.change(rec.UUID, func(st *backupState) { st.Scheduled = target })
}

// told tells people how scheduled work went.
func (d *Driver) told(what string, err error) error {
	e := notify.Event{Key: what, Title: what + " went well", Text: what + " went well"}
	if err != nil {
		e.Failed, e.Title, e.Text = true, what+" failed", err.Error()
	}
	d.cfg.Tell(e)
	return err
}

// madeElsewhere tells whether another of the hosts that share the volume's root was
// faster.
func (*Driver) madeElsewhere(ctx context.Context, s *store, uuid string, eng backup.Engine, due string) (bool, error) {
	if s.alone() {
		return false, nil
	}
	list, err := eng.List(ctx, backup.Filter{UUID: uuid})
	return slices.ContainsFunc(list, func(b backup.Backup) bool { return slices.Contains(b.Tags, due) }), err
}

// dropOldBackups removes what a volume's policy does not keep of its scheduled backups.
func (d *Driver) dropOldBackups(ctx context.Context, name string, rec volume.Record, eng backup.Engine) error {
	policy, err := keep.Parse(rec.BackupKeep)
	if err != nil {
		return fmt.Errorf("policy %.60q: %w", rec.BackupKeep, err)
	}
	list, err := eng.List(ctx, backup.Filter{UUID: rec.UUID})
	if err != nil {
		return err
	}
	drop := droppedBackups(scheduledOnly(list), policy, d.cfg.Now())
	if len(drop) == 0 {
		return nil
	}
	if err := eng.Forget(ctx, idsOf(drop)); err != nil {
		return fmt.Errorf("remove old backups: %w", err)
	}
	d.cfg.Log.WithField("volume", name).Infof("%d old backups removed", len(drop))
	return nil
}

// scheduledOnly leaves out what somebody has asked for.
func scheduledOnly(list []backup.Backup) []backup.Backup {
	return slices.DeleteFunc(slices.Clone(list), func(b backup.Backup) bool { return !slices.Contains(b.Tags, tagScheduled) })
}

// droppedBackups are the backups of one volume that a policy does not keep. An
// incomplete one goes once there is a complete one that is newer, and is counted for
// nothing.
func droppedBackups(list []backup.Backup, policy keep.Policy, now time.Time) []backup.Backup {
	var complete, drop []backup.Backup
	var newest time.Time
	for _, b := range list {
		if !b.Incomplete {
			complete = append(complete, b)
			if b.Time.After(newest) {
				newest = b.Time
			}
		}
	}
	for _, b := range list {
		if b.Incomplete && b.Time.Before(newest) {
			drop = append(drop, b)
		}
	}
	times := make([]time.Time, len(complete))
	for i, b := range complete {
		times[i] = b.Time
	}
	_, old := policy.Select(times, now)
	for _, i := range old {
		drop = append(drop, complete[i])
	}
	return drop
}

func idsOf(list []backup.Backup) []string {
	ids := make([]string, len(list))
	for i, b := range list {
		ids[i] = b.ID
	}
	return ids
}

// pruneDue frees the space of what was removed from a target.
func (d *Driver) pruneDue(ctx context.Context, name string) error {
	_, eng, err := d.backups.engine(name)
	if err != nil {
		return err
	}
	if err := eng.Prune(ctx, func(backup.Progress) {}); err != nil {
		return fmt.Errorf("prune target %s: %w", name, err)
	}
	d.cfg.Log.Infof("target %s pruned by schedule", name)
	return nil
}

// checkDue looks a target through.
func (d *Driver) checkDue(ctx context.Context, name string) error {
	target, eng, err := d.backups.engine(name)
	if err != nil {
		return err
	}
	report, err := eng.Check(ctx, target.CheckShare, func(backup.Progress) {})
	if err != nil {
		return fmt.Errorf("check target %s: %w", name, err)
	}
	if len(report.Errors) > 0 {
		return fmt.Errorf("target %s is damaged: %s", name, strings.Join(report.Errors, "; "))
	}
	d.cfg.Log.Infof("target %s checked by schedule", name)
	return nil
}

// verifyDue restores the newest backup of a volume of a target, which chance chooses,
// to a place that is removed afterwards.
func (d *Driver) verifyDue(ctx context.Context, name string) error {
	list, err := d.listIn(ctx, name, backup.Filter{})
	if err != nil {
		return fmt.Errorf("target %s: %w", name, err)
	}
	newest := map[string]backup.Backup{}
	for _, b := range list { // the oldest first
		if !b.Incomplete {
			newest[b.UUID] = b
		}
	}
	if len(newest) == 0 {
		return nil
	}
	uuids := slices.Sorted(maps.Keys(newest))
	chosen := newest[uuids[rand.IntN(len(uuids))]]
	ref := backup.Reference{Target: name, Volume: chosen.Volume, Pick: chosen.ID}
	report, err := d.verifyRestore(ctx, ref.String(), newReporter(nil))
	if err != nil {
		return err
	}
	if len(report.Errors) > 0 {
		return fmt.Errorf("backup %s: %s", shortReference(ref.String()), strings.Join(report.Errors, "; "))
	}
	d.cfg.Log.Infof("backup %s restored for a test: %d files", shortReference(ref.String()), report.Backup.Files)
	return nil
}

// careOf tells when a target is looked after, nil for never.
func (d *Driver) careOf(key, spec string) *control.Schedule {
	due, ok := careSchedule(spec)
	if !ok {
		return nil
	}
	out := &control.Schedule{Spec: due.String()}
	if st, ok := d.backupRuns.State(key); ok {
		out.Last, out.Next, out.LastError = st.Last, st.Next, st.Error
	}
	return out
}

// shownBackups is what this host knows of a volume's backups, nil for nothing.
func (d *Driver) shownBackups(rec volume.Record) *control.VolumeBackup {
	if d.backups == nil {
		return nil
	}
	st := d.backups.state(rec.UUID)
	if rec.BackupSchedule == "" && st.Last.IsZero() {
		return nil
	}
	target := rec.BackupTarget
	if rec.BackupSchedule != "" {
		target = d.backups.targetOf(rec)
	}
	out := &control.VolumeBackup{
		Target: target, Schedule: rec.BackupSchedule, Keep: rec.BackupKeep,
		Last: st.Last, LastError: st.Error, Good: st.Good, GoodTime: st.GoodTime,
	}
	if run, ok := d.backupRuns.State(rec.UUID); ok {
		out.Next = run.Next
		if run.Error != "" && run.Last.After(st.Last) {
			// It failed before there was anything to back up to.
			out.Last, out.LastError = run.Last, run.Error
		}
	}
	return out
}

// backedUp is shownBackups for Status.
func (d *Driver) backedUp(rec volume.Record) map[string]any {
	shown := d.shownBackups(rec)
	if shown == nil {
		return nil
	}
	out := map[string]any{}
	for key, text := range map[string]string{
		"target": shown.Target, "schedule": shown.Schedule, "keep": shown.Keep, "error": shown.LastError, "good": shown.Good,
	} {
		if text != "" {
			out[key] = text
		}
	}
	for key, at := range map[string]time.Time{"next": shown.Next, "last": shown.Last, "good-time": shown.GoodTime} {
		if !at.IsZero() {
			out[key] = at.UTC().Format(time.RFC3339)
		}
	}
	return out
}
