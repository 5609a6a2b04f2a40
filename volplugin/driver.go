package volplugin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	api "github.com/docker/go-plugins-helpers/volume"
	"golang.org/x/sync/singleflight"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/shared/keylock"
	"github.com/berth-plugin/berth/shared/pluginapi"
	"github.com/berth-plugin/berth/volplugin/engine/dir"
	"github.com/berth-plugin/berth/volplugin/mount"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// A Driver answers the VolumeDriver calls. Make one with New; call Recover before
// requests that change or mount volumes are let in, and Run for as long as it is
// used. All methods may be called concurrently.
type Driver struct {
	cfg      Config
	location volume.Location
	// binder is nil when the data directories themselves are handed out.
	binder *mount.Binder
	// locks has one lock per volume name, held over a whole operation, also by
	// one that was given up, until the kernel lets it go.
	locks *keylock.Locker
	// changes run Create, Mount, Unmount and Remove; looks run what Get does, so
	// that neither takes the other's place when the storage hangs.
	changes, looks *workers
	scans          singleflight.Group
	// hung is set while the storage is known not to answer.
	hung atomic.Bool
	// purge wakes Run when the trash holds data to be deleted at once.
	purge chan struct{}

	// cacheWrite is held while the cache changes, in the state file and memory.
	cacheWrite sync.Mutex

	mu sync.Mutex // guards all following fields
	// root, seen and mounts are what is in the state file.
	root   rootState
	seen   map[string]seenVolume
	mounts map[string]volumeMounts
	// clock counts this process's changes of volumes, changed says when each
	// volume had its last.
	clock   moment
	changed map[string]moment
	// lastRound is the clock at the last round of Run.
	lastRound moment
	// unfinished are the volumes that this host began to make or remove, as the
	// last reading of the root found them.
	unfinished map[string]bool
}

var _ pluginapi.VolumeDriver = (*Driver)(nil)

// New makes a driver from what an earlier process has kept in cfg.DB. It does not
// touch the root, so it cannot hang on storage that is away.
func New(cfg Config) (*Driver, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	d := &Driver{
		cfg:     cfg,
		locks:   keylock.New(),
		changes: newWorkers(cfg.Root, stuckMost),
		looks:   newWorkers(cfg.Root, stuckMost),
		purge:   make(chan struct{}, 1),
		seen:    map[string]seenVolume{},
		mounts:  map[string]volumeMounts{},
		changed: map[string]moment{},
	}
	if err := d.load(); err != nil {
		return nil, fmt.Errorf("load volumes: %w", err)
	}
	if cfg.MountBase != "" {
		binder, err := mount.NewBinder(cfg.MountBase)
		if err != nil {
			return nil, err
		}
		d.binder = binder
	}
	d.location = volume.Location{Path: d.cfg.Root, Engine: dir.Engine{}, Host: d.cfg.HostID, Now: d.cfg.Now, Step: d.cfg.step}
	return d, nil
}

// change runs fn for one volume, alone and in bounded time. See workers.run for
// commit.
func (d *Driver) change(ctx context.Context, name string, fn func(ctx context.Context, commit func() bool) error) error {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.request)
	defer cancel()
	unlock, err := d.locks.Lock(ctx, name)
	if err != nil {
		return fault.Unavailable("volume %s: an earlier request has not ended (%w); does the storage at %s answer?", name, err, d.cfg.Root)
	}
	return d.changes.run(ctx, unlock, fn)
}

// Create answers VolumeDriver.Create. A volume that exists is left as it is; when
// the options differ from its own, its Status says so.
func (d *Driver) Create(ctx context.Context, req *api.CreateRequest) error {
	if err := volume.CheckName(req.Name); err != nil {
		return err
	}
	spec, err := options.Parse(req.Options)
	if err != nil {
		return fmt.Errorf("volume %s: %w", req.Name, err)
	}
	return d.change(ctx, req.Name, func(ctx context.Context, _ func() bool) error {
		root, err := d.open()
		if errors.Is(err, volume.ErrFresh) {
			root, err = d.initialise(ctx)
		}
		if err != nil {
			return err
		}
		defer root.Close()
		rec, err := root.Create(ctx, req.Name, spec)
		if err != nil {
			return err
		}
		v := seenVolume{Record: rec, Stamp: entryStamp(root, req.Name)}
		if len(options.Differences(rec.Options, req.Options)) > 0 {
			v.Asked, v.Differs = req.Options, true
		}
		return d.remember(req.Name, &v)
	})
}

