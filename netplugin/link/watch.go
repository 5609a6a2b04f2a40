package link

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// An Event says that a link has appeared, changed or gone.
type Event struct {
	Link    Link
	Removed bool
	// Lost means that events were lost, so that anything may have changed; Link is
	// empty.
	Lost bool
}

// eventBuffer is the receive buffer in bytes: room for some thousand events.
const eventBuffer = 4 << 20

// Watch calls fn for each change of a link until ctx ends, then returns ctx's
// error. The first call, with Lost set, says that the watch has begun.
func (h *Handle) Watch(ctx context.Context, fn func(Event)) error {
	for ctx.Err() == nil {
		if err := h.watchOnce(ctx, fn); err != nil && ctx.Err() == nil {
			return err
		}
	}
	return ctx.Err()
}

// watchOnce watches until ctx ends or the kernel had to drop events.
func (h *Handle) watchOnce(ctx context.Context, fn func(Event)) error {
	opts := netlink.LinkSubscribeOptions{
		ReceiveBufferSize:      eventBuffer,
		ReceiveBufferForceSize: true,
		// What ends the subscription also closes the channel; that is enough.
		ErrorCallback: func(error) {},
	}
	if h.ns != nil {
		ns := netns.NsHandle(h.ns.Fd())
		opts.Namespace = &ns
	}
	updates, done := make(chan netlink.LinkUpdate), make(chan struct{})
	if err := netlink.LinkSubscribeWithOptions(updates, done, opts); err != nil {
		return fmt.Errorf("subscribe to link events: %w", err)
	}
	// The library's goroutine may be in the middle of a send: let it finish.
	stop := sync.OnceFunc(func() {
		close(done)
		for range updates {
		}
	})
	defer stop()
	fn(Event{Lost: true})
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case u, ok := <-updates:
			if !ok {
				// Not at once again: the reason may last.
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
				return nil
			}
			fn(Event{Link: fromNetlink(u.Link), Removed: u.Header.Type == unix.RTM_DELLINK})
		}
	}
}
