package volplugin

import (
	"testing"

	"gotest.tools/v3/assert"
)

// What Get takes without the socket. The state file and the root are on the disk that has
// the temporary directory.
func BenchmarkGet(b *testing.B) {
	h := newHost(b, b.TempDir(), nil)
	assert.NilError(b, h.create("web"))
	for b.Loop() {
		if _, err := h.get("web"); err != nil {
			b.Fatal(err)
		}
	}
}

// A container that starts and ends, as far as its volume is concerned.
func BenchmarkMountAndUnmount(b *testing.B) {
	h := newHost(b, b.TempDir(), nil)
	assert.NilError(b, h.create("web"))
	for b.Loop() {
		if _, err := h.mount("web", "one"); err != nil {
			b.Fatal(err)
		}
		if err := h.unmount("web", "one"); err != nil {
			b.Fatal(err)
		}
	}
}
