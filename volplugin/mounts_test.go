package volplugin

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

func TestACopyToARunningContainerLeavesItMounted(t *testing.T) {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.create("web"))
	_, err := h.mount("web", "run")
	assert.NilError(t, err)
	// docker cp sends the container's own ID.
	_, err = h.mount("web", "run")
	assert.NilError(t, err)
	assert.DeepEqual(t, h.mountsBelow(), []string{"web"})
	assert.NilError(t, h.unmount("web", "run"))
	assert.DeepEqual(t, h.mountsBelow(), []string{"web"})
	_, err = h.mount("web", "second")
	assert.NilError(t, err)
	assert.NilError(t, h.unmount("web", "run"))
	assert.DeepEqual(t, h.mountsBelow(), []string{"web"})
	assert.NilError(t, h.unmount("web", "second"))
	assert.Equal(t, len(h.mountsBelow()), 0)
}

func TestUnmountOfTheUnknownSucceeds(t *testing.T) {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.unmount("never", "id"))
	assert.NilError(t, h.create("web"))
	assert.NilError(t, h.unmount("web", "never"))
	_, err := h.mount("web", "id")
	assert.NilError(t, err)
	assert.NilError(t, h.unmount("web", "never"))
	assert.DeepEqual(t, h.mountsBelow(), []string{"web"})
}

func TestMountOfTheUnknownFailsAndMakesNothing(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	_, err := h.mount("web", "id")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.NilError(t, h.create("other"))
	_, err = h.mount("web", "id")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.Assert(t, !exists(filepath.Join(root, "web")))
	assert.Equal(t, len(h.mountsBelow()), 0)
}

func TestRemoveIsRefusedWhileMounted(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web", "on-remove=purge"))
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	write(t, filepath.Join(path, "f"), "x")
	err = h.remove("web")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	h.expire(t.Context())
	assert.Equal(t, read(t, filepath.Join(path, "f")), "x")
	assert.NilError(t, h.unmount("web", "id"))
	assert.NilError(t, h.remove("web"))
}

// The mounts are in the host's propagated mount and outlive the process.
func TestTheProcessIsKilled(t *testing.T) {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.create("web"))
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	write(t, filepath.Join(path, "f"), "x")
	h.restart()
	assert.DeepEqual(t, h.mountsBelow(), []string{"web"})
	assert.Assert(t, errdefs.IsConflict(h.remove("web")))
	_, err = h.mount("web", "other")
	assert.NilError(t, err)
	assert.DeepEqual(t, h.mountsBelow(), []string{"web"})
	assert.NilError(t, h.unmount("web", "id"))
	assert.DeepEqual(t, h.mountsBelow(), []string{"web"})
	h.restart()
	assert.NilError(t, h.unmount("web", "other"))
	assert.Equal(t, len(h.mountsBelow()), 0)
	assert.NilError(t, h.remove("web"))
}

// dockerd was killed: it drops the host's mounts, sends no Unmount, and sends
// Mount with the same IDs again.
func TestTheEngineIsKilled(t *testing.T) {
	for _, restart := range []bool{true, false} {
		t.Run(fmt.Sprintf("plugin restarts %v", restart), func(t *testing.T) {
			h := newHost(t, t.TempDir(), nil)
			assert.NilError(t, h.create("web"))
			for range 5 {
				for _, id := range []string{"a", "b"} {
					_, err := h.mount("web", id)
					assert.NilError(t, err)
				}
				assert.DeepEqual(t, h.mountsBelow(), []string{"web"})
				h.unmountAll()
				if restart {
					h.restart()
				}
			}
			_, err := h.mount("web", "a")
			assert.NilError(t, err)
			assert.NilError(t, h.unmount("web", "a"))
			assert.Equal(t, len(h.mountsBelow()), 0, "a count has leaked")
			assert.NilError(t, h.remove("web"))
		})
	}
}

func TestARebootVoidsAllCounts(t *testing.T) {
	for _, base := range []bool{true, false} {
		boot := "boot-1"
		h := newHost(t, t.TempDir(), func(c *Config) {
			c.BootID = func() (string, error) { return boot, nil }
			if !base {
				c.MountBase = ""
			}
		})
		assert.NilError(t, h.create("web"))
		_, err := h.mount("web", "id")
		assert.NilError(t, err)
		assert.Equal(t, h.status("web")["mounts"], 1.0)
		h.unmountAll()
		boot = "boot-2"
		h.restart()
		assert.Equal(t, h.status("web")["mounts"], 0.0)
		assert.NilError(t, h.remove("web"))
	}
}

func TestAMountThatNobodyCountsIsUnmounted(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web"))
	write(t, filepath.Join(root, "web", "f"), "x")
	point := filepath.Join(h.dir, "mnt", "web")
	assert.NilError(t, os.Mkdir(point, 0))
	for range 2 { // two layers, as a naive restart would leave
		assert.NilError(t, unix.Mount(filepath.Join(root, "web"), point, "", unix.MS_BIND, ""))
	}
	assert.NilError(t, os.Mkdir(filepath.Join(h.dir, "mnt", "left"), 0))
	assert.NilError(t, os.Mkdir(filepath.Join(h.dir, "mnt", "full"), 0o700))
	write(t, filepath.Join(h.dir, "mnt", "full", "f"), "x")
	h.restart()
	assert.Equal(t, len(h.mountsBelow()), 0)
	assert.Equal(t, read(t, filepath.Join(root, "web", "f")), "x")
	assert.Assert(t, !exists(point))
	assert.Assert(t, !exists(filepath.Join(h.dir, "mnt", "left")))
	assert.Equal(t, read(t, filepath.Join(h.dir, "mnt", "full", "f")), "x")
}

