package lab

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// LeftBehind lists what the machine still has of hosts and LANs whose names start
// with the prefix: directories, network namespaces, mounts, cgroups and processes.
// It is empty when every one of them was closed.
func LeftBehind(prefix string) ([]string, error) {
	var left []string
	add := func(kind, pattern string) error {
		found, err := filepath.Glob(pattern)
		for _, f := range found {
			left = append(left, kind+" "+f)
		}
		return err
	}
	if err := add("host directory", filepath.Join(Dir(), prefix+"*")); err != nil {
		return nil, err
	}
	if err := add("network namespace", netnsPath(netnsPrefix+prefix+"*")); err != nil {
		return nil, err
	}
	cgroups, err := findCgroups(prefix + "*")
	if err != nil {
		return nil, err
	}
	for _, dir := range cgroups {
		left = append(left, "cgroup "+dir)
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, filepath.Join(Dir(), prefix)) {
			left = append(left, "mount "+m.Mountpoint)
		}
	}
	processes, err := initProcesses(prefix)
	return append(left, processes...), err
}

// initProcesses finds the inits of hosts. Every other process of a host is in the
// PID namespace of its init and cannot outlive it.
func initProcesses(prefix string) ([]string, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, f := range files {
		// A process that ends meanwhile is not left behind.
		cmdline, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		name, config, _ := strings.Cut(string(cmdline), "\x00")
		if (name == initName || name == bootName) && strings.Contains(config, `"Dir":"`+filepath.Join(Dir(), prefix)) {
			found = append(found, "process "+filepath.Base(filepath.Dir(f))+" "+name)
		}
	}
	return found, nil
}
