package enginetest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/pkg/stdcopy"
)

// An execution is a command that is run in a container.
type execution struct {
	cmd     *exec.Cmd
	running bool
	// state is that of its end.
	state *os.ProcessState
}

func (e *Engine) exec(w http.ResponseWriter, r *http.Request) {
	var o container.ExecOptions
	if err := json.NewDecoder(r.Body).Decode(&o); err != nil {
		refuse(w, http.StatusBadRequest, err.Error())
		return
	}
	id := r.PathValue("id")
	if state := e.State(id); state != container.StateRunning {
		refuse(w, http.StatusConflict, fmt.Sprintf("Container %s is %s", id, state))
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	cmd := exec.CommandContext(context.WithoutCancel(r.Context()), o.Cmd[0], o.Cmd[1:]...) // as Docker, which lets it run
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	e.execs = append(e.execs, &execution{cmd: cmd})
	e.calls = append(e.calls, "exec "+id+" "+o.Cmd[len(o.Cmd)-1])
	e.tell()
	answer(w, http.StatusCreated, container.ExecCreateResponse{ID: strconv.Itoa(len(e.execs) - 1)})
}

func (e *Engine) execution(w http.ResponseWriter, r *http.Request) *execution {
	e.mu.Lock()
	defer e.mu.Unlock()
	n, err := strconv.Atoi(r.PathValue("id"))
	if err != nil || n >= len(e.execs) {
		refuse(w, http.StatusNotFound, "No such exec instance")
		return nil
	}
	return e.execs[n]
}

func (e *Engine) execStart(w http.ResponseWriter, r *http.Request) {
	x := e.execution(w, r)
	if x == nil {
		return
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err) // the server is this package's
	}
	defer conn.Close()
	// Docker's connection stays for as long as a child keeps the output open.
	out, theirs, err := os.Pipe()
	if err != nil {
		panic(err) // there are descriptors enough
	}
	defer out.Close()
	fmt.Fprint(conn, "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
	x.cmd.Stdout, x.cmd.Stderr = theirs, theirs
	e.mu.Lock()
	x.running = true
	e.mu.Unlock()
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(stdcopy.NewStdWriter(conn, stdcopy.Stdout), out) // the client may have hung up
	}()
	err = x.cmd.Start()
	_ = theirs.Close()
	var state *os.ProcessState
	if err == nil {
		state, _ = x.cmd.Process.Wait()
	}
	e.mu.Lock()
	x.running, x.state = false, state
	e.mu.Unlock()
	<-copied
}

func (e *Engine) execInspect(w http.ResponseWriter, r *http.Request) {
	x := e.execution(w, r)
	if x == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	i := container.ExecInspect{Running: x.running}
	if x.state != nil {
		i.ExitCode = x.state.ExitCode()
	}
	answer(w, http.StatusOK, i)
}
