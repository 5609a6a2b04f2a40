// Package hostport holds the host's side of published ports: it picks free host
// ports and keeps them with bound sockets, so that a conflict with any process
// shows when a container starts, and carries the traffic that no rule of the
// kernel can: from [::1], and from IPv6 clients to containers that have IPv4 only.
//
// Each host port costs one open file for each address it is published on, up to
// some thousands; see parcel for the others. A socket that is there for the reservation only takes no packet: those that come
// to it have missed the rules that should have sent them to the container, and are
// dropped until the rules are back. All sockets that do take packets are served by
// one goroutine; each connection through the proxy has two of its own.
package hostport

import (
	"context"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
)

// Options of New.
type Options struct {
	// NetNS is the network namespace to work in; nil is that of the process.
	NetNS *os.File
	// Log receives what cannot be done later on; nil is the standard logger.
	Log *logrus.Entry
}

// A Target is an endpoint that publishes ports.
type Target struct {
	// Endpoint is its ID.
	Endpoint string
	// Network is its network, Addr4 and Addr6 are its addresses, the zero Addr if
	// it has none in the family.
	Network      options.Network
	Addr4, Addr6 netip.Addr
	// NoProxy6to4 as in options.Endpoint.
	NoProxy6to4 bool
}

// A Manager holds the host ports of one network namespace. It is safe for
// concurrent use.
type Manager struct {
	ns    *os.File
	log   *logrus.Entry
	proxy *proxy
	// programs are the filters of the sockets.
	programs *programs

	// mu is held while ports are picked and sockets opened: about 10 µs for each.
	mu    sync.Mutex
	table table
	// held are the sockets of each endpoint.
	held map[string]map[key]*socket
	// cursor is where the search for the next ephemeral port begins, so that one
	// that was just let go of is the last to be picked again.
	cursor uint16
	// loose counts the sockets that are open files; beyond shelveAt, which is
	// looseLimit or more, they are put in parcels.
	loose, shelveAt, looseLimit int
	closed                      bool
}

// New makes a Manager that holds nothing.
func New(opts Options) (*Manager, error) {
	log := opts.Log
	if log == nil {
		log = logrus.NewEntry(logrus.StandardLogger())
	}
	m := &Manager{
		ns: opts.NetNS, log: log, proxy: newProxy(opts.NetNS, log), programs: newPrograms(),
		table: table{}, held: map[string]map[key]*socket{}, cursor: uint16(rand.Uint32()), looseLimit: looseLimit(),
	}
	m.shelveAt = m.looseLimit
	m.proxy.fetch = m.fetch
	return m, nil
}

// Close lets go of all ports and ends the proxy, its connections included. The
// Manager is of no use afterwards.
func (m *Manager) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	err := m.proxy.close()
	for endpoint := range m.held {
		m.releaseLocked(endpoint)
	}
	m.programs.close()
	return err
}

// Reserve picks the host ports for what is wanted and holds them for the endpoint.
// Those that it holds already and that fit are kept, the others are let go of: the
// last call counts. The result is sorted, with neighbours joined. On an error
// (Docker's words, a fault.Conflict when a port is taken) the endpoint holds what
// it held before.
//
// Requests that differ in nothing but HostIP get the same host port. What the
// endpoint's addresses make impossible (an IPv4 HostIP without IPv4, an IPv6 one
// without IPv6 or the proxy) is left out, as Docker does: another endpoint of the
// container may publish it.
func (m *Manager) Reserve(ctx context.Context, t Target, want []options.PortRequest) ([]options.PublishedPort, error) {
	if err := check(want); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return nil, err
	}
	var (
		ports []options.PublishedPort
		err   error
	)
	if nsErr := link.InNamespace(m.ns, func() { ports, err = m.reserveLocked(ctx, t, want) }); nsErr != nil {
		return nil, nsErr
	}
	return ports, err
}

// Serve holds the recorded ports, after a restart of berthd, and starts the proxy
// for those that need it; other ports of the endpoint are let go of. It may be
// repeated. The error names the ports that could not be had; all others are
// served.
func (m *Manager) Serve(ctx context.Context, t Target, ports []options.PublishedPort) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return err
	}
	var err error
	if nsErr := link.InNamespace(m.ns, func() { err = m.serveLocked(ctx, t, ports) }); nsErr != nil {
		return nsErr
	}
	return err
}

// Release lets go of all the endpoint's ports and closes the proxy's connections
// to it; an unknown endpoint is success.
func (m *Manager) Release(endpoint string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.releaseLocked(endpoint)
}

func (m *Manager) usableLocked(ctx context.Context) error {
	if m.closed {
		return fault.Unavailable("host ports are not served: Berth is shutting down")
	}
	return ctx.Err()
}

func (m *Manager) releaseLocked(endpoint string) {
	m.dropAllLocked(slices.Collect(maps.Values(m.held[endpoint])))
}

// addLocked makes an open socket one that its owner holds.
func (m *Manager) addLocked(s *socket) {
	m.table.add(s)
	if m.held[s.owner] == nil {
		m.held[s.owner] = map[key]*socket{}
	}
	m.held[s.owner][s.key] = s
	if s.fd >= 0 {
		m.loose++
	}
}

// dropLocked closes a socket, which is in no parcel, and forgets it.
func (m *Manager) dropLocked(s *socket) {
	if s.listener != nil {
		m.proxy.stop(s.listener)
		s.listener = nil
	}
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
		m.loose--
	}
	m.table.remove(s)
	held := m.held[s.owner]
	if delete(held, s.key); len(held) == 0 {
		delete(m.held, s.owner)
	}
}
