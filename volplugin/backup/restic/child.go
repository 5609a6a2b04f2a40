package restic

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// How a child is started: berth-restic MODE HOSTNAME NICE BINARY ARGUMENT...
const (
	childName = "berth-restic"
	// modeWatched has restic below the child, modeFirst in its place.
	modeWatched = "watched"
	modeFirst   = "first"
)

// Descriptors of a child, beside the standard ones.
const (
	fdParent = 3 // a pipe, at its end when the daemon is gone
	fdLease  = 4
)

// Exit codes of a child, beside those of restic.
const (
	exitFailed = 125 // restic was not started
	exitKilled = 124 // restic ended by a signal
)

// lowNumbers is more than the threads of a child take before it starts restic: all children
// in modeWatched have a lower process number, and no thread in modeFirst does.
const lowNumbers = 256

// Child is to be called first in main (and in TestMain) of every program that has an Engine.
// In a process that an Engine has started it does not return.
func Child() {
	if len(os.Args) < 5 || os.Args[0] != childName {
		return
	}
	code, err := child(os.Args[1], os.Args[2], os.Args[3], os.Args[4:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "start restic:", err)
	}
	os.Exit(code)
}

func child(mode, host, nice string, argv []string) (int, error) {
	if err := unix.Sethostname([]byte(host)); err != nil {
		return exitFailed, fmt.Errorf("set host name: %w", err)
	}
	// Whoever looks at a list of processes, or kills by name, can tell it from a daemon.
	_ = os.WriteFile("/proc/self/comm", []byte(childName), 0)
	priority, err := strconv.Atoi(nice)
	if err != nil {
		return exitFailed, err
	}
	// The priority is the thread's, and inherited from it.
	runtime.LockOSThread()
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, priority); err != nil {
		return exitFailed, fmt.Errorf("set priority: %w", err)
	}
	if mode == modeFirst {
		takeNumbers()
		return exitFailed, unix.Exec(argv[0], argv, os.Environ()) //nolint:forbidigo // the engine has made it
	}
	return watched(argv)
}

// takeNumbers uses up the numbers that processes of modeWatched may have had. The threads end
// when restic takes the place of this process, and those of restic get higher numbers.
func takeNumbers() {
	var started sync.WaitGroup
	for range lowNumbers {
		started.Add(1)
		go func() {
			runtime.LockOSThread()
			started.Done()
			select {}
		}()
	}
	started.Wait()
}

func watched(argv []string) (int, error) {
	parent := os.NewFile(fdParent, "daemon")
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, unix.SIGINT)
	cmd := exec.Command(argv[0], argv[1:]...) //nolint:forbidigo // it ends with this process
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{os.NewFile(fdLease, "lease")}
	if err := cmd.Start(); err != nil {
		return exitFailed, err
	}
	if cmd.Process.Pid >= lowNumbers {
		return exitFailed, fmt.Errorf("process number %d is too high", cmd.Process.Pid)
	}
	go func() {
		_, _ = io.Copy(io.Discard, parent)
		os.Exit(exitKilled) // and with number 1 all others end
	}()
	go func() {
		for range interrupts {
			_ = cmd.Process.Signal(unix.SIGINT)
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return exitKilled, fmt.Errorf("restic was ended by signal %v", status.Signal())
		}
		return exit.ExitCode(), nil
	}
	if err != nil {
		return exitFailed, err
	}
	return 0, nil
}

// isolate gives the child host name and process numbers of its own, and keeps the terminal's
// signals from it.
func isolate(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUTS | unix.CLONE_NEWPID, Setsid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGINT) }
	cmd.WaitDelay = grace
}
