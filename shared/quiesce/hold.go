package quiesce

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/reexec"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// DefaultMax is how long containers stand still at most.
	DefaultMax = 30 * time.Second
	// LeastMax is the shortest time that a user may want instead.
	LeastMax = time.Second
	// MostMax is the longest one.
	MostMax = 10 * time.Minute
	// readyTime is what the watchdog gets to start.
	readyTime = 15 * time.Second
)

// A Config says what is to be brought to rest.
type Config struct {
	API API
	// Host is the engine's address, for the watchdog: unix://PATH.
	Host string
	// Dir is where the files are; it is made.
	Dir string
	// Volume whose containers are meant.
	Volume string
	// ByLabels does what the containers' labels say. Otherwise all are paused.
	ByLabels bool
	// Max is the longest time that they stand still, for the watchdog. With ByLabels it
	// is the labels', and this is 0.
	Max time.Duration
}

// A Hold is containers that are at rest until End.
type Hold struct {
	cfg    Config
	record *record
	level  control.Consistency
	// until is when the watchdog lets them go; zero without one.
	until time.Time
	child *exec.Cmd
	words io.WriteCloser
	said  io.ReadCloser
	heard *bufio.Reader
	// doubt says that Docker may still be at pausing a container: its answer is missing.
	doubt bool
}

// Begin brings the containers to rest that run and use the volume: first the hooks of
// all, then stops, then pauses. The caller ends the Hold, which has none when there is
// nothing to be done. After an error everything is undone. It is a conflict when a
// container is just being started again.
func Begin(ctx context.Context, cfg Config) (*Hold, error) {
	h := &Hold{cfg: cfg}
	p, err := h.look(ctx)
	if err != nil || len(p.targets) == 0 {
		return h, err
	}
	h.level, h.cfg.Max = p.level, cmp.Or(cfg.Max, p.most())
	h.record, err = newRecord(h.cfg, p.targets)
	if err != nil {
		return nil, err
	}
	err = h.watch()
	if err == nil {
		err = h.rest(ctx, p.targets)
	}
	if err != nil {
		return nil, errors.Join(err, h.End(ctx))
	}
	return h, nil
}

// rest does what is to be done, in order.
func (h *Hold) rest(ctx context.Context, targets []target) error {
	if err := each(ctx, targets, h.tell); err != nil {
		return err
	}
	err := each(ctx, targets, func(ctx context.Context, c target) error {
		if c.Way != wayStop {
			return nil
		}
		if err := h.mark(); err != nil {
			return err
		}
		return h.stopOne(ctx, c)
	})
	if err != nil {
		return err
	}
	if err := h.mark(); err != nil {
		return err
	}
	return each(ctx, targets, func(ctx context.Context, c target) error {
		if c.Way != wayPause {
			return nil
		}
		return h.pauseOne(ctx, c)
	})
}

