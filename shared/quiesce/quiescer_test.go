package quiesce

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/quiesce/enginetest"
)

// running is a container of volume v that runs.
func running(id string, labels ...string) enginetest.Container {
	c := enginetest.Container{ID: id, State: container.StateRunning, Volumes: []string{"v"}, Started: "s", Labels: map[string]string{}}
	for _, label := range labels {
		name, value, _ := strings.Cut(label, "=")
		c.Labels[labelPrefix+name] = value
	}
	return c
}

func newQuiescer(t *testing.T, containers ...enginetest.Container) (*enginetest.Engine, *Quiescer) {
	t.Helper()
	e := enginetest.New(t, containers...)
	log := logrus.New()
	log.SetOutput(io.Discard)
	return e, New(strings.TrimPrefix(e.Host, "unix://"), filepath.Join(t.TempDir(), "quiesced"), logrus.NewEntry(log))
}

func TestHooksThenStopsThenPausesAndBack(t *testing.T) {
	e, q := newQuiescer(t,
		running("app", "pause=true"),
		running("db", "pre=echo locked", "post=echo unlocked"),
		running("job", "stop=true", "pre=true"),
		enginetest.Container{ID: "old", State: container.StateExited, Volumes: []string{"v"}, Labels: map[string]string{LabelPre: "exit 9"}},
		enginetest.Container{ID: "reader", State: container.StateRunning, Volumes: []string{"v"}, ReadOnly: true},
	)
	rest, err := q.Quiesce(t.Context(), "v")
	assert.NilError(t, err)
	assert.DeepEqual(t, e.Calls(), []string{"exec db echo locked", "exec job true", "stop job", "pause app"})
	assert.Equal(t, rest.Level(), control.ConsistencyPaused) // app was not asked
	assert.DeepEqual(t, rest.Did(), []string{"app: paused", "db: hook", "job: hook, stopped"})
	assert.Equal(t, len(records(t, q.dir)), 1)
	left := time.Until(rest.Until())
	assert.Assert(t, left > 20*time.Second && left <= defaultTimeout, "%s", left)
	assert.NilError(t, rest.Still(t.Context()))
	assert.NilError(t, rest.End(t.Context()))
	assert.DeepEqual(t, e.Calls()[4:], []string{"unpause app", "start job", "exec db echo unlocked"})
	assert.Equal(t, len(records(t, q.dir)), 0)
}

func TestLevels(t *testing.T) {
	for name, c := range map[string]struct {
		containers []enginetest.Container
		want       control.Consistency
	}{
		"a hook":                         {[]enginetest.Container{running("a", "pre=true")}, control.ConsistencyQuiesced},
		"a hook for after only":          {[]enginetest.Container{running("a", "post=true")}, ""},
		"a stop":                         {[]enginetest.Container{running("a", "stop=1")}, control.ConsistencyQuiesced},
		"a hook and a pause":             {[]enginetest.Container{running("a", "pre=true", "pause=true")}, control.ConsistencyQuiesced},
		"a pause":                        {[]enginetest.Container{running("a", "pause=true")}, control.ConsistencyPaused},
		"one that nobody looks after":    {[]enginetest.Container{running("a", "stop=true"), running("b")}, ""},
		"one for another of its volumes": {[]enginetest.Container{running("a", "stop=true"), running("b", "pause=true", "volumes=w")}, ""},
		"one that somebody has paused": {[]enginetest.Container{running("a", "stop=true"), {
			ID: "b", State: container.StatePaused, Volumes: []string{"v"}, Labels: map[string]string{LabelStop: "true"},
		}}, control.ConsistencyPaused},
	} {
		_, q := newQuiescer(t, c.containers...)
		rest, err := q.Quiesce(t.Context(), "v")
		assert.NilError(t, err, name)
		assert.Equal(t, rest.Level(), c.want, name)
		assert.NilError(t, rest.End(t.Context()), name)
	}
}

func TestNothingToBeDone(t *testing.T) {
	e, q := newQuiescer(t, running("a"), running("b", "pre=exit 9", "volumes=w"))
	for range 2 { // nobody waits for its end
		rest, err := q.Quiesce(t.Context(), "v")
		assert.NilError(t, err)
		assert.Assert(t, rest == nil)
	}
	q.socket = "/dev/null"
	rest, err := q.Quiesce(t.Context(), "v")
	assert.NilError(t, err)
	assert.Assert(t, rest == nil)
	q.socket = filepath.Join(t.TempDir(), "docker.sock")
	_, err = q.Quiesce(t.Context(), "v")
	assert.ErrorContains(t, err, "Docker's socket")
	assert.Equal(t, len(e.Calls()), 0)
}

