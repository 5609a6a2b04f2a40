package volplugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/keep"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// backupWait is how long a snapshot that somebody has made for a backup waits for it. A
// command that is killed leaves it no longer.
const backupWait = 5 * time.Minute

// CreateSnapshot implements control.VolumeAdmin.
func (d *Driver) CreateSnapshot(ctx context.Context, req control.SnapshotRequest, tell func(control.Progress)) (control.Snapshot, error) {
	o := volume.SnapshotOptions{Name: req.Name, Trigger: volume.Manual}
	if req.Paused {
		o.Consistency = engine.Paused
	}
	if req.ForBackup {
		if d.backups == nil {
			return control.Snapshot{}, errNoBackups
		}
		o.Trigger, o.Wait = volume.ForBackup, backupWait
	}
	return d.createSnapshot(ctx, req.Volume, o, tell)
}

func (d *Driver) createSnapshot(ctx context.Context, name string, o volume.SnapshotOptions, tell func(control.Progress)) (out control.Snapshot, err error) {
	if o.Name != "" {
		if err := volume.CheckSnapshotName(o.Name); err != nil {
			return out, err
		}
	}
	report := newReporter(tell)
	defer report.end()
	err = d.operate(ctx, name, beside, func(ctx context.Context, s *store, root *volume.Root) error {
		snap, err := root.CreateSnapshot(ctx, name, o, report.step("copying"))
		if err != nil {
			return err
		}
		out = d.shownSnapshot(volume.SnapshotEntry{Volume: name, UUID: snap.UUID, Name: snap.Name, Snapshot: snap})
		return nil
	})
	return out, err
}

// shownSnapshot is a snapshot for an operator.
func (d *Driver) shownSnapshot(e volume.SnapshotEntry) control.Snapshot {
	out := control.Snapshot{
		Volume: e.Volume, VolumeUUID: e.UUID, Name: e.Name,
		Mounted: d.ledger.mountsOf(e.Volume+"@"+e.Name).IDs.Total() > 0,
	}
	if e.Err != nil {
		out.Error = e.Err.Error()
		return out
	}
	snap := e.Snapshot
	out.Created, out.Origin, out.Consistency = snap.CreatedAt, control.SnapshotOrigin(snap.Trigger), control.Consistency(snap.Consistency)
	out.Files, out.Bytes, out.Unstable = snap.Files, snap.Bytes, snap.Unstable
	if snap.Phase != volume.Ready {
		out.Error = fmt.Sprintf("host %s is %s it", snap.Host, snap.Phase)
	}
	return out
}

// Snapshots implements control.VolumeAdmin.
func (d *Driver) Snapshots(ctx context.Context, name string) ([]control.Snapshot, error) {
	if name != "" {
		if err := volume.CheckName(name); err != nil {
			return nil, err
		}
		s, err := d.storeOf(ctx, name)
		if err != nil {
			return nil, err
		}
		return d.snapshotsIn(ctx, s, name)
	}
	list := []control.Snapshot{}
	for _, s := range d.all() {
		if s.missing != nil {
			continue
		}
		some, err := d.snapshotsIn(ctx, s, "")
		if err != nil {
			d.cfg.Log.WithError(err).Warnf("list snapshots of root %s", s)
			continue
		}
		list = append(list, some...)
	}
	slices.SortStableFunc(list, func(a, b control.Snapshot) int {
		if c := strings.Compare(a.Volume, b.Volume); c != 0 {
			return c
		}
		return a.Created.Compare(b.Created)
	})
	return list, nil
}

func (d *Driver) snapshotsIn(ctx context.Context, s *store, name string) ([]control.Snapshot, error) {
	list := []control.Snapshot{}
	err := s.withLook(ctx, func(ctx context.Context, root *volume.Root) error {
		entries, err := root.Snapshots(ctx, name)
		for _, e := range entries {
			list = append(list, d.shownSnapshot(e))
		}
		return err
	})
	switch {
	case errors.Is(err, volume.ErrFresh) && name == "":
		return list, nil
	case errors.Is(err, volume.ErrFresh), errors.Is(err, volume.ErrNoRecord):
		return nil, fault.NotFound("volume %s does not exist", name)
	}
	return list, err
}

