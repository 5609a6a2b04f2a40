package backup

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/atomicwriter"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	targetSuffix = ".json"
	// maxTarget bounds the file of a target, in bytes.
	maxTarget = 1 << 20
)

// Targets are kept in a directory of this host, one file NAME.json with mode 0600 for
// each. An administrator may put files there as well; they are read whenever they are
// needed, so that none has to be announced. Methods may be called concurrently, except
// for two changes of one target.
type Targets struct{ dir string }

// OpenTargets makes the directory unless it is there.
func OpenTargets(dir string) (*Targets, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("targets of backups: %w", err)
	}
	return &Targets{dir}, nil
}

// Names lists the targets, also those that cannot be used, in order.
func (t *Targets) Names() ([]string, error) {
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return nil, fmt.Errorf("targets of backups: %w", err)
	}
	var names []string
	for _, entry := range entries {
		if name, ok := strings.CutSuffix(entry.Name(), targetSuffix); ok && CheckTarget(name) == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Get reads a target. The error is not found, or invalid when its file cannot be used.
func (t *Targets) Get(name string) (Target, error) {
	if err := CheckTarget(name); err != nil {
		return Target{}, err
	}
	path := t.path(name)
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Target{}, fault.NotFound("there is no target %s: docker berth target add %s REPOSITORY makes one", name, name)
	}
	if err != nil {
		return Target{}, fault.Unavailable("target %s: %w", name, err)
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return Target{}, fault.Unavailable("target %s: %w", name, err)
	case !info.Mode().IsRegular():
		return Target{}, fault.Invalid("target %s: %s is not a file", name, path)
	case info.Mode().Perm()&0o077 != 0:
		return Target{}, fault.Invalid("target %s: %s has mode %#o and may hold secrets: want 0600", name, path, info.Mode().Perm())
	case info.Size() > maxTarget:
		return Target{}, fault.Invalid("target %s: %s has %d bytes, at most %d are read", name, path, info.Size(), maxTarget)
	}
	target := Target{}
	decoder := json.NewDecoder(file)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&target); err != nil {
		return Target{}, fault.Invalid("target %s: %s: %w", name, path, err)
	}
	target.Name = name
	return target, target.Check()
}

// Put stores a target in place of another one of its name.
func (t *Targets) Put(target Target) error {
	if err := target.Check(); err != nil {
		return err
	}
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(target); err != nil {
		return fmt.Errorf("target %s: %w", target.Name, err)
	}
	if err := atomicwriter.WriteFile(t.path(target.Name), text.Bytes(), 0o600); err != nil {
		return fault.Unavailable("target %s: %w", target.Name, err)
	}
	return nil
}

// Delete forgets a target, and leaves its repository alone. One that is not there is
// not found.
func (t *Targets) Delete(name string) error {
	if err := CheckTarget(name); err != nil {
		return err
	}
	err := os.Remove(t.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return fault.NotFound("there is no target %s", name)
	}
	if err != nil {
		return fault.Unavailable("target %s: %w", name, err)
	}
	return nil
}

func (t *Targets) path(name string) string { return filepath.Join(t.dir, name+targetSuffix) }
