package quiesce

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/quiesce/enginetest"
)

func TestMain(m *testing.M) {
	if Init() {
		return
	}
	os.Exit(m.Run())
}

// web and db run with the volume, job has it and does not run, held was paused by
// somebody, and other has nothing to do with it.
func newEngine(t *testing.T) (*enginetest.Engine, Config) {
	t.Helper()
	e := enginetest.New(t,
		enginetest.Container{ID: "web", State: container.StateRunning, Volumes: []string{"v"}, Started: "s1"},
		enginetest.Container{ID: "held", State: container.StatePaused, Volumes: []string{"v"}, Started: "s2"},
		enginetest.Container{ID: "job", State: container.StateExited, Volumes: []string{"v"}},
		enginetest.Container{ID: "other", State: container.StateRunning, Volumes: []string{"w"}, Started: "s3"},
		enginetest.Container{ID: "db", State: container.StateRunning, Volumes: []string{"w", "v"}, Started: "s4"},
	)
	api, err := client.NewClientWithOpts(client.WithHost(e.Host), client.WithAPIVersionNegotiation())
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, api.Close()) })
	return e, Config{API: api, Host: e.Host, Dir: filepath.Join(t.TempDir(), "paused"), Volume: "v", Max: time.Minute}
}

// records are the files that are left.
func records(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	assert.NilError(t, err)
	return files
}

// awaitNone waits until a watchdog has removed its file.
func awaitNone(t *testing.T, dir string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); len(records(t, dir)) > 0; time.Sleep(10 * time.Millisecond) {
		assert.Assert(t, time.Now().Before(end), "%v is still there", records(t, dir))
	}
}

func TestContainersStandStillAndGoOn(t *testing.T) {
	e, cfg := newEngine(t)
	hold, err := Begin(t.Context(), cfg)
	assert.NilError(t, err)
	assert.DeepEqual(t, e.Calls(), []string{"pause db", "pause web"})
	assert.DeepEqual(t, hold.Names(), []string{"db", "web"})
	assert.Equal(t, len(records(t, cfg.Dir)), 1)
	assert.Assert(t, time.Until(hold.Until()) > 50*time.Second)
	assert.NilError(t, hold.Still(t.Context()))

	// Neither another command nor the end of the context disturbs it.
	names, err := MakeGood(t.Context(), cfg.API, cfg.Host, cfg.Dir)
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0)
	assert.NilError(t, hold.Still(t.Context()))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	assert.NilError(t, hold.End(ctx))
	assert.Assert(t, hold.child.ProcessState != nil, "the watchdog goes on")
	assert.DeepEqual(t, e.Calls()[2:], []string{"unpause db", "unpause web"})
	assert.Equal(t, e.State("held"), container.StatePaused)
	assert.Equal(t, len(records(t, cfg.Dir)), 0)
}

func TestNothingToPause(t *testing.T) {
	e, cfg := newEngine(t)
	cfg.Volume = "unused"
	hold, err := Begin(t.Context(), cfg)
	assert.NilError(t, err)
	assert.Assert(t, hold.Until().IsZero() && hold.Names() == nil)
	assert.NilError(t, hold.Still(t.Context()))
	assert.NilError(t, hold.End(t.Context()))
	assert.Equal(t, len(e.Calls())+len(records(t, cfg.Dir)), 0)
}

func TestStillSeesWhatDidNotStandStill(t *testing.T) {
	for name, disturb := range map[string]func(*enginetest.Engine){
		"web": func(e *enginetest.Engine) { e.Set("web", container.StateRunning) },
		"job": func(e *enginetest.Engine) { e.Set("job", container.StateRunning) },
	} {
		e, cfg := newEngine(t)
		hold, err := Begin(t.Context(), cfg)
		assert.NilError(t, err)
		disturb(e)
		err = hold.Still(t.Context())
		assert.Equal(t, fault.Kind(err), "conflict")
		assert.ErrorContains(t, err, "started or unpaused "+name)
		assert.NilError(t, hold.End(t.Context()))
		assert.Equal(t, e.State("db"), container.StateRunning)
	}
}

