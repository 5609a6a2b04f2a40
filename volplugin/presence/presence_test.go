package presence

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

func TestUsersOfAVolume(t *testing.T) {
	root, v, w := t.TempDir(), uuid.NewString(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	assert.Equal(t, users(t, a, v), "")
	assert.NilError(t, a.Enter(t.Context(), v))
	assert.NilError(t, a.Enter(t.Context(), w))
	assert.NilError(t, b.Enter(t.Context(), v))
	assert.Equal(t, users(t, a, v), "a self, b")
	assert.Equal(t, users(t, b, v), "a, b self")
	assert.Equal(t, users(t, b, w), "a")
	hosts, err := b.Users(t.Context(), w)
	assert.NilError(t, err)
	assert.Assert(t, hosts[0].Since.Equal(a.cfg.Now().UTC().Truncate(time.Second)) || time.Since(hosts[0].Since) > 0)

	a.Leave(v)
	assert.Equal(t, users(t, a, v), "b")
	a.beat()
	assert.Equal(t, users(t, b, v), "b self")

	// The next process of a host says what the one before has mounted.
	again := newHost(t, root, "a", func(c *Config) { c.Mounted = map[string]time.Time{w: time.Unix(1e9, 0)} })
	again.beat()
	assert.Equal(t, users(t, b, w), "a")
	hosts, err = b.Users(t.Context(), w)
	assert.NilError(t, err)
	assert.Equal(t, hosts[0].Since.Unix(), int64(1e9))

	for _, wrong := range []string{"", "x", "../x", strings.ToUpper(v)} {
		assert.Assert(t, errdefs.IsInvalidArgument(a.Enter(t.Context(), wrong)))
		_, err := a.Acquire(t.Context(), wrong, false)
		assert.Assert(t, errdefs.IsInvalidArgument(err))
		_, err = a.Lease(t.Context(), wrong)
		assert.Assert(t, errdefs.IsInvalidArgument(err))
		assert.Assert(t, errdefs.IsInvalidArgument(a.Release(t.Context(), wrong)))
		assert.Assert(t, errdefs.IsInvalidArgument(a.Drop(t.Context(), wrong)))
	}
	entries, err := os.ReadDir(filepath.Join(root, tmpName))
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 0)
}

func TestEnterThatFailsSaysNothing(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a := newHost(t, root, "a")
	a.beat()
	a.onStep(func(string) error { return errors.New("no") })
	assert.Assert(t, errdefs.IsUnavailable(a.Enter(t.Context(), v)))
	a.onStep(nil)
	a.beat()
	assert.Equal(t, users(t, a, v), "")
	assert.NilError(t, a.Enter(t.Context(), v))
	a.onStep(func(string) error { return errors.New("no") })
	assert.NilError(t, a.Enter(t.Context(), v), "it is there already")
}

