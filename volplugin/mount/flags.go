package mount

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// Flags say what a mount forbids.
type Flags struct {
	ReadOnly, NoSUID, NoDev, NoExec bool
}

// ErrFlags says that the volume's data is mounted at its path with other flags.
var ErrFlags = errors.New("it is mounted with other flags")

// attributes are the flags as mount_setattr(2) takes them.
func (f Flags) attributes() uint64 {
	var attr uint64
	for _, flag := range []struct {
		set bool
		bit uint64
	}{
		{f.ReadOnly, unix.MOUNT_ATTR_RDONLY}, {f.NoSUID, unix.MOUNT_ATTR_NOSUID},
		{f.NoDev, unix.MOUNT_ATTR_NODEV}, {f.NoExec, unix.MOUNT_ATTR_NOEXEC},
	} {
		if flag.set {
			attr |= flag.bit
		}
	}
	return attr
}

// String lists the flags as in the options of a mount.
func (f Flags) String() string {
	var set []string
	for _, flag := range []struct {
		set  bool
		name string
	}{{f.ReadOnly, "ro"}, {f.NoSUID, "nosuid"}, {f.NoDev, "nodev"}, {f.NoExec, "noexec"}} {
		if flag.set {
			set = append(set, flag.name)
		}
	}
	if len(set) == 0 {
		return "none"
	}
	return strings.Join(set, ",")
}

// flagsOf reads those of a mount.
func flagsOf(info *mountinfo.Info) Flags {
	options := strings.Split(info.Options, ",")
	has := func(name string) bool { return slices.Contains(options, name) }
	return Flags{ReadOnly: has("ro"), NoSUID: has("nosuid"), NoDev: has("nodev"), NoExec: has("noexec")}
}

// or has the flags of both.
func (f Flags) or(g Flags) Flags {
	return Flags{f.ReadOnly || g.ReadOnly, f.NoSUID || g.NoSUID, f.NoDev || g.NoDev, f.NoExec || g.NoExec}
}

// mountFlags are those of the mount that a directory is on; a bind of it has them too.
func mountFlags(dir *rooted.Dir) (Flags, error) {
	mounts, err := mountinfo.GetMounts(func(info *mountinfo.Info) (skip, stop bool) {
		found := info.ID == dir.MountID()
		return !found, found
	})
	if err != nil {
		return Flags{}, fmt.Errorf("read mountinfo: %w", err)
	}
	if len(mounts) == 0 {
		return Flags{}, fmt.Errorf("mount %d of %s is not in mountinfo", dir.MountID(), dir.Path())
	}
	return flagsOf(mounts[0]), nil
}

// bind mounts data at point with the flags, which no one ever sees without them, nor
// does another mount namespace that gets a copy of the mount: the mount is made
// nowhere, gets its flags, and is put in its place.
func bind(data, point *rooted.Dir, flags Flags) error {
	if flags == (Flags{}) {
		return unix.Mount(data.ProcPath(), point.ProcPath(), "", unix.MS_BIND, "")
	}
	fd, err := unix.OpenTree(data.FD(), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return needs512(err)
	}
	defer unix.Close(fd)
	attr := unix.MountAttr{Attr_set: flags.attributes()}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return needs512(err)
	}
	return unix.MoveMount(fd, "", point.FD(), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

func needs512(err error) error {
	if errors.Is(err, unix.ENOSYS) {
		return fault.Unavailable("options ro, nosuid, nodev and noexec need Linux 5.12 or later: %w", err)
	}
	return fmt.Errorf("set flags: %w", err)
}
