// Package loop makes block devices of image files, one at most of each file.
//
// A file with two loop devices can be mounted twice, as two file systems that know
// nothing of each other: ext4 is destroyed by that. So a device is looked for by the
// file's identity (device and inode number, which a rename does not change) before
// one is made, and both happen under a lock of the file, so that other processes of
// this host, whatever namespaces they are in, do the same one after the other. Other
// hosts are kept out by the caller. A second device that somebody else makes without
// asking is found and refused.
//
// Devices clear themselves: once one is mounted, it goes with the last mount, and
// before that with the process that made it.
//
// A device that is in use can be cut off from its file, see Cut.
package loop

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	sysBlock     = "/sys/block"
	controlPath  = "/dev/loop-control"
	controlMajor = 10
	controlMinor = 237
	loopMajor    = 7
)

// configureTries bounds how often another process may take the free device first.
const configureTries = 100

// retryPause between looks at something that another process is about to end.
const retryPause = 5 * time.Millisecond

const (
	// clearWait is how long the kernel may take to clear a device after its last user.
	clearWait = 5 * time.Second
	// mountedWait is how long a file system may stay on a device before it counts as
	// mounted by somebody: the mounts of a container end with its last process.
	mountedWait = time.Second
)

// A Device is an open loop device. As long as it is not closed the kernel does not
// clear it; afterwards a mount keeps it. It is not safe for concurrent use.
type Device struct {
	file *os.File
	// made tells that this call of Attach bound it.
	made bool
}

// Path of the device's node.
func (d *Device) Path() string { return d.file.Name() }

// Made tells whether Attach bound the file to the device, false when the file had it
// already and may be mounted somewhere.
func (d *Device) Made() bool { return d.made }

// Close lets go of the device. One that nobody has mounted is cleared.
func (d *Device) Close() error { return d.file.Close() }

// A File is an image file, whatever its name is. It can be compared.
type File struct{ dev, ino uint64 }

// FileOf tells which file is open.
func FileOf(f *os.File) (File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return File{}, &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return File{}, fmt.Errorf("%s is not a regular file", f.Name())
	}
	return File{dev: st.Dev, ino: st.Ino}, nil
}

// Backing tells which file the device at path, as Device.Path gives it, is bound
// to. The error wraps fs.ErrNotExist when it is bound to none.
func Backing(path string) (File, error) {
	info, err := status(path)
	if err != nil {
		return File{}, err
	}
	return File{info.Device, info.Inode}, nil
}

// IsCut tells whether the device at path has been cut off from its file. Errors are
// those of Backing.
func IsCut(path string) (bool, error) {
	info, err := status(path)
	if err != nil {
		return false, err
	}
	return info.Sizelimit == cutSize, nil
}

func status(path string) (*unix.LoopInfo64, error) {
	digits, ok := strings.CutPrefix(path, nodePrefix)
	number, err := strconv.Atoi(digits)
	if !ok || err != nil {
		return nil, fmt.Errorf("%s is not a loop device: %w", path, fs.ErrNotExist)
	}
	device, err := openDevice(number, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer device.Close()
	info, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("%s is free: %w", path, fs.ErrNotExist)
	}
	if err != nil {
		return nil, fmt.Errorf("status of %s: %w", path, err)
	}
	return info, nil
}

// Attach gives the loop device of an image file, with the one that it has or a
// new one. The device has the file's present size, and reads and writes it directly,
// past the page cache, where the file's file system can. readOnly binds the file for
// reading only; a conflict is the answer when it is bound otherwise, or to two devices.
func Attach(ctx context.Context, image *os.File, readOnly bool) (*Device, error) {
	id, err := FileOf(image)
	if err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, image)
	if err != nil {
		return nil, err
	}
	defer unlock()
	device, err := existing(ctx, image, id, readOnly)
	if err != nil || device != nil {
		return device, err
	}
	device, err = bind(ctx, image, readOnly)
	if err != nil {
		return nil, err
	}
	// Somebody without a thought for the lock may have been as fast.
	numbers, err := find(id)
	if err == nil && len(numbers) > 1 {
		err = twice(image, numbers)
	}
	if err != nil {
		return nil, errors.Join(err, device.Close())
	}
	return device, nil
}

