package probe

import (
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/fault"
)

// A segment is what is known of one parent, and its socket while there is one. All
// fields are guarded by the Prober's lock.
type segment struct {
	parent string
	mac    mac
	socket *socket
	// queries are the addresses that are asked for.
	queries map[netip.Addr][]*query
	// groups counts who wants to hear a multicast address.
	groups map[mac]int
	// listeners hear every claim of a foreign MAC.
	listeners map[*listener]bool
	// downs counts how often the parent went down.
	downs int
	// users are runs and listeners. Without any, the socket is closed when idle fires.
	users int
	idle  *time.Timer
	// retry looks whether a parent that went away is back, while there are listeners.
	retry *time.Timer
}

// A listener is somebody who hears the foreign claims on a parent. heard is called
// without the lock held, from the goroutine that reads.
type listener struct {
	heard func(claim)
}

// segmentLocked returns the segment of a parent, and counts one more user.
func (p *Prober) segmentLocked(parent string) (*segment, error) {
	if p.closed {
		return nil, fault.Unavailable("addresses are not probed: Berth is shutting down")
	}
	s := p.segments[parent]
	if s == nil {
		s = &segment{
			parent: parent, queries: map[netip.Addr][]*query{}, groups: map[mac]int{}, listeners: map[*listener]bool{},
		}
		p.segments[parent] = s
	}
	s.users++
	if s.idle != nil {
		s.idle.Stop()
		s.idle = nil
	}
	return s, nil
}

// acquire opens the segment for these queries, and says how often it was down so
// far. Give it back with release.
func (p *Prober) acquire(l link.Link, queries []*query) (s *segment, downs int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s, err = p.segmentLocked(l.Name); err != nil {
		return nil, 0, err
	}
	if err := p.openLocked(s, l); err != nil {
		p.leaveLocked(s)
		return nil, 0, notProbed(l.Name, "%v", err)
	}
	for _, q := range queries {
		s.queries[q.addr] = append(s.queries[q.addr], q)
		s.joinLocked(q.addr)
	}
	return s, s.downs, nil
}

// check looks whether the parent could be heard all the time since acquire.
func (p *Prober) check(s *segment, was link.Link, downs int) error {
	l, err := p.parent(was.Name)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return notProbed(was.Name, "its socket was closed")
	case l.Index != was.Index || s.downs != downs:
		return notProbed(was.Name, "it was down meanwhile")
	default:
		return nil
	}
}

// release ends queries.
func (p *Prober) release(s *segment, queries []*query) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, q := range queries {
		s.partLocked(q.addr)
		rest := slices.DeleteFunc(s.queries[q.addr], func(o *query) bool { return o == q })
		if s.queries[q.addr] = rest; len(rest) == 0 {
			delete(s.queries, q.addr)
		}
	}
	p.leaveLocked(s)
}

// leaveLocked counts one user less.
func (p *Prober) leaveLocked(s *segment) {
	if s.users--; s.users > 0 || p.closed {
		return
	}
	s.idle = time.AfterFunc(p.idle, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if s.users == 0 && p.segments[s.parent] == s {
			s.closeLocked()
			delete(p.segments, s.parent)
		}
	})
}

func (s *segment) closeLocked() {
	for _, t := range []*time.Timer{s.idle, s.retry} {
		if t != nil {
			t.Stop()
		}
	}
	s.idle, s.retry = nil, nil
	if s.socket != nil {
		s.socket.close()
		s.socket = nil
	}
}

// openLocked makes the segment's socket one on this link, which may have come back
// with another index or MAC address.
func (p *Prober) openLocked(s *segment, l link.Link) error {
	s.mac = mac(l.MAC)
	if s.socket != nil && s.socket.index == l.Index {
		return nil
	}
	sock, err := openSocket(p.opts.Link, l.Index)
	if err != nil {
		return err
	}
	if s.socket != nil {
		s.socket.close()
	}
	s.socket = sock
	// Answers to somebody without address go to all nodes. A parent without IPv6 has
	// not joined that group.
	_ = sock.member(groupMAC(allNodes), true)
	for group := range s.groups {
		_ = sock.member(group, true)
	}
	p.readers.Add(1)
	go p.read(s, sock)
	return nil
}

// joinLocked lets the parent hear those who ask for the address as well.
//
// A switch that watches group memberships may keep their frames back all the same;
// answers go to all nodes, which no switch keeps back.
func (s *segment) joinLocked(addr netip.Addr) {
	if addr.Is4() {
		return
	}
	group := groupMAC(solicitedNode(addr))
	if s.groups[group]++; s.groups[group] == 1 && s.socket != nil {
		_ = s.socket.member(group, true)
	}
}

