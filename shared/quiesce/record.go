package quiesce

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

const (
	suffix = ".json"
	// newPrefix begins the names of files that are not whole yet. Those that are older
	// than newKeep belong to nobody.
	newPrefix = ".new-"
	newKeep   = time.Minute
	// maxRecord bounds a file, in bytes.
	maxRecord = 1 << 20
)

// A way is how a container is brought to rest.
type way string

const (
	// wayPause is the only one that the command line knows.
	wayPause way = ""
	wayStop  way = "stop"
	// wayGo leaves it running: it has hooks.
	wayGo way = "go"
)

// A target is a container that is brought to rest. Started is when this run of it
// began, as Docker says it.
type target struct {
	ID, Name, Started string
	Way               way    `json:",omitempty"`
	Pre               string `json:",omitempty"`
	Post              string `json:",omitempty"`
	// Timeout of each hook, and of the container's standing still.
	Timeout time.Duration `json:",omitempty"`
}

// A content is the first line of a file. The others are notes.
type content struct {
	Volume string
	// Host is the engine's address, Boot the boot during which the file was written:
	// nothing is paused after another one.
	Host, Boot string
	Containers []target
}

// A note says of one container, by its ID, what has happened since. It has one field.
type note struct {
	// Spared: it was not paused or stopped by this.
	Spared string `json:",omitempty"`
	// Told: its hook from before the snapshot has begun, and that for after it is due.
	Told string `json:",omitempty"`
	// Stopping: Docker is asked to stop it.
	Stopping string `json:",omitempty"`
	// Done: its hook for after the snapshot has run.
	Done string `json:",omitempty"`
}

// record is a file that says what is brought to rest. Whoever has one has its lock.
type record struct {
	file    *os.File
	path    string
	content content
	notes   map[note]bool
}

// newRecord makes the file, on disk when it returns.
func newRecord(cfg Config, containers []target) (_ *record, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write what is to be paused to %s: %w", cfg.Dir, err)
		}
	}()
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(content{Volume: cfg.Volume, Host: cfg.Host, Boot: boot, Containers: containers})
	if err != nil {
		return nil, err
	}
	id := uuid.NewString()
	hidden := filepath.Join(cfg.Dir, newPrefix+id)
	file, err := os.OpenFile(hidden, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	r := &record{file: file, path: filepath.Join(cfg.Dir, id+suffix), content: content{Containers: containers}}
	err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		_, err = file.Write(append(text, '\n'))
	}
	if err == nil {
		err = file.Sync()
	}
	if err == nil {
		err = os.Rename(hidden, r.path)
	}
	if err == nil {
		err = syncDir(cfg.Dir)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close(), ignoreMissing(os.Remove(hidden)), ignoreMissing(os.Remove(r.path)))
	}
	return r, nil
}

// note adds a note, on disk when it returns.
func (r *record) note(n note) error {
	text, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if _, err := r.file.Write(append(text, '\n')); err != nil {
		return err
	}
	if r.notes == nil {
		r.notes = map[note]bool{}
	}
	r.notes[n] = true
	return r.file.Sync()
}

// held are the containers to be let go.
func (r *record) held() (held []target) {
	for _, c := range r.content.Containers {
		paused := c.Way == wayPause
		stopped := c.Way == wayStop && r.notes[note{Stopping: c.ID}]
		if (paused || stopped) && !r.notes[note{Spared: c.ID}] {
			held = append(held, c)
		}
	}
	return held
}

// due are the containers whose hook for after the snapshot has to run.
func (r *record) due() (due []target) {
	for _, c := range r.content.Containers {
		if c.Post != "" && r.notes[note{Told: c.ID}] && !r.notes[note{Done: c.ID}] {
			due = append(due, c)
		}
	}
	return due
}

// load reads the file. A last line that was not written to its end does not count.
func (r *record) load() error {
	text, err := io.ReadAll(io.NewSectionReader(r.file, 0, maxRecord))
	if err != nil {
		return err
	}
	content, notes, err := parse(text)
	if err != nil {
		return fmt.Errorf("%s: %w", r.path, err)
	}
	r.content, r.notes = content, notes
	return nil
}

func parse(text []byte) (c content, notes map[note]bool, _ error) {
	whole := text[:bytes.LastIndexByte(text, '\n')+1]
	first, rest, _ := bytes.Cut(whole, []byte("\n"))
	if err := json.Unmarshal(first, &c); err != nil {
		return content{}, nil, fmt.Errorf("not a list of paused containers: %w", err)
	}
	notes = map[note]bool{}
	for line := range bytes.Lines(rest) {
		var n note
		if err := json.Unmarshal(line, &n); err != nil {
			return content{}, nil, fmt.Errorf("not a list of paused containers: %w", err)
		}
		notes[n] = true
	}
	return c, notes, nil
}

// current reports whether the file still has its name.
func (r *record) current() bool {
	now, err := os.Lstat(r.path)
	if err != nil {
		return false
	}
	open, err := r.file.Stat()
	return err == nil && os.SameFile(now, open)
}

func (r *record) remove() error { return ignoreMissing(os.Remove(r.path)) }

// close gives up the lock, unless the watchdog has it too.
func (r *record) close() error { return r.file.Close() }

func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
