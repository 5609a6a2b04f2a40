// Package nastytree makes directory trees with all that a file system can hold, and
// compares trees to the last attribute. Tests of whatever copies trees use it.
//
// It needs root and the programs rsync, setfacl and setcap.
package nastytree

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Make fills the directory top, which must exist and be empty, and gives itself an
// owner, mode, times and attributes that nobody has by chance. It takes some megabytes and
// two thousand files.
func Make(t testing.TB, top string) {
	t.Helper()
	m := maker{TB: t, top: top}
	m.names()
	m.files()
	m.links()
	m.specials()
	m.attributes()
	m.long()
	m.deep()
	m.times()
}

type maker struct {
	testing.TB
	top string
}

func (m maker) path(name string) string { return filepath.Join(m.top, name) }

func (m maker) check(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

func (m maker) run(argv ...string) {
	m.Helper()
	if out, err := exec.CommandContext(context.Background(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
		m.Fatalf("%q: %v: %s", argv, err, out)
	}
}

func (m maker) dir(name string, mode uint32) {
	m.Helper()
	m.check(os.MkdirAll(m.path(name), 0o755))
	m.check(unix.Chmod(m.path(name), mode))
}

func (m maker) file(name, content string) {
	m.Helper()
	m.check(os.WriteFile(m.path(name), []byte(content), 0o644))
}

func (m maker) names() {
	m.dir("names", 0o755)
	for i, name := range []string{
		"new\nline", " blanks ", "tab\t", "-rf", "*", "\\", "'\"`$(true)", "bytes\xff\xfe\x80", "utf8 \u00e9\u4e2d\U0001f40b", "e\u0301",
		"...", ".hidden", strings.Repeat("n", 255), "\x01\x1b[31m", "CASE", "case",
	} {
		m.file("names/"+name, fmt.Sprint(i))
		m.dir("names/d"+name[:min(len(name), 254)], 0o755)
	}
}

func (m maker) files() {
	m.dir("files", 0o750)
	random := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 3<<20)
	for i := range data {
		data[i] = byte(random.Uint32())
	}
	for _, size := range []int{0, 1, 4095, 4096, 4097, 65536, 1<<20 - 1, 1 << 20, 1<<20 + 1, 3 << 20} {
		m.check(os.WriteFile(m.path(fmt.Sprintf("files/%d", size)), data[:size], 0o640))
	}
	for _, mode := range []uint32{0, 0o1, 0o644, 0o777, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777, 0o4000} {
		name := fmt.Sprintf("files/mode%04o", mode)
		m.file(name, name)
		m.check(unix.Chown(m.path(name), int(mode), int(mode)+1))
		m.check(unix.Chmod(m.path(name), mode))
		dir := fmt.Sprintf("files/dir%04o", mode)
		m.dir(dir, 0o755)
		m.file(dir+"/in", dir)
		m.check(unix.Chown(m.path(dir), 1000, int(mode)+1))
		m.check(unix.Chmod(m.path(dir), mode))
	}
	// Owners that do not fit into 16 bits, and those of this process.
	m.file("files/owner", "")
	m.check(unix.Chown(m.path("files/owner"), 1<<31, 1<<31+1))

	m.sparse("files/hole", 64<<20)
	m.sparse("files/middle", 32<<20, 1<<20, 16<<20)
	m.sparse("files/ends", 16<<20, 0, 16<<20-4096)
	m.sparse("files/huge", 1<<40, 1<<39)
}

// sparse makes a file with 4 KiB of data at some offsets.
func (m maker) sparse(name string, size int64, data ...int64) {
	m.Helper()
	file, err := os.Create(m.path(name))
	m.check(err)
	m.check(file.Truncate(size))
	for _, at := range data {
		_, err := file.WriteAt(bytes.Repeat([]byte("data"), 1024), at)
		m.check(err)
	}
	// Delayed allocation hides extents from some file systems' maps.
	m.check(file.Sync())
	m.check(file.Close())
}

func (m maker) links() {
	m.dir("links/a", 0o755)
	m.dir("links/b/c", 0o755)
	m.file("links/a/first", "hard")
	for _, name := range []string{"links/a/second", "links/b/third", "links/b/c/fourth", "fifth"} {
		m.check(os.Link(m.path("links/a/first"), m.path(name)))
	}
	for i := range 100 {
		m.file(fmt.Sprintf("links/a/%d", i), fmt.Sprint(i))
		m.check(os.Link(m.path(fmt.Sprintf("links/a/%d", i)), m.path(fmt.Sprintf("links/b/%d", 99-i))))
	}
	for name, target := range map[string]string{
		"links/relative": "a/first", "links/absolute": "/etc/passwd", "links/dangling": "nowhere", "links/up": "../../../../../..",
		"links/self": "self", "links/dir": "a", "links/long": strings.Repeat("x/", 500) + "y", "links/new\nline": "\xff\n",
	} {
		m.check(os.Symlink(target, m.path(name)))
	}
	m.check(unix.Lchown(m.path("links/dangling"), 12, 34))
	m.check(unix.Lsetxattr(m.path("links/dangling"), "trusted.link", []byte("of the link"), 0))
	m.check(os.Link(m.path("links/absolute"), m.path("links/b/absolute too")))
}

func (m maker) specials() {
	m.dir("specials", 0o711)
	for name, node := range map[string]struct {
		mode     uint32
		maj, min uint32
	}{
		"fifo": {unix.S_IFIFO | 0o622, 0, 0}, "socket": {unix.S_IFSOCK | 0o777, 0, 0}, "null": {unix.S_IFCHR | 0o666, 1, 3},
		"block": {unix.S_IFBLK | 0o660, 259, 1<<18 - 1}, "char": {unix.S_IFCHR | 0o600, 511, 1 << 17}, "whiteout": {unix.S_IFCHR, 0, 0},
	} {
		path := m.path("specials/" + name)
		m.check(unix.Mknod(path, node.mode, int(unix.Mkdev(node.maj, node.min))))
		m.check(unix.Chown(path, 7, 8))
		m.check(unix.Chmod(path, node.mode&0o7777))
	}
	m.check(unix.Setxattr(m.path("specials/fifo"), "trusted.fifo", []byte("of the pipe"), 0))
	m.check(os.Link(m.path("specials/fifo"), m.path("fifo too")))
}

func (m maker) attributes() {
	m.dir("attributes/default", 0o2775)
	m.file("attributes/user", "x")
	for key, value := range map[string]string{
		"user.text": "value", "user.empty": "", "user.binary": "\x00\xff\n", "user.new\nline": "y", "trusted.root": "only", "security.other": "z",
		"user.large": strings.Repeat("l", 2000),
	} {
		m.check(unix.Setxattr(m.path("attributes/user"), key, []byte(value), 0))
		m.check(unix.Setxattr(m.path("attributes/default"), key, []byte(value[:min(len(value), 100)]), 0))
	}
	m.file("attributes/capable", "#!")
	m.check(unix.Chown(m.path("attributes/capable"), 5, 6))
	m.check(unix.Chmod(m.path("attributes/capable"), 0o755))
	// cap_net_bind_service=ep, as setcap(8) writes it: version 2, effective.
	m.check(unix.Setxattr(m.path("attributes/capable"), "security.capability",
		[]byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0))
	m.file("attributes/acl", "x")
	m.run("setfacl", "-m", "u:1000:rw,g:2000:r,m:rw", m.path("attributes/acl"))
	m.run("setfacl", "-m", "u:1000:rwx,d:u:1000:rwx,d:g:7:r-x,d:o:---", m.path("attributes/default"))
	m.dir("attributes/default/below", 0o700)
	m.file("attributes/default/below/file", "inherits")
	m.file("attributes/default/file", "inherits")
	m.file("attributes/setid", "x")
	m.run("setfacl", "-m", "u:1000:rwx", m.path("attributes/setid"))
	m.check(unix.Chmod(m.path("attributes/setid"), 0o6755))
}

func (m maker) long() {
	m.dir("long", 0o755)
	for i := range 1500 {
		m.file(fmt.Sprintf("long/%s%d", strings.Repeat("l", 1+i%100), i), "")
	}
}

// deep makes a path that is as long as rsync can take.
func (m maker) deep() {
	m.dir("deep", 0o755)
	MakeDeep(m, m.path("deep"), 80)
}

// MakeDeep makes depth directories, one in the other, in the directory top, and a
// file in the last. From a depth of 130 on the path is longer than the kernel takes at
// once, and rsync at all.
func MakeDeep(t testing.TB, top string, depth int) {
	t.Helper()
	m := maker{TB: t, top: top}
	fd, err := unix.Open(top, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	m.check(err)
	for i := range depth {
		name := fmt.Sprintf("%05d-%s", i, strings.Repeat("d", 25))
		m.check(unix.Mkdirat(fd, name, 0o755))
		below, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		m.check(err)
		m.check(unix.Close(fd))
		fd = below
	}
	file, err := unix.Openat(fd, "bottom", unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
	m.check(err)
	m.check(unix.Close(file))
	m.check(unix.Close(fd))
}

// times gives every entry times of its own, to the nanosecond and
// some before 1970, and the top an owner, mode and attributes.
func (m maker) times() {
	m.check(unix.Chown(m.top, 65534, 1234))
	m.check(unix.Chmod(m.top, 0o3751))
	m.check(unix.Setxattr(m.top, "user.top", []byte("of the top"), 0))
	m.run("setfacl", "-m", "u:1000:rwx,d:u:1001:rx", m.top)
	n := int64(0)
	var paths []string
	m.check(filepath.WalkDir(m.top, func(path string, _ os.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	}))
	// From the deepest to the top: nothing below changes a directory's time any more.
	for i := len(paths) - 1; i >= 0; i-- {
		n++
		at := time.Unix(n*100_003-10_000_000, n*1_000_003%1_000_000_000).UnixNano()
		times := []unix.Timespec{unix.NsecToTimespec(at + 1), unix.NsecToTimespec(at)}
		m.check(unix.UtimesNanoAt(unix.AT_FDCWD, paths[i], times, unix.AT_SYMLINK_NOFOLLOW))
	}
}
