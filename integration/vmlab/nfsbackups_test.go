package vmlab

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/vmlab/guest"
)

// berth runs a command of docker berth on node2 that has to succeed.
func (s *shares) berth(args ...string) string {
	return s.node2.Must(append([]string{filepath.Join(Dir, "docker-berth")}, args...)...)
}

// digest of a volume's big file on node2.
func (s *shares) digest(name string) string { return shell(s.node2, name, "md5sum </data/big") }

// newData writes what no repository has.
func (s *shares) newData() {
	shell(s.node2, "own", "dd if=/dev/urandom of=/data/big bs=1M count=16 2>/dev/null")
}

func (s *shares) backups(*testing.T) {
	n := s.node2
	n.MountExport(s.server, "/mnt/nas")
	n.Docker("plugin disable -f " + guest.VolumeDriver)
	n.Docker("plugin set " + guest.VolumeDriver + " backup.source=/mnt/nas")
	n.Docker("plugin enable " + guest.VolumeDriver)
	n.WriteFile("/root/password", "sesamoid\n")
	n.Must("chmod", "600", "/root/password")
	s.berth("target", "add", "nas", "/backup/restic", "--password-file", "/root/password")
	s.newData()
	s.berth("backup", "create", "own")
	s.berth("backup", "restore", "nas/own", "again")
}

func (s *shares) backupAway(t *testing.T) {
	n := s.node2
	assert.Equal(t, s.digest("again"), s.digest("own"))
	s.newData()
	backup := n.Start("backup", filepath.Join(Dir, "docker-berth"), "backup", "create", "own")
	eventually(t, "the snapshot is there", func() bool { return strings.Contains(s.berth("snapshot", "ls", "own"), "backup-") })
	s.server.Cut()
	// Volumes go on, and whoever asks the repository is told.
	assert.Equal(t, shell(n, "own", "echo on >/data/f; cat /data/f"), "on")
	n.Docker("volume create -d berth-vol own2")
	n.Docker("volume rm own2")
	n.MustFail(patient, []string{"does not answer"}, filepath.Join(Dir, "docker-berth"), "backup", "ls")

	// The plugin dies over it, and does without the server when it is started again.
	n.Must("sh", "-c", `for p in /proc/[0-9]*; do if [ "$(cat $p/comm)" = berthd ]; then kill -9 ${p#/proc/}; fi; done`)
	backup.WaitEnd(t)
	eventually(t, "the plugin is back", func() bool {
		return n.TryFor(quick, "docker", "volume", "inspect", "own").Err == nil
	})
	assert.Equal(t, shell(n, "own", "cat /data/f"), "on")
	s.server.Join()
	eventually(t, "the repository is back", func() bool {
		return n.TryFor(time.Minute, filepath.Join(Dir, "docker-berth"), "backup", "create", "own").Err == nil
	})
	assert.Equal(t, s.berth("backup", "verify", "nas", "--read-data", "100%"), "nas: no errors")
	s.berth("backup", "restore", "nas/own", "later")
	assert.Equal(t, s.digest("later"), s.digest("own"))
	eventually(t, "no snapshot is left", func() bool { return !strings.Contains(s.berth("snapshot", "ls", "own"), "backup-") })
}
