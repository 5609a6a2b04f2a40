package dhcp

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

const (
	// leastWait is the RFC's least wait between two tries to renew, for leases that are
	// long enough.
	leastWait = time.Minute
	// A lost address is asked for after regainFirst, then after twice the time, and so
	// on up to regainMost.
	regainFirst = 15 * time.Second
	regainMost  = 10 * time.Minute
)

// A result is what has come of one try.
type result struct {
	lease Lease
	// ok says that lease is new.
	ok bool
	// refused says that a server has said no; over that the lease has ended by that, or
	// by its time.
	refused, over bool
	reason        string
}

// step does what is due for a lease that is in no queue, and puts it back.
func (m *Manager) step(t *tracked) {
	select {
	case m.slots <- struct{}{}:
		defer func() { <-m.slots }()
	case <-t.ctx.Done():
		return
	}
	res := m.try(t)
	if res.over {
		// Before anybody hears of a loss: the server may still have the address, as
		// after a restart of both.
		t.refused = res.refused
		if again := m.regain(t); again.ok {
			res = again
		} else {
			res.reason += "; " + again.reason
		}
	}
	switch {
	case res.ok:
		m.renewed(t, res.lease)
	case res.over:
		m.lose(t, res.reason)
	default:
		m.again(t, res.reason)
	}
}

// try makes one try, of the kind that the state asks for.
func (m *Manager) try(t *tracked) result {
	l, now := t.lease, m.opts.Now()
	switch {
	case t.state == Lost:
		return m.regain(t)
	case l.Expired(now):
		reason := "it has ended at " + l.Expires.Format(time.RFC3339)
		if t.reason != "" {
			reason += ", " + t.reason
		}
		return result{over: true, reason: reason}
	case !now.Before(l.T2):
		m.show(t, Rebinding)
		return m.renew(t, t.tries%2 == 1, everyServer)
	default:
		m.show(t, Renewing)
		return m.renew(t, false, toServer)
	}
}

// show sets the state that the user sees.
func (m *Manager) show(t *tracked, s State) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t.state = s
}

// everyServer is the route of a client that has an address to all servers.
func everyServer(l Lease) route {
	r := everybody(l.Identity.MAC)
	r.from = l.Addr
	return r
}

// renew asks for more time, as a client that uses its address or, with boot, as one
// that boots.
func (m *Manager) renew(t *tracked, boot bool, to func(Lease) route) (res result) {
	l := t.lease
	e, err := m.join(l.Parent, l.Identity)
	if err != nil {
		return result{reason: err.Error()}
	}
	defer e.leave()
	// The server that NAKs a unicast request is the one that was asked.
	server := l.Server
	if t.state == Rebinding {
		server = netip.Addr{}
	}
	a := &attempt{m: m, Request: Request{Parent: l.Parent, Identity: l.Identity, Subnet: l.Subnet}}
	sent := m.opts.Now()
	err = e.ask(t.ctx, pace{first: m.opts.Retry, tries: firstTries}, func(secs time.Duration) []byte {
		if boot {
			return frame(rebooting(e, l.Identity, secs, l.Addr), everybody(l.Identity.MAC))
		}
		return frame(renewing(e, l, secs), to(l))
	}, func(r reply) bool {
		res.lease, res.ok = a.confirmed(r, l.Addr, server, sent)
		res.refused = r.msg.MessageType() == dhcpv4.MessageTypeNak && a.said != nil
		res.over = res.refused
		return res.ok || res.refused
	})
	switch {
	case a.said != nil:
		res.reason = a.said.Error()
	case len(a.refused) > 0 && !res.ok:
		res.reason = strings.Join(a.refused, "; ")
	case errors.Is(err, errSilence):
		m.counts.silences.Add(1)
		res.reason = fmt.Sprintf("DHCP server %s does not answer on link %q", l.Server, l.Parent)
	case err != nil:
		res.reason = err.Error()
	}
	return res
}

// regain asks for the lost address as a new client would, and for no other: the
// container could not use it.
func (m *Manager) regain(t *tracked) result {
	l := t.lease
	lease, err := m.Acquire(t.ctx, Request{
		Parent: l.Parent, Identity: l.Identity, Subnet: l.Subnet, Want: l.Addr, Previous: l.Addr, Resume: !t.refused,
	})
	if err != nil {
		return result{reason: err.Error()}
	}
	return result{lease: lease, ok: true}
}

func (m *Manager) renewed(t *tracked, l Lease) {
	kind := EventRenewed
	m.mu.Lock()
	if m.leases[t.key] != t {
		m.mu.Unlock()
		return
	}
	if t.state == Lost {
		kind = EventRegained
	}
	t.lease, t.state, t.tries, t.refused, t.reason = l, Bound, 0, false, ""
	t.next = renewAt(l, m.opts.Now())
	m.mu.Unlock()
	if kind == EventRegained {
		m.log.WithField("address", l.Addr).Infof("DHCP server %s has given the address back", l.Server)
	}
	m.opts.Notify(Event{Kind: kind, Lease: l})
	m.requeue(t)
}

func (m *Manager) lose(t *tracked, reason string) {
	m.mu.Lock()
	if m.leases[t.key] != t || t.ctx.Err() != nil {
		m.mu.Unlock()
		return
	}
	t.state, t.tries, t.reason = Lost, 0, reason
	t.next = wall(m.opts.Now()).Add(jitter(regainFirst))
	m.mu.Unlock()
	m.counts.lost.Add(1)
	m.log.WithField("address", t.lease.Addr).Warnf("the DHCP lease of a container is lost: %s", reason)
	m.opts.Notify(Event{Kind: EventLost, Lease: t.lease, Reason: reason})
	m.requeue(t)
}

// again plans the next try after one that came to nothing.
func (m *Manager) again(t *tracked, reason string) {
	m.mu.Lock()
	now := wall(m.opts.Now())
	if t.state == Lost {
		t.next = now.Add(jitter(min(regainFirst<<min(t.tries+1, 10), regainMost)))
	} else {
		t.next = retryAt(t.lease, now)
	}
	t.tries++
	if reason != "" {
		t.reason = reason
	}
	m.mu.Unlock()
	m.requeue(t)
}

// retryAt is when a lease is to be renewed again: at half of what is left until T2, or
// until the end, but not before leastWait, or a fourth of the span, has gone by.
func retryAt(l Lease, now time.Time) time.Time {
	start, end := l.T1, l.T2
	if !now.Before(l.T2) {
		start, end = l.T2, l.Expires
	}
	wait := max(end.Sub(now)/2, min(leastWait, end.Sub(start)/4))
	if next := now.Add(wait); next.Before(end) {
		return next
	}
	return end
}

// requeue puts a lease back into the queue, unless it was untracked meanwhile.
func (m *Manager) requeue(t *tracked) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.leases[t.key] == t && t.ctx.Err() == nil {
		m.enqueueLocked(t)
	}
}

func jitter(d time.Duration) time.Duration { return d*9/10 + rand.N(d/5+1) }