func each(ctx context.Context, targets []target, do func(context.Context, target) error) error {
	for _, c := range targets {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := do(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// mark begins the longest time anew.
func (h *Hold) mark() error {
	word, err := h.ask(sayWatch)
	if err != nil {
		return fault.Unavailable("the watchdog has gone: %w", err)
	}
	if word != sayStill {
		return fault.Unavailable("the watchdog says %q", word)
	}
	h.until = time.Now().Add(h.cfg.Max)
	return nil
}

// tell runs the hook for before the snapshot.
func (h *Hold) tell(ctx context.Context, c target) error {
	if c.Pre == "" && c.Post == "" {
		return nil
	}
	if err := h.record.note(note{Told: c.ID}); err != nil || c.Pre == "" {
		return err
	}
	if err := execute(ctx, h.cfg.API, c.ID, c.Pre, c.Timeout); err != nil {
		return hookError(c, LabelPre, err)
	}
	return nil
}

// stopOne waits for Docker's answer, also when ctx ends: Docker would go on.
func (h *Hold) stopOne(ctx context.Context, c target) error {
	if err := h.record.note(note{Stopping: c.ID}); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	err := stop(ctx, h.cfg.API, c)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("stop container %s: %w", c.Name, err)
	if still, stillErr := stands(ctx, h.cfg.API, c.ID); stillErr == nil && !still && !errors.Is(err, context.DeadlineExceeded) {
		return errors.Join(err, h.record.note(note{Spared: c.ID})) // Docker has refused
	}
	return err
}

// pauseOne waits for Docker's answer, also when ctx ends: Docker would go on, and pause
// the container after it was found not to be.
func (h *Hold) pauseOne(ctx context.Context, c target) error {
	ctx = context.WithoutCancel(ctx)
	within, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	err := h.cfg.API.ContainerPause(within, c.ID)
	if err == nil {
		return nil
	}
	if still, stillErr := stands(ctx, h.cfg.API, c.ID); stillErr == nil && still {
		// Whoever paused it meanwhile is not this.
		if err = h.record.note(note{Spared: c.ID}); err == nil {
			return nil
		}
	}
	h.doubt = true
	return fmt.Errorf("pause container %s: %w", c.Name, err)
}

// Names are those of the containers that stand still.
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

// Level is what a snapshot is worth for it, whatever the engine; "" is no more than
// without.
func (h *Hold) Level() control.Consistency { return h.level }

// Did says what was done, as "db: hook, paused".
func (h *Hold) Did() (did []string) {
	if h.record == nil {
		return nil
	}
	for _, c := range h.record.content.Containers {
		var words []string
		if c.Pre != "" {
			words = append(words, "hook")
		}
		switch c.Way {
		case wayPause:
			words = append(words, "paused")
		case wayStop:
			words = append(words, "stopped")
		case wayGo:
		}
		if len(words) > 0 {
			did = append(did, c.Name+": "+strings.Join(words, ", "))
		}
	}
	return did
}

// Until is when what the containers are at rest for has to be done: a little before the
// watchdog lets them go. It is zero when there are none.
func (h *Hold) Until() time.Time {
	if h.until.IsZero() {
		return time.Time{}
	}
	return h.until.Add(-min(h.cfg.Max/10, time.Second))
}

// Still tells whether all containers that Level, or the command line, counts on have
// been at rest since Begin. The error is a conflict that names what was not.
func (h *Hold) Still(ctx context.Context) error {
	if h.child != nil {
		word, err := "", error(nil)
		if time.Now().Before(h.until) {
			word, err = h.ask(sayAsk)
		}
		if err != nil || word != sayStill {
			return fault.Conflict("the containers have stood still for %s and were let go", h.cfg.Max)
		}
	}
	names, err := h.stirring(ctx)
	if err != nil {
		return err
	}
	if len(names) > 0 {
		return fault.Conflict("somebody has started or unpaused %s meanwhile", strings.Join(names, ", "))
	}
	return nil
}

// stirring are the containers that run now and should not.
func (h *Hold) stirring(ctx context.Context) (names []string, _ error) {
	users, err := h.users(ctx)
	if err != nil {
		return nil, err
	}
	for _, u := range users {
		if !h.minds(u) {
			continue
		}
		still, err := stands(ctx, h.cfg.API, u.ID)
		if err != nil {
			return nil, fmt.Errorf("inspect container %s: %w", u.Name, err)
		}
		if !still {
			names = append(names, u.Name)
		}
	}
	return names, nil
}

// minds tells whether a container has to stand still.
func (h *Hold) minds(u User) bool {
	if !u.Running() {
		return false
	}
	if !h.cfg.ByLabels {
		return true
	}
	if h.record != nil {
		for _, c := range h.record.content.Containers {
			if c.ID == u.ID && (c.Way != wayGo || c.Pre != "") {
				return c.Way != wayGo
			}
		}
	}
	return h.level != "" && !u.ReadOnly
}

// End lets the containers go, also when ctx has ended, and runs the hooks for after the
// snapshot. The error names those that could not be let go; the watchdog goes on trying
// then. It names hooks that failed too, which are not run again. It is called once.
func (h *Hold) End(ctx context.Context) error {
	if h.record == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	if h.child != nil {
		_, _ = h.ask(sayEnd) // what was let go is not done again, whatever it says
	}
	errs := []error{h.record.load()}
	_, err := h.record.release(ctx, h.cfg.API)
	done := err == nil && !h.doubt
	errs = append(errs, err, h.record.runDue(ctx, h.cfg.API))
	if done {
		errs = append(errs, h.record.remove())
	}
	if h.child != nil && done {
		_, _ = io.WriteString(h.words, sayBye+"\n") // it may have gone already
		_ = h.words.Close()
		late := time.AfterFunc(callTime, func() { _ = h.child.Process.Kill() })
		_ = h.child.Wait() // its status says nothing
		late.Stop()
	} else if h.child != nil {
		_ = h.words.Close() // it takes over
		go func() { _ = h.child.Wait() }()
	}
	return errors.Join(append(errs, h.record.close())...)
}

// watch starts the watchdog and waits until it watches.
func (h *Hold) watch() error {
	cmd := &exec.Cmd{
		Path: reexec.Self(), Args: []string{watchdogName, h.cfg.Host, h.record.path, h.cfg.Max.String()},
		Dir: "/", ExtraFiles: []*os.File{h.record.file},
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
	if line = strings.TrimSpace(line); line != sayReady {
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
