package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

const (
	// growth is how many bytes are allocated at a time: few enough to be nothing
	// on a small host, many enough that growing is rare.
	growth = 256 << 10
	// maxFile is the longest file that is written or read, in bytes. Snapshots
	// keep it far below; an owner that takes none is told before memory is short.
	maxFile = 1 << 30
)

var (
	errRecord = errors.New("records and frame differ")
	errFull   = fault.Exhausted("the log has grown to %d bytes without a snapshot", maxFile)
)

// file is one file of the log while it is written. It is not safe for concurrent
// use.
type file struct {
	f       *os.File
	header  header
	end     int64 // behind the last frame
	size    int64 // allocated, zeros from end on
	records uint64
}

// createFile makes a file without records, under a name of its own beside path.
func createFile(path string) (*file, error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+newSuffix+"*") // mode 0600
	if err != nil {
		return nil, err
	}
	return &file{f: f, header: newHeader(), end: firstFrame}, nil
}

// discard removes a file that was not installed.
func (f *file) discard() error {
	return errors.Join(f.f.Close(), os.Remove(f.f.Name()))
}

// grow allocates room for n more bytes and for the zeros behind them, and tells
// whether the size has changed. When it fails the log is as it was.
func (f *file) grow(n int64) (grown bool, err error) {
	need := f.end + n + frameHead
	if need <= f.size {
		return false, nil
	}
	if need > maxFile {
		return false, errFull
	}
	size := (need + growth - 1) / growth * growth
	if err := allocate(f.f, f.size, size); err != nil {
		// Almost full: take only what is needed.
		size = (need + 4095) / 4096 * 4096
		if err := allocate(f.f, f.size, size); err != nil {
			return false, err
		}
	}
	f.size = size
	return true, nil
}

// allocate makes zeros from one offset to another at the end of a file.
func allocate(f *os.File, from, to int64) error {
	err := retry(func() error { return unix.Fallocate(int(f.Fd()), 0, from, to-from) })
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		_, err = f.WriteAt(make([]byte, to-from), from)
		return err
	}
	if err != nil {
		return &os.PathError{Op: "fallocate", Path: f.Name(), Err: err}
	}
	return nil
}

// write puts a frame behind the last one, where grow has made room. Call sync
// before anything is acknowledged.
func (f *file) write(frame []byte, count int) error {
	f.header.seal(frame, f.end, f.records, count)
	if _, err := f.f.WriteAt(frame, f.end); err != nil {
		return err
	}
	f.end += int64(len(frame))
	f.records += uint64(count)
	return nil
}

// copyFrame is grow and write, for files that are not installed yet.
func (f *file) copyFrame(frame []byte, count int) error {
	if _, err := f.grow(int64(len(frame))); err != nil {
		return err
	}
	return f.write(frame, count)
}

// sync makes durable what was written. After an error nothing may be assumed of
// the file: the kernel reports an error once and then forgets the pages.
func (f *file) sync() error {
	if err := retry(func() error { return unix.Fdatasync(int(f.f.Fd())) }); err != nil {
		return &os.PathError{Op: "fdatasync", Path: f.f.Name(), Err: err}
	}
	return nil
}

// install gives the file its header and the name path. installed is true when
// another file may have lost that name, with or without an error; with one, a
// crash may still bring the other file back.
func (f *file) install(path string) (installed bool, err error) {
	if _, err := f.grow(0); err != nil {
		return false, err
	}
	if _, err := f.f.WriteAt(f.header.encode(), 0); err != nil {
		return false, err
	}
	if err := f.f.Sync(); err != nil {
		return false, err
	}
	if err := os.Rename(f.f.Name(), path); err != nil {
		return false, err
	}
	return true, syncDir(filepath.Dir(path))
}

// frames reads the file back, up to the last frame that was written, and calls
// fn for each frame.
func (f *file) frames(fn func(frame) error) error {
	data := make([]byte, f.end)
	if _, err := f.f.ReadAt(data, 0); err != nil {
		return err
	}
	var records uint64
	for at := int64(firstFrame); at < f.end; {
		fr, ok := f.header.frameAt(data, at)
		if !ok || fr.before != records {
			return fmt.Errorf("%s: what was written at byte %d reads differently", f.f.Name(), at)
		}
		if err := fn(fr); err != nil {
			return err
		}
		at += int64(len(fr.bytes))
		records += uint64(fr.count)
	}
	return nil
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// retry calls fn again when a signal has interrupted it.
func retry(fn func() error) error {
	for {
		if err := fn(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
