package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Hosts lists the names of all hosts on the machine, running or not, made by
// whatever process.
func Hosts() ([]string, error) {
	files, err := filepath.Glob(filepath.Join(Dir(), "*", "disk"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, f := range files {
		names = append(names, filepath.Base(filepath.Dir(f)))
	}
	return names, nil
}

// Remove removes a host by name, also one whose maker was killed half-way, and
// the switch of its LAN when it is a LAN's router.
func Remove(name string, keepDisk bool) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("host name %q is not one of the lab's", name)
	}
	h, err := Open(name)
	if err != nil {
		// No usable record: it never came up, so there is no process to end.
		h = &Host{Name: name, Dir: filepath.Join(Dir(), name)}
		if h.cgroups, err = findCgroups(name); err != nil {
			return err
		}
	}
	if l := h.opts.LAN; l != nil && strings.HasSuffix(name, "-rt") {
		err = deleteNetNS(l.netns())
	} else {
		err = nil
	}
	if keepDisk {
		return errors.Join(err, h.CloseKeepDisk())
	}
	return errors.Join(err, h.Close())
}

// EngineVersion is the lab's name for the host's engine.
func (h *Host) EngineVersion() string { return h.engine.Version }

// findCgroups finds the cgroups of a host without a record where this process
// would make them; an empty name gives the parents of all.
func findCgroups(name string) ([]string, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, m := range mounts {
		for _, pattern := range []string{"berth-lab", "*/berth-lab", "*/*/berth-lab"} {
			dirs, err := filepath.Glob(filepath.Join(m.Point, pattern, name))
			if err != nil {
				return nil, err
			}
			found = append(found, dirs...)
		}
	}
	for _, dir := range found {
		if _, err := os.Stat(dir); err != nil {
			return nil, err
		}
	}
	return found, nil
}
