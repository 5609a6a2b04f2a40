package mount_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/mount"
)

func TestFlagsHold(t *testing.T) {
	b, err := mount.NewBinder(t.TempDir())
	assert.NilError(t, err)
	dir := data(t)
	program, err := os.ReadFile("/bin/true")
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(dir.Path(), "true"), program, 0o755))
	path := b.Path("web")
	bind := func(flags mount.Flags) error {
		_, err := b.Bind(dir, "web", flags)
		return err
	}
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })

	assert.NilError(t, bind(mount.Flags{ReadOnly: true}))
	assert.ErrorIs(t, os.WriteFile(filepath.Join(path, "f"), nil, 0o600), unix.EROFS)
	assert.NilError(t, os.WriteFile(filepath.Join(dir.Path(), "f"), nil, 0o600), "the data itself is read-only")
	assert.NilError(t, exec.CommandContext(t.Context(), filepath.Join(path, "true")).Run())
	assert.NilError(t, bind(mount.Flags{ReadOnly: true}), "again")
	for _, other := range []mount.Flags{{}, {NoExec: true}, {ReadOnly: true, NoSUID: true}} {
		assert.ErrorIs(t, bind(other), mount.ErrFlags)
	}
	assert.ErrorContains(t, bind(mount.Flags{NoDev: true}), "it has ro, and nodev is asked for")
	assert.NilError(t, b.Unbind("web"))

	all := mount.Flags{NoSUID: true, NoDev: true, NoExec: true}
	assert.NilError(t, bind(all))
	assert.NilError(t, os.WriteFile(filepath.Join(path, "f"), nil, 0o600))
	assert.ErrorIs(t, exec.CommandContext(t.Context(), filepath.Join(path, "true")).Run(), unix.EACCES)
	var st unix.Statfs_t
	assert.NilError(t, unix.Statfs(path, &st))
	assert.Equal(t, st.Flags&(unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC), int64(unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC))
	assert.NilError(t, b.Unbind("web"))
}

// What the data is on may be mounted with flags already.
func TestFlagsOfTheRootItselfAreNoDifference(t *testing.T) {
	b, err := mount.NewBinder(t.TempDir())
	assert.NilError(t, err)
	top := t.TempDir()
	mounttest.Bind(t, top, top)
	assert.NilError(t, unix.Mount("", top, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_RDONLY, ""))
	dir := open(t, top)
	t.Cleanup(func() { _ = unix.Unmount(b.Path("web"), unix.MNT_DETACH) })
	for range 2 {
		_, err = b.Bind(dir, "web", mount.Flags{NoDev: true})
		assert.NilError(t, err)
	}
	_, err = b.Bind(dir, "web", mount.Flags{})
	assert.ErrorIs(t, err, mount.ErrFlags)
}

// The host sees a plugin's mount as a copy that propagation makes, and that one is to
// be read-only as well: no later change of the mount reaches it.
func TestACopyInAnotherNamespaceHasTheFlags(t *testing.T) {
	base := t.TempDir()
	mounttest.Bind(t, base, base)
	assert.NilError(t, unix.Mount("", base, "", unix.MS_SHARED, ""))
	b, err := mount.NewBinder(base)
	assert.NilError(t, err)
	peer := exec.CommandContext(t.Context(), "sh", "-c", `echo; read x; grep " $0 " /proc/self/mountinfo`, b.Path("web"))
	// Not the runtime's Unshareflags, which make everything private.
	peer.Path, peer.Args = "/usr/bin/unshare", append([]string{"unshare", "--mount", "--propagation", "unchanged"}, peer.Args...)
	peer.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := peer.StdinPipe()
	assert.NilError(t, err)
	out, err := peer.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, peer.Start())
	text := make([]byte, 4096)
	_, err = out.Read(text)
	assert.NilError(t, err)

	_, err = b.Bind(data(t), "web", mount.Flags{ReadOnly: true})
	assert.NilError(t, err)
	t.Cleanup(func() { _ = unix.Unmount(b.Path("web"), unix.MNT_DETACH) })
	assert.NilError(t, in.Close())
	n, err := out.Read(text)
	assert.NilError(t, err)
	assert.Assert(t, n > 0)
	assert.NilError(t, peer.Wait())
	copies, err := mountinfo.GetMountsFromReader(bytes.NewReader(text[:n]), nil)
	assert.NilError(t, err)
	assert.Equal(t, len(copies), 1)
	assert.Assert(t, strings.HasPrefix(copies[0].Options, "ro,"), "%s", text[:n])
}
