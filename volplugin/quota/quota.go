// Package quota limits what a directory and all below it may use, with the project quotas
// of xfs and ext4: the directory and everything in it belong to a project, new
// files inherit it, and the file system counts and limits what a project has.
//
// Which project a directory has is read from the directory itself; nothing else is kept.
// Projects that are made here have numbers from a range of their own, chosen at random
// among those of which the file system knows no usage and no limit.
//
// # Limits of limits
//
// ext4 does not stop who has CAP_SYS_RESOURCE in the first user namespace; containers do not
// have it unless they are privileged. xfs stops everybody. Symbolic links,
// devices, pipes and sockets that were there before the limit do not count. The
// owner of a file can give it to another project, which needs no more than a
// program for it: a project quota protects from accidents and full disks, not
// from malice. A file system on an image or thin device does.
//
// The package knows nothing of volumes. It needs root.
package quota

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/rooted"
	"github.com/berth-plugin/berth/volplugin/tree"
)

// ErrUnsupported is in the chain of the error about a file system without project
// quotas.
var ErrUnsupported = errors.New("no project quotas")

// Usage of a project.
type Usage struct {
	// Bytes and Files that it has.
	Bytes, Files uint64
	// Limit in bytes, 0 for none.
	Limit uint64
}

// Projects made here have numbers from first on.
const (
	first = 0x42000000
	count = 1 << 24
)

func ours(project uint32) bool { return project >= first && project < first+count }

// Supported errs, in words, where no limit would be enforced.
func Supported(dir *rooted.Dir) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(dir.FD(), &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: dir.Path(), Err: err}
	}
	if st.Type != unix.XFS_SUPER_MAGIC && st.Type != unix.EXT4_SUPER_MAGIC {
		return fmt.Errorf("%w: only xfs and ext4 have them", ErrUnsupported)
	}
	on, err := enforced(dir.FD())
	switch {
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ESRCH):
		return fmt.Errorf("%w: kernel or mount has them switched off", ErrUnsupported)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: CAP_SYS_ADMIN is missing", ErrUnsupported)
	case err != nil:
		return &fs.PathError{Op: "quotactl", Path: dir.Path(), Err: err}
	case !on:
		return fmt.Errorf("%w: the file system is mounted without prjquota", ErrUnsupported)
	}
	return nil
}

// Set lets dir, which is in parent, and all below it use size bytes, 0 for no limit. A
// directory with content becomes a project of its own only when all in it belongs to it, so
// that a call that was cut short is completed by the next. Nobody should write to it
// meanwhile. A limit below what is used keeps everything from growing.
func Set(ctx context.Context, parent, dir *rooted.Dir, size uint64) error {
	attr, err := getAttr(dir.FD())
	if err != nil {
		return fail("read the project of", dir, err)
	}
	above, err := getAttr(parent.FD())
	if err != nil {
		return fail("read the project of", parent, err)
	}
	// What it has inherited is not its own.
	if ours(attr.project) && attr.project != above.project {
		return fail("set the quota of", dir, setLimit(dir.FD(), attr.project, size))
	}
	if size == 0 {
		return nil
	}
	project, err := free(dir)
	if err != nil {
		return err
	}
	// The limit comes first: no moment without one, and the number is taken.
	if err := setLimit(dir.FD(), project, size); err != nil {
		return fail("set the quota of", dir, err)
	}
	if err := assign(ctx, dir, project); err != nil {
		return errors.Join(err, setLimit(dir.FD(), project, 0))
	}
	return nil
}

// free returns a project that nobody has.
func free(dir *rooted.Dir) (uint32, error) {
	for range 100 {
		project := uint32(first + rand.IntN(count))
		usage, err := get(dir.FD(), project)
		if err != nil {
			return 0, fail("read the quota of", dir, err)
		}
		if usage == (Usage{}) {
			return project, nil
		}
	}
	return 0, fail("find a free project for", dir, unix.EBUSY)
}

// assign gives all that is below dir, and then dir, to a project.
func assign(ctx context.Context, dir *rooted.Dir, project uint32) error {
	err := tree.Each(ctx, dir, func(fd int, isDir bool) error {
		err := setProject(fd, project, isDir)
		if errors.Is(err, unix.EPERM) {
			return nil // immutable: it does not grow either
		}
		return err
	})
	if err != nil {
		return err
	}
	return fail("set the project of", dir, setProject(dir.FD(), project, true))
}

func setProject(fd int, project uint32, inherit bool) error {
	attr, err := getAttr(fd)
	if err != nil {
		return err
	}
	want := attr
	want.project = project
	if inherit {
		want.flags |= flagInherit
	}
	if want == attr {
		return nil
	}
	return setAttr(fd, want)
}

// Get tells what the directory's project uses. known is false where dir has none that was
// made here, or quotas are off.
func Get(dir *rooted.Dir) (usage Usage, known bool, err error) {
	project, err := Project(dir)
	if err != nil || project == 0 || Supported(dir) != nil {
		return Usage{}, false, err
	}
	usage, err = get(dir.FD(), project)
	return usage, err == nil, fail("read the quota of", dir, err)
}

// Project of a directory, 0 when it has none that was made here.
func Project(dir *rooted.Dir) (uint32, error) {
	attr, err := getAttr(dir.FD())
	switch {
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return 0, nil
	case err != nil:
		return 0, fail("read the project of", dir, err)
	case !ours(attr.project) || attr.flags&flagInherit == 0:
		return 0, nil
	}
	return attr.project, nil
}

func fail(op string, dir *rooted.Dir, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: dir.Path(), Err: err}
}
