package netfs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

func mustAddr(s string) netip.Addr { return netip.MustParseAddr(s) }

// listen gives the port of something that answers.
func listen(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	assert.NilError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
}

// A call of mount(2).
type call struct{ source, fstype, data string }

// kernel answers mount(2) with its errors, one after the other, and then binds a
// directory.
func kernel(t *testing.T, calls *[]call, answers ...error) *Mounter {
	dir := t.TempDir()
	m, err := NewMounter(filepath.Join(t.TempDir(), "shares"), func(source, target, fstype string, _ uintptr, data string) error {
		*calls = append(*calls, call{source, fstype, data})
		if len(answers) > 0 {
			err := answers[0]
			answers = answers[1:]
			if err != nil {
				return err
			}
		}
		return unix.Mount(dir, target, "", unix.MS_BIND, "")
	})
	assert.NilError(t, err)
	return m
}

func TestAShareIsMountedOnce(t *testing.T) {
	var calls []call
	m := kernel(t, &calls)
	s := parse(t, "nfs", "127.0.0.1:/e", "vers=4.2,port="+listen(t))
	for range 2 {
		assert.NilError(t, m.Mount(t.Context(), s))
		mounted, err := m.Mounted(s)
		assert.NilError(t, err)
		assert.Assert(t, mounted)
	}
	assert.Equal(t, len(calls), 1)
	assert.Equal(t, calls[0].source, "127.0.0.1:/e")
	assert.Equal(t, calls[0].fstype, "nfs")

	// The options make no difference to where it is.
	assert.Equal(t, m.Path(s), m.Path(parse(t, "nfs4", "127.0.0.1:/e/", "soft")))
	file, err := os.Create(filepath.Join(m.Path(s), "f"))
	assert.NilError(t, err)
	assert.Assert(t, errdefs.IsConflict(m.Unmount(s, false)))
	assert.NilError(t, m.Unmount(s, true))
	assert.NilError(t, file.Close())
	assert.NilError(t, m.Unmount(s, false), "not mounted")
	_, err = os.Lstat(m.Path(s))
	assert.Assert(t, os.IsNotExist(err))
}

// mount.nfs asks for the best version that both know, and so do we.
func TestVersionsAreTriedFromTheBest(t *testing.T) {
	port := ",port=" + listen(t)
	for _, tc := range []struct {
		kind, o string
		want    []string
	}{
		{"nfs", "soft", []string{"vers=4.2", "vers=4.1", "vers=4.0", "vers=3"}},
		{"nfs4", "soft", []string{"vers=4.2", "vers=4.1", "vers=4.0"}},
		{"nfs", "vers=4", []string{"vers=4.2", "vers=4.1", "vers=4.0"}},
		{"nfs", "v4", []string{"vers=4.2", "vers=4.1", "vers=4.0"}},
		{"nfs", "nfsvers=4.1", []string{"nfsvers=4.1"}},
		{"nfs", "vers=4,minorversion=1", []string{"vers=4,minorversion=1"}},
		{"nfs", "vers=3", []string{"vers=3"}},
	} {
		var calls []call
		m := kernel(t, &calls, unix.EPROTONOSUPPORT, unix.EPROTONOSUPPORT, unix.EPROTONOSUPPORT, unix.EPROTONOSUPPORT)
		err := m.Mount(t.Context(), parse(t, tc.kind, "127.0.0.1:/e", tc.o+port))
		assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
		assert.ErrorContains(t, err, "does not speak this version")
		assert.Equal(t, len(calls), len(tc.want), "%v", calls)
		for i, want := range tc.want {
			assert.Assert(t, strings.Contains(calls[i].data, want), "%v", calls)
			assert.Equal(t, strings.Count(calls[i].data, "vers="), 1)
		}
	}
}

func TestWhatIsMissingOnTheServerIsMade(t *testing.T) {
	var calls []call
	m := kernel(t, &calls, unix.ENOENT, unix.ENOENT, unix.ENOENT, nil)
	s := parse(t, "nfs", "127.0.0.1:/a/b/c/d", "vers=4.2,port="+listen(t))
	assert.NilError(t, m.Mount(t.Context(), s))
	t.Cleanup(func() { _ = m.Unmount(s, true) })
	var sources []string
	for _, c := range calls {
		sources = append(sources, strings.TrimPrefix(c.source, "127.0.0.1:"))
	}
	assert.DeepEqual(t, sources, []string{"/a/b/c/d", "/a/b/c", "/a/b", "/a", "/a/b/c/d"})
	_, err := os.Stat(filepath.Join(m.Path(s), "b/c/d"))
	assert.NilError(t, err)
	left, err := os.ReadDir(filepath.Dir(m.Path(s)))
	assert.NilError(t, err)
	assert.Equal(t, len(left), 1)

	for _, answers := range [][]error{
		{unix.ENOENT, unix.ENOENT, unix.EACCES, unix.ENOENT, unix.ENOENT}, // up to /
		{unix.ENOENT, unix.EIO},
	} {
		calls = nil
		m := kernel(t, &calls, answers...)
		err := m.Mount(t.Context(), s)
		assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
		assert.ErrorContains(t, err, "missing on the server")
		assert.Equal(t, len(calls), len(answers))
		mounted, err := m.Mounted(s)
		assert.NilError(t, err)
		assert.Assert(t, !mounted)
	}
}

