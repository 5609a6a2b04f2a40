package filesystem

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/loop"
)

// freezeEnv makes this program freeze the named directory, say so and wait to be
// killed.
const freezeEnv = "BERTH_TEST_FREEZE"

func TestMain(m *testing.M) {
	if Watchdog() {
		return
	}
	if dir := os.Getenv(freezeEnv); dir != "" {
		freezeAndWait(dir)
	}
	os.Exit(mounttest.Main(m))
}

func freezeAndWait(path string) {
	dir, err := os.Open(path)
	if err == nil {
		_, err = Freeze(context.Background(), int(dir.Fd()), time.Minute)
	}
	if err != nil {
		_, _ = os.Stdout.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	_, _ = os.Stdout.WriteString("frozen\n")
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(2)
}

// mountImage mounts the file system in the image until the test ends.
func mountImage(t testing.TB, image string, o MountOptions) string {
	t.Helper()
	info, err := IdentifyFile(image)
	assert.NilError(t, err)
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	assert.NilError(t, err)
	id, err := loop.FileOf(f)
	assert.NilError(t, err)
	device, err := loop.Attach(t.Context(), f, o.ReadOnly)
	assert.NilError(t, err)
	target := t.TempDir()
	err = Mount(device.Path(), info.Kind, target, o)
	assert.NilError(t, device.Close())
	t.Cleanup(func() {
		assert.Check(t, Unmount(target))
		assert.Check(t, loop.Released(context.WithoutCancel(t.Context()), id))
		assert.Check(t, f.Close())
	})
	assert.NilError(t, err)
	return target
}

func open(t testing.TB, dir string) int {
	t.Helper()
	f, err := os.Open(dir)
	assert.NilError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return int(f.Fd())
}

func eachKind(t *testing.T, test func(t *testing.T, kind Kind, image string)) {
	for _, kind := range Kinds {
		t.Run(string(kind), func(t *testing.T) {
			image := newImage(t, 512<<20)
			assert.NilError(t, Make(t.Context(), kind, image, MakeOptions{Zeroed: true}))
			test(t, kind, image)
		})
	}
}

func capacity(t testing.TB, fd int) uint64 {
	t.Helper()
	var st unix.Statfs_t
	assert.NilError(t, unix.Fstatfs(fd, &st))
	return st.Blocks * uint64(st.Bsize)
}

func TestGrowWhileWritten(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind, image string) {
		dir := mountImage(t, image, MountOptions{})
		fd := open(t, dir)
		before := capacity(t, fd)
		var stop atomic.Bool
		var writer sync.WaitGroup
		writer.Go(func() {
			for i := 0; !stop.Load(); i++ {
				path := filepath.Join(dir, "f"+strconv.Itoa(i%50))
				assert.Check(t, os.WriteFile(path, make([]byte, 100_000), 0o600))
			}
		})
		f, err := os.OpenFile(image, os.O_RDWR, 0)
		assert.NilError(t, err)
		defer f.Close()
		const size = 1 << 30
		assert.NilError(t, f.Truncate(size))
		assert.NilError(t, loop.SetCapacity(f))
		err = Grow(t.Context(), fd, kind, size)
		again := Grow(t.Context(), fd, kind, size)
		stop.Store(true)
		writer.Wait()
		if kind == Ext4 && !mounttest.HasSysResource(t) {
			assert.ErrorContains(t, err, "berthd lacks CAP_SYS_RESOURCE")
			return
		}
		assert.NilError(t, err)
		assert.NilError(t, again, "not repeatable")
		assert.Assert(t, capacity(t, fd) > before+400<<20, "%d", capacity(t, fd))
		assert.NilError(t, unix.Syncfs(fd))
		info, err := IdentifyFile(image)
		assert.NilError(t, err)
		assert.Equal(t, info.Kind, kind)
	})
}

func TestShrink(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind, image string) {
		dir := mountImage(t, image, MountOptions{})
		fd := open(t, dir)
		err := Shrink(t.Context(), fd, kind, 450<<20)
		if kind != Btrfs {
			assert.Equal(t, fault.Kind(err), "conflict")
			assert.ErrorContains(t, err, "cannot be made smaller")
			return
		}
		assert.NilError(t, err)
		assert.Equal(t, capacity(t, fd), uint64(450<<20))
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "f"), make([]byte, 280<<20), 0o600))
		assert.NilError(t, unix.Syncfs(fd))
		err = Shrink(t.Context(), fd, kind, 260<<20)
		assert.Equal(t, fault.Kind(err), "conflict")
		assert.Equal(t, capacity(t, fd), uint64(450<<20))
	})
}

