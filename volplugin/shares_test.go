package volplugin

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// A fileServer stands for an NFS server: what is mounted from it is a directory of
// this machine, and whether it is up shows on its port. Real ones are in the VM lab.
type fileServer struct {
	t testing.TB
	// dir is / on the server.
	dir  string
	port int

	mu       sync.Mutex
	listener net.Listener
	mounts   []string // source and data of each
	// hangs, unless nil, is what mount(2) waits for.
	hangs chan struct{}
}

func newFileServer(t testing.TB) *fileServer {
	f := &fileServer{t: t, dir: t.TempDir()}
	f.up()
	t.Cleanup(f.down)
	return f
}

func (f *fileServer) up() {
	f.t.Helper()
	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", f.port))
	assert.NilError(f.t, err)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listener, f.port = listener, listener.Addr().(*net.TCPAddr).Port
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
}

func (f *fileServer) down() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.listener != nil {
		_ = f.listener.Close()
		f.listener = nil
	}
}

// mount is the mount(2) of hosts that know the server.
func (f *fileServer) mount(source, target, fstype string, _ uintptr, data string) error {
	f.mu.Lock()
	f.mounts = append(f.mounts, fstype+" "+source+" "+data)
	hangs := f.hangs
	f.mu.Unlock()
	if hangs != nil {
		<-hangs
	}
	_, path, _ := strings.Cut(source, ":")
	return unix.Mount(filepath.Join(f.dir, path), target, "", unix.MS_BIND, "")
}

func (f *fileServer) mounted() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.mounts...)
}

// export makes a directory on the server.
func (f *fileServer) export(path string) string {
	dir := filepath.Join(f.dir, path)
	assert.NilError(f.t, os.MkdirAll(dir, 0o755))
	return dir
}

// host knows the server.
func (f *fileServer) host(t testing.TB, change func(*Config)) *host {
	return newHost(t, t.TempDir(), func(c *Config) {
		c.mount = f.mount
		if change != nil {
			change(c)
		}
	})
}

// opts are those of a volume on the server.
func (f *fileServer) opts(path string, o ...string) []string {
	return []string{"type=nfs", "device=127.0.0.1:" + path, "o=" + strings.Join(append([]string{fmt.Sprintf("port=%d", f.port), "vers=4.2"}, o...), ",")}
}

func TestAVolumeOnAShare(t *testing.T) {
	f := newFileServer(t)
	dir := f.export("/export")
	a, b := f.host(t, nil), f.host(t, nil)
	assert.NilError(t, a.create("web", f.opts("/export")...))
	assert.NilError(t, b.create("web", f.opts("/export")...))
	assert.Equal(t, a.status("web")["uuid"], b.status("web")["uuid"])
	assert.Equal(t, a.status("web")["root"], "127.0.0.1:/export")
	assert.Equal(t, b.status("web")["options-differ"], nil)
	pathA, err := a.mount("web", "id")
	assert.NilError(t, err)
	pathB, err := b.mount("web", "id")
	assert.NilError(t, err)
	write(t, filepath.Join(pathA, "page"), "hello")
	assert.Equal(t, read(t, filepath.Join(pathB, "page")), "hello")
	assert.Equal(t, read(t, filepath.Join(dir, "web", "page")), "hello")

	// Removal on one host hurts nobody on the other.
	assert.NilError(t, a.unmount("web", "id"))
	assert.NilError(t, a.remove("web"))
	assert.Equal(t, read(t, filepath.Join(pathB, "page")), "hello")
	assert.NilError(t, b.unmount("web", "id"))
	assert.DeepEqual(t, trash(t, dir), []string{"web"})
	assert.DeepEqual(t, a.list(), []string{})
}

func TestMissingDirectoriesAreMadeOnTheServer(t *testing.T) {
	f := newFileServer(t)
	f.export("/srv")
	h := f.host(t, nil)
	assert.NilError(t, h.create("web", f.opts("/srv/new/volumes")...))
	assert.Assert(t, exists(filepath.Join(f.dir, "srv/new/volumes/web")))
	left, err := os.ReadDir(filepath.Join(h.dir, "shares"))
	assert.NilError(t, err)
	assert.Equal(t, len(left), 1)
}

