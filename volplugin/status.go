package volplugin

import (
	"context"
	"maps"
	"sync"
	"time"

	"github.com/docker/go-units"

	api "github.com/docker/go-plugins-helpers/volume"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/thin"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// describe gives what `docker volume inspect` shows. It asks nobody: Get is called
// several times for each container.
func (d *Driver) describe(s *store, name string, v seenVolume, away error) *api.Volume {
	out := &api.Volume{Name: name, Mountpoint: d.mountpoint(s, volume.Reference{Volume: name}, v.Record)}
	status := map[string]any{"mounts": d.ledger.mountsOf(name).IDs.Total()}
	s.status(status)
	if v.Broken != "" {
		status["error"] = v.Broken + "; its data and its record are left alone, and it cannot be mounted or removed"
	} else {
		// Any other form than RFC 3339 would make dockerd drop the volume.
		out.CreatedAt = v.Record.CreatedAt.UTC().Format(time.RFC3339)
		s.describeRecord(status, v.Record)
		if shown := d.backedUp(v.Record); shown != nil {
			status["backup"] = shown
		}
	}
	if v.snapshots != nil {
		status["snapshots"] = *v.snapshots
	}
	if v.Differs {
		status["options-differ"] = options.Differences(v.Record.Options, v.Asked)
	}
	if rivals := s.ledger.rivals(s.key, name); len(rivals) > 0 {
		status["also-in"] = rivals
	}
	if t, ok := s.leaseTrouble(v.Record.UUID); ok {
		status["lease"], status["error"] = string(t.state), t.String()
	}
	if away != nil {
		status["error"] = away.Error()
	}
	if n := s.changes.givenUp.Load() + s.looks.givenUp.Load(); n > 0 {
		status["hanging-calls"] = n
	}
	out.Status = status
	return out
}

// describeRecord adds what is on record. Defaults are left out.
func (s *store) describeRecord(status map[string]any, rec volume.Record) {
	status["engine"] = rec.Engine
	status["uuid"] = rec.UUID
	status["on-remove"] = string(rec.OnRemove)
	status["adopted"] = rec.Adopted
	if rec.EngineReason != "" {
		status["engine-reason"] = rec.EngineReason
	}
	if able, ok := s.abilities.get(rec.Engine); ok {
		status["consistency"] = string(able.Consistency)
		if able.FileSystem != "" {
			status["file-system"] = able.FileSystem
		}
	}
	if pool := s.pool.Load(); pool != nil && rec.Engine == thin.Name {
		status["pool"] = describePool(*pool)
	}
	if rec.Size > 0 {
		status["size"] = units.BytesSize(float64(rec.Size))
	}
	if used, ok := s.used.get(rec.UUID); ok {
		status["used"] = units.BytesSize(float64(used.Used))
	}
	for name, on := range map[string]bool{
		"protect": rec.Protect, "read-only": rec.ReadOnly, "exclusive": rec.Exclusive,
	} {
		if on {
			status[name] = true
		}
	}
	if len(rec.Labels) > 0 {
		status["labels"] = rec.Labels
	}
	if rec.Source != nil && rec.Phase == volume.Ready {
		status["source"] = sourceOf(rec)
	}
	switch rec.Phase {
	case volume.Ready:
	case volume.Restoring:
		status["state"] = string(rec.Phase) + s.fills.shown(rec.UUID)
	case volume.Broken:
		status["state"], status["error"] = string(rec.Phase), rec.Reason
	default:
		status["state"] = string(rec.Phase)
	}
	if rec.Schedule == "" {
		return
	}
	schedule := map[string]any{"schedule": rec.Schedule}
	if rec.Keep != "" {
		schedule["keep"] = rec.Keep
	}
	maps.Copy(schedule, s.scheduled(rec))
	status["snapshot"] = schedule
}

// abilities remembers what engines can do in a root.
type abilities struct {
	mu sync.Mutex
	by map[string]engine.Abilities
}

func (a *abilities) get(engine string) (engine.Abilities, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	able, ok := a.by[engine]
	return able, ok
}

// learn asks the engines of the volumes in the root, those not known yet.
func (s *store) learnAbilities(ctx context.Context, root *volume.Root) {
	for _, v := range s.ledger.seen(s.key) {
		if _, known := s.abilities.get(v.Record.Engine); known || v.Broken != "" {
			continue
		}
		able, err := root.Abilities(ctx, v.Record)
		if err != nil {
			continue // Create and Mount tell
		}
		s.abilities.mu.Lock()
		if s.abilities.by == nil {
			s.abilities.by = map[string]engine.Abilities{}
		}
		s.abilities.by[v.Record.Engine] = able
		s.abilities.mu.Unlock()
	}
}

// usages remember what volumes took when that was last measured, by UUID.
type usages struct {
	mu sync.Mutex
	by map[string]measured
}

type measured struct {
	engine.Usage
	at time.Time
}

func (u *usages) get(uuid string) (measured, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	m, ok := u.by[uuid]
	return m, ok
}

func (u *usages) set(uuid string, m measured) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.by == nil {
		u.by = map[string]measured{}
	}
	u.by[uuid] = m
}
