package guest

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Daemon is a process that a node keeps running.
type Daemon struct {
	node string
	name string
	log  string // path of the file with its output
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
}

// Start runs argv in the node's background with its output in a log, whose end is
// shown when the test fails.
func (n *Node) Start(name string, argv ...string) *Daemon {
	n.t.Helper()
	path := n.logFile(name)
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		n.t.Fatal(err)
	}
	// The process lives until the VM ends, beyond the test's context.
	d := &Daemon{node: n.Name, name: name, log: path, cmd: n.command(context.Background(), argv...), done: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := d.cmd.Start(); err != nil {
		n.t.Fatalf("%s: start %s: %v", n.Name, name, err)
	}
	go func() {
		_ = d.cmd.Wait() // how a daemon ends is in its log
		_ = log.Close()
		close(d.done)
	}()
	n.vm.Cleanup(func() {
		if n.vm.Failed() {
			n.vm.Logf("end of %s's %s log:\n%s", n.Name, name, logTail(path))
		}
	})
	return d
}

// logFile is where a daemon's output goes.
func (n *Node) logFile(daemon string) string { return filepath.Join(n.dir, daemon+".log") }

// Signal sends a signal to the daemon.
func (d *Daemon) Signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := signalInner(d.cmd, sig); err != nil {
		t.Fatalf("%s: signal %s: %v", d.node, d.name, err)
	}
}

// Stop ends the daemon with SIGTERM and waits for it.
func (d *Daemon) Stop(t testing.TB) {
	t.Helper()
	d.Signal(t, unix.SIGTERM)
	d.WaitEnd(t)
}

// Log is what the daemon has said until now, over all its starts.
func (d *Daemon) Log(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile(d.log)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// WaitEnd waits for the daemon's end.
func (d *Daemon) WaitEnd(t testing.TB) {
	t.Helper()
	select {
	case <-d.done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: %s does not end within 30 s", d.node, d.name)
	}
}

// waitUp waits until ready says true, and fails when the daemon ends before.
func (d *Daemon) waitUp(t testing.TB, limit time.Duration, ready func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ready(); {
		select {
		case <-d.done:
			t.Fatalf("%s: %s ended at its start", d.node, d.name)
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %s is not ready within %s", d.node, d.name, limit)
		}
	}
}

// listens tells, when asked, whether someone answers at a Unix socket of the node.
func (n *Node) listens(socket string) func() bool {
	return func() bool {
		conn, err := net.Dial("unix", n.Path(socket))
		return err == nil && conn.Close() == nil
	}
}

// logTail returns the last 40 lines of a file.
func logTail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-40):], []byte("\n")))
}
