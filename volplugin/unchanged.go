package volplugin

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// standsFor is for how long a backup stands for later ones of a volume that does not
// change: short of a day, so that what runs every night makes an entry every night.
const standsFor = 20 * time.Hour

// A sight is what a later backup is compared with.
type sight struct {
	// Mark is the engine's of the snapshot, "" when it cannot compare it.
	Mark engine.Mark `json:",omitempty"`
	// Manifest is a digest of what the manifest says beside the snapshot's name and time.
	Manifest string `json:",omitempty"`
}

// sightOf looks at a snapshot. A volume whose engine errs is backed up all the same.
func (d *Driver) sightOf(ctx context.Context, root *volume.Root, rec volume.Record, m backup.Manifest) sight {
	mark, err := root.Mark(ctx, rec, m.Snapshot)
	if err != nil {
		d.cfg.Log.WithField("volume", rec.Name).WithError(err).Warn("find out what has changed since the last backup")
	}
	m.Snapshot, m.Time = "", time.Time{}
	text, err := m.Encode()
	if mark == "" || err != nil {
		return sight{}
	}
	sum := sha256.Sum256(text)
	return sight{Mark: mark, Manifest: hex.EncodeToString(sum[:])}
}

// standing finds the backup that already holds what a snapshot has: the last one of the
// volume in this target, if it is still there, young, and of the kind that is asked for.
// Whatever is in doubt is no reason to err, but to make a new one.
func (d *Driver) standing(ctx context.Context, s *store, root *volume.Root, rec volume.Record, job backupJob, seen sight, target string, eng backup.Engine) (found backup.Backup, ok bool) {
	known := d.backups.state(rec.UUID)
	last := known.Targets[target]
	asked, plain := kindOf(job.tags)
	// The failure that is counted is this attempt, as long as it lasts. Other hosts have
	// marks of their own, and look for one another's backups by the tag of a time.
	if job.full || !plain || known.Failures != 1 || !s.alone() || seen.Mark == "" || last.Seen.Mark == "" || seen.Manifest != last.Seen.Manifest {
		return found, false
	}
	log := d.cfg.Log.WithField("volume", rec.Name)
	same, err := root.Unchanged(ctx, rec, job.snapshot, last.Seen.Mark)
	if err != nil {
		log.WithError(err).Warn("find out what has changed since the last backup")
	}
	if err != nil || !same {
		return found, false
	}
	list, err := eng.List(ctx, backup.Filter{UUID: rec.UUID})
	if err != nil {
		log.WithError(err).Warnf("look for the last backup in %s", target)
		return found, false
	}
	// The newest is what people get who ask for the latest.
	list = slices.DeleteFunc(list, func(b backup.Backup) bool { return b.Incomplete })
	if len(list) == 0 {
		return found, false
	}
	found = list[len(list)-1]
	kind, plain := kindOf(found.Tags)
	age := d.cfg.Now().Sub(found.Time)
	return found, plain && found.ID == last.ID && kind == asked && age >= 0 && age < standsFor
}

// kindOf tells backups apart that have to last differently: those of a schedule go by a
// policy, and those that somebody has asked for stay. With a tag of somebody's, one is not
// plain.
func kindOf(tags []string) (scheduled, plain bool) {
	plain = true
	for _, tag := range tags {
		switch {
		case tag == tagScheduled:
			scheduled = true
		case !strings.HasPrefix(tag, tagDue):
			plain = false
		}
	}
	return scheduled, plain
}
