package journal

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// childVar makes the test binary do one of children instead of the tests.
const childVar = "BERTH_JOURNAL_CHILD"

// children run in processes of their own: to be killed, or to mount things that no
// other process sees. Each gets the path of a log.
var children = map[string]func(path string) error{
	"append":  appendForever,
	"script":  script,
	"no-room": noRoom,
	"no-sync": noSync,
}

func TestMain(m *testing.M) {
	if what := os.Getenv(childVar); what != "" {
		if err := children[what](os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(t *testing.T, what, path string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	assert.NilError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, self, path)
	cmd.Env = append(os.Environ(), childVar+"="+what)
	cmd.Stderr = os.Stderr
	return cmd
}

// ownMounts runs a child whose mounts nobody else sees.
func ownMounts(t *testing.T, what string) {
	t.Helper()
	cmd := child(t, what, t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	out := new(strings.Builder)
	cmd.Stderr = out
	assert.NilError(t, cmd.Run(), "%s", out)
}

// openChild is openCounters without a test.
func openChild(path string) (*counters, error) {
	c := &counters{values: map[string]int{}}
	j, rec, err := Open(path, Options{Replay: c.replay})
	if err != nil {
		return nil, err
	}
	if rec.Lossy() {
		return nil, fmt.Errorf("%s", rec)
	}
	c.log = j
	return c, nil
}

// appendForever counts in eight goroutines, takes snapshots all the time and prints
// every count that is durable.
func appendForever(path string) error {
	c, err := openChild(path)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	failed := make(chan error)
	for g := range 8 {
		go func() {
			key := fmt.Sprintf("k%d", g)
			for {
				c.mu.Lock()
				value := c.values[key] + 1
				c.mu.Unlock()
				if err := c.add(key).Wait(context.Background()); err != nil {
					failed <- err
				}
				mu.Lock()
				fmt.Println(key, value)
				mu.Unlock()
			}
		}()
	}
	go func() {
		for {
			if err := c.compact(); err != nil {
				failed <- err
			}
			time.Sleep(2 * time.Millisecond)
		}
	}()
	return <-failed
}

// acknowledged reads what a child has printed.
func acknowledged(t *testing.T, out string) map[string]int {
	t.Helper()
	values := map[string]int{}
	for lines := bufio.NewScanner(strings.NewReader(out)); lines.Scan(); {
		var key string
		var value int
		// The last line may be half there.
		if _, err := fmt.Sscanf(lines.Text()+"\n", "%s %d\n", &key, &value); err == nil {
			values[key] = max(values[key], value)
		}
	}
	return values
}
