package bridge

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/berth-plugin/berth/netplugin/link"
)

// announceAfter is when the addresses of a new endpoint are announced, counted from
// when its container has its link: more than once, since nobody answers.
func announceAfter() []time.Duration {
	return []time.Duration{0, 500 * time.Millisecond, 1500 * time.Millisecond}
}

// news are the announcements that are to be made. It is safe for concurrent use.
type news struct {
	mu sync.Mutex
	// running says that somebody makes them; otherwise none are taken.
	running bool
	// waiting are those of endpoints whose container has not got its link, by
	// endpoint ID.
	waiting map[string]link.Announcement
	due     []dueNews
	// wake is sent to when due has become longer.
	wake chan struct{}
}

type dueNews struct {
	link.Announcement
	since time.Time
	// made is how often it has been announced.
	made int
}

func (d dueNews) at() time.Time { return d.since.Add(announceAfter()[d.made]) }

func newNews() *news {
	return &news{waiting: map[string]link.Announcement{}, wake: make(chan struct{}, 1)}
}

func (n *news) run(running bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.running, n.due = running, nil
	clear(n.waiting)
}

// expect takes the announcement of an endpoint that has just been made.
func (n *news) expect(a link.Announcement) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.running && len(a.Addrs) > 0 {
		n.waiting[a.EndpointID] = a
	}
}

// carrier says that the endpoint's container has its link.
func (n *news) carrier(endpoint string, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	a, ok := n.waiting[endpoint]
	if !ok {
		return
	}
	delete(n.waiting, endpoint)
	n.due = append(n.due, dueNews{Announcement: a, since: now})
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// forget drops what is left to announce of an endpoint.
func (n *news) forget(endpoint string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.waiting, endpoint)
	n.due = slices.DeleteFunc(n.due, func(d dueNews) bool { return d.EndpointID == endpoint })
}

// take returns what is to be announced now, and in how long there is more; 0 is
// never.
func (n *news) take(now time.Time) (list []link.Announcement, next time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var rest []dueNews
	for _, d := range n.due {
		if !d.at().After(now) {
			d.First = d.made == 0
			list = append(list, d.Announcement)
			if d.made++; d.made == len(announceAfter()) {
				continue
			}
		}
		rest = append(rest, d)
		if wait := max(d.at().Sub(now), time.Millisecond); next == 0 || wait < next {
			next = wait
		}
	}
	n.due = rest
	return list, next
}

// Run announces the addresses of endpoints that are made from now on to their
// neighbours when their containers get them, as engines before 28 do not. It
// returns when ctx ends and all its work has ended, or at once, with a line in the
// log, where packets may not be sent (CAP_NET_RAW): all else works without. One Run
// at a time.
func (m *Mode) Run(ctx context.Context) {
	if err := m.links.CheckAnnounce(); err != nil {
		m.logAnnounce(err)
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	m.news.run(true)
	var watch sync.WaitGroup
	watch.Go(func() {
		if err := m.links.Watch(ctx, m.linkEvent); err != nil && ctx.Err() == nil {
			m.log.WithError(err).Error("links are not watched: addresses of new containers are not announced to their neighbours")
			cancel()
		}
	})
	defer func() {
		cancel()
		watch.Wait()
		m.news.run(false)
	}()
	for {
		list, next := m.news.take(time.Now())
		if err := m.links.Announce(list); err != nil {
			m.logAnnounce(err)
		}
		var timer <-chan time.Time
		if next > 0 {
			timer = time.After(next)
		}
		select {
		case <-ctx.Done():
			return
		case <-timer:
		case <-m.news.wake:
		}
	}
}

func (m *Mode) logAnnounce(err error) {
	if errors.Is(err, fs.ErrPermission) {
		m.log.WithError(err).Warn("addresses of new containers are not announced to their neighbours: CAP_NET_RAW is missing")
		return
	}
	m.log.WithError(err).Warn("addresses of a new container could not be announced to all its neighbours")
}

// linkEvent notes which containers have got their link.
func (m *Mode) linkEvent(e link.Event) {
	links := []link.Link{e.Link}
	if e.Lost {
		var err error
		if links, err = m.links.Owned(); err != nil {
			m.log.WithError(err).Warn("links could not be listed: addresses of new containers may not be announced")
		}
	}
	for _, l := range links {
		if !e.Removed && l.Carrier && l.Owner.Endpoint != "" && l.Peer == 0 {
			m.news.carrier(l.Owner.Endpoint, time.Now())
		}
	}
}