func TestAServerThatIsDownIsFoundOutBeforeMounting(t *testing.T) {
	var calls []call
	m := kernel(t, &calls)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	assert.NilError(t, err)
	port := fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
	assert.NilError(t, l.Close())
	err = m.Mount(t.Context(), parse(t, "nfs", "127.0.0.1:/e", "port="+port))
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "127.0.0.1:/e")
	assert.ErrorContains(t, err, "does not answer")
	assert.ErrorContains(t, err, "refused")

	err = m.Mount(t.Context(), parse(t, "nfs", "nas.invalid:/e", "port="+port))
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "nas.invalid")
	err = m.Mount(t.Context(), parse(t, "nfs", "127.0.0.1:/e", "proto=tcp6,port="+port))
	assert.ErrorContains(t, err, "has no IPv6 address")
	ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	assert.Assert(t, errdefs.IsUnavailable(m.Mount(ctx, parse(t, "nfs", "127.0.0.1:/e", "port="+listen(t)))))
	assert.Equal(t, len(calls), 0)
}

func TestWhereServersAreSpokenTo(t *testing.T) {
	for o, want := range map[string]string{
		"": "2049", "vers=4.2": "2049", "vers=3": "", "proto=udp": "", "rdma": "", "port=99,vers=3": "99", "proto=rdma,vers=4.1": "",
	} {
		assert.Equal(t, parse(t, "nfs", "nas:/e", o).probePort(), want, "%s", o)
	}
	assert.Equal(t, parse(t, "cifs", "//nas/s", "").probePort(), "445")
}

func TestErrorsOfTheKernelInWords(t *testing.T) {
	for errno, want := range map[error]string{
		unix.EACCES: "let this host in", unix.EINVAL: "option in o", unix.ENODEV: "modprobe nfs", unix.EIO: "input/output error",
	} {
		var calls []call
		m := kernel(t, &calls, errno)
		err := m.Mount(t.Context(), parse(t, "nfs", "127.0.0.1:/e", "vers=4.2,port="+listen(t)))
		assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
		assert.ErrorContains(t, err, want)
		assert.Assert(t, errors.Is(err, errno))
	}
}

func TestMountDataOfCIFS(t *testing.T) {
	file := filepath.Join(t.TempDir(), "credentials")
	assert.NilError(t, os.WriteFile(file, []byte("# mine\nusername=me\npassword=a,b = c\ndomain=LAN\n\nother=x\n"), 0o600))
	for o, want := range map[string]string{
		"username=me,password=a,,b,vers=3.0,ro": "username=me,password=a,,b,vers=3.0",
		"credentials=" + file + ",uid=7":        "username=me,password=a,,b = c,domain=LAN,uid=7",
		"addr=nas,guest":                        "guest",
	} {
		s := parse(t, "cifs", "//Nas/Share/a/b", o)
		data, err := s.cifsData(s.path, mustAddr("10.0.0.9"))
		assert.NilError(t, err)
		assert.Equal(t, data, `ip=10.0.0.9,unc=\\nas\Share,prefixpath=a/b,`+want)
		assert.Equal(t, s.at("/Share"), "//nas/Share")
		data, err = s.cifsData("/Share", mustAddr("10.0.0.9"))
		assert.NilError(t, err)
		assert.Equal(t, data, `ip=10.0.0.9,unc=\\nas\Share,`+want)
	}
	s := parse(t, "cifs", "//nas/s", "credentials=/nowhere")
	_, err := s.cifsData(s.path, mustAddr("10.0.0.9"))
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "/nowhere")
	fifo := filepath.Join(t.TempDir(), "fifo")
	assert.NilError(t, unix.Mkfifo(fifo, 0o600))
	s = parse(t, "cifs", "//nas/s", "credentials="+fifo)
	_, err = s.cifsData(s.path, mustAddr("10.0.0.9"))
	assert.ErrorContains(t, err, "not a file")
}
