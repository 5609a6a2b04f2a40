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
	"github.com/berth-plugin/berth/volplugin/filesystem"
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

// newDevice claims a number and makes the device with a message that ends in that
// number: "create_thin", or "create_snap" with its origin. while, unless nil, is run
// around the message. The pool is running afterwards, also when nothing is active:
// the caller activates the device or calls drop.
func (o *opened) newDevice(ctx context.Context, c claim, message func(id uint32) string, part uint64, while func(func() error) error) (_ *held, err error) {
	release, err := o.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	defer func() {
		if err != nil {
			err = errors.Join(err, o.stopPool())
		}
	}()
	_, status, err := o.startPool(ctx, true)
	if err != nil {
		return nil, err
	}
	if err := o.room(status, part); err != nil {
		return nil, err
	}
	h, err := o.claim(ctx, status, c)
	if err != nil {
		return nil, err
	}
	send := func() error {
		if err := o.Before(ctx, "device.create"); err != nil {
			return err
		}
		_, err := o.client.Message(o.poolDevice(), 0, message(h.id))
		return err
	}
	if while != nil {
		err = while(send)
	} else {
		err = send()
	}
	if errors.Is(err, unix.EEXIST) {
		// The counter has gone round, or claims were lost. It is not ours: the claim stays,
		// so that nobody else meets it.
		return nil, errors.Join(fault.Conflict("thin pool of %s has a device %d that no volume has; try again", o.Root.Path(), h.id), o.made(h))
	}
	if err == nil {
		if err = o.Before(ctx, "device.count"); err == nil {
			count := status.Transaction&^uint64(1<<counterBits-1) | uint64(o.counted(status, h.id))
			err = o.setTransaction(status.Transaction, count)
		}
	}
	if err != nil {
		undo, cancel := undoContext(ctx)
		defer cancel()
		return nil, errors.Join(o.explain(err), o.dropInTurn(undo, h))
	}
	return h, nil
}

// counted is the count that belongs to a number, at or after the present one.
func (o *opened) counted(status devmapper.PoolStatus, id uint32) uint32 {
	count := uint32(status.Transaction) + 1
	return count + (id-count)&maxDevice
}

// explain adds what is wrong with the pool to an error of it.
func (o *opened) explain(err error) error {
	if err == nil || o.pool.UUID == "" {
		return err
	}
	status, errStatus := o.poolStatus()
	if errStatus != nil {
		return err
	}
	if what := problem(status); what != "" {
		return fault.Unavailable("%s: %w", what, err)
	}
	return err
}

// drop gives up a device that no pointer leads to. ctx may have ended.
func (o *opened) drop(ctx context.Context, h *held) error {
	ctx, cancel := undoContext(ctx)
	defer cancel()
	err := o.Before(ctx, "device.deactivate")
	if err == nil {
		err = o.deactivate(h.id)
	}
	if err != nil {
		h.release()
		return err
	}
	release, err := o.turn(ctx)
	if err != nil {
		h.release()
		return err
	}
	defer release()
	if _, _, err := o.startPool(ctx, false); err != nil {
		h.release()
		return err
	}
	return errors.Join(o.dropInTurn(ctx, h), o.stopPool())
}

func (o *opened) dropInTurn(ctx context.Context, h *held) error {
	defer h.release()
	if err := o.Before(ctx, "device.drop"); err != nil {
		return err
	}
	if err := o.deleteDevice(h.id); err != nil {
		return err
	}
	return unlink(o.devices, claimName(h.id)+making)
}

// deleteDevice deletes a device from the running pool. Missing is no error.
func (o *opened) deleteDevice(id uint32) error {
	_, err := o.client.Message(o.poolDevice(), 0, "delete "+claimName(id))
	if errors.Is(err, unix.ENODATA) {
		return nil
	}
	if errors.Is(err, unix.EBUSY) {
		return fault.Conflict("thin device %d is in use: %w", id, err)
	}
	return o.explain(err)
}

// destroy deletes a device that nobody has mounted, and its pointer. When it fails
// in the middle, the device is gone for everybody, and settle goes on.
func (o *opened) destroy(ctx context.Context, id uint32, dir *rooted.Dir, name string) error {
	if err := o.deactivate(id); err != nil {
		return err
	}
	if err := o.Before(ctx, "delete.mark"); err != nil {
		return err
	}
	if err := o.phase(id, "", deleting); err != nil && !missing(err) {
		return err
	}
	if err := o.Before(ctx, "delete.pointer"); err != nil {
		return err
	}
	if err := unlink(dir, name); err != nil {
		return err
	}
	h, err := o.lockClaim(id, deleting)
	if missing(err) || errors.Is(err, errLocked) {
		return nil // somebody else is at it
	}
	if err != nil {
		return err
	}
	defer h.release()
	return o.finishDelete(ctx, h)
}