// existing gives the device that the file has, nil if it has none.
func existing(ctx context.Context, image *os.File, id File, readOnly bool) (*Device, error) {
	for {
		numbers, err := find(id)
		if err != nil || len(numbers) == 0 {
			return nil, err
		}
		if len(numbers) > 1 {
			return nil, twice(image, numbers)
		}
		file, err := openDevice(numbers[0], unix.O_RDONLY)
		if err != nil {
			return nil, err
		}
		// It may have been cleared, and bound again, until it was open.
		info, err := unix.IoctlLoopGetStatus64(int(file.Fd()))
		if err == nil && (File{info.Device, info.Inode}) == id {
			if bound := info.Flags&unix.LO_FLAGS_READ_ONLY != 0; bound != readOnly {
				return nil, errors.Join(fault.Conflict("%s is bound to %s for %s", image.Name(), file.Name(), purpose(bound)), file.Close())
			}
			if info.Sizelimit == cutSize {
				return nil, errors.Join(fault.Conflict("%s: %w: stop what still uses %s on this host", image.Name(), ErrCut, file.Name()), file.Close())
			}
			if info.Offset != 0 || info.Sizelimit != 0 {
				return nil, errors.Join(fault.Conflict("a part of %s is bound to %s, not by Berth", image.Name(), file.Name()), file.Close())
			}
			device := &Device{file: file}
			if err := device.resize(); err != nil {
				return nil, errors.Join(err, device.Close())
			}
			return device, nil
		}
		_ = file.Close()
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
}

func purpose(readOnly bool) string {
	if readOnly {
		return "reading only"
	}
	return "writing"
}

func twice(image *os.File, numbers []int) error {
	names := make([]string, len(numbers))
	for i, n := range numbers {
		names[i] = node(n)
	}
	return fault.Conflict("%s is bound to several loop devices (%s), not all of them by Berth: unmount and detach them (losetup -d), its data is in danger",
		image.Name(), strings.Join(names, ", "))
}

// bind makes a device of the file.
func bind(ctx context.Context, image *os.File, readOnly bool) (*Device, error) {
	// The device keeps the open file it is given, and with it that one's locks.
	backing, err := reopen(image, readOnly)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	control, err := openControl()
	if err != nil {
		return nil, err
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(backing.Fd())}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	mode := unix.O_RDWR
	if readOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
		mode = unix.O_RDONLY
	}
	// What old tools show; sysfs has the whole path.
	copy(config.Info.File_name[:len(config.Info.File_name)-1], filepath.Base(image.Name()))
	for range configureTries {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		file, err := openDevice(number, mode)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(file.Fd()), &config)
		if errors.Is(err, unix.EINVAL) && config.Info.Flags&unix.LO_FLAGS_DIRECT_IO != 0 {
			config.Info.Flags &^= unix.LO_FLAGS_DIRECT_IO
			err = unix.IoctlLoopConfigure(int(file.Fd()), &config)
		}
		if err == nil {
			return &Device{file: file, made: true}, nil
		}
		_ = file.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("bind %s to loop device %s (needs Linux 5.8): %w", image.Name(), node(number), err)
		}
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
	return nil, fault.Unavailable("bind %s to a loop device: other programs took each one that was free", image.Name())
}

// Bound tells whether the file has a loop device.
func Bound(image File) (bool, error) {
	numbers, err := find(image)
	return len(numbers) > 0, err
}