// RemoveSnapshot implements control.VolumeAdmin.
func (d *Driver) RemoveSnapshot(ctx context.Context, ref control.SnapshotRef, _ func(control.Progress)) error {
	return d.removeSnapshot(ctx, volume.Reference{Volume: ref.Volume, Snapshot: ref.Name}, func(volume.Snapshot) bool { return true })
}

// removeSnapshot removes a snapshot that is what the caller takes it for.
func (d *Driver) removeSnapshot(ctx context.Context, ref volume.Reference, still func(volume.Snapshot) bool) error {
	if err := volume.CheckSnapshotName(ref.Snapshot); err != nil {
		return err
	}
	return d.operate(ctx, ref.Volume, beside, func(ctx context.Context, _ *store, root *volume.Root) error {
		snap, err := root.Snapshot(ctx, ref.Volume, ref.Snapshot)
		if err != nil && errdefs.IsNotFound(err) {
			return err
		}
		if err == nil && !still(snap) {
			return nil
		}
		// The name of the snapshot has requests of its own.
		unlock, err := d.locks.Lock(ctx, ref.String())
		if err != nil {
			return err
		}
		defer unlock()
		if d.backups.uses(snap.UUID, ref.Snapshot) {
			return fault.Conflict("snapshot %s is being backed up", ref)
		}
		if n := d.ledger.mountsOf(ref.String()).IDs.Total(); n > 0 {
			return fault.Conflict("snapshot %s is in use: %d mounts of containers are counted on it", ref, n)
		}
		return root.RemoveSnapshot(ctx, ref.Volume, ref.Snapshot)
	})
}

// PruneSnapshots implements control.VolumeAdmin.
func (d *Driver) PruneSnapshots(ctx context.Context, req control.PruneSnapshotsRequest, tell func(control.Progress)) (out control.PruneSnapshotsReport, err error) {
	report := newReporter(tell)
	defer report.end()
	given, err := keep.Parse(req.Keep)
	if req.Keep != "" && err != nil {
		return out, fault.Invalid("policy %.60q: %w", req.Keep, err)
	}
	all, err := d.Snapshots(ctx, req.Volume)
	if err != nil {
		return out, err
	}
	byVolume := map[string][]control.Snapshot{}
	for _, snap := range all {
		if snap.Error == "" && (req.All || snap.Origin == control.SnapshotSchedule) {
			byVolume[snap.Volume] = append(byVolume[snap.Volume], snap)
		}
	}
	out.Failed = map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(byVolume)) {
		policy := given
		if req.Keep == "" {
			rec := d.ledger.view(d.mountedIn(name).key, name).Record
			if rec.Keep == "" {
				continue
			}
			if policy, err = keep.Parse(rec.Keep); err != nil {
				out.Failed[name] = err.Error()
				continue
			}
		}
		for _, snap := range dropped(byVolume[name], policy, d.cfg.Now()) {
			ref := volume.Reference{Volume: name, Snapshot: snap.Name}
			report.send(control.Progress{Step: "removing " + ref.String()})
			if !req.DryRun {
				same := func(now volume.Snapshot) bool { return now.CreatedAt.Equal(snap.Created) }
				if err := d.removeSnapshot(ctx, ref, same); err != nil {
					out.Failed[ref.String()] = err.Error()
					continue
				}
			}
			out.Removed = append(out.Removed, snap)
		}
	}
	return out, ctx.Err()
}

// dropped are the snapshots of one volume that a policy does not keep.
func dropped(snaps []control.Snapshot, policy keep.Policy, now time.Time) []control.Snapshot {
	times := make([]time.Time, len(snaps))
	for i, snap := range snaps {
		times[i] = snap.Created
	}
	_, drop := policy.Select(times, now)
	var out []control.Snapshot
	for _, i := range drop {
		out = append(out, snaps[i])
	}
	return out
}
