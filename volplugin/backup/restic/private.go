package restic

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/volplugin/backup"
	"github.com/berth-plugin/berth/volplugin/rooted"
)

// runsDir holds one private directory for each call of restic. Who uses one holds a lock on it.
const runsDir = "runs"

// A private directory is the home of one restic: its temporary files and the secrets that it
// can only read from files.
type private struct {
	parent *rooted.Dir
	name   string
	lock   *os.File
}

func (e *Engine) private(ctx context.Context) (*private, error) {
	parent, err := rooted.Open(filepath.Join(e.Dir, runsDir))
	if err != nil {
		return nil, err
	}
	// Until the new one is locked nobody else sweeps.
	if err := unix.Flock(parent.FD(), unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, parent.Close())
	}
	sweep(ctx, parent)
	dir, err := os.MkdirTemp(parent.Path(), "run-")
	if err != nil {
		return nil, errors.Join(err, parent.Close())
	}
	p := &private{parent: parent, name: filepath.Base(dir)}
	if p.lock, err = os.Open(dir); err == nil {
		err = errors.Join(unix.Flock(int(p.lock.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.Flock(parent.FD(), unix.LOCK_UN))
	}
	if err != nil {
		p.remove()
		return nil, fmt.Errorf("private directory: %w", err)
	}
	return p, nil
}

func (p *private) path(name string) string { return filepath.Join(p.parent.Path(), p.name, name) }

// remove does so also when the call was cancelled.
func (p *private) remove() {
	_ = p.parent.RemoveTree(context.Background(), p.name)
	if p.lock != nil {
		_ = p.lock.Close()
	}
	_ = p.parent.Close()
}

// sweep removes what killed daemons have left.
func sweep(ctx context.Context, parent *rooted.Dir) {
	names, err := parent.Names()
	if err != nil {
		return
	}
	for _, name := range names {
		file, err := os.Open(filepath.Join(parent.Path(), name))
		if err != nil {
			continue
		}
		if unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = parent.RemoveTree(ctx, name)
		}
		_ = file.Close()
	}
}

// path is where restic finds ssh and rclone.
const path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment of restic, and the arguments that lead it to files.
func (e *Engine) environment(p *private) (env, args []string, err error) {
	env = []string{
		"PATH=" + path, "HOME=" + p.path(""), "TMPDIR=" + p.path(""), "TZ=UTC", "LC_ALL=C",
		"RESTIC_REPOSITORY=" + e.Target.Repository,
		"RESTIC_PASSWORD=" + e.Target.Password,
		"RESTIC_PROGRESS_FPS=2",
	}
	if e.Processors > 0 {
		env = append(env, fmt.Sprintf("GOMAXPROCS=%d", e.Processors))
	}
	for _, name := range slices.Sorted(maps.Keys(e.Target.Environment)) {
		env = append(env, name+"="+e.Target.Environment[name])
	}
	for _, name := range slices.Sorted(maps.Keys(e.Target.Files)) {
		if err := os.WriteFile(p.path(name), []byte(e.Target.Files[name]), 0o600); err != nil {
			return nil, nil, fmt.Errorf("file %s of the target: %w", name, err)
		}
		if slices.Contains(backup.FileVariables, name) {
			env = append(env, name+"="+p.path(name))
		}
	}
	if certificates := e.Target.Authorities(); certificates != "" {
		if err := os.WriteFile(p.path(backup.CACert), []byte(certificates), 0o600); err != nil {
			return nil, nil, fmt.Errorf("file %s of the target: %w", backup.CACert, err)
		}
		env = append(env, "RESTIC_CACERT="+p.path(backup.CACert))
	}
	if e.Target.Kind() == "sftp" {
		args = append(args, "-o", "sftp.args="+e.ssh(p))
	}
	return env, args, nil
}
