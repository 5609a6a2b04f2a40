package mount

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// openStage opens a stage whose host is this process, and unmounts it at the end.
func openStage(t *testing.T, dir, hostMounts string) *Stage {
	t.Helper()
	s, err := OpenStage(dir, hostMounts)
	assert.NilError(t, err)
	t.Cleanup(func() {
		if err := unix.Unmount(s.Base(), unix.MNT_DETACH); err != nil && err != unix.EINVAL {
			t.Error(err)
		}
	})
	return s
}

func TestStageIsMountedOnce(t *testing.T) {
	dir := t.TempDir()
	first := openStage(t, dir, "")
	assert.NilError(t, os.Mkdir(filepath.Join(first.Base(), "db"), 0o700))
	second := openStage(t, dir, "")
	_, err := os.Stat(filepath.Join(second.Base(), "db"))
	assert.NilError(t, err, "a second tmpfs hides the first")
	assert.NilError(t, unix.Unmount(first.Base(), 0))
	entries, err := os.ReadDir(first.Base())
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 0, "mount points are below the tmpfs, where the host would see them")
}

func TestHostThatHasTheMountSeesIt(t *testing.T) {
	s := openStage(t, t.TempDir(), "/proc/self/mountinfo")
	seen, known, err := s.Seen()
	assert.NilError(t, err)
	assert.Assert(t, seen && known)
}

func TestHostThatLacksTheMountDoesNotSeeIt(t *testing.T) {
	// What the host had before the stage was there is what it has when the
	// plugin's mounts do not reach it.
	before, err := os.ReadFile("/proc/self/mountinfo")
	assert.NilError(t, err)
	host := filepath.Join(t.TempDir(), "mountinfo")
	assert.NilError(t, os.WriteFile(host, before, 0o600))
	s := openStage(t, t.TempDir(), host)
	seen, known, err := s.Seen()
	assert.NilError(t, err)
	assert.Assert(t, !seen && known)
}

func TestUnmountedStageIsNotSeen(t *testing.T) {
	s := openStage(t, t.TempDir(), "/proc/self/mountinfo")
	assert.NilError(t, unix.Unmount(s.Base(), 0))
	seen, known, err := s.Seen()
	assert.NilError(t, err)
	assert.Assert(t, !seen && known)
}

func TestWithoutTheHostsMountsNothingIsKnown(t *testing.T) {
	_, known, err := openStage(t, t.TempDir(), "").Seen()
	assert.NilError(t, err)
	assert.Assert(t, !known)
}

func TestOtherMountInItsPlaceIsRefused(t *testing.T) {
	dir := t.TempDir()
	assert.NilError(t, os.Mkdir(filepath.Join(dir, stageName), 0o700))
	assert.NilError(t, unix.Mount(dir, filepath.Join(dir, stageName), "", unix.MS_BIND, ""))
	t.Cleanup(func() { assert.Check(t, unix.Unmount(filepath.Join(dir, stageName), 0) == nil) })
	_, err := OpenStage(dir, "")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
}
