package quiesce

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/docker/docker/client"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// socketName is Docker's, where a directory was given.
	socketName = "docker.sock"
	// tendEvery is how often a Quiescer looks for what is left to be made good, and
	// retryPause how long it waits when that fails.
	tendEvery  = time.Minute
	retryPause = 5 * time.Second
)

// A Quiescer does what the labels of containers say, for a daemon. Its methods may be
// called concurrently.
type Quiescer struct {
	socket, dir string
	log         *logrus.Entry
	// turn is had by the one that brings containers to rest, since a container may use
	// several volumes.
	turn chan struct{}
	// untold is done when it was told that there is no socket.
	untold sync.Once
}

// New makes a Quiescer that keeps in dir what it has brought to rest. socket is the path
// of Docker's socket, or of the directory in which it is docker.sock. Anything else
// there, as /dev/null, means that the socket was not granted: nothing is done then.
func New(socket, dir string, log *logrus.Entry) *Quiescer {
	return &Quiescer{socket: socket, dir: dir, log: log, turn: make(chan struct{}, 1)}
}

// A Rest is a Hold of a Quiescer. Others wait for its End.
type Rest struct {
	*Hold
	done func()
}

// End is Hold's.
func (r *Rest) End(ctx context.Context) error {
	defer r.done()
	return r.Hold.End(ctx)
}

// Quiesce brings the containers to rest that use a volume, by its name in Docker. The
// caller ends the Rest, which is nil when there is nothing to be done. After an error
// everything is undone. No lock that a request of Docker's needs may be held: Docker may
// be waiting for such a request.
func (q *Quiescer) Quiesce(ctx context.Context, volume string) (*Rest, error) {
	host, granted, err := q.host()
	if err != nil || !granted {
		return nil, err
	}
	select {
	case q.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	api, err := connect(host)
	if err != nil {
		<-q.turn
		return nil, err
	}
	done := func() {
		_ = api.Close() // it closes idle connections
		<-q.turn
	}
	// A container that was left paused could not be told anything.
	q.makeGood(ctx, api, host)
	hold, err := Begin(ctx, Config{API: api, Host: host, Dir: q.dir, Volume: volume, ByLabels: true})
	if err != nil || hold.record == nil {
		done()
		return nil, err
	}
	return &Rest{Hold: hold, done: done}, nil
}

// Run makes good what an earlier process has left, and what could not be undone since,
// until ctx ends.
func (q *Quiescer) Run(ctx context.Context) {
	for {
		pause := tendEvery
		if !q.tend(ctx) {
			pause = retryPause
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// tend reports whether nothing is left to be done.
func (q *Quiescer) tend(ctx context.Context) bool {
	left, _ := filepath.Glob(filepath.Join(q.dir, "*"+suffix)) // the pattern is a constant
	if len(left) == 0 {
		return true
	}
	host, granted, err := q.host()
	if err == nil && !granted {
		err = fault.Unavailable("Docker's socket is not granted any more")
	}
	if err != nil {
		q.log.WithError(err).Warn("containers that were left paused or stopped for a backup")
		return true // it is not told every few seconds
	}
	api, err := connect(host)
	if err != nil {
		q.log.WithError(err).Error("Docker's client")
		return true
	}
	defer api.Close()
	return q.makeGood(ctx, api, host)
}

// makeGood reports whether nothing is left to be done.
func (q *Quiescer) makeGood(ctx context.Context, api API, host string) bool {
	names, err := MakeGood(ctx, api, host, q.dir)
	if len(names) > 0 {
		q.log.Warnf("%s was left paused or stopped for a backup, and goes on now", strings.Join(names, ", "))
	}
	if err != nil && ctx.Err() == nil {
		q.log.WithError(err).Warn("containers that were left paused or stopped for a backup: tried again")
	}
	return err == nil
}

// host is the address of Docker.
func (q *Quiescer) host() (host string, granted bool, err error) {
	path := q.socket
	info, err := os.Stat(path)
	if err == nil && info.IsDir() {
		path = filepath.Join(path, socketName)
		info, err = os.Stat(path)
	}
	if err != nil {
		return "", false, fault.Unavailable("Docker's socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		q.untold.Do(func() {
			q.log.Debugf("%s is no socket: labels %s* of containers are not seen", path, labelPrefix)
		})
		return "", false, nil
	}
	return "unix://" + path, true, nil
}

// connect makes a client. It does not speak to Docker yet.
func connect(host string) (*client.Client, error) {
	return client.NewClientWithOpts(client.WithHost(host), client.WithAPIVersionNegotiation())
}
