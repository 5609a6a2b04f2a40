package netplugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/netplugin/ipam"
	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/netplugin/options"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/pluginapi"
	"github.com/berth-plugin/berth/shared/state"
)

// errKilled is what a host panics with where a test wants the daemon to die.
var errKilled = errors.New("killed")

// errInjected is what a host fails with where a test wants it to.
var errInjected = errors.New("injected")

// A trouble is what goes wrong at a step of the host.
type trouble string

const (
	failBefore trouble = "fails before it is done"
	failAfter  trouble = "fails after it is done"
	killBefore trouble = "killed before it is done"
	killAfter  trouble = "killed after it is done"
)

// A testHost is a Mode and Links without a kernel. It insists on the order that
// the contract gives, and it outlives the daemon.
type testHost struct {
	mu        sync.Mutex
	networks  map[string]options.Network
	endpoints map[string]options.Endpoint
	// ports that are published, and reserved, by endpoint. Reservations die with
	// the daemon.
	ports    map[string][]options.PublishedPort
	reserved map[string][]options.PublishedPort
	moved    map[string]bool // endpoints whose link is in a container
	stray    map[string]link.Link
	routes   []link.Route
	watch    chan link.Event
	broken   error // what every Ensure answers
	// portsBroken is what EnsurePorts answers.
	portsBroken error
	illegal     []string
	mtu         int // of the default route
	// late is called when an endpoint has been made and before that is said.
	late func()

	steps int // counted down; at 0 there is trouble
	then  trouble
}

func newTestHost() *testHost {
	return &testHost{
		networks:  make(map[string]options.Network),
		endpoints: make(map[string]options.Endpoint),
		ports:     make(map[string][]options.PublishedPort),
		reserved:  make(map[string][]options.PublishedPort),
		moved:     make(map[string]bool),
		stray:     make(map[string]link.Link),
		watch:     make(chan link.Event),
	}
}

// at lets trouble come at the nth step from now, from 1.
func (h *testHost) at(n int, then trouble) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.steps, h.then = n, then
}

func (h *testHost) step(do func() error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	then := trouble("")
	if h.steps > 0 {
		if h.steps--; h.steps == 0 {
			then = h.then
		}
	}
	switch then {
	case failBefore:
		return errInjected
	case killBefore:
		panic(errKilled)
	}
	err := do()
	switch then {
	case failAfter:
		return errInjected
	case killAfter:
		panic(errKilled)
	}
	return err
}

func (h *testHost) wrong(format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	h.illegal = append(h.illegal, text)
	return errors.New(text)
}

func (h *testHost) Restore(_ context.Context, networks []options.Network, endpoints []options.Endpoint) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, n := range networks {
		if n.Bridge == "" {
			return h.wrong("restore a network without bridge")
		}
	}
	clear(h.reserved) // it is called once by each daemon, first
	clear(h.ports)
	for _, ep := range endpoints {
		if len(ep.Ports) > 0 {
			h.ports[ep.ID] = ep.Ports
		}
	}
	return nil
}

// ReservePorts takes the wanted ports as they are. Ephemeral ones begin at 40000.
func (h *testHost) ReservePorts(ctx context.Context, _ options.Network, ep options.Endpoint, want []options.PortRequest) (ports []options.PublishedPort, _ error) {
	return ports, h.step(func() error {
		taken := make(map[uint16]bool)
		for id, others := range h.reserved {
			for _, p := range others {
				taken[p.HostPort] = taken[p.HostPort] || id != ep.ID
			}
		}
		for _, w := range want {
			port := w.HostPort
			for port = max(port, 40000*boolInt(port == 0)); w.HostPort == 0 && taken[port]; port++ {
			}
			if taken[port] {
				return fault.Conflict("port %d is already allocated", port)
			}
			taken[port] = true
			ports = append(ports, options.PublishedPort{
				Proto: w.Proto, Host: netip.IPv4Unspecified(), HostPort: port,
				Container: ep.IPv4.Addr(), ContainerPort: w.ContainerPort, Count: 1,
			})
		}
		h.reserved[ep.ID] = ports
		return ctx.Err()
	})
}

