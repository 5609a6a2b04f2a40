package probe

import (
	"context"
	"net/netip"
	"sync"
	"time"
)

// The times of spares, and how many there are of each pool.
//
// A pool in use whose addresses nobody asks for costs two frames for each spare
// every refreshEvery: with three, one small broadcast frame in five seconds, about
// 100 bits a second. An address that is handed out costs the two frames that it would
// have cost anyway. Asking takes longer than a start does, so when many are handed out
// there are as many spares as that were a moment ago.
const (
	spareCount   = 3
	mostSpares   = 64
	momentAgo    = 2 * time.Second
	refreshEvery = 30 * time.Second
	clearFor     = time.Minute
	usedFor      = 10 * time.Minute
)

// Spares asks in advance for the addresses that will be handed out next, so that
// the usual start of a container does not wait. It is safe for concurrent use.
type Spares struct {
	prober *Prober
	cancel context.CancelFunc
	done   chan struct{}
	// kick wakes the goroutine.
	kick chan struct{}
	// refresh is how old a result gets before it is asked for again, look how often
	// that is looked at, used for how long a pool counts as in use.
	refresh, look, used time.Duration

	mu     sync.Mutex
	pools  map[string]*pool
	listen map[string]func()
}

// A Pool is where spares come from. The functions are called without any lock held
// of this package; Peek from one goroutine at a time.
type Pool struct {
	// Parent is the link of the LAN.
	Parent string
	// Peek returns the next addresses that would be handed out, at most n.
	Peek func(n int) []netip.Addr
	// Conflict, if not nil, hears of spares that somebody has, so that they are not
	// handed out and Peek gives others.
	Conflict func(Conflict)
	// Bound says that a network uses the pool. Its spares are kept fresh, whereas
	// those of others are only within ten minutes of the last question.
	Bound bool
}

type pool struct {
	Pool
	asked  time.Time
	spares map[netip.Addr]spare
	// handed is how many were handed out since then, before how many in the moment
	// before that.
	handed, before int
	since          time.Time
}

// handOut counts one.
func (p *pool) handOut(now time.Time) {
	if passed := now.Sub(p.since); passed >= momentAgo {
		p.before, p.handed, p.since = p.handed, 0, now
		if passed >= 2*momentAgo {
			p.before = 0
		}
	}
	p.handed++
}

// want is how many spares there should be.
func (p *pool) want(now time.Time) int {
	if now.Sub(p.since) >= 2*momentAgo {
		return spareCount
	}
	return min(max(spareCount, p.handed, p.before), mostSpares)
}

// A spare is what was heard about an address, and when.
type spare struct {
	at    time.Time
	clear bool
	// asking: it is being asked for, and nothing was heard since that began.
	asking bool
}

// NewSpares starts the one goroutine that asks. End it with Close, before the
// Prober.
func NewSpares(p *Prober) *Spares {
	s := newSpares(p)
	s.start()
	return s
}

func newSpares(p *Prober) *Spares {
	return &Spares{
		prober: p, done: make(chan struct{}), kick: make(chan struct{}, 1), refresh: refreshEvery, look: refreshEvery / 6, used: usedFor,
		pools: map[string]*pool{}, listen: map[string]func(){},
	}
}

func (s *Spares) start() {
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go s.keep(ctx)
}

// Close ends the goroutine and waits for it. Nothing is clear afterwards.
func (s *Spares) Close() error {
	s.cancel()
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pools = map[string]*pool{}
	for parent, stop := range s.listen {
		stop()
		delete(s.listen, parent)
	}
	return nil
}

// Set adds a pool by its ID, or changes it. Its spares are asked for at once if it
// is bound.
func (s *Spares) Set(id string, p Pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.pools[id]
	if old == nil || old.Parent != p.Parent {
		s.pools[id] = &pool{Pool: p, spares: map[netip.Addr]spare{}}
	} else {
		old.Pool = p
	}
	s.wake()
}

// Drop forgets a pool; an unknown one is success.
func (s *Spares) Drop(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pools, id)
	s.wake()
}

// Clear reports whether the address was asked for within the last minute and nobody
// has it. The answer is used up: the address is handed out now, and others are
// asked for.
func (s *Spares) Clear(id string, addr netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pools[id]
	if p == nil {
		return false
	}
	now := time.Now()
	p.asked = now
	p.handOut(now)
	found := p.spares[addr]
	delete(p.spares, addr)
	s.wake()
	return found.clear && now.Sub(found.at) < clearFor
}

