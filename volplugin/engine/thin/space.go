package thin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/loop"
)

// Files of a pool, among the images.
const (
	dataFile     = "thin-data"
	metadataFile = "thin-meta"
)

const (
	// minData is the least that a pool is made with.
	minData = 256 << 20
	maxData = 1 << 40
	// bytesPerBlock is what the map of a block takes, with room for snapshots.
	bytesPerBlock = 128
	minMetadata   = 16 << 20
	// maxMetadata is the most that the kernel uses.
	maxMetadata = 255 * (1 << 14) * 16 * 256
)

// noCOWFlag is the kernel's FS_NOCOW_FL.
const noCOWFlag = 0x00800000

// emptyHead is how much of a device must be zeros for it to become part of a pool.
const emptyHead = 128 << 10

// checkEmpty refuses a device that holds something.
func (o *opened) checkEmpty(path string) error {
	device, err := o.operatorDevice(path)
	if err != nil {
		return err
	}
	node, err := o.client.Node(devmapper.Device{Name: namePrefix + "new-" + filepath.Base(path), Number: device.number})
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(node) }()
	// Exclusive: refused while it is mounted, or part of something.
	f, err := os.OpenFile(node, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return fault.Conflict("thin pool: device %s is in use", path)
	}
	if err != nil {
		return fmt.Errorf("thin pool: %w", err)
	}
	defer f.Close()
	head := make([]byte, emptyHead)
	if _, err := io.ReadFull(f, head); err != nil {
		return fmt.Errorf("thin pool: read %s: %w", path, err)
	}
	for _, b := range head {
		if b != 0 {
			return fault.Conflict("thin pool: device %s is not empty, and nothing of it was changed; if what it holds may go: dd if=/dev/zero of=%s bs=1M count=1", path, path)
		}
	}
	return nil
}

// block is a block device below a pool.
type block struct {
	number devmapper.Number
	size   uint64
	// close lets go of a loop device, which then stays as long as the pool.
	close func() error
}

// operatorDevice finds a device that the operator gave; a plugin's /dev may lack it.
func (o *opened) operatorDevice(path string) (block, error) {
	number, err := devmapper.NumberOf(path)
	if missing(err) {
		text, errSys := os.ReadFile(filepath.Join("/sys/class/block", filepath.Base(path), "dev"))
		if errSys != nil {
			return block{}, fault.Unavailable("thin pool: device %s is missing", path)
		}
		major, minor, _ := strings.Cut(strings.TrimSpace(string(text)), ":")
		ma, errMajor := strconv.ParseUint(major, 10, 32)
		mi, errMinor := strconv.ParseUint(minor, 10, 32)
		number, err = devmapper.Number{Major: uint32(ma), Minor: uint32(mi)}, errors.Join(errMajor, errMinor)
	}
	if err != nil {
		return block{}, fmt.Errorf("thin pool: %w", err)
	}
	return sized(number, path)
}

// sized asks the kernel for a device's size.
func sized(number devmapper.Number, path string) (block, error) {
	text, err := os.ReadFile(filepath.Join("/sys/dev/block", number.String(), "size"))
	if err != nil {
		return block{}, fmt.Errorf("thin pool: size of %s: %w", path, err)
	}
	sectors, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return block{}, fmt.Errorf("thin pool: size of %s: %w", path, err)
	}
	return block{number: number, size: sectors * devmapper.SectorSize, close: func() error { return nil }}, nil
}

// below finds the devices that the pool is on, and makes loop devices of its files.
func (o *opened) below(ctx context.Context) (data, metadata block, err error) {
	if o.pool.Data != "" {
		s := o.e.settings
		if s.Data == "" {
			return block{}, block{}, fault.Unavailable("thin pool: it is on devices %s and %s, which the settings lack", o.pool.Data, o.pool.Metadata)
		}
		// The settings' names count: those of disks change.
		if data, err = o.operatorDevice(s.Data); err == nil {
			metadata, err = o.operatorDevice(s.Metadata)
		}
		return data, metadata, err
	}
	if data, err = o.loopOf(ctx, dataFile); err != nil {
		return block{}, block{}, err
	}
	if metadata, err = o.loopOf(ctx, metadataFile); err != nil {
		return block{}, block{}, errors.Join(err, data.close())
	}
	return data, metadata, nil
}

