package volplugin

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/state"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// find returns the volume name as the root shows it now or, with the reason in
// away, as this host saw it last. The error is not-found when it certainly does
// not exist, or no engine on this host can know it.
func (d *Driver) find(ctx context.Context, name string) (v seenVolume, away, err error) {
	if d.hung.Load() {
		away = d.looks.hangs()
	} else {
		ctx, cancel := context.WithTimeout(ctx, d.cfg.look)
		defer cancel()
		v, err = d.look(ctx, name)
		if err == nil {
			return v, nil, nil
		}
		d.noteHang(ctx, err)
		away = err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	v, ok := d.seen[name]
	switch {
	case errors.Is(away, volume.ErrNoRecord) && !ok:
		return v, nil, fault.NotFound("volume %s does not exist", name)
	case errors.Is(away, volume.ErrNoRecord) && d.mounts[name].IDs.Total() == 0:
		// Made while this look was under way.
		return v, nil, nil
	case errors.Is(away, volume.ErrNoRecord):
		// Gone from the root, but containers of this host still have it.
		return v, fault.NotFound("volume %s was removed on another host", name), nil
	case ok:
		return v, away, nil
	case d.root.Complete:
		return v, nil, fault.NotFound("volume %s is not known on this host (%v)", name, away)
	}
	return v, nil, fault.Unavailable("volume %s: %w", name, away)
}

// look reads one record from the root and learns from it. The error is
// volume.ErrNoRecord when there is none.
func (d *Driver) look(ctx context.Context, name string) (seenVolume, error) {
	since := d.now()
	var v seenVolume
	err := d.looks.run(ctx, func() {}, func(_ context.Context, commit func() bool) error {
		defer d.hung.Store(false)
		root, err := d.open()
		if errors.Is(err, volume.ErrFresh) {
			return volume.ErrNoRecord
		}
		if err != nil {
			return err
		}
		defer root.Close()
		entry, err := root.Entry(name)
		if err != nil && !errors.Is(err, volume.ErrNoRecord) {
			return err
		}
		// What an abandoned look has seen may be old by now.
		if !commit() {
			return nil
		}
		visible := err == nil && isVisible(entry)
		if !visible {
			return errors.Join(d.learn(since, map[string]*seenVolume{name: nil}), volume.ErrNoRecord)
		}
		v = seen(entry)
		return d.learn(since, map[string]*seenVolume{name: &v})
	})
	return v, err
}

// isVisible tells whether users see the volume: not yet while it is being made
// and no more while it is being removed.
func isVisible(entry volume.Entry) bool {
	return entry.Err != nil || entry.Record.Phase == volume.Ready
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
func (d *Driver) scan(ctx context.Context) error {
	if d.hung.Load() {
		return d.looks.hangs()
	}
	result := d.scans.DoChan("", func() (any, error) {
		defer d.hung.Store(false)
		// Others may join this reading, so it does not end with the first caller.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), scanTime)
		defer cancel()
		return nil, d.readAll(ctx)
	})
	select {
	case r := <-result:
		return r.Err
	case <-ctx.Done():
		d.noteHang(ctx, errHangs)
		return d.looks.hangs()
	}
}

func (d *Driver) readAll(ctx context.Context) error {
	since := d.now()
	root, err := d.open()
	if errors.Is(err, volume.ErrFresh) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()

	d.mu.Lock()
	known := make(map[string]volume.Entry, len(d.seen))
	for name, v := range d.seen {
		known[name] = v.entry()
	}
	d.mu.Unlock()
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
	}
	unfinished := map[string]bool{}
	for name, entry := range entries {
		if isVisible(entry) {
			v := seen(entry)
			changes[name] = &v
		} else if entry.Record.Host == d.cfg.HostID {
			unfinished[name] = true
		}
	}
	if err := d.learn(since, changes); err != nil {
		return err
	}
	d.mu.Lock()
	d.unfinished = unfinished
	complete := d.root.Complete || d.root.ID != root.ID
	d.mu.Unlock()
	if complete {
		return nil
	}
	return d.setRoot(rootState{ID: root.ID, Complete: true})
}

// noteHang remembers that the storage did not answer in the time it was given,
// so that the next Get does not wait for it again. Whichever call comes back from
// the storage first clears it.
func (d *Driver) noteHang(ctx context.Context, err error) {
	if errors.Is(err, errHangs) && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		if !d.hung.Swap(true) {
			d.cfg.Log.Warnf("volume root %s does not answer within %s; answering from what was seen last", d.cfg.Root, d.cfg.look)
		}
	}
}

