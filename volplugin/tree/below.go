package tree

import (
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Below opens directories below a top by their paths, and never anything else: no
// symbolic link is followed and no mount entered. It is for one goroutine, and holds one
// descriptor until Close.
type Below struct {
	beneath beneath
	top     *rooted.Dir
	path    string // of the directory that is kept; "" for none
	fd      int
}

// NewBelow works below top, which has to stay open.
func NewBelow(top *rooted.Dir) *Below {
	return &Below{beneath: newBeneath(top), top: top}
}

// Dir opens the directory path, slash-separated and clean; "" is the top. The
// descriptor can be read from and is valid until the next call. The error is that of
// open(2): ENOTDIR or ELOOP for what is no directory, EXDEV for a mount point.
func (b *Below) Dir(path string) (fd int, err error) {
	if path == "" {
		return b.top.FD(), nil
	}
	if path == b.path {
		return b.fd, nil
	}
	from, rest := b.top.FD(), path
	if below, ok := strings.CutPrefix(path, b.path+"/"); ok && b.path != "" {
		from, rest = b.fd, below
	}
	fd, err = b.beneath.openLong(from, rest)
	if err != nil {
		return -1, err
	}
	b.Close()
	b.path, b.fd = path, fd
	return fd, nil
}

// Close drops the descriptor. Dir can be called again.
func (b *Below) Close() {
	if b.path != "" {
		_ = unix.Close(b.fd)
		b.path = ""
	}
}
