package volplugin

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/state"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// A backupState is what this host knows of the backups of one volume.
type backupState struct {
	// Last is when one was last tried, and Error why it failed, or what is missing in
	// it; "" when it is good. Failures in a row.
	Last     time.Time
	Error    string `json:",omitempty"`
	Failures int    `json:",omitempty"`
	// Good is the reference of the last good one. GoodTime is when the volume last had
	// the data that is in it, as far as was looked.
	Good     string    `json:",omitempty"`
	GoodTime time.Time `json:",omitzero"`
	// Took is how long it took. Files, Bytes and Added are the Result's.
	Took                time.Duration `json:",omitempty"`
	Files, Bytes, Added uint64        `json:",omitempty"`
	// Scheduled is the target that the schedule has backed up to, of a volume that names
	// none.
	Scheduled string `json:",omitempty"`
	// Targets has the last good backup in each target.
	Targets map[string]lastBackup `json:",omitempty"`
}

// A lastBackup is one that the next may build on.
type lastBackup struct {
	ID string
	// Reread is when all files were read the last time.
	Reread time.Time
	// Seen is what the next one is compared with.
	Seen sight `json:",omitzero"`
	// Options are those in its manifest, nil when that is to be asked.
	Options map[string]string
}

var backupsBucket = state.NewBucket[backupState]("volume-backups")

func (b *backups) state(uuid string) (st backupState) {
	_ = b.db.View(func(tx *state.Tx) error {
		st, _, _ = backupsBucket.Get(tx, uuid)
		return nil
	})
	return st
}

// change stores what fn makes of the state of a volume.
func (b *backups) change(uuid string, fn func(*backupState)) error {
	return b.db.Update(func(tx *state.Tx) error {
		st, _, err := backupsBucket.Get(tx, uuid)
		if err != nil {
			return err
		}
		st.Targets = maps.Clone(st.Targets)
		fn(&st)
		return backupsBucket.Put(tx, uuid, st)
	})
}

// forget drops what is known of the backups of volumes that are gone for good.
func (b *backups) forget(uuids ...string) error {
	if b == nil || len(uuids) == 0 {
		return nil
	}
	return b.db.Update(func(tx *state.Tx) error {
		for _, uuid := range uuids {
			if err := backupsBucket.Delete(tx, uuid); err != nil {
				return err
			}
		}
		return nil
	})
}

// forgetBackups does that for volumes that no root has any more. They may be in the
// trash; so it waits, from their last backup on, for as long as the trash keeps things.
func (d *Driver) forgetBackups() error {
	if d.backups == nil {
		return nil
	}
	there := map[string]bool{}
	for _, s := range d.all() {
		for _, v := range d.ledger.seen(s.key) {
			there[v.Record.UUID] = true
		}
	}
	var gone []string
	err := d.backups.db.View(func(tx *state.Tx) error {
		return backupsBucket.Each(tx, func(uuid string, st backupState) error {
			if !there[uuid] && d.cfg.Now().Sub(st.Last) > volume.TrashKeep {
				gone = append(gone, uuid)
			}
			return nil
		})
	})
	return errors.Join(err, d.backups.forget(gone...))
}

func (b *backups) failed(uuid string, err error) error {
	return b.change(uuid, func(st *backupState) { st.Error = err.Error() })
}

// A madeBackup is one that is in the repository.
type madeBackup struct {
	control.Backup
	// at is the time of the snapshot, and seen what a later one is compared with.
	at      time.Time
	seen    sight
	options map[string]string
	// reread: all files were read for it.
	reread bool
}

// ended notes what was made.
func (b *backups) ended(uuid string, done madeBackup) error {
	return b.change(uuid, func(st *backupState) {
		if done.Incomplete {
			st.Error = fmt.Sprintf("backup %s is incomplete: %s", done.Reference, strings.Join(done.Missing, "; "))
			return
		}
		st.Error, st.Failures = "", 0
		st.Good, st.GoodTime = done.Reference, done.at
		if done.Unchanged {
			return // all else is of the backup that there is
		}
		st.Took, st.Files, st.Bytes, st.Added = done.Took, done.Files, done.Bytes, done.Added
		last := lastBackup{ID: done.ID, Reread: st.Targets[done.Target].Reread, Seen: done.seen, Options: done.options}
		if done.reread || last.Reread.IsZero() {
			last.Reread = st.Last
		}
		if st.Targets == nil {
			st.Targets = map[string]lastBackup{}
		}
		st.Targets[done.Target] = last
	})
}
