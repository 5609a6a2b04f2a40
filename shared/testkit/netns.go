// Package testkit gives tests a place of their own in the real kernel: network
// namespaces that nothing else sees and that are gone when the test ends.
//
// It knows nothing about Berth; what happens in a namespace is up to the test.
package testkit

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// commandTimeout bounds every command that a test runs in a namespace.
const commandTimeout = 30 * time.Second

// A Netns is a network namespace with nothing in it but lo, which is up. It
// belongs to one test and is gone after it.
type Netns struct {
	tb   testing.TB
	file *os.File
}

// NewNetns makes a network namespace. At the end of the test it fails the test
// when a thread or process is left in the namespace, or when the links of the
// machine's own namespace are not those of the start.
func NewNetns(tb testing.TB) *Netns {
	tb.Helper()
	before := linkNames(tb)
	var (
		file *os.File
		err  error
	)
	onOwnThread(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("make a network namespace (needs root): %w", err)
			return
		}
		if err = loopbackUp(); err != nil {
			return
		}
		file, err = os.Open("/proc/thread-self/ns/net")
	})
	if err != nil {
		tb.Fatal(err)
	}
	n := &Netns{tb: tb, file: file}
	tb.Cleanup(func() {
		n.checkLeft()
		if err := file.Close(); err != nil {
			tb.Errorf("close the network namespace: %v", err)
		}
		if after := linkNames(tb); !slices.Equal(before, after) {
			tb.Errorf("links of the machine changed from %v to %v", before, after)
		}
	})
	return n
}

// File is the namespace as an open nsfs file, valid until the test ends.
func (n *Netns) File() *os.File { return n.file }

// Path names the namespace for `ip link set X netns PATH`.
func (n *Netns) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

// Do runs fn on a thread inside the namespace and waits for it. The thread is
// thrown away afterwards. Goroutines started by fn are outside. fn may fail the
// test with Fatal.
func (n *Netns) Do(fn func()) {
	n.tb.Helper()
	var (
		err      error
		finished bool
	)
	onOwnThread(func() {
		if err = unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err == nil {
			fn()
		}
		finished = true
	})
	if err != nil {
		n.tb.Fatalf("enter the network namespace: %v", err)
	}
	if !finished { // fn has called FailNow: the test is over here, too.
		runtime.Goexit()
	}
}

// Run runs a command in the namespace and returns what it printed, trimmed.
// A failing command ends the test.
func (n *Netns) Run(argv ...string) string {
	n.tb.Helper()
	out, err := n.Try(argv...)
	if err != nil {
		n.tb.Fatal(err)
	}
	return out
}

// Try is Run for a command that may fail.
func (n *Netns) Try(argv ...string) (string, error) {
	n.tb.Helper()
	var (
		out []byte
		err error
	)
	n.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
		defer cancel()
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		out, err = cmd.CombinedOutput()
	})
	if err != nil {
		return string(out), fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// checkLeft waits a moment for the last threads to go and reports the others.
func (n *Netns) checkLeft() {
	n.tb.Helper()
	var left []string
	for deadline := time.Now().Add(3 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if left = n.tasks(); len(left) == 0 {
			return
		}
	}
	n.tb.Errorf("left in the test's network namespace: %v", left)
}

// tasks lists the threads, of any process, that are in the namespace.
func (n *Netns) tasks() []string {
	var want unix.Stat_t
	if err := unix.Fstat(int(n.file.Fd()), &want); err != nil {
		n.tb.Fatal(err)
	}
	paths, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/ns/net")
	if err != nil {
		n.tb.Fatal(err)
	}
	var in []string
	for _, path := range paths {
		var got unix.Stat_t
		// Threads come and go while the list is read.
		if unix.Stat(path, &got) == nil && got.Ino == want.Ino && got.Dev == want.Dev {
			in = append(in, path)
		}
	}
	return in
}

// onOwnThread runs fn on a thread that does not outlive it: its goroutine ends
// locked, so the Go runtime never runs other goroutines in a foreign namespace.
// Only the main thread cannot end; while it is held here, fn gets another one.
func onOwnThread(fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			onOwnThread(fn)
			runtime.UnlockOSThread()
			return
		}
		fn()
	}()
	<-done
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

func linkNames(tb testing.TB) []string {
	tb.Helper()
	links, err := net.Interfaces()
	if err != nil {
		tb.Fatal(err)
	}
	names := make([]string, 0, len(links))
	for _, l := range links {
		names = append(names, l.Name)
	}
	slices.Sort(names)
	return names
}
