package volume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/engine/btrfs"
	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/filesystem"
	"github.com/berth-plugin/berth/volplugin/internal/mounttest"
	"github.com/berth-plugin/berth/volplugin/options"
)

// victimEnv carries an order to a process of this test that is to be killed.
const victimEnv = "BERTH_TEST_VICTIM"

func TestMain(m *testing.M) {
	if filesystem.Watchdog() {
		return
	}
	if os.Getenv(victimEnv) != "" {
		os.Exit(victim())
	}
	os.Exit(mounttest.Main(m))
}

// other is the same engine under another name, so that clones between the two are
// copies, and with snapshots that are said to be instant.
type other struct{ engine.Engine }

func (other) Name() string { return "other" }

func (o other) Probe(ctx context.Context, p engine.Place) (engine.Abilities, error) {
	able, err := o.Engine.Probe(ctx, p)
	able.Instant = true
	return able, err
}

// named gives an engine another name.
type named struct {
	engine.Engine
	name string
}

func (n named) Name() string { return n.name }

// engines of a root; on btrfs the one that is called dir is btrfs's.
func (o order) engines() Engines {
	if o.Btrfs {
		return Engines{named{treeengine.New(btrfs.Trees{}), "dir"}, other{treeengine.New(copying.Dir())}}
	}
	return Engines{treeengine.New(copying.Dir()), other{treeengine.New(copying.Dir())}}
}

// order is one operation and the step, counted from 0, before which the process kills
// itself.
type order struct {
	Root, Host, Op string
	Die            int
	Now            time.Time
	Btrfs          bool
	// Seed and Note are for the operation random: the dice, and the file that tells
	// what was done.
	Seed uint64
	Note string
}

func victim() int {
	var o order
	err := json.Unmarshal([]byte(os.Getenv(victimEnv)), &o)
	if err == nil {
		err = o.obey(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// obey carries the order out in this process.
func (o order) obey(ctx context.Context) error {
	if o.Op == "random" {
		return o.randomStep()
	}
	steps := 0
	return o.with(func(string, string) error {
		if steps == o.Die {
			return errors.Join(syscall.Kill(os.Getpid(), syscall.SIGKILL), errors.New("still alive"))
		}
		steps++
		return nil
	}, func(r *Root) error { return operations()[o.Op].do(ctx, r) })
}

func (o order) with(step func(string, string) error, fn func(*Root) error) error {
	l := Location{Path: o.Root, Engines: o.engines(), Host: o.Host, Now: func() time.Time { return o.Now }, Step: step}
	r, err := l.Open("")
	if err != nil {
		return err
	}
	return errors.Join(fn(r), r.Close())
}

// run starts a victim and tells whether it was killed before it ended.
func (o order) run(t testing.TB) (killed bool) {
	t.Helper()
	content, err := json.Marshal(o)
	assert.NilError(t, err)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), victimEnv+"="+string(content))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return true
	}
	assert.NilError(t, err, "%s: %s", o.Op, out)
	return false
}

// A scene is a root with a volume web, its snapshot old, and more for some operations.
type scene struct {
	t     testing.TB
	order order
}

func newScene(t testing.TB, memory, op string) *scene {
	t.Helper()
	root, err := os.MkdirTemp(memory, "root") //nolint:usetesting // on the file system that the caller wants
	assert.NilError(t, err)
	t.Cleanup(func() {
		if err := os.RemoveAll(root); err != nil && !errors.Is(err, unix.EROFS) { // sealed subvolumes
			t.Error(err)
		}
	})
	var st unix.Statfs_t
	assert.NilError(t, unix.Statfs(root, &st))
	s := &scene{t: t, order: order{Root: root, Btrfs: st.Type == unix.BTRFS_SUPER_MAGIC, Host: "a", Op: op, Now: time.Now().Truncate(time.Second)}}
	l := Location{Path: s.order.Root, Engines: s.order.engines(), Host: "a", Now: time.Now}
	r, err := l.Init(t.Context(), "")
	assert.NilError(t, err)
	assert.NilError(t, r.Close())
	s.as("a", func(r *Root) {
		s.create(r, "web", "v1")
		s.create(r, "bystander", "mine")
		_, err := r.CreateSnapshot(t.Context(), "web", SnapshotOptions{Name: "old"}, nil)
		assert.NilError(t, err)
		s.write("web/page", "v2")
		if set := operations()[op].set; set != nil {
			set(s, r)
		}
	})
	return s
}

