package mount

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/moby/sys/mountinfo"

	"github.com/berth-plugin/berth/volplugin/rooted"
)

// InUse tells whether a process outside this one's mount namespace has data, or a
// directory in it, mounted: a container that got the path itself. It sees the
// processes of this PID namespace only, so it is of use where the daemon runs on
// the host and not in a plugin's container. It reads /proc alone and cannot hang
// on storage.
func InUse(ctx context.Context, data *rooted.Dir) (bool, error) {
	device, root, err := inFilesystem(data)
	if err != nil {
		return false, err
	}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return false, err
	}
	seen := map[string]bool{own: true}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return false, err
	}
	for _, proc := range procs {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		if _, err := strconv.Atoi(proc.Name()); err != nil {
			continue
		}
		// Processes end while we look; one that is gone uses nothing.
		namespace, err := os.Readlink(filepath.Join("/proc", proc.Name(), "ns", "mnt"))
		if err != nil || seen[namespace] {
			continue
		}
		mounts, err := mountsOf(proc.Name())
		if err != nil {
			continue
		}
		seen[namespace] = true
		for _, info := range mounts {
			if deviceOf(info) == device && within(info.Root, root) {
				return true, nil
			}
		}
	}
	return false, nil
}

// inFilesystem gives the device and the path from the file system's own root, the
// form in which every namespace's mountinfo shows a bind mount's source.
func inFilesystem(data *rooted.Dir) (device, root string, err error) {
	path, err := os.Readlink(data.ProcPath())
	if err != nil {
		return "", "", err
	}
	mounts, err := mountinfo.GetMounts(func(info *mountinfo.Info) (skip, stop bool) {
		found := info.ID == data.MountID()
		return !found, found
	})
	if err != nil {
		return "", "", fmt.Errorf("read mountinfo: %w", err)
	}
	if len(mounts) == 0 {
		return "", "", fmt.Errorf("mount %d of %s is not in mountinfo", data.MountID(), path)
	}
	rel, err := filepath.Rel(mounts[0].Mountpoint, path)
	if err != nil {
		return "", "", err
	}
	return deviceOf(mounts[0]), filepath.Join(mounts[0].Root, rel), nil
}

func deviceOf(info *mountinfo.Info) string {
	return strconv.Itoa(info.Major) + ":" + strconv.Itoa(info.Minor)
}

// mountsOf lists the mounts of a process.
func mountsOf(pid string) ([]*mountinfo.Info, error) {
	f, err := os.Open(filepath.Join("/proc", pid, "mountinfo"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return mountinfo.GetMountsFromReader(f, nil)
}