// `driver: local` becomes `driver: berth` in a Compose file, and the device is the
// data itself.
func TestAShareWithSomebodysDataIsRefused(t *testing.T) {
	f := newFileServer(t)
	dir := f.export("/srv/web")
	write(t, filepath.Join(dir, "page"), "rows")
	h := f.host(t, nil)
	before := tree(t, f.dir)
	for range 2 {
		err := h.create("web", f.opts("/srv/web")...)
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.ErrorContains(t, err, "the device is the root in which each volume is a directory")
		assert.ErrorContains(t, err, "give device=127.0.0.1:/srv and call the volume web")
		assert.ErrorContains(t, err, ".berth-accept")
		assert.DeepEqual(t, tree(t, f.dir), before)
		assert.DeepEqual(t, h.list(), []string{})
		h.restart()
	}
	// As advised.
	assert.NilError(t, h.create("web", f.opts("/srv")...))
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	assert.Equal(t, read(t, filepath.Join(path, "page")), "rows")
	assert.Equal(t, h.status("web")["adopted"], true)

	other := f.export("/other")
	write(t, filepath.Join(other, "page"), "rows")
	write(t, filepath.Join(other, ".berth-accept"), "")
	assert.NilError(t, h.create("db", f.opts("/other")...))
	assert.Assert(t, exists(filepath.Join(other, "db")))
	assert.Assert(t, !exists(filepath.Join(other, ".berth-accept")))
	assert.Equal(t, read(t, filepath.Join(other, "page")), "rows")

	vendor := f.export("/vendor")
	f.export("/vendor/lost+found")
	assert.NilError(t, h.create("log", f.opts("/vendor")...))
	assert.Assert(t, exists(filepath.Join(vendor, "log")))
}

// After a restart of the plugin or of the host nothing is mounted, and Get and List
// know all without the server.
func TestAShareAfterARestart(t *testing.T) {
	f := newFileServer(t)
	f.export("/export")
	boot := "boot-1"
	h := f.host(t, func(c *Config) {
		c.BootID = func() (string, error) { return boot, nil }
		c.request = 2 * time.Second
	})
	assert.NilError(t, h.create("web", f.opts("/export")...))
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	write(t, filepath.Join(path, "f"), "x")

	f.down()
	boot = "boot-2"
	h.unmountAll()
	h.stop()
	h.unmountShares()
	mounts := len(f.mounted())
	h.start()
	for range 2 {
		assert.DeepEqual(t, h.list(), []string{"web"})
		assert.Equal(t, h.status("web")["mounts"], 0.0)
		_, err = h.get("unknown")
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
		assert.Equal(t, len(f.mounted()), mounts, "the network was touched")
		for what, err := range map[string]error{
			"Mount":        second(h.mount("web", "id")),
			"Remove":       h.remove("web"),
			"Create":       h.create("db", f.opts("/export")...),
			"Create again": h.create("web"),
		} {
			assert.Assert(t, errdefs.IsUnavailable(err), "%s: %v", what, err)
			assert.ErrorContains(t, err, "does not answer")
			assert.ErrorContains(t, err, "127.0.0.1")
		}
		assert.NilError(t, h.create("home"))
		assert.NilError(t, second(h.mount("home", "id")))
		assert.NilError(t, h.unmount("home", "id"))
		assert.NilError(t, h.remove("home"))
		h.tend(t.Context())
		assert.Assert(t, h.status("web")["error"] != nil, "nobody is told")
	}
	f.up()
	path, err = h.mount("web", "id")
	assert.NilError(t, err)
	assert.Equal(t, read(t, filepath.Join(path, "f")), "x")
	assert.Equal(t, h.status("web")["error"], nil)
}

// The server answers at first, and then no more while it is being mounted.
func TestAMountThatHangs(t *testing.T) {
	f := newFileServer(t)
	f.export("/export")
	f.hangs = make(chan struct{})
	release := sync.OnceFunc(func() { close(f.hangs) })
	defer release()
	h := f.host(t, func(c *Config) { c.request, c.attach = 2*time.Second, 200*time.Millisecond })
	for range 5 {
		err := h.create("web", f.opts("/export")...)
		assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
		assert.ErrorContains(t, err, "does not answer")
		assert.NilError(t, h.create("home"))
		assert.DeepEqual(t, h.list(), []string{"home"})
		_, err = h.get("web")
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	}
	assert.Equal(t, len(f.mounted()), 1, "each retry has taken a thread")
	release()
	waitFor(t, func() bool { return h.create("web", f.opts("/export")...) == nil })
	assert.Equal(t, len(f.mounted()), 1)
	assert.DeepEqual(t, h.list(), []string{"home", "web"})
}

