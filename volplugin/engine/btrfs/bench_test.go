package btrfs_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/btrfs"
	"github.com/berth-plugin/berth/volplugin/engine/enginetest"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

// BenchmarkVolume works on a volume of 68,000 files and 846 MB, on disk, without
// quotas and with them.
func BenchmarkVolume(b *testing.B) {
	for name, size := range map[string]uint64{"quotas=off": 0, "quotas=on": 4 << 30} {
		b.Run(name, func(b *testing.B) { benchmarkVolume(b, size) })
	}
}

func benchmarkVolume(b *testing.B, size uint64) {
	ctx, e := b.Context(), treeengine.New(btrfs.Trees{})
	place := enginetest.NewPlace(b, mounttest.Disk(b, "btrfs", 8<<30))
	volume := func(name string) engine.Volume { return engine.Volume{Name: name, UUID: uuid.NewString(), Size: size} }
	web := volume("web")
	_, err := e.Create(ctx, place, web, engine.Attributes{})
	assert.NilError(b, err)
	fill(b, filepath.Join(place.Root.Path(), "web"))
	next := 0
	name := func() string { next++; return fmt.Sprint(next) }
	snapshot := func(b *testing.B) string {
		snap := name()
		_, err := e.Snapshot(ctx, place, web, snap, nil)
		assert.NilError(b, err)
		return snap
	}
	clone := func(b *testing.B) engine.Volume {
		v := volume("v" + name())
		_, err := e.Clone(ctx, place, web, "", v, nil)
		assert.NilError(b, err)
		return v
	}
	for name, run := range map[string]func(b *testing.B, timed func(func())){
		"snapshot": func(b *testing.B, timed func(func())) { timed(func() { snapshot(b) }) },
		"clone":    func(b *testing.B, timed func(func())) { timed(func() { clone(b) }) },
		"remove snapshot": func(b *testing.B, timed func(func())) {
			snap := snapshot(b)
			timed(func() { assert.NilError(b, e.RemoveSnapshot(ctx, place, web, snap)) })
		},
		"rollback": func(b *testing.B, timed func(func())) {
			snap, keep := snapshot(b), name()
			timed(func() {
				_, err := e.Rollback(ctx, place, web, snap, keep, nil)
				assert.NilError(b, err)
			})
		},
		"retire": func(b *testing.B, timed func(func())) {
			v := clone(b)
			timed(func() { assert.NilError(b, e.Retire(ctx, place, v)) })
			assert.NilError(b, e.Destroy(ctx, place, v))
		},
		"destroy": func(b *testing.B, timed func(func())) {
			v := clone(b)
			assert.NilError(b, e.Retire(ctx, place, v))
			timed(func() { assert.NilError(b, e.Destroy(ctx, place, v)) })
		},
		"create": func(b *testing.B, timed func(func())) {
			v := volume("v" + name())
			timed(func() {
				_, err := e.Create(ctx, place, v, engine.Attributes{})
				assert.NilError(b, err)
			})
		},
		"usage": func(b *testing.B, timed func(func())) {
			timed(func() {
				_, err := e.Usage(ctx, place, web)
				assert.NilError(b, err)
			})
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.StopTimer()
			for range b.N {
				run(b, func(work func()) { b.StartTimer(); work(); b.StopTimer() })
			}
		})
	}
}

func fill(b *testing.B, path string) {
	content := make([]byte, 12_440)
	for i := range 68_000 {
		dir := filepath.Join(path, fmt.Sprint(i/100))
		if i%100 == 0 {
			assert.NilError(b, os.Mkdir(dir, 0o755))
		}
		content[i%len(content)]++
		assert.NilError(b, os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), content, 0o644))
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	assert.NilError(b, err)
	defer unix.Close(fd)
	assert.NilError(b, unix.Syncfs(fd))
}