func TestFreezeHoldsAndThaws(t *testing.T) {
	eachKind(t, func(t *testing.T, _ Kind, image string) {
		dir := mountImage(t, image, MountOptions{})
		fd := open(t, dir)
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "before"), []byte("x"), 0o600))
		frozen, err := Freeze(t.Context(), fd, 0)
		assert.NilError(t, err)
		var wrote atomic.Bool
		var writer sync.WaitGroup
		writer.Go(func() {
			assert.Check(t, os.WriteFile(filepath.Join(dir, "after"), []byte("x"), 0o600))
			wrote.Store(true)
		})
		_, err = Freeze(t.Context(), fd, 0)
		assert.Check(t, fault.Kind(err) == "conflict", "%v", err)
		assert.Check(t, !wrote.Load())
		assert.NilError(t, frozen.Thaw())
		writer.Wait()
		assert.NilError(t, frozen.Thaw())
		assert.NilError(t, ThawLeft(fd))
	})
}

func TestWatchdogThawsInTime(t *testing.T) {
	eachKind(t, func(t *testing.T, _ Kind, image string) {
		dir := mountImage(t, image, MountOptions{})
		fd := open(t, dir)
		frozen, err := Freeze(t.Context(), fd, 100*time.Millisecond)
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600)) // waits for the thaw
		err = frozen.Thaw()
		assert.Equal(t, fault.Kind(err), "unavailable")
		assert.ErrorContains(t, err, "frozen for too long")
		assert.Equal(t, frozen.Thaw(), err)
	})
}

func TestWatchdogThawsAfterAKill(t *testing.T) {
	eachKind(t, func(t *testing.T, _ Kind, image string) {
		dir := mountImage(t, image, MountOptions{})
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
		cmd.Env = append(os.Environ(), freezeEnv+"="+dir)
		in, err := cmd.StdinPipe()
		assert.NilError(t, err)
		defer in.Close()
		out, err := cmd.StdoutPipe()
		assert.NilError(t, err)
		assert.NilError(t, cmd.Start())
		line, err := bufio.NewReader(out).ReadString('\n')
		assert.NilError(t, err)
		assert.Equal(t, strings.TrimSpace(line), "frozen")
		assert.NilError(t, cmd.Process.Kill())
		// Waits for the thaw, which without the watchdog never comes.
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600))
		_ = cmd.Wait()
		unmountable(t, dir)
	})
}

// unmountable waits until no process has the directory open.
func unmountable(t *testing.T, dir string) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if err := unix.Unmount(dir, unix.MNT_EXPIRE); errors.Is(err, unix.EAGAIN) {
			return // not busy, and marked only
		}
	}
	t.Error("something keeps the file system busy")
}

// A copy of a frozen file system is complete, can be read without a change, and be
// mounted beside the original after NewUUID.
func TestCopyOfFrozen(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind, image string) {
		dir := mountImage(t, image, MountOptions{})
		fd := open(t, dir)
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("before"), 0o600))
		frozen, err := Freeze(t.Context(), fd, 0)
		assert.NilError(t, err)
		clone := filepath.Join(t.TempDir(), "clone")
		out, err := exec.CommandContext(t.Context(), "cp", "--sparse=always", image, clone).CombinedOutput()
		assert.Check(t, err, "%s", out)
		assert.NilError(t, frozen.Thaw())
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("after"), 0o600))

		read := func(dir string) string {
			content, err := os.ReadFile(filepath.Join(dir, "f"))
			assert.NilError(t, err)
			return string(content)
		}
		id := uuid.New()
		if kind == Btrfs { // the others are read as they are
			assert.NilError(t, NewUUID(t.Context(), kind, clone, id))
			assert.NilError(t, NewUUID(t.Context(), kind, clone, id), "not repeatable")
		}
		t.Run("read only", func(t *testing.T) {
			dir := mountImage(t, clone, MountOptions{ReadOnly: true})
			assert.Equal(t, read(dir), "before")
			assert.ErrorIs(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o600), unix.EROFS)
		})
		t.Run("writable", func(t *testing.T) {
			assert.NilError(t, NewUUID(t.Context(), kind, clone, id))
			dir := mountImage(t, clone, MountOptions{})
			assert.Equal(t, read(dir), "before")
			assert.NilError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("clone"), 0o600))
			assert.NilError(t, SetUUID(open(t, dir), kind, id))
		})
		info, err := IdentifyFile(clone)
		assert.NilError(t, err)
		if kind != XFS {
			assert.Equal(t, info.UUID, id)
		}
		assert.Equal(t, read(dir), "after")
	})
}

