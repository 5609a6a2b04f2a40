package thin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Names in a root.
const (
	metaName    = ".berth"
	thinName    = "thin"
	volumesName = "volumes"
	devicesName = "devices"
	lockName    = "lock"
	poolName    = "pool.json"
	suffix      = ".json"
)

// opened is a place with the engine's own directories, for the time of a call.
type opened struct {
	engine.Place
	e      *Engine
	client *devmapper.Client

	thin, volumes, devices *rooted.Dir
	// pool is the zero value as long as there is none.
	pool poolFile
}

// open opens the engine's directories, and makes them when make says so. The error
// wraps fs.ErrNotExist when the root has none.
func (e *Engine) open(ctx context.Context, p engine.Place, create bool) (_ *opened, err error) {
	client, err := e.mapper()
	if err != nil {
		return nil, err
	}
	o := &opened{Place: p, e: e, client: client}
	defer func() {
		if err != nil {
			o.close()
		}
	}()
	meta, err := subdir(p.Root, metaName, create)
	if err != nil {
		return nil, err
	}
	defer meta.Close()
	if o.thin, err = subdir(meta, thinName, create); err != nil {
		return nil, err
	}
	for name, dir := range map[string]**rooted.Dir{volumesName: &o.volumes, devicesName: &o.devices} {
		if *dir, err = subdir(o.thin, name, create); err != nil {
			return nil, err
		}
	}
	if o.pool, err = readPoolFile(o.thin); err != nil && !missing(err) {
		return nil, err
	}
	return o, e.settleOnce(ctx, o)
}

// subdir opens a directory, and makes it when create says so.
func subdir(parent *rooted.Dir, name string, create bool) (*rooted.Dir, error) {
	dir, err := parent.Dir(name)
	if !missing(err) || !create {
		return dir, err
	}
	if err := parent.EnsureDir(name, 0o700); err != nil {
		return nil, err
	}
	if err := parent.Sync(); err != nil {
		return nil, err
	}
	return parent.Dir(name)
}

func (o *opened) close() {
	for _, dir := range []*rooted.Dir{o.thin, o.volumes, o.devices} {
		if dir != nil {
			_ = dir.Close()
		}
	}
}

// settleOnce makes good what killed processes left, at this process's first look at
// the root. What fails is left for Abandon and Destroy.
func (e *Engine) settleOnce(ctx context.Context, o *opened) error {
	if !o.pool.Ready {
		return nil
	}
	e.mu.Lock()
	done := e.settled[o.pool.UUID]
	e.settled[o.pool.UUID] = true
	e.mu.Unlock()
	if done {
		return nil
	}
	if err := resume(ctx, o.client, o.prefix()); err != nil {
		return err
	}
	_ = o.settle(ctx, "")
	return ctx.Err()
}

// undoTime bounds what undoes a call whose own time may be over.
const undoTime = 30 * time.Second

// undoContext is for what must be undone although the caller has gone.
func undoContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTime)
}

// lockPoll is how often a lock that another process has is tried.
const lockPoll = 10 * time.Millisecond

// turn waits until no other goroutine and no other process of this host claims or
// activates devices of the root.
func (o *opened) turn(ctx context.Context) (release func(), err error) {
	select {
	case o.e.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() {
		if err != nil {
			<-o.e.turn
		}
	}()
	fd, err := unix.Openat(o.thin.FD(), lockName, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Join(o.thin.Path(), lockName), Err: err}
	}
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = unix.Close(fd); <-o.e.turn }, nil
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			select {
			case <-ctx.Done():
				err = ctx.Err()
			case <-time.After(lockPoll):
				continue
			}
		}
		return nil, errors.Join(fmt.Errorf("lock %s/%s: %w", o.thin.Path(), lockName, err), unix.Close(fd))
	}
}

// namePrefix begins the names of all devices of all of Berth's pools, uuidPrefix
// their UUIDs.
const (
	namePrefix = "berth-"
	uuidPrefix = "BERTH-THIN-"
)

// prefix of the names of this pool's devices; a part of the pool's UUID is enough to
// tell pools apart for people, and the device's UUID holds all of it.
func (o *opened) prefix() string { return namePrefix + o.pool.UUID[:8] + "-" }

func (o *opened) poolDevice() string { return o.prefix() + "pool" }

func (o *opened) deviceName(id uint32) string { return o.prefix() + strconv.FormatUint(uint64(id), 10) }

func (o *opened) deviceUUID(id uint32) string {
	return uuidPrefix + o.pool.UUID + "-" + strconv.FormatUint(uint64(id), 10)
}

// target is where a device is mounted on this host.
func (o *opened) target(id uint32) string { return filepath.Join(o.Local, o.deviceName(id)) }

// isMounted tells whether something is mounted at the target of a device.
func (o *opened) isMounted(id uint32) (bool, error) {
	top, err := rooted.MountIDOf(o.target(id))
	if missing(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	parent, err := rooted.MountIDOf(o.Local)
	return top != parent, err
}

// makeTarget makes the directory that a device is mounted at. Nobody but root gets
// into it while nothing is.
func (o *opened) makeTarget(id uint32) (string, error) {
	path := o.target(id)
	if err := os.Mkdir(path, 0o000); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return path, nil
}
