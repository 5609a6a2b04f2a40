package thin

import (
	"context"

	"github.com/docker/go-units"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/engine"
)

// A pool with less than this part of its data blocks or metadata free is low: new
// volumes are refused, and Pool says so. A quarter of it stops snapshots too.
const lowPart = 20

var _ engine.Pooled = (*Engine)(nil)

// Pool implements engine.Pooled. The pool is started for it.
func (e *Engine) Pool(ctx context.Context, p engine.Place) (engine.Pool, error) {
	o, err := e.open(ctx, p, false)
	if missing(err) {
		return engine.Pool{}, nil
	}
	if err != nil {
		return engine.Pool{}, err
	}
	defer o.close()
	if !o.pool.Ready {
		return engine.Pool{}, nil
	}
	var s engine.Pool
	err = o.withPool(ctx, func(_ devmapper.Device, status devmapper.PoolStatus) error {
		s = o.state(status)
		return nil
	})
	return s, err
}

func (o *opened) state(p devmapper.PoolStatus) engine.Pool {
	return engine.Pool{
		DataUsed: p.DataUsed * o.pool.BlockSize, DataTotal: p.DataTotal * o.pool.BlockSize,
		MetadataUsed: p.MetadataUsed * devmapper.MetadataBlock, MetadataTotal: p.MetadataTotal * devmapper.MetadataBlock,
		Problem: problem(p),
	}
}

// problem says in words what is wrong with a pool.
func problem(p devmapper.PoolStatus) string {
	switch {
	case p.Mode == devmapper.PoolFailed:
		return "the thin pool has failed, its metadata cannot be read: thin_repair"
	case p.Mode == devmapper.PoolReadOnly && p.MetadataUsed >= p.MetadataTotal && p.MetadataTotal > 0:
		return "the thin pool's metadata is full and it can only be read: remove what uses it, enlarge the metadata device, thin_check --clear-needs-check-flag"
	case p.NeedsCheck:
		return "the thin pool's metadata could not be written and it can only be read: stop all volumes, thin_check --clear-needs-check-flag or thin_repair"
	case p.Mode == devmapper.PoolReadOnly:
		return "the thin pool can only be read; the host's kernel log says why"
	case p.Mode == devmapper.PoolNoData || p.DataUsed >= p.DataTotal:
		return "the thin pool is full, and writes to its volumes fail: remove volumes or snapshots, or delete files"
	case low(p.DataUsed, p.DataTotal, lowPart):
		return "the thin pool is nearly full"
	case low(p.MetadataUsed, p.MetadataTotal, lowPart):
		return "the thin pool's metadata is nearly full"
	}
	return ""
}

func low(used, total uint64, part uint64) bool {
	return total == 0 || total-min(used, total) < total/part
}

// room refuses new devices in a pool that is not well, or as good as full.
func (o *opened) room(p devmapper.PoolStatus, part uint64) error {
	switch {
	case p.Mode == devmapper.PoolReadOnly || p.NeedsCheck:
		return fault.Unavailable("%s", problem(p))
	case p.Mode == devmapper.PoolNoData, low(p.DataUsed, p.DataTotal, part):
		return fault.Exhausted("thin pool of %s has %s of %s left; the rest is kept for what is in it", o.Root.Path(),
			human((p.DataTotal-min(p.DataUsed, p.DataTotal))*o.pool.BlockSize), human(p.DataTotal*o.pool.BlockSize))
	case low(p.MetadataUsed, p.MetadataTotal, part):
		return fault.Exhausted("thin pool of %s has %s of %s of metadata left; the rest is kept for what is in it", o.Root.Path(),
			human((p.MetadataTotal-min(p.MetadataUsed, p.MetadataTotal))*devmapper.MetadataBlock), human(p.MetadataTotal*devmapper.MetadataBlock))
	}
	return nil
}

func human(n uint64) string { return units.BytesSize(float64(n)) }