func TestDamagedInWords(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind, image string) {
		f, err := os.OpenFile(image, os.O_RDWR, 0)
		assert.NilError(t, err)
		defer f.Close()
		// All but the magic of the superblock.
		offset := map[Kind]int64{Btrfs: btrfsSuper + 0x80, XFS: 100, Ext4: ext4Super + 0x100}[kind]
		garbage := make([]byte, 400)
		for i := range garbage {
			garbage[i] = 0xa5
		}
		_, err = f.WriteAt(garbage, offset)
		assert.NilError(t, err)
		device, err := loop.Attach(t.Context(), f, false)
		assert.NilError(t, err)
		defer func() { assert.NilError(t, device.Close()) }()
		err = Mount(device.Path(), kind, t.TempDir(), MountOptions{})
		assert.Equal(t, fault.Kind(err), "unavailable", "%v", err)
		assert.ErrorContains(t, err, "is damaged")
	})
}

// What is deleted in a preallocated image stays the image's.
func TestNothingIsDiscarded(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind, _ string) {
		image := newImage(t, 0)
		f, err := os.OpenFile(image, os.O_RDWR, 0)
		assert.NilError(t, err)
		defer f.Close()
		const size = 400 << 20
		assert.NilError(t, unix.Fallocate(int(f.Fd()), 0, 0, size))
		allocated := func() int64 {
			var st unix.Stat_t
			assert.NilError(t, unix.Fstat(int(f.Fd()), &st))
			return st.Blocks * 512
		}
		assert.NilError(t, Make(t.Context(), kind, image, MakeOptions{Zeroed: true}))
		assert.Assert(t, allocated() >= size)
		t.Run("used", func(t *testing.T) {
			dir := mountImage(t, image, MountOptions{})
			for range 3 {
				assert.NilError(t, os.WriteFile(filepath.Join(dir, "f"), make([]byte, 50<<20), 0o600))
				assert.NilError(t, unix.Syncfs(open(t, dir)))
				assert.NilError(t, os.Remove(filepath.Join(dir, "f")))
				assert.NilError(t, unix.Syncfs(open(t, dir)))
			}
		})
		assert.Assert(t, allocated() >= size, "%d bytes were given back", size-allocated())
	})
}

// Programs that are started at the same time do not make anything look busy.
func TestUnmountWhileProgramsStart(t *testing.T) {
	image := newImage(t, 64<<20)
	assert.NilError(t, Make(t.Context(), Ext4, image, MakeOptions{Zeroed: true}))
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	assert.NilError(t, err)
	defer f.Close()
	device, err := loop.Attach(t.Context(), f, false)
	assert.NilError(t, err)
	defer func() { assert.NilError(t, device.Close()) }()
	target := t.TempDir()
	var stop atomic.Bool
	var starters sync.WaitGroup
	for range 2 {
		starters.Go(func() {
			for !stop.Load() {
				assert.Check(t, exec.CommandContext(t.Context(), "true").Run())
			}
		})
	}
	defer starters.Wait()
	defer stop.Store(true)
	for range 100 {
		assert.NilError(t, Mount(device.Path(), Ext4, target, MountOptions{}))
		dir, err := os.Open(target)
		assert.NilError(t, err)
		time.Sleep(time.Millisecond)
		assert.NilError(t, dir.Close())
		err = Unmount(target)
		if err != nil {
			_ = unix.Unmount(target, unix.MNT_DETACH)
		}
		assert.NilError(t, err)
	}
}
