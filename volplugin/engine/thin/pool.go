package thin

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/loop"
	"github.com/berth-plugin/berth/volplugin/rooted"
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

	// A pool with less than this part of its data blocks or metadata free is low: new
	// volumes are refused, and Pool says so. A quarter of it stops snapshots too.
	lowPart = 20
	// counterBits of the transaction ID count devices; what is above tells pools
	// apart.
	counterBits = 32
)

// noCOWFlag is the kernel's FS_NOCOW_FL.
const noCOWFlag = 0x00800000

// poolFile is the stored form of what a pool is.
type poolFile struct {
	Schema int    `json:"schema"`
	UUID   string `json:"uuid"`
	// Mark is the upper half of the pool's transaction ID.
	Mark uint32 `json:"mark"`
	// Ready is set when the pool was once running with its mark. Before that nothing
	// in it is of value.
	Ready bool `json:"ready"`
	// Data and Metadata are block devices; "" are the files.
	Data     string `json:"data,omitempty"`
	Metadata string `json:"metadata,omitempty"`
	// BlockSize in bytes, a property of the metadata.
	BlockSize uint64 `json:"block-size"`
	Sparse    bool   `json:"sparse,omitempty"`
}

func decodePoolFile(data []byte) (poolFile, error) {
	var f poolFile
	if err := json.Unmarshal(data, &f); err != nil {
		return poolFile{}, fmt.Errorf("is damaged: %w", err)
	}
	switch {
	case f.Schema > schema:
		return poolFile{}, fmt.Errorf("was written by a newer Berth: it has schema %d and this one knows up to %d", f.Schema, schema)
	case f.Schema != schema, !isUUID(f.UUID), f.Mark == 0, (f.Data == "") != (f.Metadata == ""),
		f.BlockSize < minBlockSize || f.BlockSize > maxBlockSize || f.BlockSize%minBlockSize != 0:
		return poolFile{}, errors.New("is damaged")
	}
	return f, nil
}

// readPoolFile gives the zero value and an error that wraps fs.ErrNotExist when
// there is no pool.
func readPoolFile(dir *rooted.Dir) (poolFile, error) {
	data, err := dir.ReadFile(poolName, maxFile)
	if err != nil {
		return poolFile{}, err
	}
	f, err := decodePoolFile(data)
	if err != nil {
		return poolFile{}, fault.Unavailable("thin pool: %s/%s %w", dir.Path(), poolName, err)
	}
	return f, nil
}

// makePool decides what the pool will be, and writes it down, before the first change
// to a device. The caller has the turn.
func (o *opened) makePool(ctx context.Context) error {
	f, err := readPoolFile(o.thin)
	if err == nil {
		o.pool = f
		return nil
	}
	if !missing(err) {
		return err
	}
	s := o.e.settings
	f = poolFile{
		Schema: schema, UUID: uuid.NewString(), Mark: 1 + rand.Uint32N(1<<31-1),
		Data: s.Data, Metadata: s.Metadata, BlockSize: s.BlockSize, Sparse: s.Sparse,
	}
	if f.Data != "" {
		for _, device := range []string{f.Data, f.Metadata} {
			if err := o.checkEmpty(device); err != nil {
				return err
			}
		}
	} else if _, err := o.dataSize(); err != nil {
		return err
	}
	if err := o.Before(ctx, "pool.claim"); err != nil {
		return err
	}
	if err := o.newFile(o.thin, poolName, f); err != nil {
		return err
	}
	o.pool = f
	return nil
}

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

// startPool makes the pool's device where it is not running, and gives its state.
// The caller has the turn. create allows to make a pool that there never was.
func (o *opened) startPool(ctx context.Context, create bool) (devmapper.Device, devmapper.PoolStatus, error) {
	fail := func(err error) (devmapper.Device, devmapper.PoolStatus, error) {
		return devmapper.Device{}, devmapper.PoolStatus{}, err
	}
	if o.pool.UUID == "" {
		if !create {
			return fail(fault.Unavailable("thin pool: %s has none", o.Root.Path()))
		}
		if err := o.makePool(ctx); err != nil {
			return fail(err)
		}
	}
	if !o.pool.Ready {
		// Another process may have made it ready since it was read.
		f, err := readPoolFile(o.thin)
		if err != nil {
			return fail(err)
		}
		o.pool = f
	}
	name := o.poolDevice()
	dev, err := o.client.Find(name)
	if err == nil && (!dev.Active || !o.pool.Ready) {
		// Left by a process that was killed in the middle; nobody uses it.
		if err := o.client.Remove(name); err != nil {
			return fail(err)
		}
		err = fs.ErrNotExist
	}
	switch {
	case err == nil:
		if dev.Suspended {
			if err := o.client.Resume(name); err != nil {
				return fail(err)
			}
		}
	case missing(err):
		if !o.pool.Ready && o.pool.Data == "" {
			if err := o.makeFiles(ctx); err != nil {
				return fail(err)
			}
		}
		if dev, err = o.loadPool(ctx); err != nil {
			return fail(err)
		}
	default:
		return fail(err)
	}
	status, err := o.poolStatus()
	if err == nil {
		status, err = o.markPool(ctx, status)
	}
	if err != nil {
		return fail(err)
	}
	return dev, status, nil
}