// What somebody unmounts is mounted again and not written below.
func TestAShareThatWasUnmountedByHand(t *testing.T) {
	f := newFileServer(t)
	dir := f.export("/export")
	h := f.host(t, nil)
	assert.NilError(t, h.create("web", f.opts("/export")...))
	write(t, filepath.Join(dir, "web", "f"), "x")
	h.unmountShares()
	assert.NilError(t, h.create("db", f.opts("/export")...))
	assert.Assert(t, exists(filepath.Join(dir, "db")))
	h.unmountShares()
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	assert.Equal(t, read(t, filepath.Join(path, "f")), "x")

	// The first volume of another share, just so.
	assert.NilError(t, os.MkdirAll(filepath.Join(f.dir, "second"), 0o755))
	s := h.byKey("share:nfs:127.0.0.1:/export")
	s.attached.Store(true)
	h.unmountShares()
	h.tend(t.Context())
	assert.Assert(t, s.attached.Load())
	assert.DeepEqual(t, h.list(), []string{"db", "web"})
}

func TestOptionsOfAShareInUseStay(t *testing.T) {
	f := newFileServer(t)
	f.export("/export")
	h := f.host(t, nil)
	assert.NilError(t, h.create("web", f.opts("/export", "password=hunter2")...))
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	err = h.create("db", f.opts("/export", "soft")...)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, "soft")
	assert.Assert(t, !strings.Contains(err.Error(), "hunter2"), "%v", err)
	assert.NilError(t, h.create("ro", f.opts("/export", "ro", "password=other")...), "what a volume forbids, and a secret, are no difference")
	write(t, filepath.Join(path, "f"), "x")
	assert.NilError(t, h.unmount("web", "id"))
	assert.NilError(t, h.create("db", f.opts("/export", "soft")...))
	mounts := f.mounted()
	assert.Assert(t, strings.Contains(mounts[len(mounts)-1], "soft"), "%q", mounts)
	h.restart()
	path, err = h.mount("web", "id")
	assert.NilError(t, err)
	assert.Equal(t, read(t, filepath.Join(path, "f")), "x")
}

func TestReadOnlyByOptionO(t *testing.T) {
	f := newFileServer(t)
	dir := f.export("/export")
	f.export("/export/web")
	h := f.host(t, nil)
	assert.NilError(t, h.create("web", f.opts("/export", "ro", "nosuid")...))
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	assert.ErrorIs(t, os.WriteFile(filepath.Join(path, "f"), nil, 0o600), unix.EROFS)
	write(t, filepath.Join(dir, "web", "f"), "x")
	assert.Equal(t, read(t, filepath.Join(path, "f")), "x")
}

func TestSecretsAreKeptFromRecordsAndMessages(t *testing.T) {
	f := newFileServer(t)
	dir := f.export("/export")
	h := f.host(t, nil)
	assert.NilError(t, h.create("web", f.opts("/export", "password=hunter2")...))
	assert.NilError(t, h.create("web", f.opts("/export", "password=hunter2", "hard")...))
	v, err := h.get("web")
	assert.NilError(t, err)
	assert.Assert(t, !strings.Contains(fmt.Sprint(v.Status), "hunter2"), "%v", v.Status)
	for path, content := range tree(t, dir) {
		assert.Assert(t, !strings.Contains(content, "hunter2"), "%s: %s", path, content)
	}
	info, err := os.Stat(filepath.Join(h.dir, "vol", "state.db"))
	assert.NilError(t, err)
	assert.Equal(t, info.Mode().Perm(), os.FileMode(0o600))
	assert.Assert(t, strings.Contains(read(t, filepath.Join(h.dir, "vol", "state.db")), "hunter2"), "it cannot be mounted after a restart")
}

// A share without volumes is let go of, once its trash is empty, and forgotten at the
// next start.
func TestAShareThatNobodyNeeds(t *testing.T) {
	f := newFileServer(t)
	f.export("/export")
	now := time.Now()
	h := f.host(t, func(c *Config) { c.Now = func() time.Time { return now } })
	assert.NilError(t, h.create("web", f.opts("/export")...))
	assert.NilError(t, h.remove("web"))
	s := h.byKey("share:nfs:127.0.0.1:/export")
	h.tend(t.Context())
	assert.Assert(t, s.attached.Load(), "nobody empties its trash")
	now = now.Add(8 * 24 * time.Hour)
	h.expire(t.Context())
	h.tend(t.Context())
	assert.Assert(t, !s.attached.Load())
	mounts := len(f.mounted())
	h.tend(t.Context())
	assert.Equal(t, len(f.mounted()), mounts)
	assert.NilError(t, h.create("db", f.opts("/export")...))
	h.tend(t.Context())
	assert.NilError(t, h.remove("db"))
	now = now.Add(8 * 24 * time.Hour)
	h.expire(t.Context())
	h.tend(t.Context())
	h.restart()
	assert.Assert(t, h.byKey("share:nfs:127.0.0.1:/export") == nil)
}

