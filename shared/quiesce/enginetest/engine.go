// Package enginetest has a Docker engine without containers: it answers on a socket as
// dockerd does, of containers that are only names and states.
package enginetest

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
	"gotest.tools/v3/assert"
)

// A Container of an Engine.
type Container struct {
	// ID is the name too.
	ID string
	// State is "running", "paused" or "exited".
	State string
	// Volumes it has, by name.
	Volumes []string
	// Started changes when the container is started again.
	Started string
	Labels  map[string]string
	// ReadOnly: it cannot write to its volumes. AutoRemove: it was started with --rm.
	ReadOnly, AutoRemove bool
}

// An Engine knows the rules of pausing and stopping. What is run in a container is run on
// this machine.
type Engine struct {
	// Host is its address.
	Host string

	mu         sync.Mutex // guards all following fields
	containers []Container
	calls      []string
	before     func(call string) error
	changed    chan struct{}
	execs      []*execution
}

// New returns an Engine on a socket, which ends with the test.
func New(t testing.TB, containers ...Container) *Engine {
	t.Helper()
	path := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", path)
	assert.NilError(t, err)
	e := &Engine{Host: "unix://" + path, containers: containers, changed: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", "1.51") })
	mux.HandleFunc("GET /{v}/containers/json", func(w http.ResponseWriter, _ *http.Request) { e.list(w) })
	mux.HandleFunc("GET /{v}/containers/{id}/json", func(w http.ResponseWriter, r *http.Request) { e.inspect(w, r.PathValue("id")) })
	mux.HandleFunc("POST /{v}/containers/{id}/pause", func(w http.ResponseWriter, r *http.Request) {
		e.turn(w, "pause", r.PathValue("id"), container.StateRunning, container.StatePaused)
	})
	mux.HandleFunc("POST /{v}/containers/{id}/unpause", func(w http.ResponseWriter, r *http.Request) {
		e.turn(w, "unpause", r.PathValue("id"), container.StatePaused, container.StateRunning)
	})
	mux.HandleFunc("POST /{v}/containers/{id}/stop", func(w http.ResponseWriter, r *http.Request) {
		e.turn(w, "stop", r.PathValue("id"), container.StateRunning, container.StateExited)
	})
	mux.HandleFunc("POST /{v}/containers/{id}/start", func(w http.ResponseWriter, r *http.Request) {
		e.turn(w, "start", r.PathValue("id"), container.StateExited, container.StateRunning)
	})
	mux.HandleFunc("POST /{v}/containers/{id}/exec", e.exec)
	mux.HandleFunc("POST /{v}/exec/{id}/start", e.execStart)
	mux.HandleFunc("GET /{v}/exec/{id}/json", e.execInspect)
	s := &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() {
		assert.Check(t, s.Close())
		<-done
	})
	return e
}

// Before sets what is called before a container is paused, unpaused, stopped or started,
// with "pause ID" and so on. Its error is Docker's.
func (e *Engine) Before(fn func(call string) error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.before = fn
}

// Set puts a container into a state, as a user may.
func (e *Engine) Set(id, state string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.containers {
		if e.containers[i].ID == id {
			e.containers[i].State = state
		}
	}
	e.tell()
}

// Restart lets a container run anew.
func (e *Engine) Restart(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.containers {
		if e.containers[i].ID == id {
			e.containers[i].State, e.containers[i].Started = container.StateRunning, "anew"
		}
	}
	e.tell()
}

// State of a container; "" when there is none.
func (e *Engine) State(id string) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.containers {
		if c.ID == id {
			return c.State
		}
	}
	return ""
}

// Calls are what was paused, unpaused, stopped, started and, as "exec ID COMMAND", run, in
// that order.
func (e *Engine) Calls() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]string(nil), e.calls...)
}

// Await waits until a container is in a state.
func (e *Engine) Await(t testing.TB, id, state string) {
	t.Helper()
	late := time.After(time.Minute)
	for {
		e.mu.Lock()
		changed := e.changed
		e.mu.Unlock()
		if e.State(id) == state {
			return
		}
		select {
		case <-changed:
		case <-late:
			t.Fatalf("container %s is %s and never was %s", id, e.State(id), state)
		}
	}
}

// tell wakes who waits. The caller has the lock.
func (e *Engine) tell() {
	close(e.changed)
	e.changed = make(chan struct{})
}

func (e *Engine) list(w http.ResponseWriter) {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := []container.Summary{}
	for _, c := range e.containers {
		s := container.Summary{ID: c.ID, Names: []string{"/" + c.ID}, State: c.State, Labels: c.Labels}
		for _, v := range c.Volumes {
			s.Mounts = append(s.Mounts, container.MountPoint{Type: mount.TypeVolume, Name: v, Driver: "berth-vol:latest", RW: !c.ReadOnly})
		}
		list = append(list, s)
	}
	answer(w, http.StatusOK, list)
}

func (e *Engine) inspect(w http.ResponseWriter, id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.containers {
		if c.ID == id {
			paused := c.State == container.StatePaused
			answer(w, http.StatusOK, container.InspectResponse{ContainerJSONBase: &container.ContainerJSONBase{
				ID: id, HostConfig: &container.HostConfig{AutoRemove: c.AutoRemove},
				State: &container.State{Status: c.State, Running: paused || c.State == container.StateRunning, Paused: paused, StartedAt: c.Started},
			}})
			return
		}
	}
	refuse(w, http.StatusNotFound, "No such container: "+id)
}

func (e *Engine) turn(w http.ResponseWriter, call, id, from, to string) {
	e.mu.Lock()
	before := e.before
	e.mu.Unlock()
	if before != nil {
		if err := before(call + " " + id); err != nil {
			refuse(w, http.StatusInternalServerError, err.Error())
			return
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.containers {
		c := &e.containers[i]
		switch {
		case c.ID != id:
		case c.State != from:
			refuse(w, http.StatusConflict, fmt.Sprintf("Container %s is %s", id, c.State))
			return
		default:
			if c.State = to; call == "start" {
				c.Started += "+"
			}
			e.calls = append(e.calls, call+" "+id)
			e.tell()
			w.WriteHeader(http.StatusNoContent)
			return
		}
	}
	refuse(w, http.StatusNotFound, "No such container: "+id)
}

func refuse(w http.ResponseWriter, status int, text string) {
	answer(w, status, map[string]string{"message": text})
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	text, err := json.Marshal(body)
	if err != nil {
		panic(err) // the bodies are of this file
	}
	w.WriteHeader(status)
	_, _ = w.Write(text) // the client may have hung up
}