// finishDelete deletes a device whose claim says so.
func (o *opened) finishDelete(ctx context.Context, h *held) error {
	if err := o.deactivate(h.id); err != nil {
		return err
	}
	return o.withPool(ctx, func(devmapper.Device, devmapper.PoolStatus) error {
		if err := o.Before(ctx, "delete.device"); err != nil {
			return err
		}
		if err := o.deleteDevice(h.id); err != nil {
			return err
		}
		if err := o.Before(ctx, "delete.claim"); err != nil {
			return err
		}
		return unlink(o.devices, claimName(h.id)+deleting)
	})
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

// load reads a pointer, whose device is complete. The error wraps fs.ErrNotExist when
// there is none, or its deletion has begun.
func (o *opened) load(ctx context.Context, dir *rooted.Dir, name string) (pointer, error) {
	ptr, err := readPointer(dir, name)
	if err != nil {
		return pointer{}, err
	}
	if ptr.Pool != o.pool.UUID {
		return pointer{}, fault.Unavailable("%s/%s leads to thin pool %s, and the root's is %s", dir.Path(), name, ptr.Pool, o.pool.UUID)
	}
	if err := o.confirm(dir, name, ptr.Device, ptr.Volume); err != nil {
		return pointer{}, err
	}
	if r := ptr.Rollback; r != nil && r.Pending {
		return o.finishRollback(ctx, dir, name, ptr)
	}
	return ptr, nil
}

// confirm makes sure of the claim on a device that a pointer leads to.
func (o *opened) confirm(dir *rooted.Dir, name string, id uint32, volume string) error {
	if _, err := o.devices.Stat(claimName(id)); !missing(err) {
		return err
	}
	if _, err := o.devices.Stat(claimName(id) + deleting); err == nil {
		if err := unlink(dir, name); err != nil {
			return err
		}
		return &fs.PathError{Op: "open", Path: filepath.Join(dir.Path(), name), Err: fs.ErrNotExist}
	}
	err := o.phase(id, making, "")
	if !missing(err) {
		return err
	}
	// Lost. The number must not be given to another device.
	c := claim{Schema: schema, Pool: o.pool.UUID, Volume: volume, Name: "unknown"}
	if err := o.newFile(o.devices, claimName(id), c); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// activate makes a device of this host, of at least size bytes, of a thin device, and
// starts the pool for it.
func (o *opened) activate(ctx context.Context, id uint32, size uint64, readOnly bool) (node string, err error) {
	release, err := o.turn(ctx)
	if err != nil {
		return "", err
	}
	defer release()
	defer func() {
		if err != nil {
			err = errors.Join(o.explain(err), o.stopPool())
		}
	}()
	pool, _, err := o.startPool(ctx, false)
	if err != nil {
		return "", err
	}
	name := o.deviceName(id)
	table := devmapper.Thin(size/devmapper.SectorSize, pool.Number, id)
	dev, err := o.client.Find(name)
	if err == nil && (!dev.Active || dev.ReadOnly != readOnly) {
		if err := o.client.Remove(name); err != nil {
			return "", err
		}
		err = fs.ErrNotExist
	}
	if missing(err) {
		if err := o.Before(ctx, "device.activate"); err != nil {
			return "", err
		}
		_, err = o.client.Create(name, o.deviceUUID(id), readOnly, table)
		if errors.Is(err, unix.ENODATA) {
			err = fault.Unavailable("thin device %d is missing in the pool of %s: was its metadata repaired, or an old copy put back? %w", id, o.Root.Path(), err)
		}
		if err != nil {
			return "", err
		}
		return o.client.NodePath(name), nil
	}
	if err != nil {
		return "", err
	}
	now, err := o.client.Table(name)
	if err != nil {
		return "", err
	}
	if len(now) != 1 || now[0].Kind != targetThin || now[0].Params != table.Params {
		return "", fault.Conflict("device %s is not thin device %d of the pool", name, id)
	}
	if now[0].Length < table.Length {
		if err := o.client.Load(name, readOnly, table); err != nil {
			return "", err
		}
		if err := o.reload(name); err != nil {
			return "", err
		}
	} else if dev.Suspended {
		if err := o.client.Resume(name); err != nil {
			return "", err
		}
	}
	return o.client.Node(dev)
}

// reload puts a loaded table in the place of the present one.
func (o *opened) reload(name string) error {
	return errors.Join(o.client.Suspend(name), o.client.Resume(name))
}

// deactivate unmounts a device and removes it from this host. It is a conflict when
// somebody uses it, and then it is mounted as before.
func (o *opened) deactivate(id uint32) error {
	target := o.target(id)
	name := o.deviceName(id)
	was, err := o.isMounted(id)
	if err != nil {
		return err
	}
	if was {
		if err := filesystem.Unmount(target); err != nil {
			return err
		}
	}
	err = o.client.Remove(name)
	if errors.Is(err, unix.EBUSY) {
		err = fault.Conflict("thin device %s is in use: %w", name, err)
		if was {
			// A mount of it elsewhere keeps the file system alive: this is one more of it.
			err = errors.Join(err, o.remount(id))
		}
		return err
	}
	if err != nil {
		return err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// remount mounts a file system again that somebody still has mounted.
func (o *opened) remount(id uint32) error {
	name := o.deviceName(id)
	info, err := filesystem.IdentifyFile(o.client.NodePath(name))
	if err != nil {
		return err
	}
	dev, err := o.client.Find(name)
	if err != nil {
		return err
	}
	return filesystem.Mount(o.client.NodePath(name), info.Kind, o.target(id), filesystem.MountOptions{ReadOnly: dev.ReadOnly, Discard: !dev.ReadOnly})
}

// quit stops the pool when nothing is active in it.
func (o *opened) quit(ctx context.Context) error {
	ctx, cancel := undoContext(ctx)
	defer cancel()
	release, err := o.turn(ctx)
	if err != nil {
		return err
	}
	defer release()
	return o.stopPool()
}
