package dhcp

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/fault"
)

// linger is how long a parent's socket stays open after its last use: containers
// come in groups, and closing one costs the kernel a grace period.
const linger = 3 * time.Second

// A port is the packet socket of a parent and those who wait for answers on it. It
// is safe for concurrent use.
type port struct {
	parent string
	ns     *os.File
	counts *counters

	mu sync.Mutex
	// file is nil when the socket is not open.
	file   *os.File
	index  int
	users  map[dhcpv4.TransactionID]*exchange
	idle   *time.Timer
	closed bool
	// readers are the goroutines of the sockets, one for each.
	readers sync.WaitGroup
}

// An exchange is one transaction, known by its number (xid).
type exchange struct {
	port *port
	xid  dhcpv4.TransactionID
	mac  net.HardwareAddr
	// answers is what has come in for it. What it does not take in time is lost, as
	// packets are.
	answers chan reply
}

// join begins a transaction of the client with this MAC address. End it with leave.
func (p *port) join(mac net.HardwareAddr) (*exchange, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errClosed()
	}
	e := &exchange{port: p, mac: mac, answers: make(chan reply, 16)}
	for taken := true; taken; _, taken = p.users[e.xid] {
		xid, err := dhcpv4.GenerateTransactionID()
		if err != nil {
			return nil, err
		}
		e.xid = xid
	}
	if p.idle != nil {
		p.idle.Stop()
		p.idle = nil
	}
	p.users[e.xid] = e
	p.hearLocked(e, unix.PACKET_ADD_MEMBERSHIP)
	return e, nil
}

func (e *exchange) leave() {
	p := e.port
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.users, e.xid)
	p.hearLocked(e, unix.PACKET_DROP_MEMBERSHIP)
	if len(p.users) == 0 && p.file != nil && p.idle == nil {
		p.idle = time.AfterFunc(linger, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			if len(p.users) == 0 {
				p.dropLocked(p.file)
			}
		})
	}
}

// hearLocked has the parent's hardware let frames to the client's MAC address through,
// for servers that do not answer by broadcast. Hardware that cannot is made
// promiscuous by the kernel; where that fails too, there is still the broadcast.
func (p *port) hearLocked(e *exchange, option int) {
	if p.file == nil {
		return
	}
	req := unix.PacketMreq{Ifindex: int32(p.index), Type: unix.PACKET_MR_UNICAST, Alen: uint16(len(e.mac))}
	copy(req.Address[:], e.mac)
	if conn, err := p.file.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { _ = unix.SetsockoptPacketMreq(int(fd), unix.SOL_PACKET, option, &req) })
	}
}

// send sends a frame, and opens the socket if need be. The errors are for the user.
func (p *port) send(b []byte) error {
	var err error
	for range 2 {
		var f *os.File
		p.mu.Lock()
		f, err = p.openLocked()
		p.mu.Unlock()
		if err != nil {
			return err
		}
		if _, err = f.Write(b); err == nil {
			return nil
		}
		// The link may have been made anew under its name since.
		p.drop(f)
	}
	return p.words(err)
}

func (p *port) openLocked() (*os.File, error) {
	if p.closed {
		return nil, errClosed()
	}
	if p.file != nil {
		return p.file, nil
	}
	var fd int
	var err error
	if nsErr := link.InNamespace(p.ns, func() { fd, p.index, err = openSocket(p.parent) }); nsErr != nil {
		return nil, nsErr
	}
	if err != nil {
		return nil, p.words(err)
	}
	f := os.NewFile(uintptr(fd), "packet socket of "+p.parent)
	p.file = f
	for _, e := range p.users {
		p.hearLocked(e, unix.PACKET_ADD_MEMBERSHIP)
	}
	p.readers.Go(func() { p.read(f) })
	return f, nil
}

// words turns an error of the socket into what the user can do about it.
func (p *port) words(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fault.Unavailable("option dhcp=true: packets cannot be sent on link %q, berthd has no CAP_NET_RAW", p.parent)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fault.Unavailable("link %q does not exist", p.parent)
	case errors.Is(err, unix.ENETDOWN):
		return fault.Unavailable("link %q is down", p.parent)
	default:
		return fmt.Errorf("packet socket on link %q: %w", p.parent, err)
	}
}

// drop closes a socket that has failed.
func (p *port) drop(f *os.File) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dropLocked(f)
}

func (p *port) dropLocked(f *os.File) {
	if f == nil || p.file != f {
		return // another has dropped it
	}
	p.file = nil
	f.Close()
}

// read hands out what comes in until the socket is closed or fails, as it does when
// the link goes down. The next send opens another.
func (p *port) read(f *os.File) {
	b := make([]byte, 1<<16)
	for {
		n, err := f.Read(b)
		if err != nil {
			p.drop(f)
			return
		}
		r, ok := parse(b[:n])
		if !ok {
			p.counts.malformed.Add(1)
			continue
		}
		p.deliver(r)
	}
}

func (p *port) deliver(r reply) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, ok := p.users[r.msg.TransactionID]
	if !ok || r.msg.ClientHWAddr.String() != e.mac.String() {
		return // for another client of the LAN
	}
	select {
	case e.answers <- r:
	default:
	}
}

// close closes the socket and waits for its reader.
func (p *port) close() {
	p.mu.Lock()
	p.closed = true
	if p.idle != nil {
		p.idle.Stop()
	}
	p.dropLocked(p.file)
	p.mu.Unlock()
	p.readers.Wait()
}

func errClosed() error { return fault.Unavailable("DHCP is not served: Berth is shutting down") }

// openSocket opens a packet socket that hears a link of the thread's namespace, and
// nothing before the filter is in place.
func openSocket(link string) (fd, index int, err error) {
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, 0, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	req, err := unix.NewIfreq(link)
	if err != nil {
		return -1, 0, unix.ENODEV // no link has such a name
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return -1, 0, err
	}
	if req.Uint16()&unix.IFF_UP == 0 {
		return -1, 0, unix.ENETDOWN
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return -1, 0, err
	}
	index = int(req.Uint32())
	filter, err := program()
	if err != nil {
		return -1, 0, err
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	if err != nil {
		return -1, 0, err
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network order
	return fd, index, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index})
}
