package dhcp

import (
	"cmp"
	"container/heap"
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

const (
	// atOnce is how many leases are renewed at a time: after a restart all may be due.
	atOnce = 16
	// look is how long the clock is left alone at most: timers stand still while the
	// host is suspended, leases do not.
	look = 20 * time.Second
)

// A State is where a tracked lease is in its life.
type State string

// The states. They are words for the user.
const (
	// Bound: valid, and not to be renewed yet.
	Bound State = "bound"
	// Renewing: between T1 and T2, and the server has not answered yet.
	Renewing State = "renewing"
	// Rebinding: after T2; any server may renew it.
	Rebinding State = "rebinding"
	// Lost: the lease has ended, or the server has taken it back, while a container
	// uses the address, which may now be another's. Berth goes on trying to have it
	// back.
	Lost State = "lost"
)

// A Kind is what an Event is about.
type Kind string

// The kinds of events.
const (
	// EventRenewed: the lease has new times, and is to be stored.
	EventRenewed Kind = "renewed"
	// EventLost: the lease has become Lost, see Reason. dockerd cannot be told.
	EventLost Kind = "lost"
	// EventRegained: a lost address has been leased again, and is to be stored.
	EventRegained Kind = "regained"
)

// An Event is news of a tracked lease.
type Event struct {
	Kind  Kind
	Lease Lease
	// Reason says in words why it was lost.
	Reason string
}

// A Status is what to show of a tracked lease.
type Status struct {
	Lease Lease
	State State
	// Next is when Berth will ask the server next, zero for never.
	Next time.Time
	// Reason says what went wrong last, "" while all is well.
	Reason string
}

// A key names a lease: no address is leased twice on one parent.
type key struct {
	parent string
	addr   netip.Addr
}

// A tracked lease. Its fields belong to the Manager's lock, except while busy: then
// lease, state, tries and refused are its step's to read.
type tracked struct {
	key
	lease Lease
	state State
	next  time.Time
	// tries counts those since the last answer, refused says that the last answer was
	// a no.
	tries   int
	refused bool
	reason  string
	// ctx ends with Untrack.
	ctx    context.Context //nolint:containedctx // the life of the lease, not of a call
	cancel context.CancelFunc
	// at is its place in the queue, -1 when it is not there: busy, or without end.
	at int
}

// queue is a heap (container/heap) of what is due, the next first.
type queue []*tracked

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].next.Before(q[j].next) }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].at, q[j].at = i, j
}

// Push is heap's.
func (q *queue) Push(x any) {
	if t, ok := x.(*tracked); ok {
		t.at = len(*q)
		*q = append(*q, t)
	}
}

// Pop is heap's.
func (q *queue) Pop() any {
	last := len(*q) - 1
	t := (*q)[last]
	t.at = -1
	(*q)[last] = nil
	*q = (*q)[:last]
	return t
}

// Track begins to renew a lease, in place of one with the same parent and address.
func (m *Manager) Track(l Lease) { m.track(l, false) }

// Restore tracks leases that were stored, after a restart of berthd. What has come due
// meanwhile is asked for at once: renewed if it is still valid; else it counts as lost
// until a server has given the same address again, and Notify is told if none does.
func (m *Manager) Restore(leases []Lease) {
	for _, l := range leases {
		m.track(l, true)
	}
}

func (m *Manager) track(l Lease, restored bool) {
	now := wall(m.opts.Now())
	t := &tracked{key: key{l.Parent, l.Addr}, lease: l, state: Bound, at: -1}
	t.ctx, t.cancel = context.WithCancel(m.ctx)
	t.next = renewAt(l, now)
	if restored && l.Expired(now) {
		t.next = now
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.untrackLocked(t.key)
	m.leases[t.key] = t
	m.enqueueLocked(t)
}

// renewAt is T1, or a little earlier: the leases of containers that were started
// together do not all come back together. It is never earlier than half way to T1.
func renewAt(l Lease, now time.Time) time.Time {
	if l.Expires.IsZero() {
		return time.Time{}
	}
	early := min(l.Expires.Sub(l.T1)/20, l.T1.Sub(now)/2)
	return l.T1.Add(-rand.N(max(early, 0) + 1))
}

// Untrack stops the renewals of an address; one that is not tracked is success.
func (m *Manager) Untrack(parent string, addr netip.Addr) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.untrackLocked(key{parent, addr})
}

func (m *Manager) untrackLocked(k key) {
	t, ok := m.leases[k]
	if !ok {
		return
	}
	delete(m.leases, k)
	t.cancel()
	if t.at >= 0 {
		heap.Remove(&m.queue, t.at)
	}
}

// enqueueLocked puts a lease to where its time is. One without end has none.
func (m *Manager) enqueueLocked(t *tracked) {
	if t.next.IsZero() {
		return
	}
	heap.Push(&m.queue, t)
	if t.at == 0 {
		m.poke()
	}
}

func (m *Manager) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Status lists the tracked leases by parent and address.
func (m *Manager) Status() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]Status, 0, len(m.leases))
	for _, t := range m.leases {
		list = append(list, Status{Lease: t.lease, State: t.state, Next: t.next, Reason: t.reason})
	}
	slices.SortFunc(list, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Lease.Parent, b.Lease.Parent), a.Lease.Addr.Compare(b.Lease.Addr))
	})
	return list
}

// run starts what is due, until Close.
func (m *Manager) run() {
	for {
		timer := time.NewTimer(m.startDue())
		select {
		case <-timer.C:
		case <-m.wake:
		case <-m.ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// startDue starts a step for every lease that is due and says how long nothing else
// will be.
func (m *Manager) startDue() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.opts.Now()
	for len(m.queue) > 0 {
		if wait := m.queue[0].next.Sub(now); wait > 0 {
			return min(wait, look)
		}
		t, ok := heap.Pop(&m.queue).(*tracked)
		if !ok {
			break
		}
		m.running.Go(func() { m.step(t) })
	}
	return look
}
