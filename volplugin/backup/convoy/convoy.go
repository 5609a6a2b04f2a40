// Package convoy reads the backups that convoy (rancher/convoy) has made into a directory, so that
// its users can take them along. Only what its driver vfs has made is read, which is one
// tar.gz for each backup. Nothing is ever written.
//
// The store is laid out so, with AB and CD the first characters of the name, which is
// filled up with ! when it is shorter:
//
//	convoy-objectstore/volumes/AB/CD/NAME/volume.cfg
//	convoy-objectstore/volumes/AB/CD/NAME/backups/backup_ID.cfg
//	convoy-objectstore/volumes/AB/CD/NAME/BackupFiles/FILE.bak
//
// Nobody vouches for the store. Symbolic links do not lead out of it, and names in its
// files are compared or looked for in the directory of their volume only.
package convoy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
)

const (
	base         = "convoy-objectstore/volumes"
	volumeConfig = "volume.cfg"
	backupsDir   = "backups"
	filesDir     = "BackupFiles"
	// maxConfig bounds the files that describe backups, in bytes.
	maxConfig = 1 << 20
	// driver is the one whose backups are tar files.
	driver = "vfs"
)

// A Backup is one in a store.
type Backup struct {
	// Name is convoy's, "backup-…"; Volume is the volume's and Snapshot the snapshot's.
	Name, Volume, Snapshot string
	// SnapshotTime and Time are when the snapshot and the backup were made; zero where convoy's words
	// are not understood.
	SnapshotTime, Time time.Time
	// Size of the archive in bytes.
	Size int64
	// file is its path in the store.
	file string
}

// A Reference is what a URL of convoy's says.
type Reference struct {
	// Dir is the directory that holds the store.
	Dir string
	// Volume and Backup are names, both "" for the whole store.
	Volume, Backup string
}

// String is the URL that ParseURL reads, as convoy writes it.
func (r Reference) String() string {
	text := driver + "://" + (&url.URL{Path: r.Dir}).EscapedPath()
	if r.Volume != "" {
		text += "?" + url.Values{"backup": {r.Backup}, "volume": {r.Volume}}.Encode()
	}
	return text
}

// IsURL tells a URL of convoy's from other words.
func IsURL(text string) bool { return strings.HasPrefix(text, driver+":") }

// ParseURL reads vfs:///DIR?backup=NAME&volume=NAME, as convoy shows it, or without the
// names. The error is invalid.
func ParseURL(text string) (Reference, error) {
	wrong := func(why string) (Reference, error) {
		return Reference{}, fault.Invalid("convoy backup %.200q: %s: want vfs:///DIR?backup=NAME&volume=NAME", backup.Redact(text), why)
	}
	u, err := url.Parse(text)
	if err != nil {
		return wrong("is not a URL")
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return wrong("its names cannot be read")
	}
	switch {
	case u.Scheme != driver:
		return wrong("only backups of convoy's driver vfs in a directory can be read")
	case u.Host != "" || !path.IsAbs(u.Path):
		return wrong("has no absolute directory")
	}
	ref := Reference{Dir: filepath.Clean(u.Path), Volume: query.Get("volume"), Backup: query.Get("backup")}
	if (ref.Volume == "") != (ref.Backup == "") {
		return wrong("names one of volume and backup, not both")
	}
	if ref.Volume != "" && (!names.MatchString(ref.Volume) || !names.MatchString(ref.Backup)) {
		return wrong("has a name that convoy does not make")
	}
	return ref, nil
}

