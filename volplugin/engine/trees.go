package engine

import (
	"context"
	"errors"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Trees is what a file system can do with whole directory trees: copies of every
// file, clones of every file, or subvolumes. Package treeengine makes an Engine of it,
// and an image's file system has one of its own inside. The rules of Engine on links,
// mount points, repetition and ctx hold here too.
type Trees interface {
	// Name of the engine that it makes: "dir", "reflink", "btrfs".
	Name() string
	// Probe is Engine.Probe for the file system that dir is on.
	Probe(ctx context.Context, dir *rooted.Dir) (Abilities, error)
	// Make makes an empty tree whose top belongs to root with mode 0700. The error
	// wraps fs.ErrExist when the name is taken.
	Make(parent *rooted.Dir, name string, noCOW bool) error
	// Check errs when name is there and cannot be a tree of this kind: a link, a
	// file, a mount point. An ordinary directory is good for all kinds.
	Check(parent *rooted.Dir, name string) error
	// Duplicate makes name in parent, which is free, a copy of the tree src, complete
	// and on disk when it returns, with its top's owner, mode and times. readOnly asks
	// for a copy that cannot be changed, where there is such a thing.
	Duplicate(ctx context.Context, src, parent *rooted.Dir, name string, readOnly bool, progress func(Progress)) (Copy, error)
	// Seal makes a tree read-only, or writable, where there is such a thing.
	Seal(parent *rooted.Dir, name string, readOnly bool) error
	// Delete removes a tree with all that is below it. Missing is no error.
	Delete(ctx context.Context, parent *rooted.Dir, name string) error
	// Limit sets the bytes that the tree may use, 0 for no limit. The error is
	// ErrNoLimit, in words, where that cannot be enforced.
	Limit(ctx context.Context, parent *rooted.Dir, name string, size uint64) error
	// Usage is Engine.Usage.
	Usage(ctx context.Context, parent *rooted.Dir, name string) (Usage, error)
}

// ErrNoLimit is in the chain of the error about a size that cannot be enforced.
var ErrNoLimit = errors.New("a size cannot be enforced here")