func boolInt(b bool) uint16 {
	if b {
		return 1
	}
	return 0
}

func (h *testHost) EnsurePorts(ctx context.Context, _ options.Network, ep options.Endpoint) error {
	return h.step(func() error {
		if err := errors.Join(ctx.Err(), h.broken, h.portsBroken); err != nil {
			return err
		}
		if _, ok := h.endpoints[ep.ID]; !ok {
			return h.wrong("ports of endpoint %s published before it was made", ep.ID)
		}
		if len(ep.Ports) == 0 {
			return h.wrong("no ports of endpoint %s", ep.ID)
		}
		h.ports[ep.ID], h.reserved[ep.ID] = ep.Ports, ep.Ports
		return ctx.Err()
	})
}

func (h *testHost) RemovePorts(ctx context.Context, _ options.Network, ep options.Endpoint) error {
	return h.step(func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		delete(h.ports, ep.ID)
		delete(h.reserved, ep.ID)
		return nil
	})
}

func (h *testHost) Adopt(ctx context.Context, n options.Network) (options.Network, error) {
	if n.MTU == 0 {
		n.MTU = h.mtu
	}
	return n, ctx.Err()
}

func (h *testHost) Drift(networks []options.Network) (map[string]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	found := make(map[string]string)
	for _, n := range networks {
		if _, ok := h.networks[n.ID]; !ok {
			found[n.ID] = "bridge is missing"
		}
	}
	return found, nil
}

func (h *testHost) EnsureNetwork(ctx context.Context, n options.Network) error {
	return h.step(func() error {
		if err := errors.Join(ctx.Err(), h.broken); err != nil {
			return err
		}
		if n.Bridge == "" || n.ID == "" {
			return h.wrong("network without a name: %+v", n)
		}
		for id, other := range h.networks {
			if id != n.ID && other.Bridge == n.Bridge {
				return h.wrong("bridge %s is %s's and %s's", n.Bridge, id, n.ID)
			}
		}
		h.networks[n.ID] = n
		return nil
	})
}

func (h *testHost) RemoveNetwork(ctx context.Context, n options.Network) error {
	return h.step(func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		for id, ep := range h.endpoints {
			if ep.NetworkID == n.ID {
				return h.wrong("network %s removed before its endpoint %s", n.ID, id)
			}
		}
		delete(h.networks, n.ID)
		return nil
	})
}

func (h *testHost) EnsureEndpoint(ctx context.Context, n options.Network, ep options.Endpoint) error {
	return h.step(func() error {
		if err := errors.Join(ctx.Err(), h.broken); err != nil {
			return err
		}
		if _, ok := h.networks[n.ID]; !ok {
			return h.wrong("endpoint %s made before its network %s", ep.ID, n.ID)
		}
		if ep.NetworkID != n.ID || len(ep.MAC) != 6 || ep.HostLink == "" || ep.ContainerLink == "" || len(ep.HostLink) > 15 || len(ep.ContainerLink) > 15 {
			return h.wrong("endpoint is not complete: %+v", ep)
		}
		for id, other := range h.endpoints {
			if id == ep.ID || other.NetworkID != ep.NetworkID {
				continue
			}
			for _, addr := range addresses(ep) {
				if hasAddress(other, addr) {
					return h.wrong("endpoints %s and %s have address %s", id, ep.ID, addr)
				}
			}
			if other.HostLink == ep.HostLink {
				return h.wrong("endpoints %s and %s have link %s", id, ep.ID, ep.HostLink)
			}
		}
		h.endpoints[ep.ID] = ep
		if h.late != nil {
			h.late()
		}
		return ctx.Err()
	})
}

func (h *testHost) RemoveEndpoint(ctx context.Context, _ options.Network, ep options.Endpoint) error {
	return h.step(func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		delete(h.endpoints, ep.ID)
		delete(h.moved, ep.ID)
		delete(h.ports, ep.ID)
		delete(h.reserved, ep.ID)
		return nil
	})
}

