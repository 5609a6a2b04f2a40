package vmlab

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/enginetest"
	"github.com/berth-plugin/berth/volplugin/engine/thin"
)

func thinModules() []string { return []string{"loop", "dm_thin_pool", "xfs", "btrfs", "zram"} }

// zramRoot mounts 14 GiB that take memory only for what is not zeros: a new xfs
// volume writes 64 MiB of them.
func zramRoot(t testing.TB) string {
	t.Helper()
	assert.NilError(t, os.WriteFile("/sys/block/zram0/disksize", []byte("14G"), 0))
	dir := t.TempDir()
	for _, args := range [][]string{
		{"mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "/dev/zram0"},
		{"mount", "/dev/zram0", dir},
	} {
		out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
		assert.NilError(t, err, "%s: %s", args, out)
	}
	t.Cleanup(func() {
		assert.NilError(t, unix.Unmount(dir, 0))
		assert.NilError(t, os.WriteFile("/sys/block/zram0/reset", []byte("1"), 0))
	})
	return dir
}

// newThin makes an engine whose pools are on sparse files of 12 GiB.
func newThin(t testing.TB) *thin.Engine {
	t.Helper()
	e, err := thin.New(thin.Settings{DataSize: 12 << 30, Sparse: true})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, e.Close()) })
	return e
}

// fullEnv asks for the tests that take ten minutes and more, as scripts/test --full does.
const fullEnv = "BERTH_VM_FULL"

// thinOptions are those of a guest that knows whether fullEnv is set.
func thinOptions(timeout time.Duration) Options {
	options := Options{Modules: thinModules(), Timeout: timeout}
	if os.Getenv(fullEnv) != "" {
		options.Files = map[string]string{fullMark: "vmlab.go"}
	}
	return options
}

// isFull tells in a guest whether fullEnv was set.
func isFull() bool {
	_, err := os.Stat(filepath.Join(Dir, fullMark))
	return err == nil
}

// onlyFull skips a test, on the host, unless fullEnv asks for it.
func onlyFull(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(Dir); err != nil && os.Getenv(fullEnv) == "" {
		t.Skipf("takes long: runs with %s=1", fullEnv) //nolint:forbidigo // scripts/test --full runs it
	}
}

// fullMark is the file that tells a guest of fullEnv.
const fullMark = "thin-full"

// TestThinSuite runs the conformance suite, on the file system that is made fastest
// or on all.
func TestThinSuite(t *testing.T) {
	onlyFull(t)
	InGuest(t, thinOptions(50*time.Minute), func(t *testing.T) {
		kinds := []string{"ext4"}
		if isFull() {
			kinds = append(kinds, "xfs", "btrfs")
		}
		for _, kind := range kinds {
			t.Run(kind, func(t *testing.T) { thinSuite(t, kind) })
		}
	})
}

func thinSuite(t *testing.T, kind string) {
	roots := zramRoot(t)
	enginetest.Run(t, newThin(t), func(t testing.TB) engine.Place {
		root := filepath.Join(roots, uuid.NewString())
		assert.NilError(t, os.Mkdir(root, 0o755))
		t.Cleanup(func() { assert.NilError(t, os.RemoveAll(root)) })
		return enginetest.NewPlace(t, root)
	}, enginetest.Template(engine.Volume{FS: kind, Size: 320 << 20}), enginetest.Files(thinPointer))
	noThinDevices(t)
}

// thinPointer is the file that a volume of the engine is.
func thinPointer(p engine.Place, name string) string {
	dir := filepath.Join(p.Root.Path(), ".berth/thin/volumes")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		panic(err)
	}
	return filepath.Join(dir, name+".json")
}

// noThinDevices checks that nothing of a pool is left on the host.
func noThinDevices(t testing.TB) {
	t.Helper()
	out, err := os.ReadDir("/dev/berth")
	assert.NilError(t, err)
	for _, entry := range out {
		assert.Assert(t, !strings.HasPrefix(entry.Name(), "berth-"), "device %s was left", entry.Name())
	}
}
