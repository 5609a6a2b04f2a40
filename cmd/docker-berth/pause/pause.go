// Package pause lets the containers that use a volume stand still for as long as a
// snapshot takes, and sees to it that they go on afterwards, whatever happens.
//
// What is to be paused is written to a file first. A child process in a session of its
// own watches: it lets the containers go when the one that paused them is gone, or
// when they have stood still for too long. What is left when both were killed is in the
// file, and the next command makes it good. A file belongs to whoever has its lock
// (flock(2)), which the two processes share.
//
// Containers that somebody else has paused are left as they are.
package pause

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/moby/sys/reexec"

	"github.com/berth-plugin/berth/cmd/docker-berth/engine"
	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// DefaultMax is how long containers stand still at most.
	DefaultMax = 30 * time.Second
	// LeastMax is the shortest time that a user may want instead.
	LeastMax = time.Second
	// MostMax is the longest one.
	MostMax = 10 * time.Minute
	// callTime bounds one call of Docker that must not be left out.
	callTime = 10 * time.Second
	// readyTime is what the watchdog gets to start.
	readyTime = 15 * time.Second
)

// A Config says what is to stand still.
type Config struct {
	API engine.API
	// Host is the engine's address, for the watchdog: unix://PATH.
	Host string
	// Dir is where the files are; it is made. See Dir.
	Dir string
	// Volume whose containers are paused.
	Volume string
	// Max is the longest time, for the watchdog.
	Max time.Duration
}

// A Hold is containers that stand still until End.
type Hold struct {
	cfg    Config
	record *record
	// until is when the watchdog lets them go; zero without one.
	until time.Time
	child *exec.Cmd
	words io.WriteCloser
	said  io.ReadCloser
	heard *bufio.Reader
	// doubt says that Docker may still be at pausing a container: its answer is missing.
	doubt bool
}

// Begin pauses the containers that run and use the volume. The caller ends the Hold,
// which has none when all of them stand still already. After an error nothing is
// paused. It is a conflict when a container is just being started again.
func Begin(ctx context.Context, cfg Config) (*Hold, error) {
	h := &Hold{cfg: cfg}
	targets, err := h.running(ctx)
	if err != nil || len(targets) == 0 {
		return h, err
	}
	h.record, err = newRecord(cfg, targets)
	if err != nil {
		return nil, err
	}
	if err := h.watch(); err != nil {
		return nil, errors.Join(err, h.End(ctx))
	}
	h.until = time.Now().Add(cfg.Max)
	for _, c := range targets {
		err := ctx.Err()
		if err != nil {
			return nil, errors.Join(err, h.End(ctx))
		}
		if err = pauseOne(ctx, cfg.API, c.ID); err == nil {
			continue
		}
		if still, stillErr := stands(ctx, cfg.API, c.ID); stillErr == nil && still {
			// Whoever paused it meanwhile is not this.
			if err = h.record.spare(c.ID); err == nil {
				continue
			}
		}
		h.doubt = true
		return nil, errors.Join(fmt.Errorf("pause container %s: %w", c.Name, err), h.End(ctx))
	}
	return h, nil
}

// pauseOne waits for Docker's answer, also when ctx ends: Docker would go on, and pause
// the container after it was found not to be.
func pauseOne(ctx context.Context, api engine.API, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTime)
	defer cancel()
	return api.ContainerPause(ctx, id)
}

// running returns the containers that use the volume and do not stand still.
func (h *Hold) running(ctx context.Context) ([]paused, error) {
	users, err := engine.Users(ctx, h.cfg.API)
	if err != nil {
		return nil, err
	}
	var targets []paused
	for _, u := range users[h.cfg.Volume] {
		switch u.State {
		case container.StateRestarting:
			return nil, fault.Conflict("container %s is being restarted: it cannot be paused now", u.Name)
		case container.StateRunning:
		default:
			continue
		}
		c, err := h.cfg.API.ContainerInspect(ctx, u.ID)
		if err != nil {
			return nil, fmt.Errorf("inspect container %s: %w", u.Name, err)
		}
		if c.ContainerJSONBase != nil && c.State != nil && c.State.Running && !c.State.Paused {
			targets = append(targets, paused{ID: u.ID, Name: u.Name, Started: c.State.StartedAt})
		}
	}
	return targets, nil
}

// stands reports whether a container does nothing: it is paused, or has no processes.
func stands(ctx context.Context, api engine.API, id string) (bool, error) {
	c, err := api.ContainerInspect(ctx, id)
	switch {
	case fault.Kind(err) == "notfound":
		return true, nil
	case err != nil:
		return false, err
	default:
		return c.ContainerJSONBase == nil || c.State == nil || !c.State.Running || c.State.Paused, nil
	}
}

