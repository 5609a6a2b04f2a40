package vmlab

import (
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// TestSubvolumes runs tests of volumes on btrfs with the guest's older kernel, which
// knows no simple quotas and leaves the quota groups of deleted subvolumes behind.
func TestSubvolumes(t *testing.T) {
	onlyFull(t)
	files := binariesOfTests(t, "engine/btrfs")
	InGuest(t, Options{Files: files, Modules: []string{"loop", "btrfs"}, Timeout: 20 * time.Minute}, func(t *testing.T) {
		for _, pattern := range []string{
			"^Test(Quotas|TheFirst|FirstLimits|Copies|NoQuota|AQuota|Subvolumes|ASnapshot|ARoot|Waiting|NewFiles|AReadOnly|AnOrdinary)",
			"^TestConformance$/(survive|a_size|volumes_live|usage|rename)",
		} {
			cmd := exec.CommandContext(t.Context(), filepath.Join(Dir, "btrfs.test"), "-test.v", "-test.run", pattern)
			cmd.Dir = t.TempDir()
			out, err := cmd.CombinedOutput()
			t.Logf("%s", out)
			assert.NilError(t, err)
		}
	})
}
