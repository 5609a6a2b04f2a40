package presence

import (
	"fmt"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

// dead makes an owner of the volume that all of the hosts take for dead.
func dead(t testing.TB, root, volume string, hosts ...*host) *host {
	t.Helper()
	owner := newHost(t, root, "owner-"+volume)
	assert.NilError(t, owner.take(volume))
	owner.age(time.Hour)
	for _, h := range hosts {
		h.watch(deadAfter + beatEvery)
	}
	return owner
}

func TestTakeOver(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	owner := dead(t, root, v, a)
	assert.Assert(t, errdefs.IsConflict(b.take(v)), "it has not watched")
	assert.NilError(t, a.take(v))
	l, err := a.Lease(t.Context(), v)
	assert.NilError(t, err)
	assert.Equal(t, l.Generation, uint64(2))

	assert.Equal(t, len(owner.told()), 0)
	owner.beat()
	assert.DeepEqual(t, owner.told(), []string{"lost " + v + ": host a took it over"})
	assert.Assert(t, errdefs.IsConflict(owner.take(v)))
	assert.NilError(t, owner.Release(t.Context(), v))
	a.beat()
	assert.Equal(t, len(a.told()), 0)
	assert.Assert(t, a.has(v) && !owner.has(v))
}

func TestTakeOverByForce(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	assert.NilError(t, a.take(v))
	l, err := b.Acquire(t.Context(), v, true)
	assert.NilError(t, err)
	assert.Equal(t, l.Generation, uint64(2))
	a.wait(beatEvery)
	a.beat()
	assert.DeepEqual(t, a.told(), []string{"lost " + v + ": host b took it over"})
	b.beat()
	assert.Equal(t, len(b.told()), 0)
}

func TestWhoWasEndedIsOnlyTakenOverByForce(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, owner := newHost(t, root, "a"), newHost(t, root, "owner")
	assert.NilError(t, owner.take(v))
	assert.NilError(t, owner.Close(t.Context()))
	owner.age(time.Hour)
	a.watch(deadAfter + beatEvery)
	err := a.take(v)
	assert.Assert(t, errdefs.IsConflict(err))
	assert.ErrorContains(t, err, "its Berth was ended 1h0m0s ago while containers may have gone on with it")
	l, err := a.Lease(t.Context(), v)
	assert.NilError(t, err)
	assert.Assert(t, l.Stopped && !l.Alive)
	_, err = a.Acquire(t.Context(), v, true)
	assert.NilError(t, err)

	// Who has nothing in use just ends.
	assert.NilError(t, a.Release(t.Context(), v))
	assert.NilError(t, a.Close(t.Context()))
	rec, err := a.record()
	assert.NilError(t, err)
	assert.Assert(t, !rec.Stopped)
}

// The owner that was taken for dead beats while another takes over. In every order
// of their steps, not both have the lease at the end.
func TestTheOwnerComesBackWhileItIsTakenOver(t *testing.T) {
	outcomes := make(map[string]int)
	// Bit i of order says whose i-th step it is. Each has fewer than five.
	for order := range 1 << 9 {
		root, v := mounttest.Tmpfs(t, 1<<20), uuid.NewString()
		a := newHost(t, root, "a")
		owner := dead(t, root, v, a)

		type actor struct {
			at, goOn chan struct{}
			done     chan struct{}
		}
		begin := func(h *host, do func()) *actor {
			c := &actor{at: make(chan struct{}), goOn: make(chan struct{}), done: make(chan struct{})}
			h.onStep(func(string) error { c.at <- struct{}{}; <-c.goOn; return nil })
			go func() { defer close(c.done); c.at <- struct{}{}; <-c.goOn; do() }()
			return c
		}
		var errTake error
		actors := [2]*actor{
			begin(a, func() { errTake = a.take(v) }),
			begin(owner, func() { assert.Check(t, owner.Beat(t.Context())) }),
		}
		// step lets one go on to its next step, or its end.
		for i := range actors {
			<-actors[i].at
		}
		ended := [2]bool{}
		step := func(i int) {
			if ended[i] {
				return
			}
			actors[i].goOn <- struct{}{}
			select {
			case <-actors[i].at:
			case <-actors[i].done:
				ended[i] = true
			}
		}
		for i := range 9 {
			step(order >> i & 1)
		}
		for i := range actors {
			for !ended[i] {
				step(i)
			}
		}
		a.onStep(nil)
		owner.onStep(nil)
		assert.Assert(t, a.has(v) == (errTake == nil))
		assert.Assert(t, errTake == nil || errdefs.IsConflict(errTake), "%v", errTake)
		assert.Assert(t, !a.has(v) || !owner.has(v), "order %b: both have it", order)
		lost := len(owner.told()) > 0
		assert.Equal(t, lost, !owner.has(v))
		outcomes[fmt.Sprintf("taken %v, owner has it %v", a.has(v), owner.has(v))]++

		// Whatever happened, it goes on.
		owner.wait(beatEvery)
		owner.beat()
		if !a.has(v) {
			assert.NilError(t, owner.take(v))
		} else {
			assert.Assert(t, errdefs.IsConflict(owner.take(v)))
		}
	}
	// The test would see nothing if it never came to these.
	assert.Assert(t, outcomes["taken true, owner has it false"] > 0 && outcomes["taken false, owner has it true"] > 0 && outcomes["taken false, owner has it false"] > 0, "%v", outcomes)
}
