// Package restictest gives tests the programs restic and rest-server, at the versions that
// the repository names, and runs them.
package restictest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Binary is the path of restic. The first call of all builds it, which takes a minute.
func Binary(t testing.TB) string { return tool(t, "restic") }

func tool(t testing.TB, name string) string {
	t.Helper()
	_, file, _, _ := runtime.Caller(0)
	repo := filepath.Join(filepath.Dir(file), "..", "..", "..")
	out, err := exec.CommandContext(context.Background(), filepath.Join(repo, "scripts/build-tools"), name).CombinedOutput()
	if err != nil {
		t.Fatalf("scripts/build-tools %s, which needs Go and its module proxy: %v\n%s", name, err, out)
	}
	return filepath.Join(repo, "build/bin", name)
}

// Password of the repositories of Plain.
const Password = "correct horse battery staple"

// Repository gives an empty repository in a local directory. Its key is derived from the password in
// no time, instead of the half second that each call of restic takes with its own.
func Repository(t testing.TB) string {
	t.Helper()
	_, file, _, _ := runtime.Caller(0)
	to := filepath.Join(t.TempDir(), "repository")
	if err := os.CopyFS(to, os.DirFS(filepath.Join(filepath.Dir(file), "testdata/repository"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"data", "index", "locks", "snapshots"} {
		if err := os.MkdirAll(filepath.Join(to, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return to
}

// Plain runs restic as a user without Berth would, and returns its output.
func Plain(t testing.TB, repository string, args ...string) string {
	t.Helper()
	out, err := PlainCommand(t, repository, args...).Output()
	if err != nil {
		var words []byte
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			words = exit.Stderr
		}
		t.Fatalf("restic %q: %v\n%s%s", args, err, out, words)
	}
	return string(out)
}

// PlainCommand is Plain, not yet started.
func PlainCommand(t testing.TB, repository string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), Binary(t), args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "TZ=UTC", "RESTIC_REPOSITORY=" + repository, "RESTIC_PASSWORD=" + Password}
	return cmd
}

// A Server is a running rest-server.
type Server struct {
	// URL is what the name of a repository is appended to.
	URL  string
	addr string
	dir  string
	cmd  *exec.Cmd
	bin  string
}

// Serve starts a rest-server on the loopback address that keeps repositories in dir.
func Serve(t testing.TB, dir string) *Server {
	t.Helper()
	s := &Server{dir: dir, addr: "127.0.0.1:0", bin: tool(t, "rest-server")}
	s.Start(t)
	t.Cleanup(s.Kill)
	return s
}

// Start starts a killed server at its old address.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	if s.addr == "127.0.0.1:0" {
		// rest-server does not say which port it was given.
		l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		s.addr = l.Addr().String()
		_ = l.Close()
	}
	s.cmd = exec.CommandContext(context.Background(), s.bin, "--path", s.dir, "--listen", s.addr, "--no-auth")
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	words, err := s.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.cmd.Stdout = s.cmd.Stderr
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.URL = "rest:http://" + s.addr + "/"
	go func() {
		for lines := bufio.NewScanner(words); lines.Scan(); {
		}
	}()
	for end := time.Now().Add(20 * time.Second); ; {
		c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", s.addr)
		if err == nil {
			_ = c.Close()
			return
		}
		if time.Now().After(end) {
			t.Fatalf("rest-server does not answer at %s: %v", s.addr, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Kill ends the server at once.
func (s *Server) Kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// Below are the processes below process pid, by number, with their command lines.
func Below(t testing.TB, pid int) map[int]string {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	children := map[int][]int{}
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		// PID (NAME) STATE PARENT; the name may hold anything.
		var child, parent int
		var state string
		_, _ = fmt.Sscanf(string(text), "%d", &child)
		if _, err := fmt.Sscanf(string(text[strings.LastIndexByte(string(text), ')')+1:]), "%s %d", &state, &parent); err == nil && state != "Z" {
			children[parent] = append(children[parent], child)
		}
	}
	below := map[int]string{}
	for next := []int{pid}; len(next) > 0; next = next[1:] {
		for _, child := range children[next[0]] {
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", child))
			below[child] = strings.ReplaceAll(string(line), "\x00", " ")
			next = append(next, child)
		}
	}
	return below
}
