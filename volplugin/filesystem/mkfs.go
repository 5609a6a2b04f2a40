package filesystem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// programTimeout bounds mkfs and btrfstune when ctx does not. They write some
// megabytes at most.
const programTimeout = 2 * time.Minute

// programDirs are searched after PATH, which may lack them.
var programDirs = []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"}

// Available tells whether this host can make and mount the kind. The error says in
// words what is missing.
func Available(kind Kind) error {
	if err := knownKind(kind); err != nil {
		return err
	}
	if _, err := program("mkfs." + string(kind)); err != nil {
		return err
	}
	return supported(kind)
}

func knownKind(kind Kind) error {
	for _, known := range Kinds {
		if kind == known {
			return nil
		}
	}
	return fault.Invalid("option fs=%q: want btrfs, xfs or ext4", kind)
}

// kernelHas remembers the answers of the kernel that were yes.
var kernelHas sync.Map

// supported asks the kernel for a file system, which loads its module.
func supported(kind Kind) error {
	if _, yes := kernelHas.Load(kind); yes {
		return nil
	}
	fd, err := unix.Fsopen(string(kind), unix.FSOPEN_CLOEXEC)
	switch {
	case err == nil:
		_ = unix.Close(fd)
	case errors.Is(err, unix.ENODEV):
		return fault.Unavailable("this host's kernel has no %s", kind)
	case errors.Is(err, unix.ENOSYS): // before 5.2
		list, err := os.ReadFile("/proc/filesystems")
		if err != nil {
			return err
		}
		if !strings.Contains(string(list), "\t"+string(kind)+"\n") {
			return fault.Unavailable("this host's kernel has no %s, or has not loaded it: modprobe %s", kind, kind)
		}
	default:
		return fmt.Errorf("ask the kernel for %s: %w", kind, err)
	}
	kernelHas.Store(kind, true)
	return nil
}

func program(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range programDirs {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fault.Unavailable("the program %s is not installed where berthd runs", name)
}

// MakeOptions are what Make can be told.
type MakeOptions struct {
	// UUID of the new file system; the zero one is a random one.
	UUID uuid.UUID
	// Label of at most 12 bytes is cut to that, the most that xfs takes.
	Label string
	// Zeroed says that the device or file reads as zeros all over, which saves time.
	Zeroed bool
}

// Make makes an empty file system on a block device or in a file, over whatever is
// there. Nothing is discarded: the space of a preallocated image stays its own. Its
// sectors have 4096 bytes, so that it can be mounted wherever it is moved.
func Make(ctx context.Context, kind Kind, path string, o MakeOptions) error {
	if err := knownKind(kind); err != nil {
		return err
	}
	if !filepath.IsAbs(path) {
		return fmt.Errorf("make %s in %q: want an absolute path", kind, path)
	}
	if o.UUID == uuid.Nil {
		o.UUID = uuid.New()
	}
	label := o.Label[:min(len(o.Label), 12)]
	var args []string
	switch kind {
	case Btrfs:
		args = []string{"--quiet", "--force", "--nodiscard", "--sectorsize", "4096", "--uuid", o.UUID.String()}
		if label != "" {
			args = append(args, "--label", label)
		}
	case XFS:
		args = []string{"-q", "-f", "-K", "-s", "size=4096", "-m", "uuid=" + o.UUID.String()}
		if label != "" {
			args = append(args, "-L", label)
		}
	case Ext4:
		// Nothing is reserved for root, as whom most containers run; with the seed
		// of its checksums stored, a clone's UUID can be changed.
		extended := "nodiscard,root_owner=0:0"
		if o.Zeroed {
			extended += ",assume_storage_prezeroed=1"
		}
		args = []string{"-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-O", "metadata_csum,64bit,metadata_csum_seed", "-E", extended, "-U", o.UUID.String()}
		if label != "" {
			args = append(args, "-L", label)
		}
	}
	return run(ctx, "mkfs."+string(kind), append(args, "--", path)...)
}

// NewUUID gives a copy a UUID of its own before it is seen as a block device for
// the first time; path is the file or device, which is not mounted and was copied
// while frozen or not in use. Killed in the middle, it completes when called again.
// It changes nothing for kinds that need nothing: see the package's comment.
func NewUUID(ctx context.Context, kind Kind, path string, id uuid.UUID) error {
	if kind != Btrfs {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	info, err := Identify(f)
	if err := errors.Join(err, f.Close()); err != nil || info.UUID == id {
		return err
	}
	return run(ctx, "btrfstune", "-f", "-M", id.String(), path)
}

// run runs a program and puts what it said into the error.
func run(ctx context.Context, name string, args ...string) error {
	path, err := program(name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + strings.Join(programDirs, ":")}
	var said tail
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if text := said.String(); text != "" {
		return fmt.Errorf("%s: %w: %s", name, err, text)
	}
	return fmt.Errorf("%s: %w", name, err)
}

// A tail keeps the last of what is written to it.
type tail struct{ buf []byte }

const tailSize = 2048

func (t *tail) Write(b []byte) (int, error) {
	t.buf = append(t.buf, b...)
	if extra := len(t.buf) - tailSize; extra > 0 {
		t.buf = append(t.buf[:0], t.buf[extra:]...)
	}
	return len(b), nil
}

// String is one line.
func (t *tail) String() string {
	return string(bytes.Join(bytes.Fields(t.buf), []byte(" ")))
}