// initialise makes the directory a root at the first Create; not before, so that
// looking at a mount point with nothing mounted leaves no marker below it.
func (d *Driver) initialise(ctx context.Context) (*volume.Root, error) {
	root, err := d.location.Init(ctx, "")
	if err != nil {
		return nil, err
	}
	d.cfg.Log.Infof("volume root %s initialised with ID %s", d.cfg.Root, root.ID)
	err = d.setRoot(rootState{ID: root.ID})
	if err == nil {
		err = root.DropAccept()
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return root, nil
}

// Remove answers VolumeDriver.Remove. dockerd has looked for containers that use
// the volume, and it is refused all the same while it is mounted on this host.
func (d *Driver) Remove(ctx context.Context, req *api.RemoveRequest) error {
	if err := volume.CheckName(req.Name); err != nil {
		return err
	}
	return d.change(ctx, req.Name, func(ctx context.Context, _ func() bool) error {
		root, err := d.open()
		if errors.Is(err, volume.ErrFresh) {
			return nil
		}
		if err != nil {
			return err
		}
		defer root.Close()
		if err := d.release(ctx, root, req.Name); err != nil {
			return err
		}
		if err := root.Remove(ctx, req.Name); err != nil {
			return err
		}
		d.wakePurge()
		return d.remember(req.Name, nil)
	})
}

// Get answers VolumeDriver.Get; see the package's comment for when it errs.
func (d *Driver) Get(ctx context.Context, req *api.GetRequest) (*api.GetResponse, error) {
	if err := volume.CheckName(req.Name); err != nil {
		return nil, err
	}
	v, away, err := d.find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	return &api.GetResponse{Volume: d.describe(req.Name, v, away)}, nil
}

// Path answers VolumeDriver.Path, which dockerd hardly ever sends.
func (d *Driver) Path(ctx context.Context, req *api.PathRequest) (*api.PathResponse, error) {
	if err := volume.CheckName(req.Name); err != nil {
		return nil, err
	}
	if _, _, err := d.find(ctx, req.Name); err != nil {
		return nil, err
	}
	return &api.PathResponse{Mountpoint: d.mountpoint(req.Name)}, nil
}

// List answers VolumeDriver.List, sorted by name. It never fails.
func (d *Driver) List(ctx context.Context) (*api.ListResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.look)
	defer cancel()
	if err := d.scan(ctx); err != nil {
		d.cfg.Log.WithError(err).Debug("list volumes from what was seen last")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	list := make([]*api.Volume, 0, len(d.seen))
	for name := range d.seen {
		list = append(list, &api.Volume{Name: name, Mountpoint: d.mountpoint(name)})
	}
	slices.SortFunc(list, func(a, b *api.Volume) int { return strings.Compare(a.Name, b.Name) })
	return &api.ListResponse{Volumes: list}, nil
}

// mountpoint is the path dockerd gets, whether or not it is mounted.
func (d *Driver) mountpoint(name string) string {
	if d.binder == nil {
		return d.location.DataPath(name)
	}
	return d.binder.Path(name)
}

// describe gives what `docker volume inspect` shows.
func (d *Driver) describe(name string, v seenVolume, away error) *api.Volume {
	out := &api.Volume{Name: name, Mountpoint: d.mountpoint(name)}
	status := map[string]any{
		"root":   d.cfg.Root,
		"mounts": d.mountsOf(name).IDs.Total(),
	}
	if v.Broken != "" {
		status["error"] = v.Broken + "; its data and its record are left alone, and it cannot be mounted or removed"
	} else {
		// Any other form than RFC 3339 would make dockerd drop the volume.
		out.CreatedAt = v.Record.CreatedAt.UTC().Format(time.RFC3339)
		status["engine"] = v.Record.Engine
		status["uuid"] = v.Record.UUID
		status["on-remove"] = string(v.Record.OnRemove)
		status["adopted"] = v.Record.Adopted
	}
	if v.Differs {
		status["options-differ"] = options.Differences(v.Record.Options, v.Asked)
	}
	if away != nil {
		status["error"] = away.Error()
	}
	if n := d.changes.givenUp.Load() + d.looks.givenUp.Load(); n > 0 {
		status["hanging-calls"] = n
	}
	out.Status = status
	return out
}
