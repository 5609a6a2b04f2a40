package presence

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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

// dead makes an owner of the volume that all of the hosts take for dead.
func dead(t testing.TB, root, volume string, hosts ...*host) *host {
	t.Helper()
	owner := newHost(t, root, "owner-"+volume)
	assert.NilError(t, owner.take(volume))
	owner.age(time.Hour)
	for _, h := range hosts {
		h.watch(deadAfter + beatEvery)
	}
	return owner
}

func TestTakeOver(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	owner := dead(t, root, v, a)
	assert.Assert(t, errdefs.IsConflict(b.take(v)), "it has not watched")
	assert.NilError(t, a.take(v))
	l, err := a.Lease(t.Context(), v)
	assert.NilError(t, err)
	assert.Equal(t, l.Generation, uint64(2))

	assert.Equal(t, len(owner.told()), 0)
	owner.beat()
	assert.DeepEqual(t, owner.told(), []string{"lost " + v + ": host a took it over"})
	assert.Assert(t, errdefs.IsConflict(owner.take(v)))
	assert.NilError(t, owner.Release(t.Context(), v))
	a.beat()
	assert.Equal(t, len(a.told()), 0)
	assert.Assert(t, a.has(v) && !owner.has(v))
}

func TestTakeOverByForce(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, b := newHost(t, root, "a"), newHost(t, root, "b")
	assert.NilError(t, a.take(v))
	l, err := b.Acquire(t.Context(), v, true)
	assert.NilError(t, err)
	assert.Equal(t, l.Generation, uint64(2))
	a.wait(beatEvery)
	a.beat()
	assert.DeepEqual(t, a.told(), []string{"lost " + v + ": host b took it over"})
	b.beat()
	assert.Equal(t, len(b.told()), 0)
}

