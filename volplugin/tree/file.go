package tree

import (
	"errors"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// wanted is what statx(2) is asked for.
const wanted = unix.STATX_BASIC_STATS | unix.STATX_BTIME

// An inode of the source. Subvolumes of btrfs number theirs each for itself. The time
// it was made tells it from a later one with the same number, where the file system
// keeps it.
type inode struct {
	major, minor uint32
	ino          uint64
	made         unix.StatxTimestamp
}

func keyOf(st *unix.Statx_t) inode {
	return inode{st.Dev_major, st.Dev_minor, st.Ino, st.Btime}
}

// links are the files with several names.
type links struct {
	mu sync.Mutex
	of map[inode]*firstName
}

// A firstName is where the copy of a file with several names is.
type firstName struct {
	sync.Mutex
	dir  *folder // nil: not made yet
	name string
	left int
}

// get returns the first name of a file, locked.
func (l *links) get(st *unix.Statx_t) *firstName {
	key := keyOf(st)
	l.mu.Lock()
	first := l.of[key]
	if first == nil {
		first = &firstName{left: int(st.Nlink)}
		l.of[key] = first
	}
	// The last one to ask needs no memory for those who come after.
	if first.left--; first.left == 0 {
		delete(l.of, key)
	}
	l.mu.Unlock()
	first.Lock()
	return first
}

// link gives the copy at first another name in d.
func (w *worker) link(first *firstName, d *openDir, name string) error {
	from := d.dst
	if first.dir != d.folder {
		if w.linked.at != &first.dir.node {
			fd, err := w.linked.open(&first.dir.node)
			if err != nil {
				return err
			}
			w.linked.keep(&first.dir.node, fd)
		}
		from = w.linked.fd
	}
	return unix.Linkat(from, first.name, d.dst, name, 0)
}

// leaseTime is how long a file may be held by a lease of another process before
// the kernel breaks it; 45 s unless somebody has set another time.
const leaseTime = 50 * time.Second

// hold takes hold of a file without opening it. ok is false when it is not to be
// copied: it is gone, or under a mount.
func (w *worker) hold(d *openDir, name string, st *unix.Statx_t) (fd int, ok bool, err error) {
	fd, err = w.from.open(d.src, name, unix.O_PATH)
	if err == nil {
		err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, wanted, st)
		if err == nil {
			return fd, true, nil
		}
		_ = unix.Close(fd)
	}
	switch {
	case gone(err):
		return -1, false, nil
	case errors.Is(err, unix.EXDEV):
		w.note(&w.stats.Mounts, &w.stats.MountsSome, join(d.path(), name))
		return -1, false, nil
	}
	return -1, false, err
}

// openHeld opens the regular file that is held, for reading.
func (w *worker) openHeld(held int) (int, error) {
	path := strconv.Itoa(held)
	flags := unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC | unix.O_NOATIME
	end := time.Time{}
	for {
		fd, err := unix.Openat(w.proc, path, flags, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EPERM && flags&unix.O_NOATIME != 0:
			flags &^= unix.O_NOATIME
			continue
		case err == unix.EAGAIN:
			// Somebody has a lease for writing and is being asked to give it back.
			if end.IsZero() {
				end = time.Now().Add(leaseTime)
			}
			if time.Now().After(end) {
				return -1, err
			}
			if err := w.sleep(20 * time.Millisecond); err != nil {
				return -1, err
			}
			continue
		}
		return fd, err
	}
}

func (w *worker) sleep(d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-w.ctx.Done():
		return w.ctx.Err()
	case <-timer.C:
		return nil
	}
}

