package volume

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/presence"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Names in a root.
const (
	metaName    = ".berth"
	markerName  = "root.json"
	volumesName = "volumes"
	trashName   = "trash"
	tmpName     = "tmp"
	imagesName  = "images"
	snapsName   = "snapshots"
	suffix      = ".json"
	// AcceptName is the file by which an operator says that a root which looks
	// like the wrong one is meant.
	AcceptName = ".berth-accept"
)

// markerSchema is the version of the marker.
const markerSchema = 1

// ErrFresh says that the root carries no marker and none is due: it has no
// volumes yet, and Init makes it a root.
var ErrFresh = errors.New("volume root is not initialised")

// A Location is where a root is and how this host works on it.
type Location struct {
	// Path of the root, absolute.
	Path string
	// Engines that keep data here, by their names.
	Engines Engines
	// Local is engine.Place's.
	Local string
	// Host is this host's name in records, the same over restarts and of no
	// other host on the root.
	Host string
	Now  func() time.Time
	// Step, unless nil, is called before each change with the change's name and
	// the volume's; an error stops the operation there. Tests kill and block in it.
	Step func(step, volume string) error
	// Hold attaches a volume to this host for as long as an operation needs it and
	// tells how to let it go again. nil attaches and detaches by the engine alone,
	// which is right where nobody else on this host has the volume attached.
	Hold func(ctx context.Context, rec Record) (release func() error, err error)
	// BackedUp tells whether a snapshot of this host that was made ForBackup is being
	// backed up now; nil says that none is.
	BackedUp func(Snapshot) bool
	// FindBackup looks up the one backup that the Source of rec means, before its data is
	// begun; nil when its name cannot come to mean another one. The error is as Restore's.
	FindBackup func(ctx context.Context, rec Record) (*backup.Backup, error)
	// Restore writes the backup, or the archive, that rec is made from into dst, an empty
	// directory that nobody else knows, with its owner and mode. The error is unavailable when it may
	// succeed later, and ErrGone when it never will. nil restores none.
	Restore func(ctx context.Context, rec Record, dst *rooted.Dir, progress func(engine.Progress)) error
	// Forget, unless nil, deletes the leases that hosts keep of a volume outside of its
	// record, when its data has been deleted for good. It is called again if it fails.
	Forget func(ctx context.Context, root *Root, uuid string) error
}

// A Root is an open root whose marker was found to be the expected one. It must
// be closed; it is meant for one operation.
type Root struct {
	Location
	// ID is the marker's UUID.
	ID string
	// Accepted is set when the marker is not the expected one but the operator
	// has accepted it. The caller stores ID and then calls DropAccept.
	Accepted bool

	top, meta, volumes, trash, tmp *rooted.Dir

	mu sync.Mutex // guards the following
	// images and snapshots are opened when they are first needed. Roots of earlier
	// versions have none.
	images, snapshots *rooted.Dir
}

// marker is the content of root.json.
type marker struct {
	Schema    int       `json:"schema"`
	UUID      string    `json:"uuid"`
	CreatedAt time.Time `json:"created"`
}

