package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"gotest.tools/v3/assert"
)

// read opens the log and returns its records.
func read(t testing.TB, path string) (*Journal, Recovery, []string) {
	t.Helper()
	var records []string
	j, rec, err := Open(path, Options{Replay: func(r []byte) error {
		records = append(records, string(r))
		return nil
	}})
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, j.Close()) })
	assert.Equal(t, rec.Records, len(records))
	return j, rec, records
}

// contents opens the log, closes it and returns its records.
func contents(t testing.TB, path string) (Recovery, []string) {
	t.Helper()
	j, rec, records := read(t, path)
	assert.NilError(t, j.Close())
	return rec, records
}

func put(t testing.TB, j *Journal, records ...string) {
	t.Helper()
	assert.NilError(t, j.Append(asBytes(records)...).Wait(context.Background()))
}

func asBytes(records []string) [][]byte {
	var out [][]byte
	for _, r := range records {
		out = append(out, []byte(r))
	}
	return out
}

// replace writes a snapshot of the given records.
func replace(t testing.TB, s *Snapshot, records ...string) {
	t.Helper()
	assert.NilError(t, s.Write(emitAll(records)))
}

func emitAll(records []string) func(func([]byte) error) error {
	return func(emit func([]byte) error) error {
		for _, r := range records {
			if err := emit([]byte(r)); err != nil {
				return err
			}
		}
		return nil
	}
}

func TestRecordsSurviveClosing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net", "log")
	j, rec, _ := read(t, path)
	assert.Assert(t, rec.Created)
	put(t, j, "a", "", "b")
	put(t, j)
	put(t, j, "c")
	assert.NilError(t, j.Close())
	assert.NilError(t, j.Close(), "twice")

	rec, records := contents(t, path)
	assert.DeepEqual(t, records, []string{"a", "", "b", "c"})
	assert.Equal(t, rec.Damage, Intact)
	assert.Assert(t, !rec.Created)
	for _, name := range []string{path, path + lockSuffix} {
		info, err := os.Stat(name)
		assert.NilError(t, err)
		assert.Equal(t, info.Mode(), os.FileMode(0o600))
	}
}

func TestAppendCopiesAndKeepsTheOrderOfCalls(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	j, _, _ := read(t, path)
	var (
		want    []string
		commits []Commit
		mu      sync.Mutex
		wg      sync.WaitGroup
	)
	for g := range 32 {
		wg.Go(func() {
			buf := make([]byte, 0, 64)
			for i := range 50 {
				mu.Lock()
				buf = fmt.Appendf(buf[:0], "%d/%d", g, i)
				want = append(want, string(buf), string(buf)+"+")
				c := j.Append(buf, append(slices.Clone(buf), '+'))
				commits = append(commits, c)
				clear(buf)
				mu.Unlock()
				assert.Check(t, c.Wait(context.Background()))
			}
		})
	}
	wg.Wait()
	s := j.Stats()
	assert.Equal(t, s.Appends, uint64(32*50))
	assert.Equal(t, s.Records, uint64(32*50*2))
	var batches uint64
	for _, n := range s.BatchSizes {
		batches += n
	}
	assert.Equal(t, batches, s.Batches)
	assert.Assert(t, s.Batches < s.Appends/2, "%d batches for %d appends", s.Batches, s.Appends)
	assert.NilError(t, j.Close())
	_, records := contents(t, path)
	assert.DeepEqual(t, records, want)
}

func TestAppendsWithoutWaitAreStored(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	j, _, _ := read(t, path)
	var want []string
	for i := range 1000 {
		want = append(want, fmt.Sprint(i))
		j.Append([]byte(want[i]))
	}
	assert.NilError(t, j.Append().Wait(context.Background()), "no records: waits for those before")
	assert.Equal(t, j.Stats().Records, uint64(1000))
	assert.NilError(t, j.Close())
	_, records := contents(t, path)
	assert.DeepEqual(t, records, want)
}

func TestSecondOpenerIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	j, _, _ := read(t, path)
	put(t, j, "a")
	_, _, err := Open(path, Options{})
	assert.Assert(t, errdefs.IsConflict(err), "%v", err)
	assert.ErrorContains(t, err, path)
	assert.ErrorContains(t, err, "in use by another Berth daemon")
	put(t, j, "b")
}

func TestMissingNewerAndForeignFilesAreRefusedUnchanged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	_, _, err := Open(path, Options{MustExist: true})
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	_, err = os.Stat(path)
	assert.ErrorIs(t, err, os.ErrNotExist)

	h := newHeader()
	h.version = version + 1
	data := append(h.encode(), make([]byte, 100)...)
	assert.NilError(t, os.WriteFile(path, data, 0o600))
	_, _, err = Open(path, Options{})
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	assert.ErrorContains(t, err, "format 2")
	assertFile(t, path, data)

	assert.NilError(t, os.Truncate(path, maxFile+1))
	_, _, err = Open(path, Options{})
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
}

func assertFile(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	assert.NilError(t, err)
	assert.Assert(t, slices.Equal(got, want))
}

func TestErrorOfReplayLeavesTheFile(t *testing.T) {
	path, _ := sample(t)
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	data = data[:len(data)-10] // damage would be repaired
	assert.NilError(t, os.WriteFile(path, data, 0o600))
	no := errors.New("no")
	_, _, err = Open(path, Options{Replay: func(r []byte) error {
		if string(r) == "record-3b" {
			return no
		}
		return nil
	}})
	assert.ErrorIs(t, err, no)
	assert.ErrorContains(t, err, "record 9")
	assertFile(t, path, data)
}

func TestAppendRefusesWhatIsTooLong(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	j, _, _ := read(t, path)
	err := j.Append(make([]byte, MaxAppend)).Wait(context.Background())
	assert.Assert(t, errdefs.IsInvalidArgument(err), "%v", err)
	long := make([]byte, 3*batchSize)
	put(t, j, string(long))
	put(t, j, "after")
	assert.NilError(t, j.Close())
	err = j.Append([]byte("x")).Wait(context.Background())
	assert.Assert(t, errdefs.IsUnavailable(err), "%v", err)
	_, records := contents(t, path)
	assert.DeepEqual(t, records, []string{string(long), "after"})
}

func TestWaitEndsWithItsContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	j, _, _ := read(t, path)
	j.io.Lock() // a disk that hangs
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	c := j.Append([]byte("a"))
	err := c.Wait(ctx)
	j.io.Unlock()
	assert.ErrorIs(t, err, context.Canceled)
	assert.NilError(t, c.Wait(context.Background()))
	assert.NilError(t, c.Wait(ctx), "what is done is done")
}