// as works on the root as a host, in this process.
func (s *scene) as(host string, fn func(*Root)) {
	s.t.Helper()
	o := s.order
	o.Host = host
	assert.NilError(s.t, o.with(nil, func(r *Root) error {
		fn(r)
		return nil
	}))
}

func (s *scene) create(r *Root, name, content string) {
	s.t.Helper()
	_, err := r.Create(s.t.Context(), name, options.Spec{})
	assert.NilError(s.t, err)
	s.write(name+"/page", content)
}

func (s *scene) write(path, content string) {
	s.t.Helper()
	assert.NilError(s.t, os.WriteFile(filepath.Join(s.order.Root, path), []byte(content), 0o600))
}

func (s *scene) path(elements ...string) string {
	return filepath.Join(append([]string{s.order.Root}, elements...)...)
}

// content is that of the page in a directory, "-" for an empty one.
func (s *scene) content(dir string) string {
	s.t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "page"))
	if errors.Is(err, os.ErrNotExist) {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			return "MISSING"
		}
		assert.NilError(s.t, err)
		if len(entries) == 0 {
			return "-"
		}
		return fmt.Sprint(entries)
	}
	assert.NilError(s.t, err)
	return string(data)
}

// show describes all that is in the root, and fails where a record has no data or data
// no record. What was kept or not yet adopted is "loose".
func (s *scene) show() []string {
	t := s.t
	t.Helper()
	lines := []string{}
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	s.as("a", func(r *Root) {
		entries, err := r.Entries(t.Context(), nil)
		assert.NilError(t, err)
		ids, names := map[string]string{}, map[string]bool{}
		for _, name := range slices.Sorted(maps.Keys(entries)) {
			entry := entries[name]
			rec := entry.Record
			assert.NilError(t, entry.Err, name)
			if rec.Phase != Renaming && entries[ids[rec.UUID]].Record.Phase != Renaming {
				assert.Equal(t, ids[rec.UUID], "", "two records of one UUID")
			}
			ids[rec.UUID], names[name] = name, true
			data := s.content(s.path(name))
			add("volume %s %s %s", name, rec.Phase, data)
			if rec.Phase == Ready {
				assert.Assert(t, data != "MISSING", "volume %s is ready without data", name)
			}
		}
		tops, err := os.ReadDir(s.order.Root)
		assert.NilError(t, err)
		for _, top := range tops {
			if top.Name() != metaName && !names[top.Name()] {
				add("loose %s %s", top.Name(), s.content(s.path(top.Name())))
			}
		}
		trash, err := os.ReadDir(s.path(metaName, trashName))
		assert.NilError(t, err)
		for _, entry := range trash {
			id, isRecord := strings.CutSuffix(entry.Name(), suffix)
			if !isRecord {
				_, err := os.Stat(s.path(metaName, trashName, id+suffix))
				assert.NilError(t, err, "data in the trash without a record")
				continue
			}
			rec, err := r.trashRecord(id)
			assert.NilError(t, err)
			add("trash %s %s", rec.Name, s.content(s.path(metaName, trashName, id)))
			ids[id] = "trash:" + rec.Name
		}
		owners, err := os.ReadDir(s.path(metaName, snapsName))
		assert.NilError(t, err)
		for _, owner := range owners {
			dir := s.path(metaName, snapsName, owner.Name())
			files, err := os.ReadDir(dir)
			assert.NilError(t, err)
			name := ids[owner.Name()]
			if tomb, err := os.ReadFile(filepath.Join(dir, tombName)); err == nil {
				rec, err := decode(tomb)
				assert.NilError(t, err)
				if name == "" {
					name = "kept:" + rec.Name
				}
			}
			if len(files) > 0 {
				assert.Assert(t, name != "", "snapshots of no volume: %v", files)
			}
			for _, file := range files {
				snap, isRecord := strings.CutSuffix(file.Name(), suffix)
				switch {
				case file.Name() == tombName:
				case isRecord:
					rec, err := os.ReadFile(filepath.Join(dir, file.Name()))
					assert.NilError(t, err)
					decoded, err := DecodeSnapshot(owner.Name(), snap, rec)
					assert.NilError(t, err)
					add("snapshot %s@%s %s %s", name, snap, decoded.Phase, s.content(filepath.Join(dir, snap)))
				default:
					_, err := os.Stat(filepath.Join(dir, snap+suffix))
					assert.NilError(t, err, "snapshot %s without a record", snap)
				}
			}
		}
	})
	slices.Sort(lines)
	return lines
}