func TestWatchdogLetsGoAfterTheLongestTime(t *testing.T) {
	e, cfg := newEngine(t)
	cfg.Max = 300 * time.Millisecond
	hold, err := Begin(t.Context(), cfg)
	assert.NilError(t, err)
	e.Await(t, "web", container.StateRunning)
	e.Await(t, "db", container.StateRunning)
	assert.ErrorContains(t, hold.Still(t.Context()), "stood still for 300ms and were let go")
	// Whoever pauses it now is not this.
	e.Set("web", container.StatePaused)
	e.Restart("db")
	assert.NilError(t, hold.End(t.Context()))
	assert.Equal(t, len(records(t, cfg.Dir)), 0)
}

func TestFailedPauseIsUndone(t *testing.T) {
	e, cfg := newEngine(t)
	e.Before(func(call string) error {
		if call == "pause web" {
			return errors.New("cannot freeze")
		}
		return nil
	})
	_, err := Begin(t.Context(), cfg)
	assert.ErrorContains(t, err, "pause container web")
	assert.ErrorContains(t, err, "cannot freeze")
	e.Await(t, "db", container.StateRunning)
	awaitNone(t, cfg.Dir)
}

func TestInterruptedBeginIsUndone(t *testing.T) {
	e, cfg := newEngine(t)
	ctx, cancel := context.WithCancel(t.Context())
	e.Before(func(string) error { cancel(); return nil })
	_, err := Begin(ctx, cfg)
	assert.ErrorIs(t, err, context.Canceled)
	assert.DeepEqual(t, e.Calls(), []string{"pause db", "unpause db"})
	assert.Equal(t, len(records(t, cfg.Dir)), 0)
}

// Somebody else is a moment faster.
func TestContainerPausedMeanwhileStaysPaused(t *testing.T) {
	e, cfg := newEngine(t)
	e.Before(func(call string) error {
		if call == "pause web" {
			e.Set("web", container.StatePaused)
		}
		return nil
	})
	hold, err := Begin(t.Context(), cfg)
	assert.NilError(t, err)
	assert.DeepEqual(t, hold.Names(), []string{"db"})
	assert.NilError(t, hold.Still(t.Context()))
	assert.NilError(t, hold.End(t.Context()))
	assert.DeepEqual(t, e.Calls(), []string{"pause db", "unpause db"})
	assert.Equal(t, e.State("web"), container.StatePaused)
}

func TestRestartingContainerIsAConflict(t *testing.T) {
	e, cfg := newEngine(t)
	e.Set("web", container.StateRestarting)
	_, err := Begin(t.Context(), cfg)
	assert.Equal(t, fault.Kind(err), "conflict", "%v", err)
	assert.Equal(t, len(e.Calls()), 0)
}

// Without a watchdog nothing is paused.
func TestWatchdogThatCannotReachDocker(t *testing.T) {
	e, cfg := newEngine(t)
	cfg.Host = "unix://" + filepath.Join(t.TempDir(), "none.sock")
	_, err := Begin(t.Context(), cfg)
	assert.Equal(t, fault.Kind(err), "unavailable", "%v", err)
	assert.ErrorContains(t, err, "the watchdog did not start")
	assert.Equal(t, len(e.Calls())+len(records(t, cfg.Dir)), 0)
}

// A Docker that does not let go at once is asked again, by the watchdog.
func TestEndThatFailsIsTakenOver(t *testing.T) {
	e, cfg := newEngine(t)
	hold, err := Begin(t.Context(), cfg)
	assert.NilError(t, err)
	failures := 1
	e.Before(func(call string) error {
		if call == "unpause web" && failures > 0 {
			failures--
			return errors.New("busy")
		}
		return nil
	})
	err = hold.End(t.Context())
	assert.ErrorContains(t, err, "container web is still paused")
	assert.ErrorContains(t, err, "docker unpause web")
	e.Await(t, "web", container.StateRunning)
	awaitNone(t, cfg.Dir)
}

