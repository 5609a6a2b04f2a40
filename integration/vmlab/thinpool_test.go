package vmlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/thin"
	"github.com/berth-plugin/berth/volplugin/loop"
)

// TestThinPool shows what becomes of a pool: over time, when it is full, when its
// devices are gone, and when they are the wrong ones.
func TestThinPool(t *testing.T) {
	InGuest(t, thinOptions(30*time.Minute), func(t *testing.T) {
		t.Run("device-mapper by ioctl", thinMapper)
		t.Run("cycles leave nothing", thinCycles)
		t.Run("full with ext4", func(t *testing.T) { thinFull(t, "ext4") })
		t.Run("cut off", thinCut)
		t.Run("devices are lost", thinLost)
		if !isFull() {
			return
		}
		t.Run("full with xfs", func(t *testing.T) { thinFull(t, "xfs") })
		t.Run("devices of the operator", thinDevices)
		t.Run("a small root", thinSmallRoot)
		t.Run("xfs gives up in a plugin too", thinRetries)
	})
}

// thinVolume describes a volume that is not there yet.
func thinVolume(name, kind string, mebi uint64) engine.Volume {
	return engine.Volume{Name: name, UUID: uuid.NewString(), FS: kind, Size: mebi << 20}
}

// createThin makes a volume, and attaches it until the test ends.
func createThin(t testing.TB, e *thin.Engine, p engine.Place, v engine.Volume) {
	t.Helper()
	created, err := e.Create(t.Context(), p, v, engine.Attributes{})
	assert.NilError(t, err)
	assert.Assert(t, created)
	assert.NilError(t, e.Attach(t.Context(), p, v))
	t.Cleanup(func() { assert.NilError(t, e.Detach(context.Background(), p, v)) })
}

// destroyThin removes a volume for good.
func destroyThin(t testing.TB, e *thin.Engine, p engine.Place, v engine.Volume) {
	t.Helper()
	assert.NilError(t, e.Detach(t.Context(), p, v))
	assert.NilError(t, e.Retire(t.Context(), p, v))
	assert.NilError(t, e.Destroy(t.Context(), p, v))
}

// inThin opens the data of a volume and gives its path, valid while f runs.
func inThin(t testing.TB, e *thin.Engine, p engine.Place, v engine.Volume, f func(path string)) {
	t.Helper()
	data, err := e.Open(p, v)
	assert.NilError(t, err)
	defer data.Close()
	f(data.ProcPath())
}

func thinMapper(t *testing.T) {
	c, err := devmapper.Open(t.TempDir())
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, c.Close()) })
	for kind, want := range map[string]bool{"linear": true, "thin": true, "no-such-thing": false} {
		has, err := c.HasTarget(kind)
		assert.NilError(t, err)
		assert.Equal(t, has, want, kind)
	}
	versions, err := c.Targets()
	assert.NilError(t, err)
	assert.Assert(t, versions["thin-pool"] != "", "%v", versions)
	below, err := devmapper.NumberOf(disk(t, 8<<20))
	assert.NilError(t, err)

	const name = "mapper-test"
	assert.NilError(t, c.Remove(name), "missing is an error")
	_, err = c.Find(name)
	assert.ErrorIs(t, err, os.ErrNotExist)
	dev, err := c.Create(name, "BERTH-TEST", false, devmapper.Linear(1024, below, 8), devmapper.Target{Start: 1024, Length: 512, Kind: "error"})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, c.Remove(name)) })
	_, err = c.Create(name, "BERTH-TEST2", false, devmapper.Linear(8, below, 0))
	assert.ErrorIs(t, err, os.ErrExist)
	assert.Equal(t, dev.UUID, "BERTH-TEST")
	assert.Assert(t, dev.Active && !dev.Suspended && !dev.ReadOnly && dev.Opened == 0, "%+v", dev)
	table, err := c.Table(name)
	assert.NilError(t, err)
	assert.DeepEqual(t, table, []devmapper.Target{devmapper.Linear(1024, below, 8), {Start: 1024, Length: 512, Kind: "error"}})
	list, err := c.List()
	assert.NilError(t, err)
	assert.Equal(t, list[name], dev.Number)

	f, err := os.OpenFile(c.NodePath(name), os.O_RDWR|unix.O_EXCL, 0)
	assert.NilError(t, err)
	_, err = f.ReadAt(make([]byte, 512), 1024*512)
	assert.ErrorIs(t, err, unix.EIO)
	assert.ErrorIs(t, c.Remove(name), unix.EBUSY)
	assert.NilError(t, f.Close())

	assert.NilError(t, c.Suspend(name))
	dev, err = c.Find(name)
	assert.NilError(t, err)
	assert.Assert(t, dev.Suspended)
	assert.NilError(t, c.Load(name, true, devmapper.Linear(2048, below, 0)))
	assert.NilError(t, c.Resume(name))
	assert.NilError(t, c.Resume(name))
	table, err = c.Table(name)
	assert.NilError(t, err)
	assert.DeepEqual(t, table, []devmapper.Target{devmapper.Linear(2048, below, 0)})

	// What cannot be loaded leaves no device.
	_, err = c.Create("mapper-bad", "", false, devmapper.Target{Length: 8, Kind: "no-such-thing"})
	assert.Assert(t, err != nil)
	_, err = c.Find("mapper-bad")
	assert.ErrorIs(t, err, os.ErrNotExist)

	// More devices than the first answer has room for.
	const many = 200
	t.Cleanup(func() {
		for i := range many {
			assert.NilError(t, c.Remove(fmt.Sprintf("mapper-%0100d", i)))
		}
	})
	for i := range many {
		_, err := c.Create(fmt.Sprintf("mapper-%0100d", i), "", false, devmapper.Error(8))
		assert.NilError(t, err)
	}
	list, err = c.List()
	assert.NilError(t, err)
	assert.Equal(t, len(list), many+1)
}

