package volplugin

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

// A root that is a mount of its own, as of an NFS export, which can go away.
type export struct {
	t           *testing.T
	store, root string
}

func newExport(t *testing.T) *export {
	e := &export{t: t, store: t.TempDir(), root: t.TempDir()}
	t.Cleanup(func() { _ = unix.Unmount(e.root, unix.MNT_DETACH) })
	e.mount()
	return e
}

func (e *export) mount() {
	assert.NilError(e.t, unix.Mount(e.store, e.root, "", unix.MS_BIND, ""))
}

func (e *export) unmount() { assert.NilError(e.t, unix.Unmount(e.root, unix.MNT_DETACH)) }

func TestARootThatIsNotMountedIsNeverTakenForAnEmptyOne(t *testing.T) {
	e := newExport(t)
	h := newHost(t, e.root, nil)
	assert.NilError(t, h.create("web"))
	write(t, filepath.Join(e.root, "web", "f"), "x")
	assert.DeepEqual(t, h.list(), []string{"web"})

	e.unmount()
	for range 2 {
		// What is known stays known, or dockerd would make an empty local volume.
		status := h.status("web")
		assert.Assert(t, status["error"] != nil, "%v", status)
		assert.DeepEqual(t, h.list(), []string{"web"})
		start := time.Now()
		for call, err := range map[string]error{
			"Create of the known":   h.create("web"),
			"Create of the unknown": h.create("new"),
			"Mount":                 second(h.mount("web", "id")),
			"Remove":                h.remove("web"),
		} {
			assert.Assert(t, errdefs.IsUnavailable(err), "%s: %v", call, err)
			assert.ErrorContains(t, err, e.root)
			assert.ErrorContains(t, err, "mounted?")
		}
		assert.Assert(t, time.Since(start) < 5*time.Second)
		// dockerd cannot know a volume that this host has never seen.
		_, err := h.get("new")
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
		assert.DeepEqual(t, tree(t, e.root), map[string]string{})
		h.restart()
	}

	e.mount()
	assert.Equal(t, h.status("web")["error"], nil)
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	assert.Equal(t, read(t, filepath.Join(path, "f")), "x")
}

// A root directory that is gone altogether, and one never seen.
func TestARootThatIsGone(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	h := newHost(t, root, nil)
	_, err := h.get("web")
	assert.Assert(t, errdefs.IsUnavailable(err), "unknown whether it exists, got %v", err)
	assert.DeepEqual(t, h.list(), []string{})
	err = h.create("web")
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.Assert(t, !exists(root))

	assert.NilError(t, os.Mkdir(root, 0o755))
	assert.NilError(t, h.create("web"))
	assert.NilError(t, os.Rename(root, root+".away"))
	h.restart()
	h.status("web")
	assert.DeepEqual(t, h.list(), []string{"web"})
}

// Until the whole root has been read once, dockerd may know more than this host's
// state, for example when that was lost.
func TestWithoutAStateNothingIsSaidToBeMissing(t *testing.T) {
	e := newExport(t)
	first := newHost(t, e.root, nil)
	assert.NilError(t, first.create("web"))
	second := newHost(t, e.root, func(c *Config) {})
	second.stop()
	assert.NilError(t, os.RemoveAll(filepath.Join(second.dir, "vol")))
	e.unmount()
	assert.NilError(t, os.RemoveAll(e.root))
	second.start()
	_, err := second.get("web")
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.NilError(t, os.Mkdir(e.root, 0o755))
	e.mount()
	second.status("web")
}

func TestAnotherRootIsRefusedUntilItIsAccepted(t *testing.T) {
	root, other := t.TempDir(), t.TempDir()
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web"))
	assert.NilError(t, newHost(t, other, nil).create("db"))

	mounttest.Bind(t, other, root)
	err := h.create("new")
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "not the one")
	assert.DeepEqual(t, h.list(), []string{"web"})
	write(t, filepath.Join(root, ".berth-accept"), "")
	assert.NilError(t, h.create("new"))
	assert.DeepEqual(t, h.list(), []string{"db", "new"})
	assert.Assert(t, !exists(filepath.Join(root, ".berth-accept")))
	h.restart()
	assert.DeepEqual(t, h.list(), []string{"db", "new"})

	empty := t.TempDir()
	mounttest.Bind(t, empty, root)
	assert.Assert(t, errdefs.IsUnavailable(h.create("new")))
	write(t, filepath.Join(root, ".berth-accept"), "")
	assert.DeepEqual(t, h.list(), []string{})
	assert.NilError(t, h.create("new"))
	assert.DeepEqual(t, h.list(), []string{"new"})
	assert.Assert(t, !exists(filepath.Join(root, ".berth-accept")))
}

