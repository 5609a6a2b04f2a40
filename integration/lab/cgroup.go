package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// A cgroupMount is one mounted hierarchy of this machine.
type cgroupMount struct {
	// FSType is "cgroup" or "cgroup2".
	FSType string
	// Point is where it is mounted.
	Point string
	// Options are the controllers or the name, as mount(2) wants them.
	Options string
}

// cgroupMounts lists the hierarchies, each once.
func cgroupMounts() ([]cgroupMount, error) {
	infos, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var mounts []cgroupMount
	for _, info := range infos {
		m := cgroupMount{FSType: info.FSType, Point: info.Mountpoint}
		if m.FSType == "cgroup" {
			var keep []string
			for _, o := range strings.Split(info.VFSOptions, ",") {
				switch {
				case strings.HasPrefix(o, "name="):
					keep = append(keep, "none", o)
				case o != "rw" && o != "ro" && o != "xattr" && o != "clone_children" && !strings.Contains(o, "="):
					keep = append(keep, o)
				}
			}
			m.Options = strings.Join(keep, ",")
		}
		key := m.FSType + " " + m.Options
		if !seen[key] {
			seen[key] = true
			mounts = append(mounts, m)
		}
	}
	if len(mounts) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted on this machine")
	}
	return mounts, nil
}

// makeCgroups makes a cgroup for a host in every hierarchy and returns the
// directories. With version 1 they are below this process's own ones, so that
// limits set on it also hold for its hosts; with version 2 a cgroup with
// processes cannot have children with controllers, so they are below the root.
func makeCgroups(name string) ([]string, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	own, err := ownCgroups()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, m := range mounts {
		parent := filepath.Join(m.Point, "berth-lab")
		if m.FSType == "cgroup" {
			parent = filepath.Join(m.Point, own[strings.TrimPrefix(m.Options, "none,")], "berth-lab")
		}
		dir := filepath.Join(parent, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return dirs, err
		}
		dirs = append(dirs, dir)
		switch {
		case m.FSType == "cgroup2":
			for _, d := range []string{m.Point, parent} {
				if err := enableControllers(d); err != nil {
					return dirs, err
				}
			}
		case strings.Contains(","+m.Options+",", ",cpuset,"):
			for _, d := range []string{parent, dir} {
				if err := inheritCpuset(d); err != nil {
					return dirs, err
				}
			}
		}
	}
	return dirs, nil
}

// ownCgroups maps the controllers of a version 1 hierarchy to this process's path in it.
func ownCgroups() (map[string]string, error) {
	f, err := os.Open("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	own := map[string]string{}
	for s := bufio.NewScanner(f); s.Scan(); {
		if parts := strings.SplitN(s.Text(), ":", 3); len(parts) == 3 {
			own[parts[1]] = parts[2]
		}
	}
	return own, nil
}

// enableControllers lets children of a version 2 cgroup use every controller it has.
func enableControllers(dir string) error {
	list, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, c := range strings.Fields(string(list)) {
		// One at a time: a single one that cannot be delegated must not hinder the others.
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil &&
			!errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTSUP) {
			return err
		}
	}
	return nil
}

// inheritCpuset copies the parent's CPUs and memory nodes: a version 1 cpuset
// starts with none and takes no process until it has some.
func inheritCpuset(dir string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), value, 0); err != nil {
			return err
		}
	}
	return nil
}

// enterCgroups moves this process into the directories.
func enterCgroups(dirs []string) error {
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
	}
	return nil
}

// removeCgroups removes the directories and all below, and the lab's parent when
// nothing else is in it. The kernel needs a moment after the last process.
func removeCgroups(dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		var err error
		for range 100 {
			if err = removeCgroupTree(dir); err == nil {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w (holds %s)", dir, err, processesIn(dir)))
			continue
		}
		// Fails while another host lives there, which is right.
		_ = os.Remove(filepath.Dir(dir))
	}
	return errors.Join(errs...)
}

func removeCgroupTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroupTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// processesIn names the processes of a cgroup for an error message.
func processesIn(dir string) string {
	list, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return err.Error()
	}
	var names []string
	for _, pid := range strings.Fields(string(list)) {
		if _, err := strconv.Atoi(pid); err != nil {
			continue
		}
		comm, _ := os.ReadFile(filepath.Join("/proc", pid, "comm"))
		names = append(names, pid+" "+strings.TrimSpace(string(comm)))
	}
	if len(names) == 0 {
		return "no process"
	}
	return strings.Join(names, ", ")
}

// thaw lets processes die that are frozen in cgroups of version 1, as paused
// containers are: no signal ends them before.
func thaw(cgroups []string) {
	for _, dir := range cgroups {
		_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err == nil && filepath.Base(path) == "freezer.state" {
				_ = os.WriteFile(path, []byte("THAWED"), 0) // the top one has none, others may have ended
			}
			return nil
		})
	}
}
