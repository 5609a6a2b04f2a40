package pluginapi

import (
	"context"
	"sync"

	"github.com/berth-plugin/berth/shared/fault"
)

// A Ready holds requests back while a driver recovers. dockerd takes a plugin
// for failed when its socket does not accept within about ten seconds, and
// recovery may take longer, so the socket is served first. The zero value is not
// usable; see NewReady. All methods may be called concurrently.
type Ready struct {
	once sync.Once
	done chan struct{}
	err  error // written before done is closed
}

// NewReady returns a Ready that makes requests wait.
func NewReady() *Ready {
	return &Ready{done: make(chan struct{})}
}

// Open ends the waiting: with nil every request goes on, with an error every
// request is refused with it. Only the first call counts.
func (r *Ready) Open(err error) {
	r.once.Do(func() {
		r.err = err
		close(r.done)
	})
}

// Wait returns when Open was called, with its error, or when ctx ends.
func (r *Ready) Wait(ctx context.Context) error {
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return fault.Unavailable("berthd is still recovering its state; try again")
	}
}
