package presence

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

const (
	schema = 1
	// maxHost bounds a host's file: about 50,000 volumes.
	maxHost = 4 << 20
	// buryAfter is the age at which the file of a dead host without volumes is deleted.
	buryAfter = 30 * 24 * time.Hour
	// twice in a row is how often another process must have written this host's file to
	// be another host.
	twice = 2
)

// hostRecord is the file of one host.
type hostRecord struct {
	Schema int    `json:"schema"`
	ID     string `json:"id"`
	Name   string `json:"name"`
	// Instance is the process that wrote it.
	Instance string `json:"instance"`
	// Stopped: see Close.
	Stopped bool `json:"stopped,omitempty"`
	// Volumes in use, by UUID, and since when by the host's own clock.
	Volumes map[string]time.Time `json:"volumes"`
}

// A Host is what is known of one.
type Host struct {
	// ID and Name as the host gave them. Of a file that cannot be read, Name is the
	// file's.
	ID, Name string
	// Self: it is this host.
	Self bool
	// Alive: it is not known to be dead. This host needs 75 seconds from its start to
	// know.
	Alive bool
	// Stopped: its berthd was ended while volumes were in use. They may be still,
	// dead or not.
	Stopped bool
	// Silent is the age of its last sign of life by the file server's clock, at least 0.
	Silent time.Duration
	// Unreadable: its file is damaged or was written by a newer Berth. It may use any
	// volume.
	Unreadable bool
	// Volumes that it uses, by UUID, and since when by its own clock.
	Volumes map[string]time.Time
	// Since is, in what Users returns, when it began to use the volume.
	Since time.Time
}

// InUse tells whether the host may be using the volumes it names.
func (h Host) InUse() bool { return h.Alive || h.Stopped }

// fileName is the name of a host's file. IDs have any characters and length.
func fileName(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:16]) + suffix
}

// isFileName tells whether a file may be a host's.
func isFileName(name string) bool {
	digits, ok := strings.CutSuffix(name, suffix)
	return ok && len(digits) == 32 && strings.Trim(digits, "0123456789abcdef") == ""
}

// write puts version want of what this host says on disk, or a later one. Of many
// who wait, the first writes for all.
func (p *Presence) write(ctx context.Context, want uint64) error {
	select {
	case p.writing <- struct{}{}:
	case <-ctx.Done():
		return unavailable(fmt.Errorf("an earlier write has not ended: %w", ctx.Err()))
	}
	defer func() { <-p.writing }()
	p.mu.Lock()
	done := p.written >= want
	p.mu.Unlock()
	if done {
		return nil
	}
	d, err := p.open(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	return p.writeIn(d)
}

// writeIn writes this host's file. The caller has the place in writing.
func (p *Presence) writeIn(d dirs) error {
	p.mu.Lock()
	version := p.version
	rec := hostRecord{Schema: schema, ID: p.cfg.ID, Name: p.cfg.Name, Instance: p.instance, Stopped: p.stopped, Volumes: maps.Clone(p.volumes)}
	p.mu.Unlock()
	data, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encode what this host uses: %w", err)
	}
	if len(data) > maxHost {
		return fault.Exhausted("this host uses %d volumes, more than its file has room for", len(rec.Volumes))
	}
	data = pad(data)
	err = p.replace(d, d.hosts, p.file, data, "host.replace")
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		// A full disk is no death.
		if errOver := overwrite(d.hosts, p.file, data); errOver == nil {
			err = nil
		} else {
			err = errors.Join(err, errOver)
		}
	}
	if err != nil {
		return unavailable(err)
	}
	p.mu.Lock()
	p.written = max(p.written, version)
	p.mu.Unlock()
	return nil
}

// pad fills a file up to a whole block with what JSON ignores, so that it has room
// to be written over.
func pad(data []byte) []byte {
	const block = 4096
	return append(data, bytes.Repeat([]byte{'\n'}, block-len(data)%block)...)
}

// overwrite writes over a file where it is, without asking the file system for
// more space. Who is killed meanwhile leaves a damaged file, which the next heartbeat
// puts right.
func overwrite(dir *rooted.Dir, name string, data []byte) error {
	fd, err := unix.Openat(dir.FD(), name, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: name, Err: err}
	}
	file := os.NewFile(uintptr(fd), name)
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() < int64(len(data)) {
		return fmt.Errorf("there is no room in %s", name)
	}
	if _, err := file.WriteAt(data, 0); err != nil {
		return err
	}
	if err := file.Truncate(int64(len(data))); err != nil {
		return err
	}
	return file.Sync()
}

