package restic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
)

// A call of restic.
type call struct {
	args []string
	dir  string // where it runs, "" for a private directory
	// alone says that restic needs the repository alone.
	alone bool
	// out and err are given the lines of the two outputs, each by one goroutine. An error
	// ends restic.
	out, err func(line []byte) error
	// whole makes what out is given one piece, of at most so many bytes; 0 is lines.
	whole int
}

// Codes with which restic exits.
const (
	exitIncomplete   = 3
	exitNoRepository = 10
	exitLocked       = 11
	exitPassword     = 12
	exitInterrupted  = 130
)

// An exitError says how restic ended.
type exitError struct {
	code int
	text string // without secrets
	kind error  // one of package backup, or nil
}

func (e *exitError) Error() string {
	if e.kind != nil {
		return fmt.Sprintf("%v: %s", e.kind, e.text)
	}
	return e.text
}

func (e *exitError) Unwrap() error { return e.kind }

// run does a call. When the repository is locked it removes the locks of dead children and does
// the call once more, which then waits for others.
func (e *Engine) run(ctx context.Context, c call) error {
	if err := e.version(); err != nil {
		return err
	}
	l, err := e.lease(ctx, c.alone)
	if err != nil {
		return err
	}
	defer l.release()
	c.err = e.hopeful(c.err)
	err = e.once(ctx, c, l, modeWatched)
	if !errors.Is(err, backup.ErrLocked) {
		return err
	}
	if !c.alone {
		if held := l.take(ctx, true, 0); held != nil {
			// Others of this host are at work: the locks are theirs, or they would have failed.
			return e.again(ctx, c, l)
		}
	}
	e.Log.Infof("target %s: the repository is locked: removing locks of dead processes", e.Target.Name)
	if failed := e.once(ctx, call{args: []string{"--json", "unlock"}}, l, modeFirst); failed != nil {
		return errors.Join(err, failed)
	}
	return e.again(ctx, c, l)
}

// again does a call that waits while the repository is locked.
func (e *Engine) again(ctx context.Context, c call, l *lease) error {
	if err := l.take(ctx, c.alone, e.LockWait); err != nil {
		return err
	}
	c.args = append([]string{"--retry-lock", e.LockWait.String()}, c.args...)
	return e.once(ctx, c, l, modeWatched)
}

// once starts restic and waits for its end.
func (e *Engine) once(ctx context.Context, c call, l *lease, mode string) error {
	p, err := e.private(ctx)
	if err != nil {
		return err
	}
	defer p.remove()
	env, args, err := e.environment(p)
	if err != nil {
		return err
	}
	if e.Target.UploadLimit > 0 {
		args = append(args, "--limit-upload", strconv.Itoa(e.Target.UploadLimit))
	}
	if e.Target.DownloadLimit > 0 {
		args = append(args, "--limit-download", strconv.Itoa(e.Target.DownloadLimit))
	}
	args = append(args, "--cache-dir", filepath.Join(e.Dir, "cache"), "--cleanup-cache")
	if c.dir == "" {
		c.dir = p.path("")
	}
	return e.sshSaid(p, e.start(ctx, c, l, mode, env, append(args, c.args...)))
}

func (e *Engine) start(ctx context.Context, c call, l *lease, mode string, env, args []string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	host, err := e.lockName()
	if err != nil {
		return err
	}
	theirs, ours, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ours.Close()
	defer theirs.Close()
	out := &lines{do: c.out, whole: c.whole, fail: cancel}
	last := &tail{next: c.err}
	stderr := &lines{do: last.line, fail: cancel}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = append([]string{childName, mode, host, strconv.Itoa(e.Nice), e.Binary}, args...)
	cmd.Env, cmd.Dir = env, c.dir
	cmd.Stdout, cmd.Stderr = out, stderr
	cmd.ExtraFiles = []*os.File{theirs, l.file}
	isolate(cmd)
	err = cmd.Run()
	out.end()
	stderr.end()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return e.ended(exit.ExitCode(), last)
	}
	if err != nil {
		return fault.Unavailable("start restic: %w", err)
	}
	return nil
}

// ended explains an exit code.
func (e *Engine) ended(code int, last *tail) error {
	err := &exitError{code: code, text: e.redact.Replace(last.text())}
	if err.text == "" {
		err.text = fmt.Sprintf("restic ended with code %d and said nothing", code)
	}
	switch code {
	case exitNoRepository:
		err.kind = backup.ErrNoRepository
	case exitLocked:
		err.kind = backup.ErrLocked
	case exitPassword:
		err.kind = backup.ErrPassword
	case exitInterrupted:
		err.kind = context.Canceled
	}
	return err
}
