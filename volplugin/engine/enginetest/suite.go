// Package enginetest holds the conformance suite of volume engines: what the
// contract in package engine says, as tests that every engine passes.
package enginetest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// An Option fits the suite to an engine.
type Option func(*suite)

// Template gives the volumes of the tests v's Size, FS, Sparse and NoCOW, for
// engines that cannot do without. 128 MiB are enough, with a file system that has
// files of 1 TiB (not ext4 with blocks of 1 KiB).
func Template(v engine.Volume) Option { return func(s *suite) { s.template = v } }

// Files says that the data of a volume is a regular file, at path. Without it the
// data is a directory of the volume's name in the root.
func Files(path func(p engine.Place, name string) string) Option {
	return func(s *suite) { s.files, s.data = true, path }
}

// Fixed says that this machine lets nobody resize what the engine keeps data in. A
// resize is to be refused, and all to be as before.
func Fixed() Option { return func(s *suite) { s.fixed = true } }

type suite struct {
	engine   engine.Engine
	newPlace func(testing.TB) engine.Place
	template engine.Volume
	fixed    bool
	files    bool
	data     func(p engine.Place, name string) string
}

// Run runs the suite. newPlace makes an empty place on a file system that the
// engine works on and where 256 MiB are free, as NewPlace does; the process needs
// a mount namespace of its own. What an engine says it cannot do, it has to refuse.
//
// Engines call Place.Before before each change: the suite kills and fails calls
// there.
func Run(t *testing.T, e engine.Engine, newPlace func(testing.TB) engine.Place, options ...Option) {
	s := &suite{engine: e, newPlace: newPlace, data: func(p engine.Place, name string) string {
		return filepath.Join(p.Root.Path(), name)
	}}
	for _, option := range options {
		option(s)
	}
	for name, test := range map[string]func(*bench){
		"data is made once, empty and open to all":         testCreate,
		"attributes are applied":                           testAttributes,
		"existing data is taken over":                      testAdopt,
		"abandon removes only what is empty":               testAbandon,
		"open never makes data":                            testOpenMissing,
		"attach and detach can be repeated":                testAttach,
		"data is found again when Local is lost":           testLocalLost,
		"retired data is whole and can be repeated":        testRetire,
		"retire replaces nothing in the trash":             testRetireTaken,
		"reinstated data is whole, and replaces nothing":   testReinstate,
		"rename moves the data and replaces nothing":       testRename,
		"links, files and mounts are no data":              testForeign,
		"destroy follows nothing out of the data":          testDestroy,
		"destroy deletes snapshots, but not their records": testDestroySnapshots,
		"usage tells what is used":                         testUsage,
		"a size is enforced or refused":                    testLimit,
		"a snapshot is the data":                           testSnapshot,
		"a nasty tree goes through all copies":             testNasty,
		"a snapshot exists once":                           testSnapshotTaken,
		"a snapshot is removed once and for all":           testSnapshotRemove,
		"a snapshot that is cancelled leaves nothing":      testSnapshotCancelled,
		"writes do not fail a snapshot":                    testSnapshotWhileWritten,
		"links that come and go lead nowhere":              testSwaps,
		"a clone is the data, and independent":             testClone,
		"a clone that is given up goes":                    testCloneAbandoned,
		"a rollback keeps what was":                        testRollback,
		"a rollback to what is missing changes nothing":    testRollbackMissing,
		"create survives kills and failures":               testCreateInterrupted,
		"retire, reinstate and rename survive kills":       testMovesInterrupted,
		"snapshot and its removal survive kills":           testSnapshotInterrupted,
		"clone survives kills and failures":                testCloneInterrupted,
		"rollback survives kills and failures":             testRollbackInterrupted,
		"abandon survives kills":                           testAbandonInterrupted,
		"volumes live side by side":                        testTogether,
		"destroy survives kills":                           testDestroyInterrupted,
		"what has changed is noticed":                      testCompare,
		"a probe says what the root can do":                testProbe,
	} {
		t.Run(name, func(t *testing.T) { test(s.bench(t)) })
	}
}

// NewPlace lays out the directories of a place in root, which has to be an
// absolute path, until the test ends.
func NewPlace(t testing.TB, root string) engine.Place {
	t.Helper()
	place, err := OpenPlace(root, t.TempDir())
	assert.NilError(t, err)
	t.Cleanup(func() {
		for _, dir := range []*rooted.Dir{place.Root, place.Images, place.Snapshots, place.Trash, place.Tmp} {
			_ = dir.Close()
		}
	})
	return place
}

// OpenPlace is NewPlace for processes that a test starts.
func OpenPlace(root, local string) (engine.Place, error) {
	place := engine.Place{Local: local}
	for path, dir := range map[string]**rooted.Dir{
		"": &place.Root, ".berth/images": &place.Images, ".berth/snapshots": &place.Snapshots, ".berth/trash": &place.Trash, ".berth/tmp": &place.Tmp,
	} {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(path, 0o700); err != nil {
			return engine.Place{}, err
		}
		var err error
		if *dir, err = rooted.Open(path); err != nil {
			return engine.Place{}, err
		}
	}
	return place, nil
}

