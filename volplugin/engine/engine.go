// Package engine says what keeps the data of volumes: a directory, later a
// subvolume or an image. Names have been validated before they come here;
// records, locks and mounts are not an engine's business.
package engine

import (
	"context"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Attributes of the top directory of new data. A nil field was not asked for:
// new data belongs to root with mode 0755 then, and existing data keeps what it
// has.
type Attributes struct {
	UID, GID, Mode *uint32
}

// An Engine keeps the data of the volumes of one root. Its methods are called
// concurrently, but never for one name at the same time on one host; other hosts
// may work on the same root. They may block as long as the file system does.
//
// An engine refuses data that is reached through a symbolic link or that is a
// mount point, with an error that wraps one of rooted's, and follows no link
// inside the data either. After an error of Create or Retire the data is as
// before the call.
type Engine interface {
	// Name is stored in records and shown in Status.
	Name() string
	// Find tells whether there is data for name. It errs when what is there
	// cannot be a volume's data.
	Find(root *rooted.Dir, name string) (bool, error)
	// Create makes empty data, or takes over what is there without changing it
	// but for attributes that were asked for. created is false for the latter.
	// New data has no entry at all, or dockerd would not copy the image's content
	// into it. It is on disk when Create returns.
	Create(root *rooted.Dir, name string, attr Attributes) (created bool, err error)
	// Abandon removes data that Create made and nobody wrote to. Data that is
	// missing or not empty is left alone without an error.
	Abandon(root *rooted.Dir, name string) error
	// Open gives the directory that containers see. The error wraps
	// fs.ErrNotExist when there is no data; Open never makes any. The handle
	// need not be readable.
	Open(root *rooted.Dir, name string) (*rooted.Dir, error)
	// Retire moves the data to entry in the trash, in one step that cannot
	// happen by half. Missing data is no error, so that a retirement can be
	// repeated, and an entry that is taken is never replaced. Containers that
	// have the data mounted go on with it.
	Retire(root *rooted.Dir, name string, trash *rooted.Dir, entry string) error
	// Destroy deletes an entry of the trash. Missing is no error. It stops when
	// ctx ends and goes on at the next call.
	Destroy(ctx context.Context, trash *rooted.Dir, entry string) error
}