func (h *testHost) Owned() ([]link.Link, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	links := slices.Collect(maps.Values(h.stray))
	for id, n := range h.networks {
		links = append(links, link.Link{Name: n.Bridge, Kind: "bridge", Owner: link.OfNetwork(id)})
	}
	for id, ep := range h.endpoints {
		l := link.Link{Name: ep.HostLink, Kind: "veth", Owner: link.OfEndpoint(id), Peer: 7}
		if h.moved[id] {
			l.Peer = 0
		}
		links = append(links, l)
	}
	return links, nil
}

func (h *testHost) Get(name string) (link.Link, bool, error) {
	return link.Link{Name: name}, name == "eth1", nil
}

func (h *testHost) Elsewhere() ([]link.Link, error) { return nil, nil }

func (h *testHost) Routes() ([]link.Route, error) { return h.routes, nil }

func (h *testHost) Delete(name string, owner link.Owner) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if l, ok := h.stray[name]; ok && l.Owner == owner {
		delete(h.stray, name)
		return nil
	}
	return h.wrong("link %s of %s deleted", name, owner)
}

func (h *testHost) Watch(ctx context.Context, fn func(link.Event)) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-h.watch:
			fn(e)
		}
	}
}

// reboot takes away all links.
func (h *testHost) reboot() {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.networks)
	clear(h.endpoints)
	clear(h.moved)
	clear(h.ports)
}

// A testEnv is a daemon on a host, with its state in a directory of the test.
type testEnv struct {
	t    testing.TB
	host *testHost
	// mode and links are the host's, or the kernel's.
	mode  Mode
	lan   func() Mode
	links Links
	// move puts a link into a container, as dockerd does after Join.
	move func(c *container, src string) error
	// with completes the Config of each daemon, nil does nothing. after ends what it
	// has begun, when the daemon has ended.
	with  func(*Config)
	after func() error
	// poolOpts are the --ipam-opt of networks.
	poolOpts map[string]string
	path     string
	// clock guards t0 where the daemon looks at it of its own accord.
	clock sync.Mutex
	t0    time.Time
	db    *state.DB
	d     *Driver
	net   pluginapi.NetworkDriver
	ipam  pluginapi.IPAMDriver
	seed  byte
}

func newEnv(t testing.TB) *testEnv {
	t.Helper()
	host := newTestHost()
	other := newTestHost()
	e := newEnvOn(t, host, func() Mode { return other }, host)
	e.host = host
	e.move = func(c *container, src string) error {
		host.mu.Lock()
		defer host.mu.Unlock()
		if ep, ok := host.endpoints[c.endpoint]; !ok || ep.ContainerLink != src {
			return fmt.Errorf("there is no link %s to move", src)
		}
		host.moved[c.endpoint] = true
		return nil
	}
	t.Cleanup(func() { assert.Check(t, len(host.illegal) == 0, "%v", host.illegal) })
	return e
}

// newEnvOn starts a daemon for the first time.
func newEnvOn(t testing.TB, mode Mode, lan func() Mode, links Links) *testEnv {
	t.Helper()
	e := &testEnv{t: t, mode: mode, lan: lan, links: links, path: filepath.Join(t.TempDir(), "net.db"), t0: time.Unix(1_700_000_000, 0)}
	e.start()
	t.Cleanup(func() { assert.Check(t, e.end()) })
	return e
}

// end ends the daemon, however it is.
func (e *testEnv) end() error {
	err := errors.Join(e.d.Close(), e.db.Close())
	if e.after != nil {
		err = errors.Join(err, e.after())
	}
	return err
}

func (e *testEnv) now() time.Time {
	e.clock.Lock()
	defer e.clock.Unlock()
	return e.t0
}

// later lets time go by.
func (e *testEnv) later(by time.Duration) {
	e.clock.Lock()
	defer e.clock.Unlock()
	e.t0 = e.t0.Add(by)
}

// start opens the state and recovers.
func (e *testEnv) start() {
	e.t.Helper()
	var err error
	e.db, err = OpenState(e.path)
	assert.NilError(e.t, err)
	log := logrus.New()
	log.SetOutput(io.Discard)
	e.seed++
	cfg := Config{
		State: e.db, LeaseLog: e.path + ".leases", Log: logrus.NewEntry(log), Links: e.links, Bridge: e.mode, LAN: e.lan(),
		Now: e.now, Random: rand.NewChaCha8([32]byte{e.seed}),
	}
	if e.with != nil {
		e.with(&cfg)
	}
	e.d, err = New(cfg)
	assert.NilError(e.t, err)
	e.net, e.ipam = e.d.Network(), e.d.IPAM()
	assert.NilError(e.t, e.d.Recover(e.t.Context()))
}

