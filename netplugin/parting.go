package netplugin

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/berth-plugin/berth/netplugin/dhcp"
	"github.com/berth-plugin/berth/netplugin/ipam"
)

// partingTime is how long after the end of a container its lease goes back to the
// DHCP server.
const partingTime = 5 * time.Second

// partings are leases of DHCP servers whose containers have ended a moment ago. The
// servers hear of it a little later: dockerd tells of a restart as of an end and a
// beginning, and a container that begins meanwhile goes on with the lease, even while
// no server answers. Partings are safe for concurrent use.
type partings struct {
	// release tells the server.
	release func(dhcp.Lease)
	telling sync.WaitGroup

	mu sync.Mutex
	// leases are by client; see clientOf.
	leases map[string]*parting
}

type parting struct {
	dhcp.Lease
	// key and named are those of the lease that has ended.
	key   string
	named bool
	// maybe says that the server may have been told already.
	maybe bool
	since time.Time
	timer *time.Timer
	// told is nil until the server is being told, and closed when it was.
	told chan struct{}
}

// clientOf names a client for the time that a server is spoken to about it.
func clientOf(parent string, mac net.HardwareAddr) string { return parent + " " + string(mac) }

func newPartings(release func(dhcp.Lease)) *partings {
	return &partings{release: release, leases: make(map[string]*parting)}
}

// add begins a parting.
func (p *partings) add(begun parting) {
	e := &begun
	e.since = time.Now()
	who := clientOf(e.Parent, e.Identity.MAC)
	p.mu.Lock()
	defer p.mu.Unlock()
	if old := p.leases[who]; old != nil && old.told == nil {
		old.timer.Stop() // a client has one lease
	}
	p.leases[who] = e
	e.timer = time.AfterFunc(partingTime, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.leases[who] == e {
			p.tellLocked(who, e)
		}
	})
}

func (p *partings) tellLocked(who string, e *parting) {
	if e.told != nil {
		return
	}
	e.timer.Stop()
	e.told = make(chan struct{})
	p.telling.Go(func() {
		p.release(e.Lease)
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.leases[who] == e {
			delete(p.leases, who)
		}
		close(e.told)
	})
}

// take ends the parting of a client, who has its lease again. ok is false when there
// is none any more, or may be none; nothing will be sent for the client then.
func (p *partings) take(parent string, mac net.HardwareAddr) (_ dhcp.Lease, ok bool) {
	who := clientOf(parent, mac)
	p.mu.Lock()
	e := p.leases[who]
	if e != nil && e.told == nil {
		e.timer.Stop()
		delete(p.leases, who)
		p.mu.Unlock()
		return e.Lease, !e.maybe
	}
	p.mu.Unlock()
	if e != nil {
		<-e.told
	}
	return dhcp.Lease{}, false
}

// has reports whether a client is parting.
func (p *partings) has(parent string, mac net.HardwareAddr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.leases[clientOf(parent, mac)] != nil
}

// latest is the client without a key that has parted last in the pool's subnet, and
// that has this address if that is valid. Addresses that users had asked for by name
// go to those who do it again.
func (p *partings) latest(pool ipam.Pool, addr netip.Addr, busy func(net.HardwareAddr) bool) (_ dhcp.Identity, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var last *parting
	for _, e := range p.leases {
		fits := !addr.IsValid() && !e.named || e.Addr == addr
		if !fits || e.told != nil || e.key != "" || e.Parent != pool.Options.Parent || e.Subnet != pool.Prefix || busy(e.Identity.MAC) {
			continue
		}
		if last == nil || e.since.After(last.since) {
			last = e
		}
	}
	if last == nil {
		return dhcp.Identity{}, false
	}
	return last.Identity, true
}

// tell tells the servers of some of the leases at once, and returns when that is done.
func (p *partings) tell(which func(dhcp.Lease) bool) {
	var all []chan struct{}
	p.mu.Lock()
	for who, e := range p.leases {
		if which(e.Lease) {
			p.tellLocked(who, e)
			all = append(all, e.told)
		}
	}
	p.mu.Unlock()
	for _, told := range all {
		<-told
	}
}

// close tells of all of them. Nothing is added any more.
func (p *partings) close() {
	p.tell(func(dhcp.Lease) bool { return true })
	p.telling.Wait()
}
