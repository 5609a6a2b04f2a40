package presence

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

func TestALease(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	l, err := a.Lease(t.Context(), v)
	assert.NilError(t, err)
	assert.Equal(t, l, Lease{})
	l, err = a.Acquire(t.Context(), v, false)
	assert.NilError(t, err)
	assert.Assert(t, l.Mine && l.Generation == 1 && l.Host == "a" && l.Alive)
	l, err = a.Acquire(t.Context(), v, false)
	assert.NilError(t, err)
	assert.Equal(t, l.Generation, uint64(1), "it has it already")

	err = b.take(v)
	assert.Assert(t, errdefs.IsConflict(err))
	assert.ErrorContains(t, err, "host a has it, and gave a sign of life 0s ago; it is taken over when that host has been silent for 1m15s, or by force")
	l, err = b.Lease(t.Context(), v)
	assert.NilError(t, err)
	assert.Assert(t, !l.Mine && l.Name == "a" && l.Alive)
	assert.NilError(t, b.Release(t.Context(), v), "what is not its own is left alone")
	assert.Assert(t, errdefs.IsConflict(b.Drop(t.Context(), v)))

	assert.NilError(t, a.Release(t.Context(), v))
	assert.NilError(t, a.Release(t.Context(), v))
	l, err = b.Lease(t.Context(), v)
	assert.NilError(t, err)
	assert.Equal(t, l, Lease{Generation: 1})
	l, err = b.Acquire(t.Context(), v, false)
	assert.NilError(t, err)
	assert.Equal(t, l.Generation, uint64(2))
	a.beat()
	assert.Equal(t, len(a.told()), 0, "who released it has not lost it")
	entries, err := os.ReadDir(filepath.Join(root, leasesName, v))
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 1)

	assert.NilError(t, b.Drop(t.Context(), v))
	assert.NilError(t, b.Drop(t.Context(), v))
	assert.NilError(t, a.take(v))
}

func TestALeaseIsResumedByTheNextProcessUnlessItWasLost(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	why, err := a.Resume(t.Context(), v)
	assert.NilError(t, err)
	assert.Equal(t, why, "its lease was deleted")
	assert.NilError(t, a.take(v))
	next := newHost(t, root, "a")
	why, err = next.Resume(t.Context(), v)
	assert.NilError(t, err)
	assert.Equal(t, why, "")
	assert.Assert(t, next.Holds(v) && !b.Holds(v))
	_, err = b.Acquire(t.Context(), v, true)
	assert.NilError(t, err)
	last := newHost(t, root, "a")
	why, err = last.Resume(t.Context(), v)
	assert.NilError(t, err)
	assert.Equal(t, why, "host b took it over")
	assert.NilError(t, b.Release(t.Context(), v))
	why, err = last.Resume(t.Context(), v)
	assert.NilError(t, err)
	assert.Equal(t, why, "another host had it meanwhile")
	assert.Assert(t, !last.Holds(v))
}

func TestALeaseOutlivesTheProcess(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	assert.NilError(t, a.take(v))
	again := newHost(t, root, "a")
	assert.Assert(t, errdefs.IsConflict(b.take(v)))
	leases, err := again.Leases(t.Context())
	assert.NilError(t, err)
	assert.Assert(t, len(leases) == 1 && leases[v].Mine)
	l, err := again.Acquire(t.Context(), v, false)
	assert.NilError(t, err)
	assert.Equal(t, l.Generation, uint64(2), "what the first process has begun cannot touch the second's")
	assert.NilError(t, a.Release(t.Context(), v)) // late, as from a server that was away
	// Release looks who has it. What it wrote without looking:
	again.beat()
	another := newHost(t, root, "a")
	assert.NilError(t, another.Release(t.Context(), v))
	assert.NilError(t, b.take(v))
}

