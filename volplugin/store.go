package volplugin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/keylock"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/netfs"
	"github.com/berth-plugin/berth/volplugin/schedule"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// Keys of stores. They are in the state file.
const (
	// homeKey is the default root's. It sorts before all others.
	homeKey = "default"
	// rootPrefix goes before the name of a named root.
	rootPrefix = "root:"
)

// A store is one root as this host works on it. What hangs in it holds up no
// other store. All methods may be called concurrently.
type store struct {
	key string
	// name for users and messages, where it differs from the path.
	name     string
	cfg      *Config
	ledger   *ledger
	location volume.Location
	// missing, unless nil, is why this store cannot be reached at all: it is not
	// configured any more.
	missing error
	// locks are the Driver's, by volume name.
	locks *keylock.Locker
	// ops are the Driver's.
	ops *keylock.Locker
	// holders are the Driver's.
	holders *holders
	// fills are the volumes that are being filled.
	fills     *fills
	abilities abilities
	used      usages
	// pool of engine thin as it was last seen, nil when it was not.
	pool atomic.Pointer[engine.Pool]
	// runner of snapshots is the Driver's.
	runner  *schedule.Runner
	society society
	// task runs something in the background until the Driver's tasks end.
	task func(func(context.Context))
	// refill starts the filling of a volume that was interrupted.
	refill func(name, uuid string)
	// changes run Create, Mount, Unmount and Remove; looks run what Get does, so
	// that neither takes the other's place when the storage hangs.
	changes, looks *workers
	scans          singleflight.Group
	// hung is set while the storage is known not to answer.
	hung atomic.Bool
	// mounter and share say how the root gets to its path, when Berth mounts it; share
	// is nil for a directory that is there. attached is set while it is mounted,
	// lastAttach is why it could not be, if it could not.
	mounter    *netfs.Mounter
	share      atomic.Pointer[netfs.Share]
	attaching  singleflight.Group
	attached   atomic.Bool
	lastAttach atomic.Pointer[error]
	// purge wakes the background work when the trash holds data to be deleted at
	// once.
	purge chan struct{}
	// unfinished are the volumes that this host began to make or remove, as the
	// last reading of the root found them.
	unfinished atomic.Pointer[map[string]bool]
	// lastRead is the last reading of the root, nil when it has to be read anew.
	lastRead atomic.Pointer[reading]
}

func newStore(key, name, path string, cfg *Config, all volume.Engines, l *ledger, locks *keylock.Locker, h *holders, r *schedule.Runner) *store {
	s := &store{
		key: key, name: name, cfg: cfg, ledger: l, locks: locks, holders: h, runner: r, fills: newFills(),
		location: volume.Location{Path: path, Engines: all, Host: l.hostID, Now: cfg.Now, Step: cfg.step},
		purge:    make(chan struct{}, 1),
	}
	if cfg.Local != "" {
		s.location.Local = filepath.Join(cfg.Local, localName(key))
	}
	s.location.Hold, s.location.Forget = s.hold, s.forgetLease
	return s
}

// start is to be called once all is set that tells what the store is.
func (s *store) start() {
	s.changes, s.looks = newWorkers(s.String(), stuckMost), newWorkers(s.String(), stuckMost)
	if s.location.Local == "" {
		return
	}
	if err := os.MkdirAll(s.location.Local, 0o700); err != nil {
		s.cfg.Log.WithError(err).Warn("images and devices cannot be mounted")
	}
	if share := s.share.Load(); share != nil {
		// An earlier process may have mounted it. What cannot be told is found out later.
		mounted, err := s.mounter.Mounted(*share)
		s.attached.Store(err == nil && mounted)
	}
}

// String is what messages call the store, after "volume root".
func (s *store) String() string {
	share := s.share.Load()
	switch {
	case share != nil && s.isShare():
		return share.String()
	case share != nil:
		return s.name + " (" + share.String() + ")"
	case s.name == "":
		return s.location.Path
	case s.location.Path == "":
		return s.name
	}
	return s.name + " (" + s.location.Path + ")"
}

// status adds to what `docker volume inspect` shows where the volume is.
func (s *store) status(status map[string]any) {
	status["root"] = s.location.Path
	if share := s.share.Load(); share != nil {
		status["root"] = share.String()
		status["root-options"] = netfs.Redact(share.Source().Options)
	}
	if !s.isShare() && s.name != "" {
		status["root-name"] = s.name
	}
}

// home tells whether this is the default root.
func (s *store) home() bool { return s.key == homeKey }

