package vmlab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/devmapper"
	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/enginetest"
	"github.com/berth-plugin/berth/volplugin/engine/thin"
)

// childName is what this program is called when it is to work until it is killed.
const childName = "berth-thin-child"

func init() { //nolint:gochecknoinits // before TestMain, which knows nothing of it
	if os.Args[0] == childName {
		err := thinChild(os.Args[1], os.Args[2], os.Args[3], os.Args[4])
		fmt.Fprintln(os.Stderr, "thin child:", err)
		os.Exit(1)
	}
}

// thinChild plays stories, one after the other, and writes each step down before and
// after it. It kills itself at the engine's step that killAt names, or, for a number
// and a time, as in "7 300µs", that long after its step of this number.
func thinChild(root, local, kind, killAt string) error {
	e, err := thin.New(thinSettings())
	if err != nil {
		return err
	}
	p, err := enginetest.OpenPlace(root, local)
	if err != nil {
		return err
	}
	number, later, timed := strings.Cut(killAt, " ")
	var delay time.Duration
	if timed {
		if delay, err = time.ParseDuration(later); err != nil {
			return err
		}
	}
	kill := func() { _ = unix.Kill(os.Getpid(), unix.SIGKILL) }
	steps := 0
	p.Step = func(step string) error {
		steps++
		switch {
		case step == killAt:
			kill()
		case timed && strconv.Itoa(steps) == number:
			time.AfterFunc(delay, kill)
		}
		return nil
	}
	for n := 0; ; n++ {
		s := newStory(e, p, kind, n)
		for i, step := range s.steps() {
			fmt.Printf("begin %d %d\n", n, i)
			if err := step.do(context.Background()); err != nil {
				return fmt.Errorf("story %d, %s: %w", n, step.name, err)
			}
			fmt.Printf("end %d %d\n", n, i)
		}
	}
}

func thinSettings() thin.Settings { return thin.Settings{DataSize: 3 << 30, Sparse: true} }

// A story is what is done with one volume and its clone, from the first to the last.
type story struct {
	e        *thin.Engine
	p        engine.Place
	v, clone engine.Volume
}

func newStory(e *thin.Engine, p engine.Place, kind string, n int) *story {
	id := func(what string) string {
		return uuid.NewSHA1(uuid.NameSpaceOID, []byte(what+strconv.Itoa(n))).String()
	}
	return &story{
		e: e, p: p,
		v:     engine.Volume{Name: fmt.Sprintf("v%d", n), UUID: id("v"), Size: 300 << 20, FS: kind},
		clone: engine.Volume{Name: fmt.Sprintf("c%d", n), UUID: id("c"), FS: kind},
	}
}

// storyStep does one thing. After a kill again does what is needed for do to be made
// once more; nil is nothing, since do can be repeated.
type storyStep struct {
	name  string
	do    func(ctx context.Context) error
	again func(ctx context.Context) error
}

