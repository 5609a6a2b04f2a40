package volplugin

import (
	"context"
	"fmt"

	"github.com/docker/go-units"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/thin"
	"github.com/berth-plugin/berth/volplugin/volume"
)

// poolWarn is the part of a pool's data or metadata, in percent, from which on the log
// warns. The engine refuses new volumes from 95 on.
const poolWarn = 80

// learnPool looks how full the pool of engine thin in the root is, and warns.
func (s *store) learnPool(ctx context.Context, root *volume.Root) {
	before := s.pool.Load()
	if !s.hasPool(before != nil) {
		return
	}
	now, err := root.Pool(ctx, thin.Name)
	if err != nil {
		s.cfg.Log.WithError(err).Debug("look how full the thin pool is")
		return
	}
	s.pool.Store(&now)
	if before == nil {
		before = &engine.Pool{}
	}
	if text := poolWarning(now); text != "" && (poolWarning(*before) == "" || now.Problem != before.Problem) {
		s.cfg.Log.Warnf("volume root %s: %s", s, text)
	}
}

// hasPool tells whether a pool is worth a look. One that was looked at does not change
// as long as no volume in it is used, and need not be started for it.
func (s *store) hasPool(known bool) bool {
	for _, v := range s.ledger.seen(s.key) {
		uuid := v.Record.UUID
		if v.Record.Engine == thin.Name && (!known || s.holders.held(uuid) || s.ledger.hasMounts(uuid)) {
			return true
		}
	}
	return false
}

// poolWarning says in words that a pool fills, "" as long as it has room.
func poolWarning(p engine.Pool) string {
	data, metadata := percent(p.DataUsed, p.DataTotal), percent(p.MetadataUsed, p.MetadataTotal)
	if data < poolWarn && metadata < poolWarn && p.Problem == "" {
		return ""
	}
	text := fmt.Sprintf("the thin pool's data is %.0f %% full, its metadata %.0f %%", data, metadata)
	if p.Problem != "" {
		return text + ": " + p.Problem
	}
	return text + "; new volumes are refused from 95 % on"
}

// percent is 0 of a total that is not known.
func percent(used, total uint64) float64 {
	if total == 0 {
		return 0
	}
	return 100 * float64(used) / float64(total)
}

// describePool is the pool as Status has it.
func describePool(p engine.Pool) map[string]any {
	shown := map[string]any{
		"size":     units.BytesSize(float64(p.DataTotal)),
		"data":     fmt.Sprintf("%.1f %%", percent(p.DataUsed, p.DataTotal)),
		"metadata": fmt.Sprintf("%.1f %%", percent(p.MetadataUsed, p.MetadataTotal)),
	}
	if p.Problem != "" {
		shown["problem"] = p.Problem
	}
	return shown
}
