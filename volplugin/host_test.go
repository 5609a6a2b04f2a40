package volplugin

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	api "github.com/docker/go-plugins-helpers/volume"
	"github.com/moby/sys/mountinfo"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/volume"
)

func TestMain(m *testing.M) {
	if os.Getenv(victimEnv) != "" {
		os.Exit(victim())
	}
	os.Exit(mounttest.Main(m))
}

// A host is a driver with a state file of its own, which can be killed and
// started again.
type host struct {
	*Driver
	t   testing.TB
	cfg Config
	dir string
}

// newHost starts a managed driver on root; change adapts its configuration.
func newHost(t testing.TB, root string, change func(*Config)) *host {
	t.Helper()
	dir := t.TempDir()
	log := logrus.New()
	log.SetOutput(io.Discard)
	h := &host{t: t, dir: dir, cfg: Config{
		Root:      root,
		MountBase: filepath.Join(dir, "mnt"),
		ShareBase: filepath.Join(dir, "shares"),
		Log:       logrus.NewEntry(log),
		BootID:    func() (string, error) { return "boot-1", nil },
		request:   5 * time.Second,
		look:      time.Second,
	}}
	if change != nil {
		change(&h.cfg)
	}
	h.start()
	t.Cleanup(func() {
		h.stop()
		h.unmountAll()
		h.unmountShares()
	})
	return h
}

func (h *host) start() {
	h.t.Helper()
	db, err := OpenState(filepath.Join(h.dir, "vol", "state.db"))
	assert.NilError(h.t, err)
	h.cfg.DB = db
	h.cfg.Counts, err = OpenCounts(filepath.Join(h.dir, "vol"))
	assert.NilError(h.t, err)
	h.Driver, err = New(h.cfg)
	assert.NilError(h.t, err)
	assert.NilError(h.t, h.Recover(context.Background()))
}

func (h *host) stop() {
	h.endTasks()
	h.running.Wait()
	assert.NilError(h.t, errors.Join(h.cfg.DB.Close(), h.cfg.Counts.Close()))
}

// restart is what dockerd does when the plugin's process dies.
func (h *host) restart() {
	h.t.Helper()
	h.stop()
	h.start()
}

// mountsBelow lists what is mounted in the mounts directory, once per layer.
func (h *host) mountsBelow() []string {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(filepath.Join(h.dir, "mnt")))
	assert.NilError(h.t, err)
	var names []string
	for _, m := range mounts {
		names = append(names, filepath.Base(m.Mountpoint))
	}
	slices.Sort(names)
	return names
}

// unmountShares is what becomes of shares when a plugin's mount namespace goes with its
// last process.
func (h *host) unmountShares() {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(filepath.Join(h.dir, "shares")))
	assert.NilError(h.t, err)
	for _, m := range mounts {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			h.t.Error(err)
		}
	}
}

// unmountAll is what dockerd does on the host when it starts again.
func (h *host) unmountAll() {
	for _, name := range h.mountsBelow() {
		if err := unix.Unmount(filepath.Join(h.dir, "mnt", name), unix.MNT_DETACH); err != nil {
			h.t.Error(err)
		}
	}
}

// tend does a round of all background work.
func (h *host) tend(ctx context.Context) {
	h.tendMounts(ctx)
	h.each(func(s *store) { s.tend(ctx) })
}

// expire empties the trash of all roots.
func (h *host) expire(ctx context.Context) { h.each(func(s *store) { s.expire(ctx) }) }

func (h *host) create(name string, opts ...string) error {
	m := map[string]string{}
	for _, opt := range opts {
		key, value, _ := strings.Cut(opt, "=")
		m[key] = value
	}
	return h.Create(context.Background(), &api.CreateRequest{Name: name, Options: m})
}

func (h *host) remove(name string) error {
	return h.Remove(context.Background(), &api.RemoveRequest{Name: name})
}

func (h *host) mount(name, id string) (string, error) {
	resp, err := h.Mount(context.Background(), &api.MountRequest{Name: name, ID: id})
	if err != nil {
		return "", err
	}
	return resp.Mountpoint, nil
}

func (h *host) unmount(name, id string) error {
	return h.Unmount(context.Background(), &api.UnmountRequest{Name: name, ID: id})
}

func (h *host) get(name string) (*api.Volume, error) {
	resp, err := h.Get(context.Background(), &api.GetRequest{Name: name})
	if err != nil {
		return nil, err
	}
	return resp.Volume, nil
}

// status is what inspect shows, after JSON as dockerd gets it.
func (h *host) status(name string) map[string]any {
	h.t.Helper()
	v, err := h.get(name)
	assert.NilError(h.t, err)
	data, err := json.Marshal(v)
	assert.NilError(h.t, err)
	var back struct {
		Name, Mountpoint string
		CreatedAt        time.Time
		Status           map[string]any
	}
	assert.NilError(h.t, json.Unmarshal(data, &back))
	assert.Equal(h.t, back.Name, name)
	assert.Assert(h.t, filepath.IsAbs(back.Mountpoint))
	return back.Status
}

func (h *host) list() []string {
	h.t.Helper()
	resp, err := h.List(context.Background())
	assert.NilError(h.t, err)
	names := []string{}
	for _, v := range resp.Volumes {
		assert.Assert(h.t, v.Mountpoint != "")
		names = append(names, v.Name)
	}
	return names
}

// trash lists the names of the volumes in a root's trash, of those with data.
func trash(t testing.TB, root string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, ".berth/trash/*.json"))
	assert.NilError(t, err)
	names := []string{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		assert.NilError(t, err)
		var rec volume.Record
		assert.NilError(t, json.Unmarshal(data, &rec))
		if _, err := os.Stat(strings.TrimSuffix(file, ".json")); err == nil {
			names = append(names, rec.Name)
		}
	}
	slices.Sort(names)
	return names
}

func write(t testing.TB, path, content string) {
	t.Helper()
	assert.NilError(t, os.WriteFile(path, []byte(content), 0o600))
}

func read(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	return string(data)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, os.ErrNotExist)
}