// restart ends the daemon, however it is, and starts another one.
func (e *testEnv) restart() {
	e.t.Helper()
	assert.NilError(e.t, e.end())
	e.start()
}

// killed runs fn and reports whether the host killed the daemon in it.
func killed(fn func()) (dead bool) {
	defer func() {
		if p := recover(); p != nil {
			if p != any(errKilled) {
				panic(p)
			}
			dead = true
		}
	}()
	fn()
	return false
}

// problems compares the records with the host and with each other.
func (e *testEnv) problems() []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	e.host.mu.Lock()
	defer e.host.mu.Unlock()
	s := e.d.store
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, n := range s.networks {
		if n.rec.Phase != phaseReady {
			add("network %s is %s", short(id), n.rec.Phase)
		}
		if _, ok := e.host.networks[id]; !ok {
			add("network %s is not on the host", short(id))
		}
		for epID, ep := range n.endpoints {
			if ep.Phase != phaseReady {
				add("endpoint %s is %s", short(epID), ep.Phase)
			}
			if have := e.host.ports[epID]; e.host.moved[epID] && !slices.Equal(have, ep.Spec.Ports) {
				add("endpoint %s publishes %v, recorded are %v", short(epID), have, ep.Spec.Ports)
			}
			if have := e.host.reserved[epID]; e.host.moved[epID] && !slices.Equal(have, ep.Spec.Ports) {
				add("endpoint %s holds %v, recorded are %v", short(epID), have, ep.Spec.Ports)
			}
			for _, addr := range addresses(ep.Spec) {
				view(s.leases, func(a *ipam.Allocator) (none struct{}) {
					pool, ok := a.Find(id, addr)
					if l, leased := a.Lease(pool.ID, addr); ok && (!leased || l.Endpoint != epID) {
						add("endpoint %s has no lease of %s: %+v", short(epID), addr, l)
					}
					return none
				})
			}
		}
	}
	for id := range e.host.networks {
		if _, ok := s.networks[id]; !ok {
			add("network %s on the host has no record", short(id))
		}
	}
	for _, held := range []map[string][]options.PublishedPort{e.host.ports, e.host.reserved} {
		for id, ports := range held {
			if !e.knows(id) {
				add("ports %v are those of no endpoint", ports)
			}
		}
	}
	for id, ep := range e.host.endpoints {
		n, ok := s.networks[ep.NetworkID]
		if !ok {
			add("endpoint %s on the host has no network", short(id))
		} else if _, ok := n.endpoints[id]; !ok {
			add("endpoint %s on the host has no record", short(id))
		}
	}
	return append(out, e.host.illegal...)
}

// knows reports whether an endpoint is recorded. The caller has locked the store.
func (e *testEnv) knows(endpoint string) bool {
	for _, n := range e.d.store.networks {
		if _, ok := n.endpoints[endpoint]; ok {
			return true
		}
	}
	return false
}

// healthy fails the test when something does not agree, now or after a restart.
func (e *testEnv) healthy() {
	e.t.Helper()
	assert.DeepEqual(e.t, e.problems(), []string(nil))
	e.restart()
	assert.DeepEqual(e.t, e.problems(), []string(nil))
}

// empty fails the test when any record is left.
func (e *testEnv) empty() {
	e.t.Helper()
	e.healthy()
	assert.Equal(e.t, len(e.d.store.networks), 0)
	assert.Equal(e.t, len(e.host.networks)+len(e.host.endpoints), 0)
	count := 0
	assert.NilError(e.t, e.db.View(func(tx *state.Tx) error {
		return errors.Join(
			e.d.store.b.endpoints.Each(tx, func(string, endpointRecord) error { count++; return nil }),
		)
	}))
	count += len(view(e.d.store.leases, (*ipam.Allocator).Pools))
	assert.Equal(e.t, count, 0, "records are left")
}
