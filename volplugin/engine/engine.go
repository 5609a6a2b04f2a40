// Package engine says what keeps the data of volumes: directories, subvolumes,
// image files, thin devices. Names have been validated before they come here;
// records, locks, counts of users and the mounts that containers get are not an
// engine's business.
package engine

import (
	"context"
	"errors"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// A Place is a root as engines see it: its open directories, valid during a call.
// All of them but Local are on the root's file system.
type Place struct {
	// Root holds the data of engines whose volumes are directories, by name.
	Root *rooted.Dir
	// Images holds one file for each volume of engine image, NAME.img.
	Images *rooted.Dir
	// Snapshots has a directory for each volume that has any, by the volume's UUID.
	// In it are an engine's snapshots, by their names, and beside each its record,
	// NAME.json, which is not the engine's.
	Snapshots *rooted.Dir
	// Trash holds the data of removed volumes, by UUID, and records, UUID.json.
	Trash *rooted.Dir
	// Tmp is for what is on its way. What is left in it is deleted after a day.
	Tmp *rooted.Dir
	// Local is the absolute path of a directory of this host, not on the root, in
	// which the engine may mount what is in image files and on devices. A later
	// process may find it empty while the file systems are still in use: then
	// their devices are to be found, and mounted again.
	Local string
	// Step, unless nil, is called before each change of what is on disk, with a word
	// for it; an error ends the call there. Tests fail and kill calls in it.
	Step func(step string) error
}

// Before is what an engine calls before each change. It errs when ctx has ended.
func (p Place) Before(ctx context.Context, step string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if p.Step == nil {
		return nil
	}
	return p.Step(step)
}

// A Volume is what an engine has to know of one.
type Volume struct {
	// Name of its data in the place.
	Name string
	// UUID is the volume's for its whole life, whatever its name is.
	UUID string
	// Size is the limit in bytes; 0 is none.
	Size uint64
	// FS is the file system in an image or on a device: "btrfs", "xfs" or "ext4";
	// "" lets the engine choose at Create.
	FS string
	// Sparse says that an image takes space only as it fills, with the risk that the
	// root has none left then.
	Sparse bool
	// NoCOW asks btrfs to overwrite data in place, for databases.
	NoCOW bool
}

// Attributes of the top directory of new data. A nil field was not asked for:
// new data belongs to root with mode 0755 then, and existing data keeps what it
// has.
type Attributes struct {
	UID, GID, Mode *uint32
}

// defaultMode of new data; dockerd replaces it when it copies an image's content.
const defaultMode = 0o755

// Set gives data its owner and mode and puts them on disk. created is true for new data.
func (a Attributes) Set(data *rooted.Dir, created bool) (err error) {
	if a.UID != nil || a.GID != nil {
		if err := data.SetOwner(chownID(a.UID), chownID(a.GID)); err != nil {
			return err
		}
	}
	// After the owner: changing that clears set-ID bits.
	if a.Mode != nil {
		err = data.SetMode(*a.Mode)
	} else if created {
		err = data.SetMode(defaultMode)
	}
	return errors.Join(err, data.Sync())
}

// chownID is chown's form of an ID.
func chownID(given *uint32) int {
	if given == nil {
		return -1
	}
	return int(*given)
}

// Abilities are what an engine can do in one place.
type Abilities struct {
	// FileSystem of the root, for messages and Status: "ext4", "nfs4".
	FileSystem string
	// Limit: a volume's size is enforced.
	Limit bool
	// Instant: snapshots, clones and rollbacks take the same short time whatever
	// the volume's size.
	Instant bool
	// Consistency of a snapshot that nobody paused anything for.
	Consistency Consistency
	// Exclusive: only one host at a time may have a volume attached.
	Exclusive bool
}

// Consistency says what a snapshot is worth.
type Consistency string

// Consistencies, from the worst to the best.
const (
	// None: files were copied one after the other while programs may have written.
	None Consistency = "none"
	// Crash: the state of one moment, as after a power cut.
	Crash Consistency = "crash"
	// Frozen: the state of one moment, all that was written before is in it.
	Frozen Consistency = "frozen"
	// Paused: the containers that use the volume stood still. Recorded by the
	// caller, who paused them.
	Paused Consistency = "paused"
	// Quiesced: the programs that use the volume were told by their hooks, or stopped.
	// Recorded by the caller too.
	Quiesced Consistency = "quiesced"
)

// A Copy tells how a snapshot, a clone or a copy went.
type Copy struct {
	Consistency Consistency
	// Files and Bytes of the tree that were copied or shared, 0 for engines that do
	// not look at single files.
	Files, Bytes uint64
	// Unstable counts files that changed while they were read, over and over, and
	// are in the copy in some state of between.
	Unstable uint64
}

// Progress of what takes long. Totals are 0 as long as they are not known.
type Progress struct {
	Files, TotalFiles, Bytes, TotalBytes uint64
}

// Usage of a volume in bytes and inodes.
type Usage struct {
	// Used by the data. Exclusive is what the volume's removal, snapshots and all,
	// would free, 0 when not known.
	Used, Exclusive uint64
	// Limit that is enforced, 0 for none; Free is what can still be written.
	Limit, Free uint64
	Files       uint64
}

// An Engine keeps the data of volumes. Its methods are called concurrently, but,
// on one host, never two at a time for one volume, with the exception of Open and
// Usage. Other hosts may work on the same root. They may block as long as the file
// system does.
//
// An engine refuses data that is reached through a symbolic link or that is a
// mount point, with an error that wraps one of rooted's, and follows no link inside
// the data either: trees are written by containers and hostile. Whoever is killed
// in the middle of a call leaves what the same call, made again, completes or what
// Abandon, RemoveSnapshot or Destroy removes. After an error the data is as before
// the call, and no half-made copy is left under its final name. ctx ends what takes
// long. progress may be nil.
//
// All methods but Probe, Find, Create, Clone, Retire, Reinstate, Destroy, Rename
// and Abandon ask for a volume that is attached.
type Engine interface {
	// Name is stored in records and shown in Status.
	Name() string
	// Probe tells whether the engine works in the place, and what it can do there.
	// The error says in words for users why it does not: "ext4 has no subvolumes".
	Probe(ctx context.Context, p Place) (Abilities, error)

	// Find tells whether there is data for name. It errs when what is there
	// cannot be a volume's data.
	Find(p Place, name string) (bool, error)
	// Create makes empty data, or takes over what is there without changing it
	// but for attributes that were asked for. created is false for the latter.
	// New data has no entry at all, or dockerd would not copy the image's content
	// into it. It is on disk when Create returns, with its limit set.
	Create(ctx context.Context, p Place, v Volume, attr Attributes) (created bool, err error)
	// Abandon removes data that Create made and nobody wrote to, or a Clone that did
	// not end. Data that is missing or, after Create, not empty is left alone without
	// an error.
	Abandon(p Place, v Volume) error

	// Attach makes the data reachable on this host: it mounts an image, or does
	// nothing. Attached already is no error.
	Attach(ctx context.Context, p Place, v Volume) error
	// Detach is the inverse, when no container has the data any more; a conflict when
	// it is busy. Not attached is no error.
	Detach(ctx context.Context, p Place, v Volume) error
	// Open gives the directory that containers see. The error wraps
	// fs.ErrNotExist when there is no data; Open never makes any. The handle
	// need not be readable.
	Open(p Place, v Volume) (*rooted.Dir, error)

	// Retire moves the data to entry v.UUID of the trash, in one step that cannot
	// happen by half. Missing data is no error, so that a retirement can be
	// repeated, and an entry that is taken is never replaced. Containers that
	// have the data mounted go on with it. Snapshots stay where they are.
	Retire(ctx context.Context, p Place, v Volume) error
	// Reinstate moves entry v.UUID of the trash back to v.Name, which must be free:
	// the error wraps fs.ErrExist. Data that is back already is no error.
	Reinstate(ctx context.Context, p Place, v Volume) error
	// Destroy deletes an entry of the trash and all snapshots of the volume, but not
	// their records. Missing is no error. It stops when ctx ends and goes on at the
	// next call.
	Destroy(ctx context.Context, p Place, v Volume) error
	// Rename moves the data to another name, which must be free.
	Rename(ctx context.Context, p Place, v Volume, to string) error

	// Resize sets the limit, 0 for none where the engine can do without. A limit
	// below what is used is refused, as a conflict, by engines that cannot hold it.
	Resize(ctx context.Context, p Place, v Volume, size uint64) error
	// Usage may have to walk the tree; ctx bounds it.
	Usage(ctx context.Context, p Place, v Volume) (Usage, error)

	// Snapshot makes the read-only snapshot snap of the volume's data. The error
	// wraps fs.ErrExist when there is one.
	Snapshot(ctx context.Context, p Place, v Volume, snap string, progress func(Progress)) (Copy, error)
	// OpenSnapshot gives the top directory of a snapshot, to be read or to be mounted
	// read-only; CloseSnapshot undoes what had to be mounted for that, when nobody
	// uses it any more.
	OpenSnapshot(ctx context.Context, p Place, v Volume, snap string) (*rooted.Dir, error)
	CloseSnapshot(ctx context.Context, p Place, v Volume, snap string) error
	// RemoveSnapshot deletes a snapshot; missing is no error.
	RemoveSnapshot(ctx context.Context, p Place, v Volume, snap string) error
	// Clone makes the data of v, which has none, from that of another volume of this
	// engine in this place, or from its snapshot snap unless that is "".
	Clone(ctx context.Context, p Place, from Volume, snap string, v Volume, progress func(Progress)) (Copy, error)
	// Rollback puts a writable copy of snapshot snap in the place of the data, and
	// what was there becomes snapshot keep. The volume is in nobody's use. Called again
	// after it was interrupted, with the same names, it completes; when it was
	// complete it does nothing.
	Rollback(ctx context.Context, p Place, v Volume, snap, keep string, progress func(Progress)) (Copy, error)
}

// A Cutter is an Engine that can take an attached volume away from whoever has it. The
// others can only ask.
type Cutter interface {
	Engine
	// Cut makes all writes to the data fail from now on, with EIO or EROFS, and writes
	// nothing of what is not on disk yet: another host may have the data already. The
	// volume stays attached, and useless, until Detach, and Attach after that makes it
	// good; Attach before that does so when nobody uses it, and is a conflict
	// otherwise. Not attached is no error, and neither is cut already. It may be called
	// beside any other call for the volume, which then fails.
	Cut(ctx context.Context, p Place, v Volume) error
}

// A Mark says in the words of an engine which state of a volume's data a snapshot has. It
// can be kept when the snapshot is gone.
type Mark string

// A Comparer is an Engine that can tell without reading files whether a volume has changed
// between two snapshots.
type Comparer interface {
	Engine
	// Mark describes a snapshot; "" when it is none that could be compared with a later
	// one.
	Mark(ctx context.Context, p Place, v Volume, snap string) (Mark, error)
	// Unchanged tells whether a snapshot has in every byte and attribute that a backup
	// holds what the snapshot had that since is the Mark of. In doubt it is false; it may
	// be false for what is the same, as when only an access time has changed.
	Unchanged(ctx context.Context, p Place, v Volume, snap string, since Mark) (bool, error)
}

// A Pooled Engine keeps the volumes of a place in one pool, which has a size of its own.
type Pooled interface {
	Engine
	// Pool tells how full it is; the zero value as long as there is none.
	Pool(ctx context.Context, p Place) (Pool, error)
}

// A Pool as it was at one moment, in bytes.
type Pool struct {
	DataUsed, DataTotal         uint64
	MetadataUsed, MetadataTotal uint64
	// Problem says in words what is wrong, "" when nothing is.
	Problem string
}
