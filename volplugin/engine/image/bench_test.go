package image

import (
	"fmt"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
)

func eachVolume(b *testing.B, bench func(b *testing.B, e *Engine, p engine.Place, v engine.Volume)) {
	for _, root := range []string{"ext4", "xfs"} {
		for _, kind := range filesystem.Kinds {
			b.Run(string(kind)+"-on-"+root, func(b *testing.B) {
				e, p, v := New(all()), rootOn(b, root), volume("web", kind)
				v.Size = 1 << 30
				bench(b, e, p, v)
			})
		}
	}
}

func BenchmarkCreate(b *testing.B) {
	eachVolume(b, func(b *testing.B, e *Engine, p engine.Place, v engine.Volume) {
		for b.Loop() {
			create(b, e, p, v)
			assert.NilError(b, e.Retire(b.Context(), p, v))
			assert.NilError(b, e.Destroy(b.Context(), p, v))
		}
	})
}

func BenchmarkAttachDetach(b *testing.B) {
	eachVolume(b, func(b *testing.B, e *Engine, p engine.Place, v engine.Volume) {
		create(b, e, p, v)
		for b.Loop() {
			assert.NilError(b, e.Attach(b.Context(), p, v))
			assert.NilError(b, e.Detach(b.Context(), p, v))
		}
	})
}

// BenchmarkSnapshot is of a volume with a thousand small files.
func BenchmarkSnapshot(b *testing.B) {
	eachVolume(b, func(b *testing.B, e *Engine, p engine.Place, v engine.Volume) {
		create(b, e, p, v)
		attach(b, e, p, v)
		for i := range 1000 {
			write(b, e, p, v, fmt.Sprintf("f%d", i), "content")
		}
		for b.Loop() {
			_, err := e.Snapshot(b.Context(), p, v, "s", nil)
			assert.NilError(b, err)
			b.StopTimer()
			assert.NilError(b, e.RemoveSnapshot(b.Context(), p, v, "s"))
			b.StartTimer()
		}
	})
}
