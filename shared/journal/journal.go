package journal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// MaxAppend is how many bytes one Append takes at most, with five for each record. A
// lease has some hundred.
const MaxAppend = 16 << 20

// batchSize is how many bytes one fdatasync carries at most, one Append apart.
const batchSize = 1 << 20

// Options describe how to Open a log.
type Options struct {
	// Replay is called for each record, in the order of Append. The record is only
	// valid during the call. When it returns an error, Open fails and the file is
	// unchanged.
	Replay func(record []byte) error
	// MustExist makes Open fail where there is no file yet: for an owner who knows
	// from elsewhere that there was one.
	MustExist bool
}

// A Journal is an open log. All methods may be called concurrently. Of one
// process, and of all processes on a host, one has the log open.
type Journal struct {
	path string
	lock *os.File

	mu       sync.Mutex // held for moments only, never during I/O
	wake     *sync.Cond // the queue is not empty, or closed has changed
	queue    []*batch   // not written yet; the last may still take records
	writing  *batch
	serial   uint64 // of the newest batch
	snapshot *Snapshot
	tail     []*batch // durable, but not covered by snapshot
	spare    []byte   // the buffer of a batch that is done
	closed   bool
	stats    Stats
	settled  uint64 // value of stats.Failures that a snapshot has made good

	io   sync.Mutex // held while the file is written
	file *file
	// broken is why nothing may be appended to file: what was written may be lost.
	broken error

	compacting sync.Mutex // held while a snapshot is written
	committer  sync.WaitGroup
}

// batch is what one fdatasync makes durable.
type batch struct {
	serial uint64
	frame  []byte
	count  int
	calls  int
	sealed bool // takes no more records
	kept   bool // in Journal.tail, or was
	done   chan struct{}
	err    error // set before done is closed
}

// Open opens or makes the log at path, with mode 0600 in a directory of mode 0700,
// and replays it. Beside it lie path.lock, path.new-* for moments, and
// path.damaged-*, see Recovery.
//
// What can be read of a damaged file is recovered; Recovery tells what cannot. The
// error is a conflict when another process holds the log for three seconds, and
// unavailable when the file was written by a newer version or is missing despite
// MustExist; the file is unchanged then, as it is after an error of Replay.
func Open(path string, opts Options) (*Journal, Recovery, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, Recovery{}, fmt.Errorf("open log: %w", err)
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return nil, Recovery{}, fmt.Errorf("open log: %w", err)
	}
	held, err := lock(path)
	if err != nil {
		return nil, Recovery{}, fmt.Errorf("open log: %w", err)
	}
	if err := removeUnfinished(path); err != nil {
		return nil, Recovery{}, errors.Join(fmt.Errorf("open log: %w", err), held.Close())
	}
	f, rec, err := recoverFile(path, opts)
	if err != nil {
		return nil, rec, errors.Join(fmt.Errorf("open log %s: %w", path, classify(err)), held.Close())
	}
	j := &Journal{path: path, lock: held, file: f}
	j.wake = sync.NewCond(&j.mu)
	j.stats.Bytes, j.stats.SnapshotBytes = f.end, f.header.snapshot
	j.committer.Go(j.run)
	return j, rec, nil
}

// A Commit is the way of some records to the disk. The zero value is done.
type Commit struct {
	batch *batch
	err   error
}

// Append puts records at the end of the log, all of them or none, in the order of
// the calls. It copies them, does no I/O and never waits for any. The records are
// not durable before Wait returns nil; they become so without Wait, too. Append
// without records waits for all before it.
//
// When records cannot be stored, neither are those that were appended between them
// and the moment when that was known: all their Commits fail.
func (j *Journal) Append(records ...[]byte) Commit {
	size := 0
	for _, r := range records {
		size += len(r) + binary.MaxVarintLen32
	}
	if size > MaxAppend {
		return Commit{err: fault.Invalid("log %s: append of %d bytes: want at most %d", j.path, size, MaxAppend)}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return Commit{err: errClosed(j.path)}
	}
	if len(records) == 0 {
		return Commit{batch: j.newest()}
	}
	b := j.open(size)
	for _, r := range records {
		b.frame = add(b.frame, r)
	}
	b.count += len(records)
	b.calls++
	return Commit{batch: b}
}

// newest returns the batch that is done last, or nil when all are done. j.mu is
// held.
func (j *Journal) newest() *batch {
	if n := len(j.queue); n > 0 {
		return j.queue[n-1]
	}
	return j.writing
}

// open returns a batch that takes size more bytes. j.mu is held.
func (j *Journal) open(size int) *batch {
	if n := len(j.queue); n > 0 {
		if b := j.queue[n-1]; !b.sealed && len(b.frame)+size <= batchSize {
			return b
		}
	}
	j.serial++
	b := &batch{serial: j.serial, frame: newFrame(j.spare), done: make(chan struct{})}
	j.spare = nil
	j.queue = append(j.queue, b)
	j.wake.Signal()
	return b
}

