package volume

import (
	"fmt"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/options"
)

func benchRoot(b *testing.B) *Root {
	b.Helper()
	l := location(mounttest.Tmpfs(b, 256<<20), "a")
	root, err := l.Init(b.Context(), "")
	assert.NilError(b, err)
	b.Cleanup(func() { assert.NilError(b, root.Close()) })
	return root
}

// What Berth itself takes of a create and a remove, with a disk that takes nothing.
func BenchmarkCreateAndRemove(b *testing.B) {
	root := benchRoot(b)
	for i := 0; b.Loop(); i++ {
		name := fmt.Sprintf("v%d", i)
		if _, err := root.Create(b.Context(), name, options.Spec{}); err != nil {
			b.Fatal(err)
		}
		if err := root.Remove(b.Context(), name); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEntriesOfTenThousand(b *testing.B) {
	root := benchRoot(b)
	for i := range 10_000 {
		if _, err := root.Create(b.Context(), fmt.Sprintf("v%d", i), options.Spec{}); err != nil {
			b.Fatal(err)
		}
	}
	known, err := root.Entries(b.Context(), nil)
	assert.NilError(b, err)
	b.Run("unknown", func(b *testing.B) {
		for b.Loop() {
			if _, err := root.Entries(b.Context(), nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("known", func(b *testing.B) {
		for b.Loop() {
			if _, err := root.Entries(b.Context(), known); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkSnapshotOfASmallVolume(b *testing.B) {
	root := benchRoot(b)
	_, err := root.Create(b.Context(), "web", options.Spec{})
	assert.NilError(b, err)
	for b.Loop() {
		snap, err := root.CreateSnapshot(b.Context(), "web", SnapshotOptions{}, nil)
		if err != nil {
			b.Fatal(err)
		}
		if err := root.RemoveSnapshot(b.Context(), "web", snap.Name); err != nil {
			b.Fatal(err)
		}
	}
}
