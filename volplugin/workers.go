package volplugin

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/berth-plugin/berth/shared/fault"
)

// workers run what may hang in the file system, a bounded number at a time, so
// that a request can end without it.
type workers struct {
	root    string
	slots   chan struct{}
	givenUp atomic.Int64
}

func newWorkers(root string, most int) *workers {
	return &workers{root: root, slots: make(chan struct{}, most)}
}

// The states of one run. Exactly one side moves it away from running.
const (
	running int32 = iota
	committed
	abandoned
)

// run calls fn and returns its error. When ctx ends first, run returns an
// unavailable error and fn is given up; it goes on until the kernel lets it.
//
// commit, which fn may call once, settles which of the two it is: true means that
// the caller waits for fn to the end, whatever ctx does, so only quick and local
// work may follow; false means that the caller is gone and has answered with an
// error, so fn undoes its work. release is called when fn has returned, or was
// never started.
func (w *workers) run(ctx context.Context, release func(), fn func(ctx context.Context, commit func() bool) error) error {
	select {
	case w.slots <- struct{}{}:
	case <-ctx.Done():
		release()
		return w.hangs()
	}
	var state atomic.Int32
	done := make(chan error, 1)
	go func() {
		defer func() {
			<-w.slots
			if state.Load() == abandoned {
				w.givenUp.Add(-1)
			}
		}()
		// Before the answer: a client's next request must find the lock free.
		err := func() error {
			defer release()
			return fn(ctx, func() bool { return state.CompareAndSwap(running, committed) })
		}()
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	// Counted first, so that the counter is right when fn ends this moment.
	w.givenUp.Add(1)
	if state.CompareAndSwap(running, abandoned) {
		return w.hangs()
	}
	w.givenUp.Add(-1)
	return <-done
}

// errHangs is in the chain of errors about storage that did not answer in time.
var errHangs = errors.New("does not answer")

func (w *workers) hangs() error {
	return fault.Unavailable("volume root %s %w", w.root, errHangs)
}
