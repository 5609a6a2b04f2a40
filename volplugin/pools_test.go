package volplugin

import (
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
)

func TestAPoolThatFillsIsTold(t *testing.T) {
	pool := engine.Pool{DataUsed: 79 << 20, DataTotal: 100 << 20, MetadataUsed: 1 << 20, MetadataTotal: 8 << 20}
	assert.Equal(t, poolWarning(engine.Pool{}), "")
	assert.Equal(t, poolWarning(pool), "")
	pool.DataUsed = 80 << 20
	assert.Equal(t, poolWarning(pool), "the thin pool's data is 80 % full, its metadata 12 %; new volumes are refused from 95 % on")
	pool.DataUsed, pool.MetadataUsed = 0, 7<<20
	assert.Equal(t, poolWarning(pool), "the thin pool's data is 0 % full, its metadata 88 %; new volumes are refused from 95 % on")
	pool.Problem = "the thin pool has failed"
	assert.Equal(t, poolWarning(pool), "the thin pool's data is 0 % full, its metadata 88 %: the thin pool has failed")
	assert.DeepEqual(t, describePool(pool), map[string]any{
		"size": "100MiB", "data": "0.0 %", "metadata": "87.5 %", "problem": "the thin pool has failed",
	})
}
