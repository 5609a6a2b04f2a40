package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// TestPrefix begins the names of the hosts and LANs that tests of this process make.
func TestPrefix() string { return fmt.Sprintf("t%d-", os.Getpid()) }

var testName = regexp.MustCompile(`^t(\d+)-`)

// RemoveOrphans removes hosts and LANs named with the TestPrefix of a process that
// is no more. Their processes died with it, but directories, namespaces and cgroups
// stay when a test is killed.
func RemoveOrphans() error {
	orphan := func(name string) bool {
		m := testName.FindStringSubmatch(name)
		if m == nil {
			return false
		}
		_, err := os.Stat(filepath.Join("/proc", m[1]))
		return errors.Is(err, os.ErrNotExist)
	}
	names, err := Hosts()
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if orphan(name) {
			errs = append(errs, Remove(name, false))
		}
	}
	spaces, err := filepath.Glob(netnsPath(netnsPrefix + "*"))
	for _, path := range spaces {
		if name := filepath.Base(path); orphan(strings.TrimPrefix(name, netnsPrefix)) {
			errs = append(errs, deleteNetNS(name))
		}
	}
	return errors.Join(append(errs, err)...)
}

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
