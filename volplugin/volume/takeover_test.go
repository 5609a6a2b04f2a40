package volume

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/assert/cmp"

	"github.com/berth-plugin/berth/volplugin/engine/copying"
	"github.com/berth-plugin/berth/volplugin/engine/treeengine"
	"github.com/berth-plugin/berth/volplugin/options"
)

// errDied stands for the end of a host: what it has begun stays as it is.
var errDied = errors.New("died")

// location gives a host's view of a root.
func location(path, host string) Location {
	return Location{Path: path, Engines: Engines{treeengine.New(copying.Dir())}, Host: host, Now: time.Now}
}

func openRoot(t *testing.T, l Location) *Root {
	t.Helper()
	root, err := l.Open("")
	if errors.Is(err, ErrFresh) {
		root, err = l.Init(t.Context(), "")
	}
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, root.Close()) })
	return root
}

// halfCreated leaves a record of a host that died while it created the volume.
func halfCreated(t *testing.T, root *Root, name string) {
	t.Helper()
	rec := newRecord(name, root.Host, options.Spec{}, false, time.Now())
	rec.Engine = "dir"
	data, err := rec.Encode()
	assert.NilError(t, err)
	assert.NilError(t, root.makeFile(t.Context(), root.volumes, name+suffix, data))
	assert.NilError(t, root.top.Mkdir(name, 0o700))
}

// halfRemoved leaves a volume of a host that died before it moved the data.
func halfRemoved(t *testing.T, root *Root, name string) {
	t.Helper()
	_, err := root.Create(t.Context(), name, options.Spec{})
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(filepath.Join(root.Path, name, "f"), []byte("x"), 0o600))
	dying := openRoot(t, root.Location)
	dying.Step = func(step, _ string) error {
		if step == "remove.move" {
			panic(errDied) // a dead host does not undo either
		}
		return nil
	}
	defer func() { assert.Equal(t, recover(), any(errDied)) }()
	_ = dying.Remove(t.Context(), name) // panics
}

func age(t *testing.T, path string, d time.Duration) {
	t.Helper()
	old := time.Now().Add(-d)
	assert.NilError(t, os.Chtimes(path, old, old))
}

func TestAnotherHostsHalfWorkIsRespectedUntilItIsStale(t *testing.T) {
	path := t.TempDir()
	a, b := openRoot(t, location(path, "a")), openRoot(t, location(path, "b"))
	halfCreated(t, a, "made")
	halfRemoved(t, a, "gone")

	var wg sync.WaitGroup
	for _, name := range []string{"made", "gone"} {
		wg.Go(func() {
			start := time.Now()
			_, err := b.Create(t.Context(), name, options.Spec{})
			assert.Check(t, errdefs.IsConflict(err), "%v", err)
			assert.Check(t, cmp.ErrorContains(err, "host a is"))
			assert.Check(t, time.Since(start) < 2*patience)
		})
	}
	wg.Wait()
	for _, name := range []string{"made", "gone"} {
		assert.NilError(t, b.Settle(t.Context(), name))
		rec, err := b.Record(name)
		assert.NilError(t, err)
		assert.Equal(t, rec.Host, "a")
		age(t, filepath.Join(path, ".berth/volumes", name+".json"), staleAfter+time.Minute)
	}
	rec, err := b.Create(t.Context(), "made", options.Spec{})
	assert.NilError(t, err)
	assert.Assert(t, !rec.Adopted, "the dead host's directory was taken for a user's")
	old, err := b.Record("gone")
	assert.NilError(t, err)
	_, err = b.Create(t.Context(), "gone", options.Spec{})
	assert.NilError(t, err)
	_, err = os.Stat(filepath.Join(path, ".berth/trash", old.UUID, "f"))
	assert.NilError(t, err, "the removed data is not in the trash")
	entries, err := os.ReadDir(filepath.Join(path, "gone"))
	assert.NilError(t, err)
	assert.Equal(t, len(entries), 0)
}

