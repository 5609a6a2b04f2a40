package testkit_test

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/testkit"
)

func namespaceOfThread(t *testing.T) uint64 {
	t.Helper()
	var st unix.Stat_t
	assert.NilError(t, unix.Stat("/proc/thread-self/ns/net", &st))
	return st.Ino
}

func TestDoIsInsideAndLeavesTheTestOutside(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	outside := namespaceOfThread(t)
	a, b := testkit.NewNetns(t), testkit.NewNetns(t)
	var first, again, other uint64
	a.Do(func() { first = namespaceOfThread(t) })
	a.Do(func() { again = namespaceOfThread(t) })
	b.Do(func() { other = namespaceOfThread(t) })
	assert.Equal(t, first, again)
	assert.Assert(t, first != outside && first != other)
	assert.Equal(t, namespaceOfThread(t), outside)
	assert.Equal(t, a.Run("ip", "-br", "link"), "lo               UNKNOWN        00:00:00:00:00:00 <LOOPBACK,UP,LOWER_UP>")
}

func TestCallIsAnsweredBetweenNamespaces(t *testing.T) {
	a, b := testkit.NewNetns(t), testkit.NewNetns(t)
	a.Run("ip", "link", "add", "one", "type", "veth", "peer", "name", "two")
	a.Run("ip", "link", "set", "two", "netns", b.Path())
	a.Run("ip", "addr", "add", "192.0.2.1/24", "dev", "one")
	b.Run("ip", "addr", "add", "192.0.2.2/24", "dev", "two")
	a.Run("ip", "link", "set", "one", "up")
	b.Run("ip", "link", "set", "two", "up")
	b.Serve()
	assert.Equal(t, a.Call("192.0.2.2", 3*time.Second), "192.0.2.1")
	assert.Equal(t, a.Call("192.0.2.3", 100*time.Millisecond), "")
}

// spy is a test whose failures are counted instead of reported.
type spy struct {
	testing.TB
	cleanups []func()
	errors   int
}

func (s *spy) Helper()               {}
func (s *spy) Cleanup(fn func())     { s.cleanups = append(s.cleanups, fn) }
func (s *spy) Errorf(string, ...any) { s.errors++ }

func TestWhatIsLeftInsideIsReported(t *testing.T) {
	s := &spy{TB: t}
	ns := testkit.NewNetns(s)
	release, inside := make(chan struct{}), make(chan struct{})
	go ns.Do(func() {
		close(inside)
		<-release
	})
	<-inside
	s.cleanups[0]()
	close(release)
	assert.Equal(t, s.errors, 1)
}
