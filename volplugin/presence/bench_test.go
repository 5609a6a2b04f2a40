package presence

import (
	"testing"

	"github.com/google/uuid"
	"gotest.tools/v3/assert"
)

// What a shared root adds to the first Mount of a volume.
func BenchmarkEnter(b *testing.B) {
	h := newHost(b, b.TempDir(), "a")
	h.beat()
	for b.Loop() {
		volume := uuid.NewString()
		assert.NilError(b, h.Enter(b.Context(), volume))
		h.Leave(volume)
	}
}

func BenchmarkAcquireAndRelease(b *testing.B) {
	h, volume := newHost(b, b.TempDir(), "a"), uuid.NewString()
	h.beat()
	for b.Loop() {
		assert.NilError(b, h.take(volume))
		assert.NilError(b, h.Release(b.Context(), volume))
	}
}

// A heartbeat of a host with a hundred volumes and ten leases, among twenty hosts.
func BenchmarkBeat(b *testing.B) {
	root := b.TempDir()
	h := newHost(b, root, "a")
	for i := range 20 {
		newHost(b, root, string(rune('b'+i))).beat()
	}
	for range 10 {
		assert.NilError(b, h.take(uuid.NewString()))
	}
	for range 100 {
		assert.NilError(b, h.Enter(b.Context(), uuid.NewString()))
	}
	for b.Loop() {
		h.beat()
	}
}