func TestSocketInADirectory(t *testing.T) {
	e, q := newQuiescer(t, running("a", "pause=true"))
	q.socket = filepath.Dir(q.socket)
	rest, err := q.Quiesce(t.Context(), "v")
	assert.NilError(t, err)
	assert.NilError(t, rest.End(t.Context()))
	assert.DeepEqual(t, e.Calls(), []string{"pause a", "unpause a"})
}

func TestHookThatFailsIsUndone(t *testing.T) {
	e, q := newQuiescer(t,
		running("a", "pre=true", "post=echo a", "pause=true"),
		running("b", "pre=echo one; echo no disk >&2; exit 3", "post=echo b"),
		running("c", "pre=true", "post=echo c"),
	)
	_, err := q.Quiesce(t.Context(), "v")
	assert.ErrorContains(t, err, "container b: hook berth.backup.pre: exit status 3: no disk")
	assert.DeepEqual(t, e.Calls()[2:], []string{"exec a echo a", "exec b echo b"})
	assert.Equal(t, len(records(t, q.dir)), 0)
}

func TestHookThatTakesTooLongIsKilled(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	_, q := newQuiescer(t, running("a", "timeout=1s", "pre=echo $$ > "+pids+"; sleep 3600 & echo $! >> "+pids+"; wait"))
	_, err := q.Quiesce(t.Context(), "v")
	assert.ErrorContains(t, err, "it has not ended within 1s")
	text, err := os.ReadFile(pids)
	assert.NilError(t, err)
	assert.Equal(t, len(strings.Fields(string(text))), 2)
	for _, pid := range strings.Fields(string(text)) {
		for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			status, err := os.ReadFile("/proc/" + pid + "/stat")
			if err != nil || strings.Contains(string(status), ") Z ") {
				break
			}
			assert.Assert(t, time.Now().Before(end), "%s", status)
		}
	}
}

// What a hook leaves running does not keep the others waiting.
func TestHookThatLeavesAChild(t *testing.T) {
	_, q := newQuiescer(t, running("a", "timeout=1m", "pre=sleep 20 & echo $!"))
	begin := time.Now()
	rest, err := q.Quiesce(t.Context(), "v")
	assert.NilError(t, err)
	assert.NilError(t, rest.End(t.Context()))
	assert.Assert(t, time.Since(begin) < 19*time.Second)
}

func TestHookThatFailsAfterwardsIsNamed(t *testing.T) {
	_, q := newQuiescer(t, running("a", "stop=true"), running("b", "post=echo stays locked; exit 1"))
	rest, err := q.Quiesce(t.Context(), "v")
	assert.NilError(t, err)
	assert.ErrorContains(t, rest.End(t.Context()), "container b: hook berth.backup.post: exit status 1: stays locked")
	assert.Equal(t, len(records(t, q.dir)), 0)
}

func TestWhatCannotBeBroughtToRest(t *testing.T) {
	restarting := running("a", "pre=true")
	restarting.State = container.StateRestarting
	paused := running("a", "pre=true")
	paused.State = container.StatePaused
	gone := running("a", "stop=true")
	gone.AutoRemove = true
	for want, c := range map[string]enginetest.Container{
		"it cannot be brought to rest now":               restarting,
		"container a is paused: its hooks cannot be run": paused,
		"it was started with --rm":                       gone,
		"container a: label berth.backup.stop=\"maybe\"": running("a", "stop=maybe"),
	} {
		e, q := newQuiescer(t, c)
		_, err := q.Quiesce(t.Context(), "v")
		assert.ErrorContains(t, err, want)
		assert.Equal(t, len(e.Calls()), 0)
	}
}

func TestContainerThatDockerDoesNotStop(t *testing.T) {
	e, q := newQuiescer(t, running("a", "stop=true", "post=true"))
	e.Before(func(string) error { return errors.New("cannot be killed") })
	_, err := q.Quiesce(t.Context(), "v")
	assert.ErrorContains(t, err, "stop container a")
	assert.DeepEqual(t, e.Calls(), []string{"exec a true"})
	assert.Equal(t, len(records(t, q.dir)), 0)
}