// Wait returns nil when the records are durable (fdatasync), and an error when they
// are not and never will be, with one exception: if even a new file could not be
// written after a failed fdatasync, a crash may bring the records back until a later
// Commit or snapshot has succeeded. The kind of the error is exhausted where the disk
// is full and unavailable for the rest.
//
// When ctx ends first, the error is that of ctx, and the records may become durable
// all the same: treat them as stored.
func (c Commit) Wait(ctx context.Context) error {
	if c.batch == nil {
		return c.err
	}
	select {
	case <-c.batch.done:
		return c.batch.err
	default:
	}
	select {
	case <-c.batch.done:
		return c.batch.err
	case <-ctx.Done():
		return fmt.Errorf("wait for the log: %w", ctx.Err())
	}
}

// run writes batches until the log is closed and all are written.
func (j *Journal) run() {
	for {
		b := j.take()
		if b == nil {
			return
		}
		start := time.Now()
		err := j.commit(b)
		if err != nil {
			err = fmt.Errorf("write log %s: %w", j.path, classify(err))
		}
		j.finish(b, time.Since(start), err)
	}
}

// take waits for the next batch. It is nil when the log is closed.
func (j *Journal) take() *batch {
	j.mu.Lock()
	defer j.mu.Unlock()
	for len(j.queue) == 0 && !j.closed {
		j.wake.Wait()
	}
	if len(j.queue) == 0 {
		return nil
	}
	b := j.queue[0]
	j.queue = j.queue[1:]
	j.writing = b
	return b
}

// commit makes a batch durable.
func (j *Journal) commit(b *batch) error {
	j.io.Lock()
	defer j.io.Unlock()
	if j.broken == nil {
		grown, err := j.file.grow(int64(len(b.frame)))
		if err != nil {
			return err // nothing has been written
		}
		// The new size first: a crash then finds zeros, not a file that was cut.
		if grown {
			j.broken = j.file.sync()
		}
	}
	if j.broken == nil {
		if j.broken = j.file.write(b.frame, b.count); j.broken == nil {
			if j.broken = j.file.sync(); j.broken == nil {
				j.keep(b)
				return nil
			}
			// The frame is not part of what is read back for the new file.
			j.file.end -= int64(len(b.frame))
			j.file.records -= uint64(b.count)
		}
	}
	if err := j.replace(b); err != nil {
		return errors.Join(err, j.broken)
	}
	j.keep(b)
	return nil
}

// keep remembers a batch that a snapshot does not cover. j.io is held.
func (j *Journal) keep(b *batch) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.snapshot != nil && b.serial > j.snapshot.serial {
		j.tail = append(j.tail, b)
		b.kept = true
	}
	j.stats.Bytes, j.stats.SnapshotBytes = j.file.end, j.file.header.snapshot
}

// replace writes a new file of all that is durable and of b, and goes on with it.
// j.io is held.
func (j *Journal) replace(b *batch) error {
	out, err := rewrite(j.path, j.file.header, func(fn func(frame) error) error {
		if err := j.file.frames(fn); err != nil {
			return err
		}
		return fn(frame{bytes: b.frame, count: b.count})
	})
	if err != nil {
		return err
	}
	_ = j.file.f.Close() // what it says about lost pages is known
	j.file, j.broken = out, nil
	j.count(func(s *Stats) { s.Rewrites++ })
	return nil
}

// finish tells all who wait for a batch, and after an error those behind it.
func (j *Journal) finish(b *batch, took time.Duration, err error) {
	j.mu.Lock()
	failed := []*batch{b}
	j.writing = nil
	if err != nil {
		failed = append(failed, j.queue...)
		j.queue = nil
		for _, f := range failed {
			j.stats.Failures += uint64(f.calls)
		}
	} else {
		j.stats.committed(b, took)
		if !b.kept && j.spare == nil && cap(b.frame) <= batchSize {
			j.spare, b.frame = b.frame, nil
		}
	}
	j.mu.Unlock()
	for _, f := range failed {
		f.err = err
		close(f.done)
	}
}

// Close waits until the records that were appended are durable, or have failed, and
// lets another process open the log. Append fails from now on, and so does a snapshot
// that is being written.
func (j *Journal) Close() error {
	j.mu.Lock()
	if j.closed {
		j.mu.Unlock()
		return nil
	}
	j.closed = true
	j.wake.Broadcast()
	j.mu.Unlock()
	j.committer.Wait()
	j.compacting.Lock()
	defer j.compacting.Unlock()
	j.io.Lock()
	defer j.io.Unlock()
	return errors.Join(j.file.f.Close(), j.lock.Close())
}

func errClosed(path string) error { return fault.Unavailable("log %s is closed", path) }

// classify gives an error its kind.
func classify(err error) error {
	switch {
	case fault.Kind(err) != "internal":
		return err
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fault.Exhausted("no room on disk: %w", err)
	default:
		return fault.Unavailable("%w", err)
	}
}
