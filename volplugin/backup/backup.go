package backup

import (
	"context"
	"errors"
	"time"
)

// Errors that engines tell apart. They are wrapped, with words for users.
var (
	// ErrNoRepository: there is none where the target points to, but its place answers.
	ErrNoRepository = errors.New("there is no repository")
	// ErrPassword: the repository is there and the password does not open it.
	ErrPassword = errors.New("the password does not open the repository")
	// ErrLocked: another program holds the repository. The same call may succeed later.
	ErrLocked = errors.New("the repository is locked")
	// ErrNoBackup: the repository was read and has no backup of that ID.
	ErrNoBackup = errors.New("there is no such backup")
)

// Names at the top of what is backed up.
const (
	// DataName is the top directory of the volume.
	DataName = "data"
	// ManifestName is the file that holds the Manifest.
	ManifestName = "manifest.json"
)

// An Engine keeps backups in one repository. All methods may be called concurrently,
// also by other hosts on the same repository. They end when ctx does, and a process that
// is killed in one of them leaves a repository that needs nobody's care: a later call
// works, and sees complete backups only.
//
// Errors wrap one of the errors above where it fits. An error that wraps none of them is
// most likely of the network or of the storage, and the call may succeed later.
type Engine interface {
	// Init makes the repository. One that is there already, and opens, is no error.
	Init(ctx context.Context) error
	// Backup stores the two entries of source.Dir. The progress is told by one
	// goroutine at a time.
	Backup(ctx context.Context, source Source, progress func(Progress)) (Result, error)
	// List returns the backups that the filter lets through, the oldest first. What in
	// the repository was not made by Berth is not listed.
	List(ctx context.Context, filter Filter) ([]Backup, error)
	// Restore writes a backup's two entries, as List has told of it, into dir, an existing directory that nobody
	// else knows. The entry data may be there: an empty directory, or the place where an
	// empty file system is mounted; it gets the owner, mode and times of the backup.
	// Nothing outside of dir is written, whatever the repository holds. paths, if any,
	// are slash-separated paths below data, and limit what is restored to these and what
	// is below them. A backup of which only the ID is given is looked up first.
	Restore(ctx context.Context, b Backup, dir string, paths []string, progress func(Progress)) (Restored, error)
	// Manifest reads the manifest of a backup.
	Manifest(ctx context.Context, id string) (Manifest, error)
	// Forget removes backups. Unknown ones are no error. Space becomes free by Prune.
	Forget(ctx context.Context, ids []string) error
	// Prune frees the space of what was forgotten.
	Prune(ctx context.Context, progress func(Progress)) error
	// Check finds damage in the repository. depth of 0 looks at its structure; a number
	// up to 1 is the share of the data that is read as well, chosen by chance. Damage is
	// no error but in the report.
	Check(ctx context.Context, depth float64, progress func(Progress)) (Report, error)
}

// A Source is what is backed up.
type Source struct {
	// Dir is the absolute path of a directory with the two entries, which nobody
	// changes meanwhile. It is best the same for all backups of one volume.
	Dir string
	// Volume and UUID are those of the volume, Host is the name of the host.
	Volume, UUID, Host string
	// Time of the data, that of the snapshot.
	Time time.Time
	// Parent is the ID of a backup of the same volume that is likely to be similar, ""
	// for none. One that is gone is no error.
	Parent string
	// Copied says that the inodes and change times of files are not those of the
	// volume, because its snapshot is a copy: they cannot tell whether a file has
	// changed since the parent.
	Copied bool
	// Reread says that all files are to be read even if they look unchanged.
	Reread bool
	// Tags are words that the backup is marked with, beside Berth's own.
	Tags []string
}

// A Result is what Backup has stored.
type Result struct {
	// ID that the repository lists it under: it was seen there.
	ID string
	// Files and Dirs are how many regular files and directories of data are in the
	// backup; Bytes is the size of the files.
	Files, Dirs uint64
	Bytes       uint64
	// Added are the bytes that the repository has grown by, after compression.
	Added uint64
	// Missing names files that could not be read, with the reasons. The backup is
	// incomplete when there are any; the list may be cut, MissingCount is not.
	Missing      []string
	MissingCount uint64
}

// Complete says whether all was stored.
func (r Result) Complete() bool { return r.MissingCount == 0 }

// Restored is what Restore has written.
type Restored struct {
	Files uint64
	Bytes uint64
}

// Progress of a call. Totals are 0 as long as they are not known.
type Progress struct {
	// Step is what is done, for people: "reading", "uploading".
	Step              string
	Files, TotalFiles uint64
	Bytes, TotalBytes uint64
}

// A Filter limits a list. Empty fields let all through.
type Filter struct {
	// Volume is a name, UUID a volume's UUID, ID the beginning of an ID.
	Volume, UUID, ID string
}

// A Backup is one in a repository.
type Backup struct {
	// ID is unique in the repository; its first 8 characters nearly always are.
	ID string
	// Volume, UUID, Host, Time and Tags are the Source's.
	Volume, UUID, Host string
	Time               time.Time
	Tags               []string
	// Files, Bytes and Added are the Result's; 0 when the repository does not tell.
	Files, Bytes, Added uint64
	// Incomplete says that files are missing.
	Incomplete bool
}

// A Report is what Check has found.
type Report struct {
	// Errors are in the words of the engine; none is good.
	Errors []string
	// Hint says what to do, "" for nothing.
	Hint string
}
