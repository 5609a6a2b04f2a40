package firewall

import (
	"context"
	"slices"
	"time"

	"github.com/coreos/go-iptables/iptables"

	"github.com/berth-plugin/berth/netplugin/link"
)

// Check says in words what is not as it should be, "" if nothing: a table that
// was flushed or changed, a rule of Berth's missing in Docker's chains, a new
// bridge of another network. It changes nothing. While nothing in nftables
// changes it costs one netlink message, and some programs run where the legacy
// iptables is in use.
func (m *Manager) Check(ctx context.Context) (drift string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return "", err
	}
	return m.checkLocked()
}

func (m *Manager) checkLocked() (string, error) {
	if m.emptyLocked() {
		return "", nil
	}
	if !m.watched {
		if err := m.refreshForeignLocked(); err != nil {
			return "", err
		}
	}
	current, err := m.readLocked()
	if err != nil {
		return "", err
	}
	if problem := m.differs(); problem != "" {
		return problem, nil
	}
	if current {
		if legacy, err := m.legacyInUse(); err != nil || !legacy {
			return "", err
		}
	}
	problem := ""
	err = m.xtables(func(ipt *iptables.IPTables) error {
		wrong, err := missingRule(ipt)
		if wrong {
			problem = "the rule in chain DOCKER-USER or FORWARD of iptables is missing"
		}
		return err
	})
	return problem, err
}

// settle is how long links must be quiet before bridges are looked at again: one
// container start is a burst of events.
const settle = 200 * time.Millisecond

// Watch keeps the rules until ctx ends, and returns when it has stopped: bridges
// of other networks are noticed as they come and go, and every interval the rules
// are checked and repaired.
func (m *Manager) Watch(ctx context.Context, interval time.Duration) {
	defer m.setWatched(false)
	events, stopped := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(stopped)
		err := m.links.Watch(ctx, func(e link.Event) {
			if e.Link.Owner.Ours {
				return
			}
			select {
			case events <- struct{}{}:
			default: // one is waiting already
			}
		})
		if err != nil && ctx.Err() == nil {
			m.log.WithError(err).Error("link events end; bridges of other networks are noticed at each check only")
			m.setWatched(false)
		}
	}()
	defer func() { <-stopped }()

	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			// Routes decide, too, and have no events here.
			m.followBridges(ctx)
		case <-events:
			select {
			case <-ctx.Done():
				return
			case <-time.After(settle):
			}
			m.followBridges(ctx)
			m.setWatched(true)
		}
		m.repair(ctx)
	}
}

func (m *Manager) setWatched(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.watched = on
}

// followBridges takes up bridges of other networks that came or went.
func (m *Manager) followBridges(ctx context.Context) {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.foreign
	err := m.refreshForeignLocked()
	if err == nil {
		if slices.Equal(before, m.foreign) || m.emptyLocked() {
			return
		}
		m.log.WithField("bridges", m.foreign).Debug("bridges of other networks have changed")
		err = m.applyLocked(ctx, false)
	}
	if err != nil && ctx.Err() == nil {
		m.log.WithError(err).Error("keep apart from the bridges of other networks")
	}
}

func (m *Manager) repair(ctx context.Context) {
	m.mu.Lock()
	defer m.mu.Unlock()
	problem, err := m.checkLocked()
	if err == nil && problem == "" || ctx.Err() != nil {
		return
	}
	if err == nil {
		m.log.WithField("found", problem).Warn("repairing the firewall")
		err = m.applyLocked(ctx, true)
	}
	if err != nil && ctx.Err() == nil {
		m.log.WithError(err).Error("repair the firewall")
	}
}
