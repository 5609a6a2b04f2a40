package tree

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Reflink says whether files of the copy share their data with the original until
// one of the two is written to.
type Reflink int

// Auto shares where the file system can and copies elsewhere. Require fails with
// ErrNoReflink where it cannot. Never copies.
const (
	Auto Reflink = iota
	Require
	Never
)

// ErrNoReflink is returned for Require where the file system cannot share data
// between files.
var ErrNoReflink = errors.New("the file system cannot share data between files")

// ErrNotEmpty is returned for a target that has entries.
var ErrNotEmpty = errors.New("is not empty")

// Options of a copy. The zero value is good.
type Options struct {
	// Parallel is how many files are worked on at a time, 0 for a number that
	// suits the machine.
	Parallel int
	Reflink  Reflink
	// Progress is called now and then, never twice at a time, with what has been copied so
	// far, counted as in Stats. It must not block.
	Progress func(files, bytes uint64)
	// NoSync leaves it to the caller to put the copy on disk.
	NoSync bool

	// old pretends that the kernel has no openat2.
	old bool
	// read is called when a file has been read, before it is looked at whether it
	// changed.
	read func(path string)
}

// Stats tell what is in a copy. Paths in them are relative to the top, as raw as
// the names in the tree are, and at most a few of each kind.
type Stats struct {
	// Files counts inodes of all types, directories and the top among them, each once.
	Files uint64
	// Bytes of data that were copied or shared, without holes.
	Bytes uint64
	// Cloned counts the files that share their data with the original.
	Cloned uint64
	// Unstable counts files that changed each time they were read.
	Unstable     uint64
	UnstableSome []string
	// Mounts counts mount points, which are left out with all that is mounted there.
	Mounts     uint64
	MountsSome []string
	// Lost counts extended attributes and ACLs that the target could not store.
	Lost     uint64
	LostSome []string
}

// some bounds the lists in Stats.
const some = 10

// Rounds in which a file may change while it is read, before it is given up as unstable.
const rounds = 4

// Copy copies what is in src into the empty directory dst, and the owner, mode,
// times and extended attributes of src itself. While it works dst has mode 0700 and
// belongs to this process's user, so nobody sees a half-made copy from outside. When it
// returns without an error all is on disk. After an error, among them ctx's, dst has some part
// of the copy, which the caller deletes; deleting and other copies may go on at the same
// time, in other directories.
func Copy(ctx context.Context, src, dst *rooted.Dir, o Options) (Stats, error) {
	c, err := newCopier(ctx, src, dst, o)
	if err != nil {
		return Stats{}, err
	}
	// From here on a descriptor is one step away.
	c.proc, err = unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Stats{}, &fs.PathError{Op: "open", Path: "/proc/self/fd", Err: err}
	}
	defer unix.Close(c.proc)
	// Before the first write: failures of the kernel to write what it has taken are
	// told to handles that were open then.
	handle, err := openAgain(c.dst)
	if err != nil {
		return Stats{}, &fs.PathError{Op: "open", Path: dst.Path(), Err: err}
	}
	defer unix.Close(handle)
	err = c.run()
	c.report(true)
	c.stats.Files, c.stats.Bytes, c.stats.Cloned = c.files.Load(), c.bytes.Load(), c.cloned.Load()
	if err == nil && !o.NoSync {
		err = c.sync(handle)
	}
	return c.stats, err
}

// A job is a directory to be copied, or some entries of one.
type job struct {
	node  *folder
	open  *openDir
	batch []entry
}

// A folder is a directory and what has to be remembered of it for those below.
type folder struct {
	node
	up    *folder
	times [2]unix.Timespec
}

// An openDir is a directory at work. Its last user completes it.
type openDir struct {
	*folder
	src, dst int
	stat     unix.Statx_t
	users    atomic.Int32
}

