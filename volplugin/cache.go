package volplugin

import (
	"context"
	"errors"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// find returns the volume name as the root shows it now or, with the reason in
// away, as this host saw it last. The error is not-found when it certainly does
// not exist, or no engine on this host can know it.
//
// A name that this host does not know is not found in a root that is away. Only
// for the default root, before it was read once, is that unavailable: this host's
// state may be lost, and dockerd know more. Another root that never answered yet,
// because it is configured wrongly perhaps, would otherwise make every new name on
// this host wait for it.
func (s *store) find(ctx context.Context, name string) (v seenVolume, away, err error) {
	switch {
	case !s.reachable():
		// Mounting is not for a Get: what was seen is true for dockerd.
		if known := s.ledger.view(s.key, name); known.ok {
			return known.seenVolume, s.trouble(), nil
		}
		away = fault.Unavailable("share %s is not mounted at the moment", s)
	case s.hung.Load():
		away = s.looks.hangs()
	default:
		ctx, cancel := context.WithTimeout(ctx, s.cfg.look)
		defer cancel()
		v, err = s.look(ctx, name)
		if err == nil {
			return v, nil, nil
		}
		s.noteHang(ctx, err)
		away = err
	}
	known := s.ledger.view(s.key, name)
	v = known.seenVolume
	switch {
	case errors.Is(away, volume.ErrNoRecord) && !known.ok:
		return v, nil, fault.NotFound("volume %s does not exist", name)
	case errors.Is(away, volume.ErrNoRecord) && !known.mounted:
		// Made while this look was under way.
		return v, nil, nil
	case errors.Is(away, volume.ErrNoRecord):
		// Gone from the root, but containers of this host still have it.
		return v, fault.NotFound("volume %s was removed on another host", name), nil
	case known.ok:
		return v, away, nil
	case known.complete, !s.home():
		return v, nil, fault.NotFound("volume %s is not known on this host (%v)", name, away)
	}
	return v, nil, fault.Unavailable("volume %s: %w", name, away)
}

// look reads one record from the root, if it is not the one that this host has seen, and
// learns from it. The error is volume.ErrNoRecord when there is none.
func (s *store) look(ctx context.Context, name string) (seenVolume, error) {
	since := s.ledger.now(s.key)
	known := s.ledger.view(s.key, name)
	var v seenVolume
	err := s.looks.run(ctx, func() {}, func(ctx context.Context, commit func() bool) error {
		defer s.hung.Store(false)
		root, err := s.open()
		if errors.Is(err, volume.ErrFresh) {
			return volume.ErrNoRecord
		}
		if err != nil {
			return err
		}
		defer root.Close()
		entry, err := root.Entry(name, known.entry())
		if err != nil && !errors.Is(err, volume.ErrNoRecord) {
			return err
		}
		// What an abandoned look has seen may be old by now.
		if !commit() {
			return nil
		}
		visible := err == nil && isVisible(entry)
		if !visible {
			return errors.Join(s.ledger.learn(s.key, since, map[string]*seenVolume{name: nil}), volume.ErrNoRecord)
		}
		v = seen(entry)
		if err := s.ledger.learn(s.key, since, map[string]*seenVolume{name: &v}); err != nil {
			return err
		}
		if v.Broken == "" {
			if n, err := root.CountSnapshots(v.Record); err == nil {
				v.snapshots = &n
			}
		}
		return nil
	})
	return v, err
}

// isVisible tells whether users see the volume: not yet while it is being made
// and no more while it is being removed.
func isVisible(entry volume.Entry) bool {
	return entry.Err != nil || entry.Record.Visible()
}

func seen(entry volume.Entry) seenVolume {
	v := seenVolume{Record: entry.Record, Stamp: entry.Stamp}
	if entry.Err != nil {
		v.Broken = entry.Err.Error()
	}
	return v
}

// entry is the inverse of seen.
func (v seenVolume) entry() volume.Entry {
	entry := volume.Entry{Record: v.Record, Stamp: v.Stamp}
	if v.Broken != "" {
		entry.Err = errors.New(v.Broken)
	}
	return entry
}

// scan reads the whole root, as far as it has changed, and learns from it. One
// reading runs at a time; when ctx ends first, it goes on without the caller.
func (s *store) scan(ctx context.Context) error {
	if !s.reachable() {
		return s.trouble()
	}
	if s.hung.Load() {
		return s.looks.hangs()
	}
	result := s.scans.DoChan("", func() (any, error) {
		defer s.hung.Store(false)
		// Others may join this reading, so it does not end with the first caller.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), scanTime)
		defer cancel()
		return nil, s.readAll(ctx)
	})
	select {
	case r := <-result:
		return r.Err
	case <-ctx.Done():
		s.noteHang(ctx, errHangs)
		return s.looks.hangs()
	}
}

// A reading of a whole root that need not be repeated while its edition is the same.
type reading struct {
	root    string
	edition rooted.Stamp
}

// editionRests is how old an edition is when no other change can have the same one: more
// than the steps in which clocks of file systems go, and servers' clocks differ.
const editionRests = 10 * time.Second

func (s *store) readAll(ctx context.Context) error {
	since := s.ledger.now(s.key)
	root, err := s.open()
	if errors.Is(err, volume.ErrFresh) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	edition, err := root.Edition()
	if err != nil {
		return err
	}
	if last := s.lastRead.Load(); last != nil && *last == (reading{root.ID, edition}) {
		return nil
	}
	settled := time.Since(time.Unix(0, edition.Ctime)) > editionRests

	before := s.ledger.seen(s.key)
	known := make(map[string]volume.Entry, len(before))
	for name, v := range before {
		known[name] = v.entry()
	}
	entries, err := root.Entries(ctx, known)
	if err == nil {
		err = ctx.Err() // too late to be of use, see forgetChanges
	}
	if err != nil {
		return err
	}
	changes := make(map[string]*seenVolume, len(known))
	for name := range known {
		changes[name] = nil
		if _, ok := entries[name]; !ok {
			settled = false // what containers still have is forgotten later
		}
	}
	unfinished := map[string]bool{}
	for name, entry := range entries {
		if isVisible(entry) {
			v := seen(entry)
			changes[name] = &v
		}
		if entry.Record.Unfinished(s.ledger.hostID) {
			unfinished[name] = true
		}
	}
	if err := s.ledger.learn(s.key, since, changes); err != nil {
		return err
	}
	s.unfinished.Store(&unfinished)
	s.lastRead.Store(nil)
	if settled && len(unfinished) == 0 {
		s.lastRead.Store(&reading{root.ID, edition})
	}
	return s.ledger.setState(s.key, func(now *storeState) {
		now.Complete = now.Complete || now.ID == root.ID
	})
}

// noteHang remembers that the storage did not answer in the time it was given,
// so that the next Get does not wait for it again. Whichever call comes back from
// the storage first clears it.
func (s *store) noteHang(ctx context.Context, err error) {
	if errors.Is(err, errHangs) && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		if !s.hung.Swap(true) {
			s.cfg.Log.Warnf("volume root %s does not answer within %s; answering from what was seen last", s, s.cfg.look)
		}
	}
}

// entryStamp reads the stamp of a record that was just written.
func entryStamp(root *volume.Root, name string) rooted.Stamp {
	entry, err := root.Entry(name, volume.Entry{})
	if err != nil {
		return rooted.Stamp{} // differs from every file; the next look reads it
	}
	return entry.Stamp
}