// leave writes what a killed command and its watchdog leave.
func leave(t *testing.T, cfg Config, change func(*content)) string {
	t.Helper()
	r, err := newRecord(cfg, []target{{ID: "web", Name: "web", Started: "s1"}, {ID: "held", Name: "held", Started: "s2"}})
	assert.NilError(t, err)
	assert.NilError(t, r.note(note{Spared: "held"}))
	assert.NilError(t, r.load())
	if change != nil {
		change(&r.content)
		text, err := json.Marshal(r.content)
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(r.path, append(text, "\n{\"Spared\":\"held\"}\n{\"Spa"...), 0o600))
	}
	assert.NilError(t, r.close())
	return r.path
}

func TestMakeGood(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*content)
		lock   bool
		state  string
		left   int
	}{
		"both were killed":     {state: container.StateRunning},
		"in a write":           {change: func(*content) {}, state: container.StateRunning},
		"before the boot":      {change: func(c *content) { c.Boot = "other" }, state: container.StatePaused},
		"of another engine":    {change: func(c *content) { c.Host = "unix:///other.sock" }, state: container.StatePaused, left: 1},
		"of an earlier run":    {change: func(c *content) { c.Containers[0].Started = "s0" }, state: container.StatePaused},
		"watched":              {lock: true, state: container.StatePaused, left: 1},
		"container is no more": {change: func(c *content) { c.Containers[0].ID = "gone" }, state: container.StatePaused},
	} {
		e, cfg := newEngine(t)
		e.Set("web", container.StatePaused)
		path := leave(t, cfg, c.change)
		if c.lock {
			file, err := os.Open(path)
			assert.NilError(t, err)
			defer file.Close()
			assert.NilError(t, unix.Flock(int(file.Fd()), unix.LOCK_EX))
		}
		names, err := MakeGood(t.Context(), cfg.API, cfg.Host, cfg.Dir)
		assert.NilError(t, err, name)
		assert.Equal(t, strings.Join(names, ","), map[bool]string{true: "web"}[c.state == container.StateRunning], name)
		assert.Equal(t, e.State("web"), c.state, name)
		assert.Equal(t, e.State("held"), container.StatePaused, name)
		assert.Equal(t, len(records(t, cfg.Dir)), c.left, name)
	}
}

func TestMakeGoodOfNothingAndOfDamage(t *testing.T) {
	_, cfg := newEngine(t)
	names, err := MakeGood(t.Context(), cfg.API, cfg.Host, cfg.Dir)
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0)

	assert.NilError(t, os.Mkdir(cfg.Dir, 0o700))
	assert.NilError(t, os.WriteFile(filepath.Join(cfg.Dir, "a.json"), []byte("hello\n"), 0o600))
	fresh, old := filepath.Join(cfg.Dir, newPrefix+"1"), filepath.Join(cfg.Dir, newPrefix+"2")
	for _, path := range []string{fresh, old} {
		assert.NilError(t, os.WriteFile(path, nil, 0o600))
	}
	assert.NilError(t, os.Chtimes(old, time.Time{}, time.Now().Add(-time.Hour)))
	_, err = MakeGood(t.Context(), cfg.API, cfg.Host, cfg.Dir)
	assert.ErrorContains(t, err, "a.json: not a list of paused containers")
	assert.DeepEqual(t, records(t, cfg.Dir), []string{fresh, filepath.Join(cfg.Dir, "a.json")})
}

// What was written is read again, and no text makes the reader panic.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"Volume":"v","Host":"h","Boot":"b","Containers":[{"ID":"a"},{"ID":"b"}]}` + "\n" + `{"Spared":"a"}` + "\n"))
	f.Add([]byte("{}\n{\"Sp"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, notes, err := parse(text)
		if err != nil {
			return
		}
		r := record{content: c, notes: notes}
		for _, held := range r.held() {
			assert.Assert(t, !notes[note{Spared: held.ID}])
		}
	})
}
