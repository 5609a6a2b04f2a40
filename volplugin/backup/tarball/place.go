package tarball

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// file is what an entry says of a file, but for its name and content.
type file struct {
	kind     uint32 // unix.S_IFREG and so on
	mode     uint32
	uid, gid int
	target   string // of a symbolic link
	device   uint64
	times    []unix.Timespec
	xattrs   map[string]string

	lost []string // the extended attributes that could not be set
}

func fileOf(h *tar.Header, kind uint32) (*file, error) {
	attributes, lost, err := xattrs(h)
	if err != nil {
		return nil, err
	}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) > 1<<32-2 || int64(h.Gid) > 1<<32-2 {
		return nil, fmt.Errorf("owner %d:%d: want numbers from 0 to %d", h.Uid, h.Gid, int64(1<<32-2))
	}
	if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
		return nil, fmt.Errorf("device %d:%d does not exist", h.Devmajor, h.Devminor)
	}
	// Also where the archive was made by what knows seconds only.
	at := unix.Timespec{Sec: h.ModTime.Unix(), Nsec: int64(h.ModTime.Nanosecond())}
	return &file{
		kind: kind, mode: uint32(h.Mode) & 0o7777, uid: h.Uid, gid: h.Gid, target: h.Linkname,
		device: unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)), times: []unix.Timespec{at, at}, xattrs: attributes, lost: lost,
	}, nil
}

// errKind says that a name was another kind of file before.
var errKind = errors.New("is there already and of another kind")

// A place makes files below a directory.
type place struct {
	dirs    *tree.Below
	targets *tree.Below // for hard links
	// stack are the directories from the top to the one at work. The times of each are
	// set when it is left.
	stack  []*frame
	buffer []byte
}

// A frame is a directory that is being filled.
type frame struct {
	path  string
	times []unix.Timespec
	// inherits says that what is made in it gets ACLs from it, which have to go.
	inherits bool
}

func newPlace(dst *rooted.Dir) place {
	return place{dirs: tree.NewBelow(dst), targets: tree.NewBelow(dst), buffer: make([]byte, bufferSize)}
}

func (p *place) close() {
	p.dirs.Close()
	p.targets.Close()
}

// enter opens the directory path to make something in it; its parents are made where
// they are missing. Directories that do not lead to it are left.
func (p *place) enter(path string) (fd int, in *frame, err error) {
	for len(p.stack) > 0 && !within(path, p.stack[len(p.stack)-1].path) {
		if err := p.leave(); err != nil {
			return -1, nil, err
		}
	}
	if len(p.stack) > 0 && p.stack[len(p.stack)-1].path == path {
		fd, err := p.dirs.Dir(path)
		return fd, p.stack[len(p.stack)-1], err
	}
	if path != "" {
		above, name := split(path)
		fd, in, err := p.enter(above)
		if err != nil {
			return -1, nil, err
		}
		if err := p.mkdir(fd, in, name, 0o755); err != nil {
			return -1, nil, err
		}
	}
	if fd, err = p.dirs.Dir(path); err != nil {
		return -1, nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, nil, err
	}
	_, err = unix.Fgetxattr(fd, xattrDefault, nil)
	in = &frame{path: path, times: []unix.Timespec{st.Atim, st.Mtim}, inherits: err == nil}
	p.stack = append(p.stack, in)
	return fd, in, nil
}

// mkdir makes a directory unless it is there.
func (p *place) mkdir(fd int, in *frame, name string, mode uint32) error {
	err := unix.Mkdirat(fd, name, 0o700)
	if err == unix.EEXIST {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return errKind
		}
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.disinherit(fd, in, name); err != nil {
		return err
	}
	// It is no link: nobody else comes here.
	return unix.Fchmodat(fd, name, mode, 0)
}

// disinherit removes the ACLs that a new file has got from its directory.
func (p *place) disinherit(fd int, in *frame, name string) error {
	if !in.inherits {
		return nil
	}
	path := procPath(fd, name)
	for _, key := range []string{xattrAccess, xattrDefault} {
		err := unix.Lremovexattr(path, key)
		if err != nil && err != unix.ENODATA && err != unix.ENOTSUP && err != unix.EPERM && err != unix.EACCES {
			return err
		}
	}
	return nil
}

func procPath(fd int, name string) string { return "/proc/self/fd/" + strconv.Itoa(fd) + "/" + name }

// leave sets the times of the directory at work.
func (p *place) leave() error {
	last := p.stack[len(p.stack)-1]
	p.stack = p.stack[:len(p.stack)-1]
	fd, err := p.dirs.Dir(last.path)
	if err == nil {
		err = setTimes(fd, last.times)
	}
	return failed("set times of", last.path, err)
}

func (p *place) leaveAll() error {
	for len(p.stack) > 0 {
		if err := p.leave(); err != nil {
			return err
		}
	}
	return nil
}

func setTimes(fd int, times []unix.Timespec) error {
	return unix.UtimesNanoAt(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(fd), times, 0)
}

// dir makes a directory, or gives one that is there what the entry says.
func (p *place) dir(path string, f *file) error {
	fd, in, err := p.enter(path)
	if err == nil {
		in.times = f.times
		if path == "" {
			// What the top has got from where it was made. Others have been made here.
			err = p.disinherit(fd, &frame{inherits: true}, ".")
		}
		err = errors.Join(err, p.attributes(fd, "", f))
		if _, has := f.xattrs[xattrDefault]; has {
			in.inherits = true
		}
	}
	return failed("make", path, err)
}

// free prepares the name for a file of a kind: one that is there and of that kind is
// removed.
func (p *place) free(fd int, name string, kind uint32) error {
	var st unix.Stat_t
	err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != kind {
		return errKind
	}
	return unix.Unlinkat(fd, name, 0)
}