// The server carries out the last write of a process that is gone.
func TestALateReleaseOfAnEarlierProcess(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	assert.NilError(t, a.take(v))
	again := newHost(t, root, "a")
	a.onStep(func(step string) error {
		if step == "lease.free" {
			return again.take(v)
		}
		return nil
	})
	assert.NilError(t, a.Release(t.Context(), v))
	again.beat()
	assert.Equal(t, len(again.told()), 0)
	assert.Assert(t, errdefs.IsConflict(b.take(v)))
}

// Who was slow makes a generation that others have had and deleted.
func TestWhoIsSlowDoesNotWin(t *testing.T) {
	for _, releases := range []bool{false, true} {
		root, v := t.TempDir(), uuid.NewString()
		a, b, c := newHost(t, root, "a"), newHost(t, root, "b"), newHost(t, root, "c")
		once := false
		a.onStep(func(step string) error {
			if step != "lease.link" || once {
				return nil
			}
			once = true
			assert.NilError(t, b.take(v))
			assert.NilError(t, b.Release(t.Context(), v))
			assert.NilError(t, c.take(v))
			if releases {
				return c.Release(t.Context(), v)
			}
			return nil
		})
		l, err := a.Acquire(t.Context(), v, false)
		if releases {
			assert.NilError(t, err)
			assert.Equal(t, l.Generation, uint64(3))
		} else {
			assert.Assert(t, errdefs.IsConflict(err), "%v", err)
			assert.ErrorContains(t, err, "host c has it")
			c.beat()
			assert.Equal(t, len(c.told()), 0)
		}
		entries, err := os.ReadDir(filepath.Join(root, leasesName, v))
		assert.NilError(t, err)
		assert.Equal(t, len(entries), 1)
	}
}

func TestAnOwnerWithoutAFile(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, owner := newHost(t, root, "a"), newHost(t, root, "owner")
	assert.NilError(t, owner.take(v))
	a.watch(deadAfter + beatEvery)
	assert.NilError(t, os.Remove(filepath.Join(root, hostsName, owner.file)))
	assert.Assert(t, errdefs.IsConflict(a.take(v)), "it may be about to write it")
	a.watch(deadAfter + beatEvery)
	assert.NilError(t, a.take(v))
}

func TestADamagedLeaseIsTakenByForceOnly(t *testing.T) {
	root := t.TempDir()
	a := newHost(t, root, "a")
	for i, data := range []string{"", "{", `{"schema":9}`, `{"schema":1,"host":"x","made":"y","state":"taking"}`} {
		v := uuid.NewString()
		assert.NilError(t, a.take(v))
		assert.NilError(t, os.WriteFile(filepath.Join(root, leasesName, v, "7.json"), []byte(data), 0o600))
		b := newHost(t, root, fmt.Sprint("b", i))
		err := b.take(v)
		assert.Assert(t, errdefs.IsConflict(err))
		assert.ErrorContains(t, err, filepath.Join(v, "7.json"))
		a.wait(beatEvery)
		a.beat()
		assert.DeepEqual(t, a.told(), []string{"lost " + v + ": its lease is damaged"})
		l, err := b.Acquire(t.Context(), v, true)
		assert.NilError(t, err)
		assert.Equal(t, l.Generation, uint64(8))
	}
	v := uuid.NewString()
	assert.NilError(t, os.MkdirAll(filepath.Join(root, leasesName, v, "9007199254740992.json"), 0o700))
	_, err := a.Acquire(t.Context(), v, true)
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
}

func TestALeaseThatIsDeletedIsLost(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a := newHost(t, root, "a")
	assert.NilError(t, a.take(v))
	assert.NilError(t, os.Rename(filepath.Join(root, leasesName, v), filepath.Join(root, "away")))
	a.beat()
	assert.DeepEqual(t, a.told(), []string{"lost " + v + ": its lease was deleted"})
}

