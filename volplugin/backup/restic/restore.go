package restic

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// maxPaths is how many paths one call of Restore takes.
const maxPaths = 1000

// Restore implements backup.Engine. A backup that is incomplete is restored as far as it goes.
func (e *Engine) Restore(ctx context.Context, b backup.Backup, dir string, paths []string, progress func(backup.Progress)) (backup.Restored, error) {
	restored, err := e.restore(ctx, b, dir, paths, told(progress))
	return restored, fail(fmt.Sprintf("restore backup %.8s", b.ID), err)
}

func (e *Engine) restore(ctx context.Context, b backup.Backup, dir string, paths []string, progress func(backup.Progress)) (none backup.Restored, err error) {
	include, err := includes(paths)
	if err != nil {
		return none, err
	}
	if info, err := os.Lstat(dir); err != nil {
		return none, err
	} else if !filepath.IsAbs(dir) || !info.IsDir() {
		return none, fault.Invalid("%.200q: want the absolute path of a directory", dir)
	}
	from, err := e.known(ctx, b)
	if err != nil {
		return none, err
	}
	r := &restoring{engine: e, progress: progress}
	err = e.run(ctx, call{
		args: slices.Concat([]string{"--json", "restore", b.ID, "--target", dir, "--sparse"}, include),
		out:  r.message,
		err:  r.failure,
	})
	if err == nil {
		err = r.check()
	}
	if err != nil {
		return none, e.missing(ctx, b.ID, err)
	}
	held, err := account(ctx, dir, paths)
	if err != nil {
		return none, err
	}
	if len(paths) == 0 && from.Files > 0 && (held.Files != from.Files || held.Bytes != from.Bytes) {
		return none, fmt.Errorf("the backup has %d files with %d bytes, and %d with %d were restored", from.Files, from.Bytes, held.Files, held.Bytes)
	}
	return backup.Restored{Files: held.Files, Bytes: held.Bytes}, nil
}

// account counts what is in dir after a restore, and refuses what is no backup of Berth's.
func account(ctx context.Context, dir string, paths []string) (tree.Held, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return tree.Held{}, err
	}
	for _, entry := range entries {
		switch name := entry.Name(); {
		case name == backup.DataName && entry.IsDir():
		case name == backup.ManifestName && entry.Type().IsRegular():
		default:
			return tree.Held{}, fmt.Errorf("the backup has %.80q (%v) at its top: want a directory %s and a file %s", name, entry.Type(), backup.DataName, backup.ManifestName)
		}
	}
	if len(paths) == 0 && len(entries) != 2 {
		return tree.Held{}, fmt.Errorf("the backup has no %s and no %s", backup.DataName, backup.ManifestName)
	}
	for _, path := range paths {
		if err := isThere(filepath.Join(dir, backup.DataName), path); err != nil {
			return tree.Held{}, err
		}
	}
	return countData(ctx, dir)
}

// isThere finds a path that was asked for, without following links.
func isThere(data, path string) error {
	at, err := unix.Open(data, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for name := range strings.SplitSeq(path, "/") {
		if err != nil {
			break
		}
		var fd int
		fd, err = unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		_ = unix.Close(at)
		at = fd
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return fault.NotFound("the backup has no %.200q", path)
	}
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return unix.Close(at)
}

// includes turns paths below data into patterns that match nothing else.
func includes(paths []string) ([]string, error) {
	if len(paths) > maxPaths {
		return nil, fault.Invalid("%d paths: at most %d are restored at once", len(paths), maxPaths)
	}
	var args []string
	for _, path := range paths {
		if !fs.ValidPath(strings.ToValidUTF8(path, "?")) || path == "." || strings.ContainsRune(path, 0) {
			return nil, fault.Invalid("path %.200q: want a path below the volume without . and .., as in dir/file", path)
		}
		args = append(args, "--include", "/"+backup.DataName+"/"+literal.Replace(path))
	}
	if args != nil {
		args = append(args, "--include", "/"+backup.ManifestName)
	}
	return args, nil
}

var literal = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`)

// restoring is one run of `restic restore`.
type restoring struct {
	engine   *Engine
	progress func(backup.Progress)
	summary  restoreStatus
	done     bool
	failed   []string
}

func (r *restoring) message(line []byte) error {
	var status restoreStatus
	kind, err := readMessage(line, map[string]any{"status": &status, "summary": &status})
	switch {
	case err != nil:
		return err
	case kind == "summary" && r.done:
		return malformed(line, errors.New("it is the second summary"))
	case kind == "summary":
		r.summary, r.done = status, true
	case kind == "status":
		r.progress(backup.Progress{Step: "writing", Files: status.Restored, TotalFiles: status.Total, Bytes: status.BytesRestored, TotalBytes: status.TotalBytes})
	}
	return nil
}

func (r *restoring) failure(line []byte) error {
	m, ok, err := readError(line)
	if ok && len(r.failed) < maxMissing {
		r.failed = append(r.failed, cut(r.engine.redact.Replace(m.text()), maxTailLine))
	}
	return err
}

// check compares what restic has to say with itself.
func (r *restoring) check() error {
	switch s := r.summary; {
	case len(r.failed) > 0:
		return fmt.Errorf("not all could be written: %s", strings.Join(r.failed[:min(len(r.failed), 3)], "; "))
	case !r.done:
		return errors.New("restic ended without a summary")
	// Directories above the paths that were asked for are restored and not in the total.
	case s.Restored < s.Total || s.BytesRestored != s.TotalBytes:
		return fmt.Errorf("restic has restored %d of %d entries, %d of %d bytes", s.Restored, s.Total, s.BytesRestored, s.TotalBytes)
	}
	return nil
}
