package tree

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

// ordinary makes a tree as programs and their packages are: 68,000 files with 846 MB in 6,800
// directories, most of them small.
func ordinary(t testing.TB, top string) {
	t.Helper()
	random := rand.New(rand.NewPCG(1, 1))
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(random.Uint32())
	}
	for i := range 6800 {
		dir := filepath.Join(top, fmt.Sprintf("%d/%d/%d", i%20, i/20%20, i))
		assert.NilError(t, os.MkdirAll(dir, 0o755))
		for j := range 10 {
			// Half of them up to 4 KiB, the mean 12.4 KB.
			size := random.IntN(4096)
			if j >= 5 {
				size = random.IntN(2 * 22_800)
			}
			assert.NilError(t, os.WriteFile(filepath.Join(dir, fmt.Sprint("file", j)), data[:size], 0o644))
		}
	}
	unix.Sync()
}

// BenchmarkCopy is to be read in pairs. Both sides end with all on disk.
func BenchmarkCopy(b *testing.B) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		b.Run(kind, func(b *testing.B) {
			dir := mounttest.Disk(b, kind, 16<<30)
			src := filepath.Join(dir, "src")
			assert.NilError(b, os.Mkdir(src, 0o755))
			ordinary(b, src)
			dst := filepath.Join(dir, "dst")
			remove := func(b *testing.B) {
				b.StopTimer()
				assert.NilError(b, os.RemoveAll(dst))
				unix.Sync()
				b.StartTimer()
			}
			reflink := "--reflink=auto"
			if kind != "ext4" {
				reflink = "--reflink=always"
			}
			b.Run("cp -a "+reflink, func(b *testing.B) {
				for b.Loop() {
					assert.NilError(b, exec.CommandContext(b.Context(), "cp", "-a", reflink, src, dst).Run())
					remove(b)
				}
			})
			b.Run("cp -a "+reflink+" and sync -f", func(b *testing.B) {
				for b.Loop() {
					assert.NilError(b, exec.CommandContext(b.Context(), "cp", "-a", reflink, src, dst).Run())
					assert.NilError(b, exec.CommandContext(b.Context(), "sync", "-f", dst).Run())
					remove(b)
				}
			})
			for name, options := range map[string]Options{"Copy": {}, "Copy without sync": {NoSync: true}, "Copy by one": {Parallel: 1}, "Copy by two": {Parallel: 2}, "Copy by four": {Parallel: 4}} {
				b.Run(name, func(b *testing.B) {
					for b.Loop() {
						_, err := Copy(b.Context(), open(b, src), mkdir(b, dst), options)
						assert.NilError(b, err)
						remove(b)
					}
				})
			}
		})
	}
}

// BenchmarkRemove removes copies of the same tree.
func BenchmarkRemove(b *testing.B) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		b.Run(kind, func(b *testing.B) {
			dir := mounttest.Disk(b, kind, 16<<30)
			src := filepath.Join(dir, "src")
			assert.NilError(b, os.Mkdir(src, 0o755))
			ordinary(b, src)
			top := open(b, dir)
			for name, remove := range map[string]func() error{
				"rm -rf":     func() error { return exec.CommandContext(b.Context(), "rm", "-rf", filepath.Join(dir, "dst")).Run() },
				"RemoveTree": func() error { return top.RemoveTree(b.Context(), "dst") },
				"Remove":     func() error { return Remove(b.Context(), top, "dst") },
			} {
				b.Run(name, func(b *testing.B) {
					for b.Loop() {
						b.StopTimer()
						_, err := Copy(b.Context(), open(b, src), mkdir(b, dir, "dst"), Options{})
						assert.NilError(b, err)
						b.StartTimer()
						assert.NilError(b, remove())
					}
				})
			}
		})
	}
}
