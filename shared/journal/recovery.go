package journal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	lockSuffix = ".lock"
	newSuffix  = ".new-"

	// lockWait is how long Open waits for a process that is about to end, as a
	// predecessor that dockerd has just replaced.
	lockWait = 3 * time.Second
)

// Damage is what Open found wrong with a file, in one word for logs.
type Damage string

// Kinds of damage.
const (
	// Intact is a file without damage.
	Intact Damage = ""
	// HeaderCopy is a file of whose two headers one is damaged. Nothing is lost.
	HeaderCopy Damage = "header-copy"
	// Torn is a file whose last frame is incomplete. A power cut leaves that when it
	// interrupts a write, and then nothing is lost that was acknowledged. Damage to
	// the very last frame looks the same.
	Torn Damage = "torn"
	// Cut is a file whose end is missing. Acknowledged records may be lost, and
	// nobody knows how many.
	Cut Damage = "cut"
	// Middle is a file with valid records behind what cannot be read. Acknowledged
	// records are lost.
	Middle Damage = "middle"
	// Unreadable is a file of whose headers none is left, so that no record can be
	// told from chance.
	Unreadable Damage = "unreadable"
)

// A Recovery is what Open found.
type Recovery struct {
	// Created says that there was no file.
	Created bool
	// Records that were replayed, and the length in bytes of the part of the file
	// that they were read from.
	Records int
	Bytes   int64
	// Damage behind them.
	Damage Damage
	// DroppedBytes are the bytes behind the last valid record, without the zeros at
	// the end of the file.
	DroppedBytes int64
	// DroppedRecords is how many records are known to have been behind the last one
	// replayed; there may have been more. IntactRecords of them can still be read in
	// the file KeptAs, but what they build upon is lost.
	DroppedRecords, IntactRecords int
	// KeptAs is the path of the damaged file, whole, or "" when nothing was dropped.
	// It is never removed.
	KeptAs string
}

// Lossy says that acknowledged records are lost, or may well be: what the records
// describe has to be compared with the world, and somebody has to be told.
func (r Recovery) Lossy() bool {
	return r.Damage == Cut || r.Damage == Middle || r.Damage == Unreadable
}

// String is one line for the log.
func (r Recovery) String() string {
	kept := ""
	if r.KeptAs != "" {
		kept = "; the damaged file is kept as " + r.KeptAs
	}
	switch r.Damage {
	case Intact:
		if r.Created {
			return "new log"
		}
		return fmt.Sprintf("%d records in %d bytes", r.Records, r.Bytes)
	case HeaderCopy:
		return fmt.Sprintf("%d records in %d bytes; a damaged header was replaced by its copy", r.Records, r.Bytes)
	case Torn:
		return fmt.Sprintf("%d records in %d bytes, then %d bytes of an incomplete write%s", r.Records, r.Bytes, r.DroppedBytes, kept)
	case Cut:
		return fmt.Sprintf("DAMAGED: the end of the file is missing; %d records in %d bytes are left, %d bytes behind them are dropped%s", r.Records, r.Bytes, r.DroppedBytes, kept)
	case Middle:
		return fmt.Sprintf("DAMAGED at byte %d: %d records before it are kept, at least %d behind it (%d bytes) are dropped%s", r.Bytes, r.Records, r.DroppedRecords, r.DroppedBytes, kept)
	default:
		return fmt.Sprintf("DAMAGED: no header can be read, all %d bytes are dropped%s", r.DroppedBytes, kept)
	}
}

// lock keeps other processes from the log as long as the returned file is open.
// The lock is on a file of its own, since the log's file is replaced.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path+lockSuffix, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockWait); ; time.Sleep(lockWait / 60) {
		err := retry(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(fault.Conflict("log %s is in use by another Berth daemon; stop that one or give this one another --state", path), f.Close())
		}
	}
}

// removeUnfinished removes files that a crash left before they got their name.
func removeUnfinished(path string) error {
	names, err := filepath.Glob(escape(path) + newSuffix + "*")
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return nil
}

// escape makes a path a pattern that only it matches.
func escape(path string) string {
	var out []byte
	for _, c := range []byte(path) {
		switch c {
		case '*', '?', '[', '\\':
			out = append(out, '\\')
		}
		out = append(out, c)
	}
	return string(out)
}