func (s *Spares) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// keep is the goroutine.
func (s *Spares) keep(ctx context.Context) {
	defer close(s.done)
	ticker := time.NewTicker(s.look)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.kick:
		case <-ticker.C:
		}
		s.listenWhereUsed()
		// Parents wait for each other no longer than one probe each takes; those that
		// are down do not make anybody wait.
		var all sync.WaitGroup
		for parent, pools := range s.due(time.Now()) {
			all.Go(func() { s.fill(ctx, parent, pools) })
		}
		all.Wait()
	}
}

func (s *Spares) inUse(p *pool, now time.Time) bool {
	return p.Bound || !p.asked.IsZero() && now.Sub(p.asked) < s.used
}

// listenWhereUsed opens and closes what hears strangers on the parents.
func (s *Spares) listenWhereUsed() {
	now := time.Now()
	s.mu.Lock()
	want := map[string]bool{}
	for _, p := range s.pools {
		if s.inUse(p, now) {
			want[p.Parent] = true
		}
	}
	for parent, stop := range s.listen {
		if !want[parent] {
			stop()
			delete(s.listen, parent)
		}
		delete(want, parent)
	}
	s.mu.Unlock()
	for parent := range want {
		stop, err := s.prober.listen(parent, func(c claim) { s.heard(parent, c) })
		if err != nil {
			continue // the Prober is closed
		}
		s.mu.Lock()
		s.listen[parent] = stop
		s.mu.Unlock()
	}
}

// due lists the pools that lack spares, or have old ones, by parent.
func (s *Spares) due(now time.Time) map[string][]*pool {
	s.mu.Lock()
	defer s.mu.Unlock()
	due := map[string][]*pool{}
	for _, p := range s.pools {
		if !s.inUse(p, now) {
			clear(p.spares)
			continue
		}
		fresh := 0
		for _, x := range p.spares {
			if x.clear && now.Sub(x.at) < s.refresh {
				fresh++
			}
		}
		if fresh < p.want(now) {
			due[p.Parent] = append(due[p.Parent], p)
		}
	}
	return due
}

// fill asks on one parent for what its pools lack. An address that somebody has is
// not asked for again before it is old, even if Peek names it.
func (s *Spares) fill(ctx context.Context, parent string, pools []*pool) {
	wants := map[*pool][]netip.Addr{}
	var ask []netip.Addr
	for _, p := range pools {
		s.mu.Lock()
		peek, n := p.Peek, p.want(time.Now())
		s.mu.Unlock()
		next := peek(n)
		now := time.Now()
		s.mu.Lock()
		have := p.spares
		p.spares = map[netip.Addr]spare{}
		for _, a := range next {
			x, ok := have[a]
			if !ok || now.Sub(x.at) >= s.refresh {
				x.asking = true
				wants[p] = append(wants[p], a)
			}
			p.spares[a] = x
		}
		s.mu.Unlock()
		ask = append(ask, wants[p]...)
	}
	if len(ask) == 0 {
		return
	}
	at := time.Now()
	found, err := s.prober.ProbeAll(ctx, parent, ask, Fast)
	for _, p := range pools {
		s.mu.Lock()
		for _, a := range wants[p] {
			_, used := found[a]
			x, ok := p.spares[a]
			switch {
			case !ok: // handed out meanwhile
			case x.asking && (used || err == nil):
				p.spares[a] = spare{at: at, clear: !used}
			case x.asking && x.at.IsZero():
				delete(p.spares, a)
			}
		}
		report := p.Conflict
		s.mu.Unlock()
		for _, a := range wants[p] {
			if c, used := found[a]; used && report != nil {
				report(c)
			}
		}
	}
	if len(found) > 0 {
		s.wake() // for those that come in their place
	}
}

// heard takes a spare away that somebody else has or is about to take.
func (s *Spares) heard(parent string, c claim) {
	var reports []func(Conflict)
	s.mu.Lock()
	for _, p := range s.pools {
		if x, ok := p.spares[c.addr]; ok && p.Parent == parent {
			if x.clear && p.Conflict != nil {
				reports = append(reports, p.Conflict)
			}
			p.spares[c.addr] = spare{at: time.Now()}
		}
	}
	s.mu.Unlock()
	for _, report := range reports {
		report(Conflict{Addr: c.addr, MAC: c.mac.hardware(), Probing: c.probing})
	}
	if len(reports) > 0 {
		s.wake()
	}
}