// Many that begin at once are written by few.
func TestEntersAreWrittenTogether(t *testing.T) {
	root := t.TempDir()
	a := newHost(t, root, "a")
	a.beat()
	writes, first := 0, make(chan struct{})
	a.onStep(func(step string) error {
		if step == "host.replace" {
			if writes++; writes == 1 {
				<-first
			}
		}
		return nil
	})
	var group sync.WaitGroup
	var volumes []string
	for range 50 {
		volume := uuid.NewString()
		volumes = append(volumes, volume)
		group.Go(func() { assert.Check(t, a.Enter(t.Context(), volume)) })
	}
	for {
		a.Presence.mu.Lock()
		n := len(a.volumes)
		a.Presence.mu.Unlock()
		if n == 50 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	close(first)
	group.Wait()
	assert.Assert(t, writes <= 2, "%d", writes)
	rec, err := a.record()
	assert.NilError(t, err)
	assert.Equal(t, len(rec.Volumes), len(volumes))
}

func TestWhoIsDead(t *testing.T) {
	v := uuid.NewString()
	begin := func(t *testing.T, age time.Duration) (a, b *host) {
		root := t.TempDir()
		a, b = newHost(t, root, "a"), newHost(t, root, "b")
		assert.NilError(t, b.Enter(t.Context(), v))
		b.age(age)
		return a, b
	}
	t.Run("who is silent for long enough", func(t *testing.T) {
		a, _ := begin(t, time.Hour)
		a.watch(deadAfter)
		assert.Equal(t, users(t, a, v), "b")
		a.watch(beatEvery)
		assert.Equal(t, users(t, a, v), "b dead")
		hosts, err := a.Users(t.Context(), v)
		assert.NilError(t, err)
		assert.Assert(t, hosts[0].Silent >= time.Hour && hosts[0].Silent < 2*time.Hour)
	})
	t.Run("nobody by the server's clock alone", func(t *testing.T) {
		a, _ := begin(t, 1000*time.Hour)
		a.beat()
		assert.Equal(t, users(t, a, v), "b")
	})
	t.Run("nobody whose file is young by the server's clock", func(t *testing.T) {
		a, _ := begin(t, 0)
		a.watch(time.Hour)
		assert.Equal(t, users(t, a, v), "b")
	})
	t.Run("who is silent, though the server's clock was set back", func(t *testing.T) {
		a, _ := begin(t, -time.Hour)
		a.watch(deadAfter)
		assert.Equal(t, users(t, a, v), "b")
		a.watch(beatEvery)
		assert.Equal(t, users(t, a, v), "b dead")
	})
	t.Run("nobody who gives a sign of life", func(t *testing.T) {
		a, b := begin(t, time.Hour)
		for range 20 {
			a.watch(deadAfter - 2*beatEvery)
			b.beat()
			b.age(time.Hour)
			assert.Equal(t, users(t, a, v), "b")
		}
	})
	t.Run("nobody when this host could not watch", func(t *testing.T) {
		a, _ := begin(t, time.Hour)
		a.watch(deadAfter)
		a.wait(gapMost + 1) // the server was away, for all
		a.beat()
		assert.Equal(t, users(t, a, v), "b")
		a.watch(deadAfter)
		assert.Equal(t, users(t, a, v), "b")
		a.watch(beatEvery)
		assert.Equal(t, users(t, a, v), "b dead")
		a.wait(gapMost + 1) // and what it knew is old
		dead, _, _ := a.judge(fileName("b"))
		assert.Assert(t, !dead)
	})
	t.Run("not this host", func(t *testing.T) {
		a, _ := begin(t, time.Hour)
		assert.NilError(t, a.Enter(t.Context(), v))
		a.watch(2 * deadAfter)
		assert.Equal(t, users(t, a, v), "a self, b dead")
	})
	t.Run("who comes back is alive", func(t *testing.T) {
		a, b := begin(t, time.Hour)
		a.watch(2 * deadAfter)
		b.beat()
		assert.Equal(t, users(t, a, v), "b")
	})
	t.Run("who was ended is not taken for dead", func(t *testing.T) {
		a, b := begin(t, time.Hour)
		assert.NilError(t, b.Close(t.Context()))
		b.age(time.Hour)
		a.watch(2 * deadAfter)
		assert.Equal(t, users(t, a, v), "b dead stopped")
	})
}

func TestForgetAHost(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b, c := newHost(t, root, "a"), newHost(t, root, "b"), newHost(t, root, "c")
	assert.NilError(t, b.Enter(t.Context(), v))
	c.beat()
	b.age(100 * 24 * time.Hour)
	c.age(100 * 24 * time.Hour)
	a.watch(deadAfter)
	err := a.Forget(t.Context(), "b")
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	a.watch(beatEvery)
	// One without volumes that is dead for a month needs nobody to say so.
	hosts, err := a.Hosts(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, len(hosts), 2)
	assert.Equal(t, users(t, a, v), "b dead")
	assert.NilError(t, a.Forget(t.Context(), "b"))
	assert.Equal(t, users(t, a, v), "")
}

// Whatever lies in the directories, hosts that are well see each other.
func TestForeignAndDamagedFilesHinderNobody(t *testing.T) {
	root, v, w := t.TempDir(), uuid.NewString(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	assert.NilError(t, b.Enter(t.Context(), v))
	assert.NilError(t, b.take(v))
	name := func(i int) string { return fmt.Sprintf("%032x%s", i, suffix) }
	hosts := filepath.Join(root, hostsName)
	for i, data := range []string{"", "{", "null", `{"schema":2}`, `{"schema":1,"id":"b"}`, "\x00\xff", strings.Repeat("x", maxHost+1)} {
		assert.NilError(t, os.WriteFile(filepath.Join(hosts, name(i)), []byte(data), 0o600))
	}
	assert.NilError(t, os.Mkdir(filepath.Join(hosts, name(20)), 0o700))
	assert.NilError(t, os.Symlink("/dev/zero", filepath.Join(hosts, name(21))))
	assert.NilError(t, unix.Mkfifo(filepath.Join(hosts, name(22)), 0o600))
	assert.NilError(t, unix.Mknod(filepath.Join(hosts, name(23)), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))))
	for _, other := range []string{"README", "x.json", name(1) + "~", strings.ToUpper("abcdef" + name(1)[6:]), ".hidden"} {
		assert.NilError(t, os.WriteFile(filepath.Join(hosts, other), []byte("x"), 0o600))
		assert.NilError(t, os.WriteFile(filepath.Join(root, leasesName, other), []byte("x"), 0o600))
		assert.NilError(t, os.WriteFile(filepath.Join(root, leasesName, v, other), []byte("x"), 0o600))
	}
	for _, zero := range []string{"0.json", "01.json", "-1.json", "+9.json", "99999999999999999999.json"} {
		assert.NilError(t, os.WriteFile(filepath.Join(root, leasesName, v, zero), []byte("x"), 0o600))
	}
	for i, do := range []func(path string) error{
		func(path string) error { return os.WriteFile(path, nil, 0o600) },
		func(path string) error { return os.Symlink(root, path) },
		func(path string) error { return unix.Mkfifo(path, 0o600) },
	} {
		assert.NilError(t, do(filepath.Join(root, leasesName, fmt.Sprintf("%08x-0000-4000-8000-000000000000", i))))
	}

	assert.NilError(t, a.Enter(t.Context(), v))
	seen, err := a.Users(t.Context(), v)
	assert.NilError(t, err)
	var well, unreadable int
	for _, h := range seen {
		if h.Unreadable {
			unreadable++
			assert.Assert(t, h.Alive)
		} else {
			well++
		}
	}
	assert.Equal(t, well, 2)
	assert.Equal(t, unreadable, 11, "who cannot be read may use it, as long as it may be alive")
	a.watch(deadAfter + beatEvery)
	b.beat()
	for i := range 24 {
		_ = unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(hosts, name(i)), []unix.Timespec{{}, {}}, unix.AT_SYMLINK_NOFOLLOW)
	}
	for range 8 {
		b.watch(beatEvery)
		a.watch(beatEvery)
	}
	assert.Equal(t, users(t, a, v), "a self, b")

	assert.NilError(t, a.take(w))
	err = a.take(v)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.NilError(t, b.take(v))
	assert.Equal(t, len(b.told()), 0)
	leases, err := a.Leases(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, len(leases), 5)
	assert.Assert(t, leases[w].Mine && leases[v].Name == "b" && leases[v].Alive)
	assert.NilError(t, b.Release(t.Context(), v))
	assert.NilError(t, a.take(v))
}