// Open opens the root. known is the ID this host saw there before, "" for none.
//
// The error is ErrFresh for a root that was never used, and unavailable in all
// other cases: the path does not exist, or the marker is missing, another one,
// damaged or newer. A root that has lost its marker is most likely the empty
// directory below a file system that is not mounted, so it is never initialised
// anew.
func (l Location) Open(known string) (*Root, error) {
	top, err := rooted.Open(l.Path)
	if err != nil {
		return nil, fault.Unavailable("volume root %s is away: %w", l.Path, reason(err))
	}
	r := &Root{Location: l, top: top}
	if err := r.open(known); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Root) open(known string) error {
	accept := false
	if _, err := r.top.Stat(AcceptName); err == nil {
		accept = true
	}
	mark, err := r.readMarker()
	if errors.Is(err, fs.ErrNotExist) {
		if known == "" || accept {
			return ErrFresh
		}
		return fault.Unavailable("volume root %s has lost its marker %s/%s: is its file system mounted? (a new, empty root is accepted after `touch %s/%s`)", r.Path, metaName, markerName, r.Path, AcceptName)
	}
	if err != nil {
		return fault.Unavailable("volume root %s: %w", r.Path, err)
	}
	if known != "" && mark.UUID != known {
		if !accept {
			return fault.Unavailable("volume root %s is not the one this host used before (its marker says %s, expected %s): is the right file system mounted? (it is accepted after `touch %s/%s`)", r.Path, mark.UUID, known, r.Path, AcceptName)
		}
		r.Accepted = true
	}
	r.ID = mark.UUID
	for name, dir := range map[string]**rooted.Dir{volumesName: &r.volumes, trashName: &r.trash, tmpName: &r.tmp} {
		if *dir, err = r.meta.Dir(name); err != nil {
			return fault.Unavailable("volume root %s: %w", r.Path, err)
		}
	}
	return nil
}

// readMarker opens the meta directory and reads root.json in it. The error wraps
// fs.ErrNotExist when either is missing.
func (r *Root) readMarker() (marker, error) {
	var err error
	if r.meta, err = r.top.Dir(metaName); err != nil {
		return marker{}, err
	}
	data, err := r.meta.ReadFile(markerName, maxRecord)
	if err != nil {
		return marker{}, err
	}
	var mark marker
	if err := json.Unmarshal(data, &mark); err != nil {
		return marker{}, fmt.Errorf("%s/%s is damaged: %w", metaName, markerName, err)
	}
	if mark.Schema > markerSchema {
		return marker{}, fmt.Errorf("%s/%s has schema %d and this Berth knows up to %d; upgrade Berth", metaName, markerName, mark.Schema, markerSchema)
	}
	if mark.Schema != markerSchema || !isUUID(mark.UUID) {
		return marker{}, fmt.Errorf("%s/%s is damaged", metaName, markerName)
	}
	return mark, nil
}

// Init makes the directory a root, or opens it when another host was faster.
// known is as in Open; it is called after Open said ErrFresh.
func (l Location) Init(ctx context.Context, known string) (*Root, error) {
	top, err := rooted.Open(l.Path)
	if err != nil {
		return nil, fault.Unavailable("volume root %s is away: %w", l.Path, reason(err))
	}
	defer top.Close()
	if err := l.init(ctx, top); err != nil {
		return nil, failed(fmt.Errorf("initialise volume root %s: %w", l.Path, err))
	}
	return l.Open(known)
}

func (l Location) init(ctx context.Context, top *rooted.Dir) error {
	r := &Root{Location: l, top: top}
	if err := r.step(ctx, "init.meta", ""); err != nil {
		return err
	}
	if err := top.EnsureDir(metaName, 0o700); err != nil {
		return err
	}
	meta, err := top.Dir(metaName)
	if err != nil {
		return err
	}
	defer meta.Close()
	for _, name := range []string{volumesName, trashName, tmpName, imagesName, snapsName} {
		if err := meta.EnsureDir(name, 0o700); err != nil {
			return err
		}
	}
	data, err := json.Marshal(marker{Schema: markerSchema, UUID: uuid.NewString(), CreatedAt: l.Now().UTC().Truncate(time.Second)})
	if err != nil {
		return err
	}
	if r.tmp, err = meta.Dir(tmpName); err != nil {
		return err
	}
	defer r.tmp.Close()
	// Last: a marker says that the rest is there.
	if err := r.step(ctx, "init.marker", ""); err != nil {
		return err
	}
	if err := r.makeFile(ctx, meta, markerName, append(data, '\n')); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return errors.Join(meta.Sync(), top.Sync())
}