func TestRestThatIsDisturbed(t *testing.T) {
	for name, disturb := range map[string]func(*enginetest.Engine){
		"web":  func(e *enginetest.Engine) { e.Set("web", container.StateRunning) },
		"job":  func(e *enginetest.Engine) { e.Restart("job") },
		"late": func(e *enginetest.Engine) { e.Restart("late") },
	} {
		late := running("late", "pre=true")
		late.State = container.StateExited
		e, q := newQuiescer(t, running("web", "pause=true"), running("job", "stop=true"), late)
		rest, err := q.Quiesce(t.Context(), "v")
		assert.NilError(t, err)
		disturb(e)
		err = rest.Still(t.Context())
		assert.Equal(t, fault.Kind(err), "conflict")
		assert.ErrorContains(t, err, "started or unpaused "+name)
		assert.NilError(t, rest.End(t.Context()))
	}
}

func TestOneVolumeAtATime(t *testing.T) {
	e, q := newQuiescer(t, running("a", "pause=true"))
	rest, err := q.Quiesce(t.Context(), "v")
	assert.NilError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = q.Quiesce(ctx, "v")
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	assert.NilError(t, rest.End(t.Context()))
	assert.DeepEqual(t, e.Calls(), []string{"pause a", "unpause a"})
}

// A daemon that was killed with its watchdog is started again.
func TestWhatAKilledDaemonLeftIsMadeGood(t *testing.T) {
	for boot, want := range map[string][]string{
		"":      {"unpause app", "start job", "exec db echo unlocked"},
		"other": {"start job", "exec db echo unlocked"},
	} {
		e, q := newQuiescer(t, running("app", "pause=true"), running("db", "post=echo unlocked"), running("job", "stop=true"))
		rest, err := q.Quiesce(t.Context(), "v")
		assert.NilError(t, err)
		assert.NilError(t, unix.Kill(rest.child.Process.Pid, unix.SIGKILL))
		assert.ErrorContains(t, rest.child.Wait(), "killed")
		assert.NilError(t, rest.record.close())
		rest.done()
		if boot != "" {
			text, err := os.ReadFile(rest.record.path)
			assert.NilError(t, err)
			now, err := bootID()
			assert.NilError(t, err)
			assert.NilError(t, os.WriteFile(rest.record.path, []byte(strings.Replace(string(text), now, boot, 1)), 0o600))
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); q.Run(ctx) }()
		awaitNone(t, q.dir)
		cancel()
		<-ended
		assert.DeepEqual(t, e.Calls()[2:], want)
	}
}

// A stop that was under way when its daemon was killed may have no effect yet.
func TestStopThatWasUnderWayIsUndone(t *testing.T) {
	e, q := newQuiescer(t, running("job", "stop=true"), running("other", "stop=true"))
	r, err := newRecord(Config{Dir: q.dir, Host: e.Host}, []target{
		{ID: "job", Name: "job", Started: "s", Way: wayStop}, {ID: "other", Name: "other", Started: "s", Way: wayStop},
	})
	assert.NilError(t, err)
	assert.NilError(t, r.note(note{Stopping: "job"}))
	assert.NilError(t, r.close())
	assert.Assert(t, q.tend(t.Context()))
	assert.DeepEqual(t, e.Calls(), []string{"stop job", "start job"})
}

// The watchdog does all of it too.
func TestWatchdogUndoesWhatAKilledDaemonDid(t *testing.T) {
	e, q := newQuiescer(t, running("app", "pause=true"), running("db", "post=echo unlocked"), running("job", "stop=true"))
	rest, err := q.Quiesce(t.Context(), "v")
	assert.NilError(t, err)
	assert.NilError(t, rest.words.Close()) // as the kernel does
	awaitNone(t, q.dir)
	assert.DeepEqual(t, e.Calls()[2:], []string{"unpause app", "start job", "exec db echo unlocked"})
	assert.NilError(t, rest.child.Wait())
}

func TestRestThatLastsTooLong(t *testing.T) {
	e, q := newQuiescer(t, running("a", "pause=true", "post=echo on", "timeout=1s"))
	rest, err := q.Quiesce(t.Context(), "v")
	assert.NilError(t, err)
	e.Await(t, "a", container.StateRunning)
	assert.ErrorContains(t, rest.Still(t.Context()), "stood still for 1s and were let go")
	assert.NilError(t, rest.End(t.Context()))
	assert.DeepEqual(t, e.Calls(), []string{"pause a", "unpause a", "exec a echo on"})
}