func TestDoubts(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a := newHost(t, root, "a")
	assert.NilError(t, a.take(v))
	a.wait(doubtAfter)
	assert.Equal(t, len(a.told()), 0)
	a.wait(1)
	assert.Equal(t, len(a.told()), 1)
	assert.Equal(t, len(a.told()), 0, "it is said once")
	a.beat()
	assert.DeepEqual(t, a.told(), []string{"held " + v + ": the volume root answers again"})
	// A heartbeat that took so long proves nothing.
	a.wait(doubtAfter + 1)
	assert.Equal(t, len(a.told()), 1)
	a.onStep(func(step string) error {
		if step == "beat.look" {
			a.wait(doubtAfter + 1)
		}
		return nil
	})
	a.beat()
	assert.Equal(t, len(a.told()), 0)
	a.onStep(nil)
	a.beat()
	assert.Equal(t, len(a.told()), 1)
}

func TestAReleaseThatFailsIsTriedAgain(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	assert.NilError(t, a.take(v))
	a.onStep(func(string) error { return errors.New("no") })
	assert.Assert(t, errdefs.IsUnavailable(a.Release(t.Context(), v)))
	a.onStep(nil)
	assert.Assert(t, errdefs.IsConflict(b.take(v)))
	a.beat()
	assert.NilError(t, b.take(v))
	assert.Equal(t, len(a.told()), 0)

	// Taken anew before it was tried again, it is not released.
	w := uuid.NewString()
	assert.NilError(t, a.take(w))
	a.onStep(func(string) error { return errors.New("no") })
	assert.Assert(t, errdefs.IsUnavailable(a.Release(t.Context(), w)))
	a.onStep(nil)
	assert.NilError(t, a.take(w))
	a.beat()
	assert.Assert(t, errdefs.IsConflict(b.take(w)))
}

func TestOneHostWinsEachRace(t *testing.T) {
	for _, n := range []int{2, 10} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			root := mounttest.Tmpfs(t, 64<<20)
			var hosts []*host
			for i := range n {
				hosts = append(hosts, newHost(t, root, fmt.Sprint("host", i)))
			}
			for round := range 200 {
				v := uuid.NewString()
				if round%20 == 1 {
					dead(t, root, v, hosts...)
				}
				if round%5 == 2 {
					assert.NilError(t, hosts[0].take(v))
					assert.NilError(t, hosts[0].Release(t.Context(), v))
				}
				force := round%5 == 3
				var group sync.WaitGroup
				var wins atomic.Int32
				for _, h := range hosts {
					group.Go(func() {
						_, err := h.Acquire(t.Context(), v, force)
						assert.Check(t, err == nil || errdefs.IsConflict(err), "%v", err)
						if err == nil {
							wins.Add(1)
						}
					})
				}
				group.Wait()
				if !force {
					assert.Equal(t, wins.Load(), int32(1), "round %d", round)
				}
				owners := 0
				for _, h := range hosts {
					h.wait(beatEvery)
					h.beat()
					if h.has(v) {
						owners++
						l, err := h.Lease(t.Context(), v)
						assert.NilError(t, err)
						assert.Assert(t, l.Mine)
						assert.NilError(t, h.Release(t.Context(), v))
					}
				}
				assert.Equal(t, owners, 1, "round %d", round)
			}
		})
	}
}

// Hosts take a lease, work and give it back, as fast as they can.
func TestNeverTwoAtATime(t *testing.T) {
	root, v := mounttest.Tmpfs(t, 64<<20), uuid.NewString()
	var working atomic.Int32
	var last atomic.Uint64
	var group sync.WaitGroup
	for i := range 5 {
		h := newHost(t, root, fmt.Sprint("host", i))
		group.Go(func() {
			for done := 0; done < 20; {
				l, err := h.Acquire(t.Context(), v, false)
				if err != nil {
					assert.Check(t, errdefs.IsConflict(err), "%v", err)
					time.Sleep(time.Millisecond)
					continue
				}
				assert.Check(t, working.Add(1) == 1)
				assert.Check(t, last.Swap(l.Generation) < l.Generation, "generations do not grow")
				working.Add(-1)
				assert.Check(t, h.Release(t.Context(), v))
				done++
			}
		})
	}
	group.Wait()
}

// The rest is about hosts that are processes of their own.
