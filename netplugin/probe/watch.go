package probe

import (
	"net/netip"
	"sync"
	"time"
)

// reportEvery bounds the reports of one address.
const reportEvery = time.Minute

// Watch listens on the parent, without sending anything, for strangers that use an
// address of a container, until stop is called. held says whether an address is one
// of a container; both functions are called one at a time from the goroutine that
// reads frames, and must not wait. An address is reported at most once a minute.
//
// A parent that is missing is waited for, one that goes and comes back is followed.
// The error is that the Prober is closed. One last report may be under way when stop
// returns.
func (p *Prober) Watch(parent string, held func(netip.Addr) bool, report func(Conflict)) (stop func(), err error) {
	w := &watch{held: held, report: report, last: map[netip.Addr]time.Time{}, every: reportEvery}
	return p.listen(parent, w.heard)
}

type watch struct {
	held   func(netip.Addr) bool
	report func(Conflict)
	every  time.Duration

	mu sync.Mutex
	// last is when an address was reported, for a minute or so.
	last map[netip.Addr]time.Time
}

// heard reports those who say that they have an address. One who only asks for it
// hears from the container that it has it.
func (w *watch) heard(c claim) {
	if c.probing || !w.held(c.addr) || !w.due(c.addr, time.Now()) {
		return
	}
	w.report(Conflict{Addr: c.addr, MAC: c.mac.hardware()})
}

func (w *watch) due(addr netip.Addr, now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if at, ok := w.last[addr]; ok && now.Sub(at) < w.every {
		return false
	}
	for a, at := range w.last {
		if now.Sub(at) >= w.every {
			delete(w.last, a)
		}
	}
	w.last[addr] = now
	return true
}
