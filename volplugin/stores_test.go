package volplugin

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

// newRoots starts a host with the default root and one called fast.
func newRoots(t testing.TB, change func(*Config)) (h *host, home, fast string) {
	home, fast = t.TempDir(), t.TempDir()
	h = newHost(t, home, func(c *Config) {
		c.Roots = []NamedRoot{{Name: "fast", Path: fast}}
		if change != nil {
			change(c)
		}
	})
	return h, home, fast
}

func TestAVolumeIsInTheRootItAsksFor(t *testing.T) {
	for _, managed := range []bool{true, false} {
		h, home, fast := newRoots(t, func(c *Config) {
			if !managed {
				c.MountBase = ""
			}
		})
		assert.NilError(t, h.create("web"))
		assert.NilError(t, h.create("db", "root=fast"))
		assert.NilError(t, h.create("log", "root=default"))
		for range 2 {
			assert.DeepEqual(t, h.list(), []string{"db", "log", "web"})
			assert.Equal(t, h.status("web")["root"], home)
			assert.Equal(t, h.status("db")["root"], fast)
			assert.Equal(t, h.status("db")["root-name"], "fast")
			assert.Equal(t, h.status("db")["options-differ"], nil)
			path, err := h.mount("db", "id")
			assert.NilError(t, err)
			write(t, filepath.Join(path, "f"), "rows")
			assert.Equal(t, read(t, filepath.Join(fast, "db", "f")), "rows")
			if managed {
				assert.Assert(t, errdefs.IsConflict(h.remove("db")))
			}
			h.restart()
			assert.NilError(t, h.unmount("db", "id"))
			assert.Equal(t, len(h.mountsBelow()), 0)
		}
		assert.Assert(t, exists(filepath.Join(home, "log")))
		if managed {
			assert.NilError(t, h.remove("db"))
			assert.DeepEqual(t, trash(t, fast), []string{"db"})
			assert.DeepEqual(t, h.list(), []string{"log", "web"})
		}

		err := h.create("x", "root=nas")
		assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
		assert.ErrorContains(t, err, "default, fast")
	}
}

func TestANameIsOneVolumeWhateverRootIsAskedFor(t *testing.T) {
	h, home, fast := newRoots(t, nil)
	assert.NilError(t, h.create("db", "root=fast"))
	uuid := h.status("db")["uuid"]
	assert.NilError(t, h.create("db"))
	assert.Assert(t, !exists(filepath.Join(home, "db")))
	status := h.status("db")
	assert.Equal(t, status["uuid"], uuid)
	assert.DeepEqual(t, status["options-differ"], []any{"root: has fast, asked none"})

	// Another host has made it in the other root, unseen by this one.
	assert.NilError(t, newHost(t, home, nil).create("web"))
	assert.NilError(t, h.create("web", "root=fast"))
	assert.Assert(t, !exists(filepath.Join(fast, "web")))
	assert.Equal(t, h.status("web")["root"], home)
}

// Other hosts may use one name in two roots: the one that was known first wins,
// also over restarts, and its user is told.
func TestANameInTwoRoots(t *testing.T) {
	h, home, fast := newRoots(t, nil)
	assert.NilError(t, h.create("db", "root=fast"))
	assert.NilError(t, h.create("web"))
	other, third := newHost(t, home, nil), newHost(t, fast, nil)
	assert.NilError(t, other.create("db"))
	assert.NilError(t, third.create("web"))
	for range 2 {
		assert.DeepEqual(t, h.list(), []string{"db", "web"})
		assert.Equal(t, h.status("db")["root"], fast)
		assert.DeepEqual(t, h.status("db")["also-in"], []any{"default"})
		assert.Equal(t, h.status("web")["root"], home)
		assert.DeepEqual(t, h.status("web")["also-in"], []any{"root:fast"})
		h.restart()
	}
	assert.NilError(t, h.remove("db"))
	assert.DeepEqual(t, trash(t, fast), []string{"db"})
	assert.Assert(t, exists(filepath.Join(home, "db")))
	assert.Equal(t, h.status("db")["root"], home, "the other one has the name now")
	assert.Equal(t, h.status("db")["also-in"], nil)

	// Removed elsewhere: the name is found in the other root at once.
	assert.NilError(t, other.remove("web"))
	assert.Equal(t, h.status("web")["root"], fast)
	path, err := h.mount("web", "id")
	assert.NilError(t, err)
	write(t, filepath.Join(path, "f"), "x")
	assert.Assert(t, exists(filepath.Join(fast, "web", "f")))
}

