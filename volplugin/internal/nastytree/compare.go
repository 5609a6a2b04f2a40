package nastytree

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os/exec"
	"sort"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Compare fails the test unless the trees at a and b are the same in all that a copy
// keeps, the tops included: rsync, as a second opinion, lists no difference, and
// every entry has the same type, mode, owner, device number, size, times to the
// nanosecond, links, attributes and content, with holes where there were holes.
func Compare(t testing.TB, a, b string) {
	t.Helper()
	out, err := exec.CommandContext(context.Background(), "rsync", "-aHAXS", "-n", "--delete", "--itemize-changes", a+"/", b+"/").CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("rsync: %v\n%.3000s", err, out)
	}
	equal(t, List(t, a), List(t, b))
}

// CompareLoosely fails the test unless the trees at a and b are the same in all that
// a format for backups keeps: what Compare looks at, but for sockets, for the places of
// holes, and for the links of what is no regular file. Names at the top of b that are
// ignored are not looked at.
func CompareLoosely(t testing.TB, a, b string, ignored ...string) {
	t.Helper()
	left, right := list(t, a, true), list(t, b, true)
	for _, name := range ignored {
		delete(right, name)
	}
	equal(t, left, right)
}

func equal(t testing.TB, left, right map[string]string) {
	t.Helper()
	reported := 0
	for _, path := range union(left, right) {
		if left[path] == right[path] {
			continue
		}
		if reported++; reported > 20 {
			t.Errorf("and more")
			break
		}
		t.Errorf("%q:\n  %s\n  %s", path, left[path], right[path])
	}
}

// List describes every entry of a tree in one line each, by path. A line tells
// all that a copy keeps; hard links are told by their other names.
func List(t testing.TB, top string) map[string]string {
	t.Helper()
	return list(t, top, false)
}

func list(t testing.TB, top string, loose bool) map[string]string {
	t.Helper()
	fd, err := unix.Open(top, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	l := lister{
		TB: t, loose: loose, lines: map[string]string{}, names: map[uint64][]string{},
		list: make([]byte, 64<<10), value: make([]byte, 64<<10), data: make([]byte, 256<<10),
	}
	l.entry(fd, ".", ".")
	l.dir(fd, "")
	for _, names := range l.names {
		sort.Strings(names)
		for _, name := range names {
			l.lines[name] += fmt.Sprintf(" names %q", names)
		}
	}
	return l.lines
}

func union(a, b map[string]string) []string {
	var paths []string
	for path := range a {
		paths = append(paths, path)
	}
	for path := range b {
		if _, both := a[path]; !both {
			paths = append(paths, path)
		}
	}
	sort.Strings(paths)
	return paths
}

type lister struct {
	testing.TB
	loose bool // for CompareLoosely
	lines map[string]string
	names map[uint64][]string // of inodes with several

	list, value, data []byte // buffers
}

func (l lister) dir(fd int, path string) {
	l.Helper()
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			l.Fatal(err)
		}
		if n == 0 {
			return
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			if !l.entry(fd, name, path+name) {
				continue
			}
			below, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				l.Fatal(err)
			}
			l.dir(below, path+name+"/")
			_ = unix.Close(below)
		}
	}
}

// entry describes name in the directory fd and tells whether it is a directory.
func (l lister) entry(fd int, name, path string) bool {
	l.Helper()
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		l.Fatalf("%q: %v", path, err)
	}
	kind := st.Mode & unix.S_IFMT
	dir := kind == unix.S_IFDIR
	if l.loose && kind == unix.S_IFSOCK {
		return false
	}
	line := fmt.Sprintf("mode %o owner %d:%d mtime %d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
	switch kind {
	case unix.S_IFREG:
		line += fmt.Sprintf(" size %d content %s", st.Size, l.content(fd, name, st.Size))
	case unix.S_IFLNK:
		buf := make([]byte, 8192)
		n, err := unix.Readlinkat(fd, name, buf)
		if err != nil {
			l.Fatal(err)
		}
		line += fmt.Sprintf(" to %q", buf[:n])
	case unix.S_IFCHR, unix.S_IFBLK:
		line += fmt.Sprintf(" device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	if !dir && st.Nlink > 1 && (!l.loose || kind == unix.S_IFREG) {
		l.names[st.Ino] = append(l.names[st.Ino], path)
	}
	l.lines[path] = line + l.attributes(fmt.Sprintf("/proc/self/fd/%d/%s", fd, name))
	return dir && name != "."
}

func (l lister) attributes(path string) string {
	l.Helper()
	n, err := unix.Llistxattr(path, l.list)
	if err != nil {
		l.Fatalf("%q: %v", path, err)
	}
	var all []string
	for key := range strings.SplitSeq(strings.TrimSuffix(string(l.list[:n]), "\x00"), "\x00") {
		if key == "" {
			continue
		}
		n, err := unix.Lgetxattr(path, key, l.value)
		if err != nil {
			l.Fatalf("%q: %q: %v", path, key, err)
		}
		all = append(all, fmt.Sprintf(" %q=%q", key, l.value[:n]))
	}
	sort.Strings(all)
	return strings.Join(all, "")
}

// content is a sum of what is in a file, and of where it has data.
func (l lister) content(dir int, name string, size int64) string {
	l.Helper()
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		l.Fatal(err)
	}
	defer unix.Close(fd)
	sum := sha256.New()
	if l.loose {
		if _, err := io.Copy(sum, io.NewSectionReader(pread(fd), 0, size)); err != nil {
			l.Fatalf("%q: %v", name, err)
		}
		return fmt.Sprintf("%x", sum.Sum(nil))
	}
	var places []string
	for at := int64(0); at < size; {
		begin, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		if err != nil {
			l.Fatal(err)
		}
		end, err := unix.Seek(fd, begin, unix.SEEK_HOLE)
		if err != nil {
			l.Fatal(err)
		}
		places = append(places, fmt.Sprintf("%d-%d", begin, end))
		for begin < end {
			n, err := unix.Pread(fd, l.data[:min(end-begin, int64(len(l.data)))], begin)
			if err != nil || n == 0 {
				l.Fatal("read:", n, err)
			}
			sum.Write(l.data[:n])
			begin += int64(n)
		}
		at = end
	}
	return fmt.Sprintf("%x data at %v", sum.Sum(nil), places)
}

// pread reads from the descriptor that it is.
type pread int

func (fd pread) ReadAt(buf []byte, at int64) (done int, err error) {
	for done < len(buf) {
		n, err := unix.Pread(int(fd), buf[done:], at+int64(done))
		if err != nil {
			return done, err
		}
		if n == 0 {
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}
