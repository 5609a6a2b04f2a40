package volplugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	api "github.com/docker/go-plugins-helpers/volume"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/keylock"
	"github.com/berth-plugin/berth/shared/pluginapi"
	"github.com/berth-plugin/berth/volplugin/mount"
	"github.com/berth-plugin/berth/volplugin/netfs"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/schedule"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// A Driver answers the VolumeDriver calls. Make one with New; call Recover before
// requests that change or mount volumes are let in, and Run for as long as it is
// used. All methods may be called concurrently.
type Driver struct {
	cfg    Config
	ledger *ledger
	// binder is nil when the data directories themselves are handed out.
	binder *mount.Binder
	// mounter is nil when no shares are mounted.
	mounter *netfs.Mounter
	// locks has one lock per volume name, held over a whole operation, also by
	// one that was given up, until the kernel lets it go.
	locks *keylock.Locker
	// ops has one lock per volume name for what may take long, during which containers
	// can start and end. Whoever takes both takes it after the one of locks.
	ops *keylock.Locker
	// special mounts what cannot be handed out as a directory of the root, where
	// binder is nil; nil when that has no place.
	special *mount.Binder
	holders *holders
	engines engines
	// schedules makes the snapshots that are due.
	schedules *schedule.Runner
	// backups is nil when none are kept; backupRuns makes those that are due, and looks
	// after targets.
	backups    *backups
	backupRuns *schedule.Runner
	// imports are the archives that requests have come with.
	imports *imports
	// tasks is the context of what is done in the background for requests, running
	// counts it.
	tasks    context.Context //nolint:containedctx // the life of the Driver, not of a call
	endTasks context.CancelFunc
	running  sync.WaitGroup
	// home is the store of the default root.
	home *store

	mu sync.Mutex // guards all following fields
	// stores has all, home too, by key.
	stores map[string]*store
	// working has the stores in which changes of volumes are under way, by name.
	working map[string]*store
	// start begins a store's background work; nil while Run does not run.
	start func(*store)
}

var _ pluginapi.VolumeDriver = (*Driver)(nil)