func TestWhoWasEndedIsOnlyTakenOverByForce(t *testing.T) {
	root, v := t.TempDir(), uuid.NewString()
	a, owner := newHost(t, root, "a"), newHost(t, root, "owner")
	assert.NilError(t, owner.take(v))
	assert.NilError(t, owner.Close(t.Context()))
	owner.age(time.Hour)
	a.watch(deadAfter + beatEvery)
	err := a.take(v)
	assert.Assert(t, errdefs.IsConflict(err))
	assert.ErrorContains(t, err, "its Berth was ended 1h0m0s ago while containers may have gone on with it")
	l, err := a.Lease(t.Context(), v)
	assert.NilError(t, err)
	assert.Assert(t, l.Stopped && !l.Alive)
	_, err = a.Acquire(t.Context(), v, true)
	assert.NilError(t, err)

	// Who has nothing in use just ends.
	assert.NilError(t, a.Release(t.Context(), v))
	assert.NilError(t, a.Close(t.Context()))
	rec, err := a.record()
	assert.NilError(t, err)
	assert.Assert(t, !rec.Stopped)
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

// The owner that was taken for dead beats while another takes over. In every order
// of their steps, not both have the lease at the end.
func TestTheOwnerComesBackWhileItIsTakenOver(t *testing.T) {
	outcomes := make(map[string]int)
	// Bit i of order says whose i-th step it is. Each has fewer than five.
	for order := range 1 << 9 {
		root, v := mounttest.Tmpfs(t, 1<<20), uuid.NewString()
		a := newHost(t, root, "a")
		owner := dead(t, root, v, a)

		type actor struct {
			at, goOn chan struct{}
			done     chan struct{}
		}
		begin := func(h *host, do func()) *actor {
			c := &actor{at: make(chan struct{}), goOn: make(chan struct{}), done: make(chan struct{})}
			h.onStep(func(string) error { c.at <- struct{}{}; <-c.goOn; return nil })
			go func() { defer close(c.done); c.at <- struct{}{}; <-c.goOn; do() }()
			return c
		}
		var errTake error
		actors := [2]*actor{
			begin(a, func() { errTake = a.take(v) }),
			begin(owner, func() { assert.Check(t, owner.Beat(t.Context())) }),
		}
		// step lets one go on to its next step, or its end.
		for i := range actors {
			<-actors[i].at
		}
		ended := [2]bool{}
		step := func(i int) {
			if ended[i] {
				return
			}
			actors[i].goOn <- struct{}{}
			select {
			case <-actors[i].at:
			case <-actors[i].done:
				ended[i] = true
			}
		}
		for i := range 9 {
			step(order >> i & 1)
		}
		for i := range actors {
			for !ended[i] {
				step(i)
			}
		}
		a.onStep(nil)
		owner.onStep(nil)
		assert.Assert(t, a.has(v) == (errTake == nil))
		assert.Assert(t, errTake == nil || errdefs.IsConflict(errTake), "%v", errTake)
		assert.Assert(t, !a.has(v) || !owner.has(v), "order %b: both have it", order)
		lost := len(owner.told()) > 0
		assert.Equal(t, lost, !owner.has(v))
		outcomes[fmt.Sprintf("taken %v, owner has it %v", a.has(v), owner.has(v))]++

		// Whatever happened, it goes on.
		owner.wait(beatEvery)
		owner.beat()
		if !a.has(v) {
			assert.NilError(t, owner.take(v))
		} else {
			assert.Assert(t, errdefs.IsConflict(owner.take(v)))
		}
	}
	// The test would see nothing if it never came to these.
	assert.Assert(t, outcomes["taken true, owner has it false"] > 0 && outcomes["taken false, owner has it true"] > 0 && outcomes["taken false, owner has it false"] > 0, "%v", outcomes)
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

const (
	childEnv = "BERTH_TEST_PRESENCE_CHILD" // the host's ID
	rootEnv  = "BERTH_TEST_PRESENCE_ROOT"
	killEnv  = "BERTH_TEST_PRESENCE_KILL" // the step, counted from 1, at which the child is killed
)

// child is a host that does what it is told line by line.
func child() int {
	t := &childT{}
	steps, killAt := 0, 0
	if text := os.Getenv(killEnv); text != "" {
		killAt, _ = strconv.Atoi(text)
	}
	h := newHost(t, os.Getenv(rootEnv), os.Getenv(childEnv))
	armed := false
	h.onStep(func(string) error {
		if !armed {
			return nil
		}
		if steps++; steps == killAt {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	})
	ctx := context.Background()
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		words := strings.Fields(in.Text())
		var err error
		answer := "ok"
		switch words[0] {
		case "arm":
			armed = true
		case "watch":
			for range 8 {
				h.wait(beatEvery)
				err = errors.Join(err, h.Beat(ctx))
			}
		case "beat":
			h.wait(beatEvery)
			err = h.Beat(ctx)
		case "acquire":
			_, err = h.Acquire(ctx, words[1], false)
			if errdefs.IsConflict(err) {
				answer, err = "conflict", nil
			}
		case "release":
			err = h.Release(ctx, words[1])
		case "enter":
			err = h.Enter(ctx, words[1])
		case "work":
			fmt.Println(work(ctx, h, words[1]))
			return 1
		case "has":
			answer = fmt.Sprint(h.has(words[1]))
		}
		if err != nil {
			answer = "error " + strings.ReplaceAll(err.Error(), "\n", " ")
		}
		fmt.Println(answer)
	}
	return 0
}

// work takes the lease, does what only one may do, and gives it back, until it is
// killed. It returns what went wrong.
func work(ctx context.Context, h *host, volume string) string {
	place := filepath.Join(h.root, "place")
	for {
		h.wait(time.Second)
		_, err := h.Acquire(ctx, volume, false)
		if errdefs.IsConflict(err) {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return err.Error()
		}
		// It may be this host's still: it was killed here.
		if data, err := os.ReadFile(place); err == nil && string(data) != h.cfg.ID {
			return "beside " + string(data)
		}
		if err := os.WriteFile(place+h.cfg.ID, []byte(h.cfg.ID), 0o600); err != nil {
			return err.Error()
		}
		if err := os.Rename(place+h.cfg.ID, place); err != nil {
			return err.Error()
		}
		if data, err := os.ReadFile(place); err != nil || string(data) != h.cfg.ID {
			return fmt.Sprintf("interrupted by %s (%v)", data, err)
		}
		if err := os.Remove(place); err != nil {
			return err.Error()
		}
		if err := h.Release(ctx, volume); err != nil {
			return err.Error()
		}
	}
}

// childT is what newHost needs of a test.
type childT struct{ testing.TB }

func (*childT) Helper()                  {}
func (*childT) Log(args ...any)          { fmt.Fprintln(os.Stderr, args...) }
func (*childT) FailNow()                 { os.Exit(1) }
func (*childT) Context() context.Context { return context.Background() }

type process struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func startChild(t *testing.T, root, id string, killAt int) *process {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+id, rootEnv+"="+root, killEnv+"="+strconv.Itoa(killAt))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	assert.NilError(t, err)
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	p := &process{t: t, cmd: cmd, in: in, out: bufio.NewScanner(out)}
	t.Cleanup(p.kill)
	return p
}

// kill is kill -9.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func (p *process) tell(words ...string) {
	_, err := fmt.Fprintln(p.in, strings.Join(words, " "))
	assert.Check(p.t, err)
}

// answer is "" when the process is gone.
func (p *process) answer() string {
	if !p.out.Scan() {
		return ""
	}
	return p.out.Text()
}

func (p *process) ask(words ...string) string {
	p.t.Helper()
	p.tell(words...)
	return p.answer()
}

