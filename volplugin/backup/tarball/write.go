package tarball

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// Written tells what is in an archive.
type Written struct {
	// Files counts every name of a regular file, Dirs the top as well. Bytes is the size
	// of the files, once for each name.
	Files, Dirs, Bytes uint64
	// Missing names what could not be read, with the reasons, and is cut after a
	// hundred; MissingCount is not.
	Missing      []string
	MissingCount uint64
}

// maxMissing is how many missing files are named.
const maxMissing = 100

// bufferSize of reading and writing.
const bufferSize = 256 << 10

// Write writes the archive of a volume, not compressed: the manifest unless it is nil,
// and the tree data, which nobody should change meanwhile. progress, unless it is nil,
// is called now and then with the files and bytes so far.
//
// What cannot be read is named in the result and is no error.
func Write(ctx context.Context, w io.Writer, manifest []byte, data *rooted.Dir, progress func(files, bytes uint64)) (Written, error) {
	v := &writer{
		ctx: ctx, tar: tar.NewWriter(w), names: map[any]string{}, progress: ticker{tell: progress},
		buffer: make([]byte, bufferSize), zeros: make([]byte, bufferSize),
	}
	if manifest != nil {
		h := &tar.Header{Format: tar.FormatPAX, Name: backup.ManifestName, Typeflag: tar.TypeReg, Mode: 0o600, Size: int64(len(manifest)), ModTime: time.Now().Truncate(time.Second)}
		if err := v.tar.WriteHeader(h); err != nil {
			return v.Written, err
		}
		if _, err := v.tar.Write(manifest); err != nil {
			return v.Written, err
		}
	}
	if err := tree.Walk(ctx, data, v); err != nil {
		return v.Written, err
	}
	v.progress.last(v.Files, v.Bytes)
	return v.Written, v.tar.Close()
}

type writer struct {
	Written
	ctx      context.Context //nolint:containedctx // of one call of Write
	tar      *tar.Writer
	names    map[any]string // of files with several, by inode
	progress ticker
	buffer   []byte
	zeros    []byte
}

// Failed implements tree.Visitor.
func (v *writer) Failed(path string, err error) error {
	// This process is at its limits, and the next file would fare no better.
	for _, limit := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, limit) {
			return fmt.Errorf("read %s: %w", shown(path), err)
		}
	}
	v.MissingCount++
	if len(v.Missing) < maxMissing {
		v.Missing = append(v.Missing, fmt.Sprintf("%s: %v", shown(path), err))
	}
	return nil
}

// Visit implements tree.Visitor.
func (v *writer) Visit(item *tree.Item) error {
	name := backup.DataName
	if item.Path != "" {
		name += "/" + item.Path
	}
	if len(name) > maxPath {
		return v.Failed(item.Path, fmt.Errorf("the path has %d bytes: at most %d are stored", len(name), maxPath))
	}
	kind := uint32(item.Stat.Mode & unix.S_IFMT)
	if kind == unix.S_IFSOCK {
		return nil
	}
	if first := v.names[item.Inode()]; first != "" && kind != unix.S_IFDIR {
		return v.link(item, name, first)
	}
	h, err := newHeader(item, name)
	if err != nil {
		return v.Failed(item.Path, err)
	}
	switch kind {
	case unix.S_IFREG:
		return v.file(item, h)
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
		v.Dirs++
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = item.Target(); err != nil {
			return v.Failed(item.Path, err)
		}
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR:
		h.Typeflag = tar.TypeChar
	case unix.S_IFBLK:
		h.Typeflag = tar.TypeBlock
	}
	h.Devmajor, h.Devminor = int64(item.Stat.Rdev_major), int64(item.Stat.Rdev_minor)
	stored, err := v.header(item, h)
	if stored {
		v.remember(item, name)
	}
	return err
}

// header writes one. What a header cannot hold is missing.
func (v *writer) header(item *tree.Item, h *tar.Header) (stored bool, err error) {
	raw(h)
	err = v.tar.WriteHeader(h)
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) {
		return false, v.Failed(item.Path, err)
	}
	return err == nil, err
}

func (v *writer) remember(item *tree.Item, name string) {
	if item.Stat.Nlink > 1 && item.Stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		v.names[item.Inode()] = name
	}
}

