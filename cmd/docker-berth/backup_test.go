package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/control"
)

func (d *daemon) CreateBackup(_ context.Context, req control.BackupRequest, _ func(control.Progress)) (control.Backup, error) {
	return d.backup(req)
}

func (d *daemon) AddTarget(_ context.Context, spec control.TargetSpec, _ func(control.Progress)) (control.TargetReport, error) {
	d.added <- spec
	return control.TargetReport{Target: control.Target{Name: spec.Name, Repository: spec.Repository}, Made: true}, nil
}

// Containers stand still for the snapshot and go on while that is backed up. It is gone
// afterwards, whatever became of the backup.
func TestPausedBackup(t *testing.T) {
	for _, c := range []struct {
		made     control.Backup
		fails    error
		out, err string
		status   int
	}{
		{control.Backup{Reference: "nas/v@1"}, nil, "nas/v@1\n", "", 0},
		{
			control.Backup{Reference: "nas/v@1", Incomplete: true, Missing: []string{"data/a: gone"}}, nil, "nas/v@1\n",
			"data/a: gone\nbackup nas/v@1 is incomplete: the files above are missing, and maybe others\n", 3,
		},
		{control.Backup{}, errors.New("no space"), "", "no space\n", 1},
	} {
		s := newScene(t)
		var asked control.BackupRequest
		var state string
		s.daemon.backup = func(req control.BackupRequest) (control.Backup, error) {
			asked, state = req, s.engine.State("db")
			return c.made, c.fails
		}
		p := s.pauseFor("backup", "create", "v", "--pause", "--target", "nas")
		close(s.daemon.proceed)
		_ = p.Wait() // its status is looked at
		assert.Equal(t, p.ProcessState.ExitCode(), c.status)
		assert.Equal(t, p.out.String(), c.out)
		assert.Equal(t, p.err.String(), c.err)
		assert.Equal(t, state, container.StateRunning)
		assert.Assert(t, s.daemon.forBackup)
		assert.DeepEqual(t, asked, control.BackupRequest{Volume: "v", Snapshot: "s1", Target: "nas"})
		assert.Equal(t, <-s.daemon.removed, control.SnapshotRef{Volume: "v", Name: "s1"})
		s.settled()
	}
}

// A keyboard is the other end of a process's terminal.
type keyboard struct {
	t      *testing.T
	master *os.File
	p      *exec.Cmd
	mu     sync.Mutex // guards screen
	screen bytes.Buffer
}

// Write shows what the process prints.
func (k *keyboard) Write(text []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.screen.Write(text)
}

func (k *keyboard) shown() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.screen.String()
}

// onKeyboard starts a command whose input is a terminal.
func (s *scene) onKeyboard(args ...string) *keyboard {
	s.t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	assert.NilError(s.t, err)
	s.t.Cleanup(func() { master.Close() })
	assert.NilError(s.t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	assert.NilError(s.t, err)
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	assert.NilError(s.t, err)
	defer slave.Close()
	k := &keyboard{t: s.t, master: master}
	k.p = s.command(args...)
	k.p.Stdin, k.p.Stdout, k.p.Stderr = slave, k, k
	assert.NilError(s.t, k.p.Start())
	s.t.Cleanup(func() { _ = k.p.Process.Kill() }) // an error is that it has ended
	return k
}

// await waits until a prompt is shown and the terminal shows nothing that is typed.
func (k *keyboard) await(prompt string) {
	k.t.Helper()
	for end := time.Now().Add(time.Minute); !strings.HasSuffix(k.shown(), prompt) || k.echoes(); time.Sleep(time.Millisecond) {
		assert.Assert(k.t, time.Now().Before(end), "%q is shown", k.shown())
	}
}

func (k *keyboard) echoes() bool {
	k.t.Helper()
	state, err := unix.IoctlGetTermios(int(k.master.Fd()), unix.TCGETS)
	assert.NilError(k.t, err)
	return state.Lflag&unix.ECHO != 0
}

func (k *keyboard) typed(text string) {
	k.t.Helper()
	_, err := io.WriteString(k.master, text)
	assert.NilError(k.t, err)
}

const (
	prompt = "Password of the repository: "
	again  = "The same again: "
)

// A password that is typed twice is the target's, and is not to be seen.
func TestPasswordIsAskedForTwice(t *testing.T) {
	for _, c := range []struct {
		second, shown string
		status        int
	}{
		{"ge heim ", "Made a repository at /r.\nnew\n", 0},
		{"other", "these were two different passwords\n", 1},
	} {
		s := newScene(t)
		k := s.onKeyboard("target", "add", "new", "/r")
		k.await(prompt)
		k.typed("ge heim \n")
		k.await(again)
		k.typed(c.second + "\n")
		_ = k.p.Wait() // its status is looked at
		assert.Equal(t, k.p.ProcessState.ExitCode(), c.status)
		assert.Equal(t, k.shown(), prompt+"\n"+again+"\n"+c.shown)
		if c.status == 0 {
			spec := <-s.daemon.added
			assert.Equal(t, spec.Password, "ge heim ")
		}
		assert.Equal(t, len(s.daemon.added), 0)
	}
}

func TestInterruptedPromptLeavesATerminalThatShows(t *testing.T) {
	s := newScene(t)
	k := s.onKeyboard("target", "add", "new", "/r")
	k.await(prompt)
	assert.NilError(t, k.p.Process.Signal(os.Interrupt))
	assert.Assert(t, k.p.Wait() != nil)
	assert.Equal(t, k.p.ProcessState.ExitCode(), 1)
	assert.Assert(t, k.echoes())
	assert.Assert(t, strings.HasPrefix(k.shown(), prompt+"\ninterrupted"), k.shown())
}
