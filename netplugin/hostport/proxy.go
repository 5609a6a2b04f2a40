package hostport

import (
	"container/list"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
)

const (
	// dialTimeout bounds the wait for a container to accept a connection.
	dialTimeout = 10 * time.Second
	// idleTimeout ends a UDP session that nobody has used.
	idleTimeout = 90 * time.Second
	// maxSessions bounds the UDP sessions of all ports; beyond it the one that has
	// been idle for longest makes room.
	maxSessions = 4096
	// burst bounds what one socket is given at a time, so that it does not keep the
	// others waiting.
	burst = 64
	// breather is the pause when the process is out of open files.
	breather = 20 * time.Millisecond
)

// A proxy serves sockets whose traffic the rules cannot carry. One goroutine, on a
// thread in the namespace, accepts connections, which get goroutines of their own,
// and carries the datagrams of all UDP sessions. It starts with the first socket.
type proxy struct {
	ns  *os.File
	log *logrus.Entry
	// idle and room are idleTimeout and maxSessions, except in tests.
	idle time.Duration
	room int

	mu sync.Mutex
	// poll waits for all sockets and for wake, an eventfd; both are -1 before the
	// first socket.
	poll, wake int
	closed     bool
	// running ends with the goroutine and the connections.
	running sync.WaitGroup
	// pollers by the number that poll has for each. A number is never used again,
	// unlike a descriptor, so that a late event meets nobody.
	pollers map[uint64]poller
	last    uint64
	// connections are counted; limit bounds them.
	connections, limit int
	// sessions, the most recently used one first.
	sessions list.List
	// short says that a descriptor was lacking; complained is when that was logged.
	short      bool
	complained time.Time
	buffer     []byte
	// wanted are listeners with something to read whose sockets are in parcels,
	// out of which fetch takes them; it is called without mu.
	wanted []*listener
	fetch  func(*listener) (ok bool)
}

// A poller is a socket that poll waits for. ready is called with mu held and does
// not block.
type poller interface{ ready(p *proxy) }

func newProxy(ns *os.File, log *logrus.Entry) *proxy {
	return &proxy{
		ns: ns, log: log, idle: idleTimeout, room: maxSessions, poll: -1, wake: -1, pollers: map[uint64]poller{},
	}
}

// A listener is a host port that the proxy serves.
type listener struct {
	key
	id uint64
	// fd is -1 while the socket is in a parcel.
	fd int
	to netip.AddrPort
	// sources are the clients that may come beside those of the host itself, nil
	// for everybody.
	sources []netip.Prefix
	// What is under way: connections of TCP, sessions of UDP.
	conns    map[*conn]struct{}
	sessions map[client]*session
}

func (l *listener) leadsTo(to netip.AddrPort, sources []netip.Prefix) bool {
	return l.to == to && slices.Equal(l.sources, sources)
}

// allows reports whether a client may use the port.
func (l *listener) allows(client netip.Addr) bool {
	return len(l.sources) == 0 || client.IsLoopback() ||
		slices.ContainsFunc(l.sources, func(p netip.Prefix) bool { return p.Contains(client) })
}

func (l *listener) ready(p *proxy) {
	if l.fd < 0 {
		p.wanted = append(p.wanted, l)
	} else if l.proto == options.UDP {
		p.receive(l)
	} else {
		p.accept(l)
	}
}

// serve begins to serve a socket, which stays the caller's to close, after stop.
func (p *proxy) serve(fd int, k key, to netip.AddrPort, sources []netip.Prefix) (*listener, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.startLocked(); err != nil {
		return nil, err
	}
	l := &listener{key: k, fd: fd, to: to, sources: sources}
	var err error
	l.id, err = p.watchLocked(fd, l)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// stop ends the serving of a socket and all that is under way there.
func (p *proxy) stop(l *listener) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forgetLocked(l.fd, l.id)
	for c := range l.conns {
		c.close()
	}
	for _, s := range l.sessions {
		p.endLocked(s)
	}
}

