package tarball

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

const (
	// maxWindow bounds the memory that a hostile archive can ask for. It is what zstd
	// itself takes without being told to take more.
	maxWindow = 128 << 20
	// threads of a compression: more would take the processors from the containers.
	threads = 2
)

// Compress returns a writer that compresses to w with zstd, with a checksum. Its Close
// ends the archive and leaves w open.
func Compress(w io.Writer) (io.WriteCloser, error) {
	return zstd.NewWriter(w, zstd.WithEncoderConcurrency(threads), zstd.WithWindowSize(4<<20))
}

var (
	magicZstd = []byte{0x28, 0xb5, 0x2f, 0xfd}
	magicGzip = []byte{0x1f, 0x8b}
	// others are told by their names only.
	others = map[string][]byte{"bzip2": []byte("BZh"), "xz": {0xfd, '7', 'z', 'X', 'Z', 0}, "zip": []byte("PK\x03\x04"), "lz4": {0x04, 0x22, 0x4d, 0x18}}
)

// Decompress returns what is in r, which is compressed with zstd or gzip, or not at
// all. Its Close leaves r open.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	begin := bufio.NewReaderSize(r, 64<<10)
	magic, err := begin.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, magicZstd):
		d, err := zstd.NewReader(begin, zstd.WithDecoderConcurrency(threads), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case bytes.HasPrefix(magic, magicGzip):
		return gzip.NewReader(begin)
	}
	for name, other := range others {
		if bytes.HasPrefix(magic, other) {
			return nil, fmt.Errorf("the archive is made by %s: want tar, tar.gz or tar.zst", name)
		}
	}
	return io.NopCloser(begin), nil
}
