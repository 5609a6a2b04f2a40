package lab

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// initMain is the second stage of a host: its PID 1 for good. It mounts the root,
// reaps, and starts what it is asked to.
func initMain() {
	cfg, err := readBootConfig()
	unix.CloseOnExec(readyFD)
	if cfg.Lifeline {
		unix.CloseOnExec(lifelineFD)
	}
	if err == nil {
		err = mountRoot(cfg)
	}
	var listener *net.UnixListener
	if err == nil {
		// Children get this environment and nothing of the starter's.
		os.Clearenv()
		for _, kv := range hostEnv() {
			k, v, _ := strings.Cut(kv, "=")
			_ = os.Setenv(k, v) // fails only on names with a zero byte
		}
		_ = os.Remove(initSocket(cfg.Dir))
		listener, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: initSocket(cfg.Dir), Net: "unixpacket"})
	}
	if err != nil {
		reportReady(err)
		os.Exit(1)
	}
	d := &initd{waiting: map[int]chan syscall.WaitStatus{}, services: map[string]*service{}}
	go d.reap()
	if cfg.Lifeline {
		go func() {
			// The end of PID 1 ends every process of the host, whatever it does.
			_, _ = io.Copy(io.Discard, os.NewFile(lifelineFD, "lifeline"))
			os.Exit(0)
		}()
	}
	reportReady(nil)
	for {
		c, err := listener.AcceptUnix()
		if err != nil {
			fmt.Fprintln(os.Stderr, "init: accept:", err)
			os.Exit(1)
		}
		go d.serve(c)
	}
}

// appletDir has links to busybox under the names of its applets, for programs
// that minimal Debian roots lack (ping, wget, nc …).
const appletDir = "/opt/busybox"

func hostEnv() []string {
	return []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:" + appletDir, "HOME=/root", "LC_ALL=C.UTF-8", "TERM=xterm"}
}

// initd is the state of a running init.
type initd struct {
	mu sync.Mutex
	// waiting has the processes somebody wants the end of; all others are orphans.
	waiting  map[int]chan syscall.WaitStatus
	services map[string]*service
}

// A service is a process that outlives the request that started it.
type service struct {
	req      request
	pid      int
	starts   int
	lastExit int
	stopping bool
	// ended is closed when the service has ended and will not be started again.
	ended chan struct{}
}

// reap waits for every child there is. Only one place may call wait4(2): the lock
// is held from a child's start to its entry in waiting.
func (d *initd) reap() {
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	for range children {
		d.mu.Lock()
		for {
			var status syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
			if errors.Is(err, syscall.EINTR) {
				continue
			}
			if pid <= 0 {
				break
			}
			if ch, ok := d.waiting[pid]; ok {
				delete(d.waiting, pid)
				ch <- status
			}
		}
		d.mu.Unlock()
	}
}

// spawnLocked starts a process in a session of its own; files are its standard ones.
func (d *initd) spawnLocked(req request, files []*os.File) (int, <-chan syscall.WaitStatus, error) {
	if len(req.Argv) == 0 {
		return 0, nil, errors.New("no command given")
	}
	path, err := exec.LookPath(req.Argv[0])
	if err != nil {
		return 0, nil, err
	}
	attr := &syscall.ProcAttr{Dir: "/", Env: append(os.Environ(), req.Env...), Sys: &syscall.SysProcAttr{Setsid: true}}
	if info, err := os.Stat(req.Dir); err == nil && info.IsDir() {
		attr.Dir = req.Dir
	}
	for _, f := range files {
		attr.Files = append(attr.Files, f.Fd())
	}
	argv := req.Argv
	if path == "/proc/1/exe" {
		// The lab's own binary: its first argument is the name it acts under.
		argv = argv[1:]
	}
	pid, _, err := syscall.StartProcess(path, argv, attr)
	if err != nil {
		return 0, nil, fmt.Errorf("start %s: %w", path, err)
	}
	ch := make(chan syscall.WaitStatus, 1)
	d.waiting[pid] = ch
	return pid, ch, nil
}

func (d *initd) serve(c *net.UnixConn) {
	defer func() { _ = c.Close() }()
	req, files, err := receive(c)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "init: request:", err)
		return
	}
	var rep reply
	switch req.Op {
	case "run":
		rep, err = d.run(c, req, files)
	case "start":
		err = d.start(req)
	case "stop":
		err = d.stop(req)
	case "signal":
		rep, err = d.signal(req)
	case "services":
		rep.Services = d.list()
	default:
		err = fmt.Errorf("init does not know %q", req.Op)
	}
	if err != nil {
		rep.Error = err.Error()
	}
	send(c, rep)
}

