package mount

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/berth-plugin/berth/shared/fault"
)

// stageName is the directory below a plugin's propagatedMount in which volumes are
// mounted.
const stageName = "v"

// A Stage is a small tmpfs below a plugin's propagatedMount that holds nothing but
// the directories on which volumes are mounted.
//
// dockerd takes a volume's directory for what the plugin has mounted there. When
// what the plugin mounts does not reach the host, it is the empty directory below,
// and a container writes into that without a word. It happens: a dockerd that was
// killed stops the old plugin and starts the new one, and unmounts the old one's
// propagatedMount when the new one is already there (seen with Engine 28.5). On a
// tmpfs of its own the directory exists only where the mount is seen, so that a
// container fails to start instead.
type Stage struct {
	dir string
	// hostMounts is the mountinfo of a process of the host.
	hostMounts string
}

// OpenStage mounts the tmpfs below dir, unless an earlier process of the plugin
// has. hostMounts is where the mountinfo(5) of the host's first process can be
// read; "" is nowhere.
func OpenStage(dir, hostMounts string) (*Stage, error) {
	if !filepath.IsAbs(dir) {
		return nil, fault.Invalid("mounts directory %q: want an absolute path", dir)
	}
	s := &Stage{dir: filepath.Join(dir, stageName), hostMounts: hostMounts}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("mounts directory: %w", err)
	}
	mounted, err := s.mounted()
	if err != nil || mounted != nil {
		return s, err
	}
	// 100,000 mount points fit; nothing else is ever written.
	err = unix.Mount("berth", s.dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700,nr_inodes=100000,size=64m")
	if err != nil {
		return nil, fmt.Errorf("mount tmpfs at %s: %w", s.dir, err)
	}
	return s, nil
}

// Base is the directory below which volumes are to be mounted.
func (s *Stage) Base() string { return s.dir }

// Seen tells whether the host has the tmpfs. known is false when that cannot be
// told, because there is no mountinfo of the host's.
func (s *Stage) Seen() (seen, known bool, err error) {
	if s.hostMounts == "" {
		return false, false, nil
	}
	ours, err := s.mounted()
	if err != nil {
		return false, false, err
	}
	if ours == nil {
		return false, true, nil
	}
	f, err := os.Open(s.hostMounts)
	if err != nil {
		return false, false, fmt.Errorf("read the host's mounts: %w", err)
	}
	defer f.Close()
	// The device of a tmpfs is its own wherever it is mounted.
	theirs, err := mountinfo.GetMountsFromReader(f, func(info *mountinfo.Info) (skip, stop bool) {
		same := info.Major == ours.Major && info.Minor == ours.Minor
		return !same, same
	})
	if err != nil {
		return false, false, fmt.Errorf("read the host's mounts: %w", err)
	}
	return len(theirs) > 0, true, nil
}

// mounted is the tmpfs as mountinfo has it, nil when there is none.
func (s *Stage) mounted() (*mountinfo.Info, error) {
	list, err := mountinfo.GetMounts(func(info *mountinfo.Info) (skip, stop bool) {
		return info.Mountpoint != s.dir, false
	})
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	if len(list) == 0 {
		return nil, nil
	}
	last := list[len(list)-1]
	if last.FSType != "tmpfs" {
		return nil, fault.Conflict("%s: a %s file system is mounted where Berth mounts volumes", s.dir, last.FSType)
	}
	return last, nil
}
