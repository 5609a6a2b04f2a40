package tree

import (
	"bytes"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// An entry of a directory as getdents64(2) gives it.
type entry struct {
	name string
	kind byte // unix.DT_REG and so on; DT_UNKNOWN where the file system does not say
}

// errDirents is never seen as long as the kernel is sound.
var errDirents = errors.New("directory entries of unknown form")

// parseDirents appends the entries in buf, which getdents64 filled, to entries;
// "." and ".." are left out.
func parseDirents(buf []byte, entries []entry) ([]entry, error) {
	// struct linux_dirent64: inode 8, offset 8, length 2, type 1, name.
	const header = 19
	for len(buf) > 0 {
		if len(buf) < header {
			return entries, errDirents
		}
		length := int(binary.NativeEndian.Uint16(buf[16:]))
		if length < header || length > len(buf) {
			return entries, errDirents
		}
		name, _, found := bytes.Cut(buf[header:length], []byte{0})
		if !found || len(name) == 0 || bytes.IndexByte(name, '/') >= 0 {
			return entries, errDirents
		}
		if text := string(name); text != "." && text != ".." {
			entries = append(entries, entry{name: text, kind: buf[18]})
		}
		buf = buf[length:]
	}
	return entries, nil
}

// readEntries appends the next entries of the directory fd to entries, at most as many
// as buf holds. It appends none at the end.
func readEntries(fd int, buf []byte, entries []entry) ([]entry, error) {
	for {
		n, err := unix.Getdents(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		// A directory that was removed after it was opened has no entries.
		if gone(err) {
			return entries, nil
		}
		if err != nil || n == 0 {
			return entries, err
		}
		before := len(entries)
		entries, err = parseDirents(buf[:n], entries)
		if err != nil || len(entries) > before {
			return entries, err
		}
	}
}