// bench is one place for one test.
type bench struct {
	*suite
	t     *testing.T
	place engine.Place
	can   engine.Abilities
}

func (s *suite) bench(t *testing.T) *bench {
	t.Helper()
	b := &bench{suite: s, t: t, place: s.newPlace(t)}
	var err error
	b.can, err = s.engine.Probe(t.Context(), b.place)
	assert.NilError(t, err)
	return b
}

// volume makes a description of a volume that is not there yet.
func (b *bench) volume(name string) engine.Volume {
	v := b.template
	v.Name, v.UUID = name, uuid.NewString()
	return v
}

// create makes data for a name that must be free, and attaches it.
func (b *bench) create(name string) engine.Volume {
	b.t.Helper()
	v := b.volume(name)
	created, err := b.engine.Create(b.t.Context(), b.place, v, engine.Attributes{})
	assert.NilError(b.t, err)
	assert.Assert(b.t, created)
	b.attach(v)
	return v
}

// attach attaches a volume until the test ends.
func (b *bench) attach(v engine.Volume) {
	b.t.Helper()
	place := b.place
	place.Step = nil
	assert.NilError(b.t, b.engine.Attach(b.t.Context(), place, v))
	b.t.Cleanup(func() {
		if err := b.engine.Detach(context.Background(), place, v); err != nil && !errors.Is(err, fs.ErrNotExist) {
			b.t.Errorf("detach %s: %v", v.Name, err)
		}
	})
}

func (b *bench) detach(v engine.Volume) {
	b.t.Helper()
	assert.NilError(b.t, b.engine.Detach(b.t.Context(), b.place, v))
}

// procPath leads to a directory, for this process and those that it starts.
func procPath(dir *rooted.Dir) string {
	return fmt.Sprintf("/proc/%d/fd/%d/.", os.Getpid(), dir.FD())
}

// within opens the data and gives its path, valid while the function runs.
func (b *bench) within(v engine.Volume, use func(path string)) {
	b.t.Helper()
	data, err := b.engine.Open(b.place, v)
	assert.NilError(b.t, err)
	defer data.Close()
	use(procPath(data))
}

// withinSnapshot is within for a snapshot.
func (b *bench) withinSnapshot(v engine.Volume, snap string, use func(path string)) {
	b.t.Helper()
	data, err := b.engine.OpenSnapshot(b.t.Context(), b.place, v, snap)
	assert.NilError(b.t, err)
	defer func() { assert.NilError(b.t, b.engine.CloseSnapshot(context.Background(), b.place, v, snap)) }()
	defer data.Close()
	use(procPath(data))
}

// write puts a file into a volume the way a container does.
func (b *bench) write(v engine.Volume, file, content string) {
	b.t.Helper()
	b.within(v, func(path string) {
		assert.NilError(b.t, os.WriteFile(filepath.Join(path, file), []byte(content), 0o600))
	})
}

func (b *bench) read(v engine.Volume, file string) (content string) {
	b.t.Helper()
	b.within(v, func(path string) {
		data, err := os.ReadFile(filepath.Join(path, file))
		assert.NilError(b.t, err)
		content = string(data)
	})
	return content
}

func (b *bench) readSnapshot(v engine.Volume, snap, file string) (content string) {
	b.t.Helper()
	b.withinSnapshot(v, snap, func(path string) {
		data, err := os.ReadFile(filepath.Join(path, file))
		assert.NilError(b.t, err)
		content = string(data)
	})
	return content
}

func (b *bench) found(name string) bool {
	b.t.Helper()
	found, err := b.engine.Find(b.place, name)
	assert.NilError(b.t, err)
	return found
}

func (b *bench) stat(v engine.Volume) (st unix.Stat_t) {
	b.t.Helper()
	b.within(v, func(path string) { assert.NilError(b.t, unix.Stat(path, &st)) })
	return st
}

func (b *bench) snapshot(v engine.Volume, snap string) engine.Copy {
	b.t.Helper()
	done, err := b.engine.Snapshot(b.t.Context(), b.place, v, snap, nil)
	assert.NilError(b.t, err)
	return done
}

// hasSnapshot tells whether a snapshot can be opened.
func (b *bench) hasSnapshot(v engine.Volume, snap string) bool {
	b.t.Helper()
	data, err := b.engine.OpenSnapshot(b.t.Context(), b.place, v, snap)
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	assert.NilError(b.t, err)
	_ = data.Close()
	assert.NilError(b.t, b.engine.CloseSnapshot(b.t.Context(), b.place, v, snap))
	return true
}

// clean checks that nothing is on its way any more.
func (b *bench) clean() {
	b.t.Helper()
	names, err := b.place.Tmp.Names()
	assert.NilError(b.t, err)
	assert.Equal(b.t, len(names), 0, "left in tmp: %v", names)
}
