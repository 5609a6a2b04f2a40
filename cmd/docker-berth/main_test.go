package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/quiesce/enginetest"
)

// asCommand lets the test's binary be docker-berth.
const asCommand = "BERTH_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// A daemon makes snapshots when it is told to.
type daemon struct {
	control.VolumeAdmin // what no test here needs
	began               chan struct{}
	proceed             chan struct{}
	ended               chan error
	removed             chan control.SnapshotRef
	// forBackup is what was said of the snapshot.
	forBackup bool
	// backup is what the daemon answers to a request for one.
	backup func(control.BackupRequest) (control.Backup, error)
	added  chan control.TargetSpec
}

func (d *daemon) Volume(_ context.Context, name string) (control.Volume, error) {
	return control.Volume{Name: name}, nil
}

func (d *daemon) Volumes(context.Context) ([]control.Volume, error) { return nil, nil }

func (d *daemon) CreateSnapshot(ctx context.Context, req control.SnapshotRequest, _ func(control.Progress)) (control.Snapshot, error) {
	d.forBackup = req.ForBackup
	close(d.began)
	select {
	case <-d.proceed:
	case <-ctx.Done():
	}
	d.ended <- ctx.Err()
	return control.Snapshot{Volume: req.Volume, Name: "s1"}, ctx.Err()
}

func (d *daemon) RemoveSnapshot(_ context.Context, ref control.SnapshotRef, _ func(control.Progress)) error {
	d.removed <- ref
	return nil
}

// A scene is docker-berth as a process, between an engine and a daemon.
type scene struct {
	t      *testing.T
	engine *enginetest.Engine
	daemon *daemon
	socket string
	dir    string
}

func newScene(t *testing.T) *scene {
	t.Helper()
	s := &scene{
		t: t, socket: filepath.Join(t.TempDir(), "berth.sock"), dir: t.TempDir(),
		engine: enginetest.New(t,
			enginetest.Container{ID: "db", State: container.StateRunning, Volumes: []string{"v"}, Started: "s1"},
			enginetest.Container{ID: "held", State: container.StatePaused, Volumes: []string{"v"}, Started: "s2"},
			enginetest.Container{ID: "late", State: container.StateExited, Volumes: []string{"v"}, Started: "s3"},
		),
		daemon: &daemon{began: make(chan struct{}), proceed: make(chan struct{}), ended: make(chan error, 1), removed: make(chan control.SnapshotRef, 1), added: make(chan control.TargetSpec, 1)},
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	server := control.New(control.Config{Info: control.Info{Services: []control.Service{{Name: control.VolumeService}}}, Log: logrus.NewEntry(log)})
	server.SetVolumes(s.daemon)
	l, err := net.Listen("unix", s.socket)
	assert.NilError(t, err)
	h := &http.Server{Handler: server, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = h.Serve(l) }()
	t.Cleanup(func() {
		assert.Check(t, h.Close())
		<-done
	})
	return s
}

// A process is a command that runs.
type process struct {
	*exec.Cmd
	out, err bytes.Buffer
}

func (s *scene) command(args ...string) *exec.Cmd {
	c := exec.CommandContext(s.t.Context(), "/proc/self/exe", append([]string{"--socket", s.socket}, args...)...)
	c.Env = append(os.Environ(), asCommand+"=1", "DOCKER_HOST="+s.engine.Host, "DOCKER_CONTEXT=", "DOCKER_CONFIG="+s.dir, "XDG_STATE_HOME="+s.dir)
	return c
}

func (s *scene) start(args ...string) *process {
	s.t.Helper()
	p := &process{Cmd: s.command(args...)}
	p.Stdout, p.Stderr = &p.out, &p.err
	assert.NilError(s.t, p.Start())
	s.t.Cleanup(func() { _ = p.Process.Kill() }) // an error is that it has ended
	return p
}

// pause starts a snapshot and waits until the containers stand still for it.
func (s *scene) pause(args ...string) *process {
	s.t.Helper()
	return s.pauseFor(append([]string{"snapshot", "create", "v", "--pause"}, args...)...)
}

// pauseFor starts a command that makes a snapshot and waits until the containers stand
// still for it.
func (s *scene) pauseFor(args ...string) *process {
	s.t.Helper()
	p := s.start(args...)
	select {
	case <-s.daemon.began:
	case <-time.After(time.Minute):
		s.t.Fatalf("no snapshot was asked for: %s", &p.err)
	}
	assert.Equal(s.t, s.engine.State("db"), container.StatePaused)
	return p
}

// watchdog is the process that watches p.
func (s *scene) watchdog(p *process) int {
	s.t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	assert.NilError(s.t, err)
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended meanwhile
		}
		_, rest, _ := strings.Cut(string(text), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[1] == strconv.Itoa(p.Process.Pid) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			assert.NilError(s.t, err)
			return pid
		}
	}
	s.t.Fatal("nobody watches the command")
	return 0
}