func TestABusyMountIsNotTakenAway(t *testing.T) {
	h := newHost(t, t.TempDir(), nil)
	assert.NilError(t, h.create("web"))
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	open, err := os.Create(filepath.Join(path, "f"))
	assert.NilError(t, err)
	err = h.unmount("web", "id")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.DeepEqual(t, h.mountsBelow(), []string{"web"})
	assert.NilError(t, open.Close())
	h.tend(t.Context())
	assert.Equal(t, len(h.mountsBelow()), 0)
}

// A mount of an earlier volume of the name is not what a container gets.
func TestAStaleMountIsReplacedAndACountedOneIsNot(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web"))
	_, err := h.mount("web", "id")
	assert.NilError(t, err)
	assert.NilError(t, os.Rename(filepath.Join(root, "web"), filepath.Join(root, "moved")))
	assert.NilError(t, os.Mkdir(filepath.Join(root, "web"), 0o755))
	_, err = h.mount("web", "id")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.DeepEqual(t, h.mountsBelow(), []string{"web"})

	assert.NilError(t, h.ledger.setMounts("web", volumeMounts{}))
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	write(t, filepath.Join(path, "f"), "x")
	assert.Equal(t, read(t, filepath.Join(root, "web", "f")), "x")
	assert.DeepEqual(t, h.mountsBelow(), []string{"web"})
}

// plugin rm -f deletes the propagated mount's directory after a lazy unmount;
// nothing of the data is below it.
func TestRemovingTheMountsDirectoryLeavesTheData(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web"))
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	write(t, filepath.Join(path, "f"), "x")
	h.unmountAll()
	assert.NilError(t, os.RemoveAll(filepath.Join(h.dir, "mnt")))
	h.restart()
	path, err = h.mount("web", "id")
	assert.NilError(t, err)
	assert.Equal(t, read(t, filepath.Join(path, "f")), "x")
}

// A mount that comes into the trash from outside is not deleted through.
func TestTheTrashIsNotEmptiedThroughAMount(t *testing.T) {
	root, precious := t.TempDir(), t.TempDir()
	write(t, filepath.Join(precious, "f"), "x")
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web", "on-remove=purge"))
	sub := filepath.Join(root, "web", "a", "sub")
	assert.NilError(t, os.MkdirAll(sub, 0o755))
	assert.NilError(t, os.Symlink(precious, filepath.Join(root, "web", "link")))
	assert.NilError(t, unix.Mount(precious, sub, "", unix.MS_BIND, ""))
	assert.NilError(t, h.remove("web"))
	h.expire(t.Context())
	assert.Equal(t, read(t, filepath.Join(precious, "f")), "x")
	moved, err := filepath.Glob(filepath.Join(root, ".berth/*/*/a/sub"))
	assert.NilError(t, err)
	assert.NilError(t, unix.Unmount(moved[0], unix.MNT_DETACH))
	h.expire(t.Context())
	assert.DeepEqual(t, trash(t, root), []string{})
	assert.Equal(t, read(t, filepath.Join(precious, "f")), "x")
}

// On the host there is no mount of Berth's own to look at; a container's is.
func TestUnmanagedRemoveLooksForContainers(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, func(c *Config) { c.MountBase = "" })
	assert.NilError(t, h.create("web"))
	assert.NilError(t, os.Mkdir(filepath.Join(root, "web", "sub"), 0o755))
	_, err := h.mount("web", "id")
	assert.NilError(t, err)

	for _, sub := range []string{"", "sub"} {
		container := exec.CommandContext(t.Context(), "sleep", "60")
		container.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		target := t.TempDir()
		// The bind is inherited by the container's namespace and then taken away here.
		assert.NilError(t, unix.Mount(filepath.Join(root, "web", sub), target, "", unix.MS_BIND, ""))
		assert.NilError(t, container.Start())
		waitForNamespace(t, container.Process.Pid)
		assert.NilError(t, unix.Unmount(target, unix.MNT_DETACH))

		err = h.remove("web")
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.NilError(t, container.Process.Kill())
		_ = container.Wait() // it was killed
	}
	// The count alone, which dockerd never took back, does not hinder.
	assert.NilError(t, h.remove("web"))
	assert.Equal(t, len(h.list()), 0)
}

// waitForNamespace waits until the child has left this mount namespace.
func waitForNamespace(t *testing.T, pid int) {
	t.Helper()
	own, err := os.Readlink("/proc/self/ns/mnt")
	assert.NilError(t, err)
	for range 200 {
		if other, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid)); err == nil && other != own {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the child did not get a mount namespace")
}
