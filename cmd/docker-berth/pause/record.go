package pause

import (
	"bytes"
	"context"
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

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
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

// Dir returns the directory for the files of a user's commands.
func Dir(getenv func(string) string, uid int) string {
	switch state := getenv("XDG_STATE_HOME"); {
	case filepath.IsAbs(state):
		return filepath.Join(state, "docker-berth", "paused")
	case uid == 0 || getenv("HOME") == "":
		return "/var/lib/berth/cli/paused"
	default:
		return filepath.Join(getenv("HOME"), ".local", "state", "docker-berth", "paused")
	}
}

// A paused container. Started is when this run of it began, as Docker says it.
type paused struct {
	ID, Name, Started string
}

// A content is the first line of a file. The others are spared.
type content struct {
	Volume string
	// Host is the engine's address, Boot the boot during which the file was written:
	// nothing is paused after another one.
	Host, Boot string
	Containers []paused
}

// spared says of a container of the first line that it was not paused by this.
type spared struct {
	Spared string
}

// record is a file that says what is paused. Whoever has one has its lock.
type record struct {
	file    *os.File
	path    string
	content content
	without map[string]bool
}

// newRecord makes the file, on disk when it returns.
func newRecord(cfg Config, containers []paused) (_ *record, err error) {
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

// spare notes that a container is not this one's to be let go.
func (r *record) spare(id string) error {
	text, err := json.Marshal(spared{Spared: id})
	if err != nil {
		return err
	}
	if _, err := r.file.Write(append(text, '\n')); err != nil {
		return err
	}
	if r.without == nil {
		r.without = map[string]bool{}
	}
	r.without[id] = true
	return r.file.Sync()
}

// held are the containers to be let go.
func (r *record) held() (held []paused) {
	for _, c := range r.content.Containers {
		if !r.without[c.ID] {
			held = append(held, c)
		}
	}
	return held
}

// load reads the file. A last line that was not written to its end does not count.
func (r *record) load() error {
	text, err := io.ReadAll(io.NewSectionReader(r.file, 0, maxRecord))
	if err != nil {
		return err
	}
	r.content, r.without, err = parse(text)
	if err != nil {
		return fmt.Errorf("%s: %w", r.path, err)
	}
	return nil
}

func parse(text []byte) (c content, without map[string]bool, _ error) {
	whole := text[:bytes.LastIndexByte(text, '\n')+1]
	first, rest, _ := bytes.Cut(whole, []byte("\n"))
	if err := json.Unmarshal(first, &c); err != nil {
		return content{}, nil, fmt.Errorf("not a list of paused containers: %w", err)
	}
	without = map[string]bool{}
	for line := range bytes.Lines(rest) {
		var s spared
		if err := json.Unmarshal(line, &s); err != nil {
			return content{}, nil, fmt.Errorf("not a list of paused containers: %w", err)
		}
		without[s.Spared] = true
	}
	return c, without, nil
}

// release lets all containers go and returns the names of those that were paused.
func (r *record) release(ctx context.Context, api engine.API) (names []string, _ error) {
	var errs []error
	for _, c := range r.held() {
		did, err := release(ctx, api, c)
		if err != nil {
			errs = append(errs, fmt.Errorf("unpause container %s: %w", c.Name, err))
		}
		if did {
			names = append(names, c.Name)
		}
	}
	return names, errors.Join(errs...)
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

// MakeGood lets containers go that commands have left paused which were killed with
// their watchdogs, and returns their names. Containers of other engines than host's are
// left to commands for these.
func MakeGood(ctx context.Context, api engine.API, host, dir string) (names []string, _ error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, ignoreMissing(err)
	}
	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), newPrefix):
			if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > newKeep {
				errs = append(errs, ignoreMissing(os.Remove(path)))
			}
		case strings.HasSuffix(e.Name(), suffix):
			let, err := makeGood(ctx, api, host, path)
			names = append(names, let...)
			errs = append(errs, err)
		}
	}
	return names, errors.Join(errs...)
}

func makeGood(ctx context.Context, api engine.API, host, path string) (names []string, _ error) {
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, ignoreMissing(err)
	}
	defer file.Close()
	err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil // somebody watches
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	r := &record{file: file, path: path}
	if !r.current() {
		return nil, nil // it was done with in between
	}
	if err := r.load(); err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if r.content.Boot != boot {
		return nil, r.remove()
	}
	if r.content.Host != host {
		return nil, nil
	}
	if names, err = r.release(ctx, api); err != nil {
		return names, err
	}
	return names, r.remove()
}

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