// loadPool makes the pool's device.
func (o *opened) loadPool(ctx context.Context) (devmapper.Device, error) {
	data, metadata, err := o.below(ctx)
	if err != nil {
		return devmapper.Device{}, err
	}
	// From now on the pool holds them, or nobody does.
	defer func() { _ = errors.Join(data.close(), metadata.close()) }()
	// The kernel would make a new pool of metadata that is empty.
	if err := o.checkMetadata(metadata); err != nil {
		return devmapper.Device{}, err
	}
	if err := o.Before(ctx, "pool.start"); err != nil {
		return devmapper.Device{}, err
	}
	blocks := data.size / o.pool.BlockSize
	table := devmapper.ThinPool(blocks*o.pool.BlockSize/devmapper.SectorSize, metadata.number, data.number, devmapper.PoolOptions{
		BlockSectors:  o.pool.BlockSize / devmapper.SectorSize,
		LowWater:      blocks / lowPart,
		KeepDiscarded: o.pool.Data == "" && !o.pool.Sparse,
	})
	dev, err := o.client.Create(o.poolDevice(), uuidPrefix+o.pool.UUID+"-pool", false, table)
	if err != nil {
		return devmapper.Device{}, fault.Unavailable("thin pool of %s does not start; the host's kernel log says more, thin_check and thin_repair examine and repair its metadata: %w", o.Root.Path(), err)
	}
	return dev, nil
}

// checkMetadata refuses metadata that is not this pool's, before it is touched.
func (o *opened) checkMetadata(device block) error {
	node, err := o.client.Node(devmapper.Device{Name: o.prefix() + "metadata", Number: device.number})
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(node) }()
	f, err := os.Open(node)
	if err != nil {
		return fmt.Errorf("thin pool: %w", err)
	}
	defer f.Close()
	head := make([]byte, superSize)
	if _, err := io.ReadFull(f, head); err != nil {
		return fmt.Errorf("thin pool: read metadata: %w", err)
	}
	transaction, err := parseSuper(head)
	switch {
	case errors.Is(err, errEmpty) && !o.pool.Ready:
		return nil
	case err != nil:
		return fault.Unavailable("thin pool of %s does not start: its metadata %w: are devices mixed up? (thin_check and thin_repair examine and repair metadata)", o.Root.Path(), err)
	case transaction == 0 && !o.pool.Ready:
		return nil
	}
	return o.checkMark(transaction)
}

func (o *opened) checkMark(transaction uint64) error {
	if mark := transaction >> counterBits; mark != uint64(o.pool.Mark) {
		return fault.Unavailable("thin pool of %s: the metadata on its device is of another pool (it has mark %d, expected %d): are devices mixed up?",
			o.Root.Path(), mark, o.pool.Mark)
	}
	return nil
}

// The superblock of a pool's metadata, by the kernel's dm-thin-metadata.c.
const (
	superSize        = 4096
	superMagic       = 27022010
	superMagicPlace  = 32
	transactionPlace = 48
)

var (
	errEmpty   = errors.New("is empty")
	errNoSuper = errors.New("is none of a thin pool")
)

// parseSuper reads the transaction ID in a superblock.
func parseSuper(head []byte) (transaction uint64, err error) {
	if len(head) < superSize {
		return 0, errNoSuper
	}
	if binary.LittleEndian.Uint64(head[superMagicPlace:]) == superMagic {
		return binary.LittleEndian.Uint64(head[transactionPlace:]), nil
	}
	for _, b := range head {
		if b != 0 {
			return 0, errNoSuper
		}
	}
	return 0, errEmpty
}

// poolStatus asks the running pool for its state.
func (o *opened) poolStatus() (devmapper.PoolStatus, error) {
	targets, err := o.client.Status(o.poolDevice())
	if err != nil {
		return devmapper.PoolStatus{}, err
	}
	if len(targets) != 1 || targets[0].Kind != targetPool {
		return devmapper.PoolStatus{}, fault.Conflict("device %s is no thin pool", o.poolDevice())
	}
	return devmapper.ParsePool(targets[0].Params)
}

// markPool gives a new pool its mark, and refuses one that has another.
func (o *opened) markPool(ctx context.Context, status devmapper.PoolStatus) (devmapper.PoolStatus, error) {
	if status.Mode == devmapper.PoolFailed {
		return status, fault.Unavailable("thin pool of %s has failed: its metadata cannot be read; thin_check and thin_repair examine and repair it, when the pool is stopped", o.Root.Path())
	}
	want := uint64(o.pool.Mark) << counterBits
	if status.Transaction == 0 && !o.pool.Ready {
		if err := o.Before(ctx, "pool.mark"); err != nil {
			return status, err
		}
		if err := o.setTransaction(0, want); err != nil {
			return status, err
		}
		status.Transaction = want
	}
	if err := o.checkMark(status.Transaction); err != nil || o.pool.Ready {
		return status, err
	}
	if err := o.Before(ctx, "pool.ready"); err != nil {
		return status, err
	}
	f := o.pool
	f.Ready = true
	if err := o.replaceFile(o.thin, poolName, f); err != nil {
		return status, err
	}
	o.pool = f
	return status, nil
}

