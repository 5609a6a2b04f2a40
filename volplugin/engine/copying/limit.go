package copying

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/engine"
	"github.com/berth-plugin/berth/volplugin/quota"
	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// limits tells whether the file system of dir enforces sizes, by the error.
func limits(dir *rooted.Dir) error { return quota.Supported(dir) }

// Limit implements engine.Trees.
func (t Trees) Limit(ctx context.Context, parent *rooted.Dir, name string, size uint64) error {
	dir, err := parent.Dir(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := limits(dir); err != nil {
		if size == 0 {
			return nil
		}
		return fmt.Errorf("%w: size=%d needs engine=image, or a root that is mounted with prjquota (%w)", engine.ErrNoLimit, size, err)
	}
	return quota.Set(ctx, parent, dir, size)
}

// Usage implements engine.Trees. It walks the tree unless a quota counts what is in it.
func (Trees) Usage(ctx context.Context, parent *rooted.Dir, name string) (engine.Usage, error) {
	dir, err := parent.Dir(name)
	if err != nil {
		return engine.Usage{}, err
	}
	defer dir.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(parent.FD(), &st); err != nil {
		return engine.Usage{}, &fs.PathError{Op: "statfs", Path: parent.Path(), Err: err}
	}
	usage := engine.Usage{Free: st.Bavail * uint64(st.Bsize)}
	counted, known, err := quota.Get(dir)
	if err != nil {
		return engine.Usage{}, err
	}
	if !known {
		size, err := tree.Size(ctx, dir)
		usage.Used, usage.Files = size.Bytes, size.Files
		return usage, err
	}
	usage.Used, usage.Files, usage.Limit = counted.Bytes, counted.Files, counted.Limit
	if usage.Limit > 0 {
		usage.Free = min(usage.Free, usage.Limit-min(usage.Used, usage.Limit))
	}
	return usage, nil
}

// unlimit takes the limit off a tree that is to be deleted, or the file system would
// keep it for a project that nobody has any more.
func unlimit(ctx context.Context, parent *rooted.Dir, name string) error {
	dir, err := parent.Dir(name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, rooted.ErrNotDir) || errors.Is(err, rooted.ErrSymlink) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if project, err := quota.Project(dir); err != nil || project == 0 || limits(dir) != nil {
		return err
	}
	return quota.Set(ctx, parent, dir, 0)
}
