package volplugin

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

func TestWorkThatIsGivenUpLearnsIt(t *testing.T) {
	w := newWorkers("/root", 1)
	ctx, cancel := context.WithCancel(t.Context())
	gone, told, released := make(chan struct{}), make(chan bool, 1), make(chan struct{})
	err := w.run(ctx, func() { close(released) }, func(_ context.Context, commit func() bool) error {
		cancel()
		<-gone
		told <- commit()
		return nil
	})
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorIs(t, err, errHangs)
	assert.Equal(t, w.givenUp.Load(), int64(1))
	select {
	case <-released:
		t.Fatal("the lock of a volume is free while work on it hangs")
	default:
	}

	// The only slot is taken: others are refused in time and hold nothing.
	late, stop := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer stop()
	refused := false
	err = w.run(late, func() { refused = true }, func(context.Context, func() bool) error { return nil })
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.Assert(t, refused)

	close(gone)
	assert.Equal(t, <-told, false)
	<-released
	waitFor(t, func() bool { return w.givenUp.Load() == 0 && len(w.slots) == 0 })
}

func TestCommittedWorkIsWaitedFor(t *testing.T) {
	w := newWorkers("/root", 1)
	ctx, cancel := context.WithCancel(t.Context())
	want := errors.New("the work's own answer")
	err := w.run(ctx, func() {}, func(_ context.Context, commit func() bool) error {
		assert.Check(t, commit())
		cancel()
		time.Sleep(20 * time.Millisecond)
		return want
	})
	assert.ErrorIs(t, err, want)
	waitFor(t, func() bool { return w.givenUp.Load() == 0 && len(w.slots) == 0 })
}