// Fifty times created, snapshotted, cloned and deleted: the pool is as before.
func thinCycles(t *testing.T) {
	e := newThinWith(t, thinSettings())
	p := thinPlace(t, t.TempDir(), t.TempDir())
	stays := thinVolume("stays", "ext4", 64)
	createThin(t, e, p, stays)
	cycle := func(name string) {
		v := thinVolume(name, "ext4", 64)
		createThin(t, e, p, v)
		inThin(t, e, p, v, func(path string) {
			assert.NilError(t, os.WriteFile(filepath.Join(path, "f"), bytes.Repeat([]byte("x"), 4<<20), 0o600))
		})
		_, err := e.Snapshot(t.Context(), p, v, "s", nil)
		assert.NilError(t, err)
		inThin(t, e, p, v, func(path string) {
			assert.NilError(t, os.WriteFile(filepath.Join(path, "f"), bytes.Repeat([]byte("y"), 4<<20), 0o600))
		})
		clone := thinVolume(name+"-clone", "ext4", 0)
		_, err = e.Clone(t.Context(), p, v, "s", clone, nil)
		assert.NilError(t, err)
		destroyThin(t, e, p, v)
		destroyThin(t, e, p, clone)
	}
	cycle("first")
	before, err := e.Pool(t.Context(), p)
	assert.NilError(t, err)
	for i := range 50 {
		cycle(fmt.Sprintf("v%d", i))
	}
	after, err := e.Pool(t.Context(), p)
	assert.NilError(t, err)
	assert.Equal(t, after.DataUsed, before.DataUsed)
	// Metadata is freed by the next transaction's end, and trees differ a little.
	assert.Assert(t, after.MetadataUsed <= before.MetadataUsed+64<<10, "%d, before %d", after.MetadataUsed, before.MetadataUsed)
	assert.Equal(t, after.Problem, "")
	destroyThin(t, e, p, stays)
	noThinDevices(t)
}

// dd writes until there is no room, as a program in a container, and says how it
// ended. It must not hang.
func dd(t testing.TB, path string, mebi int) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "dd", "if=/dev/urandom", "of="+path, "bs=1M", fmt.Sprintf("count=%d", mebi), "conv=fsync").CombinedOutput()
	assert.NilError(t, ctx.Err(), "writing into a full pool hangs: %s", out)
	return string(out), err
}

