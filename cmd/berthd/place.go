package main

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

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
	if err := answers(path); err != nil {
		return fault.Unavailable("target %s: repository %.200q: %w", t.Name, t.Repository, err)
	}
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

// answerTime is how long a repository in a directory may take to say that it is there.
const answerTime = 10 * time.Second

// asked are the questions of answers that wait: one for each path, as each takes a thread
// for as long as the server is away.
var asked singleflight.Group

// answers refuses a path on a network file system whose server is away, where all that asks
// for it would wait for the server without an end, and without a word.
func answers(path string) error {
	answer := asked.DoChan(path, func() (any, error) {
		for at := path; ; at = filepath.Dir(at) {
			var st unix.Statfs_t // which no client answers from what it remembers
			err := unix.Statfs(at, &st)
			if at == "/" || !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
	})
	late := time.NewTimer(answerTime)
	defer late.Stop()
	select {
	case a := <-answer:
		return a.Err
	case <-late.C:
		return errors.New("it does not answer: is its server away?")
	}
}
