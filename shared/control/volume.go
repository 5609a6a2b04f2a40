package control

import (
	"context"
	"time"
)

// A VolumeState is how a volume is.
type VolumeState string

// The states of a volume.
const (
	VolumeReady VolumeState = "ready"
	// VolumeCreating: Docker has no answer yet.
	VolumeCreating VolumeState = "creating"
	// VolumeRestoring: its data is being copied; no container gets it before it is
	// whole.
	VolumeRestoring VolumeState = "restoring"
	// VolumeRemoving: its data has not reached the trash yet.
	VolumeRemoving VolumeState = "removing"
	// VolumeBroken: its record or its data cannot be used; Error says why.
	VolumeBroken VolumeState = "broken"
	// VolumeAway: its root does not answer. The rest is what this host saw last.
	VolumeAway VolumeState = "away"
)

// A Volume is one of Berth's.
type Volume struct {
	Name string
	// UUID is the volume's for its whole life, whatever its name is.
	UUID  string
	State VolumeState
	// Error is what is wrong with the volume; "" when nothing is.
	Error string `json:",omitempty"`
	// Progress of what the volume waits for; nil unless it is VolumeRestoring.
	Progress *Progress `json:",omitempty"`
	// Engine keeps the data: "dir", "reflink", "btrfs", "image", "thin".
	Engine string
	// FileSystem is that of the data: of the root, or of the volume itself with an
	// engine that makes one for each.
	FileSystem string `json:",omitempty"`
	// Root is the name of the root; "" is the default one. RootPath is where it is
	// as the daemon sees it.
	Root     string `json:",omitempty"`
	RootPath string `json:",omitempty"`
	Created  time.Time
	// Mountpoint is the path that Docker is given, as the daemon sees it.
	Mountpoint string
	// Mounted says that this host has it mounted.
	Mounted bool
	// Size is the limit that is enforced, in bytes; 0 is none.
	Size uint64 `json:",omitempty"`
	// Used are the bytes of its data as last measured, at UsedAt, which is zero when
	// they never were.
	Used   uint64
	UsedAt time.Time `json:",omitzero"`
	// OnRemove is "trash", "keep" or "purge"; TrashKeep is how long the trash keeps
	// it, in nanoseconds on the wire, 0 the default.
	OnRemove  string
	TrashKeep time.Duration `json:",omitempty"`
	// Protect refuses removal.
	Protect bool `json:",omitempty"`
	// ReadOnly says that containers cannot write, Exclusive that one host at a time
	// has it.
	ReadOnly  bool `json:",omitempty"`
	Exclusive bool `json:",omitempty"`
	// Adopted data was there before the volume.
	Adopted bool `json:",omitempty"`
	// Labels are those of the options label.*, without that beginning.
	Labels map[string]string `json:",omitempty"`
	// Options as they were given at creation.
	Options map[string]string `json:",omitempty"`
	// Source is where its data came from; nil when it began empty.
	Source *VolumeSource `json:",omitempty"`
	// Users are the hosts that have it mounted, this one first.
	Users []VolumeUser `json:",omitempty"`
	// SnapshotCount is how many there are; Snapshots, the oldest first, are only in
	// the answer for a single volume.
	SnapshotCount int
	Snapshots     []Snapshot `json:",omitempty"`
	// Schedule is nil when no snapshots are made by one.
	Schedule *Schedule `json:",omitempty"`
	// Backup is nil for a volume that was never backed up by this host and has no
	// schedule for it.
	Backup *VolumeBackup `json:",omitempty"`
	// Consistency that a snapshot has when nothing is paused for it.
	Consistency Consistency `json:",omitempty"`
	// Instant says that snapshots, clones and rollbacks take the same short time
	// whatever the size.
	Instant bool `json:",omitempty"`
}

// A VolumeSource is where a volume's first data came from.
type VolumeSource struct {
	// Volume and Snapshot of a clone; Snapshot is "" when it is of the volume itself.
	Volume   string `json:",omitempty"`
	Snapshot string `json:",omitempty"`
	// Path of a seed or of what was adopted, as it was given.
	Path string `json:",omitempty"`
	// Backup is the reference of what was restored, or the URL of a backup of convoy's.
	Backup string `json:",omitempty"`
	// Archive says that it was imported from an archive.
	Archive bool `json:",omitempty"`
}

// A VolumeUser is a host that has a volume mounted.
type VolumeUser struct {
	// Host is the name that it gave itself. Here says that it is the daemon's own.
	Host string
	Here bool `json:",omitempty"`
	// Mounts is how many of them containers hold; 0 when not known, of other hosts.
	Mounts int `json:",omitempty"`
	// Seen is when that was last known to be so.
	Seen time.Time `json:",omitzero"`
}

