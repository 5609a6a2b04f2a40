package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/docker/docker/client"
)

const engineService = "dockerd"

// Socket is the path of the engine's API socket, the same inside and outside.
func (h *Host) Socket() string { return filepath.Join(h.Dir, "docker.sock") }

// SetLiveRestore decides about --live-restore from the next engine start on.
func (h *Host) SetLiveRestore(on bool) { h.opts.LiveRestore = on }

// StartEngine starts dockerd and waits until its API answers.
func (h *Host) StartEngine(ctx context.Context) error {
	argv := []string{"dockerd", "-H", "unix:///var/run/docker.sock", "-H", "unix://" + h.Socket(),
		"--exec-opt", "native.cgroupdriver=cgroupfs"}
	if h.opts.LiveRestore {
		argv = append(argv, "--live-restore")
	}
	argv = append(argv, h.opts.DaemonArgs...)
	req := request{Op: "start", Name: engineService, Argv: argv, Log: filepath.Join(h.Dir, "log", "dockerd.log")}
	if _, err := call(ctx, h.Dir, req); err != nil {
		return err
	}
	return h.waitEngine(ctx)
}

// waitEngine waits until the API answers or dockerd has ended.
func (h *Host) waitEngine(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	c, err := h.Client()
	if err != nil {
		return err
	}
	defer c.Close()
	for {
		_, pingErr := c.Ping(ctx)
		if pingErr == nil {
			return nil
		}
		s, err := h.service(ctx, engineService)
		if err != nil {
			return err
		}
		if s.PID == 0 {
			return fmt.Errorf("dockerd on %s ended with exit code %d: %s", h.Name, s.LastExit, h.lastLine("dockerd.log"))
		}
		if err := pause(ctx, 30*time.Millisecond); err != nil {
			return fmt.Errorf("engine on %s does not answer: %w", h.Name, pingErr)
		}
	}
}

// StopEngine stops dockerd as systemd would and waits for its end.
func (h *Host) StopEngine(ctx context.Context) error {
	_, err := call(ctx, h.Dir, request{Op: "stop", Name: engineService, Signal: syscall.SIGTERM, Grace: 60 * time.Second})
	return err
}

// KillEngine ends dockerd with SIGKILL. Containers and their shims stay.
func (h *Host) KillEngine(ctx context.Context) error {
	if _, err := call(ctx, h.Dir, request{Op: "signal", Name: engineService, Signal: syscall.SIGKILL}); err != nil {
		return err
	}
	for {
		s, err := h.service(ctx, engineService)
		if err != nil {
			return err
		}
		if s.PID == 0 {
			break
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
	// The service counts as ended a moment after its process.
	_, err := call(ctx, h.Dir, request{Op: "stop", Name: engineService, Signal: syscall.SIGKILL, Grace: time.Second})
	return err
}

// RestartEngine is StopEngine and StartEngine.
func (h *Host) RestartEngine(ctx context.Context) error {
	if err := h.StopEngine(ctx); err != nil {
		return err
	}
	return h.StartEngine(ctx)
}

// Engine is the method of that name: start, stop, kill or restart.
func (h *Host) Engine(ctx context.Context, verb string) error {
	switch verb {
	case "start":
		return h.StartEngine(ctx)
	case "stop":
		return h.StopEngine(ctx)
	case "kill":
		return h.KillEngine(ctx)
	case "restart":
		return h.RestartEngine(ctx)
	}
	return fmt.Errorf("engine: want start, stop, kill or restart, have %q", verb)
}

// Client is an API client for the engine; the caller closes it.
func (h *Host) Client() (*client.Client, error) {
	return client.NewClientWithOpts(client.WithHost("unix://"+h.Socket()), client.WithAPIVersionNegotiation())
}

// Services lists what the host's init looks after.
func (h *Host) Services(ctx context.Context) ([]ServiceStatus, error) {
	rep, err := call(ctx, h.Dir, request{Op: "services"})
	return rep.Services, err
}

func (h *Host) service(ctx context.Context, name string) (ServiceStatus, error) {
	list, err := h.Services(ctx)
	if err != nil {
		return ServiceStatus{}, err
	}
	for _, s := range list {
		if s.Name == name {
			return s, nil
		}
	}
	return ServiceStatus{}, fmt.Errorf("host %s has no service %s", h.Name, name)
}

// lastLine is the end of a log for an error message.
func (h *Host) lastLine(log string) string {
	text, err := os.ReadFile(filepath.Join(h.Dir, "log", log))
	if err != nil {
		return err.Error()
	}
	return lastLines(string(text), 1)
}

// pause waits unless the context ends first.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return errors.Join(ctx.Err(), context.Cause(ctx))
	case <-time.After(d):
		return nil
	}
}