func (o *opened) setTransaction(from, to uint64) error {
	_, err := o.client.Message(o.poolDevice(), 0, fmt.Sprintf("set_transaction_id %d %d", from, to))
	return err
}

// stopPool removes the pool's device when none of its devices is left. The caller
// has the turn.
func (o *opened) stopPool() error {
	if o.pool.UUID == "" {
		return nil
	}
	devices, err := o.client.List()
	if err != nil {
		return err
	}
	for name := range devices {
		if strings.HasPrefix(name, o.prefix()) && name != o.poolDevice() {
			return nil
		}
	}
	if err := o.client.Remove(o.poolDevice()); err != nil && !errors.Is(err, unix.EBUSY) {
		return err
	}
	return nil
}

var _ engine.Pooled = (*Engine)(nil)

// Pool implements engine.Pooled. The pool is started for it.
func (e *Engine) Pool(ctx context.Context, p engine.Place) (engine.Pool, error) {
	o, err := e.open(ctx, p, false)
	if missing(err) {
		return engine.Pool{}, nil
	}
	if err != nil {
		return engine.Pool{}, err
	}
	defer o.close()
	if !o.pool.Ready {
		return engine.Pool{}, nil
	}
	var s engine.Pool
	err = o.withPool(ctx, func(_ devmapper.Device, status devmapper.PoolStatus) error {
		s = o.state(status)
		return nil
	})
	return s, err
}

func (o *opened) state(p devmapper.PoolStatus) engine.Pool {
	return engine.Pool{
		DataUsed: p.DataUsed * o.pool.BlockSize, DataTotal: p.DataTotal * o.pool.BlockSize,
		MetadataUsed: p.MetadataUsed * devmapper.MetadataBlock, MetadataTotal: p.MetadataTotal * devmapper.MetadataBlock,
		Problem: problem(p),
	}
}

// problem says in words what is wrong with a pool.
func problem(p devmapper.PoolStatus) string {
	switch {
	case p.Mode == devmapper.PoolFailed:
		return "the thin pool has failed, its metadata cannot be read: thin_repair"
	case p.Mode == devmapper.PoolReadOnly && p.MetadataUsed >= p.MetadataTotal && p.MetadataTotal > 0:
		return "the thin pool's metadata is full and it can only be read: remove what uses it, enlarge the metadata device, thin_check --clear-needs-check-flag"
	case p.NeedsCheck:
		return "the thin pool's metadata could not be written and it can only be read: stop all volumes, thin_check --clear-needs-check-flag or thin_repair"
	case p.Mode == devmapper.PoolReadOnly:
		return "the thin pool can only be read; the host's kernel log says why"
	case p.Mode == devmapper.PoolNoData || p.DataUsed >= p.DataTotal:
		return "the thin pool is full, and writes to its volumes fail: remove volumes or snapshots, or delete files"
	case low(p.DataUsed, p.DataTotal, lowPart):
		return "the thin pool is nearly full"
	case low(p.MetadataUsed, p.MetadataTotal, lowPart):
		return "the thin pool's metadata is nearly full"
	}
	return ""
}

func low(used, total uint64, part uint64) bool {
	return total == 0 || total-min(used, total) < total/part
}

// room refuses new devices in a pool that is not well, or as good as full.
func (o *opened) room(p devmapper.PoolStatus, part uint64) error {
	switch {
	case p.Mode == devmapper.PoolReadOnly || p.NeedsCheck:
		return fault.Unavailable("%s", problem(p))
	case p.Mode == devmapper.PoolNoData, low(p.DataUsed, p.DataTotal, part):
		return fault.Exhausted("thin pool of %s has %s of %s left; the rest is kept for what is in it", o.Root.Path(),
			human((p.DataTotal-min(p.DataUsed, p.DataTotal))*o.pool.BlockSize), human(p.DataTotal*o.pool.BlockSize))
	case low(p.MetadataUsed, p.MetadataTotal, part):
		return fault.Exhausted("thin pool of %s has %s of %s of metadata left; the rest is kept for what is in it", o.Root.Path(),
			human((p.MetadataTotal-min(p.MetadataUsed, p.MetadataTotal))*devmapper.MetadataBlock), human(p.MetadataTotal*devmapper.MetadataBlock))
	}
	return nil
}

// withPool runs f in turn, with the pool running. The pool is stopped after it when
// nothing is active in it.
func (o *opened) withPool(ctx context.Context, f func(devmapper.Device, devmapper.PoolStatus) error) error {
	release, err := o.turn(ctx)
	if err != nil {
		return err
	}
	defer release()
	pool, status, err := o.startPool(ctx, false)
	if err == nil {
		err = f(pool, status)
	}
	return errors.Join(err, o.stopPool())
}

func human(n uint64) string { return units.BytesSize(float64(n)) }
