package enginetest

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// fill makes a tree of all that a container can leave behind.
func fill(t testing.TB, path string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(path, name) }
	optional := func(err error) { // what the file system may not have
		t.Helper()
		if !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			assert.NilError(t, err)
		}
	}
	assert.NilError(t, os.MkdirAll(in("dir/deep/er"), 0o755))
	assert.NilError(t, os.WriteFile(in("file"), bytes.Repeat([]byte("content\n"), 10_000), 0o640))
	assert.NilError(t, os.WriteFile(in("dir/deep/er/empty"), nil, 0))
	assert.NilError(t, os.WriteFile(in("new\nline \xff"), []byte("x"), 0o600))
	assert.NilError(t, os.WriteFile(in(strings.Repeat("n", 255)), []byte("x"), 0o600))
	assert.NilError(t, os.Link(in("file"), in("dir/hard")))
	assert.NilError(t, os.Link(in("file"), in("dir/deep/hard")))
	assert.NilError(t, os.Symlink("/etc/passwd", in("link")))
	assert.NilError(t, os.Symlink(strings.Repeat("d", 1000), in("dangling")))
	assert.NilError(t, os.Link(in("link"), in("hardlink of a link")))
	assert.NilError(t, os.Lchown(in("link"), 5, 6))
	assert.NilError(t, unix.Mkfifo(in("fifo"), 0o600))
	assert.NilError(t, unix.Mknod(in("char"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	assert.NilError(t, unix.Mknod(in("block"), unix.S_IFBLK|0o600, int(unix.Mkdev(7, 200))))
	var config net.ListenConfig
	socket, err := config.Listen(context.Background(), "unix", in("socket"))
	assert.NilError(t, err)
	socket.(*net.UnixListener).SetUnlinkOnClose(false)
	assert.NilError(t, socket.Close())
	sparse, err := os.Create(in("sparse"))
	assert.NilError(t, err)
	_, err = sparse.WriteAt([]byte("middle"), 3<<20)
	assert.NilError(t, errors.Join(err, sparse.Truncate(8<<20), sparse.Close()))
	assert.NilError(t, os.WriteFile(in("setuid"), []byte("x"), 0o600))
	assert.NilError(t, os.Chown(in("setuid"), 1000, 2000))
	assert.NilError(t, unix.Chmod(in("setuid"), 0o6755))
	optional(unix.Setxattr(in("file"), "user.name", []byte("value"), 0))
	optional(unix.Setxattr(in("dir"), "trusted.name", []byte{0, 1, 2}, 0))
	optional(unix.Lsetxattr(in("link"), "trusted.link", []byte("x"), 0))
	for _, args := range [][]string{{"-m", "u:1234:rw", in("file")}, {"-d", "-m", "g:77:rx", in("dir")}} {
		out, err := exec.CommandContext(context.Background(), "setfacl", args...).CombinedOutput()
		if err != nil && !strings.Contains(string(out), "not supported") {
			t.Fatalf("setfacl: %v\n%s", err, out)
		}
	}
	assert.NilError(t, os.Mkdir(in("closed"), 0o700))
	assert.NilError(t, os.WriteFile(in("closed/f"), []byte("x"), 0))
	assert.NilError(t, unix.Chmod(in("closed"), 0))
	assert.NilError(t, unix.Chmod(in("dir/deep"), 0o3777))
	old := time.Unix(987654321, 123456789)
	for _, name := range []string{"file", "sparse", "dir/deep", "dir", "fifo"} {
		assert.NilError(t, os.Chtimes(in(name), old, old))
	}
	link := []unix.Timespec{{Sec: 5, Nsec: 6}, {Sec: 7, Nsec: 8}}
	assert.NilError(t, unix.UtimesNanoAt(unix.AT_FDCWD, in("link"), link, unix.AT_SYMLINK_NOFOLLOW))
	assert.NilError(t, os.Chown(path, 33, 44))
	assert.NilError(t, unix.Chmod(path, 0o2751))
	assert.NilError(t, os.Chtimes(path, old, old))
}

// same checks that two trees have the same content in every respect, by rsync.
func same(t testing.TB, want, got string) {
	t.Helper()
	cmd := exec.CommandContext(context.Background(), "rsync", "-aHAXSc", "-n", "-i", "--delete", want+"/", got+"/")
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	assert.Equal(t, string(out), "", "the trees differ")
	var a, b unix.Stat_t
	assert.NilError(t, unix.Stat(filepath.Join(want, "sparse"), &a))
	assert.NilError(t, unix.Stat(filepath.Join(got, "sparse"), &b))
	assert.Assert(t, b.Blocks <= max(a.Blocks, 1<<20/512), "holes were filled: %d and %d blocks", a.Blocks, b.Blocks)
}

// detachBelow takes all mounts below a directory away, as the end of a mount
// namespace does; who uses them goes on.
func detachBelow(t testing.TB, path string) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(path))
	assert.NilError(t, err)
	for i := len(mounts) - 1; i >= 0; i-- {
		assert.NilError(t, unix.Unmount(mounts[i].Mountpoint, unix.MNT_DETACH))
	}
}
