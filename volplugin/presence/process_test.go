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
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
)

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