// A Schedule makes snapshots.
type Schedule struct {
	// Spec is "@hourly" or the like, or five fields of cron. Keep is the policy by
	// which old ones are removed, as "24h:7d:4w:12m"; "" keeps all.
	Spec string
	Keep string `json:",omitempty"`
	// Last is when a snapshot was last tried, Next when that is due.
	Last time.Time `json:",omitzero"`
	Next time.Time `json:",omitzero"`
	// LastError is why the last one failed; "" when it did not.
	LastError string `json:",omitempty"`
}

// A VolumeBackup is what this host knows of the backups of a volume.
type VolumeBackup struct {
	// Target that a schedule backs it up to; "" is the only one there is.
	Target string `json:",omitempty"`
	// Schedule and Policy are "" when there are none.
	Schedule string `json:",omitempty"`
	Keep     string `json:",omitempty"`
	// Next is when the schedule is due.
	Next time.Time `json:",omitzero"`
	// Last is when a backup was last tried, by schedule or by hand, and LastError why
	// it failed or what was missing in it; "" when it is good.
	Last      time.Time `json:",omitzero"`
	LastError string    `json:",omitempty"`
	// Good is the reference of the last good one, GoodTime when the volume
	// last had its data, as far as was looked.
	Good     string    `json:",omitempty"`
	GoodTime time.Time `json:",omitzero"`
}

// Consistency says what a snapshot is worth.
type Consistency string

// Consistencies, from the worst to the best.
const (
	// ConsistencyNone: files were copied one after the other while programs may have
	// written.
	ConsistencyNone Consistency = "none"
	// ConsistencyCrash: the state of one moment, as after a power cut.
	ConsistencyCrash Consistency = "crash"
	// ConsistencyFrozen: the state of one moment with all that was written before.
	ConsistencyFrozen Consistency = "frozen"
	// ConsistencyPaused: the containers that use the volume stood still.
	ConsistencyPaused Consistency = "paused"
	// ConsistencyQuiesced: the programs that use the volume were told by their hooks, or
	// stopped.
	ConsistencyQuiesced Consistency = "quiesced"
)

// A SnapshotOrigin is why there is a snapshot.
type SnapshotOrigin string

// The origins of snapshots.
const (
	// SnapshotManual: somebody asked for it.
	SnapshotManual SnapshotOrigin = "manual"
	// SnapshotSchedule: the volume's schedule made it.
	SnapshotSchedule SnapshotOrigin = "schedule"
	// SnapshotRollback: it is what a rollback put aside.
	SnapshotRollback SnapshotOrigin = "rollback"
	// SnapshotRestore: it is what a restore in place put aside.
	SnapshotRestore SnapshotOrigin = "restore"
	// SnapshotClone: a clone is made from it, and it goes when that is whole.
	SnapshotClone SnapshotOrigin = "clone"
	// SnapshotBackup: it is being backed up, and goes when that has ended.
	SnapshotBackup SnapshotOrigin = "backup"
)

// A Snapshot is a volume's data as it once was. VOLUME@NAME is a read-only volume.
type Snapshot struct {
	// Volume is the name that its volume has now; VolumeUUID never changes.
	Volume     string
	VolumeUUID string
	Name       string
	Created    time.Time
	Origin     SnapshotOrigin
	// Consistency that it has, ConsistencyNone included.
	Consistency Consistency
	// Files and Bytes of the tree that were copied or shared; 0 with engines that do
	// not look at single files.
	Files uint64 `json:",omitempty"`
	Bytes uint64 `json:",omitempty"`
	// Unstable counts files that changed while they were read and are in the
	// snapshot in some state of between.
	Unstable uint64 `json:",omitempty"`
	// Used is what its removal would free, in bytes; 0 when not known.
	Used uint64 `json:",omitempty"`
	// Mounted says that a container of this host has it.
	Mounted bool `json:",omitempty"`
	// Error is why it cannot be used; "" when it can.
	Error string `json:",omitempty"`
}

// Progress of a call that takes long.
type Progress struct {
	// Step is what is being done, for people: "copying files", "checking".
	Step string `json:",omitempty"`
	// Done so far. Totals are 0 as long as they are not known.
	Files      uint64 `json:",omitempty"`
	TotalFiles uint64 `json:",omitempty"`
	Bytes      uint64 `json:",omitempty"`
	TotalBytes uint64 `json:",omitempty"`
}

// A CloneRequest asks for a new volume with the data of another one.
type CloneRequest struct {
	// Volume is copied, or its Snapshot unless that is "".
	Volume   string
	Snapshot string `json:",omitempty"`
	// Name of the new volume, which must be free.
	Name string
	// Options of the new one, as `docker volume create -o` takes them, without from
	// and seed.
	Options map[string]string `json:",omitempty"`
}