func TestADamagedMarkerIsRefused(t *testing.T) {
	for name, content := range map[string]string{
		"empty": "", "cut": `{"schema":1,"uu`, "no uuid": `{"schema":1}`, "hostile uuid": `{"schema":1,"uuid":"../../x"}`,
		"newer": `{"schema":3,"uuid":"11111111-1111-4111-8111-111111111111"}`,
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			h := newHost(t, root, nil)
			assert.NilError(t, h.create("web"))
			marker := filepath.Join(root, ".berth", "root.json")
			write(t, marker, content)
			assert.Assert(t, errdefs.IsUnavailable(h.create("new")))
			h.status("web")
			assert.Equal(t, read(t, marker), content)
		})
	}
}

// stopper lets a test hold one volume's storage, as a dead server does.
type stopper struct {
	mu      sync.Mutex
	volume  string
	blocked chan struct{}
}

func (s *stopper) step(step, volume string) error {
	s.mu.Lock()
	blocked := s.blocked
	hold := s.volume == volume && blocked != nil
	s.mu.Unlock()
	if hold {
		<-blocked
	}
	return nil
}

func (s *stopper) hold(volume string) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	blocked := make(chan struct{})
	s.volume, s.blocked = volume, blocked
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.blocked = nil
		close(blocked)
	})
}

func TestAHangingVolumeDoesNotHoldOthersUp(t *testing.T) {
	root := t.TempDir()
	s := &stopper{}
	h := newHost(t, root, func(c *Config) {
		c.step = s.step
	})
	assert.NilError(t, h.create("dead"))
	release := s.hold("dead")
	defer release()
	patient := h.Driver.cfg.request
	h.Driver.cfg.request = 300 * time.Millisecond
	for range 3 { // a second request waits for the first, not for storage
		err := second(h.mount("dead", "id"))
		assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	}
	assert.Assert(t, errdefs.IsUnavailable(h.remove("dead")))
	assert.Equal(t, h.home.changes.givenUp.Load(), int64(1), "each retry has taken a thread")

	h.Driver.cfg.request = patient
	for i := range 5 {
		name := fmt.Sprintf("live-%d", i)
		assert.NilError(t, h.create(name))
		_, err := h.mount(name, "id")
		assert.NilError(t, err)
		assert.NilError(t, h.unmount(name, "id"))
		h.status("dead")
		assert.Equal(t, len(h.list()), i+2)
	}

	// The Mount that was given up is answered with an error and must not count.
	release()
	waitFor(t, func() bool { return h.home.changes.givenUp.Load() == 0 })
	assert.Equal(t, h.ledger.mountsOf("dead").IDs.Total(), 0)
	for _, name := range h.mountsBelow() {
		assert.Assert(t, name != "dead", "an orphan is mounted")
	}
	_, err := h.mount("dead", "id")
	assert.NilError(t, err)
}

func TestHangingCallsAreBounded(t *testing.T) {
	blocked := make(chan struct{})
	h := newHost(t, t.TempDir(), func(c *Config) {
		c.step = func(step, _ string) error {
			if step == "mount.bind" {
				<-blocked
			}
			return nil
		}
	})
	for i := range stuckMost + 6 {
		assert.NilError(t, h.create(fmt.Sprintf("v%d", i)))
	}
	h.Driver.cfg.request, h.Driver.cfg.look = 300*time.Millisecond, 300*time.Millisecond
	var wg sync.WaitGroup
	for i := range stuckMost + 6 {
		wg.Go(func() {
			if err := second(h.mount(fmt.Sprintf("v%d", i), "id")); !errdefs.IsUnavailable(err) {
				t.Errorf("mount: %v", err)
			}
		})
	}
	wg.Wait()
	assert.Assert(t, h.home.changes.givenUp.Load() <= stuckMost)
	h.status("v0")
	assert.Equal(t, len(h.list()), stuckMost+6)
	close(blocked)
	waitFor(t, func() bool { return h.home.changes.givenUp.Load() == 0 })
	assert.Equal(t, len(h.mountsBelow()), 0)
}

// Get and List answer from what was seen when the root itself hangs.
func TestGetAndListWhileTheRootHangs(t *testing.T) {
	h := newHost(t, t.TempDir(), func(c *Config) { c.look = 200 * time.Millisecond })
	assert.NilError(t, h.create("web"))
	assert.DeepEqual(t, h.list(), []string{"web"})
	// All threads that may look are inside the file system.
	for range cap(h.home.looks.slots) {
		h.home.looks.slots <- struct{}{}
	}
	assert.Assert(t, h.status("web")["error"] != nil)
	assert.Assert(t, h.home.hung.Load())
	start := time.Now()
	for range 100 {
		h.status("web")
		assert.DeepEqual(t, h.list(), []string{"web"})
		_, err := h.get("unknown")
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	}
	assert.Assert(t, time.Since(start) < time.Second, "every call waits for the storage")
	for range cap(h.home.looks.slots) {
		<-h.home.looks.slots
	}
	h.home.hung.Store(false) // as the first call that comes back does
	assert.Equal(t, h.status("web")["error"], nil)
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for range 500 {
		if done() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("it did not come")
}