func (s *story) steps() []storyStep {
	e, p, v := s.e, s.p, s.v
	gone := func(err error) error {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	return []storyStep{
		{"create", func(ctx context.Context) error {
			created, err := e.Create(ctx, p, v, engine.Attributes{})
			if err == nil && !created {
				return errors.New("it was there")
			}
			return err
		}, func(context.Context) error { return e.Abandon(p, v) }},
		{"attach", func(ctx context.Context) error { return e.Attach(ctx, p, v) }, nil},
		{"write", func(context.Context) error { return s.write(v, "one") }, nil},
		{"snapshot", func(ctx context.Context) error {
			_, err := e.Snapshot(ctx, p, v, "s", nil)
			return err
		}, func(ctx context.Context) error {
			// Complete or absent: what can be opened has the content.
			if err := s.checkSnapshot(ctx, "s", "one"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return e.RemoveSnapshot(ctx, p, v, "s")
		}},
		{"write again", func(context.Context) error { return s.write(v, "two") }, nil},
		{"check", func(ctx context.Context) error { return s.checkSnapshot(ctx, "s", "one") }, nil},
		{"clone", func(ctx context.Context) error {
			_, err := e.Clone(ctx, p, v, "s", s.clone, nil)
			return err
		}, nil},
		{"attach clone", func(ctx context.Context) error { return e.Attach(ctx, p, s.clone) }, nil},
		{"check clone", func(context.Context) error { return s.check(s.clone, "one") }, nil},
		{"detach clone", func(ctx context.Context) error { return e.Detach(ctx, p, s.clone) }, nil},
		{"rollback", func(ctx context.Context) error {
			_, err := e.Rollback(ctx, p, v, "s", "kept", nil)
			return err
		}, nil},
		{"check rollback", func(context.Context) error { return s.check(v, "one") }, nil},
		{"check kept", func(ctx context.Context) error { return s.checkSnapshot(ctx, "kept", "two") }, nil},
		{"resize", func(ctx context.Context) error { return e.Resize(ctx, p, v, 400<<20) }, nil},
		{"detach", func(ctx context.Context) error { return e.Detach(ctx, p, v) }, nil},
		{"retire", func(ctx context.Context) error { return e.Retire(ctx, p, v) }, nil},
		{"reinstate", func(ctx context.Context) error { return e.Reinstate(ctx, p, v) }, nil},
		{"retire again", func(ctx context.Context) error { return e.Retire(ctx, p, v) }, nil},
		{"destroy", func(ctx context.Context) error { return e.Destroy(ctx, p, v) }, nil},
		{"rename clone", func(ctx context.Context) error {
			moved := s.clone
			moved.Name += "-moved"
			found, err := e.Find(p, moved.Name)
			if err != nil || found {
				return err
			}
			return gone(e.Rename(ctx, p, s.clone, moved.Name))
		}, nil},
		{"destroy clone", func(ctx context.Context) error {
			moved := s.clone
			moved.Name += "-moved"
			return errors.Join(e.Retire(ctx, p, moved), e.Destroy(ctx, p, moved))
		}, nil},
	}
}

func (s *story) write(v engine.Volume, content string) error {
	data, err := s.e.Open(s.p, v)
	if err != nil {
		return err
	}
	defer data.Close()
	f, err := os.Create(filepath.Join(data.ProcPath(), "f"))
	if err != nil {
		return err
	}
	_, err = f.WriteString(content + strings.Repeat("x", 1<<20))
	return errors.Join(err, f.Sync(), f.Close())
}

func (s *story) check(v engine.Volume, content string) error {
	data, err := s.e.Open(s.p, v)
	if err != nil {
		return err
	}
	defer data.Close()
	return checkContent(data.ProcPath(), content)
}

func checkContent(dir, content string) error {
	got, err := os.ReadFile(filepath.Join(dir, "f"))
	if err == nil && string(got) != content+strings.Repeat("x", 1<<20) {
		err = fmt.Errorf("%d bytes %.10q, want %q", len(got), got, content)
	}
	if err != nil {
		return fmt.Errorf("content: %s", err) //nolint:errorlint // not to be taken for a missing volume
	}
	return nil
}

func (s *story) checkSnapshot(ctx context.Context, snap, content string) error {
	data, err := s.e.OpenSnapshot(ctx, s.p, s.v, snap)
	if err != nil {
		return err
	}
	err = checkContent(data.ProcPath(), content)
	return errors.Join(err, data.Close(), s.e.CloseSnapshot(ctx, s.p, s.v, snap))
}

// killed is what a child had done when it was killed.
type killed struct{ story, step int }

// killChild runs a child until it kills itself, and tells what it was doing. private
// gives it a mount namespace, as a plugin has.
func killChild(t testing.TB, root, local, kind, killAt string, private bool) killed {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Args = []string{childName, root, local, kind, killAt}
	if private {
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	}
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	k := killed{story: -1}
	scanner := bufio.NewScanner(out)
	for scanner.Scan() {
		var word string
		if _, err := fmt.Sscan(scanner.Text(), &word, &k.story, &k.step); err == nil && word == "end" {
			k.step++
		}
	}
	_ = cmd.Wait()
	assert.Equal(t, said.String(), "", "the child failed")
	return k
}

// goOn plays a killed child's story to its end, in a new engine, as the next process
// does.
func goOn(t testing.TB, root, local, kind string, k killed) {
	t.Helper()
	e := newThinWith(t, thinSettings())
	assert.NilError(t, e.Recover(t.Context()))
	if k.story < 0 {
		return
	}
	p := thinPlace(t, root, local)
	s := newStory(e, p, kind, k.story)
	// The file systems may not be mounted here any more.
	for _, v := range []engine.Volume{s.v, s.clone} {
		if found, err := e.Find(p, v.Name); err == nil && found && k.step > 1 && (v.Name == s.v.Name || k.step > 7) {
			assert.NilError(t, e.Attach(t.Context(), p, v), "attach %s at step %d", v.Name, k.step)
		}
	}
	for i, step := range s.steps() {
		if i < k.step {
			continue
		}
		if i == k.step && step.again != nil {
			assert.NilError(t, step.again(t.Context()), "make good %q", step.name)
		}
		assert.NilError(t, step.do(t.Context()), "story %d, %s, killed in step %d", k.story, step.name, k.step)
		if step.name == "detach" { // attached above for the check
			assert.NilError(t, e.Detach(t.Context(), p, s.clone))
		}
	}
}

func thinPlace(t testing.TB, root, local string) engine.Place {
	t.Helper()
	p, err := enginetest.OpenPlace(root, local)
	assert.NilError(t, err)
	return p
}

func newThinWith(t testing.TB, s thin.Settings) *thin.Engine {
	t.Helper()
	e, err := thin.New(s)
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, e.Close()) })
	return e
}

