package presence

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(child())
	}
	os.Exit(mounttest.Main(m))
}

// A host of the tests. Its clock of durations stands still but for wait, and its
// calendar is wrong by more than a month, another way on each host.
type host struct {
	*Presence
	t    testing.TB
	root string

	mu     sync.Mutex
	clock  time.Duration
	events []string
	steps  func(step string) error
}

// boots gives each host a boot of its own.
var boots struct {
	sync.Mutex
	n int
}

func newHost(t testing.TB, root, id string, change ...func(*Config)) *host {
	t.Helper()
	boots.Lock()
	boots.n++
	n := boots.n
	boots.Unlock()
	h := &host{t: t, root: root, clock: time.Duration(n) * 1000 * time.Hour}
	skew := time.Duration(n%7-3) * 1000 * time.Hour
	log := logrus.New()
	log.SetOutput(io.Discard)
	cfg := Config{
		ID: id, Name: strings.TrimSuffix(id, "/id"), Open: func() (*rooted.Dir, error) { return rooted.Open(root) },
		Changed: func(volume string, state LeaseState, why string) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.events = append(h.events, string(state)+" "+volume+": "+why)
		},
		Log: logrus.NewEntry(log),
		Now: func() time.Time { return time.Now().Add(skew) },
		boot: func() time.Duration {
			h.mu.Lock()
			defer h.mu.Unlock()
			return h.clock
		},
		step: func(step string) error {
			h.mu.Lock()
			steps := h.steps
			h.mu.Unlock()
			if steps == nil {
				return nil
			}
			return steps(step)
		},
	}
	for _, f := range change {
		f(&cfg)
	}
	p, err := New(cfg)
	assert.NilError(t, err)
	h.Presence = p
	return h
}

func (h *host) onStep(f func(step string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.steps = f
}

// wait lets time go by for this host, without a heartbeat.
func (h *host) wait(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock += d
}

func (h *host) beat() {
	h.t.Helper()
	assert.NilError(h.t, h.Beat(h.t.Context()))
}

// watch beats for a time, as Run does.
func (h *host) watch(d time.Duration) {
	h.t.Helper()
	h.beat()
	for ; d > 0; d -= beatEvery {
		h.wait(min(d, beatEvery))
		h.beat()
	}
}

// told gives what Changed was told.
func (h *host) told() []string {
	h.doubt()
	h.deliver()
	h.mu.Lock()
	defer h.mu.Unlock()
	events := h.events
	h.events = nil
	return events
}

// age makes a host's file older by the server's clock.
func (h *host) age(d time.Duration) {
	h.t.Helper()
	// Not from time.Now, which may be a bubble's.
	path := filepath.Join(h.root, hostsName, h.file)
	info, err := os.Stat(path)
	assert.NilError(h.t, err)
	then := info.ModTime().Add(-d)
	assert.NilError(h.t, os.Chtimes(path, then, then))
}

func (h *host) take(volume string) error {
	_, err := h.Acquire(h.t.Context(), volume, false)
	return err
}

func (h *host) has(volume string) bool {
	h.Presence.mu.Lock()
	defer h.Presence.mu.Unlock()
	_, ok := h.held[volume]
	return ok
}

func users(t *testing.T, h *host, volume string) string {
	t.Helper()
	hosts, err := h.Users(t.Context(), volume)
	assert.NilError(t, err)
	var text []string
	for _, user := range hosts {
		word := user.Name
		if user.Self {
			word += " self"
		}
		if !user.Alive {
			word += " dead"
		}
		if user.Stopped {
			word += " stopped"
		}
		assert.Equal(t, user.InUse(), user.Alive || user.Stopped)
		assert.Assert(t, user.Silent >= 0)
		text = append(text, word)
	}
	return strings.Join(text, ", ")
}

// record reads the host's file.
func (h *host) record() (hostRecord, error) {
	data, err := os.ReadFile(filepath.Join(h.root, hostsName, h.file))
	if err != nil {
		return hostRecord{}, err
	}
	return decodeHost(h.file, data)
}

// In the bubble of synctest, time passes when all goroutines wait.
func bubble(t *testing.T, root, id string, change func(*Config)) *host {
	begin := time.Now()
	return newHost(t, root, id, func(c *Config) {
		c.boot = func() time.Duration { return time.Since(begin) + time.Hour }
		if change != nil {
			change(c)
		}
	})
}

func (h *host) run(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); h.Run(ctx) }()
	return func() { cancel(); <-done; synctest.Wait() }
}

func (h *host) happened() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	events := h.events
	h.events = nil
	return events
}