type copier struct {
	pool[job]
	ctx      context.Context //nolint:containedctx // of one call of Copy
	options  Options
	from, to beneath
	src, dst int // the tops
	proc     int // /proc/self/fd
	srcPath  string
	// fsType is the target's, srcType the original's.
	fsType, srcType fsType
	// own are this process's IDs, which new files have, and umask.
	own struct {
		uid, gid uint32
		umask    uint32
	}
	// dstDev and dstIno are the target's, which is not to be copied into itself.
	dstMajor, dstMinor uint32
	dstIno             uint64

	noClone  atomic.Bool // FICLONE does not work here
	noRange  atomic.Bool // copy_file_range does not work here
	files    atomic.Uint64
	bytes    atomic.Uint64
	cloned   atomic.Uint64
	links    links
	reporter sync.Mutex
	reported time.Time

	statsMu sync.Mutex
	stats   Stats
}

func newCopier(ctx context.Context, src, dst *rooted.Dir, o Options) (*copier, error) {
	c := &copier{
		ctx: ctx, options: o, src: src.FD(), dst: dst.FD(), srcPath: src.Path(),
		from: newBeneath(src), to: newBeneath(dst),
	}
	if o.old {
		c.from.old, c.to.old = true, true
	}
	c.links.of = map[inode]*firstName{}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	empty, err := dst.Empty()
	if err == nil && !empty {
		err = &fs.PathError{Op: "copy", Path: dst.Path(), Err: ErrNotEmpty}
	}
	if err != nil {
		return nil, err
	}
	if c.fsType, err = typeOf(dst); err != nil {
		return nil, err
	}
	if c.srcType, err = typeOf(src); err != nil {
		return nil, err
	}
	c.own.uid, c.own.gid, c.own.umask = uint32(os.Geteuid()), uint32(os.Getegid()), umask()
	var st unix.Statx_t
	if err := unix.Statx(c.dst, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: dst.Path(), Err: err}
	}
	c.dstMajor, c.dstMinor, c.dstIno = st.Dev_major, st.Dev_minor, st.Ino
	if st.Uid != c.own.uid || st.Gid != c.own.gid {
		if err := dst.SetOwner(int(c.own.uid), int(c.own.gid)); err != nil {
			return nil, err
		}
	}
	if err := dst.SetMode(0o700); err != nil {
		return nil, err
	}
	// What is made in it would inherit what its parent has handed down to it.
	for _, acl := range []string{"system.posix_acl_default", "system.posix_acl_access"} {
		err := unix.Removexattr(dst.ProcPath(), acl)
		if err != nil && err != unix.ENODATA && err != unix.ENOTSUP {
			return nil, &fs.PathError{Op: "remove the ACL of", Path: dst.Path(), Err: err}
		}
	}
	if o.Reflink == Never {
		c.noClone.Store(true)
	}
	return c, nil
}

func (c *copier) run() error {
	n := workers(c.options.Parallel)
	do := make([]func(job) error, n)
	for i := range do {
		w := &worker{
			copier: c,
			in:     lane{beneath: &c.from, top: c.src},
			out:    lane{beneath: &c.to, top: c.dst},
			linked: lane{beneath: &c.to, top: c.dst},
		}
		defer w.close()
		do[i] = w.do
	}
	err := run(c.ctx, job{node: &folder{}}, do, &c.pool)
	// What nobody has come to after an error has open directories.
	for _, j := range c.urgent {
		c.abandon(j.open)
	}
	return err
}

// A worker is what one goroutine needs for itself.
type worker struct {
	*copier
	in, out lane
	// linked is the directory that hard links were made to last.
	linked  lane
	names   [64 << 10]byte // for getdents
	attrs   []byte         // for lists and values of extended attributes
	buf     []byte         // for data
	pending []job
}

func (w *worker) close() {
	w.in.drop()
	w.out.drop()
	w.linked.drop()
}

// batchSize is how many entries of a long directory are given to another worker.
const batchSize = 128

func (w *worker) do(j job) error {
	if j.open != nil {
		return w.batch(j.open, j.batch)
	}
	d, err := w.enter(j.node)
	if d == nil || err != nil {
		return err
	}
	for {
		entries, err := readEntries(d.src, w.names[:], nil)
		if err != nil {
			w.abandon(d)
			return w.failed("read", d.path(), err)
		}
		if len(entries) == 0 {
			return w.leave(d)
		}
		for len(entries) > 2*batchSize {
			d.users.Add(1)
			w.pushUrgent(job{open: d, batch: entries[:batchSize:batchSize]})
			entries = entries[batchSize:]
		}
		if err := w.entries(d, entries); err != nil {
			w.abandon(d)
			return err
		}
		// What others have not taken is done before more is read, so that however long the
		// directory is, its names do not fill the memory.
		for {
			own, ok := w.takeBack(d)
			if !ok {
				break
			}
			if err := w.batch(own.open, own.batch); err != nil {
				w.abandon(d)
				return err
			}
		}
	}
}

