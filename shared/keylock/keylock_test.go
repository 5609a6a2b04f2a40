package keylock

import (
	"context"
	"sync"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

func TestOneNameIsHeldByOneAtATime(t *testing.T) {
	l := New()
	var wg sync.WaitGroup
	shared := 0 // the race detector sees it when two hold the lock
	for range 50 {
		wg.Go(func() {
			unlock, err := l.Lock(t.Context(), "web")
			if err != nil {
				t.Error(err)
				return
			}
			defer unlock()
			shared++
		})
	}
	wg.Wait()
	assert.Equal(t, shared, 50)
	assert.Equal(t, len(l.locks), 0, "unused names stay in the map")
}

func TestOtherNamesGoOn(t *testing.T) {
	l := New()
	unlock, err := l.Lock(t.Context(), "slow")
	assert.NilError(t, err)
	defer unlock()
	other, err := l.Lock(t.Context(), "quick")
	assert.NilError(t, err)
	other()
}

func TestWaitingEndsWithTheContext(t *testing.T) {
	l := New()
	unlock, err := l.Lock(t.Context(), "web")
	assert.NilError(t, err)

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = l.Lock(ctx, "web")
	assert.ErrorIs(t, err, context.DeadlineExceeded)

	unlock()
	unlock() // a second call is harmless
	again, err := l.Lock(t.Context(), "web")
	assert.NilError(t, err)
	again()
	assert.Equal(t, len(l.locks), 0)
}

func TestEndedContextNeverGetsAFreeLock(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l := New()
	_, err := l.Lock(ctx, "web")
	assert.ErrorIs(t, err, context.Canceled)
	assert.Equal(t, len(l.locks), 0)
}
