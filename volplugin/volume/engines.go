package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/options"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Engines are those this Berth has, no two of one name.
type Engines []engine.Engine

// Get returns the engine name.
func (e Engines) Get(name string) (engine.Engine, bool) {
	for _, eng := range e {
		if eng.Name() == name {
			return eng, true
		}
	}
	return nil, false
}

// Names in the order of e.
func (e Engines) Names() []string {
	var names []string
	for _, eng := range e {
		names = append(names, eng.Name())
	}
	return names
}

// treeNames are the engines whose volumes are directories of the root, the best
// first, and imageName the one that can limit the size of a volume anywhere.
func treeNames() []string { return []string{"btrfs", "reflink", "dir"} }

const imageName = "image"

// engine returns the one that keeps a volume.
func (r *Root) engine(rec Record) (engine.Engine, error) {
	eng, ok := r.Engines.Get(rec.Engine)
	if !ok {
		return nil, fault.Unavailable("volume %s is kept by engine %.40q, which this Berth does not have (it has %s); its data is untouched", rec.Name, rec.Engine, strings.Join(r.Engines.Names(), ", "))
	}
	return eng, nil
}

// keeper is what most operations on a volume begin with.
func (r *Root) keeper(rec Record) (engine.Engine, engine.Place, error) {
	eng, err := r.engine(rec)
	if err != nil {
		return nil, engine.Place{}, err
	}
	p, err := r.place()
	return eng, p, err
}

// hold attaches a volume until release is called.
func (r *Root) hold(ctx context.Context, rec Record) (release func() error, err error) {
	if r.Hold != nil {
		return r.Hold(ctx, rec)
	}
	if err := r.Attach(ctx, rec); err != nil {
		return nil, err
	}
	return func() error {
		err := r.Detach(context.WithoutCancel(ctx), rec)
		if fault.Kind(err) == "conflict" {
			return nil // whoever has it detaches it
		}
		return err
	}, nil
}

// Attach makes a volume's data reachable on this host, as engine.Engine says.
func (r *Root) Attach(ctx context.Context, rec Record) error {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return err
	}
	return failed(eng.Attach(ctx, p, rec.volume()))
}

// Detach is the inverse of Attach.
func (r *Root) Detach(ctx context.Context, rec Record) error {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return err
	}
	return failed(eng.Detach(ctx, p, rec.volume()))
}

// Cut takes a volume away from whoever has it on this host, as engine.Cutter says. The
// error wraps errors.ErrUnsupported when its engine cannot.
func (r *Root) Cut(ctx context.Context, rec Record) error {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return err
	}
	cutter, ok := eng.(engine.Cutter)
	if !ok {
		return fmt.Errorf("engine %s: %w", rec.Engine, errors.ErrUnsupported)
	}
	return failed(cutter.Cut(ctx, p, rec.volume()))
}

// Pool tells how full the pool of an engine is, as engine.Pooled says; the zero value for
// engines that have none.
func (r *Root) Pool(ctx context.Context, name string) (engine.Pool, error) {
	eng, _ := r.Engines.Get(name)
	pooled, ok := eng.(engine.Pooled)
	if !ok {
		return engine.Pool{}, nil
	}
	p, err := r.place()
	if err != nil {
		return engine.Pool{}, err
	}
	pool, err := pooled.Pool(ctx, p)
	return pool, failed(err)
}

// Mark describes a snapshot, as engine.Comparer says; "" for engines that compare none.
func (r *Root) Mark(ctx context.Context, rec Record, snapshot string) (engine.Mark, error) {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return "", err
	}
	comparer, ok := eng.(engine.Comparer)
	if !ok {
		return "", nil
	}
	mark, err := comparer.Mark(ctx, p, rec.volume(), snapshot)
	return mark, failed(err)
}

// Unchanged tells whether a snapshot has what an earlier one had that since is the Mark of,
// as engine.Comparer says; false for engines that compare none.
func (r *Root) Unchanged(ctx context.Context, rec Record, snapshot string, since engine.Mark) (bool, error) {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return false, err
	}
	comparer, ok := eng.(engine.Comparer)
	if !ok {
		return false, nil
	}
	same, err := comparer.Unchanged(ctx, p, rec.volume(), snapshot, since)
	return same, failed(err)
}

// Abilities are what the engine of a volume can do in this root.
func (r *Root) Abilities(ctx context.Context, rec Record) (engine.Abilities, error) {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return engine.Abilities{}, err
	}
	able, err := eng.Probe(ctx, p)
	return able, failed(err)
}

// choice is the engine for a new volume.
type choice struct {
	engine engine.Engine
	able   engine.Abilities
	reason string
	// found tells that there is data for the name already.
	found bool
}

