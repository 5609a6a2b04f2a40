package volume

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/options"
)

// Recovery itself is killed, one step further each time.
func TestKilledAtAnyStepOfRecovery(t *testing.T) {
	memory := mounttest.Tmpfs(t, 64<<20)
	recoveries := 0
	for _, name := range sortedOperations() {
		for die := 0; ; die++ {
			s := newScene(t, memory, name)
			before := normal(s.show())
			s.order.Die = die
			killed := s.order.run(t)
			for s.order.Op, s.order.Die = "recover", 0; killed && s.order.run(t); s.order.Die += stride() {
				recoveries++
			}
			s.order.Op = name
			s.recover()
			s.check(before, killed)
			if !killed {
				break
			}
			die += stride() * rand.IntN(4) // all of them would take a minute
		}
	}
	assert.Assert(t, recoveries > 10, "recovery was killed %d times", recoveries)
}

// What a host has begun and not ended is another one's to finish when it is old, and
// not before.
func TestAnotherHostTakesOverWhatIsOld(t *testing.T) {
	memory := mounttest.Tmpfs(t, 64<<20)
	for _, name := range sortedOperations() {
		t.Run(name, func(t *testing.T) {
			for die := 0; ; die += stride() {
				s := newScene(t, memory, name)
				before := normal(s.show())
				s.order.Die = die
				if killed := s.order.run(t); !killed {
					break
				}
				crashed := s.show()
				s.order.Host = "b"
				s.recover()
				assert.DeepEqual(t, s.show(), crashed)
				s.order.Now = s.order.Now.Add(staleAfter + time.Minute)
				s.as("b", func(r *Root) {
					entries, err := r.Entries(t.Context(), nil)
					assert.NilError(t, err)
					for name := range entries {
						assert.NilError(t, r.Settle(t.Context(), name))
					}
				})
				s.recover()
				s.check(before, true)
			}
		})
	}
}

// model is what a random history has put into the root.
type model struct {
	*scene
	random *rand.Rand
	serial int
	// contents that must be found somewhere.
	contents map[string]bool
}

// step does one random thing, or is killed in it.
func (m *model) step(ctx context.Context, r *Root) (what string, err error) {
	names := []string{"a", "b", "c"}
	name, to := names[m.random.IntN(3)], names[m.random.IntN(3)]
	switch m.random.IntN(11) {
	case 0, 1:
		_, err = r.Create(ctx, name, options.Spec{})
		return "create " + name, err
	case 2:
		_, err = r.Create(ctx, to, options.Spec{From: &options.Source{Volume: name}})
		return "clone " + name + " to " + to, err
	case 3:
		_, err = r.Create(ctx, to, options.Spec{Engine: "other", From: &options.Source{Volume: name}})
		return "copy " + name + " to " + to, err
	case 4, 5:
		_, err = r.CreateSnapshot(ctx, name, SnapshotOptions{}, nil)
		return "snapshot " + name, err
	case 6, 7:
		list, err := r.Snapshots(ctx, name)
		if err != nil || len(list) == 0 {
			return "no snapshots", err
		}
		snap := list[m.random.IntN(len(list))].Name
		_, err = r.Rollback(ctx, name, snap, nil)
		return "rollback " + name + " to " + snap, err
	case 8:
		_, err = r.Rename(ctx, name, to)
		return "rename " + name + " to " + to, err
	case 9:
		return "remove " + name, r.Remove(ctx, name)
	}
	_, err = r.RestoreTrash(ctx, name, to)
	return "restore " + name + " as " + to, err
}

// Two hundred kills at random steps of a random history lose nothing.
func TestRandomKills(t *testing.T) {
	memory := mounttest.Tmpfs(t, 256<<20)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	m := &model{scene: newScene(t, memory, "create"), random: rand.New(rand.NewPCG(seed, 1)), contents: map[string]bool{"v1": true, "v2": true, "mine": true}}
	kills := 200
	if testing.Short() {
		kills = 40
	}
	for killed := 0; killed < kills; {
		m.order.Now = m.order.Now.Add(time.Second)
		// In a child that dies by a signal, with the same dice as this process.
		die := m.random.IntN(35)
		var what string
		died := m.fork(die, &what)
		if died {
			killed++
			m.recover()
		}
		lines := m.show()
		for content := range m.contents {
			assert.Assert(t, slices.ContainsFunc(lines, func(line string) bool { return strings.HasSuffix(line, " "+content) }),
				"after %q, killed %v, %s is lost: %v", what, died, content, lines)
		}
		for _, line := range lines {
			assert.Assert(t, !strings.Contains(line, "MISSING") && !strings.HasPrefix(line, "loose"), "after %q: %s", what, line)
		}
		assert.DeepEqual(t, m.trees(), []string(nil))
		m.age(lines)
	}
}

// age keeps the root small and its contents new.
func (m *model) age(lines []string) {
	m.as("a", func(r *Root) {
		for _, name := range []string{"a", "b", "c"} {
			if rec, err := r.Record(name); err == nil && rec.Phase == Ready && m.content(m.path(name)) == "-" {
				m.serial++
				content := fmt.Sprintf("content%d", m.serial)
				m.write(name+"/page", content)
				m.contents[content] = true
			}
		}
		if len(lines) < 25 {
			return
		}
		for _, entry := range first(r.Trash(m.t.Context())) {
			if m.random.IntN(2) == 0 {
				_, err := r.PurgeTrash(m.t.Context(), entry.ID)
				assert.NilError(m.t, err)
			}
		}
		for _, entry := range first(r.Snapshots(m.t.Context(), "")) {
			if m.random.IntN(2) == 0 {
				assert.NilError(m.t, r.RemoveSnapshot(m.t.Context(), entry.Volume, entry.Name))
			}
		}
	})
	if len(lines) < 25 {
		return
	}
	m.contents = map[string]bool{}
	for _, line := range m.show() {
		fields := strings.Fields(line)
		if last := fields[len(fields)-1]; last != "-" {
			m.contents[last] = true
		}
	}
}

func first[T any](v T, _ error) T { return v }

// fork takes one random step in another process that kills itself at step die.
func (m *model) fork(die int, what *string) (died bool) {
	m.t.Helper()
	seed := m.random.Uint64()
	file := filepath.Join(m.t.TempDir(), "what")
	m.order.Op, m.order.Die, m.order.Seed, m.order.Note = "random", die, seed, file
	died = m.order.run(m.t)
	note, _ := os.ReadFile(file)
	*what = string(note)
	return died
}

// randomStep is the operation "random".
func (o order) randomStep() error {
	m := &model{random: rand.New(rand.NewPCG(o.Seed, 2))}
	steps := 0
	return o.with(func(step, volume string) error {
		if steps == o.Die {
			if err := os.WriteFile(o.Note, []byte(step+" "+volume), 0o600); err != nil {
				return err
			}
			return errors.Join(syscall.Kill(os.Getpid(), syscall.SIGKILL), errors.New("still alive"))
		}
		steps++
		return nil
	}, func(r *Root) error {
		what, err := m.step(context.Background(), r)
		if err != nil && !errdefs.IsConflict(err) && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			return fmt.Errorf("%s: %w", what, err)
		}
		return os.WriteFile(o.Note, []byte(what), 0o600)
	})
}