// Names are those of the containers that Begin paused.
func (h *Hold) Names() []string {
	if h.record == nil {
		return nil
	}
	var names []string
	for _, c := range h.record.held() {
		names = append(names, c.Name)
	}
	return names
}

// Until is when what the containers are paused for has to be done: a little before the
// watchdog lets them go. It is zero when there are none.
func (h *Hold) Until() time.Time {
	if h.until.IsZero() {
		return time.Time{}
	}
	return h.until.Add(-min(h.cfg.Max/10, time.Second))
}

// Still tells whether all containers that use the volume have stood still since Begin.
// The error is a conflict that names what did not.
func (h *Hold) Still(ctx context.Context) error {
	if h.child != nil {
		word, err := "", error(nil)
		if time.Now().Before(h.until) {
			word, err = h.ask("still")
		}
		if err != nil || word != "still" {
			return fault.Conflict("the containers have stood still for %s and were let go", h.cfg.Max)
		}
	}
	targets, err := h.running(ctx)
	if err != nil {
		return err
	}
	if len(targets) > 0 {
		var names []string
		for _, c := range targets {
			names = append(names, c.Name)
		}
		return fault.Conflict("somebody has started or unpaused %s meanwhile", strings.Join(names, ", "))
	}
	return nil
}

// End lets the containers go, also when ctx has ended. The error names those that could
// not be; the watchdog goes on trying then. It is called once.
func (h *Hold) End(ctx context.Context) error {
	if h.record == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	var errs []error
	for _, c := range h.record.held() {
		if _, err := release(ctx, h.cfg.API, c); err != nil {
			errs = append(errs, fmt.Errorf("container %s is still paused: %w (docker unpause %s)", c.Name, err, c.Name))
		}
	}
	done := len(errs) == 0 && !h.doubt
	if done {
		if err := h.record.remove(); err != nil {
			errs = append(errs, err)
		}
	}
	if h.child != nil && done {
		_, _ = io.WriteString(h.words, "bye\n") // it may have gone already
		_ = h.words.Close()
		late := time.AfterFunc(callTime, func() { _ = h.child.Process.Kill() })
		_ = h.child.Wait() // its status says nothing
		late.Stop()
	} else if h.child != nil {
		_ = h.words.Close() // it takes over
	}
	return errors.Join(append(errs, h.record.close())...)
}

// release unpauses a container unless that is done, or it is not the same run of it any
// more. It reports whether it did.
func release(ctx context.Context, api engine.API, c paused) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	ours := func() (bool, error) {
		now, err := api.ContainerInspect(ctx, c.ID)
		if fault.Kind(err) == "notfound" {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		return now.ContainerJSONBase != nil && now.State != nil && now.State.Paused && now.State.StartedAt == c.Started, nil
	}
	held, err := ours()
	if err != nil || !held {
		return false, err
	}
	if err := api.ContainerUnpause(ctx, c.ID); err != nil {
		if held, lookErr := ours(); lookErr != nil || held {
			return false, err
		}
	}
	return true, nil
}

// watch starts the watchdog and waits until it watches.
func (h *Hold) watch() error {
	cmd := &exec.Cmd{
		Path: reexec.Self(), Args: []string{watchdogName, h.cfg.Host, h.record.path, h.cfg.Max.String()},
		Dir: "/", Env: os.Environ(), ExtraFiles: []*os.File{h.record.file},
		// Neither the terminal's signals nor its end are meant for it.
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	words, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("watchdog: %w", err)
	}
	said, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("watchdog: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the watchdog: %w", err)
	}
	h.child, h.words, h.said, h.heard = cmd, words, said, bufio.NewReader(said)
	late := time.AfterFunc(readyTime, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	line, err := h.heard.ReadString('\n')
	if err != nil {
		return fault.Unavailable("the watchdog did not start: %w", err)
	}
	if line = strings.TrimSpace(line); line != "ready" {
		return fault.Unavailable("the watchdog did not start: %s", line)
	}
	return nil
}

// ask says a word to the watchdog and returns its answer.
func (h *Hold) ask(word string) (string, error) {
	if _, err := io.WriteString(h.words, word+"\n"); err != nil {
		return "", err
	}
	if pipe, ok := h.said.(*os.File); ok {
		_ = pipe.SetReadDeadline(time.Now().Add(callTime)) // without one it waits for the watchdog's end
	}
	line, err := h.heard.ReadString('\n')
	return strings.TrimSpace(line), err
}
