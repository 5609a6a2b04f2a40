package main

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/berth-plugin/berth/shared/fault"
	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// checkPlace refuses repositories in directories that are not made to last: in a managed
// plugin's own root file system, which goes when the plugin is upgraded or removed, and
// among the volumes.
func (d *daemon) checkPlace(t backup.Target) error {
	if t.Kind() != "local" {
		return nil
	}
	path := strings.TrimPrefix(t.Repository, "local:")
	if strings.HasPrefix(path+"/", d.dataDir+"/") {
		return fault.Invalid("target %s: repository %.200q: that is where the volumes are: want a directory of its own", t.Name, t.Repository)
	}
	if d.hostMounts == "" { // the root file system is the host's
		return nil
	}
	root, err := rooted.MountIDOf("/")
	if err != nil {
		return fault.Unavailable("target %s: %w", t.Name, err)
	}
	for ; ; path = filepath.Dir(path) {
		at, err := rooted.MountIDOf(path)
		if errors.Is(err, fs.ErrNotExist) && path != "/" {
			continue
		}
		if err != nil {
			return fault.Unavailable("target %s: repository %.200q: %w", t.Name, t.Repository, err)
		}
		if at == root {
			return fault.Invalid("target %s: repository %.200q: that is inside the plugin and would go with it: want /backup/NAME, which is in the directory of the host that docker plugin set backup.source=DIRECTORY names", t.Name, t.Repository)
		}
		return nil
	}
}
