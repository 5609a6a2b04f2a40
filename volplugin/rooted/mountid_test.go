package rooted

import (
	"testing"

	"gotest.tools/v3/assert"
)

// Old and new kernels give the same number.
func TestBothWaysToTheMountIDAgree(t *testing.T) {
	for _, path := range []string{"/", "/proc", t.TempDir()} {
		dir, err := Open(path)
		assert.NilError(t, err)
		defer dir.Close()
		old, err := procMountID(dir.FD())
		assert.NilError(t, err)
		assert.Equal(t, dir.MountID(), old)
	}
}