// A moment orders what was seen at the root and what this process changed there.
type moment uint64

// now begins a look at the root.
func (d *Driver) now() moment {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.clock
}

// learn stores what a look at the root that began at since has seen; nil stands
// for a volume that is not there. Volumes that this process has changed after
// since are left out: the look may have come before the change. So are volumes
// that are gone but still mounted here.
func (d *Driver) learn(since moment, changes map[string]*seenVolume) error {
	d.cacheWrite.Lock()
	defer d.cacheWrite.Unlock()
	d.mu.Lock()
	for name, v := range changes {
		old, ok := d.seen[name]
		// What a Create on this host asked for is not at the root.
		if v != nil && old.Record.UUID == v.Record.UUID {
			v.Asked, v.Differs = old.Asked, old.Differs
		}
		same := v == nil && !ok || v != nil && ok && old.Stamp == v.Stamp && old.Broken == v.Broken
		if same || d.changed[name] > since || v == nil && d.mounts[name].IDs.Total() > 0 {
			delete(changes, name)
			continue
		}
	}
	d.mu.Unlock()
	return d.store(changes)
}

// remember stores what this process itself did to a volume; nil forgets it.
func (d *Driver) remember(name string, v *seenVolume) error {
	d.cacheWrite.Lock()
	defer d.cacheWrite.Unlock()
	d.mu.Lock()
	d.clock++
	d.changed[name] = d.clock
	d.mu.Unlock()
	return d.store(map[string]*seenVolume{name: v})
}

// store puts changes into the state file and then into memory; cacheWrite is held.
func (d *Driver) store(changes map[string]*seenVolume) error {
	if len(changes) == 0 {
		return nil
	}
	err := d.cfg.DB.Update(func(tx *state.Tx) error {
		for name, v := range changes {
			var err error
			if v == nil {
				err = cacheBucket.Delete(tx, name)
			} else {
				err = cacheBucket.Put(tx, name, *v)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("store what was seen at the volume root: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, v := range changes {
		if v == nil {
			delete(d.seen, name)
		} else {
			d.seen[name] = *v
		}
	}
	return nil
}

// open opens the root and notes its ID when this host sees it for the first time.
func (d *Driver) open() (*volume.Root, error) {
	d.mu.Lock()
	known := d.root
	d.mu.Unlock()
	root, err := d.location.Open(known.ID)
	if errors.Is(err, volume.ErrFresh) && known.ID != "" {
		// The operator says that this empty root is meant.
		return nil, errors.Join(err, d.setRoot(rootState{}))
	}
	if err != nil {
		return nil, err
	}
	if root.ID != known.ID {
		err = d.setRoot(rootState{ID: root.ID})
	}
	if err == nil && root.Accepted {
		err = root.DropAccept()
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return root, nil
}

// setRoot stores which root this host uses. What was seen at another one is
// forgotten.
func (d *Driver) setRoot(next rootState) error {
	d.cacheWrite.Lock()
	defer d.cacheWrite.Unlock()
	d.mu.Lock()
	before := d.root
	forget := map[string]*seenVolume{}
	if before.ID != "" && before.ID != next.ID {
		for name := range maps.Keys(d.seen) {
			forget[name] = nil
		}
	}
	d.mu.Unlock()
	if before.ID != "" && before.ID != next.ID {
		d.cfg.Log.Warnf("volume root %s: using %q in place of %q, as accepted", d.cfg.Root, next.ID, before.ID)
	}
	err := d.cfg.DB.Update(func(tx *state.Tx) error { return rootBucket.Put(tx, onlyKey, next) })
	if err != nil {
		return fmt.Errorf("store the volume root's ID: %w", err)
	}
	d.mu.Lock()
	d.root = next
	d.mu.Unlock()
	return d.store(forget)
}

// entryStamp reads the stamp of a record that was just written.
func entryStamp(root *volume.Root, name string) rooted.Stamp {
	entry, err := root.Entry(name)
	if err != nil {
		return rooted.Stamp{} // differs from every file; the next look reads it
	}
	return entry.Stamp
}
