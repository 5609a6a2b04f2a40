package volplugin

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"

	"github.com/berth-plugin/berth/shared/control"
	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/volume"
)

const (
	// createWait is how long Create waits for a volume that is filled from a source.
	createWait = 18 * time.Second
	// fillEvery is how often those who wait for a volume are told how far it is.
	fillEvery = 200 * time.Millisecond
)

// fills are the volumes that this process fills from a source, by UUID.
type fills struct {
	mu sync.Mutex
	by map[string]*filling
}

// filling is one of them.
type filling struct {
	cancel context.CancelFunc
	// ended is closed at the end; err is why it failed, and may be read then.
	ended chan struct{}
	err   error
	// progress is guarded by fills.mu.
	progress engine.Progress
}

func newFills() *fills { return &fills{by: map[string]*filling{}} }

// begin notes a volume. begun is false, and one is who fills it, when that goes on
// already.
func (f *fills) begin(uuid string, cancel context.CancelFunc) (one *filling, begun bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if one, ok := f.by[uuid]; ok {
		return one, false
	}
	one = &filling{cancel: cancel, ended: make(chan struct{})}
	f.by[uuid] = one
	return one, true
}

func (f *fills) set(one *filling, p engine.Progress) {
	f.mu.Lock()
	defer f.mu.Unlock()
	one.progress = p
}

func (f *fills) end(uuid string, one *filling, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	one.cancel()
	one.err = err
	delete(f.by, uuid)
	close(one.ended)
}

// get tells how far a volume is; ok is false when this process does not fill it.
func (f *fills) get(uuid string) (p engine.Progress, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if one, ok := f.by[uuid]; ok {
		return one.progress, true
	}
	return engine.Progress{}, false
}

// stop ends the filling of a volume and waits until it has.
func (f *fills) stop(ctx context.Context, uuid string) {
	f.mu.Lock()
	one := f.by[uuid]
	f.mu.Unlock()
	if one == nil {
		return
	}
	one.cancel()
	select {
	case <-one.ended:
	case <-ctx.Done():
	}
}

// shown is what a message says of how far a volume is, with a space in front.
func (f *fills) shown(uuid string) string {
	p, ok := f.get(uuid)
	if !ok || p == (engine.Progress{}) {
		return ""
	}
	return " (" + progressText(p) + ")"
}

func progressText(p engine.Progress) string {
	of := func(done, total uint64, show func(uint64) string) string {
		if total == 0 {
			return show(done)
		}
		return fmt.Sprintf("%s of %s", show(done), show(total))
	}
	return of(p.Files, p.TotalFiles, func(n uint64) string { return fmt.Sprint(n) }) + " files, " +
		of(p.Bytes, p.TotalBytes, func(n uint64) string { return units.HumanSize(float64(n)) })
}

// sourceOf names what a volume is made from.
func sourceOf(rec volume.Record) string {
	s := rec.Source
	switch {
	case s == nil:
		return "nothing"
	case s.Trash:
		return "the trash"
	case s.Backup != "":
		return "backup " + shortReference(backupReference(s))
	case s.Archive:
		return "an archive"
	case s.Seed != "":
		return s.Seed
	case s.Adopt != "":
		return s.Adopt
	}
	return volume.Reference{Volume: s.Volume, Snapshot: s.Snapshot}.String()
}

// startFill makes the data of a volume that is restoring, in the background, unless that
// goes on already.
func (d *Driver) startFill(s *store, name, uuid string) *filling {
	ctx, cancel := context.WithCancel(d.tasks)
	one, begun := s.fills.begin(uuid, cancel)
	if !begun {
		cancel()
		return one
	}
	d.running.Go(func() {
		err := d.fill(ctx, s, name, one)
		if err != nil && ctx.Err() == nil {
			d.cfg.Log.WithField("volume", name).WithError(err).Warn("fill a volume")
		}
		s.fills.end(uuid, one, err)
	})
	return one
}

func (d *Driver) fill(ctx context.Context, s *store, name string, one *filling) error {
	unlock, err := d.ops.Lock(ctx, name)
	if err != nil {
		return err
	}
	// The source stays what it is meanwhile. Nobody who has its lock waits for the
	// lock of a volume that is made from it.
	if src := d.ledger.view(s.key, name).Record.Source; src != nil && src.Volume != "" && src.Volume != name {
		unlockSource, err := d.ops.Lock(ctx, src.Volume)
		if err != nil {
			unlock()
			return err
		}
		unlockName := unlock
		unlock = func() {
			unlockSource()
			unlockName()
		}
	}
	return s.inRoot(ctx, unlock, func(ctx context.Context, root *volume.Root) error {
		_, err := root.CreateFill(ctx, name, func(p engine.Progress) { s.fills.set(one, p) })
		return errors.Join(err, s.relearn(root, name))
	})
}