// open opens the root, and mounts it before when that is Berth's to do.
func (s *store) open() (*volume.Root, error) {
	if s.missing != nil {
		return nil, s.missing
	}
	if err := s.attach(); err != nil {
		return nil, err
	}
	root, err := s.openRoot()
	if err == nil {
		return root, nil
	}
	again, err := s.reopen(err)
	if again && err == nil {
		root, err = s.openRoot()
	}
	return root, err
}

// openRoot opens the root and notes its ID when this host sees it for the first time.
func (s *store) openRoot() (*volume.Root, error) {
	known := s.ledger.state(s.key)
	root, err := s.location.Open(known.ID)
	if errors.Is(err, volume.ErrFresh) && known.ID != "" {
		// The operator says that this empty root is meant.
		return nil, errors.Join(err, s.setRoot(""))
	}
	if err != nil {
		return nil, err
	}
	if root.ID != known.ID {
		err = s.setRoot(root.ID)
	}
	if err == nil && root.Accepted {
		err = root.DropAccept()
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return root, nil
}

// setRoot stores which root this is, "" for one that is not initialised.
func (s *store) setRoot(id string) error {
	if before := s.ledger.state(s.key).ID; before != "" {
		s.cfg.Log.Warnf("volume root %s: using %q in place of %q, as accepted", s, id, before)
	}
	return s.ledger.setState(s.key, func(now *storeState) { now.ID, now.Complete = id, false })
}

// initialise makes the directory a root at the first Create; not before, so that
// looking at a mount point with nothing mounted leaves no marker below it.
func (s *store) initialise(ctx context.Context) (*volume.Root, error) {
	root, err := s.location.Init(ctx, "")
	if err != nil {
		return nil, err
	}
	s.cfg.Log.Infof("volume root %s initialised with ID %s", s, root.ID)
	err = s.setRoot(root.ID)
	if err == nil {
		err = root.DropAccept()
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return root, nil
}

// ready opens the root and reads the record of a volume that can be used. The caller
// closes the root.
func (s *store) ready(name string) (*volume.Root, volume.Record, error) {
	root, err := s.open()
	if errors.Is(err, volume.ErrFresh) {
		return nil, volume.Record{}, fault.NotFound("volume %s does not exist: the root %s is new", name, s)
	}
	if err != nil {
		return nil, volume.Record{}, fmt.Errorf("volume %s: %w", name, err)
	}
	rec, err := root.Record(name)
	switch {
	case errors.Is(err, volume.ErrNoRecord):
		err = fault.NotFound("volume %s does not exist in %s", name, s)
	case errors.Is(err, volume.ErrDamaged), errors.Is(err, volume.ErrNewer):
		err = fault.Unavailable("volume %s cannot be mounted, its data is untouched: %w", name, err)
	case err == nil && rec.Phase != volume.Ready:
		err = s.busy(rec)
	}
	if err != nil {
		return nil, rec, errors.Join(err, root.Close())
	}
	return root, rec, nil
}

// busy says why a volume cannot be used yet, or any more.
func (s *store) busy(rec volume.Record) error {
	switch rec.Phase {
	case volume.Broken:
		return fault.Conflict("volume %s is broken: %s", rec.Name, rec.Reason)
	case volume.Restoring:
		return fault.Unavailable("volume %s is being filled from %s%s; try again when it is whole", rec.Name, sourceOf(rec), s.fills.shown(rec.UUID))
	default:
		return fault.Conflict("volume %s: host %s is %s it", rec.Name, rec.Host, rec.Phase)
	}
}

// background is a change of one volume that no request waits for.
func (s *store) background(ctx context.Context, name string, fn func(ctx context.Context) error) error {
	// A volume whose request hangs must not take the time of the others.
	wait, cancel := context.WithTimeout(ctx, s.cfg.look)
	defer cancel()
	unlock, err := s.locks.Lock(wait, name)
	if err != nil {
		return err
	}
	return s.changes.run(ctx, unlock, func(ctx context.Context, _ func() bool) error { return fn(ctx) })
}

// settle reads the root and finishes or undoes what this host began with volumes
// and did not bring to an end.
func (s *store) settle(ctx context.Context) error {
	if s.missing != nil || !s.reachable() {
		return nil //nolint:nilerr // whoever uses the root is told
	}
	if err := s.scan(ctx); err != nil {
		return err
	}
	if s.ledger.state(s.key).ID == "" {
		return nil
	}
	var errs []error
	if unfinished := s.unfinished.Load(); unfinished != nil {
		for name := range *unfinished {
			errs = append(errs, s.background(ctx, name, func(ctx context.Context) error {
				root, err := s.open()
				if err != nil {
					return err
				}
				defer root.Close()
				s.cfg.Log.WithField("volume", name).Info("finishing what was interrupted")
				if rec, err := root.Record(name); err == nil && rec.Phase == volume.Restoring {
					s.refill(name, rec.UUID)
					return nil
				}
				return errors.Join(root.Settle(ctx, name), s.relearn(root, name))
			}))
		}
	}
	return errors.Join(append(errs, s.rejoin(ctx), s.settleClaims(ctx), s.settleSnapshots(ctx))...)
}

// settleSnapshots removes what is half made, or half removed, of snapshots.
func (s *store) settleSnapshots(ctx context.Context) error {
	var names []string
	err := s.lookIn(ctx, func(ctx context.Context, root *volume.Root) (err error) {
		names, err = root.UnsettledSnapshots(ctx)
		return err
	})
	errs := []error{err}
	for _, name := range names {
		// A snapshot that this process is making has the lock.
		wait, cancel := context.WithTimeout(ctx, s.cfg.look)
		unlock, err := s.ops.Lock(wait, name)
		cancel()
		if err != nil {
			continue
		}
		errs = append(errs, s.inRoot(ctx, unlock, func(ctx context.Context, root *volume.Root) error {
			return root.SettleSnapshots(ctx, name)
		}))
	}
	return errors.Join(errs...)
}

// relearn stores what the root shows after this process changed a volume.
func (s *store) relearn(root *volume.Root, name string) error {
	entry, err := root.Entry(name, volume.Entry{})
	if errors.Is(err, volume.ErrNoRecord) || err == nil && !isVisible(entry) {
		return s.ledger.remember(s.key, name, nil)
	}
	if err != nil {
		return err
	}
	v := seen(entry)
	return s.ledger.remember(s.key, name, &v)
}

// settleClaims takes back, or ends, removals that this host was killed in.
func (s *store) settleClaims(ctx context.Context) error {
	var claims map[string]string
	err := s.looks.run(ctx, func() {}, func(ctx context.Context, commit func() bool) error {
		root, err := s.open()
		if err != nil {
			return err
		}
		defer root.Close()
		found, err := root.Claims(ctx)
		if err == nil && commit() {
			claims = found
		}
		return err
	})
	if errors.Is(err, volume.ErrFresh) {
		return nil
	}
	errs := []error{err}
	for name, id := range claims {
		errs = append(errs, s.background(ctx, name, func(ctx context.Context) error {
			root, err := s.open()
			if err != nil {
				return err
			}
			defer root.Close()
			return errors.Join(root.SettleClaim(ctx, name, id), s.relearn(root, name))
		}))
	}
	return errors.Join(errs...)
}

// run works in the background until ctx ends.
func (s *store) run(ctx context.Context) {
	tend, expire := time.NewTicker(tendEvery), time.NewTicker(expireEvery)
	defer tend.Stop()
	defer expire.Stop()
	s.wakePurge() // what was due while no process ran
	if !s.reachable() {
		s.tend(ctx)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tend.C:
			s.tend(ctx)
		case <-expire.C:
			s.expire(ctx)
		case <-s.purge:
			s.expire(ctx)
		}
	}
}

// tend is one round of run.
func (s *store) tend(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.request)
	defer cancel()
	worth, err := s.tendShare(ctx)
	if worth && err == nil {
		s.cutOffLeft(ctx)
		err = s.settle(ctx)
	}
	if worth && err == nil {
		err = s.lookIn(ctx, func(ctx context.Context, root *volume.Root) error {
			s.learnAbilities(ctx, root)
			s.learnPool(ctx, root)
			return nil
		})
	}
	if worth && err == nil {
		err = s.retire(ctx) // the last, because whatever opens the root mounts it
	}
	if err != nil {
		s.cfg.Log.WithError(err).Debug("look after volumes")
	}
	s.ledger.forgetChanges(s.key)
}

// expire deletes what is due in the trash.
func (s *store) expire(ctx context.Context) {
	if s.missing != nil || !s.reachable() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, expireTime)
	defer cancel()
	err := s.looks.run(ctx, func() {}, func(ctx context.Context, _ func() bool) error {
		root, err := s.open()
		if errors.Is(err, volume.ErrFresh) {
			return nil
		}
		if err != nil {
			return err
		}
		defer root.Close()
		names, err := root.Expire(ctx, volume.TrashKeep)
		for _, name := range names {
			s.cfg.Log.WithField("volume", name).Info("deleted from the trash")
		}
		return err
	})
	if err != nil {
		s.cfg.Log.WithError(err).Warn("empty the trash")
	}
}

// wakePurge makes run look at the trash soon.
func (s *store) wakePurge() {
	select {
	case s.purge <- struct{}{}:
	default:
	}
}