func TestOneProcessWinsEachRace(t *testing.T) {
	for _, n := range []int{2, 10} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			root := mounttest.Tmpfs(t, 64<<20)
			var hosts []*process
			for i := range n {
				h := startChild(t, root, fmt.Sprint("host", i), 0)
				assert.Equal(t, h.ask("beat"), "ok")
				hosts = append(hosts, h)
			}
			all := func(words ...string) map[string]int {
				for _, h := range hosts {
					h.tell(words...)
				}
				answers := make(map[string]int)
				for _, h := range hosts {
					answers[h.answer()]++
				}
				return answers
			}
			for round := range 200 {
				v := uuid.NewString()
				if round%10 == 9 {
					dead(t, root, v)
					assert.DeepEqual(t, all("watch"), map[string]int{"ok": n})
				}
				assert.DeepEqual(t, all("acquire", v), map[string]int{"ok": 1, "conflict": n - 1})
				if round%10 == 8 {
					assert.DeepEqual(t, all("beat"), map[string]int{"ok": n})
					assert.DeepEqual(t, all("has", v), map[string]int{"true": 1, "false": n - 1})
				}
			}
		})
	}
}

// A host is killed before any of its steps, and comes back, or another takes over.
// Either gets the lease, and nothing is damaged.
func TestAHostIsKilledAnywhere(t *testing.T) {
	for _, what := range []string{"acquire", "takeover", "release", "enter"} {
		t.Run(what, func(t *testing.T) {
			survived := false
			for step := 1; !survived; step++ {
				for _, back := range []bool{true, false} {
					root, v := mounttest.Tmpfs(t, 1<<20), uuid.NewString()
					victim := startChild(t, root, "victim", step)
					if what == "takeover" {
						dead(t, root, v)
					}
					if what == "release" {
						assert.Equal(t, victim.ask("acquire", v), "ok")
					}
					assert.Equal(t, victim.ask("watch"), "ok")
					assert.Equal(t, victim.ask("arm"), "ok")
					command := what
					if what == "takeover" {
						command = "acquire"
					}
					answer := victim.ask(command, v)
					if answer == "ok" {
						answer = victim.ask("beat") // steps of the heartbeat are among them
					}
					survived = answer == "ok"
					assert.Assert(t, survived || answer == "", answer)
					victim.kill()

					a := newHost(t, root, "a")
					hosts, err := a.Users(t.Context(), v)
					assert.NilError(t, err)
					for _, h := range hosts {
						assert.Assert(t, !h.Unreadable)
					}
					if back {
						victim = startChild(t, root, "victim", 0)
						// It may have been killed before it took anything over.
						assert.Equal(t, victim.ask("watch"), "ok")
						assert.Equal(t, victim.ask("acquire", v), "ok")
						assert.Assert(t, errdefs.IsConflict(a.take(v)))
						assert.Equal(t, victim.ask("beat"), "ok")
						assert.Equal(t, victim.ask("has", v), "true")
						assert.Equal(t, victim.ask("release", v), "ok")
						assert.NilError(t, a.take(v))
						victim.kill()
						continue
					}
					gone := time.Now().Add(-time.Hour)
					err = os.Chtimes(filepath.Join(root, hostsName, fileName("victim")), gone, gone)
					assert.NilError(t, err)
					a.watch(deadAfter + beatEvery)
					assert.NilError(t, a.take(v))
					a.beat()
					assert.Assert(t, a.has(v))
				}
			}
		})
	}
}

// Hosts are killed at any moment and started again. What only one may do is never done
// by two, and what they leave behind is whole.
func TestHostsAreKilledAtRandom(t *testing.T) {
	root, v := mounttest.Tmpfs(t, 16<<20), uuid.NewString()
	const n = 4
	var hosts [n]*process
	begin := func(i int) {
		hosts[i] = startChild(t, root, fmt.Sprint("host", i), 0)
		hosts[i].tell("work", v)
	}
	for i := range hosts {
		begin(i)
	}
	for range 60 {
		time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		i := rand.IntN(n)
		_ = hosts[i].cmd.Process.Kill()
		assert.Equal(t, hosts[i].answer(), "")
		hosts[i].kill()
		begin(i)
	}
	for i := range hosts {
		_ = hosts[i].cmd.Process.Kill()
		assert.Equal(t, hosts[i].answer(), "")
		hosts[i].kill()
	}
	a := newHost(t, root, "a")
	seen, err := a.Hosts(t.Context())
	assert.NilError(t, err)
	for _, h := range seen {
		assert.Assert(t, !h.Unreadable)
	}
	l, err := a.Lease(t.Context(), v)
	assert.NilError(t, err)
	assert.Assert(t, !l.Unreadable && l.Generation > n)
	gone := time.Now().Add(-time.Hour)
	for i := range n {
		err := os.Chtimes(filepath.Join(root, hostsName, fileName(fmt.Sprint("host", i))), gone, gone)
		assert.Assert(t, err == nil || errors.Is(err, os.ErrNotExist))
	}
	a.watch(deadAfter + beatEvery)
	assert.NilError(t, a.take(v))
}