// abort removes a volume that could not be filled while somebody waited for it.
func (d *Driver) abort(ctx context.Context, s *store, name, uuid string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), d.cfg.request)
	defer cancel()
	s.fills.stop(ctx, uuid)
	unlock, err := d.ops.Lock(ctx, name)
	if err != nil {
		return err
	}
	return s.inRoot(ctx, unlock, func(ctx context.Context, root *volume.Root) error {
		rec, err := root.Record(name)
		if errors.Is(err, volume.ErrNoRecord) || err == nil && rec.UUID != uuid {
			return nil
		}
		if err == nil {
			err = root.CreateAbort(ctx, name)
		}
		return errors.Join(err, s.relearn(root, name))
	})
}

// awaitFill waits for a volume to be whole, to the end, and removes it when it
// cannot be or when ctx ends first.
func (d *Driver) awaitFill(ctx context.Context, s *store, name, uuid string, one *filling, tell func(engine.Progress)) error {
	if err := d.followFill(ctx, s, uuid, one, tell); err != nil {
		return errors.Join(err, d.abort(ctx, s, name, uuid))
	}
	return nil
}

// followFill waits for the end of a filling, or of ctx.
func (*Driver) followFill(ctx context.Context, s *store, uuid string, one *filling, tell func(engine.Progress)) error {
	tick := time.NewTicker(fillEvery)
	defer tick.Stop()
	for {
		select {
		case <-one.ended:
			return one.err
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			if p, ok := s.fills.get(uuid); ok {
				tell(p)
			}
		}
	}
}

// CloneVolume implements control.VolumeAdmin.
func (d *Driver) CloneVolume(ctx context.Context, req control.CloneRequest, tell func(control.Progress)) (out control.Volume, err error) {
	from := volume.Reference{Volume: req.Volume, Snapshot: req.Snapshot}
	if _, err := volume.ParseReference(from.String()); err != nil {
		return out, err
	}
	given := map[string]string{"from": from.String()}
	for name, value := range req.Options {
		if name == "from" || name == "seed" {
			return out, fault.Invalid("option %s does not go with a clone", name)
		}
		given[name] = value
	}
	return d.makeFilled(ctx, req.Name, given, tell, func(ctx context.Context, root *volume.Root, spec options.Spec) (volume.Record, error) {
		rec, begun, err := root.CreateBegin(ctx, req.Name, spec)
		if err == nil && !begun {
			err = fault.Conflict("volume %s exists already", req.Name)
		}
		return rec, err
	})
}

// AdoptVolume implements control.VolumeAdmin.
func (d *Driver) AdoptVolume(ctx context.Context, req control.AdoptRequest, tell func(control.Progress)) (control.Volume, error) {
	return d.makeFilled(ctx, req.Name, req.Options, tell, func(ctx context.Context, root *volume.Root, spec options.Spec) (volume.Record, error) {
		path := req.Source
		if !filepath.IsAbs(path) {
			path = filepath.Join(root.Path, path)
		}
		if path = filepath.Clean(path); !req.Copy && path == filepath.Join(root.Path, req.Name) {
			// It is where it belongs: this is what Create does.
			return root.Create(ctx, req.Name, spec)
		}
		if !req.Copy && !strings.HasPrefix(path, root.Path+"/") {
			return volume.Record{}, fault.Invalid("%s is not below the root %s: it can only be copied, with --copy", path, root.Path)
		}
		return root.AdoptBegin(ctx, req.Name, path, req.Copy, spec)
	})
}

// makeFilled makes a volume from something else and returns when it is whole.
func (d *Driver) makeFilled(ctx context.Context, name string, given map[string]string, tell func(control.Progress), begin func(context.Context, *volume.Root, options.Spec) (volume.Record, error)) (out control.Volume, err error) {
	if err := volume.CheckName(name); err != nil {
		return out, err
	}
	spec, err := options.Parse(given)
	if err != nil {
		return out, fmt.Errorf("volume %s: %w", name, err)
	}
	s, share, err := d.asked(ctx, spec)
	if err == nil && share != nil {
		err = fault.Invalid("option type: a share's volumes are made by docker volume create")
	}
	if err != nil {
		return out, fmt.Errorf("volume %s: %w", name, err)
	}
	report := newReporter(tell)
	defer report.end()
	unlock, err := d.lockOperation(ctx, name, alone)
	if err != nil {
		return out, err
	}
	if d.ledger.owner(name) != "" {
		unlock()
		return out, fault.Conflict("volume %s exists already", name)
	}
	var rec volume.Record
	err = s.inNewRoot(ctx, unlock, func(ctx context.Context, root *volume.Root) (err error) {
		if err := d.checkNested(s, name); err != nil {
			return err
		}
		if rec, err = begin(ctx, root, spec); err != nil {
			return err
		}
		out, err = d.again(s, root, name)
		return err
	})
	if err != nil || rec.Phase == volume.Ready {
		return out, err
	}
	one := d.startFill(s, name, rec.UUID)
	if err := d.awaitFill(ctx, s, name, rec.UUID, one, report.step("copying")); err != nil {
		return control.Volume{}, err
	}
	return d.shown(s, name, d.ledger.view(s.key, name).seenVolume, nil), nil
}