// choose takes the engine that was asked for, if it works in the root, or the best
// one that does what is asked.
func (r *Root) choose(ctx context.Context, p engine.Place, name string, spec options.Spec) (choice, error) {
	if spec.Engine != "" {
		return r.chosen(ctx, p, name, spec)
	}
	for _, eng := range r.Engines {
		if slices.Contains(treeNames(), eng.Name()) {
			continue
		}
		// Data that on-remove=keep has left. What cannot be looked at is not taken.
		if found, err := eng.Find(p, name); err == nil && found {
			return r.take(ctx, p, eng, name, spec, "its data was there already")
		}
	}
	onImage := spec.FS != "" || spec.Sparse
	var without []string // engines that work but for the limit, with the file system
	fileSystem, tried := "", ""
	for _, tree := range treeNames() {
		eng, ok := r.Engines.Get(tree)
		if !ok {
			continue
		}
		found, err := eng.Find(p, name)
		if err != nil {
			return choice{}, err
		}
		if onImage {
			if found {
				return choice{}, fault.Conflict("the directory %s/%s is there already and cannot become an image: options fs and sparse are for images", r.Path, name)
			}
			continue
		}
		able, err := eng.Probe(ctx, p)
		if err != nil {
			if ctx.Err() != nil {
				return choice{}, err
			}
			tried = reason(err).Error()
			continue
		}
		fileSystem = able.FileSystem
		if spec.Size > 0 && !able.Limit {
			if found {
				return choice{}, fault.Conflict("option size=%s: the directory %s/%s is there already, and no size can be enforced for directories on %s", asked(spec, "size"), r.Path, name, fileSystem)
			}
			without = append(without, tree)
			continue
		}
		why := "the best that " + fileSystem + " can do"
		if fileSystem == "" {
			why = "the best that the root can do"
		}
		return choice{engine: eng, able: able, reason: why, found: found}, nil
	}
	if spec.Size == 0 && !onImage {
		if tried == "" {
			return choice{}, fault.Unavailable("this Berth has no engine for directories")
		}
		return choice{}, fault.Unavailable("no engine works in %s: %s", r.Path, tried)
	}
	image, ok := r.Engines.Get(imageName)
	if ok {
		able, err := image.Probe(ctx, p)
		if err == nil {
			why := "asked for by option fs or sparse"
			if !onImage {
				why = fmt.Sprintf("no size can be enforced for directories on %s", fileSystem)
			}
			return choice{engine: image, able: able, reason: why}, nil
		}
		tried = reason(err).Error()
	} else {
		tried = "this Berth has no engine image"
	}
	if onImage {
		return choice{}, fault.Invalid("options fs and sparse are for images, which do not work in %s: %s", r.Path, tried)
	}
	return choice{}, fault.Invalid("option size=%s: it cannot be enforced by %s on %s, and images do not work in %s (%s); leave size out, or use a root on btrfs or on xfs with project quotas", asked(spec, "size"), strings.Join(without, ", "), fileSystem, r.Path, tried)
}

// chosen is choose for an engine that was named.
func (r *Root) chosen(ctx context.Context, p engine.Place, name string, spec options.Spec) (choice, error) {
	eng, ok := r.Engines.Get(spec.Engine)
	if !ok {
		return choice{}, fault.Invalid("option engine=%q: this Berth has %s", spec.Engine, strings.Join(append([]string{"auto"}, r.Engines.Names()...), ", "))
	}
	return r.take(ctx, p, eng, name, spec, "asked for")
}

// take uses an engine if it does what is asked.
func (r *Root) take(ctx context.Context, p engine.Place, eng engine.Engine, name string, spec options.Spec, why string) (choice, error) {
	able, err := eng.Probe(ctx, p)
	if err != nil {
		switch fault.Kind(failed(err)) {
		case "unavailable", "timeout", "exhausted":
			return choice{}, fmt.Errorf("engine %s in %s: %w", eng.Name(), r.Path, failed(err))
		}
		return choice{}, fault.Invalid("option engine=%s: it does not work in %s: %w", eng.Name(), r.Path, reason(err))
	}
	if spec.Size > 0 && !able.Limit {
		return choice{}, fault.Invalid("option size=%s: engine %s cannot enforce it on %s; use engine=%s, or leave size out", asked(spec, "size"), eng.Name(), able.FileSystem, imageName)
	}
	found, err := eng.Find(p, name)
	if err != nil {
		return choice{}, err
	}
	return choice{engine: eng, able: able, reason: why, found: found}, nil
}

// asked is an option as the user wrote it.
func asked(spec options.Spec, option string) string {
	if value, ok := spec.Given[option]; ok {
		return value
	}
	return "?"
}

// refusedData tells whether an engine's error says that what is there cannot be data.
func refusedData(err error) bool {
	for _, wrong := range []error{rooted.ErrSymlink, rooted.ErrMountPoint, rooted.ErrNotDir, rooted.ErrNotFile} {
		if errors.Is(err, wrong) {
			return true
		}
	}
	return false
}
