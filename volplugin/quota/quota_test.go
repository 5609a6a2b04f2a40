package quota_test

import (
	"os"
	"testing"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/quota"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

// Where there are no project quotas that is said in words, and nothing else errs. With
// them the package is tested in the VM lab (TestQuota in integration/vmlab).
func TestWithoutQuotas(t *testing.T) {
	for name, path := range map[string]string{
		"tmpfs": mounttest.Tmpfs(t, 1<<20), "ext4": mounttest.Disk(t, "ext4", 1<<28), "xfs": mounttest.Disk(t, "xfs", 1<<30),
		"btrfs": mounttest.Disk(t, "btrfs", 1<<28),
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := rooted.Open(path)
			assert.NilError(t, err)
			defer dir.Close()
			err = quota.Supported(dir)
			assert.ErrorIs(t, err, quota.ErrUnsupported)
			project, err := quota.Project(dir)
			assert.NilError(t, err)
			assert.Equal(t, project, uint32(0))
			_, known, err := quota.Get(dir)
			assert.NilError(t, err)
			assert.Assert(t, !known)
		})
	}
}