// link stores another name of a file.
func (v *writer) link(item *tree.Item, name, first string) error {
	h := &tar.Header{
		Format: tar.FormatPAX, Typeflag: tar.TypeLink, Name: name, Linkname: first, Mode: int64(item.Stat.Mode & 0o7777),
		Uid: int(item.Stat.Uid), Gid: int(item.Stat.Gid), ModTime: time.Unix(item.Stat.Mtime.Sec, 0), PAXRecords: map[string]string{},
	}
	stored, err := v.header(item, h)
	if stored && item.Stat.Mode&unix.S_IFMT == unix.S_IFREG {
		v.Files++
		v.Bytes += item.Stat.Size
	}
	return err
}

// file stores a regular file.
func (v *writer) file(item *tree.Item, h *tar.Header) error {
	h.Typeflag, h.Size = tar.TypeReg, int64(item.Stat.Size)
	fd, err := item.Open()
	if err != nil {
		return v.Failed(item.Path, err)
	}
	defer unix.Close(fd)
	content := &content{fd: fd, size: h.Size}
	// A file that cannot be read at all leaves no trace in the archive.
	n, failed := content.next(v.buffer)
	if failed != nil {
		return v.Failed(item.Path, failed)
	}
	if stored, err := v.header(item, h); !stored {
		return err
	}
	for content.at < h.Size {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		if n == 0 {
			n, failed = content.next(v.buffer)
		}
		if failed != nil {
			return v.broken(item, h, failed, h.Size-content.at)
		}
		from := v.buffer
		if content.hole {
			from = v.zeros
		}
		if _, err := v.tar.Write(from[:n]); err != nil {
			return err
		}
		content.at += int64(n)
		v.progress.tick(v.Files, v.Bytes+uint64(content.at))
		n = 0
	}
	v.Files++
	v.Bytes += uint64(h.Size)
	v.progress.tick(v.Files, v.Bytes)
	v.remember(item, h.Name)
	return nil
}

// broken ends a file that could not be read to its end: the rest bytes that its header
// has promised, and a mark that the file is missing.
func (v *writer) broken(item *tree.Item, h *tar.Header, reason error, rest int64) error {
	for rest > 0 {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		n, err := v.tar.Write(v.zeros[:min(rest, bufferSize)])
		if err != nil {
			return err
		}
		rest -= int64(n)
	}
	mark := &tar.Header{
		Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: h.Name, ModTime: time.Unix(0, 0),
		PAXRecords: map[string]string{missing: reason.Error()},
	}
	if _, err := v.header(item, mark); err != nil {
		return err
	}
	return v.Failed(item.Path, reason)
}

// content is what a file of size bytes has, piece by piece.
type content struct {
	fd       int
	size, at int64
	// dataEnd is where the data that begins at or before at ends; hole says that the next
	// piece is of zeros that need not be read.
	dataEnd, holeEnd int64
	hole             bool
}

var errShorter = errors.New("became shorter while it was read")

// next reads the next piece into buf, or finds that it is a hole. Its caller moves at on.
func (c *content) next(buf []byte) (n int, err error) {
	if c.at >= c.size {
		return 0, nil
	}
	if c.at >= c.dataEnd && c.at >= c.holeEnd {
		if err := c.seek(); err != nil {
			return 0, err
		}
	}
	end := c.dataEnd
	if c.hole = c.at < c.holeEnd; c.hole {
		end = c.holeEnd
	}
	buf = buf[:min(int64(len(buf)), end-c.at)]
	if c.hole {
		return len(buf), nil
	}
	for {
		n, err = unix.Pread(c.fd, buf, c.at)
		if err == unix.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = errShorter
		}
		return n, err
	}
}

// seek finds where the hole or the data at c.at ends.
func (c *content) seek() error {
	begin, err := unix.Seek(c.fd, c.at, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		// A hole up to the end of the file, wherever that is by now.
		c.holeEnd = c.size
		return nil
	case err == unix.EINVAL:
		c.dataEnd = c.size // holes are unknown here
		return nil
	case err != nil:
		return err
	case begin > c.at:
		c.holeEnd = min(begin, c.size)
		return nil
	}
	end, err := unix.Seek(c.fd, c.at, unix.SEEK_HOLE)
	if err != nil {
		return err
	}
	c.dataEnd = min(end, c.size)
	return nil
}

// A ticker tells progress, not too often.
type ticker struct {
	tell func(files, bytes uint64)
	told time.Time
}

func (t *ticker) tick(files, bytes uint64) {
	if t.tell == nil {
		return
	}
	if now := time.Now(); now.Sub(t.told) > 100*time.Millisecond {
		t.told = now
		t.tell(files, bytes)
	}
}

func (t *ticker) last(files, bytes uint64) {
	if t.tell != nil {
		t.tell(files, bytes)
	}
}