func TestADeadRootHoldsNoOtherUp(t *testing.T) {
	s := &stopper{}
	h, home, _ := newRoots(t, func(c *Config) {
		c.step = s.step
		c.request, c.look = time.Second, 200*time.Millisecond
	})
	assert.NilError(t, h.create("dead", "root=fast"))
	assert.NilError(t, h.create("web"))
	assert.DeepEqual(t, h.list(), []string{"dead", "web"})
	fast := h.byKey("root:fast")
	// All threads that the store may have are inside the file system.
	for range cap(fast.looks.slots) {
		fast.looks.slots <- struct{}{}
		fast.changes.slots <- struct{}{}
	}
	start := time.Now()
	assert.Assert(t, h.status("dead")["error"] != nil)
	for range 50 {
		assert.DeepEqual(t, h.list(), []string{"dead", "web"})
		assert.Equal(t, h.status("web")["error"], nil)
		assert.Assert(t, h.status("dead")["error"] != nil)
		_, err := h.get("unknown")
		assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
		assert.NilError(t, h.create("new"))
		path, err := h.mount("new", "id")
		assert.NilError(t, err)
		assert.Equal(t, exists(path), true)
		assert.NilError(t, h.unmount("new", "id"))
		assert.NilError(t, h.remove("new"))
	}
	h.tendMounts(t.Context())
	h.home.tend(t.Context())
	for what, call := range map[string]func() error{
		"create":       func() error { return h.create("other", "root=fast") },
		"create known": func() error { return h.create("dead") },
		"mount":        func() error { return second(h.mount("dead", "id")) },
		"remove":       func() error { return h.remove("dead") },
	} {
		err := call()
		assert.Assert(t, errdefs.IsUnavailable(err), "%s: %v", what, err)
		assert.ErrorContains(t, err, "fast (")
		assert.Assert(t, !exists(filepath.Join(home, "other")))
	}
	assert.Assert(t, time.Since(start) < 20*time.Second)
	for range cap(fast.looks.slots) {
		<-fast.looks.slots
		<-fast.changes.slots
	}
	fast.hung.Store(false) // as the first call that comes back does
	assert.NilError(t, second(h.mount("dead", "id")))
	assert.Equal(t, h.status("dead")["error"], nil)
}

// A root that never answered, by a wrong setting perhaps, is in nobody's way.
func TestANamedRootThatWasNeverThere(t *testing.T) {
	home := t.TempDir()
	gone := filepath.Join(t.TempDir(), "gone")
	h := newHost(t, home, func(c *Config) { c.Roots = []NamedRoot{{Name: "gone", Path: gone}} })
	_, err := h.get("web")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.NilError(t, h.create("web"))
	assert.DeepEqual(t, h.list(), []string{"web"})
	err = h.create("db", "root=gone")
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, gone)
	assert.Assert(t, !exists(gone))
}

// dockerd would make empty local volumes in the place of volumes that are no more
// configured.
func TestARootThatIsNoMoreConfigured(t *testing.T) {
	h, _, fast := newRoots(t, nil)
	assert.NilError(t, h.create("db", "root=fast"))
	roots := h.cfg.Roots
	h.cfg.Roots = nil
	h.restart()
	assert.DeepEqual(t, h.list(), []string{"db"})
	assert.ErrorContains(t, second(h.mount("db", "id")), "BERTH_ROOTS")
	assert.ErrorContains(t, h.remove("db"), "BERTH_ROOTS")
	assert.ErrorContains(t, h.create("db"), "BERTH_ROOTS")
	assert.Assert(t, errdefs.IsInvalidArgument(h.create("x", "root=fast")) || errdefs.IsUnavailable(h.create("x", "root=fast")))
	assert.Assert(t, h.status("db")["error"] != nil)
	h.tend(t.Context())
	h.expire(t.Context())
	h.cfg.Roots = roots
	h.restart()
	assert.Equal(t, h.status("db")["error"], nil)
	assert.NilError(t, h.remove("db"))
	assert.DeepEqual(t, trash(t, fast), []string{"db"})
}

func TestARootWithinARootIsNoVolume(t *testing.T) {
	home := t.TempDir()
	inner := filepath.Join(home, "disks", "fast")
	assert.NilError(t, os.MkdirAll(inner, 0o755))
	h := newHost(t, home, func(c *Config) { c.Roots = []NamedRoot{{Name: "fast", Path: inner}} })
	assert.NilError(t, h.create("db", "root=fast"))
	err := h.create("disks")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.NilError(t, h.create("disk"))

	// Nor is one that is not configured here.
	assert.NilError(t, newHost(t, mkdir(t, home, "other"), nil).create("x"))
	err = h.create("other")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.Assert(t, !slices.Contains(h.list(), "other"))
}

func mkdir(t *testing.T, elem ...string) string {
	dir := filepath.Join(elem...)
	assert.NilError(t, os.Mkdir(dir, 0o755))
	return dir
}

// Two names for one directory are two stores with the same volumes.
func TestARootReachedInTwoWays(t *testing.T) {
	h, home, _ := newRoots(t, nil)
	again := t.TempDir()
	mounttest.Bind(t, home, again)
	h.cfg.Roots = append(h.cfg.Roots, NamedRoot{Name: "again", Path: again})
	h.restart()
	assert.NilError(t, h.create("web"))
	assert.NilError(t, h.create("db", "root=again"))
	for range 2 {
		assert.DeepEqual(t, h.list(), []string{"db", "web"})
		assert.Equal(t, h.status("web")["also-in"], nil)
		h.restart()
	}
	assert.NilError(t, h.remove("db"))
	assert.NilError(t, h.remove("web"))
	h.list()
	assert.DeepEqual(t, h.list(), []string{})
}

