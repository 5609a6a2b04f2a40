package presence

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

const (
	// beatEvery is the time from one heartbeat to the next.
	beatEvery = 15 * time.Second
	// deadAfter is how long a host must be silent to be dead: 60 seconds, and a margin
	// for slow writes and coarse times of file servers.
	deadAfter = 60*time.Second + beatEvery
	// doubtAfter is the age of the last heartbeat at which an owner stops to trust its
	// leases. What is left to deadAfter is its time to stop writing.
	doubtAfter = 45 * time.Second
	// gapMost is the longest time between two heartbeats of this host in which it can
	// say that it has watched the others.
	gapMost = 2 * beatEvery
	// retryBeat is the time to the next heartbeat after one that failed.
	retryBeat = beatEvery / 3
	// tick is how late at most a doubt is, after a host was suspended.
	tick = time.Second
)

// Names below .berth.
const (
	hostsName  = "hosts"
	leasesName = "leases"
	tmpName    = "tmp"
	suffix     = ".json"
)

// A LeaseState is what a host has to know of a lease that it took.
type LeaseState string

// States of leases.
const (
	// Held: it is this host's. Said after Doubtful only.
	Held LeaseState = "held"
	// Doubtful: this host could not say for a while that it is alive. Another one may
	// take the lease soon: writing should stop. The lease is not given up.
	Doubtful LeaseState = "doubtful"
	// Lost: another host has it, or had it for a moment. Whatever this host writes now
	// may do damage. When the volume is detached, Release says so.
	Lost LeaseState = "lost"
)

// A Config describes this host to the others on one root.
type Config struct {
	// ID of this host, unlike all others' on the root and the same over restarts.
	ID string
	// Name is what people call it.
	Name string
	// Open opens the directory .berth of the root, after it has made sure that it is
	// the right root. The handle is closed after each use, because the root may be
	// another mount the next time.
	Open func() (*rooted.Dir, error)
	// Mounted are the volumes, by UUID, that are in use on this host already, because
	// an earlier process mounted them, and since when.
	Mounted map[string]time.Time
	// Changed, unless nil, is told of leases by Run, one after the other. It returns
	// soon: what takes long it starts.
	Changed func(uuid string, state LeaseState, why string)
	Log     *logrus.Entry
	// Now is the clock for what people read; nil is time.Now.
	Now func() time.Time

	// The rest is for tests of this package.

	// boot replaces the clock of durations.
	boot func() time.Duration
	// step, unless nil, is called before each change of a file with its name.
	step func(step string) error
}

// A Presence is this host's part on one root. All methods may be called
// concurrently; those that change leases wait for each other.
type Presence struct {
	cfg  Config
	file string
	// instance tells this process from others with the same ID.
	instance string
	// writing has a place for the one who writes the host's file.
	writing chan struct{}
	// leasing has a place for the one who changes leases.
	leasing chan struct{}
	wake    chan struct{}

	mu sync.Mutex // guards all that follows, and is never held during I/O
	// volumes in use on this host, and the count of changes of that: made and on disk.
	volumes          map[string]time.Time
	version, written uint64
	stopped          bool
	// beaten is set once a heartbeat went well; last is when that began.
	beaten   bool
	last     time.Duration
	ownMtime int64
	// foreign counts heartbeats in a row that found the file written by someone else.
	foreign int
	// peers by file name; one is there without a file when it was asked about.
	peers map[string]peer
	held  map[string]lease
	// releasing are leases whose release could not be written yet.
	releasing map[string]bool
	events    []event
}

// peer is what this host has seen of another.
type peer struct {
	// stamp of its file, zero when there is none.
	stamp rooted.Stamp
	// since when it has been so, in an unbroken row of heartbeats of this host.
	since time.Duration
}

// lease is one that this process holds.
type lease struct {
	generation uint64
	doubtful   bool
}

type event struct {
	uuid  string
	state LeaseState
	why   string
}

// New makes this host's part. It does nothing yet: Run makes it known.
func New(cfg Config) (*Presence, error) {
	if cfg.ID == "" || cfg.Open == nil {
		return nil, errors.New("presence needs a host's ID and a root")
	}
	if cfg.Log == nil {
		cfg.Log = logrus.NewEntry(logrus.StandardLogger())
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.boot == nil {
		cfg.boot = bootTime
	}
	p := &Presence{
		cfg:       cfg,
		file:      fileName(cfg.ID),
		instance:  uuid.NewString(),
		writing:   make(chan struct{}, 1),
		leasing:   make(chan struct{}, 1),
		wake:      make(chan struct{}, 1),
		volumes:   make(map[string]time.Time),
		version:   1,
		peers:     make(map[string]peer),
		held:      make(map[string]lease),
		releasing: make(map[string]bool),
	}
	maps.Copy(p.volumes, cfg.Mounted)
	return p, nil
}

// bootTime does not stop while the host is suspended, as Go's own clock does.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // Linux has had it since 2.6.39
	}
	return time.Duration(ts.Nano())
}

// Run beats until ctx ends, and tells Changed of leases. It never waits for the
// root: one heartbeat may hang, and is left to itself when ctx ends.
func (p *Presence) Run(ctx context.Context) {
	var beating chan error
	var next time.Duration // boot time of the next heartbeat; at once
	failing := ""
	for {
		p.mu.Lock()
		dirty := p.version != p.written
		p.mu.Unlock()
		if begin := p.cfg.boot(); beating == nil && (begin >= next || dirty && failing == "") {
			beating = make(chan error, 1)
			next = begin + beatEvery
			go func(done chan<- error) { done <- p.Beat(ctx) }(beating)
		}
		p.doubt()
		p.deliver()
		timer := time.NewTimer(p.pause(next, beating != nil))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-p.wake:
		case <-timer.C:
		case err := <-beating:
			beating = nil
			if err != nil {
				next = min(next, p.cfg.boot()+retryBeat)
			}
			failing = p.report(err, failing)
		}
		timer.Stop()
	}
}

