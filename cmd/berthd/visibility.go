package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/mount"
)

const (
	// mostStarts is how often in ten minutes a plugin whose mounts do not reach
	// the host starts anew. After that it is taken that the host's first process
	// does not share mounts with dockerd and tells nothing.
	mostStarts = 4
	startsTime = 10 * time.Minute
	// startsFile is in the plugin's own file system, which outlives its process
	// and no more is needed.
	startsFile = "/run/berth-starts.json"
	// quickLook and slowLook are how often the mounts are looked at in the first
	// moments, in which a dockerd that was killed may still unmount what it thinks
	// is the old plugin's, and later.
	quickLook, slowLook, moments = 500 * time.Millisecond, 20 * time.Second, 15 * time.Second
)

// visibility looks whether what the plugin mounts reaches the host, and has the
// plugin started anew when not: dockerd then makes the propagated mount again. Its
// methods may be called concurrently.
type visibility struct {
	stage *mount.Stage
	log   *logrus.Entry
	// file holds the times at which the plugin was started anew, as JSON.
	file      string
	startAnew func()

	mu sync.Mutex
	// ending is set once startAnew was called. Guarded by mu.
	ending bool
}

// check returns an error when the host does not see the mounts. The process ends
// soon afterwards.
func (v *visibility) check() error {
	seen, known, err := v.stage.Seen()
	if err != nil {
		return err
	}
	if seen || !known {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.ending {
		if v.ending, err = v.countStart(); err != nil || !v.ending {
			return err
		}
		v.startAnew()
	}
	return fault.Unavailable("the host does not see what the plugin mounts; the plugin is starting anew, try again")
}

// countStart notes one more start, unless there were too many.
func (v *visibility) countStart() (bool, error) {
	var times []time.Time
	text, err := os.ReadFile(v.file)
	if err == nil {
		err = json.Unmarshal(text, &times)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("count starts: %w", err)
	}
	now := time.Now()
	times = slices.DeleteFunc(times, func(t time.Time) bool { return now.Sub(t) > startsTime || t.After(now) })
	if len(times) >= mostStarts {
		return false, nil
	}
	if text, err = json.Marshal(append(times, now)); err != nil {
		return false, fmt.Errorf("count starts: %w", err)
	}
	if err := renameio.WriteFile(v.file, text, 0o600); err != nil {
		return false, fmt.Errorf("count starts: %w", err)
	}
	return true, nil
}

// watch checks until ctx ends.
func (v *visibility) watch(ctx context.Context) {
	begin := time.Now()
	for {
		pause := slowLook
		if time.Since(begin) < moments {
			pause = quickLook
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		if err := v.check(); err != nil {
			v.log.WithError(err).Error("mounts")
		}
	}
}