// close stops everything and waits for it.
func (p *proxy) close() error {
	p.mu.Lock()
	p.closed = true
	for _, x := range p.pollers {
		if l, ok := x.(*listener); ok {
			for c := range l.conns {
				c.close()
			}
		}
	}
	var err error
	if p.wake >= 0 {
		_, err = unix.Write(p.wake, []byte{7: 1})
	}
	p.mu.Unlock()
	p.running.Wait()
	return err
}

// startLocked starts the goroutine if it does not run.
func (p *proxy) startLocked() error {
	if p.closed {
		return errors.New("the proxy is closed")
	}
	if p.poll >= 0 {
		return nil
	}
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(poll)
		return fmt.Errorf("eventfd: %w", err)
	}
	p.poll, p.wake = poll, wake
	// The wake-up has the number 0, which is nobody's.
	if err := unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		return errors.Join(err, p.endPollLocked())
	}
	p.buffer = make([]byte, 1<<16)
	p.limit = connectionLimit()
	started := make(chan error, 1)
	p.running.Add(1)
	go func() {
		defer p.running.Done()
		ran := false
		err := link.InNamespace(p.ns, func() {
			ran = true
			started <- nil
			p.run()
		})
		if !ran {
			started <- err
		}
	}()
	if err := <-started; err != nil {
		return errors.Join(err, p.endPollLocked())
	}
	return nil
}

func (p *proxy) endPollLocked() error {
	err := errors.Join(unix.Close(p.poll), unix.Close(p.wake))
	p.poll, p.wake = -1, -1
	return err
}

// connectionLimit leaves most open files to reservations. A connection takes two,
// and up to four more while data flows.
func connectionLimit() int {
	var now unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &now) != nil {
		now.Cur = 1024
	}
	return int(min(now.Cur/8, 1<<20))
}

// watchLocked has ready called when the socket has something to read.
func (p *proxy) watchLocked(fd int, x poller) (uint64, error) {
	p.last++
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(p.last), Pad: int32(p.last >> 32)}
	if err := unix.EpollCtl(p.poll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		return 0, fmt.Errorf("epoll: %w", err)
	}
	p.pollers[p.last] = x
	return p.last, nil
}

func (p *proxy) forgetLocked(fd int, id uint64) {
	if _, ok := p.pollers[id]; !ok {
		return
	}
	delete(p.pollers, id)
	if p.poll >= 0 && fd >= 0 {
		// It fails for a socket that was in a parcel, which is closed anyway.
		_ = unix.EpollCtl(p.poll, unix.EPOLL_CTL_DEL, fd, nil)
	}
}

// run serves until close.
func (p *proxy) run() {
	events := make([]unix.EpollEvent, 128)
	for {
		p.mu.Lock()
		wait := p.expireLocked()
		poll, closed := p.poll, p.closed
		if closed {
			for p.sessions.Len() > 0 {
				p.endLocked(p.sessions.Back().Value.(*session))
			}
			if err := p.endPollLocked(); err != nil {
				p.log.WithError(err).Warn("the proxy did not end cleanly")
			}
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		n, err := unix.EpollWait(poll, events, wait)
		if err != nil && !errors.Is(err, unix.EINTR) {
			p.log.WithError(err).Error("the proxy waits in vain")
			time.Sleep(time.Second)
		}
		p.mu.Lock()
		for _, e := range events[:max(n, 0)] {
			if x := p.pollers[uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32]; x != nil {
				x.ready(p)
			}
		}
		short, wanted := p.short, p.wanted
		p.short, p.wanted = false, nil
		p.mu.Unlock()
		for _, l := range wanted {
			short = !p.fetch(l) || short
		}
		if short {
			time.Sleep(breather)
		}
	}
}

// lacks notes that a descriptor could not be had. Connections wait meanwhile.
func (p *proxy) lacks(err error) {
	p.short = true
	if time.Since(p.complained) > time.Minute {
		p.complained = time.Now()
		p.log.WithError(err).Errorf("connections to published ports wait, of %s open files none is left", fileLimit())
	}
}

// outOfFiles reports whether the error passes when others close something.
func outOfFiles(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) ||
		errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM)
}
