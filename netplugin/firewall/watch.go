package firewall

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/netplugin/link"
)

// Check says in words what is not as it should be, "" if nothing: a table that
// was flushed or changed, a rule of Berth's missing in the chains of others, a new
// bridge of another network, a sysctl turned off. It changes nothing. While
// nothing in nftables changes it costs one netlink message, and some programs run
// where the legacy iptables is in use.
func (m *Manager) Check(ctx context.Context) (drift string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return "", err
	}
	return m.checkLocked(true)
}

// checkLocked is Check. Unless all, it only looks at what nftables counts.
func (m *Manager) checkLocked(all bool) (string, error) {
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
	if all {
		path, err := m.sysctlOffLocked()
		if err != nil {
			return "", err
		}
		if path != "" {
			return "sysctl net/" + path + " is 0", nil
		}
	}
	if current {
		if !all {
			return "", nil
		}
		if legacy, err := m.legacyInUse(); err != nil || !legacy {
			return "", err
		}
	}
	problem, err := m.missingRulesLocked()
	if err != nil || problem != "" {
		// Not current until it is repaired.
		m.generation = 0
	}
	return problem, err
}

const (
	// settle is how long links and nftables must be left in peace before they are
	// looked at again: one container start is a burst of events.
	settle = 200 * time.Millisecond
	// share bounds the time spent on looking at what others have changed: as one
	// part in so many.
	share = 20
	// patience is the longest wait that comes of it.
	patience = 2 * time.Second
)

// Watch keeps the rules until ctx ends, and returns when it has stopped: bridges
// of other networks are noticed as they come and go, a change of nftables by
// others when it is made, and every interval the rules are checked and repaired.
func (m *Manager) Watch(ctx context.Context, interval time.Duration) {
	defer m.setWatched(false)
	var (
		links, rules       = make(chan struct{}, 1), make(chan struct{}, 1)
		linksEnd, rulesEnd = make(chan struct{}), make(chan struct{})
	)
	go func() {
		defer close(linksEnd)
		m.watchLinks(ctx, links)
	}()
	go func() {
		defer close(rulesEnd)
		m.watchRules(ctx, rules, interval)
	}()
	defer func() { <-linksEnd; <-rulesEnd }()

	tick := time.NewTicker(interval)
	defer tick.Stop()
	wait, repairs := settle, 0
	for {
		bridges, all := false, false
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			all = true
		case <-links:
			bridges = true
		case <-rules:
		}
		if !all && !pause(ctx, wait) {
			return
		}
		// What has come meanwhile is seen now.
		bridges = take(links) || bridges
		take(rules)
		start := time.Now()
		// Routes decide about bridges, too, and have no events here.
		if bridges || all {
			m.followBridges(ctx)
		}
		if bridges {
			m.setWatched(true)
		}
		if m.repair(ctx, all) {
			repairs++
		} else {
			repairs = 0
		}
		wait = waitAfter(time.Since(start), repairs)
	}
}

// waitAfter is how long to wait after a look that took so long. On a host where
// others change nftables all the time, Berth's tables are read all the time; and
// with somebody who undoes each repair there is no end to it.
func waitAfter(look time.Duration, repairs int) time.Duration {
	return min(max(settle<<min(repairs, 4), share*look), patience)
}

// pause waits unless ctx ends.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func take(events <-chan struct{}) bool {
	select {
	case <-events:
		return true
	default:
		return false
	}
}

func put(events chan<- struct{}) {
	select {
	case events <- struct{}{}:
	default: // one is waiting already
	}
}

func (m *Manager) watchLinks(ctx context.Context, events chan<- struct{}) {
	err := m.links.Watch(ctx, func(e link.Event) {
		if !e.Link.Owner.Ours {
			put(events)
		}
	})
	if err != nil && ctx.Err() == nil {
		m.log.WithError(err).Error("link events end; bridges of other networks are noticed at each check only")
		m.setWatched(false)
	}
}

// watchRules tells when nftables was changed, by whomever: a change by Berth costs
// one message, since its generation is known. Without these events everything is
// found at the next check.
func (m *Manager) watchRules(ctx context.Context, events chan<- struct{}, interval time.Duration) {
	for ctx.Err() == nil {
		err := m.watchRulesOnce(ctx, events)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, unix.ENOBUFS) {
			put(events)
			continue
		}
		m.log.WithError(err).Warn("nftables events have ended; watching anew")
		if !pause(ctx, max(interval, settle)) {
			return
		}
	}
}

func (m *Manager) watchRulesOnce(ctx context.Context, events chan<- struct{}) error {
	config := &mdlayher.Config{}
	if ns := m.links.NetNS(); ns != nil {
		config.NetNS = int(ns.Fd())
	}
	conn, err := mdlayher.Dial(unix.NETLINK_NETFILTER, config)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		if stop() {
			_ = conn.Close()
		}
	}()
	filter, err := newGenerationOnly()
	if err != nil {
		return err
	}
	if err := conn.SetBPF(filter); err != nil {
		return fmt.Errorf("filter nftables events: %w", err)
	}
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("subscribe to nftables events: %w", err)
	}
	// Something may have happened before.
	put(events)
	for {
		if _, err := conn.Receive(); err != nil {
			return fmt.Errorf("nftables events: %w", err)
		}
		put(events)
	}
}

// newGenerationOnly is a socket filter that lets the message pass with which a
// transaction ends, and none about its parts: there may be thousands.
func newGenerationOnly() ([]bpf.RawInstruction, error) {
	const typeOffset = 4 // of nlmsg_type in struct nlmsghdr
	want := uint16(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN)
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: typeOffset, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(networkOrder(want)), SkipFalse: 1},
		bpf.RetConstant{Val: 1 << 16},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return nil, fmt.Errorf("filter nftables events: %w", err)
	}
	return filter, nil
}

// networkOrder is what a filter, which reads in network byte order, sees of a
// number in the host's.
func networkOrder(v uint16) uint16 {
	b := native(uint32(v))
	if b[0] == 0 { // big endian
		return v
	}
	return v<<8 | v>>8
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

// repair checks, all or only what nftables counts, and puts right what is wrong.
// It says whether anything was.
func (m *Manager) repair(ctx context.Context, all bool) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	problem, err := m.checkLocked(all)
	if err == nil && problem == "" || ctx.Err() != nil {
		return false
	}
	if err == nil {
		m.log.WithField("found", problem).Warn("repairing the firewall")
		err = errors.Join(m.keepSysctlsLocked(), m.applyLocked(ctx, true))
		if err == nil {
			m.repaired(problem)
		}
	}
	if err != nil && ctx.Err() == nil {
		m.log.WithError(err).Error("repair the firewall")
	}
	return true
}
