package volplugin

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/google/uuid"
	"github.com/sirupsen/logrus"

	"github.com/berth-plugin/berth/shared/state"
	"github.com/berth-plugin/berth/volplugin/mount"
	"github.com/berth-plugin/berth/volplugin/netfs"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// What this host keeps in its state file. Buckets are names; they hold no data.
var (
	hostBucket = state.NewBucket[string]("volume-host")
	// storesBucket has the stores by their keys.
	storesBucket = state.NewBucket[storeState]("volume-stores")
	// cacheBucket has what was seen, by cacheKey.
	cacheBucket = state.NewBucket[seenVolume]("volumes")
	// ownersBucket has, by the volume's name, the key of the store whose volume the
	// name means.
	ownersBucket = state.NewBucket[string]("volume-owners")
	// mountsBucket is in the file of the counts. Before schema version 3 it was in the
	// state file.
	mountsBucket = state.NewBucket[volumeMounts]("volume-mounts")
)

// onlyKey is the key in buckets of one record.
const onlyKey = "this"

// storeState is a store as this host has used it.
type storeState struct {
	// ID of the root's marker.
	ID string
	// Complete is set when all of the root's volumes have been seen once, so that
	// a name that is not in the cache was never known to this host's dockerd.
	Complete bool
	// Share is what Berth mounts there because a volume asked for it. It may hold
	// secrets.
	Share *netfs.Source `json:",omitempty"`
	// Idle is set when the share had no volumes and nothing of removed ones.
	Idle bool `json:",omitempty"`
}

// seenVolume is a volume as this host saw it last.
type seenVolume struct {
	Record volume.Record
	// Broken says why the record cannot be used; Record is empty then.
	Broken string `json:",omitempty"`
	Stamp  rooted.Stamp
	// Asked are the options of the last Create for the existing volume, when they
	// were not those it was made with.
	Asked map[string]string `json:",omitempty"`
	// Differs is set with Asked, which may be empty.
	Differs bool `json:",omitempty"`
	// snapshots is how many there are, nil when nobody has looked. It is not kept.
	snapshots *int
}

// volumeMounts are the mounts that dockerd has asked for on this host.
type volumeMounts struct {
	// Store is the key of the store that the volume is in.
	Store string
	// UUID of the volume that was mounted.
	UUID string
	// Boot of the host in which it was.
	Boot string
	IDs  mount.References
	// Bound says that the data was mounted at a path of its own for them.
	Bound bool `json:",omitempty"`
}

// cacheKey joins a store's key and a volume's name, which has no slash.
func cacheKey(store, name string) string { return store + "/" + name }

func splitCacheKey(key string) (store, name string) {
	i := strings.LastIndexByte(key, '/')
	return key[:max(i, 0)], key[i+1:]
}

// A ledger is what this host knows of volumes: its state file and its counts of mounts,
// and the same in memory. It never touches a root, so no call of it can hang on storage. All
// methods may be called concurrently.
type ledger struct {
	db, counts *state.DB
	log        *logrus.Entry
	// hostID names this host in records.
	hostID string

	// write is held while records of volumes and stores change, in the state file
	// and in memory.
	write sync.Mutex

	mu     sync.Mutex // guards all following fields
	pages  map[string]*page
	owners map[string]string
	mounts map[string]volumeMounts
}

// A page is what a ledger has of one store.
type page struct {
	state storeState
	seen  map[string]seenVolume
	// clock counts this process's changes of volumes, changed says when each
	// volume had its last.
	clock   moment
	changed map[string]moment
	// lastRound is the clock at the last round of background work.
	lastRound moment
}

// A moment orders what was seen at a root and what this process changed there.
type moment uint64

// openLedger reads what an earlier process has kept. hostID is as in Config.
func openLedger(db, counts *state.DB, log *logrus.Entry, hostID string) (*ledger, error) {
	l := &ledger{
		db: db, counts: counts, log: log, hostID: hostID,
		pages: map[string]*page{}, owners: map[string]string{}, mounts: map[string]volumeMounts{},
	}
	err := db.Update(func(tx *state.Tx) error {
		if err := l.readHostID(tx); err != nil {
			return err
		}
		return errors.Join(
			storesBucket.Each(tx, func(key string, s storeState) error {
				l.page(key).state = s
				return nil
			}),
			cacheBucket.Each(tx, func(key string, v seenVolume) error {
				store, name := splitCacheKey(key)
				l.page(store).seen[name] = v
				return nil
			}),
			ownersBucket.Each(tx, func(name, key string) error {
				l.owners[name] = key
				return nil
			}),
		)
	})
	if err != nil {
		return nil, err
	}
	return l, l.readMounts()
}