// A RollbackRequest asks for a snapshot's data in the place of the volume's.
type RollbackRequest struct {
	Volume, Snapshot string
	// Force does it while containers have the volume. They go on with the data that
	// is put aside until they are started again.
	Force bool `json:",omitempty"`
}

// A Rollback is what a RollbackRequest came to.
type Rollback struct {
	Volume Volume
	// Kept is the snapshot that has the data of before.
	Kept Snapshot
}

// A RenameRequest asks for another name.
type RenameRequest struct {
	Volume, Name string
}

// A ResizeRequest asks for another limit.
type ResizeRequest struct {
	Volume string
	// Size in bytes; 0 is none, where the engine can do without.
	Size uint64
}

// An AdoptRequest asks for a volume of a directory that exists.
type AdoptRequest struct {
	Name string
	// Source is a directory: a path below the root, or an absolute path as the
	// daemon sees it, which must be below the root unless Copy is set. In a managed
	// plugin only its mounts are to be seen.
	Source string
	// Copy leaves the source as it is. Otherwise it becomes the data, and is moved
	// when it is not called like the volume.
	Copy bool `json:",omitempty"`
	// Options of the volume, as `docker volume create -o` takes them.
	Options map[string]string `json:",omitempty"`
}

// An UpdateRequest changes properties of a volume that can change.
type UpdateRequest struct {
	Volume string
	// Set has values by the names of options: "snapshot.schedule", "snapshot.keep",
	// "backup.schedule", "backup.target", "backup.keep", "protect", "on-remove",
	// "trash.keep", "label.NAME". "" takes back what was set.
	Set map[string]string
}

// A UsageRequest asks how much space volumes take.
type UsageRequest struct {
	// Volumes by name; none are all.
	Volumes []string `json:",omitempty"`
}

// A UsageReport says how much space there is and who has it.
type UsageReport struct {
	Volumes []VolumeUsage
	// Roots that the volumes are on, the default one first.
	Roots []RootUsage
}

// VolumeUsage is the space that a volume takes, in bytes.
type VolumeUsage struct {
	Name, Engine string
	Root         string `json:",omitempty"`
	// Error is why it could not be measured; the numbers are 0 then.
	Error string `json:",omitempty"`
	// Used by the data, in Files inodes.
	Used, Files uint64
	// Exclusive is what the removal of the volume and its snapshots would free; 0
	// when not known.
	Exclusive uint64 `json:",omitempty"`
	// Limit that is enforced, 0 for none; Free is what can still be written.
	Limit uint64 `json:",omitempty"`
	Free  uint64
	// Snapshots is how many there are, SnapshotsUsed what they take beside the data;
	// 0 when not known.
	Snapshots     int
	SnapshotsUsed uint64 `json:",omitempty"`
}

// RootUsage is the space on a root, in bytes.
type RootUsage struct {
	// Name is "" for the default root. Path is as the daemon sees it.
	Name       string `json:",omitempty"`
	Path       string
	FileSystem string
	// Error is why it does not answer; the numbers are 0 then.
	Error string `json:",omitempty"`
	// Size of the file system, what is Used of it by whomever, and what is Free for
	// volumes.
	Size, Used, Free uint64
	// Volumes is how many there are. Trash is how many removed ones wait for their
	// end, TrashUsed the space that they take; 0 when not known.
	Volumes, Trash int
	TrashUsed      uint64 `json:",omitempty"`
}

// A SnapshotRequest asks for a snapshot.
type SnapshotRequest struct {
	Volume string
	// Name is "" for one made of the time, in UTC.
	Name string `json:",omitempty"`
	// Paused says that the caller sees to it that every container that uses the
	// volume stands still until the answer. The caller removes a snapshot that this
	// did not hold for.
	Paused bool `json:",omitempty"`
	// ForBackup says that the caller has the snapshot backed up within five minutes, and
	// removes it then. Otherwise the daemon does, unless it is being backed up.
	ForBackup bool `json:",omitempty"`
}

// A SnapshotRef names a snapshot.
type SnapshotRef struct {
	Volume, Name string
}

// A PruneSnapshotsRequest asks for the removal of old snapshots.
type PruneSnapshotsRequest struct {
	// Volume limits it to one; "" is all.
	Volume string `json:",omitempty"`
	// Keep is the policy, as "24h:7d:4w:12m"; "" is each volume's own, and volumes
	// without one keep all.
	Keep string `json:",omitempty"`
	// All looks at every snapshot; otherwise only at those that a schedule made.
	All bool `json:",omitempty"`
	// DryRun removes nothing.
	DryRun bool `json:",omitempty"`
}

// A PruneSnapshotsReport lists the snapshots that were removed, or would be. Failed
// are those that could not be, as VOLUME@NAME, with the reason.
type PruneSnapshotsReport struct {
	Removed []Snapshot
	Failed  map[string]string `json:",omitempty"`
}