// nothingLeft checks that a root's pool holds nothing, by all accounts. What is in
// tmp goes after a day, as an engine may expect.
func nothingLeft(t testing.TB, e *thin.Engine, p engine.Place, before engine.Pool) {
	t.Helper()
	state, err := e.Pool(t.Context(), p)
	assert.NilError(t, err)
	assert.Equal(t, state.DataUsed, before.DataUsed)
	for _, dir := range []string{".berth/thin/volumes", ".berth/thin/devices", ".berth/trash", ".berth/snapshots"} {
		entries, err := os.ReadDir(filepath.Join(p.Root.Path(), dir))
		assert.NilError(t, err)
		assert.Equal(t, len(entries), 0, "%s: %v", dir, entries)
	}
	noThinDevices(t)
}

// TestThinKilled kills a process of Berth at random points of what it does with
// volumes, and finds each thing complete or absent.
func TestThinKilled(t *testing.T) {
	onlyFull(t)
	InGuest(t, Options{Modules: thinModules(), Timeout: 40 * time.Minute}, func(t *testing.T) {
		for _, kind := range []string{"ext4", "xfs", "btrfs"} {
			t.Run(kind, func(t *testing.T) { thinKilled(t, kind) })
		}
		t.Run("in the middle of a snapshot", thinKilledSuspended)
	})
}

func thinKilled(t *testing.T, kind string) {
	root := t.TempDir()
	e := newThinWith(t, thinSettings())
	p := thinPlace(t, root, t.TempDir())
	// The pool, so that there is something to compare with.
	v := engine.Volume{Name: "first", UUID: uuid.NewString(), Size: 300 << 20, FS: kind}
	_, err := e.Create(t.Context(), p, v, engine.Attributes{})
	assert.NilError(t, err)
	assert.NilError(t, e.Abandon(p, v))
	before, err := e.Pool(t.Context(), p)
	assert.NilError(t, err)

	for round := range 8 {
		// A story has about 60 steps.
		killAt := fmt.Sprintf("%d %s", 1+rand.IntN(70), time.Duration(rand.Int64N(int64(100*time.Millisecond))))
		private := round%2 == 0
		local := t.TempDir()
		k := killChild(t, root, local, kind, killAt, private)
		t.Logf("round %d: killed at %s, in story %d, step %d", round, killAt, k.story, k.step)
		if private {
			local = t.TempDir()
		}
		goOn(t, root, local, kind, k)
	}
	// Whatever a killed process left is dealt with by the first look of the next.
	e = newThinWith(t, thinSettings())
	nothingLeft(t, e, p, before)
}

// thinKilledSuspended kills the process while the volume's device is suspended.
func thinKilledSuspended(t *testing.T) {
	root, local := t.TempDir(), t.TempDir()
	k := killChild(t, root, local, "ext4", "device.suspended", false)
	assert.DeepEqual(t, []int{k.story, k.step}, []int{0, 3})
	client, err := devmapper.Open(thin.DefaultNodes)
	assert.NilError(t, err)
	defer func() { _ = client.Close() }()
	suspended := func() (count int) {
		devices, err := client.List()
		assert.NilError(t, err)
		for name := range devices {
			dev, err := client.Find(name)
			assert.NilError(t, err)
			if dev.Suspended {
				count++
			}
		}
		return count
	}
	assert.Equal(t, suspended(), 1)
	e := newThinWith(t, thinSettings())
	assert.NilError(t, e.Recover(t.Context()))
	assert.Equal(t, suspended(), 0)
	goOn(t, root, local, "ext4", k)
}
