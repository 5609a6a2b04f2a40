package volume

import (
	"context"
	"errors"
	"fmt"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/engine"
)

// Resize sets a volume's limit in bytes, 0 for none, also while it is in use. A limit
// below what is used is a conflict where the engine cannot hold it.
func (r *Root) Resize(ctx context.Context, name string, size uint64) (Record, error) {
	rec, err := r.ready(name)
	if err != nil {
		return Record{}, err
	}
	eng, p, err := r.keeper(rec)
	if err != nil {
		return Record{}, err
	}
	able, err := eng.Probe(ctx, p)
	if err != nil {
		return Record{}, failed(fmt.Errorf("resize volume %s: %w", name, err))
	}
	if !able.Limit && size > 0 {
		return Record{}, fault.Invalid("volume %s: engine %s cannot enforce a size on %s; clone it with engine=%s", name, rec.Engine, able.FileSystem, imageName)
	}
	release, err := r.hold(ctx, rec)
	if err != nil {
		return Record{}, failed(err)
	}
	err = r.step(ctx, "resize.data", name)
	if err == nil {
		err = reason(eng.Resize(ctx, p, rec.volume(), size))
	}
	if err := errors.Join(err, release()); err != nil {
		return Record{}, failed(fmt.Errorf("resize volume %s: %w", name, err))
	}
	// Last: killed before it, the record has the old size, and the same call again
	// makes it right.
	return r.Update(ctx, name, func(rec *Record) error {
		rec.Size = size
		return nil
	})
}

// Usage of a ready volume. It may have to walk the tree; ctx bounds it.
func (r *Root) Usage(ctx context.Context, rec Record) (engine.Usage, error) {
	eng, p, err := r.keeper(rec)
	if err != nil {
		return engine.Usage{}, err
	}
	release, err := r.hold(ctx, rec)
	if err != nil {
		return engine.Usage{}, failed(err)
	}
	usage, err := eng.Usage(ctx, p, rec.volume())
	if err := errors.Join(err, release()); err != nil {
		return engine.Usage{}, failed(fmt.Errorf("usage of volume %s: %w", rec.Name, dataReason(err)))
	}
	return usage, nil
}
