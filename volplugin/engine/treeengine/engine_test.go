package treeengine_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/engine/enginetest"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// victimEnv carries an order to a process of this test that is to be killed.
const victimEnv = "BERTH_TEST_VICTIM"

func TestMain(m *testing.M) {
	if os.Getenv(victimEnv) != "" {
		os.Exit(victim())
	}
	os.Exit(mounttest.Main(m))
}

// Package copying runs the suite on other file systems.
func TestConformance(t *testing.T) {
	enginetest.Run(t, treeengine.New(copying.Dir()), func(t testing.TB) engine.Place { return enginetest.NewPlace(t, newRoot(t)) })
}

// rootEnv names a directory in which to make the roots, on a share for one.
const rootEnv = "BERTH_TEST_TREES"

func newRoot(t testing.TB) string {
	t.Helper()
	base := os.Getenv(rootEnv)
	if base == "" {
		return t.TempDir()
	}
	root := filepath.Join(base, uuid.NewString())
	assert.NilError(t, os.Mkdir(root, 0o755))
	t.Cleanup(func() {
		top, err := rooted.Open(base)
		assert.NilError(t, err)
		defer top.Close()
		assert.NilError(t, top.RemoveTree(context.Background(), filepath.Base(root)))
	})
	return root
}

// A stage is a place with a volume web, whose file f was "x" in snapshot s and is "y".
type stage struct {
	t      *testing.T
	engine engine.Engine
	place  engine.Place
	web    engine.Volume
}

func newStage(t *testing.T) *stage {
	s := &stage{t: t, engine: treeengine.New(copying.Dir()), place: enginetest.NewPlace(t, newRoot(t))}
	s.web = engine.Volume{Name: "web", UUID: uuid.NewString()}
	_, err := s.engine.Create(t.Context(), s.place, s.web, engine.Attributes{})
	assert.NilError(t, err)
	s.write("x")
	_, err = s.engine.Snapshot(t.Context(), s.place, s.web, "s", nil)
	assert.NilError(t, err)
	s.write("y")
	return s
}

func (s *stage) path(names ...string) string {
	return filepath.Join(append([]string{s.place.Root.Path()}, names...)...)
}

func (s *stage) write(content string) {
	s.t.Helper()
	assert.NilError(s.t, os.WriteFile(s.path("web", "f"), []byte(content), 0o600))
}

func (s *stage) content(names ...string) string {
	s.t.Helper()
	data, err := os.ReadFile(s.path(names...))
	assert.NilError(s.t, err)
	return string(data)
}

func (s *stage) kept(snap string) string {
	return s.content(".berth", "snapshots", s.web.UUID, snap, "f")
}

func (s *stage) rollback() error {
	_, err := s.engine.Rollback(s.t.Context(), s.place, s.web, "s", "kept", nil)
	return err
}

var errKilled = errors.New("killed")

// kill makes a rollback that ends before the step.
func (s *stage) kill(step string) {
	s.t.Helper()
	dead := false
	s.place.Step = func(next string) error {
		if dead = dead || next == step; dead {
			return errKilled
		}
		return nil
	}
	assert.ErrorIs(s.t, s.rollback(), errKilled)
	s.place.Step = nil
}

func TestARollbackGoesOnWhenSomebodyHasCleanedTmp(t *testing.T) {
	s := newStage(t)
	s.kill("rollback.move")
	_, err := os.Stat(s.path("web"))
	assert.Assert(t, os.IsNotExist(err))
	names, err := s.place.Tmp.Names()
	assert.NilError(t, err)
	assert.DeepEqual(t, names, []string{s.web.UUID + ".rollback"})
	assert.NilError(t, s.place.Tmp.RemoveTree(t.Context(), names[0]))
	assert.NilError(t, s.rollback())
	assert.Equal(t, s.content("web", "f"), "x")
	assert.Equal(t, s.kept("kept"), "y")
}

// Between its moves a rollback's snapshots are all there is.
func TestNoSnapshotIsRemovedInTheMiddleOfARollback(t *testing.T) {
	s := newStage(t)
	s.kill("rollback.move")
	for _, snap := range []string{"s", "kept"} {
		err := s.engine.RemoveSnapshot(t.Context(), s.place, s.web, snap)
		assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	}
	assert.NilError(t, s.rollback())
	assert.Equal(t, s.content("web", "f"), "x")
	assert.NilError(t, s.engine.RemoveSnapshot(t.Context(), s.place, s.web, "kept"))
}

func TestARollbackReplacesNothingThatTookTheName(t *testing.T) {
	s := newStage(t)
	s.kill("rollback.move")
	assert.NilError(t, os.Mkdir(s.path("web"), 0o700))
	s.write("somebody else's")
	err := s.rollback()
	assert.Assert(t, errors.Is(err, fs.ErrExist), "%v", err)
	assert.Equal(t, s.content("web", "f"), "somebody else's")
	assert.Equal(t, s.kept("kept"), "y")
	assert.NilError(t, s.place.Root.Rename("web", s.place.Root, "theirs"))
	assert.NilError(t, s.rollback())
	assert.Equal(t, s.content("web", "f"), "x")
	assert.Equal(t, s.kept("kept"), "y")
}

