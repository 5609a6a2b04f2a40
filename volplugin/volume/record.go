package volume

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/berth-plugin/berth/volplugin/options"
)

// schema is the version of the files this program writes.
const schema = 1

// maxRecord bounds a record file. Options are the only part that users make long;
// those that Berth accepts are short.
const maxRecord = 64 << 10

// Errors of a record that cannot be used. The volume exists all the same: it is
// listed, and its data and record are left alone.
var (
	ErrDamaged = errors.New("record is damaged")
	ErrNewer   = errors.New("record was written by a newer Berth")
)

// A Phase is a point in a volume's life.
type Phase string

// The phases. A volume exists for users while it is Ready.
//
//	(none) -> creating -> ready -> removing -> (none, data in the trash)
//	             |
//	             +------> (none), when creating fails or is interrupted
const (
	Creating Phase = "creating"
	Ready    Phase = "ready"
	Removing Phase = "removing"
)

// A Record is what Berth knows of a volume, stored beside the data and the same
// for all hosts. What concerns one host, such as mounts, is not in it.
type Record struct {
	Schema int `json:"schema"`
	// UUID is this volume's alone; a volume made later under the same name has
	// another one.
	UUID   string `json:"uuid"`
	Name   string `json:"name"`
	Engine string `json:"engine"`
	Phase  Phase  `json:"phase"`
	// Host is who creates or removes the volume, "" while it is ready.
	Host      string    `json:"host,omitempty"`
	CreatedAt time.Time `json:"created"`
	// Adopted data was there before the volume.
	Adopted  bool             `json:"adopted,omitempty"`
	OnRemove options.OnRemove `json:"on-remove"`
	// Options as they were given to Create.
	Options map[string]string `json:"options,omitempty"`
	// RemovedAt is set in the trash.
	RemovedAt *time.Time `json:"removed,omitempty"`
}

// newRecord starts a volume's life.
func newRecord(name, engine, host string, spec options.Spec, adopted bool, now time.Time) Record {
	rec := Record{
		Schema:    schema,
		UUID:      uuid.NewString(),
		Name:      name,
		Engine:    engine,
		Phase:     Creating,
		Host:      host,
		CreatedAt: now.UTC().Truncate(time.Second),
		Adopted:   adopted,
		Options:   spec.Given,
	}
	switch {
	case spec.OnRemove != nil:
		rec.OnRemove = *spec.OnRemove
	case adopted:
		rec.OnRemove = options.Keep
	case Anonymous(name):
		rec.OnRemove = options.Purge
	default:
		rec.OnRemove = options.Trash
	}
	return rec
}

// Encode gives the form that is stored: JSON, readable by people too.
func (r Record) Encode() ([]byte, error) {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode record of volume %s: %w", r.Name, err)
	}
	return append(data, '\n'), nil
}

// DecodeRecord reads the stored form of the record of volume name. The error
// wraps ErrDamaged or ErrNewer. Unknown fields are ignored: a change that older
// versions must not overlook raises the schema.
func DecodeRecord(name string, data []byte) (Record, error) {
	rec, err := decode(data)
	if err == nil && rec.Name != name {
		err = fmt.Errorf("%w: it is of a volume called %.40q", ErrDamaged, rec.Name)
	}
	if err != nil {
		return Record{}, err
	}
	return rec, nil
}

func decode(data []byte) (Record, error) {
	var head struct {
		Schema int `json:"schema"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if head.Schema > schema {
		return Record{}, fmt.Errorf("%w: it has schema %d and this one knows up to %d", ErrNewer, head.Schema, schema)
	}
	var rec Record
	if err := json.Unmarshal(data, &rec); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err := rec.check(); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return rec, nil
}

// check finds values that no Berth of this schema writes.
func (r Record) check() error {
	if r.Schema != schema {
		return fmt.Errorf("schema %d", r.Schema)
	}
	if !isUUID(r.UUID) {
		return fmt.Errorf("uuid %.40q", r.UUID)
	}
	if err := CheckName(r.Name); err != nil {
		return err
	}
	if r.Engine == "" {
		return errors.New("engine is missing")
	}
	if r.CreatedAt.IsZero() || r.CreatedAt.Year() > 9999 {
		return fmt.Errorf("created %s", r.CreatedAt)
	}
	switch r.OnRemove {
	case options.Trash, options.Keep, options.Purge:
	default:
		return fmt.Errorf("on-remove %.40q", r.OnRemove)
	}
	switch r.Phase {
	case Ready:
	case Creating, Removing:
		if r.Host == "" {
			return fmt.Errorf("%s without a host", r.Phase)
		}
	default:
		return fmt.Errorf("phase %.40q", r.Phase)
	}
	return nil
}

// isUUID accepts the one form that Berth writes, since it becomes a file name.
func isUUID(s string) bool {
	id, err := uuid.Parse(s)
	return err == nil && id.String() == s
}