func thinFull(t *testing.T, kind string) {
	e := newThinWith(t, thin.Settings{DataSize: 512 << 20})
	p := thinPlace(t, t.TempDir(), t.TempDir())
	keeps, fills := thinVolume("keeps", kind, 1024), thinVolume("fills", kind, 1024)
	createThin(t, e, p, keeps)
	createThin(t, e, p, fills)
	path := func(v engine.Volume) (path string) {
		data, err := e.Open(p, v)
		assert.NilError(t, err)
		defer data.Close()
		real, err := os.Readlink(data.ProcPath())
		assert.NilError(t, err)
		return real
	}
	out, err := dd(t, filepath.Join(path(keeps), "f"), 16)
	assert.NilError(t, err, out)
	sum := func() string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "sha256sum", filepath.Join(path(keeps), "f")).Output()
		assert.NilError(t, err)
		return strings.Fields(string(out))[0]
	}
	want := sum()

	out, err = dd(t, filepath.Join(path(fills), "f"), 600)
	assert.Assert(t, err != nil, "600 MiB were written into a pool of 512 MiB: %s", out)
	assert.Assert(t, strings.Contains(out, "No space left") || strings.Contains(out, "Input/output error") || strings.Contains(out, "Read-only"), out)
	state, err := e.Pool(t.Context(), p)
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(state.Problem, "full"), "%+v", state)
	_, err = e.Create(t.Context(), p, thinVolume("more", kind, 1024), engine.Attributes{})
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
	_, err = e.Snapshot(t.Context(), p, keeps, "s", nil)
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
	usage, err := e.Usage(t.Context(), p, keeps)
	assert.NilError(t, err)
	assert.Assert(t, usage.Free < 32<<20, "%+v", usage)

	// Room again, and all is well.
	destroyThin(t, e, p, fills)
	state, err = e.Pool(t.Context(), p)
	assert.NilError(t, err)
	assert.Equal(t, state.Problem, "")
	assert.NilError(t, e.Detach(t.Context(), p, keeps))
	assert.NilError(t, e.Attach(t.Context(), p, keeps))
	assert.Equal(t, sum(), want)
	out, err = dd(t, filepath.Join(path(keeps), "g"), 64)
	assert.NilError(t, err, out)
	_, err = e.Snapshot(t.Context(), p, keeps, "s", nil)
	assert.NilError(t, err)
	destroyThin(t, e, p, keeps)
	noThinDevices(t)
}

// thinCut takes a volume from a program that writes to it. The others go on.
func thinCut(t *testing.T) {
	kinds := []string{"btrfs"}
	if isFull() {
		kinds = append(kinds, "ext4", "xfs")
	}
	for _, kind := range kinds {
		e := newThinWith(t, thinSettings())
		p := thinPlace(t, t.TempDir(), t.TempDir())
		v, other := thinVolume("web", kind, 320), thinVolume("other", "ext4", 64)
		assert.NilError(t, e.Cut(t.Context(), p, v), "not there")
		createThin(t, e, p, v)
		createThin(t, e, p, other)
		var program *os.File
		inThin(t, e, p, v, func(path string) {
			assert.NilError(t, os.WriteFile(filepath.Join(path, "kept"), []byte("kept"), 0o600))
			var err error
			program, err = os.Create(filepath.Join(path, "open"))
			assert.NilError(t, err)
			assert.NilError(t, unix.Syncfs(int(program.Fd())))
		})
		_, err := program.Write(make([]byte, 8<<20))
		assert.NilError(t, err)
		assert.NilError(t, e.Cut(t.Context(), p, v))
		assert.NilError(t, e.Cut(t.Context(), p, v), "again")
		err = program.Sync()
		assert.Assert(t, errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS), "%s: %v", kind, err)
		err = e.Attach(t.Context(), p, v)
		assert.Assert(t, errdefs.IsConflict(err), "%s: %v", kind, err)
		assert.NilError(t, program.Close())
		assert.NilError(t, e.Attach(t.Context(), p, v))
		inThin(t, e, p, v, func(path string) {
			data, err := os.ReadFile(filepath.Join(path, "kept"))
			assert.NilError(t, err)
			assert.Equal(t, string(data), "kept")
			assert.NilError(t, os.WriteFile(filepath.Join(path, "new"), []byte("new"), 0o600))
		})
		inThin(t, e, p, other, func(path string) {
			assert.NilError(t, os.WriteFile(filepath.Join(path, "new"), []byte("new"), 0o600))
		})
		assert.NilError(t, e.Cut(t.Context(), p, v))
		destroyThin(t, e, p, v)
		destroyThin(t, e, p, other)
	}
	noThinDevices(t)
}

