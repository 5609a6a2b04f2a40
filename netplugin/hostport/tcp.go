package hostport

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A conn is one proxied connection: what is to be closed to end it.
type conn struct {
	mu     sync.Mutex
	ends   []io.Closer
	closed bool
}

// add takes x, or closes it at once when the connection has ended.
func (c *conn) add(x io.Closer) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		x.Close()
		return false
	}
	c.ends = append(c.ends, x)
	return true
}

func (c *conn) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, x := range c.ends {
		x.Close()
	}
	c.ends = nil
}

// accept takes the connections that wait at a socket. The socket towards the
// container is opened here, where the thread is in the namespace.
func (p *proxy) accept(l *listener) {
	if p.closed {
		return
	}
	for range burst {
		fd, from, err := unix.Accept4(l.fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		switch {
		case err == nil:
		case errors.Is(err, unix.EAGAIN):
			return
		case outOfFiles(err):
			p.lacks(err)
			return
		default:
			continue // the client has gone
		}
		in, ok := from.(*unix.SockaddrInet6)
		if !ok || !l.allows(netip.AddrFrom16(in.Addr)) || p.connections >= p.limit {
			reset(fd)
			continue
		}
		up, err := unix.Socket(family(l.to.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			reset(fd)
			if outOfFiles(err) {
				p.lacks(err)
				return
			}
			continue
		}
		c := &conn{}
		if l.conns == nil {
			l.conns = map[*conn]struct{}{}
		}
		l.conns[c] = struct{}{}
		p.connections++
		p.running.Add(1)
		go func(to netip.AddrPort) {
			defer p.running.Done()
			c.carry(fd, up, to)
			p.mu.Lock()
			defer p.mu.Unlock()
			delete(l.conns, c)
			p.connections--
		}(l.to)
	}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// reset closes a connection so that the other end sees an error, not an end.
func reset(fd int) {
	// Without it, the end is the ordinary one.
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
}

// carry connects to the container and copies both ways until both are at their
// end. What one side has closed for writing is closed to the other; after an error
// on one side, both are reset.
func (c *conn) carry(client, up int, to netip.AddrPort) {
	defer c.close()
	in, err := c.adopt(os.NewFile(uintptr(client), "client"))
	if err != nil {
		unix.Close(up)
		return
	}
	out, err := c.dial(up, to)
	if err != nil {
		_ = in.SetLinger(0)
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.half(out, in)
	}()
	c.half(in, out)
	<-done
}

// half copies one way. On plain TCP connections the kernel moves the data.
func (c *conn) half(to, from *net.TCPConn) {
	_, err := io.Copy(to, from)
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		_, _ = to.SetLinger(0), from.SetLinger(0)
		c.close()
	}
}

// adopt turns a descriptor into a connection. It holds the lock meanwhile: close
// may know the file, and a descriptor that is closed while it is copied can be
// somebody else's by then.
func (c *conn) adopt(f *os.File) (*net.TCPConn, error) {
	defer f.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, net.ErrClosed
	}
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(net.ErrClosed, nc.Close())
	}
	c.ends = append(c.ends, tcp)
	return tcp, nil
}

// dial connects a fresh socket. It can be ended by close.
func (c *conn) dial(fd int, to netip.AddrPort) (*net.TCPConn, error) {
	err := unix.Connect(fd, sockaddr(to))
	f := os.NewFile(uintptr(fd), "container")
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return nil, errors.Join(fmt.Errorf("connect to %s: %w", to, err), f.Close())
	}
	if !c.add(f) {
		return nil, net.ErrClosed
	}
	if err != nil {
		if err := connected(f); err != nil {
			return nil, fmt.Errorf("connect to %s: %w", to, errors.Join(err, f.Close()))
		}
	}
	return c.adopt(f)
}

// connected waits for a connection that is being made.
func connected(f *os.File) error {
	if err := f.SetWriteDeadline(time.Now().Add(dialTimeout)); err != nil {
		return err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failure error
	err = raw.Write(func(fd uintptr) bool {
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = unix.Errno(code)
		}
		if err != nil {
			failure = err
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return err == nil
	})
	return errors.Join(failure, err)
}
