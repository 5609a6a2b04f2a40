package hostport

import (
	"container/list"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// A client is the far end of a UDP session and the address that it has sent to.
type client struct {
	addr, local [16]byte
	port        uint16
	// link is the index of the link that the datagram came in by, for link-local
	// addresses; 0 for others.
	link uint32
}

// A session leads from one client through a socket of its own to the container,
// so that answers find back.
type session struct {
	id     uint64
	fd     int
	l      *listener
	client client
	used   time.Time
	// place is that in the proxy's list.
	place *list.Element
	// from is the control message that makes answers come from the local address.
	from []byte
}

// receive carries the datagrams that wait at a host port to the container.
func (p *proxy) receive(l *listener) {
	control := make([]byte, unix.CmsgSpace(unix.SizeofInet6Pktinfo))
	for range burst {
		n, nc, _, from, err := unix.Recvmsg(l.fd, p.buffer, control, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if err != nil {
			continue // an error that ICMP brought about an earlier answer
		}
		in, ok := from.(*unix.SockaddrInet6)
		if !ok || !l.allows(netip.AddrFrom16(in.Addr)) {
			continue
		}
		s, err := p.sessionLocked(l, clientOf(in, control[:nc]))
		if outOfFiles(err) {
			p.lacks(err)
			return
		}
		if err != nil {
			continue // no route: the datagram is lost, as on any network
		}
		if !sent(unix.Send(s.fd, p.buffer[:n], unix.MSG_DONTWAIT)) {
			// The error was that of an earlier datagram; this one was not sent.
			_ = unix.Send(s.fd, p.buffer[:n], unix.MSG_DONTWAIT)
		}
	}
}

func sent(err error) bool {
	return !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EHOSTUNREACH)
}

func clientOf(in *unix.SockaddrInet6, control []byte) client {
	c := client{addr: in.Addr, port: uint16(in.Port)}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return c
	}
	for _, m := range messages {
		if m.Header.Level != unix.IPPROTO_IPV6 || m.Header.Type != unix.IPV6_PKTINFO || len(m.Data) < unix.SizeofInet6Pktinfo {
			continue
		}
		copy(c.local[:], m.Data)
		if netip.AddrFrom16(c.local).IsLinkLocalUnicast() || netip.AddrFrom16(c.addr).IsLinkLocalUnicast() {
			c.link = in.ZoneId
		}
	}
	return c
}

// sessionLocked is the client's session, a new one if need be.
func (p *proxy) sessionLocked(l *listener, c client) (*session, error) {
	if s := l.sessions[c]; s != nil {
		p.useLocked(s)
		return s, nil
	}
	if p.sessions.Len() >= p.room {
		p.endLocked(p.sessions.Back().Value.(*session))
	}
	fd, err := unix.Socket(family(l.to.Addr()), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, sockaddr(l.to)); err != nil {
		unix.Close(fd)
		return nil, err
	}
	s := &session{fd: fd, l: l, client: c, used: time.Now()}
	s.from = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: c.local, Ifindex: c.link})
	if s.id, err = p.watchLocked(fd, s); err != nil {
		unix.Close(fd)
		return nil, err
	}
	s.place = p.sessions.PushFront(s)
	if l.sessions == nil {
		l.sessions = map[client]*session{}
	}
	l.sessions[c] = s
	return s, nil
}

func (p *proxy) useLocked(s *session) {
	s.used = time.Now()
	p.sessions.MoveToFront(s.place)
}

// ready carries the container's answers to the client.
func (s *session) ready(p *proxy) {
	if s.l.fd < 0 {
		p.wanted = append(p.wanted, s.l)
		return
	}
	to := &unix.SockaddrInet6{Port: int(s.client.port), ZoneId: s.client.link, Addr: s.client.addr}
	for range burst {
		n, err := unix.Read(s.fd, p.buffer)
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		if err != nil {
			continue // nobody listens in the container: perhaps not yet
		}
		p.useLocked(s)
		// A client that has gone, or cannot be reached, loses the answer.
		_ = unix.Sendmsg(s.l.fd, p.buffer[:n], s.from, to, unix.MSG_DONTWAIT)
	}
}

// endLocked closes a session.
func (p *proxy) endLocked(s *session) {
	p.forgetLocked(s.fd, s.id)
	unix.Close(s.fd)
	delete(s.l.sessions, s.client)
	p.sessions.Remove(s.place)
}

// expireLocked ends the sessions that are idle and returns the milliseconds until
// the next one may be, -1 if there is none.
func (p *proxy) expireLocked() int {
	for p.sessions.Len() > 0 {
		s := p.sessions.Back().Value.(*session)
		if left := p.idle - time.Since(s.used); left > 0 {
			return int(left/time.Millisecond) + 1
		}
		p.endLocked(s)
	}
	return -1
}
