package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// mostStarts is how often in a row a plugin whose mounts do not reach the host
	// starts anew. If that does not help, the host's first process does not share
	// its mounts with dockerd and cannot tell.
	mostStarts = 2
	// lookAway is for how long after a start dockerd does not hear that the plugin
	// has ended, if it is not the first start: it would disable the plugin.
	lookAway = 2 * time.Second
	// startsFile counts the starts, in the plugin's own file system, which outlives
	// the process.
	startsFile = "/run/berth-starts"
	// quickLook and slowLook are how often the mounts are looked at in the first
	// moments, in which a dockerd that was killed may still unmount what it thinks
	// is the old plugin's, and later.
	quickLook, slowLook, moments = 500 * time.Millisecond, 20 * time.Second, 15 * time.Second
)

// visibility looks whether what the plugin mounts reaches the host, and has the
// plugin started anew when not: dockerd then makes the propagated mount again. Its
// methods may be called concurrently.
type visibility struct {
	// seen is mount.Stage's.
	seen func() (seen, known bool, err error)
	log  *logrus.Entry
	// file holds how often the plugin was started anew since the mounts were seen.
	file      string
	begin     time.Time
	startAnew func()

	mu sync.Mutex
	// ending is set once startAnew was called, givenUp when the host cannot tell.
	// Both are guarded by mu.
	ending, givenUp bool
}

// check returns an error when the host does not see the mounts. The process ends
// soon afterwards.
func (v *visibility) check() error {
	seen, known, err := v.seen()
	if err != nil || !known {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if seen {
		v.givenUp = false
		if err := os.Remove(v.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("count starts: %w", err)
		}
		return nil
	}
	if v.givenUp {
		return nil
	}
	starts, err := v.starts()
	if err != nil {
		return err
	}
	if starts >= mostStarts && !v.ending {
		v.givenUp = true
		v.log.Warn("the host's list of mounts does not show what the plugin mounts, and starting anew did not help; it is not looked at any more")
		return nil
	}
	if !v.ending && (starts == 0 || time.Since(v.begin) > lookAway) {
		if err := renameio.WriteFile(v.file, []byte(strconv.Itoa(starts+1)), 0o600); err != nil {
			return fmt.Errorf("count starts: %w", err)
		}
		v.ending = true
		v.startAnew()
	}
	return fault.Unavailable("the host does not see what the plugin mounts; the plugin is starting anew, try again")
}

// starts reads the count. A file that holds none counts as one start, so that what
// follows is bounded.
func (v *visibility) starts() (int, error) {
	text, err := os.ReadFile(v.file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("count starts: %w", err)
	}
	if n, err := strconv.Atoi(string(text)); err == nil {
		return n, nil
	}
	return 1, nil
}

// watch checks until ctx ends.
func (v *visibility) watch(ctx context.Context) {
	for {
		pause := slowLook
		if time.Since(v.begin) < moments {
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
