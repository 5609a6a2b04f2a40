package presence

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestRunBeatsAndWritesDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root, v := t.TempDir(), uuid.NewString()
		h := bubble(t, root, "a", nil)
		var writes atomic.Int32
		h.onStep(func(step string) error {
			if step == "host.replace" {
				writes.Add(1)
			}
			return nil
		})
		stop := h.run(t)
		time.Sleep(10*beatEvery + time.Second)
		assert.Equal(t, writes.Load(), int32(11))
		assert.NilError(t, h.Enter(t.Context(), v))
		assert.Equal(t, writes.Load(), int32(12))
		h.Leave(v)
		synctest.Wait()
		time.Sleep(time.Nanosecond)
		rec, err := h.record()
		assert.NilError(t, err)
		assert.Equal(t, len(rec.Volumes), 0, "Leave is written down without waiting for the next heartbeat")
		stop()
	})
}

func TestAServerThatHangsBlocksNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root, v := t.TempDir(), uuid.NewString()
		var mu sync.Mutex
		var hang chan struct{}
		opens := 0
		h := bubble(t, root, "a", func(c *Config) {
			open := c.Open
			c.Open = func() (*rooted.Dir, error) {
				mu.Lock()
				opens++
				wait := hang
				mu.Unlock()
				if wait != nil {
					<-wait
				}
				return open()
			}
		})
		stop := h.run(t)
		assert.NilError(t, h.Enter(t.Context(), v))
		assert.NilError(t, h.take(v))
		mu.Lock()
		hang, opens = make(chan struct{}), 0
		mu.Unlock()

		time.Sleep(doubtAfter)
		assert.DeepEqual(t, h.happened(), []string(nil))
		time.Sleep(beatEvery)
		synctest.Wait()
		events := h.happened()
		assert.Equal(t, len(events), 1)
		assert.Assert(t, strings.HasPrefix(events[0], "doubtful "+v))
		time.Sleep(10 * time.Hour)
		assert.DeepEqual(t, h.happened(), []string(nil))
		mu.Lock()
		assert.Check(t, opens == 1, "no more than one heartbeat hangs")
		mu.Unlock()

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err := h.Enter(ctx, uuid.NewString())
		cancel()
		assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
		h.Leave(uuid.NewString())

		mu.Lock()
		close(hang)
		hang = nil
		mu.Unlock()
		time.Sleep(2 * beatEvery)
		events = h.happened()
		assert.Equal(t, len(events), 1)
		assert.Assert(t, strings.HasPrefix(events[0], "held "+v))

		// Run ends though a heartbeat hangs.
		mu.Lock()
		hang = make(chan struct{})
		mu.Unlock()
		time.Sleep(2 * beatEvery)
		stop()
		close(hang)
		synctest.Wait()
	})
}

func TestRunTriesAgainSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := bubble(t, t.TempDir(), "a", nil)
		tries := 0
		h.onStep(func(step string) error {
			if tries++; tries <= 3 {
				return errors.New("no")
			}
			return nil
		})
		stop := h.run(t)
		time.Sleep(3*retryBeat + time.Second)
		_, err := h.record()
		assert.NilError(t, err)
		stop()
	})
}

func TestRunTakesOverWhenTheOwnerIsDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root, v := t.TempDir(), uuid.NewString()
		a, b := bubble(t, root, "a", nil), bubble(t, root, "b", nil)
		stopA, stopB := a.run(t), b.run(t)
		assert.NilError(t, b.take(v))
		time.Sleep(time.Hour + time.Second)
		assert.Assert(t, errdefs.IsConflict(a.take(v)))
		assert.Equal(t, len(b.happened()), 0)
		stopB() // it dies
		b.age(time.Hour)
		time.Sleep(doubtAfter + 2*beatEvery)
		assert.Assert(t, errdefs.IsConflict(a.take(v)), "not before its own doubts are over")
		time.Sleep(3 * beatEvery)
		assert.NilError(t, a.take(v))
		// It was not dead.
		stopB = b.run(t)
		time.Sleep(beatEvery)
		events := b.happened()
		assert.Equal(t, len(events), 2, "%q", events)
		assert.Assert(t, strings.HasPrefix(events[0], "doubtful "+v) && events[1] == "lost "+v+": host a took it over", "%q", events)
		assert.Equal(t, len(a.happened()), 0)
		stopA()
		stopB()
	})
}