// run starts a command and waits for it; the asker's going away kills it.
func (d *initd) run(c *net.UnixConn, req request, files []*os.File) (reply, error) {
	if len(files) != 3 {
		return reply{}, fmt.Errorf("run came with %d files, want 3", len(files))
	}
	d.mu.Lock()
	pid, done, err := d.spawnLocked(req, files)
	d.mu.Unlock()
	if err != nil {
		return reply{}, err
	}
	gone := make(chan struct{})
	go func() {
		_, _ = c.Read(make([]byte, 1))
		close(gone)
	}()
	select {
	case status := <-done:
		return reply{ExitCode: exitCode(status)}, nil
	case <-gone:
		_ = syscall.Kill(-pid, syscall.SIGKILL)
		<-done
		return reply{}, errors.New("asker has gone away")
	}
}

func exitCode(s syscall.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}

func (d *initd) start(req request) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s := d.services[req.Name]; s != nil && !isClosed(s.ended) {
		return fmt.Errorf("service %s runs already", req.Name)
	}
	s := &service{req: req, ended: make(chan struct{})}
	done, err := d.launchLocked(s)
	if err != nil {
		return err
	}
	d.services[req.Name] = s
	go d.keep(s, done)
	return nil
}

func (d *initd) launchLocked(s *service) (<-chan syscall.WaitStatus, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	if err := os.MkdirAll(filepath.Dir(s.req.Log), 0o755); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(s.req.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	pid, done, err := d.spawnLocked(s.req, []*os.File{null, log, log})
	if err != nil {
		return nil, err
	}
	s.pid = pid
	s.starts++
	return done, nil
}

// keep waits for a service and starts it again, like systemd's Restart=always.
func (d *initd) keep(s *service, done <-chan syscall.WaitStatus) {
	for {
		status := <-done
		d.mu.Lock()
		s.pid, s.lastExit = 0, exitCode(status)
		d.mu.Unlock()
		time.Sleep(100 * time.Millisecond)
		d.mu.Lock()
		var err error
		if s.req.Restart && !s.stopping {
			done, err = d.launchLocked(s)
		} else {
			close(s.ended)
		}
		ended := isClosed(s.ended)
		d.mu.Unlock()
		if err != nil {
			fmt.Fprintf(os.Stderr, "init: restart %s: %v\n", s.req.Name, err)
			close(s.ended)
			return
		}
		if ended {
			return
		}
	}
}

func (d *initd) stop(req request) error {
	d.mu.Lock()
	s := d.services[req.Name]
	if s == nil {
		d.mu.Unlock()
		return nil
	}
	s.stopping = true
	if s.pid != 0 {
		_ = syscall.Kill(s.pid, req.Signal)
	}
	d.mu.Unlock()
	select {
	case <-s.ended:
		return nil
	case <-time.After(req.Grace):
	}
	d.mu.Lock()
	if s.pid != 0 {
		_ = syscall.Kill(s.pid, syscall.SIGKILL)
	}
	d.mu.Unlock()
	<-s.ended
	return fmt.Errorf("service %s did not end within %s after %s and was killed", req.Name, req.Grace, req.Signal)
}

func (d *initd) signal(req request) (reply, error) {
	if req.Comm != "" {
		return signalByName(req.Comm, req.Signal)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.services[req.Name]
	if s == nil || s.pid == 0 {
		return reply{}, fmt.Errorf("service %s does not run", req.Name)
	}
	return reply{Count: 1}, syscall.Kill(s.pid, req.Signal)
}

// signalByName signals every process of the host with this command name.
func signalByName(comm string, sig syscall.Signal) (reply, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return reply{}, err
	}
	var rep reply
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 {
			continue
		}
		name, err := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
		if err == nil && strings.TrimSpace(string(name)) == comm && syscall.Kill(pid, sig) == nil {
			rep.Count++
		}
	}
	return rep, nil
}

func (d *initd) list() []ServiceStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []ServiceStatus
	for name, s := range d.services {
		list = append(list, ServiceStatus{Name: name, PID: s.pid, Starts: s.starts, LastExit: s.lastExit})
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Name < list[j].Name })
	return list
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