// Released waits until the file's loop device is gone, for the short time that the
// kernel takes after the last unmount. The error is a conflict when somebody
// still uses it, also in a mount namespace that this process does not see.
func Released(ctx context.Context, image File) error {
	start := time.Now()
	for unmounted := start; ; {
		numbers, err := find(image)
		if err != nil || len(numbers) == 0 {
			return err
		}
		mounted, err := isMounted(numbers[0])
		if err != nil {
			return err
		}
		now := time.Now()
		if !mounted {
			unmounted = now
		}
		if now.Sub(unmounted) > mountedWait || now.Sub(start) > clearWait {
			return fault.Conflict("the image is still in use through %s", node(numbers[0]))
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

// SetCapacity gives the file's loop device the size that the file has now. A file
// without one needs nothing.
func SetCapacity(image *os.File) error {
	id, err := FileOf(image)
	if err != nil {
		return err
	}
	numbers, err := find(id)
	if err != nil {
		return err
	}
	for _, n := range numbers {
		file, err := openDevice(n, unix.O_RDONLY)
		if err != nil {
			return err
		}
		err = (&Device{file: file}).resize()
		if err := errors.Join(err, file.Close()); err != nil {
			return err
		}
	}
	return nil
}

// ErrCut says that a file's device has been cut off from it.
var ErrCut = errors.New("it was cut off from its loop device")

const (
	// cutSize in bytes is what is left of a device that is cut: the least that there can
	// be, since older kernels check nothing on a device of size 0. No file system that
	// has been shut down, and no btrfs, writes its first sector.
	cutSize = 512
	// cutTries bounds how often a cut is tried while somebody reads the device.
	cutTries = 20
)

// Cut makes all I/O on the file's loop device fail with EIO, for as long as that
// exists, whoever has it open or mounted. What is under way ends first, and what is
// dirty in the device's own page cache is written: a file system that uses it (ext4)
// is to be shut down before, and one that does not (btrfs, xfs) writes nothing then.
// A file without a device needs no cut. The error wraps unix.EAGAIN when an old
// kernel refuses it because a file system keeps pages of the device (ext4, before Linux
// 6.9 or so); they have been written then.
//
// There is no better way: BLKROSET stops no file system that is mounted, LOOP_CLR_FD
// waits for the last unmount, and LOOP_CHANGE_FD is for read-only devices.
func Cut(ctx context.Context, image File) error {
	numbers, err := find(image)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range numbers {
		errs = append(errs, cut(ctx, n))
	}
	return errors.Join(errs...)
}

func cut(ctx context.Context, number int) error {
	device, err := openDevice(number, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer device.Close()
	info, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
	if err != nil {
		return fmt.Errorf("status of %s: %w", device.Name(), err)
	}
	info.Sizelimit = cutSize
	for try := 1; ; try++ {
		err := unix.IoctlLoopSetStatus64(int(device.Fd()), info)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EAGAIN) || try == cutTries {
			return fmt.Errorf("cut %s off from its file: %w", device.Name(), err)
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

func (d *Device) resize() error {
	if err := unix.IoctlSetInt(int(d.file.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("set capacity of %s: %w", d.Path(), err)
	}
	return nil
}

// find gives the numbers of the devices that the file is bound to. It opens
// no device but those that are bound.
func find(id File) ([]int, error) {
	entries, err := os.ReadDir(sysBlock)
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var found []int
	for _, entry := range entries {
		digits, ok := strings.CutPrefix(entry.Name(), "loop")
		if !ok {
			continue
		}
		number, err := strconv.Atoi(digits)
		if err != nil {
			continue
		}
		// The directory is there as long as the device is bound.
		if _, err := os.Lstat(filepath.Join(sysBlock, entry.Name(), "loop")); err != nil {
			continue
		}
		same, err := isBoundTo(number, id)
		if err != nil {
			return nil, err
		}
		if same {
			found = append(found, number)
		}
	}
	return found, nil
}

func isBoundTo(number int, id File) (bool, error) {
	file, err := openDevice(number, unix.O_RDONLY)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) { // removed since
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer file.Close()
	info, err := unix.IoctlLoopGetStatus64(int(file.Fd()))
	if errors.Is(err, unix.ENXIO) { // cleared since
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("status of %s: %w", file.Name(), err)
	}
	return (File{info.Device, info.Inode}) == id, nil
}

// isMounted tells whether there is a file system on the device, mounted by whomever: it
// keeps the device from being opened exclusively.
func isMounted(number int) (bool, error) {
	file, err := openDevice(number, unix.O_RDONLY|unix.O_EXCL)
	switch {
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV): // removed since
		return false, nil
	case err != nil:
		return false, err
	}
	return false, file.Close()
}

// lock takes the file's lock, which ends with the process at the latest.
func lock(ctx context.Context, image *os.File) (unlock func(), err error) {
	// Of an open file of its own: closing it unlocks, and Attach twice in one process
	// excludes itself.
	file, err := reopen(image, true)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = file.Close() }, nil
		case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EBADF):
			// NFS makes a lock of its own kind of it, which asks for a writable file.
			writable, again := reopen(image, false)
			if again != nil {
				return nil, errors.Join(again, file.Close())
			}
			_ = file.Close()
			file = writable
			continue
		default:
			return nil, errors.Join(fmt.Errorf("lock %s: %w", image.Name(), err), file.Close())
		}
		if err := pause(ctx); err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", image.Name(), err), file.Close())
		}
	}
}

// reopen opens the very file again, whatever its name leads to now.
func reopen(image *os.File, readOnly bool) (*os.File, error) {
	mode := unix.O_RDWR
	if readOnly {
		mode = unix.O_RDONLY
	}
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(int(image.Fd())), mode|unix.O_CLOEXEC|unix.O_LARGEFILE, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: image.Name(), Err: err}
	}
	return os.NewFile(uintptr(fd), image.Name()), nil
}