// New makes a driver from what an earlier process has kept in cfg.DB and cfg.Counts. It does not
// touch a root, so it cannot hang on storage that is away.
func New(cfg Config) (*Driver, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	ledger, err := openLedger(cfg.DB, cfg.Counts, cfg.Log, cfg.HostID)
	if err != nil {
		return nil, fmt.Errorf("load volumes: %w", err)
	}
	d := &Driver{cfg: cfg, ledger: ledger, locks: keylock.New(), ops: keylock.New(), holders: newHolders(), stores: map[string]*store{}, working: map[string]*store{}, imports: newImports()}
	if cfg.MountBase != "" {
		if d.binder, err = mount.NewBinder(cfg.MountBase); err != nil {
			return nil, err
		}
	} else if cfg.SpecialBase != "" {
		if d.special, err = mount.NewBinder(cfg.SpecialBase); err != nil {
			return nil, err
		}
	}
	if d.engines, err = newEngines(cfg.Local, cfg.ThinPool); err != nil {
		return nil, err
	}
	d.schedules = d.newRunner()
	if d.backups, err = openBackups(cfg); err != nil {
		return nil, err
	}
	d.backupRuns = d.newBackupRunner()
	d.tasks, d.endTasks = context.WithCancel(context.Background())
	if cfg.ShareBase != "" {
		if d.mounter, err = netfs.NewMounter(cfg.ShareBase, cfg.mount); err != nil {
			return nil, err
		}
	}
	d.home = d.add(d.newStore(homeKey, "", d.cfg.Root))
	for _, root := range d.cfg.Roots {
		if err := d.addRoot(root); err != nil {
			return nil, err
		}
	}
	for _, key := range ledger.stores() {
		if d.stores[key] != nil {
			continue
		}
		if err := d.addKnown(key); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// addRoot makes the store of a configured root.
func (d *Driver) addRoot(root NamedRoot) error {
	s := d.newStore(rootPrefix+root.Name, root.Name, root.Path)
	if root.Share != nil {
		share, err := netfs.Parse(*root.Share)
		if err != nil {
			return fmt.Errorf("root %s: %w", root.Name, err)
		}
		if d.mounter == nil {
			return fault.Invalid("root %s: this Berth mounts no shares; it was started without a directory for them", root.Name)
		}
		for _, other := range d.all() {
			if there := other.share.Load(); there != nil && there.ID() == share.ID() {
				return fault.Invalid("root %s: root %s is the same directory %s", root.Name, other.name, share)
			}
		}
		s.location.Path, s.mounter = d.mounter.Path(share), d.mounter
		s.share.Store(&share)
	}
	d.add(s)
	return nil
}

// addKnown makes a store that is only known from what an earlier process has kept: a
// share, or a root that is not configured any more.
func (d *Driver) addKnown(key string) error {
	state := d.ledger.state(key)
	if state.Share == nil {
		name := strings.TrimPrefix(key, rootPrefix)
		s := d.newStore(key, name, "")
		s.missing = fault.Unavailable("volume root %s is not among the roots that Berth is configured with (BERTH_ROOTS)", name)
		d.add(s)
		return nil
	}
	if (state.Idle || state.ID == "") && len(d.ledger.seen(key)) == 0 && !d.ledger.inUse(key) {
		return d.ledger.drop(key)
	}
	share, err := netfs.Parse(*state.Share)
	if err == nil && d.mounter == nil {
		err = errors.New("this Berth mounts no shares; it was started without a directory for them")
	}
	if err != nil {
		name := strings.TrimPrefix(key, sharePrefix)
		s := d.newStore(key, name, "")
		s.missing = fault.Unavailable("share %s: %w", name, err)
		d.add(s)
		return nil
	}
	d.addShare(share)
	return nil
}

func (d *Driver) newStore(key, name, path string) *store {
	s := newStore(key, name, path, &d.cfg, d.engines.all, d.ledger, d.locks, d.holders, d.schedules)
	s.ops = d.ops
	s.task = func(fn func(context.Context)) { d.running.Go(func() { fn(d.tasks) }) }
	s.refill = func(name, uuid string) { d.startFill(s, name, uuid) }
	if d.backups != nil {
		s.location.BackedUp = func(snap volume.Snapshot) bool { return d.backups.uses(snap.UUID, snap.Name) }
		s.location.FindBackup, s.location.Restore = d.findBackup, d.restoreInto
	}
	return s
}

// add takes a store in, unless there is one of its key, and starts its background
// work when the others' runs.
func (d *Driver) add(s *store) *store {
	s.start()
	d.mu.Lock()
	defer d.mu.Unlock()
	if there := d.stores[s.key]; there != nil {
		return there
	}
	d.stores[s.key] = s
	if d.start != nil {
		d.start(s)
	}
	return s
}

// all stores in the order of keys, the default one first.
func (d *Driver) all() []*store {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := slices.Collect(maps.Values(d.stores))
	slices.SortFunc(list, func(a, b *store) int { return strings.Compare(a.key, b.key) })
	return list
}

// each calls fn for every store, all at once, and returns when all have returned.
func (d *Driver) each(fn func(*store)) {
	stores := d.all()
	if len(stores) == 1 {
		fn(stores[0])
		return
	}
	var wg sync.WaitGroup
	for _, s := range stores {
		wg.Go(func() { fn(s) })
	}
	wg.Wait()
}

// byKey returns a store, nil when there is none.
func (d *Driver) byKey(key string) *store {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stores[key]
}

// asked is the store that a Create asks for, and the share if that is one.
func (d *Driver) asked(ctx context.Context, spec options.Spec) (*store, *netfs.Share, error) {
	if spec.From != nil && spec.Root == "" && spec.Share == nil {
		s, err := d.storeOf(ctx, spec.From.Volume) // beside its source
		return s, nil, err
	}
	if spec.Share != nil {
		s, share, err := d.shareStore(netfs.Source(*spec.Share))
		return s, &share, err
	}
	s, err := d.rootStore(spec)
	return s, nil, err
}

func (d *Driver) rootStore(spec options.Spec) (*store, error) {
	if spec.Root == "" || spec.Root == homeKey {
		return d.home, nil
	}
	s := d.byKey(rootPrefix + spec.Root)
	if s == nil {
		names := []string{homeKey}
		for _, root := range d.cfg.Roots {
			names = append(names, root.Name)
		}
		return nil, fault.Invalid("option root=%.60q: there is no such root, the setting BERTH_ROOTS has %s", spec.Root, strings.Join(names, ", "))
	}
	return s, s.missing
}

// storeMounted is the store whose volume is mounted here, or else the one the name
// means. It looks at no root.
func (d *Driver) storeMounted(_ context.Context, name string) (*store, error) {
	return d.mountedIn(name), nil
}

func (d *Driver) mountedIn(name string) *store {
	for _, key := range []string{d.ledger.mountsOf(name).Store, d.ledger.owner(name)} {
		if s := d.byKey(key); s != nil {
			return s
		}
	}
	return d.home
}

// storeOf is the store that has the volume: the one that this host knows it in, or
// else the first in which a look finds it, or else the default one.
func (d *Driver) storeOf(ctx context.Context, name string) (*store, error) {
	if s := d.byKey(d.ledger.owner(name)); s != nil {
		return s, nil
	}
	d.lookAt(ctx, name, nil)
	if s := d.byKey(d.ledger.owner(name)); s != nil {
		return s, nil
	}
	return d.home, nil
}

// lookAt looks for an unknown volume in all stores but one, for as long as a look
// may take. What is found is learned.
func (d *Driver) lookAt(ctx context.Context, name string, but *store) {
	if len(d.all()) == 1 {
		return // its own call finds out
	}
	d.each(func(s *store) {
		if s != but {
			_, _, _ = s.find(ctx, name) // what is not found is made, or refused, later
		}
	})
}

// storeToCreate is the store for a Create that asks for one: a volume that exists
// anywhere stays where it is.
func (d *Driver) storeToCreate(ctx context.Context, name string, asked *store) (*store, error) {
	if d.ledger.owner(name) == "" {
		d.lookAt(ctx, name, asked)
	}
	for range d.all() {
		s := d.byKey(d.ledger.owner(name))
		if s == nil || s == asked {
			return asked, nil
		}
		_, away, err := s.find(ctx, name)
		switch {
		case errdefs.IsNotFound(err):
			continue // the name means another store's volume now, or none
		case err != nil:
			return nil, err
		case errdefs.IsNotFound(away):
			return nil, fault.Conflict("%w, and containers of this host still have it mounted; stop them first", away)
		case away != nil:
			return nil, fault.Unavailable("volume %s is in volume root %s as far as this host knows: %w", name, s, away)
		}
		return s, nil
	}
	return asked, nil
}

// change runs fn for one volume, alone and in bounded time, in the store that
// where finds. See workers.run for commit.
func (d *Driver) change(ctx context.Context, name string, where func(ctx context.Context, name string) (*store, error), fn func(ctx context.Context, s *store, commit func() bool) error) error {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.request)
	defer cancel()
	unlock, err := d.locks.Lock(ctx, name)
	if err != nil {
		d.mu.Lock()
		s := d.working[name]
		d.mu.Unlock()
		if s == nil {
			s = d.mountedIn(name)
		}
		return fault.Unavailable("volume %s: an earlier request has not ended (%w); does the storage at %s answer?", name, err, s)
	}
	s, err := where(ctx, name)
	if err != nil {
		unlock()
		return fmt.Errorf("volume %s: %w", name, err)
	}
	d.mu.Lock()
	d.working[name] = s
	d.mu.Unlock()
	release := func() {
		d.mu.Lock()
		delete(d.working, name)
		d.mu.Unlock()
		unlock()
	}
	return s.changes.run(ctx, release, func(ctx context.Context, commit func() bool) error { return fn(ctx, s, commit) })
}

// Create answers VolumeDriver.Create. A volume that exists is left as it is; when
// the options differ from its own, its Status says so.
func (d *Driver) Create(ctx context.Context, req *api.CreateRequest) error {
	if err := refuseSnapshot(req.Name); err != nil {
		return err
	}
	if err := volume.CheckName(req.Name); err != nil {
		return err
	}
	spec, err := options.Parse(req.Options)
	if err != nil {
		return fmt.Errorf("volume %s: %w", req.Name, err)
	}
	asked, share, err := d.asked(ctx, spec)
	if err != nil {
		return fmt.Errorf("volume %s: %w", req.Name, err)
	}
	if share == nil {
		share = asked.share.Load()
	}
	spec = reveal(spec, share)
	where := func(ctx context.Context, name string) (*store, error) { return d.storeToCreate(ctx, name, asked) }
	var in *store
	var one *filling
	var uuid string
	begin := time.Now()
	err = d.change(ctx, req.Name, where, func(ctx context.Context, s *store, _ func() bool) error {
		if err := d.checkNested(s, req.Name); err != nil {
			return err
		}
		if s == asked && s.isShare() && !s.ledger.view(s.key, req.Name).ok {
			if err := s.define(*share); err != nil {
				return err
			}
		}
		root, err := s.open()
		if errors.Is(err, volume.ErrFresh) && s == asked {
			if err = s.checkTop(req.Name); err == nil {
				root, err = s.initialise(ctx)
			}
		}
		if err != nil {
			return err
		}
		defer root.Close()
		if s == asked {
			if err := s.checkRoot(req.Name); err != nil {
				return err
			}
		}
		var rec volume.Record
		var begun bool
		if s == asked {
			rec, begun, err = root.CreateBegin(ctx, req.Name, spec)
		} else {
			rec, err = root.Record(req.Name) // it is not to be made here
		}
		if err != nil {
			return err
		}
		v := seenVolume{Record: rec, Stamp: entryStamp(root, req.Name)}
		if len(options.Differences(rec.Options, spec.Given)) > 0 {
			v.Asked, v.Differs = spec.Given, true
		}
		err = s.ledger.remember(s.key, req.Name, &v)
		s.learnAbilities(ctx, root)
		if begun {
			in, uuid, one = s, rec.UUID, d.startFill(s, req.Name, rec.UUID)
		}
		d.schedules.Wake()
		d.backupRuns.Wake()
		return err
	})
	if err != nil || one == nil {
		return err
	}
	select {
	case <-one.ended:
		if one.err != nil {
			return errors.Join(one.err, d.abort(ctx, in, req.Name, uuid))
		}
	case <-ctx.Done():
	case <-time.After(createWait - time.Since(begin)):
		// It goes on, and Mount tells how far it is.
	}
	return nil
}

// checkNested refuses the name of a directory in which another root is.
func (d *Driver) checkNested(s *store, name string) error {
	if s.ledger.view(s.key, name).ok {
		return nil
	}
	for _, other := range d.all() {
		if s.location.Path == "" || other == s || other.location.Path == "" {
			continue
		}
		path := filepath.Join(s.location.Path, name)
		if other.location.Path == path || strings.HasPrefix(other.location.Path, path+"/") {
			return fault.Conflict("volume %s cannot be in volume root %s: volume root %s is in the directory %s", name, s, other, path)
		}
	}
	return nil
}

// Remove answers VolumeDriver.Remove. dockerd has looked for containers that use
// the volume, and it is refused all the same while it is mounted on this host.
func (d *Driver) Remove(ctx context.Context, req *api.RemoveRequest) error {
	if err := refuseSnapshot(req.Name); err != nil {
		return err
	}
	if err := volume.CheckName(req.Name); err != nil {
		return err
	}
	return d.change(ctx, req.Name, d.storeOf, func(ctx context.Context, s *store, _ func() bool) error {
		known := d.ledger.view(s.key, req.Name).Record
		s.fills.stop(ctx, known.UUID)
		unlock, err := d.ops.Lock(ctx, req.Name)
		if err != nil {
			return fault.Conflict("volume %s: another operation has not ended, a snapshot or a copy perhaps; try again later", req.Name)
		}
		defer unlock()
		root, err := s.open()
		if errors.Is(err, volume.ErrFresh) {
			return nil
		}
		if err != nil {
			return err
		}
		defer root.Close()
		if err := d.unused(ctx, s, root, req.Name); err != nil {
			return err
		}
		if err := root.Remove(ctx, req.Name); err != nil {
			return err
		}
		s.wakePurge()
		if err := s.ledger.remember(s.key, req.Name, nil); err != nil {
			return err
		}
		if known.Schedule != "" {
			d.schedules.Wake() // it forgets what is gone
			d.backupRuns.Wake()
		}
		return nil
	})
}

// find returns the volume that the name means, and its store; see store.find.
func (d *Driver) find(ctx context.Context, name string) (*store, seenVolume, error, error) {
	type finding struct {
		v         seenVolume
		away, err error
	}
	found := map[*store]finding{}
	for {
		s := d.byKey(d.ledger.owner(name))
		if s == nil {
			break
		}
		f, ok := found[s]
		if !ok {
			f.v, f.away, f.err = s.find(ctx, name)
			found[s] = f
		}
		if ok || !errdefs.IsNotFound(f.err) {
			return s, f.v, f.away, f.err
		}
	}
	var mu sync.Mutex
	d.each(func(s *store) {
		mu.Lock()
		_, ok := found[s]
		mu.Unlock()
		if ok {
			return
		}
		v, away, err := s.find(ctx, name)
		mu.Lock()
		defer mu.Unlock()
		found[s] = finding{v, away, err}
	})
	if s := d.byKey(d.ledger.owner(name)); s != nil {
		if f, ok := found[s]; ok && f.err == nil {
			return s, f.v, f.away, nil
		}
	}
	return d.home, found[d.home].v, found[d.home].away, found[d.home].err
}

// Get answers VolumeDriver.Get; see the package's comment for when it errs.
func (d *Driver) Get(ctx context.Context, req *api.GetRequest) (*api.GetResponse, error) {
	ref, err := volume.ParseReference(req.Name)
	if err != nil {
		return nil, err
	}
	s, v, away, err := d.find(ctx, ref.Volume)
	if err != nil {
		return nil, err
	}
	if ref.Snapshot != "" {
		return d.getSnapshot(ctx, s, ref, v, away)
	}
	return &api.GetResponse{Volume: d.describe(s, req.Name, v, away)}, nil
}

// Path answers VolumeDriver.Path, which dockerd hardly ever sends.
func (d *Driver) Path(ctx context.Context, req *api.PathRequest) (*api.PathResponse, error) {
	ref, err := volume.ParseReference(req.Name)
	if err != nil {
		return nil, err
	}
	s, v, _, err := d.find(ctx, ref.Volume)
	if err != nil {
		return nil, err
	}
	return &api.PathResponse{Mountpoint: d.mountpoint(s, ref, v.Record)}, nil
}

// List answers VolumeDriver.List, sorted by name. It never fails.
func (d *Driver) List(ctx context.Context) (*api.ListResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.look)
	defer cancel()
	d.each(func(s *store) {
		if err := s.scan(ctx); err != nil {
			d.cfg.Log.WithError(err).Debugf("list volumes of root %s from what was seen last", s)
		}
	})
	names := d.ledger.names()
	list := make([]*api.Volume, 0, len(names))
	for _, name := range names {
		s := d.mountedIn(name)
		rec := d.ledger.view(s.key, name).Record
		list = append(list, &api.Volume{Name: name, Mountpoint: d.mountpoint(s, volume.Reference{Volume: name}, rec)})
	}
	return &api.ListResponse{Volumes: list}, nil
}

// mountpoint is the path dockerd gets, whether or not it is mounted.
func (d *Driver) mountpoint(s *store, ref volume.Reference, rec volume.Record) string {
	if binder := d.binderOf(rec, ref.Snapshot != ""); binder != nil {
		return binder.Path(ref.String())
	}
	return filepath.Join("/", s.location.DataPath(ref.Volume))
}
