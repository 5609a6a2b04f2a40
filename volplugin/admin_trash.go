package volplugin

import (
	"context"
	"errors"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// Trash implements control.VolumeAdmin.
func (d *Driver) Trash(ctx context.Context) ([]control.TrashEntry, error) {
	list := []control.TrashEntry{}
	for _, s := range d.all() {
		if s.missing != nil {
			continue
		}
		err := s.withLook(ctx, func(ctx context.Context, root *volume.Root) error {
			entries, err := root.Trash(ctx)
			for _, e := range entries {
				list = append(list, s.shownTrash(e))
			}
			return err
		})
		if err != nil && !errors.Is(err, volume.ErrFresh) {
			d.cfg.Log.WithError(err).Warnf("list the trash of root %s", s)
		}
	}
	slices.SortStableFunc(list, func(a, b control.TrashEntry) int { return a.Removed.Compare(b.Removed) })
	return list, nil
}

func (s *store) shownTrash(e volume.TrashEntry) control.TrashEntry {
	out := control.TrashEntry{UUID: e.ID, Root: s.name}
	if e.Err != nil {
		out.Error = e.Err.Error()
		return out
	}
	out.Name, out.Engine, out.Expires = e.Record.Name, e.Record.Engine, e.Expires
	out.Removed, out.Deleting = *e.Record.RemovedAt, e.Record.Phase == volume.Purging
	return out
}

// trashed finds the store that has an entry.
func (d *Driver) trashed(ctx context.Context, uuid string) (*store, control.TrashEntry, error) {
	entries, err := d.Trash(ctx)
	if err != nil {
		return nil, control.TrashEntry{}, err
	}
	for _, e := range entries {
		if e.UUID != uuid {
			continue
		}
		for _, s := range d.all() {
			if s.name == e.Root {
				return s, e, nil
			}
		}
	}
	return nil, control.TrashEntry{}, fault.NotFound("the trash has no entry %.60q", uuid)
}

// RestoreTrash implements control.VolumeAdmin.
func (d *Driver) RestoreTrash(ctx context.Context, req control.RestoreTrashRequest) (out control.Volume, err error) {
	s, entry, err := d.trashed(ctx, req.UUID)
	if err != nil {
		return out, err
	}
	name := req.Name
	if name == "" {
		name = entry.Name
	}
	if err := volume.CheckName(name); err != nil {
		return out, err
	}
	unlock, err := d.lockOperation(ctx, name, alone)
	if err != nil {
		return out, err
	}
	if d.ledger.owner(name) != "" {
		unlock()
		return out, fault.Conflict("volume %s exists already; restore it under another name", name)
	}
	err = s.inRoot(ctx, unlock, func(ctx context.Context, root *volume.Root) error {
		if err := d.checkNested(s, name); err != nil {
			return err
		}
		if _, err := root.RestoreTrash(ctx, req.UUID, name); err != nil {
			return err
		}
		out, err = d.again(s, root, name)
		return err
	})
	return out, err
}

// PurgeTrash implements control.VolumeAdmin.
func (d *Driver) PurgeTrash(ctx context.Context, req control.PurgeTrashRequest, tell func(control.Progress)) (out control.PurgeTrashReport, err error) {
	report := newReporter(tell)
	defer report.end()
	entries, err := d.Trash(ctx)
	if err != nil {
		return out, err
	}
	out.Failed = map[string]string{}
	for _, uuid := range req.UUIDs {
		if !slices.ContainsFunc(entries, func(e control.TrashEntry) bool { return e.UUID == uuid }) {
			out.Failed[uuid] = "the trash has no such entry"
		}
	}
	for _, e := range entries {
		if !req.All && !slices.Contains(req.UUIDs, e.UUID) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return out, err
		}
		report.send(control.Progress{Step: "deleting " + e.Name})
		s, _, err := d.trashed(ctx, e.UUID)
		if err == nil {
			err = s.inRoot(ctx, func() {}, func(ctx context.Context, root *volume.Root) error {
				_, err := root.PurgeTrash(ctx, e.UUID)
				return err
			})
		}
		if err != nil && !errdefs.IsNotFound(err) {
			out.Failed[e.UUID] = err.Error()
			continue
		}
		if err := d.backups.forget(e.UUID); err != nil {
			return out, err
		}
		out.Purged = append(out.Purged, e)
	}
	return out, nil
}