// unwatched waits until the kernel has taken the locks of who was killed.
func (s *scene) unwatched() {
	s.t.Helper()
	files, err := filepath.Glob(filepath.Join(s.dir, "docker-berth", "paused", "*"))
	assert.NilError(s.t, err)
	assert.Equal(s.t, len(files), 1)
	file, err := os.Open(files[0])
	assert.NilError(s.t, err)
	assert.NilError(s.t, unix.Flock(int(file.Fd()), unix.LOCK_EX))
	assert.NilError(s.t, file.Close())
}

// settled checks that all is as before, with nothing left.
func (s *scene) settled() {
	s.t.Helper()
	s.engine.Await(s.t, "db", container.StateRunning)
	assert.Equal(s.t, s.engine.State("held"), container.StatePaused)
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		files, err := filepath.Glob(filepath.Join(s.dir, "docker-berth", "paused", "*"))
		assert.NilError(s.t, err)
		if len(files) == 0 {
			break
		}
		assert.Assert(s.t, time.Now().Before(end), "%v is still there", files)
	}
	assert.DeepEqual(s.t, s.engine.Calls(), []string{"pause db", "unpause db"})
}

func TestPausedSnapshot(t *testing.T) {
	s := newScene(t)
	p := s.pause()
	dog := s.watchdog(p)
	close(s.daemon.proceed)
	assert.NilError(t, p.Wait(), "%s", &p.err)
	assert.Equal(t, p.out.String(), "v@s1\n")
	assert.Equal(t, p.err.String(), "")
	s.settled()
	assert.ErrorIs(t, unix.Kill(dog, 0), unix.ESRCH, "the watchdog goes on")
}

func TestKilledCommandLeavesNothingPaused(t *testing.T) {
	s := newScene(t)
	p := s.pause()
	assert.NilError(t, p.Process.Kill())
	_ = p.Wait() // it was killed
	s.settled()
	assert.ErrorIs(t, <-s.daemon.ended, context.Canceled, "the daemon makes a snapshot for nobody")
}

// What both of them leave is made good by the next command.
func TestKilledWithItsWatchdog(t *testing.T) {
	s := newScene(t)
	p := s.pause()
	assert.NilError(t, unix.Kill(s.watchdog(p), unix.SIGKILL))
	assert.NilError(t, p.Process.Kill())
	_ = p.Wait() // it was killed
	assert.ErrorIs(t, <-s.daemon.ended, context.Canceled)
	assert.Equal(t, s.engine.State("db"), container.StatePaused)
	s.unwatched()
	next := s.start("volume", "ls", "-q")
	assert.NilError(t, next.Wait(), "%s", &next.err)
	assert.Equal(t, next.err.String(), "WARNING: db was paused by a command that was killed, and goes on now\n")
	s.settled()
}

// A watchdog that was killed makes the snapshot worth nothing: nobody can tell.
func TestKilledWatchdog(t *testing.T) {
	s := newScene(t)
	p := s.pause()
	assert.NilError(t, unix.Kill(s.watchdog(p), unix.SIGKILL))
	close(s.daemon.proceed)
	assert.Assert(t, p.Wait() != nil)
	assert.Equal(t, <-s.daemon.removed, control.SnapshotRef{Volume: "v", Name: "s1"})
	s.settled()
}

func TestInterruptedSnapshot(t *testing.T) {
	for _, sig := range []os.Signal{os.Interrupt, unix.SIGTERM, unix.SIGHUP} {
		s := newScene(t)
		p := s.pause()
		assert.NilError(t, p.Process.Signal(sig))
		assert.Assert(t, p.Wait() != nil)
		assert.Equal(t, p.ProcessState.ExitCode(), 1)
		assert.Equal(t, p.out.String()+p.err.String(), "interrupted: what was begun is undone, or completed where it cannot be\n")
		assert.ErrorIs(t, <-s.daemon.ended, context.Canceled)
		s.settled()
	}
}

func TestSnapshotThatTakesTooLong(t *testing.T) {
	s := newScene(t)
	p := s.pause("--pause-max", "1s")
	assert.Assert(t, p.Wait() != nil)
	assert.Equal(t, p.err.String(), "the snapshot was not done within --pause-max 1s: db goes on, and there is no snapshot\n")
	assert.ErrorIs(t, <-s.daemon.ended, context.Canceled)
	s.settled()
}

func TestSnapshotDuringWhichAContainerStarts(t *testing.T) {
	s := newScene(t)
	p := s.pause()
	s.engine.Set("late", container.StateRunning)
	close(s.daemon.proceed)
	assert.Assert(t, p.Wait() != nil)
	assert.Equal(t, p.out.String(), "")
	assert.Equal(t, p.err.String(), "somebody has started or unpaused late meanwhile; the snapshot was removed again\n")
	assert.Equal(t, <-s.daemon.removed, control.SnapshotRef{Volume: "v", Name: "s1"})
	s.settled()
}