// remove removes a regular file, and returns its size; -1 when it is not there.
func (p *place) remove(path string) (size int64, err error) {
	above, name := split(path)
	fd, _, err := p.enter(above)
	if err != nil {
		return -1, failed("remove", path, err)
	}
	var st unix.Stat_t
	err = unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return -1, nil
	}
	if err == nil {
		err = p.free(fd, name, unix.S_IFREG)
	}
	return st.Size, failed("remove", path, err)
}

// node makes a symbolic link, a pipe or a device.
func (p *place) node(path string, f *file) error {
	above, name := split(path)
	fd, in, err := p.enter(above)
	if err == nil {
		err = p.free(fd, name, f.kind)
	}
	if err != nil {
		return failed("make", path, err)
	}
	if f.kind == unix.S_IFLNK {
		err = unix.Symlinkat(f.target, fd, name)
	} else {
		if err = unix.Mknodat(fd, name, f.kind|0o600, int(f.device)); err == nil {
			err = p.disinherit(fd, in, name)
		}
	}
	if err == nil {
		err = p.attributes(fd, name, f)
	}
	if err == nil {
		err = unix.UtimesNanoAt(fd, name, f.times, unix.AT_SYMLINK_NOFOLLOW)
	}
	return failed("make", path, err)
}

// link gives the file first another name.
func (p *place) link(path, first string) (st unix.Stat_t, err error) {
	from, old := split(first)
	source, err := p.targets.Dir(from)
	if err == nil {
		err = unix.Fstatat(source, old, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = errKind
	}
	if err != nil || path == first {
		return st, failed("link to", first, err)
	}
	above, name := split(path)
	fd, _, err := p.enter(above)
	if err == nil {
		err = p.free(fd, name, st.Mode&unix.S_IFMT)
	}
	if err == nil {
		err = unix.Linkat(source, old, fd, name, 0)
	}
	return st, failed("make", path, err)
}

// attributes sets the owner, extended attributes and mode, in this order, because each may change what
// comes after it. name is "" for fd itself.
func (p *place) attributes(fd int, name string, f *file) error {
	path, flags := procPath(fd, name), unix.AT_SYMLINK_NOFOLLOW
	if name == "" {
		path, flags = "/proc/self/fd/"+strconv.Itoa(fd)+"/.", unix.AT_EMPTY_PATH
		if f.kind != unix.S_IFDIR {
			path = "/proc/self/fd/" + strconv.Itoa(fd)
		}
	}
	if err := unix.Fchownat(fd, name, f.uid, f.gid, flags); err != nil {
		return fmt.Errorf("owner %d:%d: %w", f.uid, f.gid, err)
	}
	for _, key := range slices.Sorted(maps.Keys(f.xattrs)) {
		set := unix.Lsetxattr
		if name == "" {
			set = unix.Setxattr
		}
		err := set(path, key, []byte(f.xattrs[key]), 0)
		if errors.Is(err, unix.ENOTSUP) {
			f.lost = append(f.lost, strconv.Quote(key))
			continue
		}
		if err != nil {
			return fmt.Errorf("attribute %q: %w", key, err)
		}
	}
	switch {
	case f.kind == unix.S_IFLNK:
		return nil
	case name == "":
		return unix.Fchmod(fd, f.mode)
	}
	// It is no link: free has made sure, and nobody else comes here.
	return unix.Fchmodat(fd, name, f.mode, 0)
}

// regular makes a file of size bytes.
func (p *place) regular(path string, f *file, size int64, content io.Reader) error {
	above, name := split(path)
	fd, in, err := p.enter(above)
	if err == nil {
		err = p.free(fd, name, unix.S_IFREG)
	}
	if err != nil {
		return failed("make", path, err)
	}
	out, err := unix.Openat(fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return failed("make", path, err)
	}
	err = p.disinherit(fd, in, name)
	if err == nil {
		err = p.fill(out, size, content)
	}
	if err == nil {
		err = p.attributes(out, "", f)
	}
	if err == nil {
		err = setTimes(out, f.times)
	}
	// Network file systems tell of failed writes here.
	return failed("write", path, errors.Join(err, unix.Close(out)))
}

// holeSize is the length from which on zeros become a hole, when they begin at a multiple of it.
const holeSize = 64 << 10

var zeros [holeSize]byte

// fill writes the content of a new file, which has to be of that size.
func (p *place) fill(fd int, size int64, content io.Reader) error {
	if err := unix.Ftruncate(fd, size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		n, err := io.ReadFull(content, p.buffer[:min(size-at, bufferSize)])
		if err != nil {
			return err
		}
		if err := writeData(fd, p.buffer[:n], at); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// writeData writes what is not zeros.
func writeData(fd int, buf []byte, at int64) error {
	begin, end := 0, 0 // of what is to be written
	flush := func() error {
		err := pwrite(fd, buf[begin:end], at+int64(begin))
		begin = end
		return err
	}
	for piece := range slices.Chunk(buf, holeSize) {
		if !bytes.Equal(piece, zeros[:len(piece)]) {
			end += len(piece)
			continue
		}
		if err := flush(); err != nil {
			return err
		}
		begin += len(piece)
		end = begin
	}
	return flush()
}

func pwrite(fd int, buf []byte, at int64) error {
	for len(buf) > 0 {
		n, err := unix.Pwrite(fd, buf, at)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		buf, at = buf[n:], at+int64(n)
	}
	return nil
}

// failed adds to an error, if it is one, what was tried. Names that lead through links or files are
// the archive's fault.
func failed(op, path string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errKind), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG):
		return fmt.Errorf("%w: %s %s: %w", ErrArchive, op, shown(path), err)
	}
	return fmt.Errorf("%s %s: %w", op, shown(path), err)
}