// pause is how long Run has nothing to do.
func (p *Presence) pause(next time.Duration, beating bool) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	wait := beatEvery
	if !beating {
		wait = max(next-p.cfg.boot(), 0)
	}
	if len(p.held) > 0 {
		wait = min(wait, tick)
	}
	return wait
}

// report logs a heartbeat's error when it is another than before.
func (p *Presence) report(err error, before string) string {
	now := ""
	if err != nil {
		now = err.Error()
	}
	switch {
	case now == before || errors.Is(err, context.Canceled):
	case err != nil:
		p.cfg.Log.WithError(err).Warn("the hosts that share the volume root cannot be told that this one is alive")
	default:
		p.cfg.Log.Info("the hosts that share the volume root are told again that this one is alive")
	}
	return now
}

// doubt finds out when leases can no longer be trusted.
func (p *Presence) doubt() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cfg.boot()-p.last <= doubtAfter {
		return
	}
	for uuid, l := range p.held {
		if !l.doubtful {
			l.doubtful = true
			p.held[uuid] = l
			p.events = append(p.events, event{uuid, Doubtful, "the volume root does not answer, and other hosts may take this one for dead soon"})
		}
	}
}

// deliver tells Changed what has happened.
func (p *Presence) deliver() {
	p.mu.Lock()
	events := p.events
	p.events = nil
	p.mu.Unlock()
	for _, e := range events {
		if p.cfg.Changed != nil {
			p.cfg.Changed(e.uuid, e.state, e.why)
		}
	}
}

// rouse makes Run look at once.
func (p *Presence) rouse() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Enter says that this host uses the volume, on disk when it returns: before the
// volume is mounted. When it fails nothing is said. A volume that is there already
// costs nothing.
func (p *Presence) Enter(ctx context.Context, volume string) error {
	if err := checkUUID(volume); err != nil {
		return err
	}
	p.mu.Lock()
	_, known := p.volumes[volume]
	if !known {
		p.volumes[volume] = p.cfg.Now().UTC().Truncate(time.Second)
		p.version++
	}
	want := p.version
	p.mu.Unlock()
	err := p.write(ctx, want)
	if err != nil && !known {
		p.Leave(volume)
	}
	return err
}

// Leave says that this host does not use the volume any more. It does no I/O: Run
// writes it down soon.
func (p *Presence) Leave(volume string) {
	p.mu.Lock()
	if _, ok := p.volumes[volume]; ok {
		delete(p.volumes, volume)
		p.version++
	}
	p.mu.Unlock()
	p.rouse()
}

// Close says that this host's berthd ends while its volumes and leases may be in
// use: others do not take its silence for the death of the host then. It is called
// after Run has ended. Without volumes and leases it says nothing.
func (p *Presence) Close(ctx context.Context) error {
	p.mu.Lock()
	inUse := len(p.volumes)+len(p.held) > 0
	if inUse {
		p.stopped = true
		p.version++
	}
	want := p.version
	p.mu.Unlock()
	if !inUse {
		return nil
	}
	return p.write(ctx, want)
}

// dirs are the directories of one use of the root.
type dirs struct {
	hosts, leases, tmp *rooted.Dir
}

func (d dirs) Close() {
	for _, dir := range []*rooted.Dir{d.hosts, d.leases, d.tmp} {
		if dir != nil {
			dir.Close()
		}
	}
}

// open opens the directories, and makes them where they are missing.
func (p *Presence) open(ctx context.Context) (_ dirs, err error) {
	if err := ctx.Err(); err != nil {
		return dirs{}, unavailable(err)
	}
	meta, err := p.cfg.Open()
	if err != nil {
		return dirs{}, err
	}
	defer meta.Close()
	var d dirs
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	for name, dir := range map[string]**rooted.Dir{hostsName: &d.hosts, leasesName: &d.leases, tmpName: &d.tmp} {
		if *dir, err = ensure(meta, name); err != nil {
			return dirs{}, unavailable(err)
		}
	}
	return d, nil
}

// ensure opens the directory name, and makes it where it is missing.
func ensure(parent *rooted.Dir, name string) (*rooted.Dir, error) {
	dir, err := parent.Dir(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	if err := parent.EnsureDir(name, 0o700); err != nil {
		return nil, err
	}
	if err := parent.Sync(); err != nil {
		return nil, err
	}
	return parent.Dir(name)
}

// replace puts a file in the place of another, complete and on disk.
func (p *Presence) replace(d dirs, dir *rooted.Dir, name string, data []byte, step string) error {
	temp := uuid.NewString()
	if err := d.tmp.WriteNew(temp, data, 0o600); err != nil {
		return err
	}
	err := p.step(step)
	if err == nil {
		err = d.tmp.Rename(temp, dir, name)
	}
	if err != nil {
		return errors.Join(err, d.tmp.Remove(temp))
	}
	return dir.Sync()
}

func (p *Presence) step(name string) error {
	if p.cfg.step == nil {
		return nil
	}
	return p.cfg.step(name)
}

func unavailable(err error) error {
	return fault.Unavailable("what hosts say of each other in the volume root: %w", err)
}

// checkUUID accepts the one form that Berth writes, since it becomes a file name.
func checkUUID(s string) error {
	if id, err := uuid.Parse(s); err != nil || id.String() != s {
		return fault.Invalid("%.40q is not the UUID of a volume", s)
	}
	return nil
}
