package testkit

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"

	"gotest.tools/v3/poll"
)

// Output collects what a program says. Its methods may be called concurrently.
type Output struct {
	mu   sync.Mutex
	said bytes.Buffer
}

// Write is for the program.
func (o *Output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.said.Write(b)
}

// String is what was said since the last Reset.
func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.said.String()
}

// Reset forgets what was said.
func (o *Output) Reset() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.said.Reset()
}

// WaitFor waits at most ten seconds until the program has said this.
func (o *Output) WaitFor(t testing.TB, words string) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if strings.Contains(o.String(), words) {
			return poll.Success()
		}
		return poll.Continue("no %q in: %s", words, o)
	}, poll.WithDelay(5*time.Millisecond), poll.WithTimeout(10*time.Second))
}
