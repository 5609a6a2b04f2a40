package volume

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/berth-plugin/berth/volplugin/engine"
)

// snapshotSchema is the version of the snapshots' records this program writes.
const snapshotSchema = 1

// A Trigger is what a snapshot was made for.
type Trigger string

// The triggers.
const (
	// Manual: a user asked for it.
	Manual Trigger = "manual"
	// Scheduled by the volume's schedule, whose policy may remove it.
	Scheduled Trigger = "schedule"
	// BeforeRollback is what was in the volume before it was rolled back.
	BeforeRollback Trigger = "rollback"
	// ForClone is gone when the clone that is made from it is complete.
	ForClone Trigger = "clone"
	// BeforeRestore is what was in the volume before a backup was restored in its place.
	BeforeRestore Trigger = "restore"
	// ForBackup is gone when the backup that is made from it has ended.
	ForBackup Trigger = "backup"
)

// A Snapshot is the record of one, beside its data and the same for all hosts. Its
// phases are creating, ready and removing.
type Snapshot struct {
	Schema int    `json:"schema"`
	Name   string `json:"name"`
	// UUID is the volume's, and Volume the name it had when the snapshot was made.
	UUID      string    `json:"volume-uuid"`
	Volume    string    `json:"volume"`
	Engine    string    `json:"engine"`
	CreatedAt time.Time `json:"created"`
	Phase     Phase     `json:"phase"`
	// Host makes or removes the snapshot; when it is ready, the host that made it.
	Host        string             `json:"host"`
	Trigger     Trigger            `json:"trigger"`
	Consistency engine.Consistency `json:"consistency,omitempty"`
	// Files, Bytes and Unstable are engine.Copy's.
	Files    uint64            `json:"files,omitempty"`
	Bytes    uint64            `json:"bytes,omitempty"`
	Unstable uint64            `json:"unstable,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	// Source is what the volume's data was made from then, the empty one for nothing: a
	// volume that is rolled back has it again. nil in those of earlier versions.
	Source *Source `json:"source,omitempty"`
	// Until is for how long one that was made ForBackup stays although nobody is backing it
	// up yet.
	Until time.Time `json:"until,omitzero"`
	// For is the UUID of the volume that is cloned from it.
	For string `json:"for,omitempty"`
}

// Encode gives the form that is stored. It refuses what DecodeSnapshot would.
func (s Snapshot) Encode() ([]byte, error) {
	if err := s.check(s.UUID, s.Name); err != nil {
		return nil, fmt.Errorf("record of snapshot %s@%s: %w", s.Volume, s.Name, err)
	}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode record of snapshot %s@%s: %w", s.Volume, s.Name, err)
	}
	return append(data, '\n'), nil
}

// DecodeSnapshot reads the stored form of the record of snapshot name of the volume
// with the UUID. The error wraps ErrDamaged or ErrNewer.
func DecodeSnapshot(uuid, name string, data []byte) (Snapshot, error) {
	var head struct {
		Schema int `json:"schema"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return Snapshot{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if head.Schema > snapshotSchema {
		return Snapshot{}, fmt.Errorf("%w: it has schema %d and this one knows up to %d", ErrNewer, head.Schema, snapshotSchema)
	}
	var s Snapshot
	if err := json.Unmarshal(data, &s); err != nil {
		return Snapshot{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err := s.check(uuid, name); err != nil {
		return Snapshot{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return s, nil
}

// check finds values that no Berth of this schema writes.
func (s Snapshot) check(uuid, name string) error {
	if s.Schema != snapshotSchema {
		return fmt.Errorf("schema %d", s.Schema)
	}
	if s.UUID != uuid || !isUUID(s.UUID) {
		return fmt.Errorf("it is of a volume with uuid %.40q", s.UUID)
	}
	if s.Name != name {
		return fmt.Errorf("it is of a snapshot called %.40q", s.Name)
	}
	if err := errors.Join(CheckSnapshotName(s.Name), CheckName(s.Volume)); err != nil {
		return err
	}
	if s.Engine == "" || s.Host == "" {
		return errors.New("engine or host is missing")
	}
	if s.For != "" && !isUUID(s.For) {
		return fmt.Errorf("it is for a volume with uuid %.40q", s.For)
	}
	if s.CreatedAt.IsZero() || s.CreatedAt.Year() > 9999 {
		return fmt.Errorf("created %s", s.CreatedAt)
	}
	switch s.Phase {
	case Creating, Ready, Removing:
	default:
		return fmt.Errorf("phase %.40q", s.Phase)
	}
	if s.Source != nil {
		if err := s.Source.check(); err != nil {
			return err
		}
	}
	switch s.Trigger {
	case Manual, Scheduled, BeforeRollback, BeforeRestore, ForClone, ForBackup:
	default:
		return fmt.Errorf("trigger %.40q", s.Trigger)
	}
	return nil
}
