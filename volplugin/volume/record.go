package volume

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/google/uuid"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/options"
)

// schema is the version of the records this program writes; it reads all before it.
// Version 2 brought engines, limits, options of use and the phases of clones,
// rollbacks and renames.
const schema = 2

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

// The phases. Containers get the data of a volume that is Ready; the name of one
// that is restoring, broken, rolling-back or renaming is taken all the same, and
// users see it.
//
//	(none) -> creating -> ready -> removing -> (none, data in the trash)
//	             |
//	             +------> (none), when creating fails or is interrupted
//	(none) -> restoring -> ready
//	             |
//	             +-------> broken -> (none)
//	ready -> rolling-back -> ready
//	ready -> renaming -> (none, and ready under the other name)
//
// In the trash a record is removing, or restoring while it is taken out again, or
// purging from the moment its data begins to be deleted.
const (
	Creating    Phase = "creating"
	Restoring   Phase = "restoring"
	Broken      Phase = "broken"
	Ready       Phase = "ready"
	RollingBack Phase = "rolling-back"
	Renaming    Phase = "renaming"
	Removing    Phase = "removing"
	Purging     Phase = "purging"
)

// A Record is what Berth knows of a volume, stored beside the data and the same
// for all hosts. What concerns one host, such as mounts, is not in it.
type Record struct {
	Schema int `json:"schema"`
	// UUID is this volume's alone and stays when it is renamed; a volume made later
	// under the same name has another one.
	UUID   string `json:"uuid"`
	Name   string `json:"name"`
	Engine string `json:"engine"`
	// EngineReason says in words why it is that engine.
	EngineReason string `json:"engine-reason,omitempty"`
	Phase        Phase  `json:"phase"`
	// Host is who works on the volume, "" while it is ready or broken.
	Host      string    `json:"host,omitempty"`
	CreatedAt time.Time `json:"created"`
	// Adopted data was there before the volume.
	Adopted  bool             `json:"adopted,omitempty"`
	OnRemove options.OnRemove `json:"on-remove"`

	// Size is the limit in bytes, 0 for none. The next three are what the engine was
	// asked for.
	Size   uint64 `json:"size,omitempty"`
	FS     string `json:"fs,omitempty"`
	Sparse bool   `json:"sparse,omitempty"`
	NoCOW  bool   `json:"nocow,omitempty"`
	// UID, GID and Mode of the top directory as they were asked for. With
	// OwnerEnforce they are set again when a container starts.
	UID          *uint32 `json:"uid,omitempty"`
	GID          *uint32 `json:"gid,omitempty"`
	Mode         *uint32 `json:"mode,omitempty"`
	OwnerEnforce bool    `json:"owner-enforce,omitempty"`
	// What containers get is mounted so.
	ReadOnly bool `json:"ro,omitempty"`
	NoSUID   bool `json:"nosuid,omitempty"`
	NoDev    bool `json:"nodev,omitempty"`
	NoExec   bool `json:"noexec,omitempty"`
	// Protect refuses removal and rollback.
	Protect bool `json:"protect,omitempty"`
	// TrashKeep is how long the data stays in the trash, nil for the default.
	TrashKeep *Span `json:"trash-keep,omitempty"`
	// Schedule of snapshots, as schedule.Parse reads it, and Keep, which of them stay,
	// as keep.Parse does.
	Schedule string `json:"schedule,omitempty"`
	Keep     string `json:"keep,omitempty"`
	// BackupSchedule and BackupKeep are the same for backups. BackupTarget is the name
	// of their target on the hosts that have it; "" is the only one there is.
	BackupSchedule string `json:"backup-schedule,omitempty"`
	BackupTarget   string `json:"backup-target,omitempty"`
	BackupKeep     string `json:"backup-keep,omitempty"`
	// Exclusive: only one host at a time may have the volume attached.
	Exclusive bool              `json:"exclusive,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	// Options as they were given to Create.
	Options map[string]string `json:"options,omitempty"`
	// Source is what the data was made from.
	Source *Source `json:"source,omitempty"`

	// Reason says why the volume is broken.
	Reason string `json:"reason,omitempty"`
	// Rollback is set while the volume is rolling back.
	Rollback *Rollback `json:"rollback,omitempty"`
	// RenameTo and RenameFrom are set while it is renamed, in the records of the old
	// and of the new name. RenameTo is also the name for what is taken out of the
	// trash.
	RenameTo   string `json:"rename-to,omitempty"`
	RenameFrom string `json:"rename-from,omitempty"`
	// RemovedAt is set in the trash.
	RemovedAt *time.Time `json:"removed,omitempty"`
}

// A Source is where a volume's data came from: another volume or its snapshot, a
// directory, a backup, an archive, or the trash.
type Source struct {
	Volume   string `json:"volume,omitempty"`
	UUID     string `json:"uuid,omitempty"`
	Snapshot string `json:"snapshot,omitempty"`
	// Seed is a directory in the root, its path without a slash in front.
	Seed string `json:"seed,omitempty"`
	// Adopt is the absolute path of a directory that becomes the data: it is moved,
	// or copied if Copy is set.
	Adopt string `json:"adopt,omitempty"`
	Copy  bool   `json:"copy,omitempty"`
	// Backup is the reference of a backup, as backup.ParseReference reads it, or the URL
	// of one of convoy's, as convoy.ParseURL does.
	Backup string `json:"backup,omitempty"`
	// Found is the one backup that Backup means. It is looked up once, before the first
	// byte is written: what is interrupted goes on with the same one, whatever latest means
	// then.
	Found *FoundBackup `json:"found,omitempty"`
	// Archive: it was imported from an archive that somebody sent, once.
	Archive bool `json:"archive,omitempty"`
	// Paths below the data limit what is restored; none are all.
	Paths []string `json:"paths,omitempty"`
	// Kept is set while a backup is restored in the place of a volume's data: it is the
	// snapshot of what was there before.
	Kept string `json:"kept,omitempty"`
	// Placing is set from the moment on at which single paths that were restored into a
	// volume with data, which Kept has, take their places.
	Placing bool `json:"placing,omitempty"`
	// Trash: it was taken out of the trash.
	Trash bool `json:"trash,omitempty"`
	// Filling is set from the moment that data under the volume's name is what Berth
	// has put there, and goes when it is complete.
	Filling bool `json:"filling,omitempty"`
}

// A FoundBackup is a backup as its repository lists it.
type FoundBackup struct {
	// ID is the full one.
	ID string `json:"id"`
	// UUID is that of the volume that was backed up, Host the name of the host that did it.
	UUID string    `json:"uuid,omitempty"`
	Host string    `json:"host,omitempty"`
	Time time.Time `json:"time"`
	// Files and Bytes of its data; 0 when the repository does not tell.
	Files uint64 `json:"files,omitempty"`
	Bytes uint64 `json:"bytes,omitempty"`
}

// A Rollback is one under way.
type Rollback struct {
	// Snapshot that the volume goes back to.
	Snapshot string `json:"snapshot"`
	// Keep is the snapshot that what was there before becomes.
	Keep string `json:"keep"`
}

// A Span is a duration that is stored in words, as "168h0m0s".
type Span time.Duration

// MarshalText implements encoding.TextMarshaler.
func (s Span) MarshalText() ([]byte, error) { return []byte(time.Duration(s).String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Span) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if err != nil {
		return err
	}
	if d < 0 {
		return fmt.Errorf("duration %s is negative", d)
	}
	*s = Span(d)
	return nil
}

// Visible tells whether users see the volume: not yet while it is being made, and no
// more while it is being removed.
func (r Record) Visible() bool {
	switch r.Phase {
	case Creating, Removing:
		return false
	case Renaming:
		return r.RenameFrom == ""
	case Restoring, Broken, Ready, RollingBack, Purging:
	}
	return true
}

// Unfinished tells whether host has begun something with the volume that it has not
// brought to an end.
func (r Record) Unfinished(host string) bool { return r.Host == host && !r.atRest() }

// atRest tells whether nobody is at work on the volume.
func (r Record) atRest() bool { return r.Phase == Ready || r.Phase == Broken }

// volume is what engines know of a volume.
func (r Record) volume() engine.Volume {
	return engine.Volume{Name: r.Name, UUID: r.UUID, Size: r.Size, FS: r.FS, Sparse: r.Sparse, NoCOW: r.NoCOW}
}

// attributes are those that were asked for.
func (r Record) attributes() engine.Attributes {
	return engine.Attributes{UID: r.UID, GID: r.GID, Mode: r.Mode}
}

// onRemove is what was asked for, or what is due for data that was there before.
func onRemove(name string, spec options.Spec, adopted bool) options.OnRemove {
	switch {
	case spec.OnRemove != nil:
		return *spec.OnRemove
	case adopted:
		return options.Keep
	case Anonymous(name):
		return options.Purge
	}
	return options.Trash
}

// newRecord starts a volume's life; the engine is still to be filled in.
func newRecord(name, host string, spec options.Spec, adopted bool, now time.Time) Record {
	rec := Record{
		Schema:       schema,
		UUID:         uuid.NewString(),
		Name:         name,
		Phase:        Creating,
		Host:         host,
		CreatedAt:    now.UTC().Truncate(time.Second),
		Adopted:      adopted,
		Size:         spec.Size,
		FS:           spec.FS,
		Sparse:       spec.Sparse,
		NoCOW:        spec.NoCOW,
		UID:          spec.UID,
		GID:          spec.GID,
		Mode:         spec.Mode,
		OwnerEnforce: spec.OwnerEnforce,
		ReadOnly:     spec.ReadOnly,
		NoSUID:       spec.NoSUID,
		NoDev:        spec.NoDev,
		NoExec:       spec.NoExec,
		Protect:      spec.Protect,
		Schedule:     spec.Schedule,

		BackupSchedule: spec.BackupSchedule,
		BackupTarget:   spec.BackupTarget,
		BackupKeep:     spec.BackupKeep.String(),

		Keep:      spec.Keep.String(),
		Exclusive: spec.Exclusive,
		Labels:    spec.Labels,
		Options:   spec.Given,
	}
	if spec.TrashKeep != nil {
		keep := Span(*spec.TrashKeep)
		rec.TrashKeep = &keep
	}
	rec.OnRemove = onRemove(name, spec, adopted)
	return rec
}

// Encode gives the form that is stored: JSON, readable by people too. It refuses what
// DecodeRecord would.
func (r Record) Encode() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("record of volume %s: %w", r.Name, err)
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode record of volume %s: %w", r.Name, err)
	}
	if len(data) >= maxRecord {
		return nil, fault.Invalid("the record of volume %s would have %d bytes: at most %d are read; give fewer options, labels or paths", r.Name, len(data), maxRecord)
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
	if rec.Schema == 1 {
		// All that version 1 says means the same in version 2.
		rec.Schema = schema
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
	if r.Source != nil {
		if err := r.Source.check(); err != nil {
			return err
		}
	}
	for _, other := range []string{r.RenameTo, r.RenameFrom} {
		if other != "" {
			if err := CheckName(other); err != nil {
				return err
			}
		}
	}
	return r.checkPhase()
}

func (r Record) checkPhase() error {
	switch r.Phase {
	case Ready, Broken:
		return nil
	case Creating, Removing, Purging:
	case Restoring:
		if r.Source == nil && (r.RenameTo == "" || r.RemovedAt == nil) {
			return errors.New("restoring without a source")
		}
	case RollingBack:
		if r.Rollback == nil {
			return errors.New("rolling-back without a snapshot")
		}
		if err := errors.Join(CheckSnapshotName(r.Rollback.Snapshot), CheckSnapshotName(r.Rollback.Keep)); err != nil {
			return err
		}
	case Renaming:
		if r.RenameTo == "" && r.RenameFrom == "" {
			return errors.New("renaming without another name")
		}
	default:
		return fmt.Errorf("phase %.40q", r.Phase)
	}
	if r.Host == "" {
		return fmt.Errorf("%s without a host", r.Phase)
	}
	return nil
}

// check looks at what becomes the names of files.
func (s Source) check() error {
	if s.Volume != "" {
		if err := CheckName(s.Volume); err != nil {
			return err
		}
	}
	if s.Archive && (s.Backup != "" || s.Kept != "" || s.Volume != "" || s.Seed != "" || s.Adopt != "" || s.Trash) {
		return errors.New("source is an archive and something else")
	}
	if s.Found != nil && (s.Backup == "" || s.Found.ID == "") {
		return errors.New("source has found a backup that it does not name")
	}
	if s.UUID != "" && !isUUID(s.UUID) {
		return fmt.Errorf("source uuid %.40q", s.UUID)
	}
	for _, name := range []string{s.Snapshot, s.Kept} {
		if name != "" {
			if err := CheckSnapshotName(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// isUUID accepts the one form that Berth writes, since it becomes a file name.
func isUUID(s string) bool {
	id, err := uuid.Parse(s)
	return err == nil && id.String() == s
}

// isZero tells whether nothing is said.
func (s Source) isZero() bool { return reflect.DeepEqual(s, Source{}) }
