package tree

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

const (
	// bufSize suits the processor's caches.
	bufSize = 256 << 10
	// rangeSize is how much the kernel copies before ctx is looked at. A file server
	// takes some time for it.
	rangeSize = 64 << 20
	// small files are read and written where the kernel would do no better.
	small = 1 << 20
)

// data copies the content of src, as long as st says, to the empty file dst.
func (w *worker) data(src, dst int, st *unix.Statx_t, repeated bool) error {
	size := int64(st.Size)
	if size == 0 {
		return nil
	}
	used := min(st.Size, st.Blocks*512)
	if !w.noClone.Load() {
		err := unix.IoctlFileClone(dst, src)
		if errors.Is(err, unix.EINVAL) && w.fsType == btrfs && copyNoCOW(src, dst) {
			err = unix.IoctlFileClone(dst, src)
		}
		switch err {
		case nil:
			if !repeated {
				w.cloned.Add(1)
				w.bytes.Add(used)
			}
			return nil
		case unix.EOPNOTSUPP, unix.ENOTTY, unix.ENOSYS, unix.EXDEV:
			if w.options.Reflink == Require {
				return errors.Join(ErrNoReflink, err)
			}
			w.noClone.Store(true)
		case unix.ENOSPC, unix.EDQUOT:
			return err
		}
		// Other errors concern this file only: a swap file, for one.
	}
	copied, err := w.extents(src, dst, size, int64(st.Blocks)*512)
	if !repeated {
		w.bytes.Add(uint64(copied))
	}
	return err
}

// extents copies what is not a hole.
func (w *worker) extents(src, dst int, size, allocated int64) (copied int64, err error) {
	if allocated >= size && size < small {
		return w.span(src, dst, 0, size)
	}
	for at := int64(0); at < size; {
		begin, err := unix.Seek(src, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // a hole up to the end, or cut off meanwhile
		}
		end := size
		if err == nil {
			end, err = unix.Seek(src, begin, unix.SEEK_HOLE)
			if errors.Is(err, unix.ENXIO) {
				break
			}
		}
		if errors.Is(err, unix.EINVAL) {
			begin, end, err = at, size, nil // holes are unknown here
		}
		if err != nil {
			return copied, err
		}
		end = min(end, size)
		if begin >= end {
			break
		}
		n, err := w.span(src, dst, begin, end-begin)
		copied += n
		if err != nil {
			return copied, err
		}
		at = end
	}
	// A hole at the end.
	return copied, unix.Ftruncate(dst, size)
}

// span copies length bytes from offset, or less when the file has become shorter.
func (w *worker) span(src, dst int, offset, length int64) (copied int64, err error) {
	for copied < length && !w.noRange.Load() && (!w.fsType.copies() || length >= small) {
		if err := w.ctx.Err(); err != nil {
			return copied, err
		}
		from, to := offset+copied, offset+copied
		n, err := unix.CopyFileRange(src, &from, dst, &to, int(min(length-copied, rangeSize)), 0)
		switch err {
		case unix.EINTR, unix.EAGAIN:
			continue
		case unix.ENOSYS, unix.EXDEV, unix.EOPNOTSUPP, unix.EPERM:
			w.noRange.Store(true)
		case unix.ENOSPC, unix.EDQUOT, unix.EIO:
			return copied, err
		}
		if err != nil || n == 0 {
			break
		}
		copied += int64(n)
		w.report(false)
	}
	if w.buf == nil {
		w.buf = make([]byte, bufSize)
	}
	for copied < length {
		if err := w.ctx.Err(); err != nil {
			return copied, err
		}
		n, err := pread(src, w.buf[:min(length-copied, bufSize)], offset+copied)
		if err != nil || n == 0 {
			return copied, err
		}
		if err := pwrite(dst, w.buf[:n], offset+copied); err != nil {
			return copied, err
		}
		copied += int64(n)
		if length >= small {
			w.report(false)
		}
	}
	return copied, nil
}

func pread(fd int, buf []byte, offset int64) (int, error) {
	for {
		n, err := unix.Pread(fd, buf, offset)
		if err != unix.EINTR {
			return n, err
		}
	}
}

func pwrite(fd int, buf []byte, offset int64) error {
	for len(buf) > 0 {
		n, err := unix.Pwrite(fd, buf, offset)
		if err == unix.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return err
		}
		buf, offset = buf[n:], offset+int64(n)
	}
	return nil
}

// fsync puts a file or directory on disk.
func fsync(fd int) error {
	err := unix.Fsync(fd)
	if errors.Is(err, unix.EINVAL) || err == unix.ENOTSUP {
		return nil // a directory of a file system that knows no such thing
	}
	return err
}

// noCOW is FS_NOCOW_FL of linux/fs.h.
const noCOW = 0x00800000

// copyNoCOW gives dst, which is empty, btrfs's attribute "no copy on write" when src
// has it, and tells whether that was so.
func copyNoCOW(src, dst int) bool {
	flags, err := unix.IoctlGetUint32(src, unix.FS_IOC_GETFLAGS)
	if err != nil || flags&noCOW == 0 {
		return false
	}
	mine, err := unix.IoctlGetUint32(dst, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return false
	}
	return unix.IoctlSetPointerInt(dst, unix.FS_IOC_SETFLAGS, int(mine|noCOW)) == nil
}