func (s *segment) partLocked(addr netip.Addr) {
	if addr.Is4() {
		return
	}
	group := groupMAC(solicitedNode(addr))
	if s.groups[group]--; s.groups[group] == 0 {
		delete(s.groups, group)
		if s.socket != nil {
			_ = s.socket.member(group, false)
		}
	}
}

// send asks for one address. A frame that does not fit into a queue is lost, as it
// may be on the way.
func (p *Prober) send(s *segment, w way, q *query) error {
	p.mu.Lock()
	sock := s.socket
	p.mu.Unlock()
	frame, to, protocol := probeFor(mac(w.parent.MAC), q.addr, q.nonce)
	var err error
	for _, by := range w.send {
		if sock == nil {
			return notProbed(s.parent, "its socket was closed")
		}
		if err = sock.send(by, frame, to, protocol); err == nil {
			q.sent = true
			return nil
		}
	}
	if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EAGAIN) {
		return nil
	}
	return notProbed(s.parent, "%v", err)
}

// read hands on what the socket hears until it is closed.
func (p *Prober) read(s *segment, sock *socket) {
	defer p.readers.Done()
	buf := make([]byte, snapLen)
	for {
		n, err := sock.file.Read(buf)
		switch {
		case errors.Is(err, unix.ENETDOWN):
			// It works again when the link is up, unless that is another link by then.
			p.mu.Lock()
			s.downs++
			if s.socket == sock {
				p.retryLocked(s)
			}
			p.mu.Unlock()
		case errors.Is(err, fs.ErrClosed):
			return
		case err != nil:
			// Nothing else is expected; do not spin on it.
			time.Sleep(fastGap)
		default:
			if c, ok := parse(buf[:n]); ok {
				p.hear(s, c)
			}
		}
	}
}

// hear tells the queries and listeners of a claim.
func (p *Prober) hear(s *segment, c claim) {
	p.mu.Lock()
	queries, own := s.queries[c.addr], c.mac == s.mac
	if len(queries) == 0 && len(s.listeners) == 0 || own && c.probing || p.closed {
		p.mu.Unlock()
		return
	}
	// The queries may be other ones after Ours was asked, which is not done with the
	// lock held. A copy costs little: there is mostly none.
	queries, listeners := slices.Clone(queries), slices.Collect(maps.Keys(s.listeners))
	p.mu.Unlock()
	if slices.ContainsFunc(queries, func(q *query) bool { return c.probing && c.nonce == q.nonce && !c.addr.Is4() }) {
		return
	}
	if p.opts.Ours != nil && p.opts.Ours(s.parent, c.mac.hardware()) {
		return
	}
	p.mu.Lock()
	for _, q := range queries {
		if !q.done {
			q.done = true
			q.heard <- Conflict{Addr: c.addr, MAC: c.mac.hardware(), Probing: c.probing, Host: own}
		}
	}
	p.mu.Unlock()
	if own {
		return
	}
	for _, l := range listeners {
		l.heard(c)
	}
}

// listen lets fn hear every foreign claim on the parent until stop is called, also
// of a parent that is not there yet, or goes and comes back. After stop, one last
// call may be under way.
func (p *Prober) listen(parent string, fn func(claim)) (stop func(), err error) {
	l := &listener{heard: fn}
	p.mu.Lock()
	s, err := p.segmentLocked(parent)
	if err == nil {
		s.listeners[l] = true
	}
	p.mu.Unlock()
	if err != nil {
		return nil, err
	}
	p.follow(s)
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if s.listeners[l] {
			delete(s.listeners, l)
			p.leaveLocked(s)
		}
	}, nil
}

// follow opens the socket of a segment, and tries again later as long as there are
// listeners and no link.
func (p *Prober) follow(s *segment) {
	l, ok, err := p.opts.Link.Get(s.parent)
	p.mu.Lock()
	defer p.mu.Unlock()
	s.retry = nil
	if p.closed || len(s.listeners) == 0 {
		return
	}
	if err == nil && ok && isEthernet(l) {
		err = p.openLocked(s, l)
	}
	if err != nil || !ok || !isEthernet(l) {
		p.retryLocked(s)
	}
}

func (p *Prober) retryLocked(s *segment) {
	if s.retry == nil && len(s.listeners) > 0 && !p.closed {
		s.retry = time.AfterFunc(p.retry, func() { p.follow(s) })
	}
}