// stampOf is Dir.Stat that asks a file server. A file that is written over on
// another host is the same to this one's cache.
func stampOf(dir *rooted.Dir, name string) (rooted.Stamp, error) {
	var st unix.Statx_t
	err := unix.Statx(dir.FD(), name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &st)
	if err == unix.ENOSYS {
		return dir.Stat(name)
	}
	if err != nil {
		return rooted.Stamp{}, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	nanoseconds := func(t unix.StatxTimestamp) int64 { return t.Sec*int64(time.Second) + int64(t.Nsec) }
	return rooted.Stamp{Ino: st.Ino, Size: int64(st.Size), Mtime: nanoseconds(st.Mtime), Ctime: nanoseconds(st.Ctime)}, nil
}

// Beat says that this host is alive, and looks at the others and at its leases. Run
// calls it; a program that lives for one command calls it instead of Run.
func (p *Presence) Beat(ctx context.Context) error {
	// From before the write: the server's time of the write is not earlier.
	begin := p.cfg.boot()
	select {
	case p.writing <- struct{}{}:
	case <-ctx.Done():
		return unavailable(fmt.Errorf("an earlier write has not ended: %w", ctx.Err()))
	}
	defer func() { <-p.writing }()
	d, err := p.open(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	p.checkInstance(d)
	if err := p.writeIn(d); err != nil {
		return err
	}
	// Only now, when the others can see that this host is alive, does it look whether
	// they have taken its leases. See the package's comment.
	if err := p.step("beat.look"); err != nil {
		return err
	}
	lost, err := p.lostLeases(d)
	if err != nil {
		return err
	}
	stamps, err := p.stamps(d)
	if err != nil {
		return err
	}
	own, ok := stamps[p.file]
	if !ok {
		return fault.Unavailable("this host's file in the volume root vanished while it was written")
	}
	if err := ctx.Err(); err != nil {
		return unavailable(err)
	}
	p.note(begin, own, stamps, lost)
	p.retryReleases(ctx, d)
	p.bury(d)
	return nil
}

// checkInstance finds out when another host writes this one's file: a copy of this
// machine, state file and all. Once may be a predecessor whose write hung.
func (p *Presence) checkInstance(d dirs) {
	rec, err := readHost(d.hosts, p.file)
	foreign := err == nil && rec.Instance != p.instance
	p.mu.Lock()
	defer p.mu.Unlock()
	if !foreign || p.written == 0 {
		p.foreign = 0
		return
	}
	if p.foreign++; p.foreign == twice {
		// It does beat on, or the other would not find out.
		p.cfg.Log.Errorf("another host calls itself %q in the volume root: is this machine a copy of it? Each needs a state file of its own", p.cfg.ID)
	}
}

// stamps gives the stamps of all hosts' files.
func (p *Presence) stamps(d dirs) (map[string]rooted.Stamp, error) {
	if err := d.hosts.Refresh(); err != nil {
		return nil, unavailable(err)
	}
	names, err := d.hosts.Names()
	if err != nil {
		return nil, unavailable(err)
	}
	stamps := make(map[string]rooted.Stamp, len(names))
	for _, name := range names {
		if !isFileName(name) {
			continue
		}
		stamp, err := stampOf(d.hosts, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, unavailable(err)
		}
		stamps[name] = stamp
	}
	return stamps, nil
}

// note remembers what a heartbeat saw that began at the given time.
func (p *Presence) note(begin time.Duration, own rooted.Stamp, stamps map[string]rooted.Stamp, lost map[string]lostLease) {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.rouse()
	now := p.cfg.boot()
	if !p.beaten || now-p.last > gapMost {
		// This host has not watched meanwhile, and if it could not, neither could others.
		p.peers = make(map[string]peer)
	}
	p.beaten, p.last, p.ownMtime = true, max(p.last, begin), own.Mtime
	for name, stamp := range stamps {
		p.seeLocked(name, stamp, now)
	}
	for name, known := range p.peers {
		if _, ok := stamps[name]; !ok && known.stamp != (rooted.Stamp{}) {
			p.seeLocked(name, rooted.Stamp{}, now)
		}
	}
	for uuid, l := range p.held {
		loss, ok := lost[uuid]
		switch {
		case ok && loss.generation == l.generation:
			delete(p.held, uuid)
			p.events = append(p.events, event{uuid, Lost, loss.why})
		case ok:
			// It was taken anew meanwhile.
		case l.doubtful && now-begin <= doubtAfter:
			l.doubtful = false
			p.held[uuid] = l
			p.events = append(p.events, event{uuid, Held, "the volume root answers again"})
		}
	}
}

// seeLocked notes the present stamp of a host's file.
func (p *Presence) seeLocked(name string, stamp rooted.Stamp, now time.Duration) {
	if known, ok := p.peers[name]; ok && known.stamp == stamp {
		return
	}
	p.peers[name] = peer{stamp: stamp, since: now}
}

// judge tells whether the host with this file is dead, and how long it was silent by
// the server's clock. A host that nobody asked about before and that has no file is
// watched from now on.
func (p *Presence) judge(name string) (dead bool, silent time.Duration, stamp rooted.Stamp) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.cfg.boot()
	known, ok := p.peers[name]
	if !ok {
		known = peer{since: now}
		p.peers[name] = known
	}
	silent = time.Duration(p.ownMtime - known.stamp.Mtime)
	// p.last, not now: from then on nobody has looked.
	watched := p.last - known.since
	fresh := p.beaten && now-p.last <= gapMost
	byServer := silent > deadAfter || silent < 0
	return fresh && watched > deadAfter && byServer && name != p.file, max(silent, 0), known.stamp
}

// readHost reads the file of a host.
func readHost(dir *rooted.Dir, name string) (hostRecord, error) {
	data, err := dir.ReadFile(name, maxHost)
	if err != nil {
		return hostRecord{}, err
	}
	return decodeHost(name, data)
}

func decodeHost(name string, data []byte) (hostRecord, error) {
	var rec hostRecord
	if err := json.Unmarshal(data, &rec); err != nil {
		return hostRecord{}, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if rec.Schema > schema {
		return hostRecord{}, fmt.Errorf("%w: written by a newer Berth", errDamaged)
	}
	if rec.Schema != schema || fileName(rec.ID) != name {
		return hostRecord{}, fmt.Errorf("%w: not of the host it is named after", errDamaged)
	}
	return rec, nil
}

var errDamaged = errors.New("is damaged")

// Hosts lists the hosts that have used the root, this one among them, by name.
func (p *Presence) Hosts(ctx context.Context) ([]Host, error) {
	if err := p.fresh(ctx); err != nil {
		return nil, err
	}
	d, err := p.open(ctx)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	stamps, err := p.stamps(d)
	if err != nil {
		return nil, err
	}
	var hosts []Host
	for name, stamp := range stamps {
		if err := ctx.Err(); err != nil {
			return nil, unavailable(err)
		}
		rec, err := readHost(d.hosts, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		p.mu.Lock()
		p.seeLocked(name, stamp, p.cfg.boot())
		p.mu.Unlock()
		dead, silent, _ := p.judge(name)
		host := Host{ID: rec.ID, Name: rec.Name, Self: name == p.file, Alive: !dead, Stopped: rec.Stopped, Silent: silent, Volumes: rec.Volumes}
		switch {
		case err != nil:
			// It is a file of this form that no living host has put right.
			host.Name, host.Unreadable = name, true
		case host.Self:
			p.mu.Lock()
			host.Volumes, host.Stopped = maps.Clone(p.volumes), p.stopped
			p.mu.Unlock()
		case host.Name == "":
			host.Name = host.ID
		}
		hosts = append(hosts, host)
	}
	slices.SortFunc(hosts, func(a, b Host) int { return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.ID, b.ID)) })
	return hosts, nil
}

// Users lists the hosts, this one among them, that say they use the volume, dead or
// not. One that is not dead and whose file cannot be read is listed, because it may.
func (p *Presence) Users(ctx context.Context, volume string) ([]Host, error) {
	hosts, err := p.Hosts(ctx)
	if err != nil {
		return nil, err
	}
	hosts = slices.DeleteFunc(hosts, func(h Host) bool {
		_, uses := h.Volumes[volume]
		return !uses && (!h.Unreadable || !h.Alive)
	})
	for i := range hosts {
		hosts[i].Since = hosts[i].Volumes[volume]
	}
	return hosts, nil
}

// Forget deletes the file of a host that will never come back, with what it says
// it uses. It is a conflict while the host is not known to be dead.
func (p *Presence) Forget(ctx context.Context, id string) error {
	if err := p.fresh(ctx); err != nil {
		return err
	}
	if dead, silent, _ := p.judge(fileName(id)); !dead {
		return fault.Conflict("host %q is not known to be dead: it gave a sign of life %s ago", id, silent.Round(time.Second))
	}
	d, err := p.open(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.hosts.Remove(fileName(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return unavailable(err)
	}
	return d.hosts.Sync()
}

// fresh beats unless that was done a moment ago.
func (p *Presence) fresh(ctx context.Context) error {
	p.mu.Lock()
	recent := p.beaten && p.cfg.boot()-p.last <= beatEvery
	p.mu.Unlock()
	if recent {
		return nil
	}
	return p.Beat(ctx)
}

// bury deletes files of hosts that are long dead and have left nothing behind. Errors
// are those of a file that stays.
func (p *Presence) bury(d dirs) {
	p.mu.Lock()
	names := slices.Collect(maps.Keys(p.peers))
	p.mu.Unlock()
	for _, name := range names {
		dead, silent, stamp := p.judge(name)
		if !dead || silent < buryAfter || stamp == (rooted.Stamp{}) {
			continue
		}
		if rec, err := readHost(d.hosts, name); err != nil || len(rec.Volumes) > 0 {
			continue
		}
		if err := d.hosts.Remove(name); err != nil {
			p.cfg.Log.WithError(err).Debug("delete the file of a host that is long dead")
		}
	}
}
