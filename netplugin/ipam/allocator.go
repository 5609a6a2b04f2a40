package ipam

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/berth-plugin/berth/shared/fault"
)

// ForgetAfter is how long a lease without an endpoint, or a pool that nothing has
// used, is kept before it may be given to another. dockerd asks for addresses
// moments before it makes the endpoint; it repeats a request that was not
// answered for 15 seconds.
const ForgetAfter = 10 * time.Minute

// Config is what an Allocator does not know itself. All fields but Record are
// needed.
type Config struct {
	// Supernets are where automatic pools come from, in this order.
	Supernets []Supernet
	// Now is the clock.
	Now func() time.Time
	// Random makes pool IDs unique.
	Random io.Reader
	// Record hears of every change as soon as it is made, before the method
	// that makes it returns. See Apply.
	Record func(Event)
}

// An Allocator decides which pools and addresses are given out. It is not safe
// for concurrent use: the caller holds a lock from a decision until its events
// have their place in the record.
type Allocator struct {
	cfg   Config
	pools map[string]*pool
	// numbered has the pools by number, from 1; nil where one was released.
	numbered []*pool
	unused   []uint32
	// sorted are the pools without parent by subnet. They do not overlap.
	sorted    []*pool
	byPrefix  map[netip.Prefix][]*pool
	byNetwork map[string][]*pool
	// ledgers are those of parents.
	ledgers map[ledgerKey]*ledger
	slots   []slots
	entries arena
	keys    keyIndex
	names   names
	extras  map[uint32]extra
	pending map[uint32]pending
	// last is the latest time that was given to anything, in nanoseconds.
	last int64
}

// New returns an Allocator that has given out nothing.
func New(cfg Config) *Allocator {
	a := &Allocator{
		cfg:       cfg,
		pools:     make(map[string]*pool),
		numbered:  make([]*pool, 1),
		byPrefix:  make(map[netip.Prefix][]*pool),
		byNetwork: make(map[string][]*pool),
		ledgers:   make(map[ledgerKey]*ledger),
		keys:      newKeyIndex(),
		extras:    make(map[uint32]extra),
		pending:   make(map[uint32]pending),
	}
	for _, s := range cfg.Supernets {
		a.slots = append(a.slots, slots{Supernet: s, wide: make(map[*pool]bool)})
	}
	return a
}

// now is the clock, which does not go back.
func (a *Allocator) now() time.Time {
	return time.Unix(0, max(a.cfg.Now().UnixNano(), a.last))
}

// tick is a time that nothing else has, so that age is an order.
func (a *Allocator) tick() time.Time {
	a.last = max(a.cfg.Now().UnixNano(), a.last+1)
	return time.Unix(0, a.last)
}

// slack is how far times may be apart that the clock says are the same.
const slack = time.Millisecond

func (a *Allocator) record(e Event) {
	if a.cfg.Record != nil {
		a.cfg.Record(e)
	}
}

// Restore takes back a pool and its leases as they were stored. It is for records
// from before there were events, and makes none.
func (a *Allocator) Restore(stored Pool, leases []Lease) error {
	if err := a.add(stored); err != nil {
		return err
	}
	slices.SortFunc(leases, func(x, y Lease) int {
		return cmp.Or(x.Since.Compare(y.Since), x.Addr.Compare(y.Addr))
	})
	for _, l := range leases {
		if err := a.Apply(LeaseSet{Pool: stored.ID, Lease: l, Next: stored.Next}); err != nil {
			return err
		}
	}
	a.pools[stored.ID].Used = stored.Used || len(leases) > 0
	return nil
}

// add makes a pool of what was stored or decided.
func (a *Allocator) add(stored Pool) error {
	if !stored.Prefix.IsValid() || !stored.Range.IsValid() || !contains(stored.Prefix, stored.Range) || stored.Prefix != stored.Prefix.Masked() || stored.Range != stored.Range.Masked() {
		return fmt.Errorf("pool %s has prefix %s and range %s", stored.ID, stored.Prefix, stored.Range)
	}
	if _, ok := a.pools[stored.ID]; ok {
		return fmt.Errorf("pool %s is there twice", stored.ID)
	}
	p := newPool(stored)
	if n := len(a.unused) - 1; n >= 0 {
		p.no, a.unused = a.unused[n], a.unused[:n]
		a.numbered[p.no] = p
	} else {
		p.no = uint32(len(a.numbered))
		a.numbered = append(a.numbered, p)
	}
	a.last = max(a.last, p.Since.UnixNano())
	a.pools[p.ID] = p
	a.byPrefix[p.Prefix] = append(a.byPrefix[p.Prefix], p)
	if p.Network != "" {
		a.byNetwork[p.Network] = append(a.byNetwork[p.Network], p)
	}
	a.takeSlots(p, 1)
	a.enter(p)
	return nil
}

