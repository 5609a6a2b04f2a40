package loop

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

// childEnv makes this program attach the named file, say the device, and keep it
// until its standard input ends.
const childEnv = "BERTH_TEST_LOOP_FILE"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		os.Exit(child(path))
	}
	os.Exit(mounttest.Main(m))
}

func child(path string) int {
	image, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		var device *Device
		if device, err = Attach(context.Background(), image, false); err == nil {
			_, _ = os.Stdout.WriteString(device.Path() + "\n")
			_, _ = io.Copy(io.Discard, os.Stdin)
			return 0
		}
	}
	_, _ = os.Stdout.WriteString(err.Error() + "\n")
	return 1
}

func newImage(t *testing.T, size int64) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "image"), os.O_RDWR|os.O_CREATE, 0o600)
	assert.NilError(t, err)
	t.Cleanup(func() {
		numbers := devices(t, f)
		for _, n := range numbers { // left by a test that failed
			t.Errorf("%s is still bound", node(n))
			if device, err := openDevice(n, unix.O_RDONLY); err == nil {
				_ = unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0)
				_ = device.Close()
			}
		}
		assert.NilError(t, f.Close())
	})
	assert.NilError(t, f.Truncate(size))
	return f
}

func fileOf(t *testing.T, f *os.File) File {
	t.Helper()
	id, err := FileOf(f)
	assert.NilError(t, err)
	return id
}

// devices waits for what is on its way and gives the file's devices.
func devices(t *testing.T, f *os.File) []int {
	t.Helper()
	_ = Released(t.Context(), fileOf(t, f))
	id, err := FileOf(f)
	assert.NilError(t, err)
	numbers, err := find(id)
	assert.NilError(t, err)
	return numbers
}

func TestAttachIsTheSameDevice(t *testing.T) {
	f := newImage(t, 4<<20)
	bound, err := Bound(fileOf(t, f))
	assert.NilError(t, err)
	assert.Assert(t, !bound)
	first, err := Attach(t.Context(), f, false)
	assert.NilError(t, err)
	assert.Assert(t, first.Made())
	backing, err := Backing(first.Path())
	assert.NilError(t, err)
	assert.Equal(t, backing, fileOf(t, f))
	// By whatever name, and after the name has changed.
	renamed := f.Name() + ".2"
	assert.NilError(t, os.Rename(f.Name(), renamed))
	again, err := os.OpenFile(renamed, os.O_RDWR, 0)
	assert.NilError(t, err)
	defer again.Close()
	second, err := Attach(t.Context(), again, false)
	assert.NilError(t, err)
	assert.Assert(t, !second.Made())
	assert.Equal(t, first.Path(), second.Path())
	assert.NilError(t, first.Close())
	bound, err = Bound(fileOf(t, f))
	assert.NilError(t, err)
	assert.Assert(t, bound)
	assert.NilError(t, second.Close())
	assert.NilError(t, Released(t.Context(), fileOf(t, f)))
}

func TestCapacityFollowsTheFile(t *testing.T) {
	f := newImage(t, 4<<20)
	device, err := Attach(t.Context(), f, false)
	assert.NilError(t, err)
	defer func() { assert.NilError(t, device.Close()) }()
	size := func() int64 {
		end, err := device.file.Seek(0, io.SeekEnd)
		assert.NilError(t, err)
		return end
	}
	assert.Equal(t, size(), int64(4<<20))
	assert.NilError(t, f.Truncate(8<<20))
	assert.Equal(t, size(), int64(4<<20))
	assert.NilError(t, SetCapacity(f))
	assert.Equal(t, size(), int64(8<<20))
	// Whoever was killed between the two is made good by the next one.
	assert.NilError(t, f.Truncate(12<<20))
	other, err := Attach(t.Context(), f, false)
	assert.NilError(t, err)
	assert.NilError(t, other.Close())
	assert.Equal(t, size(), int64(12<<20))
}

func TestReadOnly(t *testing.T) {
	f := newImage(t, 4<<20)
	device, err := Attach(t.Context(), f, true)
	assert.NilError(t, err)
	_, err = Attach(t.Context(), f, false)
	assert.Equal(t, fault.Kind(err), "conflict")
	assert.ErrorContains(t, err, "for reading only")
	w, err := os.OpenFile(device.Path(), os.O_WRONLY, 0)
	if err == nil {
		_, err = w.Write(make([]byte, 512))
		_ = w.Close()
	}
	assert.Assert(t, err != nil, "a device for reading was written")
	assert.NilError(t, device.Close())
}

// A second device that somebody makes by hand is noticed, whenever that is.
func TestSecondDeviceIsRefused(t *testing.T) {
	f := newImage(t, 4<<20)
	device, err := Attach(t.Context(), f, false)
	assert.NilError(t, err)
	defer func() { assert.NilError(t, device.Close()) }()
	rival, err := bind(t.Context(), f, false)
	assert.NilError(t, err)
	_, err = Attach(t.Context(), f, false)
	assert.Equal(t, fault.Kind(err), "conflict")
	assert.ErrorContains(t, err, "several loop devices")
	assert.ErrorContains(t, err, rival.Path())
	assert.NilError(t, rival.Close())
}

