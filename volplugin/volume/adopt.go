package volume

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/options"
)

// AdoptBegin begins a volume whose data is the directory at path: it is moved, or
// copied if that is asked for, by CreateFill. No element of path is a symbolic link,
// and the directory is no mount point. The error is a conflict when the name is taken.
func (r *Root) AdoptBegin(ctx context.Context, name, path string, copied bool, spec options.Spec) (Record, error) {
	if err := CheckName(name); err != nil {
		return Record{}, err
	}
	rec, err := r.adoptBegin(ctx, name, path, copied, spec)
	if errors.Is(err, errTaken) {
		err = fault.Conflict("there is a volume %s already", name)
	}
	if err != nil {
		return Record{}, failed(fmt.Errorf("adopt %s as volume %s: %w", path, name, err))
	}
	return rec, nil
}

func (r *Root) adoptBegin(ctx context.Context, name, path string, copied bool, spec options.Spec) (Record, error) {
	if spec.From != nil || spec.Seed != "" {
		return Record{}, fault.Invalid("options from and seed do not go with an existing directory")
	}
	p, err := r.place()
	if err != nil {
		return Record{}, err
	}
	if err := r.adoptable(path); err != nil {
		return Record{}, err
	}
	if _, err := r.Record(name); !errors.Is(err, ErrNoRecord) {
		if err == nil || errors.Is(err, ErrDamaged) || errors.Is(err, ErrNewer) {
			err = errTaken
		}
		return Record{}, err
	}
	rec, to, err := r.plan(ctx, p, name, spec)
	if err != nil {
		return Record{}, err
	}
	if to.found {
		return Record{}, fault.Conflict("there is data of that name in %s already", r.Path)
	}
	if !copied {
		if !slices.Contains(treeNames(), rec.Engine) {
			return Record{}, fault.Invalid("a directory cannot become the data of engine %s; it can only be copied", rec.Engine)
		}
		rec.Adopted = true
		if spec.OnRemove == nil {
			rec.OnRemove = options.Keep
		}
	}
	return r.beginFill(ctx, rec, &Source{Adopt: path, Copy: copied})
}

// adoptable refuses what is no directory that can be taken, before anything changes.
func (r *Root) adoptable(path string) error {
	parent, base, err := openParent(path)
	if err != nil {
		return sourceError(path, err)
	}
	defer parent.Close()
	dir, err := parent.Handle(base)
	if err != nil {
		return sourceError(path, err)
	}
	defer dir.Close()
	for _, own := range []string{r.Path, filepath.Join(r.Path, metaName)} {
		if same, err := dir.Same(own); err != nil || same {
			return errors.Join(err, fault.Invalid("%s is Berth's own directory", path))
		}
	}
	inRoot, err := parent.Same(r.Path)
	if err != nil || !inRoot {
		return err
	}
	if _, err := r.Record(base); !errors.Is(err, ErrNoRecord) {
		return errors.Join(fault.Conflict("%s is the data of volume %s", path, base), err)
	}
	return nil
}

// Adopt is AdoptBegin and CreateFill. When it fails nothing of the volume is left, and
// the directory is where it was.
func (r *Root) Adopt(ctx context.Context, name, path string, copied bool, spec options.Spec, progress func(engine.Progress)) (Record, error) {
	rec, err := r.AdoptBegin(ctx, name, path, copied, spec)
	if err != nil {
		return Record{}, err
	}
	return r.fillOrAbort(ctx, rec, progress)
}