func TestACopyOfAnotherRollbackIsNotTaken(t *testing.T) {
	s := newStage(t)
	s.kill("rollback.keep") // complete in Tmp, with the content of s
	s.write("z")
	_, err := s.engine.Snapshot(t.Context(), s.place, s.web, "other", nil)
	assert.NilError(t, err)
	_, err = s.engine.Rollback(t.Context(), s.place, s.web, "other", "kept", nil)
	assert.NilError(t, err)
	assert.Equal(t, s.content("web", "f"), "z")
}

// What does not fit leaves nothing behind, and the data as it was.
func TestAFullRoot(t *testing.T) {
	s := &stage{t: t, engine: treeengine.New(copying.Dir()), place: enginetest.NewPlace(t, mounttest.Disk(t, "ext4", 64<<20))}
	s.web = engine.Volume{Name: "web", UUID: uuid.NewString()}
	_, err := s.engine.Create(t.Context(), s.place, s.web, engine.Attributes{})
	assert.NilError(t, err)
	s.write("x")
	_, err = s.engine.Snapshot(t.Context(), s.place, s.web, "small", nil)
	assert.NilError(t, err)
	big := []byte(strings.Repeat("0123456789abcdef", 20<<20/16))
	assert.NilError(t, os.WriteFile(s.path("web", "big"), big, 0o600))
	_, err = s.engine.Snapshot(t.Context(), s.place, s.web, "s", nil)
	assert.NilError(t, err)
	free := func() uint64 {
		var st unix.Statfs_t
		assert.NilError(t, unix.Statfs(s.path(), &st))
		return st.Bfree
	}
	before := free()
	clone := engine.Volume{Name: "clone", UUID: uuid.NewString()}
	_, errSnapshot := s.engine.Snapshot(t.Context(), s.place, s.web, "more", nil)
	_, errClone := s.engine.Clone(t.Context(), s.place, s.web, "s", clone, nil)
	for _, err := range []error{errSnapshot, errClone, s.rollback()} {
		assert.ErrorIs(t, err, unix.ENOSPC)
	}
	names, err := s.place.Tmp.Names()
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0, "%v", names)
	assert.Assert(t, free()+16 >= before, "%d blocks were free, %d are", before, free())
	assert.Equal(t, len(s.content("web", "big")), len(big))
	_, err = os.Stat(s.path("clone"))
	assert.Assert(t, os.IsNotExist(err))
	// A smaller snapshot still fits.
	_, err = s.engine.Rollback(t.Context(), s.place, s.web, "small", "kept", nil)
	assert.NilError(t, err)
	assert.Equal(t, len(s.content(".berth", "snapshots", s.web.UUID, "kept", "big")), len(big))
}

// A mark says which directory the clone is. One that came into its place is not
// removed with it, nor taken for it.
func TestWhatTookAClonesPlaceIsLeftAlone(t *testing.T) {
	s := newStage(t)
	clone := engine.Volume{Name: "clone", UUID: uuid.NewString()}
	_, err := s.engine.Clone(t.Context(), s.place, s.web, "s", clone, nil)
	assert.NilError(t, err)
	assert.NilError(t, s.place.Root.Rename("clone", s.place.Root, "moved"))
	assert.NilError(t, os.Mkdir(s.path("clone"), 0o700))
	assert.NilError(t, os.WriteFile(s.path("clone", "f"), []byte("theirs"), 0o600))
	_, err = s.engine.Clone(t.Context(), s.place, s.web, "s", clone, nil)
	assert.Assert(t, errors.Is(err, fs.ErrExist), "%v", err)
	assert.NilError(t, s.engine.Abandon(s.place, clone))
	assert.Equal(t, s.content("clone", "f"), "theirs")
	assert.Equal(t, s.content("moved", "f"), "x")
	names, err := s.place.Tmp.Names()
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0, "%v", names)
}

func TestAMarkThatIsCutShortSaysNothing(t *testing.T) {
	for _, content := range []string{"", "{", `{"Tree":""}`, `[]`} {
		s := newStage(t)
		clone := engine.Volume{Name: "clone", UUID: uuid.NewString()}
		assert.NilError(t, s.place.Tmp.WriteNew(clone.UUID+".cloned", []byte(content), 0o600))
		assert.NilError(t, os.MkdirAll(s.path(".berth", "tmp", clone.UUID+".clone", "half"), 0o700))
		_, err := s.engine.Clone(t.Context(), s.place, s.web, "s", clone, nil)
		assert.NilError(t, err)
		assert.Equal(t, s.content("clone", "f"), "x")
		_, err = os.Stat(s.path("clone", "half"))
		assert.Assert(t, os.IsNotExist(err))
	}
}