func TestANamedRootOnAServer(t *testing.T) {
	f := newFileServer(t)
	dir := f.export("/srv")
	write(t, filepath.Join(dir, "whatever"), "x")
	roots, err := ParseRoots(fmt.Sprintf("nas=nfs://127.0.0.1:%d/srv/volumes?vers=4.2", f.port))
	assert.NilError(t, err)
	h := f.host(t, func(c *Config) { c.Roots = roots })
	h.tend(t.Context())
	assert.NilError(t, h.create("web", "root=nas"))
	assert.Assert(t, exists(filepath.Join(dir, "volumes", "web")))
	assert.Equal(t, h.status("web")["root"], "127.0.0.1:/srv/volumes")
	assert.Equal(t, h.status("web")["root-name"], "nas")
	// The same directory by option device is the same store.
	assert.NilError(t, h.create("db", f.opts("/srv/volumes")...))
	assert.Equal(t, h.status("db")["root-name"], "nas")
	assert.Equal(t, len(h.all()), 2)
	h.stop()
	h.unmountShares()
	h.start()
	assert.DeepEqual(t, h.list(), []string{"db", "web"})
	assert.NilError(t, second(h.mount("web", "id")))
}

func TestSharesThatCannotBeMounted(t *testing.T) {
	f := newFileServer(t)
	h := f.host(t, nil)
	err := h.create("web", "type=nfs", "device=nobody.invalid:/export")
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "nobody.invalid")
	assert.DeepEqual(t, h.list(), []string{})
	h.cfg.ShareBase = ""
	h.restart()
	err = h.create("web", f.opts("/export")...)
	assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	assert.ErrorContains(t, err, "mounts no shares")
}

// A process is killed before any step of a volume's first and last moments on a share,
// once with what it mounted left, once with that gone as in a plugin.
func TestKilledAtAnyStepOnAShare(t *testing.T) {
	for _, request := range []string{"create", "remove", "tend"} {
		for _, managed := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s %v", request, managed), func(t *testing.T) {
				killedAt := 0
				for die := 0; ; die++ {
					f := newFileServer(t)
					dir := f.export("/export")
					h := f.host(t, nil)
					given := map[string]string{}
					for _, opt := range f.opts("/export/new") {
						key, value, _ := strings.Cut(opt, "=")
						given[key] = value
					}
					if request != "create" {
						assert.NilError(t, h.create("web", f.opts("/export/new")...))
						write(t, filepath.Join(dir, "new", "web", "f"), "x")
					}
					if request == "tend" {
						assert.NilError(t, h.remove("web"))
						assert.NilError(t, os.RemoveAll(filepath.Join(dir, "new", ".berth", "trash")))
						assert.NilError(t, os.Mkdir(filepath.Join(dir, "new", ".berth", "trash"), 0o700))
					}
					h.stop()
					killed := order{
						Root: h.cfg.Root, Base: h.cfg.MountBase, DB: filepath.Join(h.dir, "vol", "state.db"),
						Shares: h.cfg.ShareBase, Server: f.dir, Request: request, Name: "web", Options: given, Die: die,
					}.run(t)
					if managed {
						h.unmountShares()
					}
					h.start()
					h.tend(t.Context())
					if request != "tend" {
						assert.NilError(t, h.create("web", f.opts("/export/new")...))
						path, err := h.mount("web", "id")
						assert.NilError(t, err)
						write(t, filepath.Join(path, "page"), "hello")
						assert.Equal(t, read(t, filepath.Join(dir, "new", "web", "page")), "hello")
						assert.NilError(t, h.unmount("web", "id"))
						assert.NilError(t, h.remove("web"))
					}
					h.tend(t.Context())
					assert.DeepEqual(t, h.list(), []string{})
					assert.Assert(t, !exists(filepath.Join(dir, "new", "web")))
					if !killed {
						break
					}
					killedAt++
				}
				assert.Assert(t, killedAt > 0)
			})
		}
	}
}

// Of Creates of one name in several roots at the same time, one makes the volume.
func TestOneNameIsMadeInOneRoot(t *testing.T) {
	f := newFileServer(t)
	dir := f.export("/export")
	h, home, fast := newRoots(t, func(c *Config) { c.mount = f.mount })
	for round := range 20 {
		name := fmt.Sprintf("v%d", round)
		var wg sync.WaitGroup
		for _, opts := range [][]string{nil, {"root=fast"}, f.opts("/export"), nil} {
			wg.Go(func() {
				if err := h.create(name, opts...); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		places := 0
		for _, root := range []string{home, fast, dir} {
			if exists(filepath.Join(root, name)) {
				places++
			}
		}
		assert.Equal(t, places, 1)
		assert.Equal(t, h.status(name)["also-in"], nil)
	}
	assert.Equal(t, len(h.list()), 20)
}