const nodePrefix = "/dev/loop"

func node(number int) string { return nodePrefix + strconv.Itoa(number) }

// openDevice opens a loop device, whose node a container's /dev may lack.
func openDevice(number, mode int) (*os.File, error) {
	return openNode(node(number), unix.S_IFBLK, deviceNumber(number), mode)
}

// deviceNumber of a loop device. Its minor is not its number where the module was
// loaded with partitions (max_part).
func deviceNumber(number int) uint64 {
	text, err := os.ReadFile(filepath.Join(sysBlock, "loop"+strconv.Itoa(number), "dev"))
	if err == nil {
		if device, ok := parseDevice(string(text)); ok {
			return device
		}
	}
	return unix.Mkdev(loopMajor, uint32(number))
}

// parseDevice reads a device's number as sysfs has it, "7:0".
func parseDevice(text string) (device uint64, ok bool) {
	major, minor, _ := strings.Cut(strings.TrimSpace(text), ":")
	a, errA := strconv.ParseUint(major, 10, 32)
	b, errB := strconv.ParseUint(minor, 10, 32)
	return unix.Mkdev(uint32(a), uint32(b)), errA == nil && errB == nil
}

func openControl() (*os.File, error) {
	file, err := openNode(controlPath, unix.S_IFCHR, unix.Mkdev(controlMajor, controlMinor), unix.O_RDWR)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return nil, fault.Unavailable("this host has no loop devices (modprobe loop): %w", err)
	}
	return file, err
}

// openNode opens a device by its node, which it makes where it is missing.
func openNode(path string, kind uint32, device uint64, mode int) (*os.File, error) {
	for made := false; ; made = true {
		fd, err := unix.Open(path, mode|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		switch {
		case errors.Is(err, fs.ErrNotExist) && !made:
			if err := unix.Mknod(path, kind|0o600, int(device)); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, &fs.PathError{Op: "mknod", Path: path, Err: err}
			}
			continue
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
			return nil, fault.Unavailable("open %s: this container may not use loop devices (allowAllDevices): %w", path, err)
		case err != nil:
			return nil, &fs.PathError{Op: "open", Path: path, Err: err}
		}
		file := os.NewFile(uintptr(fd), path)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return nil, errors.Join(&fs.PathError{Op: "stat", Path: path, Err: err}, file.Close())
		}
		if st.Mode&unix.S_IFMT != kind || st.Rdev != device {
			return nil, errors.Join(fault.Unavailable("%s is not the device of that name", path), file.Close())
		}
		return file, nil
	}
}

// pause waits a moment, or until ctx ends.
func pause(ctx context.Context) error {
	timer := time.NewTimer(retryPause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// Available tells whether this process can make loop devices.
func Available() error {
	control, err := openControl()
	if err != nil {
		return err
	}
	return control.Close()
}