// removeAll does what a reboot does to the devices of all pools.
func removeAll(t testing.TB, local string) {
	t.Helper()
	mounts, err := os.ReadDir(local)
	assert.NilError(t, err)
	for _, entry := range mounts {
		assert.NilError(t, unix.Unmount(filepath.Join(local, entry.Name()), 0))
		assert.NilError(t, os.Remove(filepath.Join(local, entry.Name())))
	}
	c, err := devmapper.Open(thin.DefaultNodes)
	assert.NilError(t, err)
	defer func() { _ = c.Close() }()
	// Pools last: their devices keep them.
	for _, pools := range []bool{false, true} {
		devices, err := c.List()
		assert.NilError(t, err)
		for name := range devices {
			if strings.HasSuffix(name, "-pool") == pools {
				assert.NilError(t, c.Remove(name))
			}
		}
	}
	devices, err := c.List()
	assert.NilError(t, err)
	assert.Equal(t, len(devices), 0)
}

func thinLost(t *testing.T) {
	root, local := t.TempDir(), t.TempDir()
	e := newThinWith(t, thinSettings())
	p := thinPlace(t, root, local)
	kinds := []string{"ext4", "xfs", "btrfs"}
	var volumes []engine.Volume
	for _, kind := range kinds {
		v := thinVolume(kind, kind, 320)
		createThin(t, e, p, v)
		volumes = append(volumes, v)
		inThin(t, e, p, v, func(path string) {
			assert.NilError(t, os.WriteFile(filepath.Join(path, "f"), []byte(kind), 0o600))
		})
		_, err := e.Snapshot(t.Context(), p, v, "s", nil)
		assert.NilError(t, err)
	}
	removeAll(t, local)
	file, err := os.Open(filepath.Join(root, ".berth/images/thin-data"))
	assert.NilError(t, err)
	defer file.Close()
	image, err := loop.FileOf(file)
	assert.NilError(t, err)
	assert.NilError(t, loop.Released(t.Context(), image))

	e = newThinWith(t, thinSettings())
	assert.NilError(t, e.Recover(t.Context()))
	for i, v := range volumes {
		_, err := e.Open(p, v)
		assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
		assert.NilError(t, e.Attach(t.Context(), p, v))
		assert.NilError(t, e.Attach(t.Context(), p, v))
		inThin(t, e, p, v, func(path string) {
			got, err := os.ReadFile(filepath.Join(path, "f"))
			assert.NilError(t, err)
			assert.Equal(t, string(got), kinds[i])
		})
		data, err := e.OpenSnapshot(t.Context(), p, v, "s")
		assert.NilError(t, err)
		got, err := os.ReadFile(filepath.Join(data.ProcPath(), "f"))
		assert.NilError(t, err)
		assert.Equal(t, string(got), kinds[i])
		assert.NilError(t, data.Close())
		// Used by somebody, it stays.
		data, err = e.OpenSnapshot(t.Context(), p, v, "s")
		assert.NilError(t, err)
		err = e.CloseSnapshot(t.Context(), p, v, "s")
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		err = e.RemoveSnapshot(t.Context(), p, v, "s")
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		got, err = os.ReadFile(filepath.Join(data.ProcPath(), "f"))
		assert.NilError(t, err)
		assert.Equal(t, string(got), kinds[i])
		assert.NilError(t, data.Close())
		assert.NilError(t, e.CloseSnapshot(t.Context(), p, v, "s"))
		destroyThin(t, e, p, v)
	}
	noThinDevices(t)
}

