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
	"strings"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// counterBits of the transaction ID count devices; what is above tells pools
// apart.
const counterBits = 32

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
