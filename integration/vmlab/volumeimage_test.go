package vmlab

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/vmlab/guest"
)

// TestImages runs tests of volumes in image files with the guest's older kernel, and
// with the right to let an ext4 file system grow, which many build machines withhold.
func TestImages(t *testing.T) {
	onlyFull(t)
	tests := map[string]string{
		"filesystem":   "^Test(Grow|Shrink|Freeze|Copy|Damaged)",
		"loop":         "^Test(Attach|Capacity|Second|Processes|Nodes)",
		"engine/image": "^Test(Grow|Shrink|Busy|LeftFrozen|Clone|Root|Processes|Cut)",
	}
	files := binariesOfTests(t, slices.Collect(maps.Keys(tests))...)
	InGuest(t, Options{Files: files, Modules: []string{"loop", "btrfs", "xfs"}, Timeout: 20 * time.Minute}, func(t *testing.T) {
		for name, pattern := range tests {
			t.Run(name, func(t *testing.T) {
				cmd := exec.CommandContext(t.Context(), filepath.Join(Dir, filepath.Base(name)+".test"), "-test.v", "-test.run", pattern)
				cmd.Dir = t.TempDir()
				out, err := cmd.CombinedOutput()
				t.Logf("%s", out)
				assert.NilError(t, err)
			})
		}
	})
}

// TestImagesOnNFS has them on a share: space is reserved, names are moved and files
// are locked in other ways there.
func TestImagesOnNFS(t *testing.T) {
	onlyFull(t)
	files := binariesOfTests(t, "engine/image")
	InGuest(t, Options{Files: files, Modules: []string{"bridge", "btrfs", "loop", "nfsd", "nfsv4", "veth", "xfs"}, Timeout: 20 * time.Minute}, func(t *testing.T) {
		lan := guest.NewLAN(t)
		server := lan.NewNFSServer(t, "server")
		client := lan.NewNode(t, "client")
		client.MountExport(server, "/srv/nfs")
		for _, pattern := range []string{"SparseShrinks", "ImageHas", "Grow", "Busy", "LeftFrozen", "ProcessesAttach"} {
			r := client.TryFor(5*time.Minute, "env", "BERTH_TEST_IMAGE_ROOT=/srv/nfs", "TMPDIR=/tmp",
				filepath.Join(Dir, "image.test"), "-test.v", "-test.run", "^Test"+pattern)
			t.Logf("%s", r.Out)
			assert.NilError(t, r.Err, pattern)
		}
	})
}

// binariesOfTests compiles the tests of packages of volplugin for the guest.
func binariesOfTests(t *testing.T, packages ...string) map[string]string {
	t.Helper()
	files := map[string]string{}
	if os.Getenv(guestEnv) != "" {
		return files
	}
	for _, name := range packages {
		binary := filepath.Join(t.TempDir(), filepath.Base(name)+".test")
		assert.NilError(t, goTool(t.Context(), "test", "-c", "-o", binary, "github.com/berth-plugin/berth/volplugin/"+name))
		files[filepath.Base(binary)] = binary
	}
	return files
}