// enter puts a pool into the ledger of its parent.
func (a *Allocator) enter(p *pool) {
	if p.Options.Parent == "" {
		at, _ := a.position(p.Prefix)
		a.sorted = slices.Insert(a.sorted, at, p)
		a.join(newLedger("", p.is4()), p)
		return
	}
	key := ledgerKey{p.Options.Parent, p.is4()}
	led := a.ledgers[key]
	if led == nil {
		led = newLedger(key.parent, key.is4)
		a.ledgers[key] = led
	}
	a.join(led, p)
}

// exit takes a pool with all that it has from its ledger.
func (a *Allocator) exit(p *pool) {
	led := p.led
	for n, r := range led.reserved {
		if r.pool == p {
			a.dropReservation(led, n)
			a.unmark(led, n, markReserved, a.entries.at(led.table.get(n)).since)
		}
	}
	for n, c := range led.conflicts {
		if c.pool == p {
			a.dropConflict(led, n)
			a.unmark(led, n, markConflict, a.entries.at(led.table.get(n)).since)
		}
	}
	for n, holders := range led.outside {
		if holders = slices.DeleteFunc(holders, func(h holder) bool { return h.pool == p }); len(holders) > 0 {
			led.outside[n] = holders
			continue
		}
		delete(led.outside, n)
		a.clear(led, led.table.get(n))
	}
	for i, held := range a.pending {
		if held.pool == p {
			delete(a.pending, i)
			a.entries.at(i).marks &^= markPending
			a.tidy(led, i)
		}
	}
	for _, i := range a.entriesOf(p) {
		a.clear(led, i)
	}
	a.leave(p)
	if p.Options.Parent == "" {
		at := slices.Index(a.sorted, p)
		a.sorted = slices.Delete(a.sorted, at, at+1)
	}
}

// position is where a subnet is or would be among the pools without parent.
func (a *Allocator) position(p netip.Prefix) (int, bool) {
	return slices.BinarySearchFunc(a.sorted, p, func(q *pool, p netip.Prefix) int { return comparePrefixes(q.Prefix, p) })
}

// overlapping are the pools without parent that overlap a subnet.
func (a *Allocator) overlapping(p netip.Prefix) []*pool {
	from, _ := a.position(p)
	if from > 0 && a.sorted[from-1].Prefix.Overlaps(p) {
		from--
	}
	to := from
	for to < len(a.sorted) && a.sorted[to].Prefix.Overlaps(p) {
		to++
	}
	return a.sorted[from:to]
}

// Bind says which Berth network uses the pool; "" that it is none any more.
// From then on addresses asked for by name are containers'.
func (a *Allocator) Bind(id, network string) (Pool, error) {
	p, ok := a.pools[id]
	if !ok {
		return Pool{}, unknownPool(id)
	}
	a.bind(p, network)
	a.record(PoolChanged{p.Pool})
	return p.Pool, nil
}

func (a *Allocator) bind(p *pool, network string) {
	drop(a.byNetwork, p.Network, p)
	p.Network = network
	if network != "" {
		a.byNetwork[network] = append(a.byNetwork[network], p)
	}
	for _, i := range a.entriesOf(p) {
		a.relink(p.led, i)
	}
}

// Configure gives a pool other options: those of the network that uses it. Errors:
// invalid when they do not fit the subnet or the pool has another parent, *Taken or
// conflict when another pool of the parent has one of its addresses.
func (a *Allocator) Configure(id string, o PoolOptions) (Pool, error) {
	p, ok := a.pools[id]
	if !ok {
		return Pool{}, unknownPool(id)
	}
	if o = o.normalized(); o.equal(p.Options) {
		return p.Pool, nil
	}
	if p.Options.Parent != "" && p.Options.Parent != o.Parent {
		return Pool{}, fault.Invalid("IPAM option parent=%s: the network's parent is %s, want the same", p.Options.Parent, o.Parent)
	}
	req := PoolRequest{Prefix: p.Prefix, IPv6: !p.is4(), Options: o}
	if p.Range != p.Prefix {
		req.Range = p.Range
	}
	if err := req.check(); err != nil {
		return Pool{}, err
	}
	if err := a.configure(p, o); err != nil {
		return Pool{}, err
	}
	a.record(PoolChanged{p.Pool})
	return p.Pool, nil
}

