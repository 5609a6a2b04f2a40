package thin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// A claim says what a device is for. It does not change.
type claim struct {
	Schema int    `json:"schema"`
	Pool   string `json:"pool"`
	Volume string `json:"volume"`
	// Name of the volume whose data it is, or Snapshot: where the pointer will be.
	Name     string `json:"name,omitempty"`
	Snapshot string `json:"snapshot,omitempty"`
	// Count of the pool's devices up to this one, the lower half of the transaction
	// ID that it is made with.
	Count uint32 `json:"count"`
}

// Suffixes of claims.
const (
	making   = ".making"
	deleting = ".deleting"
)

// parseClaimName reads the name of a claim's file.
func parseClaimName(file string) (id uint32, phase string, ok bool) {
	number := file
	for _, s := range []string{making, deleting} {
		if cut, found := strings.CutSuffix(file, s); found {
			number, phase = cut, s
		}
	}
	n, err := strconv.ParseUint(number, 10, 24)
	if err != nil || strconv.FormatUint(n, 10) != number {
		return 0, "", false
	}
	return uint32(n), phase, true
}

func claimName(id uint32) string { return strconv.FormatUint(uint64(id), 10) }

func decodeClaim(data []byte) (claim, error) {
	var c claim
	if err := json.Unmarshal(data, &c); err != nil {
		return claim{}, fmt.Errorf("is damaged: %w", err)
	}
	if c.Schema != schema || !isUUID(c.Pool) || (c.Name == "") == (c.Snapshot == "") || checkEntry(c.Name+c.Snapshot) != nil ||
		checkEntry(c.Volume) != nil {
		return claim{}, errors.New("is damaged, or of another version")
	}
	return c, nil
}

// held is a claim that this process works on.
type held struct {
	id   uint32
	file *os.File
}

func (h *held) release() { _ = h.file.Close() }

// claim takes the next number that no device has, for a device that is about to be
// made; status is the pool's. The caller has the turn and calls made or drop.
func (o *opened) claim(ctx context.Context, status devmapper.PoolStatus, c claim) (*held, error) {
	files, err := o.devices.Names()
	if err != nil {
		return nil, err
	}
	used := map[uint32]bool{}
	for _, file := range files {
		if id, _, ok := parseClaimName(file); ok {
			used[id] = true
		}
	}
	if len(used) >= maxDevice {
		return nil, fault.Exhausted("thin pool of %s has %d devices, as many as there can be", o.Root.Path(), len(used))
	}
	// 0 is left out: it is what a field that was never written holds.
	count := uint32(status.Transaction) + 1
	for used[count&maxDevice] || count&maxDevice == 0 {
		count++
	}
	c.Schema, c.Pool, c.Count = schema, o.pool.UUID, count
	id := count & maxDevice
	if err := o.Before(ctx, "device.claim"); err != nil {
		return nil, err
	}
	h := &held{id: id}
	err = o.putFile(c, func(temp string) error {
		// Locked before anybody can see it.
		file, err := lockFile(o.Tmp, temp)
		if err == nil {
			h.file = file
			err = move(o.Tmp, temp, o.devices, claimName(id)+making)
		}
		if err != nil {
			return errors.Join(err, unlink(o.Tmp, temp))
		}
		return nil
	})
	if err != nil {
		if h.file != nil {
			h.release()
		}
		return nil, err
	}
	return h, nil
}

// errLocked says that another process or goroutine works on a claim.
var errLocked = errors.New("is locked")

// lockFile opens a file and locks it until that is closed, which the kernel does for
// the killed.
func lockFile(dir *rooted.Dir, name string) (*os.File, error) {
	fd, err := unix.Openat(dir.FD(), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Join(dir.Path(), name), Err: err}
	}
	file := os.NewFile(uintptr(fd), filepath.Join(dir.Path(), name))
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if err == unix.EWOULDBLOCK {
			err = errLocked
		}
		return nil, errors.Join(fmt.Errorf("%s: %w", file.Name(), err), file.Close())
	}
	return file, nil
}

// lockClaim locks the claim on a device in a phase. The error wraps fs.ErrNotExist when
// there is none of that phase.
func (o *opened) lockClaim(id uint32, phase string) (*held, error) {
	name := claimName(id) + phase
	file, err := lockFile(o.devices, name)
	if err != nil {
		return nil, err
	}
	// It may have got another phase, or be another's, by the time it was locked.
	var locked, named unix.Stat_t
	err = unix.Fstat(int(file.Fd()), &locked)
	if err == nil {
		err = unix.Fstatat(o.devices.FD(), name, &named, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err == nil && locked.Ino != named.Ino {
		err = unix.ENOENT
	}
	if err != nil {
		return nil, errors.Join(&fs.PathError{Op: "lock", Path: file.Name(), Err: err}, file.Close())
	}
	return &held{id: id, file: file}, nil
}

// phase moves a claim from one phase to another.
func (o *opened) phase(id uint32, from, to string) error {
	if err := o.devices.Rename(claimName(id)+from, o.devices, claimName(id)+to); err != nil {
		return err
	}
	return o.devices.Sync()
}

// made says that a pointer leads to the device now.
func (o *opened) made(h *held) error {
	defer h.release()
	return o.phase(h.id, making, "")
}

// settle finishes or undoes what killed processes have begun, of one volume or, for
// "", of all.
func (o *opened) settle(ctx context.Context, volume string) error {
	files, err := o.devices.Names()
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		id, phase, ok := parseClaimName(file)
		if !ok || phase == "" {
			continue
		}
		if err := o.settleClaim(ctx, id, phase, volume); err != nil && !missing(err) && !errors.Is(err, errLocked) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (o *opened) settleClaim(ctx context.Context, id uint32, phase, volume string) error {
	h, err := o.lockClaim(id, phase)
	if err != nil {
		return err
	}
	kept := false
	defer func() {
		if !kept {
			h.release()
		}
	}()
	data, err := o.devices.ReadFile(claimName(id)+phase, maxFile)
	if err != nil {
		return err
	}
	c, err := decodeClaim(data)
	if err != nil {
		return fault.Unavailable("%s/%s %w", o.devices.Path(), claimName(id)+phase, err)
	}
	if volume != "" && c.Volume != volume {
		return nil
	}
	if c.Pool != o.pool.UUID {
		return nil
	}
	found, err := o.pointsAt(c, id, phase == deleting)
	if err != nil {
		return err
	}
	if phase == deleting {
		return o.finishDelete(ctx, h)
	}
	kept = true
	if found {
		return o.made(h)
	}
	return o.drop(ctx, h)
}

// pointsAt tells whether the pointer that a claim is for leads to its device; remove
// asks to remove that, wherever a volume's pointer is now.
func (o *opened) pointsAt(c claim, id uint32, remove bool) (found bool, err error) {
	check := func(dir *rooted.Dir, name string) error {
		ptr, err := readPointer(dir, name)
		if missing(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if ptr.Device != id || ptr.Pool != o.pool.UUID {
			return nil
		}
		found = true
		if remove {
			return unlink(dir, name)
		}
		return nil
	}
	if c.Snapshot != "" {
		dir, err := o.Snapshots.Dir(c.Volume)
		if missing(err) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		defer dir.Close()
		err = check(dir, c.Snapshot)
		return found, err
	}
	if err := check(o.volumes, c.Name+suffix); err != nil || found {
		return found, err
	}
	if remove {
		err = check(o.Trash, c.Volume)
	}
	return found, err
}
