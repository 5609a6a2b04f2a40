package journal

import (
	"errors"
	"fmt"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// minLog is how many bytes of records are nothing to compact for.
	minLog = 1 << 20
	// snapshotFrame is how many bytes of a snapshot share a checksum.
	snapshotFrame = 64 << 10
)

// A Snapshot replaces all records before a certain place in the log.
type Snapshot struct {
	j        *Journal
	serial   uint64 // of the last batch that it covers
	barrier  Commit
	failures uint64
}

// Snapshot fixes the place: what was appended before is to be covered by what Write
// is given, what is appended later stays behind it. So call it under the lock of the
// owner's state, in the same moment in which that state is copied:
//
//	s.mu.Lock()
//	state := maps.Clone(s.leases)
//	snapshot := s.log.Snapshot()
//	s.mu.Unlock()
//	err := snapshot.Write(...)
//
// It does no I/O. Until Write returns, all that is committed is held in memory, too.
// A later Snapshot makes an earlier one void; one that is never written keeps
// ShouldCompact from asking for another.
func (j *Journal) Snapshot() *Snapshot {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := &Snapshot{j: j, barrier: Commit{batch: j.newest()}, failures: j.stats.Failures}
	if n := len(j.queue); n > 0 {
		j.queue[n-1].sealed = true
	}
	s.serial = j.serial
	j.snapshot, j.tail = s, nil
	return s
}

// Write replaces the log by the records that fn emits and those appended since
// Snapshot. The log goes on as it was until a new file is complete and durable, so a
// crash at any moment leaves one or the other. Appends go on meanwhile; those at the
// very end wait for two fsyncs. Emitted records are copied. Call it once.
//
// After an error (of fn, of the disk, or because a record that the snapshot covers
// could not be stored) the log is as it was; take another Snapshot to try again.
func (s *Snapshot) Write(fn func(emit func(record []byte) error) error) error {
	err := s.write(fn)
	s.j.mu.Lock()
	if s.j.snapshot == s {
		s.j.snapshot, s.j.tail = nil, nil
	}
	s.j.mu.Unlock()
	if err != nil {
		return fmt.Errorf("write snapshot of log %s: %w", s.j.path, classify(err))
	}
	return nil
}

func (s *Snapshot) write(fn func(emit func([]byte) error) error) error {
	s.j.compacting.Lock()
	defer s.j.compacting.Unlock()
	if b := s.barrier.batch; b != nil {
		<-b.done
		if b.err != nil {
			return b.err
		}
	}
	if _, err := s.tail(); err != nil {
		return err
	}
	out, err := createFile(s.j.path)
	if err != nil {
		return err
	}
	if err := out.emit(fn); err != nil {
		return errors.Join(err, out.discard())
	}
	out.header.snapshot = out.end
	// Most of the data goes to disk while appends go on.
	if err := out.sync(); err != nil {
		return errors.Join(err, out.discard())
	}
	return s.install(out)
}

// emit writes the records of fn in frames of moderate size.
func (f *file) emit(fn func(emit func([]byte) error) error) error {
	var (
		frame = newFrame(nil)
		count int
	)
	flush := func() error {
		if count == 0 {
			return nil
		}
		err := f.copyFrame(frame, count)
		frame, count = newFrame(frame), 0
		return err
	}
	err := fn(func(record []byte) error {
		if len(record) > MaxAppend {
			return fault.Invalid("record of %d bytes: want at most %d", len(record), MaxAppend)
		}
		frame = add(frame, record)
		count++
		if len(frame) < snapshotFrame {
			return nil
		}
		return flush()
	})
	if err != nil {
		return err
	}
	return flush()
}

// install lets the new file take the place of the log's.
func (s *Snapshot) install(out *file) error {
	j := s.j
	j.io.Lock()
	defer j.io.Unlock()
	tail, err := s.tail()
	if err != nil {
		return errors.Join(err, out.discard())
	}
	for _, b := range tail {
		if err := out.copyFrame(b.frame, b.count); err != nil {
			return errors.Join(err, out.discard())
		}
	}
	installed, err := out.install(j.path)
	if !installed {
		return errors.Join(err, out.discard())
	}
	// The name is the new file's. If that is not certain to survive a crash, the
	// next commit writes yet another file before it acknowledges anything.
	_ = j.file.f.Close() // all that it holds is in the new one
	j.file, j.broken = out, err
	j.mu.Lock()
	defer j.mu.Unlock()
	j.stats.Bytes, j.stats.SnapshotBytes = out.end, out.header.snapshot
	if err == nil {
		j.settled = s.failures
		j.stats.Snapshots++
	}
	return err
}

// tail returns what has become durable since Snapshot. The error says why the
// snapshot may not be written any more. While Journal.io is held, nothing comes after.
func (s *Snapshot) tail() ([]*batch, error) {
	s.j.mu.Lock()
	defer s.j.mu.Unlock()
	if s.j.closed {
		return nil, errClosed(s.j.path)
	}
	if s.j.snapshot != s {
		return nil, fault.Conflict("another snapshot has been taken")
	}
	return s.j.tail, nil
}

// ShouldCompact says that a snapshot is due: the records since the last one have
// outgrown it (and a megabyte), or records could not be stored since, so that the
// log may lack what the owner's memory has. It costs next to nothing, so ask after
// each commit; the file never grows far beyond twice a snapshot then.
func (j *Journal) ShouldCompact() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.snapshot != nil {
		return false
	}
	return j.stats.Failures > j.settled || j.stats.Bytes-j.stats.SnapshotBytes > max(minLog, j.stats.SnapshotBytes)
}
