package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

func TestSnapshotReplacesWhatItCovers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	j, _, _ := read(t, path)
	put(t, j, "a", "b")
	s := j.Snapshot()
	put(t, j, "c")
	assert.NilError(t, s.Write(func(emit func([]byte) error) error {
		put(t, j, "d")
		return emit([]byte("ab"))
	}))
	put(t, j, "e")
	assert.Equal(t, j.Stats().Snapshots, uint64(1))
	assert.NilError(t, j.Close())
	_, records := contents(t, path)
	assert.DeepEqual(t, records, []string{"ab", "c", "d", "e"})
	names, err := filepath.Glob(path + "*")
	assert.NilError(t, err)
	assert.DeepEqual(t, names, []string{path, path + lockSuffix})
}

func TestSnapshotsThatFailChangeNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	j, _, _ := read(t, path)
	put(t, j, "a")
	no := errors.New("no")
	assert.ErrorIs(t, j.Snapshot().Write(func(emit func([]byte) error) error {
		assert.NilError(t, emit([]byte("lost")))
		return no
	}), no)
	old := j.Snapshot()
	put(t, j, "b")
	newer := j.Snapshot()
	put(t, j, "c")
	err := old.Write(emitAll([]string{"old"}))
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	replace(t, newer, "ab")
	assert.NilError(t, j.Close())
	err = j.Snapshot().Write(emitAll(nil))
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	_, records := contents(t, path)
	assert.DeepEqual(t, records, []string{"ab", "c"})
}

// counters is an owner as one should be: state under a lock, appends in its order.
type counters struct {
	mu     sync.Mutex
	log    *Journal
	values map[string]int
}

func (c *counters) replay(record []byte) error {
	var key string
	var value int
	_, err := fmt.Sscanf(string(record), "%s %d", &key, &value)
	// Each record is the next of its key: one that is lost, doubled or out of order
	// shows. A snapshot's records are the first of their keys.
	if old, ok := c.values[key]; ok && value != old+1 {
		return fmt.Errorf("%s went from %d to %d", key, old, value)
	}
	c.values[key] = value
	return err
}

func (c *counters) add(key string) Commit {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.values[key]++
	return c.log.Append(fmt.Appendf(nil, "%s %d %s", key, c.values[key], strings.Repeat("x", 100)))
}

func (c *counters) compact() error {
	c.mu.Lock()
	var state []string
	for key, value := range c.values {
		state = append(state, fmt.Sprintf("%s %d", key, value))
	}
	s := c.log.Snapshot()
	c.mu.Unlock()
	return s.Write(emitAll(state))
}

func openCounters(t testing.TB, path string) (*counters, Recovery) {
	t.Helper()
	c := &counters{values: map[string]int{}}
	j, rec, err := Open(path, Options{Replay: c.replay})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, j.Close()) })
	c.log = j
	return c, rec
}

func TestSnapshotsWhileManyAppend(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	c, _ := openCounters(t, path)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	compacted := make(chan struct{})
	go func() {
		defer close(compacted)
		for {
			select {
			case <-stop:
				return
			default:
				assert.Check(t, c.compact())
			}
		}
	}()
	for g := range 16 {
		wg.Go(func() {
			for range 100 {
				assert.Check(t, c.add(fmt.Sprintf("k%d", g)).Wait(context.Background()))
			}
		})
	}
	wg.Wait()
	close(stop)
	<-compacted
	assert.Assert(t, c.log.Stats().Snapshots > 2)
	assert.NilError(t, c.log.Close())
	again, rec := openCounters(t, path)
	assert.Equal(t, rec.Damage, Intact)
	assert.DeepEqual(t, again.values, c.values)
	assert.Equal(t, again.values["k3"], 100)
}

func TestGrowthIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	j, _, _ := read(t, path)
	state := strings.Repeat("s", 2<<20)
	replace(t, j.Snapshot(), state)
	assert.Assert(t, !j.ShouldCompact())
	var largest int64
	for range 40 {
		put(t, j, strings.Repeat("r", 256<<10))
		info, err := os.Stat(path)
		assert.NilError(t, err)
		largest = max(largest, info.Size())
		if j.ShouldCompact() {
			replace(t, j.Snapshot(), state)
		}
	}
	assert.Assert(t, largest < 5<<20, "%d", largest)
	assert.Assert(t, j.Stats().Snapshots >= 4)
	size := j.Stats()
	assert.NilError(t, j.Close())
	j, _, _ = read(t, path)
	assert.Equal(t, j.Stats().SnapshotBytes, size.SnapshotBytes, "known after a restart")
	assert.Equal(t, j.Stats().Bytes, size.Bytes)
}
