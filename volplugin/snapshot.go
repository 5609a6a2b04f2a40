package volplugin

import (
	"context"
	"errors"
	"time"

	api "github.com/docker/go-plugins-helpers/volume"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// getSnapshot answers Get for VOLUME@SNAPSHOT. It errs with not-found only when it
// has looked and there is none.
func (d *Driver) getSnapshot(ctx context.Context, s *store, ref volume.Reference, v seenVolume, away error) (*api.GetResponse, error) {
	if away != nil {
		return nil, fault.Unavailable("volume %s: %w", ref, away)
	}
	ctx, cancel := context.WithTimeout(ctx, d.cfg.look)
	defer cancel()
	var snap volume.Snapshot
	err := s.looks.run(ctx, func() {}, func(ctx context.Context, _ func() bool) error {
		root, err := s.open()
		if err != nil {
			return err
		}
		defer root.Close()
		snap, err = root.Snapshot(ctx, ref.Volume, ref.Snapshot)
		return err
	})
	switch {
	case errors.Is(err, volume.ErrNoSnapshot), errors.Is(err, volume.ErrNoRecord):
		return nil, fault.NotFound("volume %s has no snapshot %s", ref.Volume, ref.Snapshot)
	case err != nil:
		return nil, fault.Unavailable("volume %s: %w", ref, err)
	}
	return &api.GetResponse{Volume: &api.Volume{
		Name:       ref.String(),
		Mountpoint: d.mountpoint(s, ref, v.Record),
		CreatedAt:  snap.CreatedAt.UTC().Format(time.RFC3339),
		Status: map[string]any{
			"snapshot-of": ref.Volume,
			"read-only":   true,
			"consistency": string(snap.Consistency),
			"origin":      string(snap.Trigger),
			"mounts":      d.ledger.mountsOf(ref.String()).IDs.Total(),
		},
	}}, nil
}

// refuseSnapshot says why a snapshot's name cannot be used for a volume that is made
// or removed; nil for names of volumes.
func refuseSnapshot(name string) error {
	ref, err := volume.ParseReference(name)
	if err != nil || ref.Snapshot == "" {
		return nil //nolint:nilerr // what else is wrong with it, others say
	}
	return fault.Invalid("%s is the name of a snapshot: use docker berth snapshot create %s %s, and docker berth snapshot rm %s", name, ref.Volume, ref.Snapshot, name)
}
