package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// FreezeLimit is how long a file system stays frozen at most, unless told
// otherwise. Programs that write stand still as long.
const FreezeLimit = 10 * time.Second

// A Frozen file system keeps one state on its device until it is thawed.
type Frozen struct {
	fd   int
	talk *os.File
	cmd  *exec.Cmd
	once sync.Once
	err  error
}

// What parent and watchdog say to each other.
const (
	watchdogName = "berth-thaw"
	sayReady     = 'r'
	sayFrozen    = 'f'
	sayThawed    = 't'
)

// Freeze writes everything to the device and lets nobody write until Thaw, but for
// limit at most, 0 being FreezeLimit. fd is a directory in the mounted file
// system and stays open until Thaw. A process of its own thaws when limit has passed
// or when this process is gone, even if killed; its program must call Watchdog first
// of all. (A process that is number 1 of a PID namespace, as in a plugin's container,
// takes the watchdog with it: its successor calls ThawLeft.) Nothing in the file
// system may be written meanwhile, not even by this process. The error is a conflict when
// it is frozen already.
func Freeze(ctx context.Context, fd int, limit time.Duration) (*Frozen, error) {
	if limit <= 0 {
		limit = FreezeLimit
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	// What is dirty is written before, while programs still run.
	if err := unix.Syncfs(fd); err != nil {
		return nil, fmt.Errorf("write file system to its device: %w", err)
	}
	f := &Frozen{fd: fd}
	if err := f.watch(limit); err != nil {
		return nil, fmt.Errorf("start thaw watchdog: %w", err)
	}
	err := f.say(sayFrozen)
	if err == nil {
		err = unix.IoctlSetInt(fd, freezeNumber, 0)
		if errors.Is(err, unix.EBUSY) {
			err = fault.Conflict("the file system is frozen already: %w", err)
		}
	}
	if err != nil {
		f.dismiss()
		return nil, fmt.Errorf("freeze: %w", err)
	}
	return f, nil
}

// Thaw lets programs write again. Its error means that the file system did not stay
// frozen until now: what was read in between is not the state of one moment. Again
// it does nothing and says the same.
func (f *Frozen) Thaw() error {
	f.once.Do(func() {
		if err := thaw(f.fd); errors.Is(err, unix.EINVAL) {
			f.err = fault.Unavailable("the file system was frozen for too long, and was thawed before the end")
		} else if err != nil {
			f.err = fmt.Errorf("thaw: %w", err)
		}
		f.dismiss()
	})
	return f.err
}

// ThawLeft thaws what a killed process left frozen. Not frozen is no error. Whoever
// calls it knows that no other process of Berth is at work on the file system.
func ThawLeft(fd int) error {
	if err := thaw(fd); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("thaw: %w", err)
	}
	return nil
}

func thaw(fd int) error { return unix.IoctlSetInt(fd, thawNumber, 0) }

// watch starts the watchdog and waits until it is there.
func (f *Frozen) watch(limit time.Duration) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f.talk = os.NewFile(uintptr(pair[0]), "watchdog")
	theirs := os.NewFile(uintptr(pair[1]), "parent")
	defer theirs.Close()
	// A descriptor of its own: the caller's may be closed by then.
	dup, err := unix.FcntlInt(uintptr(f.fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return errors.Join(err, f.talk.Close())
	}
	dir := os.NewFile(uintptr(dup), "frozen")
	defer dir.Close()
	// Not of a context: it has to outlive everything.
	cmd := exec.Command("/proc/self/exe") //nolint:forbidigo // see above
	cmd.Args = []string{watchdogName, strconv.FormatInt(limit.Milliseconds(), 10)}
	cmd.Env, cmd.Dir = []string{}, "/"
	cmd.ExtraFiles = []*os.File{theirs, dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no signal to a group ends it
	if err := cmd.Start(); err != nil {
		return errors.Join(err, f.talk.Close())
	}
	f.cmd = cmd
	_ = theirs.Close()
	var word [1]byte
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		f.dismiss()
		return err
	}
	if n, err := f.talk.Read(word[:]); n != 1 || word[0] != sayReady {
		f.dismiss()
		return fmt.Errorf("it does not answer: %w", errors.Join(err, errWatchdog))
	}
	return nil
}

var errWatchdog = errors.New("the program must call filesystem.Watchdog first")

func (f *Frozen) say(word byte) error {
	_, err := f.talk.Write([]byte{word})
	return err
}

// dismiss ends the watchdog and waits for it, because it holds the file system open.
func (f *Frozen) dismiss() {
	_ = f.say(sayThawed)
	_ = f.talk.Close()
	_ = f.cmd.Wait()
}

// Watchdog is to be called first in main (and in TestMain) of every program that
// freezes. It returns true in a process that was started as the watchdog, when its
// work is done: main returns then.
func Watchdog() bool {
	if len(os.Args) != 2 || os.Args[0] != watchdogName {
		return false
	}
	limit, err := strconv.ParseInt(os.Args[1], 10, 64)
	if err != nil {
		return true
	}
	parent, dir := os.NewFile(3, "parent"), 4
	if _, err := parent.Write([]byte{sayReady}); err != nil {
		return true
	}
	words := make(chan byte)
	go func() {
		defer close(words)
		for {
			var word [1]byte
			if _, err := io.ReadFull(parent, word[:]); err != nil {
				return
			}
			words <- word[0]
		}
	}()
	var late <-chan time.Time
	for {
		select {
		case word, alive := <-words:
			switch {
			case !alive:
				// The kernel closes a killed process's end after its last system
				// call, a freeze for example, has ended.
				_ = thaw(dir)
				return true
			case word == sayFrozen:
				late = time.After(time.Duration(limit) * time.Millisecond)
			case word == sayThawed:
				return true
			}
		case <-late:
			// The freeze may still be on its way, then there is nothing to thaw yet.
			if thaw(dir) == nil {
				return true
			}
			late = time.After(time.Second)
		}
	}
}