// names are those of volumes and backups.
var names = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,249}$`)

// A Store is one that is open. Its methods may be called concurrently.
type Store struct {
	root *os.Root
	dir  string
}

// Open opens the store in dir. One that is not there is not found.
func Open(dir string) (*Store, error) {
	root, err := os.OpenRoot(dir)
	if err == nil {
		_, err = root.Stat(base)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(fault.NotFound("%s has no backups of convoy: there is no directory %s in it", dir, base), closed(root))
	}
	if err != nil {
		return nil, errors.Join(fault.Unavailable("backups of convoy: %w", err), closed(root))
	}
	return &Store{root, dir}, nil
}

func closed(root *os.Root) error {
	if root == nil {
		return nil
	}
	return root.Close()
}

// Close ends the use of the store.
func (s *Store) Close() error { return s.root.Close() }

// config is what the file of a backup holds.
type config struct {
	Name              string
	Driver            string
	VolumeName        string
	SnapshotName      string
	SnapshotCreatedAt string
	CreatedTime       string
	SingleFile        struct{ FilePath string }
}

// List returns the backups that can be read, those of one volume after the other, the
// oldest first, and in words what else was found.
func (s *Store) List(ctx context.Context) (all []Backup, others []string, err error) {
	volumes, err := fs.Glob(s.root.FS(), base+"/*/*/*")
	if err != nil {
		return nil, nil, fault.Unavailable("backups of convoy in %s: %w", s.dir, err)
	}
	for _, dir := range volumes {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		volume := path.Base(dir)
		if !names.MatchString(volume) || dir != volumeDir(volume) {
			others = append(others, fmt.Sprintf("%q is not where the backups of a volume are", dir))
			continue
		}
		files, err := fs.Glob(s.root.FS(), dir+"/"+backupsDir+"/backup_*.cfg")
		if err != nil {
			return nil, nil, fault.Unavailable("backups of convoy in %s: %w", s.dir, err)
		}
		var list []Backup
		for _, file := range files {
			b, err := s.read(volume, file)
			if err != nil {
				others = append(others, fmt.Sprintf("%q: %v", file, err))
				continue
			}
			list = append(list, b)
		}
		slices.SortFunc(list, func(a, b Backup) int { return a.Time.Compare(b.Time) })
		all = append(all, list...)
	}
	return all, others, nil
}

// Find returns the backup of a volume that has a name. The error is not found.
func (s *Store) Find(volume, name string) (Backup, error) {
	if !names.MatchString(volume) || !names.MatchString(name) {
		return Backup{}, fault.NotFound("there is no backup %.80q of volume %.80q of convoy", name, volume)
	}
	b, err := s.read(volume, volumeDir(volume)+"/"+backupsDir+"/backup_"+name+".cfg")
	if errors.Is(err, fs.ErrNotExist) {
		return Backup{}, fault.NotFound("%s has no backup %s of volume %s of convoy: %w", s.dir, name, volume, err)
	}
	if err != nil {
		return Backup{}, fault.Unavailable("backup %s of volume %s of convoy: %w", name, volume, err)
	}
	return b, nil
}

// volumeDir is where the backups of a volume are.
func volumeDir(volume string) string {
	filled := volume + "!!!!"
	return path.Join(base, filled[:2], filled[2:4], volume)
}

// read reads the file of a backup.
func (s *Store) read(volume, file string) (Backup, error) {
	opened, size, err := s.open(file)
	if err != nil {
		return Backup{}, err
	}
	defer opened.Close()
	if size > maxConfig {
		return Backup{}, fmt.Errorf("it has %d bytes, at most %d are read", size, maxConfig)
	}
	var c config
	if err := json.NewDecoder(io.LimitReader(opened, maxConfig)).Decode(&c); err != nil {
		return Backup{}, err
	}
	name := path.Base(c.SingleFile.FilePath)
	switch {
	case c.Driver != driver:
		return Backup{}, fmt.Errorf("it is of convoy's driver %.40q, and those of %s can be read", c.Driver, driver)
	case c.VolumeName != volume || path.Base(file) != "backup_"+c.Name+".cfg":
		return Backup{}, fmt.Errorf("it is that of backup %.80q of volume %.80q", c.Name, c.VolumeName)
	case !names.MatchString(name):
		return Backup{}, fmt.Errorf("its archive has the name %.80q", name)
	}
	// Wherever it says that its archive is, there is one place for it.
	b := Backup{Name: c.Name, Volume: volume, Snapshot: c.SnapshotName, file: path.Join(volumeDir(volume), filesDir, name)}
	b.SnapshotTime, b.Time = parseTime(c.SnapshotCreatedAt), parseTime(c.CreatedTime)
	archive, size, err := s.open(b.file)
	if err != nil {
		return Backup{}, err
	}
	b.Size = size
	return b, archive.Close()
}

// parseTime reads the form that convoy writes.
func parseTime(text string) time.Time {
	at, err := time.Parse(time.RubyDate, text)
	if err != nil {
		return time.Time{}
	}
	return at
}

// open opens a regular file.
func (s *Store) open(file string) (*os.File, int64, error) {
	// A pipe of that name would wait for somebody to write to it.
	opened, err := s.root.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := opened.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%q is not a file", file)
	}
	if err != nil {
		_ = opened.Close()
		return nil, 0, err
	}
	return opened, info.Size(), nil
}

// Archive opens the archive of a backup, still compressed, for tarball.Decompress and
// tarball.Extract with the layout Foreign.
func (s *Store) Archive(b Backup) (io.ReadCloser, error) {
	archive, _, err := s.open(b.file)
	if err != nil {
		return nil, fault.Unavailable("backup %s of volume %s of convoy: %w", b.Name, b.Volume, err)
	}
	return archive, nil
}
