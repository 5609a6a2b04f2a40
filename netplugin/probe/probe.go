// Package probe asks on a LAN whether an address is in use before it is handed out,
// and listens for strangers that use an address of a container.
//
// IPv4 is asked for with the ARP probes of RFC 5227, IPv6 with the solicitations of
// duplicate address detection (RFC 4862, with the nonce of RFC 7527). Whoever has
// the address answers, and whoever probes for it at the same time is heard. Nothing
// changes in the caches of neighbours: a probe names no sender address.
//
// There is one packet socket for each parent link, opened when it is needed and
// closed when it has not been for a while, and one goroutine that reads from it.
// Sockets and links are those of the network namespace of the link.Handle. Sockets
// need CAP_NET_RAW.
//
// What cannot be found: a host that is silent or off, one behind a switch that
// keeps its frames back, a macvlan sibling without Options.Child or of a mode other
// than bridge, and any ipvlan sibling: its kernel never hears the parent.
package probe

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/berth-plugin/berth/netplugin/link"
	"github.com/berth-plugin/berth/shared/fault"
)

// A Mode says how patiently is asked. The zero Mode is Off.
type Mode uint8

const (
	// Off asks nobody: every address is clear.
	Off Mode = iota
	// Fast sends two probes, 100 ms apart, and waits another 100 ms.
	Fast
	// Full has the numbers of RFC 5227, also for IPv6: up to 1 s of waiting, three
	// probes 1 to 2 s apart, 2 s for answers; 4 to 7 s in all.
	Full
)

// The numbers of RFC 5227, section 1.1, and those of Fast.
const (
	fullWait   = time.Second
	fullProbes = 3
	fullMin    = time.Second
	fullMax    = 2 * time.Second
	fullAnswer = 2 * time.Second

	fastProbes = 2
	fastGap    = 100 * time.Millisecond
)

// waits are the pauses before each probe, and last the one for answers.
func (m Mode) waits() []time.Duration {
	switch m {
	case Fast:
		waits := []time.Duration{0}
		for range fastProbes {
			waits = append(waits, fastGap)
		}
		return waits
	case Full:
		// Hosts that boot at the same moment do not ask at the same moment.
		waits := []time.Duration{mrand.N(fullWait)}
		for range fullProbes - 1 {
			waits = append(waits, fullMin+mrand.N(fullMax-fullMin))
		}
		return append(waits, fullAnswer)
	default:
		return nil
	}
}

// A Conflict is an address that somebody has, or is about to take.
type Conflict struct {
	Addr netip.Addr
	// MAC is who has it.
	MAC net.HardwareAddr
	// Probing says that it is not in use yet: another host asks for it just now.
	Probing bool
	// Host says that it is an address of this host itself.
	Host bool
}

// String is the conflict in words: "192.0.2.7 is in use by 02:00:00:00:00:07".
func (c Conflict) String() string {
	switch {
	case c.Host:
		return fmt.Sprintf("%s is an address of this host", c.Addr)
	case c.Probing:
		return fmt.Sprintf("%s is being taken by %s", c.Addr, c.MAC)
	default:
		return fmt.Sprintf("%s is in use by %s", c.Addr, c.MAC)
	}
}

// A NotProbedError says why nobody could be asked: the parent is missing, down, without
// carrier, or no Ethernet. Nothing is known about the address then. It is a
// fault.Unavailable.
type NotProbedError struct {
	// Parent is the link.
	Parent string
	err    error
}

func (e *NotProbedError) Error() string { return e.err.Error() }

func (e *NotProbedError) Unwrap() error { return e.err }

func notProbed(parent, format string, args ...any) error {
	return &NotProbedError{
		Parent: parent,
		err:    fault.Unavailable("nobody can be asked on link %q: %s", parent, fmt.Sprintf(format, args...)),
	}
}

// Options of New.
type Options struct {
	// Link reads the parents, in its namespace. It is not closed by the Prober.
	Link *link.Handle
	// Ours says that a MAC address on a parent is that of a container that the
	// caller knows, so that what it says is no conflict; nil is never. It is called
	// for many frames, from the goroutine that reads them, and must not wait.
	Ours func(parent string, mac net.HardwareAddr) bool
	// Child names a macvlan link of mode bridge on the parent, in the same
	// namespace, "" for none. Probes are then sent through it. Its siblings, which
	// may be in any namespace and of any owner, hear those, whereas the kernel shows
	// them nothing that is sent by the parent itself. The LAN hears either, with the
	// parent's MAC. nil is none.
	Child func(parent string) string
}

// A Prober asks on the links of one network namespace. It is safe for concurrent
// use; Close ends it.
type Prober struct {
	opts Options
	// mu guards all below, down to the fields of segments.
	mu       sync.Mutex
	segments map[string]*segment
	closed   bool
	readers  sync.WaitGroup
	// idle and retry are times of segments, shorter in tests.
	idle, retry time.Duration
}

// New makes a Prober that has no socket yet.
func New(opts Options) *Prober {
	return &Prober{opts: opts, segments: map[string]*segment{}, idle: 10 * time.Second, retry: 2 * time.Second}
}

// Close closes all sockets and waits until no callback is under way. Probes that
// are end with an error.
func (p *Prober) Close() error {
	p.mu.Lock()
	p.closed = true
	for _, s := range p.segments {
		s.closeLocked()
	}
	p.mu.Unlock()
	p.readers.Wait()
	return nil
}

