package volplugin

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/notify"
	"github.com/berth-plugin/berth/shared/state"
	"github.com/berth-plugin/berth/volplugin/keep"
	"github.com/berth-plugin/berth/volplugin/schedule"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// schedulesBucket has, by a volume's UUID, when its snapshots were made and are due;
// backupRunsBucket is the same for backups, and has what targets are due for.
var (
	schedulesBucket  = state.NewBucket[schedule.State]("volume-schedules")
	backupRunsBucket = state.NewBucket[schedule.State]("backup-schedules")
)

// newRunner makes the snapshots of volumes with a schedule. Several hosts on one root
// all do: the name of a snapshot is the time that it is due at, so that the first
// host makes it and the others find it.
func (d *Driver) newRunner() *schedule.Runner {
	return &schedule.Runner{
		Jobs: d.jobs, Do: d.snapshotDue, Store: scheduleStore{d.cfg.DB, schedulesBucket}, Now: d.cfg.Now, Log: d.cfg.Log,
	}
}

// jobs are the schedules of all volumes that this host knows.
func (d *Driver) jobs() []schedule.Job {
	jobs := []schedule.Job{}
	for _, s := range d.all() {
		for name, v := range d.ledger.seen(s.key) {
			if v.Record.Schedule == "" || v.Record.Phase != volume.Ready || d.ledger.owner(name) != s.key {
				continue
			}
			due, err := schedule.Parse(v.Record.Schedule)
			if err != nil {
				d.cfg.Log.WithField("volume", name).WithError(err).Warnf("schedule %.60q", v.Record.Schedule)
				continue
			}
			jobs = append(jobs, schedule.Job{UUID: v.Record.UUID, Schedule: due})
		}
	}
	return jobs
}

// named finds a volume by its UUID.
func (d *Driver) named(uuid string) (string, volume.Record, bool) {
	for _, s := range d.all() {
		for name, v := range d.ledger.seen(s.key) {
			if v.Record.UUID == uuid && d.ledger.owner(name) == s.key {
				return name, v.Record, true
			}
		}
	}
	return "", volume.Record{}, false
}

// dueName is the name of a scheduled snapshot.
const dueName = "20060102T150405Z"

// snapshotDue makes one scheduled snapshot and removes those that are not to be kept
// any longer.
func (d *Driver) snapshotDue(ctx context.Context, job schedule.Job) error {
	name, rec, ok := d.named(job.UUID)
	if !ok {
		return nil
	}
	log := d.cfg.Log.WithField("volume", name)
	o := volume.SnapshotOptions{Name: job.Due.UTC().Format(dueName), Trigger: volume.Scheduled}
	snap, err := d.createSnapshot(ctx, name, o, nil)
	if errdefs.IsConflict(err) && d.hasSnapshot(ctx, name, o.Name) {
		err = nil // another host was faster
	}
	e := notify.Event{Key: "snapshot " + name, Title: "Snapshots of volume " + name + " are made again", Minor: true}
	if err != nil {
		e.Failed, e.Title, e.Text = true, "The snapshot of volume "+name+" that was due could not be made", err.Error()
	}
	d.cfg.Tell(e)
	switch {
	case err != nil:
		return err
	case snap.Name != "":
		log.Infof("snapshot %s@%s made by schedule, consistency %s", name, snap.Name, snap.Consistency)
	}
	if rec.Keep == "" {
		return nil
	}
	if _, err := keep.Parse(rec.Keep); err != nil {
		return fmt.Errorf("policy %.60q: %w", rec.Keep, err)
	}
	pruned, err := d.PruneSnapshots(ctx, control.PruneSnapshotsRequest{Volume: name}, nil)
	if err != nil {
		return err
	}
	for ref, reason := range pruned.Failed {
		log.Warnf("remove old snapshot %s: %s", ref, reason)
	}
	return nil
}

func (d *Driver) hasSnapshot(ctx context.Context, name, snap string) bool {
	s, err := d.storeOf(ctx, name)
	if err != nil {
		return false
	}
	err = s.withLook(ctx, func(ctx context.Context, root *volume.Root) error {
		_, err := root.Snapshot(ctx, name, snap)
		return err
	})
	return err == nil
}

// schedule tells when a volume's snapshots were made and are due.
func (s *store) schedule(rec volume.Record) *control.Schedule {
	out := &control.Schedule{Spec: rec.Schedule, Keep: rec.Keep}
	if st, ok := s.runner.State(rec.UUID); ok {
		out.Last, out.Next, out.LastError = st.Last, st.Next, st.Error
	}
	return out
}

// scheduled is schedule for Status.
func (s *store) scheduled(rec volume.Record) map[string]any {
	shown := s.schedule(rec)
	out := map[string]any{}
	for key, at := range map[string]time.Time{"last": shown.Last, "next": shown.Next} {
		if !at.IsZero() {
			out[key] = at.UTC().Format(time.RFC3339)
		}
	}
	if shown.LastError != "" {
		out["error"] = shown.LastError
	}
	return out
}

// scheduleStore is schedule.Store in this host's state file.
type scheduleStore struct {
	db     *state.DB
	bucket state.Bucket[schedule.State]
}

// Load implements schedule.Store.
func (s scheduleStore) Load() (map[string]schedule.State, error) {
	all := map[string]schedule.State{}
	err := s.db.Update(func(tx *state.Tx) error {
		return s.bucket.Each(tx, func(uuid string, st schedule.State) error {
			all[uuid] = st
			return nil
		})
	})
	return all, err
}

// Put implements schedule.Store.
func (s scheduleStore) Put(uuid string, st schedule.State) error {
	return s.db.Update(func(tx *state.Tx) error { return s.bucket.Put(tx, uuid, st) })
}

// Delete implements schedule.Store.
func (s scheduleStore) Delete(uuid string) error {
	return s.db.Update(func(tx *state.Tx) error { return s.bucket.Delete(tx, uuid) })
}