// takeBack returns a batch of d that is waiting.
func (c *copier) takeBack(d *openDir) (job, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	last := len(c.urgent) - 1
	if last < 0 || c.urgent[last].open != d || c.closed {
		return job{}, false
	}
	own := c.urgent[last]
	c.urgent[last] = job{}
	c.urgent = c.urgent[:last]
	return own, true
}

// enter opens a directory and its copy. It returns nil for one that has vanished,
// turned into something else, or become a mount point.
func (w *worker) enter(f *folder) (*openDir, error) {
	d := &openDir{folder: f, dst: -1}
	d.users.Store(1)
	var err error
	d.src, err = w.in.open(&f.node)
	if err == nil {
		err = unix.Statx(d.src, "", unix.AT_EMPTY_PATH, wanted, &d.stat)
	}
	switch {
	case err == nil:
	case f.up == nil:
		w.abandon(d)
		return nil, w.failed("open", "", err)
	case gone(err), turned(err), errors.Is(err, unix.EXDEV):
		w.abandon(d)
		path := f.path()
		if errors.Is(err, unix.EXDEV) {
			w.note(&w.stats.Mounts, &w.stats.MountsSome, path)
		} else if turned(err) {
			w.note(&w.stats.Unstable, &w.stats.UnstableSome, path)
		}
		return nil, w.withdraw(f)
	default:
		w.abandon(d)
		return nil, w.failed("open", f.path(), err)
	}
	if d.stat.Ino == w.dstIno && d.stat.Dev_major == w.dstMajor && d.stat.Dev_minor == w.dstMinor {
		w.abandon(d)
		return nil, w.failed("copy", f.path(), errors.New("the copy would be inside the original"))
	}
	if d.dst, err = w.out.open(&f.node); err != nil {
		w.abandon(d)
		return nil, w.failed("open the copy of", f.path(), err)
	}
	f.times = [2]unix.Timespec{timespec(d.stat.Atime), timespec(d.stat.Mtime)}
	if w.fsType == btrfs {
		copyNoCOW(d.src, d.dst)
	}
	w.files.Add(1)
	return d, nil
}

// withdraw removes the copy, still empty, of a directory that is not there to be
// copied.
func (w *worker) withdraw(f *folder) error {
	parent, err := w.out.open(&f.up.node)
	if err != nil {
		return w.failed("open the copy of", f.up.path(), err)
	}
	defer unix.Close(parent)
	if err := unix.Unlinkat(parent, f.name, unix.AT_REMOVEDIR); err != nil {
		return w.failed("remove the copy of", f.path(), err)
	}
	// It may be complete already, and have its times. Where not, they are set once more later.
	return w.failed("set times of the copy of", f.up.path(), setTimes(parent, f.up.times))
}

func (w *worker) batch(d *openDir, entries []entry) error {
	if err := w.entries(d, entries); err != nil {
		w.abandon(d)
		return err
	}
	return w.leave(d)
}

// entries copies the entries of a directory; directories among them are made and left
// for later.
func (w *worker) entries(d *openDir, entries []entry) error {
	w.pending = w.pending[:0]
	for _, e := range entries {
		if w.ended.Load() {
			return errEnded
		}
		if err := w.entry(d, e); err != nil {
			return err
		}
	}
	if len(w.pending) > 0 {
		w.push(w.pending...)
		clear(w.pending)
	}
	w.report(false)
	return nil
}

// tries is how often an entry may turn into another type while it is looked at.
const tries = 5

func (w *worker) entry(d *openDir, e entry) error {
	for range tries {
		var (
			again bool
			err   error
		)
		switch e.kind {
		case unix.DT_DIR:
			return w.mkdir(d, e.name)
		case unix.DT_REG:
			again, err = w.regular(d, e.name)
		case unix.DT_UNKNOWN:
			again = true
		default:
			again, err = w.special(d, e.name)
		}
		if err != nil || !again {
			return err
		}
		var st unix.Stat_t
		if err := unix.Fstatat(d.src, e.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			if gone(err) {
				return nil
			}
			return w.failed("stat", join(d.path(), e.name), err)
		}
		e.kind = byte(st.Mode & unix.S_IFMT >> 12)
	}
	w.note(&w.stats.Unstable, &w.stats.UnstableSome, join(d.path(), e.name))
	return nil
}