func (a *Allocator) configure(p *pool, o PoolOptions) error {
	change := func() {
		p.Options = o
		p.excluded = spansIn(o.Exclude, p.Prefix)
		p.exhausted = 0
	}
	if o.Parent == p.Options.Parent {
		change()
		for _, i := range a.entriesOf(p) {
			a.relink(p.led, i)
		}
		return nil
	}
	var moved []Event
	led := a.ledgers[ledgerKey{o.Parent, p.is4()}]
	for _, e := range a.stateOf(p) {
		if led != nil {
			keep, err := a.fits(led, p, e)
			if err != nil {
				return err
			}
			if !keep {
				continue
			}
		}
		moved = append(moved, e)
	}
	a.exit(p)
	change()
	a.enter(p)
	var errs []error
	for _, e := range moved {
		errs = append(errs, a.Apply(e))
	}
	return errors.Join(errs...)
}

// fits reports whether something of a pool that changes to a ledger has its place
// there. What is only remembered gives way.
func (a *Allocator) fits(led *ledger, p *pool, e Event) (keep bool, _ error) {
	find := func(addr netip.Addr) (uint32, entry) {
		i := led.table.get(number(addr))
		if i == 0 {
			return 0, entry{}
		}
		return i, *a.entries.at(i)
	}
	switch e := e.(type) {
	case LeaseSet:
		i, there := find(e.Lease.Addr)
		free := there.kind == kindNone || there.kind == kindReleased || there.kind == kindOutside && e.Lease.Role != RoleEndpoint
		if !free || there.is(markPending) {
			return false, a.taken(led, p, i)
		}
	case LeaseGone:
		_, there := find(e.Tombstone.Addr)
		return there.kind == kindNone && !there.is(markPending), nil
	case Reserved:
		if _, ok := led.reserved[number(e.Addr)]; ok {
			return false, fault.Conflict("address %s of subnet %s is reserved on another network of parent %s", e.Addr, p.Prefix, led.parent)
		}
	}
	return true, nil
}

// Pool returns a pool by its ID.
func (a *Allocator) Pool(id string) (Pool, bool) {
	p, ok := a.pools[id]
	if !ok {
		return Pool{}, false
	}
	return p.Pool, true
}

// Pools returns all pools by age.
func (a *Allocator) Pools() []Pool {
	pools := make([]Pool, 0, len(a.pools))
	for _, p := range a.pools {
		pools = append(pools, p.Pool)
	}
	slices.SortFunc(pools, func(x, y Pool) int { return cmp.Or(x.Since.Compare(y.Since), cmp.Compare(x.ID, y.ID)) })
	return pools
}

// Unbound returns the pools of exactly this subnet that no network uses, by age.
func (a *Allocator) Unbound(prefix netip.Prefix) []Pool {
	var pools []Pool
	for _, p := range a.byPrefix[prefix] {
		if p.Network == "" {
			pools = append(pools, p.Pool)
		}
	}
	slices.SortFunc(pools, func(x, y Pool) int { return cmp.Or(x.Since.Compare(y.Since), cmp.Compare(x.ID, y.ID)) })
	return pools
}

// PoolsOf returns the pools that a Berth network uses, sorted by subnet.
func (a *Allocator) PoolsOf(network string) []Pool {
	var pools []Pool
	for _, p := range a.byNetwork[network] {
		pools = append(pools, p.Pool)
	}
	slices.SortFunc(pools, func(x, y Pool) int { return comparePrefixes(x.Prefix, y.Prefix) })
	return pools
}

// Find returns the pool in which an address of a network is leased. That may be
// one that is bound to another network: when two have the same subnet on the same
// parent, CreateNetwork does not tell which pool is whose. Without a lease it is
// the network's pool that the address is in.
func (a *Allocator) Find(network string, addr netip.Addr) (Pool, bool) {
	for _, p := range a.byNetwork[network] {
		if !p.Prefix.Contains(addr) {
			continue
		}
		if i := p.led.table.get(number(addr)); i != 0 {
			e := a.entries.at(i)
			if e.kind == kindLease {
				return a.numbered[e.pool].Pool, true
			}
		}
		return p.Pool, true
	}
	return Pool{}, false
}
