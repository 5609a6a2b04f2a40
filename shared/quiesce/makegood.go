package quiesce

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// MakeGood lets containers go that were left at rest by processes which were killed
// with their watchdogs, and returns their names. Containers of other engines than
// host's are left to commands for these.
func MakeGood(ctx context.Context, api API, host, dir string) (names []string, _ error) {
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

func makeGood(ctx context.Context, api API, host, path string) (names []string, _ error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|unix.O_NOFOLLOW, 0)
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
	if r.content.Boot == boot && r.content.Host != host {
		return nil, nil
	}
	if r.content.Boot != boot {
		r.forgetPaused()
	}
	if len(r.held())+len(r.due()) == 0 {
		return nil, r.remove()
	}
	if names, err = r.release(ctx, api); err != nil {
		return names, err
	}
	return names, errors.Join(r.runDue(ctx, api), r.remove())
}

// forgetPaused leaves what a new boot does not undo.
func (r *record) forgetPaused() {
	for _, c := range r.content.Containers {
		if c.Way == wayPause {
			r.notes[note{Spared: c.ID}] = true
		}
	}
}
