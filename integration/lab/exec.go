package lab

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// A Command is a process to run inside a host.
type Command struct {
	Argv []string
	// Env is added to the host's usual environment.
	Env []string
	// Dir is the working directory; / when empty or not there.
	Dir string
	// Stdin, Stdout and Stderr may be nil. An *os.File is handed to the process as it is.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// A Result is what a finished command left.
type Result struct {
	Stdout, Stderr string
	// ExitCode is the command's, or 128 plus the number of the signal that ended it.
	ExitCode int
}

// An ExitError says that a command ran and ended with another code than 0.
type ExitError struct {
	Argv []string
	Result
}

func (e *ExitError) Error() string {
	text := strings.TrimSpace(e.Stderr)
	if text == "" {
		text = strings.TrimSpace(e.Stdout)
	}
	return fmt.Sprintf("%s: exit code %d: %s", strings.Join(e.Argv, " "), e.ExitCode, text)
}

// Exec runs a command inside the host and collects its output. The error is an
// *ExitError when the command ended with another code than 0. Cancelling ctx
// kills the command.
func (h *Host) Exec(ctx context.Context, argv ...string) (Result, error) {
	return h.collect(ctx, Command{Argv: argv})
}

// Docker runs the docker CLI of the host's own engine version; see Exec.
func (h *Host) Docker(ctx context.Context, args ...string) (Result, error) {
	return h.collect(ctx, Command{Argv: append([]string{"docker"}, args...), Env: dockerEnv()})
}

// dockerEnv keeps the CLI on the classic builder: the Debian packages have no
// buildx, and without it newer ones refuse to build at all.
func dockerEnv() []string { return []string{"DOCKER_BUILDKIT=0"} }

func (h *Host) collect(ctx context.Context, cmd Command) (Result, error) {
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	code, err := h.Run(ctx, cmd)
	res := Result{Stdout: stdout.String(), Stderr: stderr.String(), ExitCode: code}
	if err == nil && code != 0 {
		err = &ExitError{Argv: cmd.Argv, Result: res}
	}
	return res, err
}

// Run runs a command inside the host and returns its exit code. The error tells
// only that it could not be run or was cancelled.
func (h *Host) Run(ctx context.Context, cmd Command) (int, error) {
	var p plumbing
	defer p.close()
	stdin, err := p.input(cmd.Stdin)
	if err != nil {
		return 0, err
	}
	stdout, err := p.output(cmd.Stdout)
	if err != nil {
		return 0, err
	}
	stderr, err := p.output(cmd.Stderr)
	if err != nil {
		return 0, err
	}
	rep, err := call(ctx, h.Dir, request{Op: "run", Argv: cmd.Argv, Env: cmd.Env, Dir: cmd.Dir}, stdin, stdout, stderr)
	p.drain()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", strings.Join(cmd.Argv, " "), err)
	}
	return rep.ExitCode, nil
}

// plumbing joins readers and writers with the files that a process gets.
type plumbing struct {
	passed  []*os.File // our copies of the process's ends
	ours    []*os.File
	reading sync.WaitGroup
}

func (p *plumbing) input(r io.Reader) (*os.File, error) {
	if f, ok := r.(*os.File); ok {
		return f, nil
	}
	if r == nil {
		f, err := os.Open(os.DevNull)
		if err == nil {
			p.passed = append(p.passed, f)
		}
		return f, err
	}
	theirs, mine, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.passed, p.ours = append(p.passed, theirs), append(p.ours, mine)
	go func() {
		// A process that does not read its input to the end is no error.
		_, _ = io.Copy(mine, r)
		mine.Close()
	}()
	return theirs, nil
}

func (p *plumbing) output(w io.Writer) (*os.File, error) {
	if f, ok := w.(*os.File); ok {
		return f, nil
	}
	if w == nil {
		f, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err == nil {
			p.passed = append(p.passed, f)
		}
		return f, err
	}
	mine, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.passed, p.ours = append(p.passed, theirs), append(p.ours, mine)
	p.reading.Go(func() { _, _ = io.Copy(w, mine) })
	return theirs, nil
}

// drain waits for the output of a process that has ended. What it left running in
// the background may hold the pipes open: after a moment they are closed on it.
func (p *plumbing) drain() {
	for _, f := range p.passed {
		f.Close()
	}
	timer := time.AfterFunc(2*time.Second, p.close)
	p.reading.Wait()
	timer.Stop()
}

func (p *plumbing) close() {
	for _, f := range append(p.passed, p.ours...) {
		// Closed twice on the usual way; the second time is harmless.
		_ = f.Close()
	}
}