// A TrashEntry is a removed volume whose data is still there.
type TrashEntry struct {
	// UUID is the volume's, and the entry's ID. Name is what it was called.
	UUID, Name string
	Engine     string
	Root       string `json:",omitempty"`
	Removed    time.Time
	// Expires is when it is deleted; it may be earlier when space runs out.
	Expires time.Time
	// Used are the bytes of its data as last measured; 0 when not known.
	Used      uint64 `json:",omitempty"`
	Snapshots int
	// Deleting says that this has begun: it cannot be restored.
	Deleting bool `json:",omitempty"`
	// Error is why it could not be deleted or cannot be restored.
	Error string `json:",omitempty"`
}

// A RestoreTrashRequest asks for a removed volume back.
type RestoreTrashRequest struct {
	UUID string
	// Name of the volume; "" is the one that it had.
	Name string `json:",omitempty"`
}

// A PurgeTrashRequest asks for the end of removed volumes.
type PurgeTrashRequest struct {
	// UUIDs of entries. All is the whole trash, and UUIDs is empty then.
	UUIDs []string `json:",omitempty"`
	All   bool     `json:",omitempty"`
}

// A PurgeTrashReport lists the entries that are gone. Failed are the UUIDs of those
// that could not be deleted, with the reason.
type PurgeTrashReport struct {
	Purged []TrashEntry
	Failed map[string]string `json:",omitempty"`
}

// VolumeAdmin is what the volume service does for an operator. All methods may be
// called concurrently. Volumes are named by their whole names, and the service
// checks these: an unknown one is not found, what is no name is invalid.
//
// Methods with a progress take as long as they take, and call it, never nil, from one
// goroutine at a time, as often as they like; it does not block. When ctx ends
// they stop, undo what they began, and return its error; what cannot be undone is
// completed. The deadline of the others is a minute.
//
// There is no removal of volumes: the client asks Docker for that, who knows best
// whether a container uses one and has to know that it is gone.
type VolumeAdmin interface {
	BackupAdmin
	// Volumes lists all, by name, without asking a root that does not answer.
	Volumes(context.Context) ([]Volume, error)
	// Volume tells all of one, with its snapshots.
	Volume(ctx context.Context, name string) (Volume, error)
	// CloneVolume returns when the new volume is whole. It is a conflict when the
	// name is taken.
	CloneVolume(context.Context, CloneRequest, func(Progress)) (Volume, error)
	// RollbackVolume keeps the data of before as a snapshot. It is a conflict while
	// the volume is mounted, here unless forced, or on another host.
	RollbackVolume(context.Context, RollbackRequest, func(Progress)) (Rollback, error)
	// RenameVolume is a conflict while the volume is mounted anywhere, and when the
	// name is taken. The caller has seen to it that no container, stopped or not,
	// uses the old name: Docker would give it a new, empty volume.
	RenameVolume(context.Context, RenameRequest) (Volume, error)
	// ResizeVolume is a conflict when more is used than the limit, with an engine
	// that cannot hold that.
	ResizeVolume(context.Context, ResizeRequest, func(Progress)) (Volume, error)
	// VolumeUsage measures. A volume that cannot be measured is in the report with
	// its Error.
	VolumeUsage(context.Context, UsageRequest, func(Progress)) (UsageReport, error)
	// AdoptVolume is a conflict when the name is taken or the directory is a volume's
	// already, and invalid, in words, when the daemon does not see the directory.
	AdoptVolume(context.Context, AdoptRequest, func(Progress)) (Volume, error)
	// UpdateVolume changes all properties that are named or none.
	UpdateVolume(context.Context, UpdateRequest) (Volume, error)

	// CreateSnapshot is a conflict when the name is taken.
	CreateSnapshot(context.Context, SnapshotRequest, func(Progress)) (Snapshot, error)
	// Snapshots lists those of a volume, or of all if that is "", by volume, the
	// oldest first.
	Snapshots(ctx context.Context, volume string) ([]Snapshot, error)
	// RemoveSnapshot is a conflict while it is mounted.
	RemoveSnapshot(context.Context, SnapshotRef, func(Progress)) error
	PruneSnapshots(context.Context, PruneSnapshotsRequest, func(Progress)) (PruneSnapshotsReport, error)

	// Trash lists removed volumes, the oldest removal first.
	Trash(context.Context) ([]TrashEntry, error)
	// RestoreTrash brings a volume back with its snapshots. It is a conflict when the
	// name is taken.
	RestoreTrash(context.Context, RestoreTrashRequest) (Volume, error)
	PurgeTrash(context.Context, PurgeTrashRequest, func(Progress)) (PurgeTrashReport, error)

	// Findings says what of the volumes is not in order.
	Findings(context.Context) []Finding
}
