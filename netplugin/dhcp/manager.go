package dhcp

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/sirupsen/logrus"
)

const (
	// DefaultTimeout bounds Acquire. dockerd's call ends after 25 s, of which some is
	// needed for the rest.
	DefaultTimeout = 18 * time.Second
	// DefaultRetry is the first wait for an answer.
	DefaultRetry = time.Second
)

var errSilence = errors.New("no answer")

// Options of New.
type Options struct {
	// NetNS is the network namespace of the parents; nil is that of the process.
	NetNS *os.File
	// Log receives what happens to leases later on; nil is the standard logger.
	Log *logrus.Entry
	// Now is the clock by which leases end; nil is time.Now.
	Now func() time.Time
	// Notify is told of what has become of tracked leases, of one lease one event
	// at a time. It may call the Manager, but not Close, which waits for it. An event
	// may come just after an Untrack that crossed it. nil tells nobody.
	Notify func(Event)
	// Timeout bounds Acquire; 0 is DefaultTimeout. Retry is how long the first answer
	// is waited for; 0 is DefaultRetry.
	Timeout, Retry time.Duration
}

// A Manager takes leases and keeps those that it is told to track. It is safe for
// concurrent use.
type Manager struct {
	opts Options
	log  *logrus.Entry
	// ctx ends with Close.
	ctx    context.Context //nolint:containedctx // the life of the Manager, not of a call
	cancel context.CancelFunc
	counts counters
	// slots bounds how many leases are renewed at a time.
	slots chan struct{}
	// wake is sent to when something is due earlier.
	wake    chan struct{}
	running sync.WaitGroup

	mu     sync.Mutex
	closed bool
	ports  map[string]*port
	leases map[key]*tracked
	queue  queue
}

// Counts are totals since the Manager was made, for metrics.
type Counts struct {
	// Offers, Acks and Naks are answers of servers to Berth's clients; Silences are
	// requests that had none after all repeats.
	Offers, Acks, Naks, Silences uint64
	// Lost are leases that a server took back or that ran out while they were in use.
	Lost uint64
	// Released and Declined are messages sent.
	Released, Declined uint64
	// Malformed are packets from a server's port that are no DHCP messages.
	Malformed uint64
}

type counters struct {
	offers, acks, naks, silences, lost, released, declined, malformed atomic.Uint64
}

// New makes a Manager without leases. It opens no socket until one is needed. End it
// with Close.
func New(opts Options) *Manager {
	if opts.Log == nil {
		opts.Log = logrus.NewEntry(logrus.StandardLogger())
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.Notify == nil {
		opts.Notify = func(Event) {}
	}
	if opts.Timeout == 0 {
		opts.Timeout = DefaultTimeout
	}
	if opts.Retry == 0 {
		opts.Retry = DefaultRetry
	}
	m := &Manager{
		opts: opts, log: opts.Log, slots: make(chan struct{}, atOnce), wake: make(chan struct{}, 1),
		ports: map[string]*port{}, leases: map[key]*tracked{},
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.running.Go(m.run)
	return m
}

// Close ends everything that is under way and closes the sockets. Leases are not
// released: containers go on using them. The Manager is of no use afterwards.
func (m *Manager) Close() {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.cancel()
	m.running.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.ports {
		p.close()
	}
}

// Counts returns the totals.
func (m *Manager) Counts() Counts {
	c := &m.counts
	return Counts{
		Offers: c.offers.Load(), Acks: c.acks.Load(), Naks: c.naks.Load(), Silences: c.silences.Load(),
		Lost: c.lost.Load(), Released: c.released.Load(), Declined: c.declined.Load(), Malformed: c.malformed.Load(),
	}
}

// join begins a transaction on the parent.
func (m *Manager) join(parent string, id Identity) (*exchange, error) {
	m.mu.Lock()
	p, ok := m.ports[parent]
	if !ok {
		p = &port{parent: parent, ns: m.opts.NetNS, counts: &m.counts, users: map[dhcpv4.TransactionID]*exchange{}}
		m.ports[parent] = p
	}
	closed := m.closed
	m.mu.Unlock()
	if closed {
		return nil, errClosed()
	}
	return p.join(id.MAC)
}

// within bounds the context of a call by the time and by the life of the Manager.
func (m *Manager) within(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	stop := context.AfterFunc(m.ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}
