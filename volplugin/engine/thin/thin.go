package thin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
)

// Name of the engine in records and in option engine.
const Name = "thin"

// Defaults of Settings.
const (
	DefaultSize      = 100 << 30
	DefaultBlockSize = 128 << 10
	DefaultFS        = filesystem.XFS
	DefaultNodes     = "/dev/berth"
)

// Limits of the kernel for BlockSize.
const (
	minBlockSize = 64 << 10
	maxBlockSize = 1 << 30
)

// Settings of the pool of one root.
type Settings struct {
	// Data and Metadata are block devices for the pool, both or none: then it is on
	// files in the root.
	Data, Metadata string
	// DataSize in bytes of the pool's file; 0 is half of what is free in the root, at
	// most 1 TiB. It does not matter for a pool that exists.
	DataSize uint64
	// Sparse makes files that take space only as they fill, with the risk that the
	// root has none left then and data that seemed to be written is lost.
	Sparse bool
	// BlockSize in bytes is what is allocated at a time, and copied at the first write
	// after a snapshot; 0 is DefaultBlockSize. A multiple of 64 KiB.
	BlockSize uint64
	// DefaultSize in bytes of volumes that are given none; 0 is DefaultSize.
	DefaultSize uint64
	// Nodes is the directory for device nodes, "" is DefaultNodes.
	Nodes string
}

// An Engine implements engine.Engine, for one root when it is given devices, and
// otherwise for any. It must be made by New.
type Engine struct {
	settings Settings
	// turn is taken for the time in which a device is claimed or made active, or the
	// pool started or stopped, together with the file lock in the root.
	turn chan struct{}

	mu     sync.Mutex
	client *devmapper.Client
	// settled are the pools for which what a killed process left has been dealt with.
	settled map[string]bool
}

var _ engine.Engine = (*Engine)(nil)

// New checks the settings. It touches nothing: whether the engine works is found out
// by Probe.
func New(s Settings) (*Engine, error) {
	if (s.Data == "") != (s.Metadata == "") {
		return nil, fault.Invalid("thin pool: of the devices for data (%q) and metadata (%q) both are needed, or none", s.Data, s.Metadata)
	}
	if s.Data != "" && s.Data == s.Metadata {
		return nil, fault.Invalid("thin pool: device %s cannot hold data and metadata", s.Data)
	}
	if s.BlockSize == 0 {
		s.BlockSize = DefaultBlockSize
	}
	if s.BlockSize < minBlockSize || s.BlockSize > maxBlockSize || s.BlockSize%minBlockSize != 0 {
		return nil, fault.Invalid("thin pool: block size %d: want a multiple of 64 KiB, at most 1 GiB", s.BlockSize)
	}
	if s.DefaultSize == 0 {
		s.DefaultSize = DefaultSize
	}
	if s.Nodes == "" {
		s.Nodes = DefaultNodes
	}
	return &Engine{settings: s, turn: make(chan struct{}, 1), settled: map[string]bool{}}, nil
}

// Name implements engine.Engine.
func (*Engine) Name() string { return Name }

// mapper opens device-mapper once.
func (e *Engine) mapper() (*devmapper.Client, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client == nil {
		client, err := devmapper.Open(e.settings.Nodes)
		if err != nil {
			return nil, err
		}
		e.client = client
	}
	return e.client, nil
}

// Close releases what the engine holds in this process. Devices stay.
func (e *Engine) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client == nil {
		return nil
	}
	client := e.client
	e.client = nil
	return client.Close()
}

// Recover resumes the devices that a killed process left suspended; whoever writes
// to them waits until then, so it is called when the program starts, before anything
// else. A kernel without device-mapper has none. It must not run while another
// process of Berth takes a snapshot, which it would make fail.
func (e *Engine) Recover(ctx context.Context) error {
	client, err := e.mapper()
	if err != nil {
		return nil //nolint:nilerr // no device-mapper, or none in reach: Probe says so
	}
	return resume(ctx, client, namePrefix)
}

// resume resumes the devices whose names begin with prefix.
func resume(ctx context.Context, client *devmapper.Client, prefix string) error {
	devices, err := client.List()
	if err != nil {
		return err
	}
	var errs []error
	for name := range devices {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		dev, err := client.Find(name)
		if err != nil || !dev.Active || !dev.Suspended || !strings.HasPrefix(dev.UUID, uuidPrefix) {
			continue
		}
		errs = append(errs, client.Resume(name))
	}
	return errors.Join(errs...)
}

// shared are file systems that other hosts may have mounted too, by the numbers that
// statfs(2) gives.
var shared = map[int64]string{
	unix.NFS_SUPER_MAGIC:   "NFS",
	unix.CIFS_SUPER_MAGIC:  "CIFS",
	unix.SMB2_SUPER_MAGIC:  "CIFS",
	unix.SMB_SUPER_MAGIC:   "SMB",
	unix.CEPH_SUPER_MAGIC:  "CephFS",
	unix.FUSE_SUPER_MAGIC:  "FUSE",
	unix.V9FS_MAGIC:        "9p",
	unix.AFS_SUPER_MAGIC:   "AFS",
	unix.OCFS2_SUPER_MAGIC: "OCFS2",
	0x01161970:             "GFS2",
	0x0bd00bd0:             "Lustre",
}

// local names the file systems that roots are usually on.
var local = map[int64]string{
	unix.EXT4_SUPER_MAGIC:  "ext4",
	unix.XFS_SUPER_MAGIC:   "xfs",
	unix.BTRFS_SUPER_MAGIC: "btrfs",
	unix.TMPFS_MAGIC:       "tmpfs",
	unix.F2FS_SUPER_MAGIC:  "f2fs",
	0x2fc12fc1:             "zfs",
}

// Probe implements engine.Engine.
func (e *Engine) Probe(ctx context.Context, p engine.Place) (engine.Abilities, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(p.Root.FD(), &st); err != nil {
		return engine.Abilities{}, fmt.Errorf("statfs %s: %w", p.Root.Path(), err)
	}
	if kind, ok := shared[st.Type]; ok {
		return engine.Abilities{}, fault.Unavailable("a thin pool belongs to one host and cannot be kept in a root on %s", kind)
	}
	kind, ok := local[st.Type]
	if !ok {
		kind = fmt.Sprintf("0x%x", st.Type)
	}
	if err := ctx.Err(); err != nil {
		return engine.Abilities{}, err
	}
	client, err := e.mapper()
	if err != nil {
		return engine.Abilities{}, err
	}
	for _, target := range []string{targetPool, targetThin} {
		has, err := client.HasTarget(target)
		if err != nil {
			return engine.Abilities{}, err
		}
		if !has {
			return engine.Abilities{}, fault.Unavailable("this host's kernel has no thin pools, or has not loaded them: modprobe dm_thin_pool")
		}
	}
	var unavailable []error
	for _, fsKind := range filesystem.Kinds {
		if err := filesystem.Available(fsKind); err != nil {
			unavailable = append(unavailable, err)
		}
	}
	if len(unavailable) == len(filesystem.Kinds) {
		return engine.Abilities{}, errors.Join(unavailable...)
	}
	return engine.Abilities{FileSystem: kind, Limit: true, Instant: true, Consistency: engine.Frozen, Exclusive: true}, nil
}

// Kinds of target that the engine uses.
const (
	targetPool = "thin-pool"
	targetThin = "thin"
)

// missing tells an object that is certainly not there.
func missing(err error) bool { return errors.Is(err, fs.ErrNotExist) }