// The state file of the version that had one root.
func TestTheStateOfVersion1IsTakenOver(t *testing.T) {
	root := t.TempDir()
	h := newHost(t, root, nil)
	assert.NilError(t, h.create("web"))
	assert.NilError(t, h.create("db"))
	_, err := h.mount("db", "id")
	assert.NilError(t, err)
	h.list()
	h.stop()
	counts, err := filepath.Glob(filepath.Join(h.dir, "vol", "mounts-*.db"))
	assert.NilError(t, err)
	assert.Equal(t, len(counts), 1)
	assert.NilError(t, os.Remove(counts[0]))
	db, err := bolt.Open(filepath.Join(h.dir, "vol", "state.db"), 0o600, nil)
	assert.NilError(t, err)
	assert.NilError(t, db.Update(asVersion1))
	assert.NilError(t, db.Close())
	away := root + ".away"
	assert.NilError(t, os.Rename(root, away))

	h.start()
	assert.DeepEqual(t, h.list(), []string{"db", "web"})
	assert.Equal(t, h.status("db")["mounts"], 1.0)
	_, err = h.get("unknown")
	assert.Assert(t, errdefs.IsNotFound(err), "%v", err)
	assert.NilError(t, os.Rename(away, root))
	assert.Assert(t, errdefs.IsConflict(h.remove("db")))
	assert.NilError(t, h.remove("web"))
	h.restart()
	assert.Equal(t, h.status("db")["mounts"], 1.0)
	assert.NilError(t, h.unmount("db", "id"))
	h.restart()
	assert.DeepEqual(t, h.list(), []string{"db"})
	assert.Equal(t, h.status("db")["mounts"], 0.0)
}

// A file that is not synced may be damaged after a crash of the machine, and is void.
func TestCountsOfAnEarlierBootAreNotOpened(t *testing.T) {
	dir := t.TempDir()
	earlier, other := filepath.Join(dir, "mounts-4f2c1a7e.db"), filepath.Join(dir, "state.db")
	for _, path := range []string{earlier, other} {
		write(t, path, "torn")
	}
	for range 2 {
		counts, err := OpenCounts(dir)
		assert.NilError(t, err)
		assert.NilError(t, counts.Close())
	}
	assert.Assert(t, !exists(earlier))
	assert.Equal(t, read(t, other), "torn")
}

// asVersion1 makes of a state file one of version 1: records as they were, without
// what version 2 adds.
func asVersion1(tx *bolt.Tx) error {
	move := func(from, to string, rename func(string) string) error {
		records, err := readAll(tx, from)
		if err != nil {
			return err
		}
		if err := tx.DeleteBucket([]byte(from)); err != nil {
			return err
		}
		for key, value := range records {
			delete(records, key)
			records[rename(key)] = value
		}
		return writeAll(tx, to, records)
	}
	err := move("volumes", "volumes", filepath.Base)
	if err == nil {
		err = move("volume-stores", "volume-root", func(string) string { return "this" })
	}
	if err == nil {
		err = tx.DeleteBucket([]byte("volume-owners"))
	}
	if err == nil {
		err = writeAll(tx, "volume-mounts", map[string]json.RawMessage{
			"db": slices.Concat([]byte(`{"UUID":"`), uuidOf(tx), []byte(`","Boot":"boot-1","IDs":{"id":1}}`)),
		})
	}
	if err == nil {
		err = tx.Bucket([]byte("meta")).Put([]byte("schema-version"), []byte("1"))
	}
	return err
}

// uuidOf is that of the volume db.
func uuidOf(tx *bolt.Tx) []byte {
	record := string(tx.Bucket([]byte("volumes")).Get([]byte("db")))
	_, rest, _ := strings.Cut(record, `"uuid":"`)
	return []byte(rest[:36])
}

// A root is read anew when anything in it has changed, and only then.
func TestARootThatRestsIsNotReadAgain(t *testing.T) {
	root := t.TempDir()
	h, other := newHost(t, root, nil), newHost(t, root, nil)
	assert.NilError(t, h.create("web"))
	assert.DeepEqual(t, other.list(), []string{"web"})
	assert.Assert(t, other.home.lastRead.Load() == nil, "too young to be trusted")
	// As if that had been long ago.
	past := time.Now().Add(-time.Hour)
	edition := func() reading {
		assert.NilError(t, os.Chtimes(filepath.Join(root, ".berth/volumes"), past, past))
		r, err := other.home.open()
		assert.NilError(t, err)
		defer r.Close()
		stamp, err := r.Edition()
		assert.NilError(t, err)
		return reading{r.ID, stamp}
	}
	now := edition()
	other.home.lastRead.Store(&now)
	assert.DeepEqual(t, other.list(), []string{"web"})
	assert.NilError(t, h.create("db"))
	assert.DeepEqual(t, other.list(), []string{"db", "web"})
	now = edition()
	other.home.lastRead.Store(&now)
	assert.NilError(t, h.remove("web"))
	assert.DeepEqual(t, other.list(), []string{"db"})
}
