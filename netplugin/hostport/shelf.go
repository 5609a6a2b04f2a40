package hostport

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// A parcel keeps sockets of one endpoint open without an open file for each: as
// the content of a message that is never received, which costs two files for all
// of them. The kernel treats the sockets as before; those that the proxy serves
// still wake it, and are then taken out. That is how 20,000 ports on two addresses
// fit where a process may have 20,000 open files.
//
// Without CAP_SYS_ADMIN and CAP_SYS_RESOURCE, the kernel lets a user have no more
// sockets in messages than open files; then sockets stay open as files.
type parcel struct {
	// ends are those of the pair of sockets that the message is between.
	ends    [2]int
	sockets []*socket
}

const (
	// parcelSize is what the kernel takes in one message (SCM_MAX_FD).
	parcelSize = 253
	// parcelLeast is what makes a parcel worth its two files.
	parcelLeast = 8
	// parcelShare of the limit of open files is for sockets outside of parcels.
	parcelShare = 4
)

// looseLimit is the number of sockets that may be open files.
func looseLimit() int {
	var now unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &now) != nil {
		return 256
	}
	return int(min(now.Cur/parcelShare, 1<<20))
}

// shelveLocked packs sockets when too many are open files.
func (m *Manager) shelveLocked() {
	if m.loose <= m.shelveAt {
		return
	}
	for _, held := range m.held {
		if len(held) < parcelLeast {
			continue
		}
		var loose []*socket
		for _, s := range held {
			if s.fd >= 0 {
				loose = append(loose, s)
			}
		}
		for part := range slices.Chunk(loose, parcelSize) {
			if len(part) < parcelLeast {
				continue
			}
			if err := m.packLocked(part); err != nil {
				m.log.WithError(err).Debug("sockets of published ports stay open as files")
				m.shelveAt = 2 * m.loose
				return
			}
		}
	}
	// What could not be packed is not looked at again with every socket.
	m.shelveAt = max(m.looseLimit, 2*m.loose)
}

// packLocked makes a parcel of sockets. After an error they are as before.
func (m *Manager) packLocked(sockets []*socket) error {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("pair of sockets: %w", err)
	}
	fds := make([]int, len(sockets))
	for i, s := range sockets {
		fds[i] = s.fd
	}
	// With mu held, the proxy does not use a descriptor that is being closed.
	m.proxy.mu.Lock()
	defer m.proxy.mu.Unlock()
	if err := unix.Sendmsg(ends[0], []byte{0}, unix.UnixRights(fds...), nil, 0); err != nil {
		unix.Close(ends[0])
		unix.Close(ends[1])
		return fmt.Errorf("send sockets: %w", err)
	}
	p := &parcel{ends: ends, sockets: slices.Clone(sockets)}
	for _, s := range sockets {
		unix.Close(s.fd)
		s.fd, s.parcel = -1, p
		if s.listener != nil {
			s.listener.fd = -1
		}
	}
	m.loose -= len(sockets)
	return nil
}

// unpackLocked makes the sockets of a parcel open files again. After an error the
// parcel is as before.
func (m *Manager) unpackLocked(p *parcel) error {
	control := make([]byte, unix.CmsgSpace(4*parcelSize))
	// A message that is received without room for all descriptors loses the others.
	// One that is looked at loses nothing.
	_, n, _, _, err := unix.Recvmsg(p.ends[1], make([]byte, 1), control, unix.MSG_PEEK|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return fmt.Errorf("take sockets out: %w", err)
	}
	var fds []int
	messages, err := unix.ParseSocketControlMessage(control[:n])
	for i := range messages {
		var part []int
		if part, err = unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, part...)
		}
	}
	if err == nil && len(fds) != len(p.sockets) {
		err = unix.EMFILE
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return fmt.Errorf("take sockets out: %w", err)
	}
	m.proxy.mu.Lock()
	defer m.proxy.mu.Unlock()
	for i, s := range p.sockets {
		s.fd, s.parcel = fds[i], nil
		if s.listener != nil {
			s.listener.fd = fds[i]
		}
	}
	m.loose += len(fds)
	p.discard()
	return nil
}

// discard closes the parcel, and with it what was not taken out.
func (p *parcel) discard() {
	unix.Close(p.ends[0])
	unix.Close(p.ends[1])
}

// fetch makes the socket of a listener an open file, for the proxy. ok is false
// when it has to try again.
func (m *Manager) fetch(l *listener) (ok bool) {
	// Waiting would be for ever while Close waits for the proxy.
	if !m.mu.TryLock() {
		return false
	}
	defer m.mu.Unlock()
	s := m.table.exact(l.key)
	if s == nil || s.listener != l || s.parcel == nil {
		return true
	}
	rest := slices.DeleteFunc(slices.Clone(s.parcel.sockets), func(x *socket) bool { return x == s })
	if err := m.unpackLocked(s.parcel); err != nil {
		m.log.WithError(err).Error("a connection to a published port waits")
		return false
	}
	if len(rest) >= parcelLeast {
		if err := m.packLocked(rest); err != nil {
			m.log.WithError(err).Debug("sockets of published ports stay open as files")
		}
	}
	m.shelveLocked()
	return true
}

// dropAllLocked closes sockets, which may be in parcels with others.
func (m *Manager) dropAllLocked(sockets []*socket) {
	parcels := map[*parcel][]*socket{}
	for _, s := range sockets {
		if s.parcel != nil {
			parcels[s.parcel] = append(parcels[s.parcel], s)
		} else {
			m.dropLocked(s) // before shelveLocked can pack it
		}
	}
	for p, list := range parcels {
		m.openParcelLocked(p, list)
		for _, s := range list {
			m.dropLocked(s)
		}
		m.shelveLocked()
	}
}

// openParcelLocked takes the sockets of a parcel out of which some are to be
// closed. Those are closed at once when no other is in it.
func (m *Manager) openParcelLocked(p *parcel, closing []*socket) {
	if len(closing) < len(p.sockets) {
		err := m.unpackLocked(p)
		if err == nil {
			return
		}
		m.log.WithError(err).Error("published ports are no longer held")
	}
	for _, s := range p.sockets {
		s.parcel = nil
	}
	p.discard()
}

// armAllLocked is armLocked for many sockets in parcels, one parcel after the other.
func (m *Manager) armAllLocked(t Target, want map[*socket]destination, failed func(key, destination, error)) {
	parcels := map[*parcel][]*socket{}
	for s := range want {
		parcels[s.parcel] = append(parcels[s.parcel], s)
	}
	for _, list := range parcels {
		for _, s := range list {
			to := want[s]
			if err := m.armLocked(t, s, to); err != nil {
				failed(s.key, to, err)
			}
		}
		m.shelveLocked()
	}
}