// recoverRoot does what a host does when it starts.
func recoverRoot(ctx context.Context, r *Root) error {
	entries, err := r.Entries(ctx, nil)
	if err != nil {
		return err
	}
	var errs []error
	for name, entry := range entries {
		if entry.Record.Unfinished(r.Host) {
			errs = append(errs, r.Settle(ctx, name))
		}
	}
	claims, err := r.Claims(ctx)
	errs = append(errs, err)
	for name, id := range claims {
		errs = append(errs, r.SettleClaim(ctx, name, id))
	}
	volumes, err := r.UnsettledSnapshots(ctx)
	errs = append(errs, err)
	for _, name := range volumes {
		errs = append(errs, r.SettleSnapshots(ctx, name))
	}
	return errors.Join(errs...)
}

func (s *scene) recover() {
	s.t.Helper()
	s.as(s.order.Host, func(r *Root) { assert.NilError(s.t, recoverRoot(s.t.Context(), r)) })
}

// normal hides the times in names.
func normal(lines []string) []string {
	out := []string{}
	for _, line := range lines {
		if i := strings.Index(line, "pre-rollback-"); i >= 0 {
			_, rest, _ := strings.Cut(line[i:], " ")
			line = line[:i] + "pre-rollback-TIME " + rest
		}
		out = append(out, line)
	}
	return out
}

// trees lists the directories that are left in tmp.
func (s *scene) trees() []string {
	entries, err := os.ReadDir(s.path(metaName, tmpName))
	assert.NilError(s.t, err)
	var names []string
	for _, entry := range entries {
		if entry.IsDir() {
			names = append(names, entry.Name())
		}
	}
	return names
}

// complete or absent: check looks at a root after a crash and recovery, and carries
// the operation out if it had not happened.
func (s *scene) check(before []string, killed bool) {
	t := s.t
	t.Helper()
	op := operations()[s.order.Op]
	now := normal(s.show())
	done := slices.Equal(now, op.after)
	if !slices.Equal(now, before) && !done && s.order.Op != "purge" {
		assert.DeepEqual(t, now, op.after)
	}
	assert.Assert(t, done || killed, "%v", now)
	if !done {
		s.as(s.order.Host, func(r *Root) { assert.NilError(t, op.do(t.Context(), r)) })
		assert.DeepEqual(t, normal(s.show()), op.after)
	}
	assert.DeepEqual(t, s.trees(), []string(nil))
}

func TestKilledAtAnyStep(t *testing.T) {
	memory := mounttest.Tmpfs(t, 64<<20)
	for _, name := range sortedOperations() {
		t.Run(name, func(t *testing.T) {
			for die := 0; ; die += stride() {
				s := newScene(t, memory, name)
				before := normal(s.show())
				s.order.Die = die
				killed := s.order.run(t)
				s.recover()
				s.check(before, killed)
				if !killed {
					assert.Assert(t, die >= 3, "only %d steps", die)
					break
				}
				assert.Assert(t, die < 200)
			}
		})
	}
}

// stride is how many steps are passed over to the next kill: none, or with -short a few
// at random, since each kill is a process of its own.
func stride() int {
	if testing.Short() {
		return 1 + rand.IntN(4)
	}
	return 1
}

// On btrfs data are subvolumes, snapshots are sealed, and rmdir is not enough.
func TestKilledOnBtrfs(t *testing.T) {
	disk := mounttest.Disk(t, "btrfs", 512<<20)
	for _, name := range sortedOperations() {
		t.Run(name, func(t *testing.T) {
			for die := 0; ; die += stride() + rand.IntN(3) {
				s := newScene(t, disk, name)
				before := normal(s.show())
				s.order.Die = die
				killed := s.order.run(t)
				s.recover()
				s.check(before, killed)
				if !killed {
					break
				}
			}
		})
	}
}

// An error, unlike a crash, is undone at once, or leaves what recovery completes.
func TestAnErrorAtAnyStep(t *testing.T) {
	memory := mounttest.Tmpfs(t, 64<<20)
	for _, name := range sortedOperations() {
		t.Run(name, func(t *testing.T) {
			failures := []error{unix.EIO, unix.ENOSPC, context.Canceled}
			for fail := 0; ; fail++ {
				s := newScene(t, memory, name)
				before := normal(s.show())
				steps := 0
				err := s.order.with(func(string, string) error {
					steps++
					if steps == fail+1 {
						return failures[fail%len(failures)]
					}
					return nil
				}, func(r *Root) error { return operations()[name].do(t.Context(), r) })
				if steps <= fail {
					assert.NilError(t, err)
					break
				}
				s.recover()
				s.check(before, err != nil)
			}
		})
	}
}