// Processes that race get one device together.
func TestProcessesRace(t *testing.T) {
	f := newImage(t, 4<<20)
	for range 5 {
		var commands []*exec.Cmd
		for range 6 {
			cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
			cmd.Env = append(os.Environ(), childEnv+"="+f.Name())
			commands = append(commands, cmd)
		}
		seen := mounttest.FirstLines(t, commands...)
		assert.Equal(t, len(seen), 1, "%v", seen)
		assert.NilError(t, Released(t.Context(), fileOf(t, f)))
	}
}

func TestKilledProcessLeavesNoDevice(t *testing.T) {
	f := newImage(t, 4<<20)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+f.Name())
	in, err := cmd.StdinPipe()
	assert.NilError(t, err)
	defer in.Close()
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	assert.NilError(t, err)
	assert.Assert(t, strings.HasPrefix(line, "/dev/loop"), line)
	bound, err := Bound(fileOf(t, f))
	assert.NilError(t, err)
	assert.Assert(t, bound)
	assert.NilError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	assert.NilError(t, Released(t.Context(), fileOf(t, f)))
}

func TestReleasedTellsWhenSomebodyHasItMounted(t *testing.T) {
	f := newImage(t, 16<<20)
	out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", f.Name()).CombinedOutput()
	assert.NilError(t, err, "%s", out)
	device, err := Attach(t.Context(), f, false)
	assert.NilError(t, err)
	numbers, err := find(fileOf(t, f))
	assert.NilError(t, err)
	assert.Equal(t, len(numbers), 1)
	mounted, err := isMounted(numbers[0])
	assert.NilError(t, err)
	assert.Assert(t, !mounted, "it is only open")

	target := t.TempDir()
	assert.NilError(t, unix.Mount(device.Path(), target, "ext4", 0, ""))
	mounted, err = isMounted(numbers[0])
	busy := Released(t.Context(), fileOf(t, f))
	assert.NilError(t, unix.Unmount(target, 0))
	assert.NilError(t, err)
	assert.Assert(t, mounted)
	assert.Equal(t, fault.Kind(busy), "conflict", "%v", busy)
	assert.NilError(t, device.Close())
	assert.NilError(t, Released(t.Context(), fileOf(t, f)))
}

func TestManyTimesLeaveNothing(t *testing.T) {
	f := newImage(t, 4<<20)
	for range 200 {
		device, err := Attach(t.Context(), f, false)
		assert.NilError(t, err)
		assert.NilError(t, device.Close())
	}
	assert.NilError(t, Released(t.Context(), fileOf(t, f)))
}

// A plugin's /dev has no loop devices until they are made there.
func TestNodesAreMade(t *testing.T) {
	f := newImage(t, 4<<20)
	assert.NilError(t, unix.Mount("tmpfs", "/dev", "tmpfs", 0, "mode=0755"))
	device, err := Attach(t.Context(), f, false)
	if err == nil {
		err = device.Close()
	}
	released := Released(t.Context(), fileOf(t, f))
	assert.NilError(t, unix.Unmount("/dev", unix.MNT_DETACH))
	assert.NilError(t, err)
	assert.NilError(t, released)
}

func TestOnlyFiles(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	assert.NilError(t, err)
	defer dir.Close()
	_, err = Attach(t.Context(), dir, false)
	assert.ErrorContains(t, err, "is not a regular file")
}

func TestLockWaitsForItsTurn(t *testing.T) {
	f := newImage(t, 4<<20)
	unlock, err := lock(t.Context(), f)
	assert.NilError(t, err)
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = Attach(short, f, false)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	unlock()
	device, err := Attach(t.Context(), f, false)
	assert.NilError(t, err)
	// The bound device holds no lock.
	unlock, err = lock(t.Context(), f)
	assert.NilError(t, err)
	unlock()
	assert.NilError(t, device.Close())
}

func TestParseDevice(t *testing.T) {
	for text, want := range map[string]uint64{"7:0\n": unix.Mkdev(7, 0), "7:1048575": unix.Mkdev(7, 1048575)} {
		device, ok := parseDevice(text)
		assert.Assert(t, ok, text)
		assert.Equal(t, device, want)
	}
	for _, text := range []string{"", "7", "7:", ":1", "7:x", "7:1:2", "-7:1"} {
		_, ok := parseDevice(text)
		assert.Assert(t, !ok, text)
	}
}

func FuzzParseDevice(f *testing.F) {
	f.Add("7:0\n")
	f.Fuzz(func(t *testing.T, text string) {
		device, ok := parseDevice(text)
		if ok {
			again, ok := parseDevice(fmt.Sprintf("%d:%d", unix.Major(device), unix.Minor(device)))
			assert.Assert(t, ok)
			assert.Equal(t, again, device)
		}
	})
}
