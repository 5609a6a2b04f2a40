package journal

import (
	"bytes"
	"context"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

func benchOpen(b *testing.B) *Journal {
	b.Helper()
	j, _, err := Open(filepath.Join(b.TempDir(), "log"), Options{})
	assert.NilError(b, err)
	b.Cleanup(func() { assert.NilError(b, j.Close()) })
	return j
}

func BenchmarkOneCaller(b *testing.B) {
	j := benchOpen(b)
	record := bytes.Repeat([]byte("x"), 100)
	for b.Loop() {
		assert.NilError(b, j.Append(record).Wait(context.Background()))
	}
}

func Benchmark64Callers(b *testing.B) {
	j := benchOpen(b)
	record := bytes.Repeat([]byte("x"), 100)
	var (
		wg   sync.WaitGroup
		left atomic.Int64
		lock sync.Mutex
	)
	left.Store(int64(b.N))
	start := time.Now()
	b.ResetTimer()
	for range 64 {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				lock.Lock() // as the owner does
				c := j.Append(record)
				lock.Unlock()
				if err := c.Wait(context.Background()); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	s := j.Stats()
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "commits/s")
	b.ReportMetric(float64(s.Appends)/float64(s.Batches), "commits/sync")
}
