package vmlab

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"sync"
)

// A workshop builds programs for guests, each of them once for all guests of a test
// process. It is safe for concurrent use; builds come one after the other.
type workshop struct {
	mu   sync.Mutex
	dir  string            // made for the first program
	made map[string]string // paths of the programs by what they are made of
}

// programs has what this process has built; Main removes it.
var programs workshop

// tests builds the tests of the current directory's package, which is the one under
// test. Without its debugging information the guest has less to unpack.
func (w *workshop) tests(ctx context.Context) (path string, err error) {
	return w.program(ctx, ".", "test", "-c", "-ldflags=-s -w")
}

// binary builds a main package of this module.
func (w *workshop) binary(ctx context.Context, pkg string) (path string, err error) {
	return w.program(ctx, pkg, "build", "-trimpath")
}

// program builds pkg with a subcommand of the go tool and its flags.
func (w *workshop) program(ctx context.Context, pkg string, tool ...string) (path string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if path, ok := w.made[pkg]; ok {
		return path, nil
	}
	if w.dir == "" {
		if w.dir, err = os.MkdirTemp("", "vmlab-"); err != nil {
			return "", err
		}
		w.made = map[string]string{}
	}
	path = filepath.Join(w.dir, strconv.Itoa(len(w.made)))
	if err := goTool(ctx, append(tool, "-o", path, pkg)...); err != nil {
		return "", err
	}
	w.made[pkg] = path
	return path, nil
}

// close removes all programs.
func (w *workshop) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dir == "" {
		return nil
	}
	dir := w.dir
	w.dir, w.made = "", nil
	return os.RemoveAll(dir)
}