// readMounts reads the counts, and moves those that an earlier version has in the
// state file.
func (l *ledger) readMounts() error {
	read := func(tx *state.Tx) error {
		return mountsBucket.Each(tx, func(name string, m volumeMounts) error {
			l.mounts[name] = m
			return nil
		})
	}
	if err := l.db.View(read); err != nil {
		return err
	}
	moved := maps.Clone(l.mounts)
	if err := l.counts.Update(func(tx *state.Tx) error {
		for name, m := range moved {
			if err := mountsBucket.Put(tx, name, m); err != nil {
				return err
			}
		}
		return read(tx)
	}); err != nil || len(moved) == 0 {
		return err
	}
	return l.db.Update(func(tx *state.Tx) error {
		for name := range moved {
			if err := mountsBucket.Delete(tx, name); err != nil {
				return err
			}
		}
		return nil
	})
}

func (l *ledger) readHostID(tx *state.Tx) error {
	if l.hostID != "" {
		return nil
	}
	id, ok, err := hostBucket.Get(tx, onlyKey)
	if err == nil && !ok {
		// The name is for people; the rest tells hosts of one name apart.
		name, _ := os.Hostname() // an empty name is as good
		id = strings.TrimPrefix(name+"/"+uuid.NewString(), "/")
		err = hostBucket.Put(tx, onlyKey, id)
	}
	l.hostID = id
	return err
}

// page of a store, made where it is missing; mu is held, or nobody else has the
// ledger yet.
func (l *ledger) page(key string) *page {
	p, ok := l.pages[key]
	if !ok {
		p = &page{seen: map[string]seenVolume{}, changed: map[string]moment{}}
		l.pages[key] = p
	}
	return p
}