func (o *opened) loopOf(ctx context.Context, name string) (block, error) {
	fd, err := unix.Openat(o.Images.FD(), name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return block{}, fault.Unavailable("thin pool: file %s/%s is missing", o.Images.Path(), name)
		}
		return block{}, &fs.PathError{Op: "open", Path: filepath.Join(o.Images.Path(), name), Err: err}
	}
	file := os.NewFile(uintptr(fd), filepath.Join(o.Images.Path(), name))
	defer file.Close()
	device, err := loop.Attach(ctx, file, false)
	if err != nil {
		return block{}, fmt.Errorf("thin pool: %w", err)
	}
	number, err := devmapper.NumberOf(device.Path())
	if err != nil {
		return block{}, errors.Join(err, device.Close())
	}
	b, err := sized(number, device.Path())
	if err != nil {
		return block{}, errors.Join(err, device.Close())
	}
	b.close = device.Close
	return b, nil
}

// dataSize decides how large the pool's file will be.
func (o *opened) dataSize() (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(o.Images.FD(), &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", o.Images.Path(), err)
	}
	free := st.Bavail * uint64(st.Bsize)
	size := o.e.settings.DataSize
	if size == 0 {
		size = min(free/2, maxData)
	}
	size -= size % o.e.settings.BlockSize
	if size < minData {
		return 0, fault.Exhausted("thin pool: %s has %s free: a pool needs twice %s", o.Images.Path(), human(free), human(minData))
	}
	if !o.e.settings.Sparse && size+metadataSize(size, o.e.settings.BlockSize) > free {
		return 0, fault.Exhausted("thin pool: %s has %s free, and the pool's file is to have %s", o.Images.Path(), human(free), human(size))
	}
	return size, nil
}

func metadataSize(data, blockSize uint64) uint64 {
	n := data / blockSize * bytesPerBlock
	n = (n + sizeUnit - 1) / sizeUnit * sizeUnit
	return min(max(n, minMetadata), maxMetadata)
}

// makeFiles makes a pool's files anew; nothing in them is of value.
func (o *opened) makeFiles(ctx context.Context) error {
	size, err := o.dataSize()
	if err != nil {
		return err
	}
	for _, file := range []struct {
		name string
		size uint64
	}{{metadataFile, metadataSize(size, o.pool.BlockSize)}, {dataFile, size}} {
		if err := o.Before(ctx, "pool.file"); err != nil {
			return err
		}
		if err := unlink(o.Images, file.name); err != nil {
			return err
		}
		if err := o.makeFile(file.name, file.size); err != nil {
			return errors.Join(fmt.Errorf("thin pool: make file of %s: %w", human(file.size), err), unlink(o.Images, file.name))
		}
	}
	return o.Images.Sync()
}

func (o *opened) makeFile(name string, size uint64) error {
	path := filepath.Join(o.Images.Path(), name)
	fd, err := unix.Openat(o.Images.FD(), name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &fs.PathError{Op: "create", Path: path, Err: err}
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	// On btrfs a file that is written in place at random would become all fragments.
	// Elsewhere there is no such flag.
	if flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS); err == nil {
		_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags|noCOWFlag)
	}
	if o.pool.Sparse {
		err = unix.Ftruncate(fd, int64(size))
	} else {
		err = unix.Fallocate(fd, 0, 0, int64(size))
	}
	if err != nil {
		return &fs.PathError{Op: "allocate", Path: path, Err: err}
	}
	return file.Sync()
}