func thinDevices(t *testing.T) {
	data, metadata := disk(t, 512<<20), disk(t, 16<<20)
	settings := thin.Settings{Data: data, Metadata: metadata}
	e := newThinWith(t, settings)
	root := t.TempDir()
	p := thinPlace(t, root, t.TempDir())
	v := thinVolume("web", "ext4", 64)

	// A disk that holds something is left alone.
	sh(t, "mkfs.ext4 -q "+data)
	_, err := e.Create(t.Context(), p, v, engine.Attributes{})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "is not empty")
	sh(t, "e2fsck -fn "+data)
	sh(t, "dd if=/dev/zero bs=1M count=1 conv=fsync of="+data)
	createThin(t, e, p, v)
	inThin(t, e, p, v, func(path string) {
		assert.NilError(t, os.WriteFile(filepath.Join(path, "f"), []byte("x"), 0o600))
	})
	assert.NilError(t, e.Detach(t.Context(), p, v))

	// Another root does not get it.
	other := thinPlace(t, t.TempDir(), t.TempDir())
	_, err = e.Create(t.Context(), other, thinVolume("web", "ext4", 64), engine.Attributes{})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)

	// Without the settings, and with the wrong devices, it says so.
	err = newThinWith(t, thin.Settings{}).Attach(t.Context(), p, v)
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, data)
	wrong := thin.Settings{Data: disk(t, 512<<20), Metadata: disk(t, 16<<20)}
	_, err = newThinWith(t, wrong).Create(t.Context(), other, thinVolume("web", "ext4", 64), engine.Attributes{})
	assert.NilError(t, err)
	err = newThinWith(t, thin.Settings{Data: data, Metadata: metadata + "0"}).Attach(t.Context(), p, v)
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	unused := disk(t, 16<<20)
	err = newThinWith(t, thin.Settings{Data: data, Metadata: unused}).Attach(t.Context(), p, v)
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "is empty")
	sh(t, "cmp -n 16777216 "+unused+" /dev/zero") // and stays so
	noThinDevices(t)
	third := thinPlace(t, t.TempDir(), t.TempDir())
	theirs := thin.Settings{Data: disk(t, 512<<20), Metadata: disk(t, 16<<20)}
	_, err = newThinWith(t, theirs).Create(t.Context(), third, thinVolume("web", "ext4", 64), engine.Attributes{})
	assert.NilError(t, err)
	err = newThinWith(t, thin.Settings{Data: data, Metadata: theirs.Metadata}).Attach(t.Context(), p, v)
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "another pool")

	assert.NilError(t, e.Attach(t.Context(), p, v))
	inThin(t, e, p, v, func(path string) {
		got, err := os.ReadFile(filepath.Join(path, "f"))
		assert.NilError(t, err)
		assert.Equal(t, string(got), "x")
	})
	// Two numbers are never the same, and metadata is sound.
	assert.NilError(t, e.Detach(t.Context(), p, v))
	sh(t, "thin_check -q "+metadata)
}

func thinSmallRoot(t *testing.T) {
	e := newThinWith(t, thin.Settings{})
	p := thinPlace(t, mountDisk(t, mkfs(t, disk(t, 128<<20)), "noatime"), t.TempDir())
	_, err := e.Create(t.Context(), p, thinVolume("web", "ext4", 64), engine.Attributes{})
	assert.Assert(t, errdefs.IsResourceExhausted(err), "%v", err)
	entries, err := os.ReadDir(filepath.Join(p.Root.Path(), ".berth/images"))
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 0)
	for _, dir := range []interface{ Close() error }{p.Root, p.Images, p.Snapshots, p.Trash, p.Tmp} {
		assert.NilError(t, dir.Close())
	}
}

// A plugin's /sys is mounted read-only.
func thinRetries(t *testing.T) {
	assert.NilError(t, unix.Mount("", "/sys", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	t.Cleanup(func() { assert.NilError(t, unix.Mount("", "/sys", "", unix.MS_REMOUNT|unix.MS_BIND, "")) })
	e := newThinWith(t, thinSettings())
	p := thinPlace(t, t.TempDir(), t.TempDir())
	createThin(t, e, p, thinVolume("web", "xfs", 320))
	files, err := filepath.Glob("/sys/fs/xfs/dm-*/error/metadata/*/retry_timeout_seconds")
	assert.NilError(t, err)
	assert.Assert(t, len(files) >= 3, "%v", files)
	limits := map[string]string{}
	for _, file := range files {
		value, err := os.ReadFile(file)
		assert.NilError(t, err)
		limits[filepath.Base(filepath.Dir(file))] = strings.TrimSpace(string(value))
	}
	for _, kind := range []string{"ENOSPC", "EIO", "default"} {
		assert.Equal(t, limits[kind], "30", kind)
	}
}

// mkfs makes an ext4 file system and returns the device.
func mkfs(t testing.TB, device string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", device).CombinedOutput()
	assert.NilError(t, err, "%s", out)
	return device
}