func TestADamagedFileIsPutRight(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	assert.NilError(t, b.Enter(t.Context(), v))
	for _, data := range []string{"", "{}", "x"} {
		assert.NilError(t, os.WriteFile(filepath.Join(root, hostsName, b.file), []byte(data), 0o600))
		b.beat()
		assert.Equal(t, users(t, a, v), "b")
	}
	assert.NilError(t, os.Remove(filepath.Join(root, hostsName, b.file)))
	b.beat()
	assert.Equal(t, users(t, a, v), "b")
}

func TestAFullDiskIsNoDeath(t *testing.T) {
	root, v, w := mounttest.Tmpfs(t, 1<<20), uuid.NewString(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	assert.NilError(t, b.Enter(t.Context(), v))
	assert.NilError(t, b.take(v))
	a.beat()
	file, err := os.Create(filepath.Join(root, "full"))
	assert.NilError(t, err)
	for err == nil {
		_, err = file.Write(make([]byte, 4096))
	}
	assert.ErrorIs(t, err, unix.ENOSPC)
	assert.NilError(t, file.Close())

	before := stampOfHost(t, b)
	b.beat()
	after := stampOfHost(t, b)
	assert.Assert(t, before != after)
	assert.NilError(t, b.Enter(t.Context(), w), "a volume that is used to make room must not be refused")
	assert.Equal(t, users(t, b, w), "b self")
	rec, err := b.record()
	assert.NilError(t, err)
	assert.Equal(t, len(rec.Volumes), 2)
	assert.Equal(t, len(b.told()), 0)
	// There is no room for so many.
	for err = nil; err == nil && len(b.volumes) < 1000; {
		err = b.Enter(t.Context(), uuid.NewString())
	}
	assert.Assert(t, errdefs.IsUnavailable(err))
	assert.ErrorContains(t, err, "no space left")
	assert.NilError(t, os.Remove(filepath.Join(root, "full")))
	assert.NilError(t, b.Enter(t.Context(), uuid.NewString()))
}

func stampOfHost(t *testing.T, h *host) rooted.Stamp {
	t.Helper()
	dir, err := rooted.Open(filepath.Join(h.root, hostsName))
	assert.NilError(t, err)
	defer dir.Close()
	stamp, err := stampOf(dir, h.file)
	assert.NilError(t, err)
	same, err := dir.Stat(h.file)
	assert.NilError(t, err)
	assert.Equal(t, stamp, same)
	return stamp
}

func TestLocalFileSystemsAreNotShared(t *testing.T) {
	for path, want := range map[string]bool{mounttest.Tmpfs(t, 1<<20): false, "/proc": true} {
		dir, err := rooted.Open(path)
		assert.NilError(t, err)
		shared, err := Shared(dir)
		assert.NilError(t, err)
		assert.Equal(t, shared, want)
		assert.NilError(t, dir.Close())
		_, err = Shared(dir)
		assert.Assert(t, err != nil)
	}
}

func TestACopyOfAHostIsFoundOut(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, copied := newHost(t, root, "a"), newHost(t, root, "a")
	a.beat()
	copied.beat() // as a restart
	assert.NilError(t, copied.take(v))
	a.wait(beatEvery)
	a.beat() // as a predecessor whose write hung
	assert.NilError(t, copied.take(uuid.NewString()))
	for range 3 {
		a.wait(beatEvery)
		a.beat()
		copied.wait(beatEvery)
		copied.beat()
	}
	for _, h := range []*host{a, copied} {
		err := h.take(uuid.NewString())
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
		assert.ErrorContains(t, err, "is this machine a copy")
	}
}

func FuzzRecords(f *testing.F) {
	rec := hostRecord{Schema: 1, ID: "a", Volumes: map[string]time.Time{"x": {}}}
	data, err := json.Marshal(rec)
	assert.NilError(f, err)
	f.Add(data)
	data, err = encode(leaseRecord{Schema: 1, Host: "a", Made: "m", State: taking, From: &previous{File: fileName("b")}})
	assert.NilError(f, err)
	f.Add(data)
	f.Add([]byte(`{"schema":1,"host":"a","made":"m","state":"taking"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if rec, err := decodeHost(fileName("a"), data); err == nil {
			assert.Equal(t, rec.ID, "a")
			assert.Equal(t, rec.Schema, schema)
		} else {
			assert.ErrorIs(t, err, errDamaged)
		}
		rec, err := decodeLease(data)
		if err != nil {
			assert.ErrorIs(t, err, errDamaged)
			return
		}
		assert.Assert(t, rec.Host != "" && rec.Made != "")
		assert.Assert(t, rec.State != taking || isFileName(rec.From.File))
	})
}

func FuzzLeaseName(f *testing.F) {
	for _, s := range []string{"1.json", "01.json", "0.json", "18446744073709551616.json", "+1.json", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if g, ok := parseLeaseName(name); ok {
			assert.Assert(t, g > 0)
			assert.Equal(t, leaseName(g), name)
		}
	})
}