// stores are the keys of all stores that this host has used, sorted.
func (l *ledger) stores() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var keys []string
	for key, p := range l.pages {
		if p.state != (storeState{}) || len(p.seen) > 0 {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// state of a store; the zero value is that of one never used.
func (l *ledger) state(key string) storeState {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.page(key).state
}

// setState changes what is kept of a store. What was seen at a root of another ID
// is forgotten.
func (l *ledger) setState(key string, change func(*storeState)) error {
	l.write.Lock()
	defer l.write.Unlock()
	l.mu.Lock()
	p := l.page(key)
	next := p.state
	change(&next)
	forget := map[string]*seenVolume{}
	if p.state.ID != "" && p.state.ID != next.ID {
		for name := range p.seen {
			forget[name] = nil
		}
	}
	same := p.state == next // a Share is replaced and never changed
	l.mu.Unlock()
	if same {
		return nil
	}
	err := l.db.Update(func(tx *state.Tx) error { return storesBucket.Put(tx, key, next) })
	if err != nil {
		return fmt.Errorf("store what is known of volume root %s: %w", key, err)
	}
	l.mu.Lock()
	p.state = next
	l.mu.Unlock()
	return l.put(key, forget)
}

// now begins a look at a store's root.
func (l *ledger) now(key string) moment {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.page(key).clock
}

// learn stores what a look at the root that began at since has seen; nil stands
// for a volume that is not there. Volumes that this process has changed after
// since are left out: the look may have come before the change. So are volumes
// that are gone but still mounted here.
func (l *ledger) learn(key string, since moment, changes map[string]*seenVolume) error {
	l.write.Lock()
	defer l.write.Unlock()
	l.mu.Lock()
	p := l.page(key)
	for name, v := range changes {
		old, ok := p.seen[name]
		// What a Create on this host asked for is not at the root.
		if v != nil && old.Record.UUID == v.Record.UUID {
			v.Asked, v.Differs = old.Asked, old.Differs
		}
		same := v == nil && !ok || v != nil && ok && old.Stamp == v.Stamp && old.Broken == v.Broken
		if same || p.changed[name] > since || v == nil && l.mounted(key, name) {
			delete(changes, name)
		}
	}
	l.mu.Unlock()
	return l.put(key, changes)
}

// remember stores what this process itself did to a volume; nil forgets it.
func (l *ledger) remember(key, name string, v *seenVolume) error {
	l.write.Lock()
	defer l.write.Unlock()
	l.mu.Lock()
	p := l.page(key)
	p.clock++
	p.changed[name] = p.clock
	l.mu.Unlock()
	return l.put(key, map[string]*seenVolume{name: v})
}

// put changes what was seen, in the state file and then in memory, and with it
// whose volume each name means; write is held.
func (l *ledger) put(key string, changes map[string]*seenVolume) error {
	if len(changes) == 0 {
		return nil
	}
	l.mu.Lock()
	owners := make(map[string]string, len(changes))
	for name, v := range changes {
		owners[name] = l.ownerAfter(key, name, v != nil)
	}
	l.mu.Unlock()
	err := l.db.Update(func(tx *state.Tx) error {
		for name, v := range changes {
			var err error
			if v == nil {
				err = cacheBucket.Delete(tx, cacheKey(key, name))
			} else {
				err = cacheBucket.Put(tx, cacheKey(key, name), *v)
			}
			switch {
			case err != nil:
			case owners[name] == "":
				err = ownersBucket.Delete(tx, name)
			default:
				err = ownersBucket.Put(tx, name, owners[name])
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
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.page(key)
	for name, v := range changes {
		if v == nil {
			delete(p.seen, name)
		} else {
			p.seen[name] = *v
		}
		if owner := owners[name]; owner == "" {
			delete(l.owners, name)
		} else {
			l.owners[name] = owner
			if v != nil && owner != key && l.pages[owner].state.ID != p.state.ID {
				l.log.WithField("volume", name).Warnf("the name is in two stores: %s is used, %s is passed over", owner, key)
			}
		}
	}
	return nil
}

// ownerAfter tells whose volume the name means once the store has it, or has it
// no more: the store that was known first keeps it, and when that has lost it the
// first in the order of keys gets it. mu is held.
func (l *ledger) ownerAfter(key, name string, has bool) string {
	owner := l.owners[name]
	if has && owner == "" {
		return key
	}
	if has || owner != key {
		return owner
	}
	for _, other := range slices.Sorted(maps.Keys(l.pages)) {
		if _, ok := l.pages[other].seen[name]; ok && other != key {
			return other
		}
	}
	return ""
}

// owner is the key of the store whose volume the name means, "" for an unknown name.
func (l *ledger) owner(name string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.owners[name]
}

// rivals are the keys of the other stores that have a volume of this name, sorted.
// A root that is reached in two ways is no rival of itself.
func (l *ledger) rivals(key, name string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var keys []string
	for other, p := range l.pages {
		if _, ok := p.seen[name]; ok && other != key && p.state.ID != l.page(key).state.ID {
			keys = append(keys, other)
		}
	}
	slices.Sort(keys)
	return keys
}

// names of all volumes, sorted.
func (l *ledger) names() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.owners))
}

// A view is what one store's page says of one name.
type view struct {
	seenVolume
	// ok: it was seen, and not gone since.
	ok bool
	// mounted: containers of this host have it.
	mounted bool
	// complete is the store's.
	complete bool
}

func (l *ledger) view(key, name string) view {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.page(key)
	v, ok := p.seen[name]
	return view{seenVolume: v, ok: ok, mounted: l.mounted(key, name), complete: p.state.Complete}
}

// seen is all that was seen in a store.
func (l *ledger) seen(key string) map[string]seenVolume {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.page(key).seen)
}

// forgetChanges drops the times of changes that no look can have overtaken any
// more: one that is older than the last whole round has ended or was given up.
func (l *ledger) forgetChanges(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.page(key)
	for name, at := range p.changed {
		if at <= p.lastRound {
			delete(p.changed, name)
		}
	}
	p.lastRound = p.clock
}

// mounted tells whether mounts are counted on a store's volume; mu is held.
func (l *ledger) mounted(key, name string) bool {
	m := l.mounts[name]
	return m.Store == key && m.IDs.Total() > 0
}

// inUse tells whether mounts are counted on any volume of a store.
func (l *ledger) inUse(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name := range l.mounts {
		if l.mounted(key, name) {
			return true
		}
	}
	return false
}

// drop forgets a store of which no volume is known.
func (l *ledger) drop(key string) error {
	l.write.Lock()
	defer l.write.Unlock()
	if err := l.db.Update(func(tx *state.Tx) error { return storesBucket.Delete(tx, key) }); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.page(key).state = storeState{}
	return nil
}

// setMounts stores the mounts of one volume; none removes the entry. Memory
// changes only when the file has.
func (l *ledger) setMounts(name string, m volumeMounts) error {
	err := l.counts.Update(func(tx *state.Tx) error {
		if m.IDs.Total() == 0 {
			return mountsBucket.Delete(tx, name)
		}
		return mountsBucket.Put(tx, name, m)
	})
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if m.IDs.Total() == 0 {
		delete(l.mounts, name)
	} else {
		l.mounts[name] = m
	}
	return nil
}

func (l *ledger) mountsOf(name string) volumeMounts {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mounts[name]
}

// hasMounts tells whether a container of this host has the volume or one of its
// snapshots.
func (l *ledger) hasMounts(uuid string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range l.mounts {
		if m.UUID == uuid && m.IDs.Total() > 0 {
			return true
		}
	}
	return false
}

// allMounts are the mounts of all volumes.
func (l *ledger) allMounts() map[string]volumeMounts {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.mounts)
}