// recoverFile opens the file at path, replays it and, when it is damaged, replaces
// it by what could be read.
func recoverFile(path string, opts Options) (*file, Recovery, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return startFile(path, opts)
	}
	if err != nil {
		return nil, Recovery{}, err
	}
	s, size, err := readAll(f, path)
	if err == nil {
		err = s.replay(opts.Replay)
	}
	if err != nil {
		return nil, Recovery{}, errors.Join(err, f.Close())
	}
	rec := Recovery{
		Records: int(s.records), Bytes: s.end, Damage: s.damage,
		DroppedBytes: s.dropped, DroppedRecords: int(s.highest - s.records), IntactRecords: int(s.intact),
	}
	if s.damage == Intact {
		// A process that was killed may have left what it wrote in memory only.
		out := &file{f: f, header: s.header, end: s.end, size: size, records: s.records}
		if err := out.sync(); err != nil {
			return nil, rec, errors.Join(err, f.Close())
		}
		return out, rec, nil
	}
	defer f.Close()
	if s.damage != HeaderCopy {
		if rec.KeptAs, err = keepAside(path, f); err != nil {
			return nil, rec, fmt.Errorf("keep the damaged file: %w", err)
		}
	}
	out, err := rewrite(path, s.header, func(fn func(frame) error) error {
		for _, fr := range s.frames {
			if err := fn(fr); err != nil {
				return err
			}
		}
		return nil
	})
	return out, rec, err
}

// startFile makes the first file of a log.
func startFile(path string, opts Options) (*file, Recovery, error) {
	if opts.MustExist {
		return nil, Recovery{}, fault.Unavailable("log %s is missing; restore it from a backup, or make an empty file to go on without it", path)
	}
	f, err := rewrite(path, newHeader(), func(func(frame) error) error { return nil })
	return f, Recovery{Created: true, Bytes: firstFrame}, err
}

// readAll reads what is in a file, and its size.
func readAll(f *os.File, path string) (scan, int64, error) {
	info, err := f.Stat()
	if err != nil {
		return scan{}, 0, err
	}
	if info.Size() > maxFile {
		return scan{}, 0, fault.Unavailable("log %s has %d bytes, more than Berth ever writes; restore it from a backup, or empty the file to go on without it; nothing has been changed", path, info.Size())
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		return scan{}, 0, err
	}
	s := scanFile(data)
	if s.header.version > version {
		return scan{}, 0, fault.Unavailable("log %s has format %d and this Berth knows formats up to %d; upgrade Berth, nothing has been changed", path, s.header.version, version)
	}
	return s, info.Size(), nil
}

// replay calls fn for every record that was read.
func (s scan) replay(fn func([]byte) error) error {
	n := 0
	for _, f := range s.frames {
		err := f.each(func(record []byte) error {
			n++
			return fn(record)
		})
		if err != nil {
			return fmt.Errorf("record %d: %w", n, err)
		}
	}
	return nil
}

// keepAside gives the file a second name, which tells when it was last written.
// The same file gets the same name, however often it is tried.
func keepAside(path string, f *os.File) (string, error) {
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	base := path + ".damaged-" + info.ModTime().UTC().Format("20060102T150405Z")
	name := base
	for i := 2; ; i++ {
		err := os.Link(path, name)
		if err == nil {
			return name, syncDir(filepath.Dir(path))
		}
		if !errors.Is(err, fs.ErrExist) {
			return "", err
		}
		other, err := os.Lstat(name)
		if err != nil {
			return "", err
		}
		if os.SameFile(info, other) {
			return name, nil
		}
		name = base + "-" + strconv.Itoa(i)
	}
}

// rewrite puts the frames of a file into a new one and lets it take the place of
// path. When it fails, the file at path may be either.
func rewrite(path string, old header, frames func(func(frame) error) error) (*file, error) {
	out, err := createFile(path)
	if err != nil {
		return nil, err
	}
	err = frames(func(f frame) error {
		return out.copyFrame(append([]byte(nil), f.bytes...), f.count)
	})
	if err != nil {
		return nil, errors.Join(err, out.discard())
	}
	// Frames keep their length, so the snapshot ends where it did.
	out.header.snapshot = max(firstFrame, min(old.snapshot, out.end))
	if installed, err := out.install(path); err != nil {
		if installed {
			return nil, errors.Join(err, out.f.Close())
		}
		return nil, errors.Join(err, out.discard())
	}
	return out, nil
}