// regular copies a file. again says that it is no regular file.
//
// All rounds read the inode that had the name at first. Should another file take its
// place meanwhile, the copy has what was there before, and never a mixture.
func (w *worker) regular(d *openDir, name string) (again bool, err error) {
	path := func() string { return join(d.path(), name) }
	var st unix.Statx_t
	began := time.Now()
	held, ok, err := w.hold(d, name, &st)
	if !ok {
		return false, w.failed("open", path(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return true, unix.Close(held)
	}
	src, err := w.openHeld(held)
	_ = unix.Close(held)
	if err != nil {
		if gone(err) {
			err = nil
		}
		return false, w.failed("open", path(), err)
	}
	defer unix.Close(src)
	dst, done, err := w.create(d, name, &st)
	if done || err != nil {
		return false, w.failed("make the copy of", path(), err)
	}
	w.files.Add(1)
	defer func() {
		// Network file systems tell of failed writes here.
		if closed := unix.Close(dst); closed != nil && err == nil {
			err = w.failed("write the copy of", path(), closed)
		}
	}()
	for round := 1; ; round++ {
		if err := w.round(src, dst, &st, round > 1, path); err != nil {
			return false, err
		}
		stable, err := w.stable(src, &st, began, path)
		if stable || err != nil {
			return false, err
		}
		if round == rounds {
			w.note(&w.stats.Unstable, &w.stats.UnstableSome, path())
			return false, nil
		}
		if err := w.sleep(tick << (round - 1)); err != nil {
			return false, err
		}
		if err := w.reset(dst); err != nil {
			return false, w.failed("empty the copy of", path(), err)
		}
		began = time.Now()
		if err := unix.Statx(src, "", unix.AT_EMPTY_PATH, wanted, &st); err != nil {
			return false, w.failed("stat", path(), err)
		}
	}
}

// round copies what the open file has to dst, which is empty.
func (w *worker) round(src, dst int, st *unix.Statx_t, repeated bool, path func() string) error {
	if err := w.data(src, dst, st, repeated); err != nil {
		return w.failed("copy", path(), err)
	}
	explicit := repeated || !w.fsType.local()
	if explicit || st.Uid != w.own.uid || st.Gid != w.own.gid {
		if err := unix.Fchown(dst, int(st.Uid), int(st.Gid)); err != nil {
			return w.failed("set the owner of the copy of", path(), err)
		}
	}
	if err := w.xattrs(src, dst, "", path, repeated); err != nil {
		return err
	}
	// After the owner, which clears set-ID bits.
	if mode := uint32(st.Mode) & 0o7777; explicit || mode != mode&0o777&^w.own.umask {
		if err := unix.Fchmod(dst, mode); err != nil {
			return w.failed("set the mode of the copy of", path(), err)
		}
	}
	if err := setTimes(dst, [2]unix.Timespec{timespec(st.Atime), timespec(st.Mtime)}); err != nil {
		return w.failed("set times of the copy of", path(), err)
	}
	if !w.options.NoSync && !w.fsType.syncs() {
		return w.failed("write the copy of", path(), fsync(dst))
	}
	return nil
}

// create makes the copy of a file, or gives it another name when it is there already:
// then all is done.
func (w *worker) create(d *openDir, name string, st *unix.Statx_t) (dst int, done bool, err error) {
	if st.Nlink > 1 {
		first := w.links.get(st)
		defer first.Unlock()
		if first.dir != nil {
			if err := w.link(first, d, name); !errors.Is(err, unix.EMLINK) {
				return -1, true, err
			}
		} else {
			defer func() {
				if err == nil {
					first.dir, first.name = d.folder, name
				}
			}()
		}
	}
	dst, err = unix.Openat(d.dst, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, uint32(st.Mode)&0o777)
	return dst, false, err
}

// reset makes a copy empty again.
func (w *worker) reset(dst int) error {
	if err := unix.Ftruncate(dst, 0); err != nil {
		return err
	}
	return w.clearXattrs(dst)
}

// tick is more than the time for which the clock of a file system's time stamps may
// stand still.
const tick = 10 * time.Millisecond

// stable tells whether the file is still what st says.
func (w *worker) stable(src int, st *unix.Statx_t, began time.Time, path func() string) (bool, error) {
	if w.options.read != nil {
		w.options.read(path())
	}
	var now unix.Stat_t
	if err := unix.Fstat(src, &now); err != nil {
		return false, w.failed("stat", path(), err)
	}
	if now.Size != int64(st.Size) || now.Mtim != timespec(st.Mtime) || now.Ctim != timespec(st.Ctime) {
		return false, nil
	}
	// What was written just before may have been written to just after, with the same time.
	if age := began.Sub(time.Unix(st.Ctime.Sec, int64(st.Ctime.Nsec))); w.srcType.local() && age >= 0 && age < tick {
		return false, nil
	}
	return true, nil
}

func timespec(t unix.StatxTimestamp) unix.Timespec {
	return unix.Timespec{Sec: t.Sec, Nsec: int64(t.Nsec)}
}

// special copies what is neither a regular file nor a directory: links, devices,
// pipes, sockets. again says that it is one of the former.
func (w *worker) special(d *openDir, name string) (again bool, err error) {
	path := func() string { return join(d.path(), name) }
	var st unix.Statx_t
	held, ok, err := w.hold(d, name, &st)
	if !ok {
		return false, w.failed("open", path(), err)
	}
	defer unix.Close(held)
	make := func() error {
		return unix.Mknodat(d.dst, name, uint32(st.Mode)&(unix.S_IFMT|0o777), int(unix.Mkdev(st.Rdev_major, st.Rdev_minor)))
	}
	link := false
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR:
		return true, nil
	case unix.S_IFLNK:
		link = true
		make = func() error {
			target, err := readlink(held)
			if err != nil {
				return err
			}
			return unix.Symlinkat(target, d.dst, name)
		}
	}
	if st.Nlink > 1 {
		first := w.links.get(&st)
		defer first.Unlock()
		if first.dir != nil {
			if err := w.link(first, d, name); !errors.Is(err, unix.EMLINK) {
				return false, w.failed("link the copy of", path(), err)
			}
		} else {
			defer func() {
				if err == nil {
					first.dir, first.name = d.folder, name
				}
			}()
		}
	}
	if err := make(); err != nil {
		return false, w.failed("make the copy of", path(), err)
	}
	w.files.Add(1)
	if !w.fsType.local() || st.Uid != w.own.uid || st.Gid != w.own.gid {
		if err := unix.Fchownat(d.dst, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return false, w.failed("set the owner of the copy of", path(), err)
		}
	}
	if err := w.xattrs(held, d.dst, name, path, false); err != nil {
		return false, err
	}
	if !link {
		// Nobody else comes to the copy, so it is not a link by now, which this would follow.
		if err := unix.Fchmodat(d.dst, name, uint32(st.Mode)&0o7777, 0); err != nil {
			return false, w.failed("set the mode of the copy of", path(), err)
		}
	}
	times := []unix.Timespec{timespec(st.Atime), timespec(st.Mtime)}
	if err := unix.UtimesNanoAt(d.dst, name, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, w.failed("set times of the copy of", path(), err)
	}
	return false, nil
}

// readlink reads the link that is held.
func readlink(held int) (string, error) {
	for size := 256; ; size *= 2 {
		buf := make([]byte, size)
		n, err := unix.Readlinkat(held, "", buf)
		if err != nil {
			return "", err
		}
		if n < size {
			return string(buf[:n]), nil
		}
	}
}
