package hostport

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/options"
)

// openLocked opens the socket for a key and adds it to what the target's endpoint
// holds. It runs on a thread in the namespace. The error is that of the system
// call.
func (m *Manager) openLocked(t Target, k key, to destination) (*socket, error) {
	s := &socket{key: k, owner: t.Endpoint, fd: -1, filter: t.filterFor(k, to.addr), to: to}
	var err error
	s.fd, err = openSocket(k, s.filter, m.programs)
	if errors.Is(err, unix.EMFILE) {
		m.shelveAt = 0
		m.shelveLocked()
		s.fd, err = openSocket(k, s.filter, m.programs)
	}
	if err != nil {
		return nil, err
	}
	if s.fd < 0 && m.table.overlapping(k) != nil {
		return nil, unix.EADDRINUSE
	}
	m.addLocked(s)
	m.shelveLocked()
	return s, nil
}

// serveLocked is Serve on a thread in the namespace.
func (m *Manager) serveLocked(ctx context.Context, t Target, ports []options.PublishedPort) error {
	want := map[key]destination{}
	each(ports, func(k key, to destination) { want[k] = to })
	var stale []*socket
	for k, s := range m.held[t.Endpoint] {
		if _, ok := want[k]; !ok {
			stale = append(stale, s)
		}
	}
	m.dropAllLocked(stale)
	var (
		missing []options.PublishedPort
		first   error
	)
	failed := func(k key, to destination, err error) {
		if first == nil {
			first = m.bindError(k, err)
		}
		missing = append(missing, options.PublishedPort{
			Proto: k.proto, Host: k.host, HostPort: k.port, Container: to.addr, ContainerPort: to.port, Count: 1,
		})
	}
	arm := make(map[*socket]destination)
	each(ports, func(k key, to destination) {
		s, err := m.held[t.Endpoint][k], ctx.Err()
		if err == nil && s == nil {
			s, err = m.openLocked(t, k, to)
		}
		switch {
		case err != nil:
			failed(k, to, err)
		case s.settled(t, to):
		case s.parcel == nil:
			if err := m.armLocked(t, s, to); err != nil {
				failed(k, to, err)
			}
		default:
			arm[s] = to
		}
	})
	m.armAllLocked(t, arm, failed)
	if first == nil {
		return nil
	}
	return fmt.Errorf("%d of %d published ports are not held: %s: %w", len(missing), len(want), inWords(coalesce(missing)), first)
}

// settled reports whether armLocked has nothing to do.
func (s *socket) settled(t Target, to destination) bool {
	f := t.filterFor(s.key, to.addr)
	if s.filter != f || s.to != to || f.served() != (s.listener != nil) {
		return false
	}
	return s.listener == nil || s.listener.leadsTo(netip.AddrPortFrom(to.addr, to.port), t.Network.Sources)
}

// armLocked brings a held socket to its destination: by the proxy, or by nothing
// but the rules.
func (m *Manager) armLocked(t Target, s *socket, to destination) error {
	if s.parcel != nil {
		if err := m.unpackLocked(s.parcel); err != nil {
			return err
		}
	}
	if s.listener != nil && !s.settled(t, to) {
		// The proxy knows a socket that was in a parcel by a descriptor that is no
		// more, and cannot be told to leave it alone: it gets a new one.
		m.dropLocked(s)
		fresh, err := m.openLocked(t, s.key, to)
		if err != nil {
			return err
		}
		return m.armLocked(t, fresh, to)
	}
	s.to = to
	f := t.filterFor(s.key, to.addr)
	if f != s.filter && s.fd >= 0 {
		if err := m.programs.set(s.fd, f); err != nil {
			return err
		}
	}
	s.filter = f
	if !f.served() || s.listener != nil {
		return nil
	}
	l, err := m.proxy.serve(s.fd, s.key, netip.AddrPortFrom(to.addr, to.port), t.Network.Sources)
	if err != nil {
		return errors.Join(errNotProxied, err)
	}
	s.listener = l
	return nil
}

var errNotProxied = errors.New("start the proxy")

// listed bounds the entries of one message.
const listed = 5

// inWords is the ports in words.
func inWords(ports []options.PublishedPort) string {
	var words []string
	for i, p := range ports {
		if i == listed {
			words = append(words, fmt.Sprintf("and %d more", len(ports)-listed))
			break
		}
		words = append(words, p.String())
	}
	return strings.Join(words, ", ")
}
