package quiesce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/pkg/stdcopy"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// tellPID lets the shell say its process ID in the container, which is that of the
	// command and of its group, so that a command that takes too long can be killed.
	tellPID = `echo $$; exec sh -c "$1"`
	// outputMost is how much of a command's last output is kept, in bytes.
	outputMost = 4 << 10
	// outputGrace is how long output is waited for after the end of the command, whose
	// children may keep it open.
	outputGrace = time.Second
	// lookFirst and lookMost are the times between two looks at a command that runs.
	lookFirst, lookMost = 10 * time.Millisecond, 250 * time.Millisecond
)

// execute runs a command in a container, by sh -c, and waits for its end. It is killed
// after timeout. The error has the last line of its output.
func execute(ctx context.Context, api API, id, command string, timeout time.Duration) error {
	within, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var out output
	status, err := runExec(within, api, id, []string{"sh", "-c", tellPID, "sh", command}, &out)
	switch {
	case err != nil && within.Err() != nil:
		err = out.kill(ctx, api, id)
		if ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		return errors.Join(fault.Unavailable("it has not ended within %s%s", timeout, after(out.last())), err)
	case err != nil:
		return err
	case status != 0:
		return fault.Unavailable("exit status %d%s", status, after(out.last()))
	}
	return nil
}

// after is the end of an error's text: what a command has said, if anything.
func after(said string) string {
	if said == "" {
		return ""
	}
	return ": " + said
}

// runExec runs a program in a container and returns its exit status.
func runExec(ctx context.Context, api API, id string, argv []string, out *output) (status int, _ error) {
	made, err := api.ContainerExecCreate(ctx, id, container.ExecOptions{Cmd: argv, AttachStdout: true, AttachStderr: true})
	if err != nil {
		return 0, err
	}
	stream, err := attach(ctx, api, made.ID)
	if err != nil {
		return 0, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = stdcopy.StdCopy(out, out, stream.Reader) // what is missing is missing in an error's text
	}()
	defer func() {
		select {
		case <-ended:
		case <-ctx.Done():
		case <-time.After(outputGrace):
		}
		stream.Close()
		<-ended
	}()
	for pause, done := lookFirst, ended; ; pause = min(2*pause, lookMost) {
		select {
		case <-done:
			done = nil // its exit status may come a little later
		case <-time.After(pause):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
		now, err := api.ContainerExecInspect(ctx, made.ID)
		if err != nil || !now.Running {
			return now.ExitCode, err
		}
	}
}

// attach starts what was made. Docker's client waits for the answer also when ctx ends;
// this does not.
func attach(ctx context.Context, api API, exec string) (types.HijackedResponse, error) {
	type answer struct {
		stream types.HijackedResponse
		err    error
	}
	answers := make(chan answer)
	go func() {
		stream, err := api.ContainerExecAttach(ctx, exec, container.ExecAttachOptions{})
		select {
		case answers <- answer{stream, err}:
		case <-ctx.Done():
			if err == nil {
				stream.Close()
			}
		}
	}()
	select {
	case a := <-answers:
		return a.stream, a.err
	case <-ctx.Done():
		return types.HijackedResponse{}, ctx.Err()
	}
}

// output keeps the first line that a command says, its process ID, and the end of the
// rest.
type output struct {
	mu   sync.Mutex // guards all following fields
	pid  []byte
	told bool
	rest []byte
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	rest := p
	if !o.told {
		var line []byte
		line, rest, o.told = bytes.Cut(p, []byte("\n"))
		o.pid = append(o.pid, line...)
	}
	o.rest = append(o.rest, rest...)
	if more := len(o.rest) - outputMost; more > 0 {
		o.rest = append(o.rest[:0], o.rest[more:]...)
	}
	return len(p), nil
}

// last is the last line that is not empty. What Docker says of a command that cannot be
// started is the first.
func (o *output) last() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(string(o.rest)), "\n")
	if line := strings.TrimSpace(lines[len(lines)-1]); line != "" || o.process() != "" {
		return line
	}
	return strings.TrimSpace(string(o.pid))
}

// process is the command's ID in the container, "" when it is not known. The caller has
// the lock.
func (o *output) process() string {
	pid := strings.TrimSpace(string(o.pid))
	if strings.Trim(pid, "0123456789") != "" {
		return ""
	}
	return pid
}

// kill ends a command with its children. Docker leaves it running.
func (o *output) kill(ctx context.Context, api API, id string) error {
	o.mu.Lock()
	pid := o.process()
	o.mu.Unlock()
	if pid == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTime)
	defer cancel()
	var said output
	status, err := runExec(ctx, api, id, []string{"sh", "-c", "kill -9 -" + pid}, &said)
	if err == nil && status != 0 {
		err = fmt.Errorf("exit status %d%s", status, after(said.last()))
	}
	if err != nil {
		return fmt.Errorf("process %s of it could not be killed: %w", pid, err)
	}
	return nil
}