// mkdir makes the copy of a directory and leaves its content for later. Whether the
// original is still there is seen then.
func (w *worker) mkdir(d *openDir, name string) error {
	if err := unix.Mkdirat(d.dst, name, 0o700); err != nil {
		return w.failed("make the copy of", join(d.path(), name), err)
	}
	w.pending = append(w.pending, job{node: &folder{node: node{parent: &d.node, name: name}, up: d.folder}})
	return nil
}

// leave completes a directory when all its entries are there.
func (w *worker) leave(d *openDir) error {
	if d.users.Add(-1) > 0 {
		return nil
	}
	err := w.finish(d)
	w.in.keep(&d.node, d.src)
	w.out.keep(&d.node, d.dst)
	return err
}

// finish sets all that the directory itself has.
func (w *worker) finish(d *openDir) error {
	path := d.path
	if err := w.owner(d.dst, &d.stat); err != nil {
		return w.failed("set the owner of the copy of", path(), err)
	}
	if err := w.xattrs(d.src, d.dst, "", path, false); err != nil {
		return err
	}
	if mode := uint32(d.stat.Mode) & 0o7777; mode != 0o700 {
		if err := unix.Fchmod(d.dst, mode); err != nil {
			return w.failed("set the mode of the copy of", path(), err)
		}
	}
	if err := setTimes(d.dst, d.times); err != nil {
		return w.failed("set times of the copy of", path(), err)
	}
	if !w.options.NoSync && !w.fsType.syncs() {
		if err := fsync(d.dst); err != nil {
			return w.failed("write the copy of", path(), err)
		}
	}
	return nil
}

// abandon gives up a use of a directory without completing it.
func (c *copier) abandon(d *openDir) {
	if d.users.Add(-1) > 0 {
		return
	}
	if d.src >= 0 {
		_ = unix.Close(d.src)
	}
	if d.dst >= 0 {
		_ = unix.Close(d.dst)
	}
}

// note counts what is to be told, and remembers some of it.
func (c *copier) note(count *uint64, list *[]string, path string) {
	c.statsMu.Lock()
	defer c.statsMu.Unlock()
	*count++
	if len(*list) < some {
		*list = append(*list, path)
	}
}

// failed adds the path to an error, if it is one.
func (c *copier) failed(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return failure(op, c.srcPath, path, err)
}

func failure(op, top, path string, err error) error {
	// A hostile tree is as deep as it likes.
	if len(path) > maxPath {
		path = path[:maxPath/2] + "..." + path[len(path)-maxPath/2:]
	}
	return &fs.PathError{Op: op, Path: join(top, path), Err: err}
}

func join(dir, name string) string {
	if dir == "" || name == "" {
		return dir + name
	}
	return dir + "/" + name
}

// report calls Progress, not too often.
func (c *copier) report(last bool) {
	if c.options.Progress == nil {
		return
	}
	if last {
		c.reporter.Lock()
	} else if !c.reporter.TryLock() {
		return
	}
	defer c.reporter.Unlock()
	if now := time.Now(); last || now.Sub(c.reported) > 100*time.Millisecond {
		c.reported = now
		c.options.Progress(c.files.Load(), c.bytes.Load())
	}
}

// sync puts the copy on disk. The handle tells of errors since it was opened.
func (c *copier) sync(handle int) error {
	if !c.fsType.syncs() {
		return nil // each file has been synced
	}
	return c.failed("write the copy of", "", unix.Syncfs(handle))
}

// umask of the process, and if that cannot be read a value that makes every mode be
// set explicitly.
func umask() uint32 {
	const unknown = 0o777
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return unknown
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "Umask:"); ok {
			mask, err := strconv.ParseUint(strings.TrimSpace(value), 8, 32)
			if err == nil {
				return uint32(mask)
			}
		}
	}
	return unknown
}