func TestTheOwnHostsHalfWorkIsSettledAtOnce(t *testing.T) {
	path := t.TempDir()
	a := openRoot(t, location(path, "a"))
	halfCreated(t, a, "made")
	halfRemoved(t, a, "gone")
	for _, name := range []string{"made", "gone"} {
		assert.NilError(t, a.Settle(t.Context(), name))
		_, err := a.Record(name)
		assert.ErrorIs(t, err, ErrNoRecord)
		_, err = os.Stat(filepath.Join(path, name))
		assert.Assert(t, os.IsNotExist(err))
	}
}

// A directory of a half-made volume that somebody wrote to is nobody's to remove.
func TestUndoLeavesContentAlone(t *testing.T) {
	path := t.TempDir()
	a := openRoot(t, location(path, "a"))
	halfCreated(t, a, "made")
	assert.NilError(t, os.WriteFile(filepath.Join(path, "made", "f"), []byte("x"), 0o600))
	rec, err := a.Create(t.Context(), "made", options.Spec{})
	assert.NilError(t, err)
	assert.Assert(t, rec.Adopted)
	assert.Equal(t, rec.OnRemove, options.Keep)
	_, err = os.Stat(filepath.Join(path, "made", "f"))
	assert.NilError(t, err)
}

func TestExpireLeavesWhatItCannotRead(t *testing.T) {
	path := t.TempDir()
	a := openRoot(t, location(path, "a"))
	_, err := a.Create(t.Context(), "web", options.Spec{})
	assert.NilError(t, err)
	rec, err := a.Record("web")
	assert.NilError(t, err)
	assert.NilError(t, a.Remove(t.Context(), "web"))
	entry := filepath.Join(path, ".berth/trash", rec.UUID)
	assert.NilError(t, os.WriteFile(entry+".json", []byte("{"), 0o600))
	assert.NilError(t, os.Mkdir(filepath.Join(path, ".berth/trash/by-hand"), 0o700))
	_, err = a.Expire(t.Context(), 0)
	assert.ErrorIs(t, err, ErrDamaged)
	for _, left := range []string{entry, filepath.Join(path, ".berth/trash/by-hand")} {
		_, err = os.Stat(left)
		assert.NilError(t, err)
	}
}

func TestTempFilesOfEarlierProcessesAreSweptAtOnce(t *testing.T) {
	path := t.TempDir()
	a, b := openRoot(t, location(path, "a")), openRoot(t, location(path, "b"))
	earlier := tempPrefix(a.Host) + "0earlier.x"
	names := []string{a.tempName(), b.tempName(), earlier, tempPrefix(b.Host) + "0earlier.x"}
	for _, name := range names {
		assert.NilError(t, os.WriteFile(filepath.Join(path, ".berth/tmp", name), nil, 0o600))
	}
	_, err := a.Expire(t.Context(), TrashKeep)
	assert.NilError(t, err)
	for _, name := range names {
		_, err := os.Stat(filepath.Join(path, ".berth/tmp", name))
		assert.Equal(t, errors.Is(err, os.ErrNotExist), name == earlier, name)
	}
}

func TestTempFilesOfDeadHostsAreSwept(t *testing.T) {
	path := t.TempDir()
	a := openRoot(t, location(path, "a"))
	tmp := filepath.Join(path, ".berth/tmp")
	assert.NilError(t, os.WriteFile(filepath.Join(tmp, "file"), nil, 0o600))
	assert.NilError(t, os.MkdirAll(filepath.Join(tmp, "tree/sub"), 0o700))
	// What a copy has set does not count.
	age(t, filepath.Join(tmp, "file"), tempTreeKeep*2)
	age(t, filepath.Join(tmp, "tree"), tempTreeKeep*2)
	for _, tc := range []struct {
		after time.Duration
		left  []string
	}{
		{tempKeep - time.Hour, []string{"file", "tree"}},
		{tempKeep + time.Hour, []string{"tree"}},
		{tempTreeKeep - time.Hour, []string{"tree"}},
		{tempTreeKeep + time.Hour, nil},
	} {
		a.Now = func() time.Time { return time.Now().Add(tc.after) }
		_, err := a.Expire(t.Context(), TrashKeep)
		assert.NilError(t, err)
		entries, err := os.ReadDir(tmp)
		assert.NilError(t, err)
		var left []string
		for _, entry := range entries {
			left = append(left, entry.Name())
		}
		assert.DeepEqual(t, left, tc.left)
	}
}
