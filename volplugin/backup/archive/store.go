package archive

import (
	"context"
	"io"
	"strings"
	"time"
)

// A store keeps objects by names: that of the marker, or VOLUME/FILE. An object is
// there when all of it is, and never changes. Methods may be called concurrently. Errors wrap
// fs.ErrNotExist for an object, or a store, that is not there.
type store interface {
	// make makes the store, unless it is there.
	make(ctx context.Context) error
	// list gives the objects of a volume, or of all for "".
	list(ctx context.Context, volume string) ([]object, error)
	open(ctx context.Context, name string) (io.ReadCloser, error)
	// put stores what r has up to its end, about as many bytes as said. It leaves nothing when it fails, unless
	// it is killed.
	put(ctx context.Context, name string, about int64, r io.Reader) error
	// remove removes an object; one that is not there is no error.
	remove(ctx context.Context, name string) error
	// sweep removes what is left of puts that were killed and had begun before a time.
	sweep(ctx context.Context, before time.Time) error
	// String is where it is, for messages, without secrets.
	String() string
}

// An object is one in a list.
type object struct {
	volume, file string
	size         int64
	modified     time.Time
}

func (o object) name() string { return o.volume + "/" + o.file }

const (
	markerName    = "berth-archive.json"
	recordSuffix  = ".json"
	archiveSuffix = ".tar.zst"
)

func recordName(volume, id string) string  { return volume + "/" + id + recordSuffix }
func archiveName(volume, id string) string { return volume + "/" + id + archiveSuffix }

// id of the backup whose record or archive, as the suffix says, the object is.
func (o object) id(suffix string) (string, bool) {
	id, ok := strings.CutSuffix(o.file, suffix)
	return id, ok && ids.MatchString(id) && volumes.MatchString(o.volume)
}
