// Package quiesce brings the containers that use a volume to rest for as long as a
// snapshot takes, and sees to it that they go on afterwards, whatever happens. The
// command line pauses all of them; the daemon, where it was given Docker's socket, does
// what their labels say: hooks that are run in them, a pause, or a stop.
//
// What is to be done is written to a file first. A child process in a session of its
// own watches: it lets the containers go when the one that brought them to rest is
// gone, or when they have stood still for too long. What is left when both were killed
// is in the file, and MakeGood makes it good: the next command calls it, and the daemon
// when it starts and from time to time. A file belongs to whoever has its lock
// (flock(2)), which the two processes share. (A daemon that is number 1 of a PID
// namespace, as in a plugin, takes the watchdog with it when it is killed. Docker starts
// it again at once.)
//
// Containers that somebody else has paused are left as they are.
package quiesce

import (
	"context"
	"time"

	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
)

// An API is the part of Docker's client that is needed.
type API interface {
	ContainerList(context.Context, container.ListOptions) ([]container.Summary, error)
	ContainerInspect(ctx context.Context, id string) (container.InspectResponse, error)
	ContainerPause(ctx context.Context, id string) error
	ContainerUnpause(ctx context.Context, id string) error
	ContainerStop(ctx context.Context, id string, o container.StopOptions) error
	ContainerStart(ctx context.Context, id string, o container.StartOptions) error
	ContainerExecCreate(ctx context.Context, id string, o container.ExecOptions) (container.ExecCreateResponse, error)
	ContainerExecAttach(ctx context.Context, exec string, o container.ExecAttachOptions) (types.HijackedResponse, error)
	ContainerExecInspect(ctx context.Context, exec string) (container.ExecInspect, error)
}

const (
	// callTime bounds one call of Docker.
	callTime = 10 * time.Second
	// startTime bounds the start of a container, for which Docker mounts its volumes.
	startTime = time.Minute
)