// DropAccept removes the operator's file after the root's ID was stored.
func (r *Root) DropAccept() error {
	if err := r.top.Remove(AcceptName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Close releases the handles.
func (r *Root) Close() error {
	var errs []error
	for _, dir := range []*rooted.Dir{r.top, r.meta, r.volumes, r.trash, r.tmp, r.images, r.snapshots} {
		if dir != nil {
			errs = append(errs, dir.Close())
		}
	}
	return errors.Join(errs...)
}

// place gives the root as engines see it.
func (r *Root) place() (engine.Place, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, dir := range map[string]**rooted.Dir{imagesName: &r.images, snapsName: &r.snapshots} {
		if *dir != nil {
			continue
		}
		var err error
		if *dir, err = r.metaDir(name); err != nil {
			return engine.Place{}, failed(fmt.Errorf("volume root %s: %w", r.Path, err))
		}
	}
	p := engine.Place{Root: r.top, Images: r.images, Snapshots: r.snapshots, Trash: r.trash, Tmp: r.tmp, Local: r.Local}
	if r.Step != nil {
		p.Step = func(step string) error { return r.Step("engine."+step, "") }
	}
	return p, nil
}

// Meta opens the directory of Berth's own for what is not about volumes. The caller
// closes it.
func (r *Root) Meta() (*rooted.Dir, error) { return r.top.Dir(metaName) }

// Shared tells whether other hosts may reach the root; see presence.Shared.
func (r *Root) Shared() (bool, error) { return presence.Shared(r.top) }

// metaDir opens a directory of Berth's own, and makes it where it is missing.
func (r *Root) metaDir(name string) (*rooted.Dir, error) {
	dir, err := r.meta.Dir(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	if err := errors.Join(r.meta.EnsureDir(name, 0o700), r.meta.Sync()); err != nil {
		return nil, err
	}
	return r.meta.Dir(name)
}

// step is called before each change.
func (r *Root) step(ctx context.Context, name, volume string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if r.Step == nil {
		return nil
	}
	return r.Step(name, volume)
}

// thisProcess tells this process from earlier ones of the host in the names of files in tmp.
var thisProcess = uuid.NewString()[:8]

// tempPrefix begins the names of the files in tmp that a host writes. Its ID may have any
// characters.
func tempPrefix(host string) string {
	sum := sha256.Sum256([]byte(host))
	return "file." + hex.EncodeToString(sum[:8]) + "."
}

func (r *Root) tempName() string { return tempPrefix(r.Host) + thisProcess + "." + uuid.NewString() }

// orphaned tells whether a file in tmp was written by a process of this host that is gone:
// a host has one daemon at a time.
func (r *Root) orphaned(name string) bool {
	rest, ours := strings.CutPrefix(name, tempPrefix(r.Host))
	return ours && !strings.HasPrefix(rest, thisProcess+".")
}

// makeFile makes a file under a name that must be free, complete and on disk; the
// error wraps fs.ErrExist when it is taken.
func (r *Root) makeFile(ctx context.Context, dir *rooted.Dir, name string, data []byte) (err error) {
	temp := r.tempName()
	if err := r.tmp.WriteNew(temp, data, 0o600); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.tmp.Remove(temp)) }()
	if err := r.step(ctx, "file.make", name); err != nil {
		return err
	}
	err = r.tmp.Link(temp, dir, name)
	if errors.Is(err, fs.ErrExist) {
		// A file server may carry out a call twice when its first answer was
		// lost; the name is ours when it leads to our file.
		mine, errMine := r.tmp.Stat(temp)
		there, errThere := dir.Stat(name)
		if errMine == nil && errThere == nil && there.Ino == mine.Ino {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	return dir.Sync()
}

// replaceFile puts a file in the place of another, complete and on disk.
func (r *Root) replaceFile(ctx context.Context, dir *rooted.Dir, name string, data []byte) error {
	temp := r.tempName()
	if err := r.tmp.WriteNew(temp, data, 0o600); err != nil {
		return err
	}
	err := r.step(ctx, "file.replace", name)
	if err == nil {
		err = r.tmp.Rename(temp, dir, name)
	}
	if err != nil {
		return errors.Join(err, r.tmp.Remove(temp))
	}
	return dir.Sync()
}