// A kill in the middle of a copy leaves half of it in Tmp, which goes with what it was for.
func TestHalfACopyGoesWithItsSnapshotOrClone(t *testing.T) {
	s := newStage(t)
	clone := engine.Volume{Name: "clone", UUID: uuid.NewString()}
	for _, half := range []string{s.web.UUID + ".snapshot.half", s.web.UUID + ".removed.half", clone.UUID + ".clone"} {
		for _, name := range []string{half, half + ".making"} {
			assert.NilError(t, os.MkdirAll(s.path(".berth", "tmp", name, "some"), 0o700))
		}
	}
	assert.NilError(t, s.engine.RemoveSnapshot(t.Context(), s.place, s.web, "half"))
	assert.NilError(t, s.engine.Abandon(s.place, clone))
	names, err := s.place.Tmp.Names()
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0, "%v", names)
}

// An order is what a process of this test does over and over until it is killed.
type order struct {
	Root string
	UUID string
}

func victim() int {
	var o order
	if err := json.Unmarshal([]byte(os.Getenv(victimEnv)), &o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	place, err := enginetest.OpenPlace(o.Root, "")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	fmt.Println("begins")
	if err := o.obey(place); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// obey makes a snapshot, goes back to it, clones it, and removes it all.
func (o order) obey(p engine.Place) error {
	ctx := context.Background()
	e := treeengine.New(copying.Dir())
	web := engine.Volume{Name: "web", UUID: o.UUID}
	clone := engine.Volume{Name: "clone", UUID: o.UUID[:35] + "f"}
	for {
		_, errSnapshot := e.Snapshot(ctx, p, web, "s", nil)
		_, errRollback := e.Rollback(ctx, p, web, "s", "kept", nil)
		_, errClone := e.Clone(ctx, p, web, "kept", clone, nil)
		err := errors.Join(errSnapshot, errRollback, errClone, e.RemoveSnapshot(ctx, p, web, "s"), e.RemoveSnapshot(ctx, p, web, "kept"),
			e.Retire(ctx, p, clone), e.Destroy(ctx, p, clone))
		if err != nil {
			return err
		}
	}
}

// Whenever a process is killed, the data is whole or comes back whole, and all that it
// left can be removed.
func TestAKillAtAnyTime(t *testing.T) {
	s := newStage(t)
	assert.NilError(t, s.engine.RemoveSnapshot(t.Context(), s.place, s.web, "s"))
	const files = 50
	for i := range files {
		assert.NilError(t, os.WriteFile(s.path("web", fmt.Sprint(i)), []byte(strings.Repeat("y", 5000)), 0o600))
	}
	o := order{Root: s.place.Root.Path(), UUID: s.web.UUID}
	clone := engine.Volume{Name: "clone", UUID: o.UUID[:35] + "f"}
	content, err := json.Marshal(o)
	assert.NilError(t, err)
	whole := func(path ...string) {
		t.Helper()
		for i := range files {
			assert.Equal(t, len(s.content(append(path, fmt.Sprint(i))...)), 5000)
		}
		assert.Equal(t, s.content(append(path, "f")...), "y")
	}
	for round := range 40 {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
		cmd.Env = append(os.Environ(), victimEnv+"="+string(content))
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		var said strings.Builder
		cmd.Stderr = &said
		out, err := cmd.StdoutPipe()
		assert.NilError(t, err)
		assert.NilError(t, cmd.Start())
		_, err = out.Read(make([]byte, 1))
		assert.NilError(t, err)
		time.Sleep(time.Duration(round*round*37%50_000) * time.Microsecond)
		assert.NilError(t, cmd.Process.Kill())
		_ = cmd.Wait()
		assert.Equal(t, said.String(), "")

		ctx := t.Context()
		if _, err := os.Stat(s.path("web")); os.IsNotExist(err) {
			assert.NilError(t, s.rollback())
		}
		whole("web")
		for _, snap := range []string{"s", "kept"} {
			if dir, err := s.engine.OpenSnapshot(ctx, s.place, s.web, snap); err == nil {
				whole(".berth", "snapshots", s.web.UUID, snap)
				assert.NilError(t, dir.Close())
			}
			assert.NilError(t, s.engine.RemoveSnapshot(ctx, s.place, s.web, snap))
		}
		if found, err := s.engine.Find(s.place, "clone"); err == nil && found {
			whole("clone")
		}
		assert.NilError(t, s.engine.Abandon(s.place, clone))
		assert.NilError(t, s.engine.Retire(ctx, s.place, clone))
		assert.NilError(t, s.engine.Destroy(ctx, s.place, clone))
		names, err := s.place.Tmp.Names()
		assert.NilError(t, err)
		for _, name := range names { // of a rollback that had not begun to move
			assert.Assert(t, strings.HasPrefix(name, s.web.UUID+".rollback"), name)
		}
	}
	assert.NilError(t, s.engine.Retire(t.Context(), s.place, s.web))
	assert.NilError(t, s.engine.Destroy(t.Context(), s.place, s.web))
	names, err := s.place.Tmp.Names()
	assert.NilError(t, err)
	assert.Equal(t, len(names), 0, "%v", names)
}