// Probe asks on the parent for one address: nil is that nobody has it. A conflict
// is returned at once, nil after the time of the mode. The error is ctx's, or a
// NotProbedError.
func (p *Prober) Probe(ctx context.Context, parent string, addr netip.Addr, mode Mode) (*Conflict, error) {
	found, err := p.ProbeAll(ctx, parent, []netip.Addr{addr}, mode)
	if c, ok := found[addr]; ok {
		return &c, nil
	}
	return nil, err
}

// ProbeAll is Probe for several addresses in the time of one. The conflicts are
// those that were found, also when there is an error.
func (p *Prober) ProbeAll(ctx context.Context, parent string, addrs []netip.Addr, mode Mode) (map[netip.Addr]Conflict, error) {
	found := map[netip.Addr]Conflict{}
	if mode == Off || len(addrs) == 0 {
		return found, nil
	}
	way, err := p.wayTo(parent)
	if err != nil {
		return found, err
	}
	r := &run{prober: p, way: way, found: found}
	for _, a := range addrs {
		if way.host[a] {
			found[a] = Conflict{Addr: a, MAC: way.parent.MAC, Host: true}
		} else if _, twice := r.open[a]; !twice {
			r.add(a)
		}
	}
	if len(r.open) == 0 {
		return found, nil
	}
	return found, r.do(ctx, mode)
}

// A way is how a parent is reached at the moment.
type way struct {
	parent link.Link
	// send are the links to send by, the first that works.
	send []int
	// host has the addresses that the host has there itself. The kernel does not
	// answer it when it asks for those.
	host map[netip.Addr]bool
}

// parent looks at a parent; the error is a NotProbedError when nobody can be asked.
func (p *Prober) parent(name string) (link.Link, error) {
	l, ok, err := p.opts.Link.Get(name)
	switch {
	case err != nil:
		return l, notProbed(name, "%v", err)
	case !ok:
		return l, notProbed(name, "it does not exist")
	case !isEthernet(l):
		return l, notProbed(name, "it has no MAC address")
	case !l.Up:
		return l, notProbed(name, "it is down")
	case !l.Carrier:
		return l, notProbed(name, "it has no carrier")
	}
	return l, nil
}

// wayTo is parent, with what else is needed to send.
func (p *Prober) wayTo(parent string) (way, error) {
	l, err := p.parent(parent)
	if err != nil {
		return way{}, err
	}
	w := way{parent: l, send: []int{l.Index}, host: map[netip.Addr]bool{}}
	names := []string{parent}
	if p.opts.Child != nil {
		if name := p.opts.Child(parent); name != "" {
			if c, ok, err := p.opts.Link.Get(name); err == nil && ok && c.Up {
				w.send = []int{c.Index, l.Index}
				names = append(names, name)
			}
		}
	}
	for _, name := range names {
		addrs, err := p.opts.Link.Addrs(name)
		if err != nil && name == parent {
			return way{}, notProbed(parent, "%v", err)
		}
		for _, a := range addrs {
			w.host[a.Addr()] = true
		}
	}
	return w, nil
}

func isEthernet(l link.Link) bool { return len(l.MAC) == 6 && mac(l.MAC) != mac{} }

// A run is one call of ProbeAll.
type run struct {
	prober *Prober
	way    way
	open   map[netip.Addr]*query
	// heard takes at most one conflict of each query.
	heard chan Conflict
	found map[netip.Addr]Conflict
}

// A query is an address that a run wants to know about.
type query struct {
	addr netip.Addr
	// nonce marks the solicitations of this query, so that a copy that comes back is
	// not taken for somebody else's.
	nonce nonce
	heard chan<- Conflict
	done  bool
	sent  bool
}

func (r *run) add(a netip.Addr) {
	if r.open == nil {
		r.open = map[netip.Addr]*query{}
	}
	q := &query{addr: a}
	_, _ = rand.Read(q.nonce[:]) // never fails
	r.open[a] = q
}

// do asks for all addresses that are open.
func (r *run) do(ctx context.Context, mode Mode) error {
	r.heard = make(chan Conflict, len(r.open))
	all := slices.Collect(maps.Values(r.open))
	for _, q := range all {
		q.heard = r.heard
	}
	s, downs, err := r.prober.acquire(r.way.parent, all)
	if err != nil {
		return err
	}
	defer r.prober.release(s, all)

	timer := time.NewTimer(0)
	defer timer.Stop()
	due := time.Now()
	waits := mode.waits()
	for i, wait := range waits {
		// From the plan, not from now: the whole takes no longer on a busy machine.
		due = due.Add(wait)
		timer.Reset(time.Until(due))
		if err := r.listen(ctx, timer.C); err != nil || len(r.open) == 0 {
			return err
		}
		if i == len(waits)-1 {
			break
		}
		for _, q := range r.open {
			if err := r.prober.send(s, r.way, q); err != nil {
				return err
			}
		}
	}
	for _, q := range r.open {
		if !q.sent {
			return notProbed(r.way.parent.Name, "its queue is full")
		}
	}
	return r.prober.check(s, r.way.parent, downs)
}

// listen takes what is heard until the timer fires or nothing is open any more.
func (r *run) listen(ctx context.Context, timer <-chan time.Time) error {
	for len(r.open) > 0 {
		select {
		case c := <-r.heard:
			r.found[c.Addr] = c
			delete(r.open, c.Addr)
		case <-ctx.Done():
			return ctx.Err()
		case <-timer:
			return nil
		}
	}
	return nil
}
