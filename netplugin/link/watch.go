package link

import (
	"context"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// An Event says that a link has appeared, changed or gone, or that a bridge has
// lost an address.
type Event struct {
	Link    Link
	Removed bool
	// AddressLost says that Link, a bridge, has an address less. Other links are not
	// reported with it.
	AddressLost bool
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
	var namespace *netns.NsHandle
	if h.ns != nil {
		ns := netns.NsHandle(h.ns.Fd())
		namespace = &ns
	}
	// What ends a subscription also closes its channel; that is enough.
	ignore := func(error) {}
	links, linksDone := make(chan netlink.LinkUpdate), make(chan struct{})
	err := netlink.LinkSubscribeWithOptions(links, linksDone, netlink.LinkSubscribeOptions{
		Namespace: namespace, ErrorCallback: ignore, ReceiveBufferSize: eventBuffer, ReceiveBufferForceSize: true,
	})
	if err != nil {
		return fmt.Errorf("subscribe to link events: %w", err)
	}
	defer finish(links, linksDone)
	addrs, addrsDone := make(chan netlink.AddrUpdate), make(chan struct{})
	err = netlink.AddrSubscribeWithOptions(addrs, addrsDone, netlink.AddrSubscribeOptions{
		Namespace: namespace, ErrorCallback: ignore, ReceiveBufferSize: eventBuffer, ReceiveBufferForceSize: true,
	})
	if err != nil {
		return fmt.Errorf("subscribe to address events: %w", err)
	}
	defer finish(addrs, addrsDone)
	fn(Event{Lost: true})
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case u, ok := <-links:
			if !ok {
				pause(ctx)
				return nil
			}
			fn(Event{Link: fromNetlink(u.Link), Removed: u.Header.Type == unix.RTM_DELLINK})
		case u, ok := <-addrs:
			if !ok {
				pause(ctx)
				return nil
			}
			if u.NewAddr {
				continue
			}
			// A link that goes loses its addresses first: then there is nothing to find.
			if l, ok, err := h.byIndex(u.LinkIndex); err == nil && ok && l.Kind == "bridge" {
				fn(Event{Link: l, AddressLost: true})
			}
		}
	}
}

// finish ends a subscription. The library's goroutine may be in the middle of a
// send: let it finish.
func finish[T any](updates <-chan T, done chan<- struct{}) {
	close(done)
	for range updates {
	}
}

// pause waits a moment before another subscription: what ended the last one may
// last.
func pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(100 * time.Millisecond):
	}
}
