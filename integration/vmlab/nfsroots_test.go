package vmlab

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/vmlab/guest"
)

// TestNFSRoots plays with volumes on shares that Berth mounts itself, in the words of
// Docker's local driver. Both nodes have a root of their own as well, whose volumes go
// on whatever becomes of the server. On node1 Berth runs beside the engine, on node2
// as a managed plugin.
func TestNFSRoots(t *testing.T) {
	opts := Options{
		Modules: []string{"bridge", "nfsd", "nfsv4", "nf_tables", "overlay", "veth"},
		Binaries: map[string]string{
			"berthd":       "github.com/berth-plugin/berth/cmd/berthd",
			"docker-berth": "github.com/berth-plugin/berth/cmd/docker-berth",
		},
		Files:   map[string]string{"plugin": "../../build/plugin/" + guest.VolumeDriver},
		Timeout: 45 * time.Minute,
	}
	InGuest(t, opts, func(t *testing.T) {
		s := furnishShares(t)
		tell(t, s.on, []chapter[*shares]{
			{"a missing directory is made, and both nodes have the volume", (*shares).sameVolume},
			{"a directory with somebody's data is refused, and taken over from above it", (*shares).foreign},
			{"a removal on one node leaves the other's container alive", (*shares).removeInUse},
			{"the server goes away", (*shares).serverAway},
			{"the server comes back", (*shares).serverBack},
			{"stale handles", (*shares).stale},
			{"a node loses its power while the server is down", (*shares).reboot},
			{"backups in a repository on the server", (*shares).backups},
			{"the server goes away during a backup", (*shares).backupAway},
		})
	})
}

// local is each node's own root.
const local = "/srv/local"

// shares is what the story plays with.
type shares struct{ *seed }

func furnishShares(t *testing.T) *shares {
	lan := guest.NewLAN(t)
	s := &shares{&seed{node1: lan.NewNode(t, "node1"), node2: lan.NewNode(t, "node2")}}
	s.server = lan.NewNFSServer(t, "nfs")
	s.node1.Must("mkdir", "-p", local)
	s.startBerthd()
	s.onBoth(t, "engines and Berth", func(t *testing.T, n *guest.Node) {
		n.StartEngine()
		if n.Name == s.node2.Name {
			n.InstallBerthVolumes(filepath.Join(Dir, "plugin"), local)
		}
		n.Docker("volume create -d berth-vol own")
	})
	return s
}

func (s *shares) startBerthd() {
	s.berthd = s.node1.StartBerthVolumes(filepath.Join(Dir, "berthd"), local)
}

func (s *shares) on(t *testing.T) *shares { return &shares{s.seed.on(t)} }

// create is the command for a volume on the server's directory dir.
func (s *shares) create(dir, name string) string {
	return "volume create -d berth-vol -o type=nfs -o device=" + s.server.Addr + ":" + dir + " -o o=vers=4.2,hard,timeo=30 " + name
}

// vols is the directory of most volumes. It is missing at first.
func (s *shares) vols() string { return s.server.Export + "/new/volumes" }

func (s *shares) sameVolume(t *testing.T) {
	s.node1.Docker(s.create(s.vols(), "site"))
	assert.Assert(t, strings.Contains(s.server.Must("ls", "-a", s.vols()), "site"))
	// The other form that the local driver takes.
	s.node2.Docker("volume create -d berth-vol -o type=nfs -o device=:" + s.vols() + " -o o=addr=" + s.server.Addr + ",vers=4.2,hard,timeo=30 site")
	assert.Equal(t, shell(s.node1, "site", "echo kept >/data/notes; cat /data/notes"), "kept")
	assert.Equal(t, shell(s.node2, "site", "cat /data/notes"), "kept")
	assert.Equal(t, s.server.ReadFile(s.vols()+"/site/notes"), "kept\n")
	s.onBoth(t, "where it is", func(t *testing.T, n *guest.Node) {
		assert.Equal(t, n.Docker("volume inspect --format {{.Status.root}} site"), s.server.Addr+":"+s.vols())
		assert.Equal(t, n.Docker("volume inspect --format {{.Status.root}} own") == s.server.Addr+":"+s.vols(), false)
	})
	// By its name alone it is found from now on, and read-only is one node's matter.
	s.node1.Docker("volume create -d berth-vol -o type=nfs -o device=" + s.server.Addr + ":" + s.vols() + " -o o=vers=4.2,hard,timeo=30 second")
	eventually(t, "node2 lists what node1 has made", func() bool { return s.node2.Volumes(quick)["second"] == guest.VolumeDriver })
	s.node2.Docker("volume rm second")
}

func (s *shares) foreign(t *testing.T) {
	s.server.WriteFile(s.server.Export+"/app/data", "rows\n")
	for _, n := range []*guest.Node{s.node1, s.node2} {
		n.DockerFails(s.create(s.server.Export+"/app", "app"), patient, "is not empty", "the root in which each volume is a directory", ".berth-accept", "device="+s.server.Addr+":"+s.server.Export)
		assert.Equal(t, s.server.Must("ls", "-A", s.server.Export+"/app"), "data")
		assert.Equal(t, n.Volumes(quick)["app"], "")
	}
	s.node1.Docker(s.create(s.server.Export, "app"))
	assert.Equal(t, shell(s.node1, "app", "cat /data/data"), "rows")
	s.node2.Docker(s.create(s.server.Export, "app"))
	assert.Equal(t, shell(s.node2, "app", "cat /data/data"), "rows")
	// A directory that is a root itself does not become a volume.
	s.node1.Docker(s.create(s.server.Export+"/inner", "x"))
	s.node1.DockerFails(s.create(s.server.Export, "inner"), patient, "volume root")
	s.node1.Docker("volume rm x")
}

func (s *shares) removeInUse(t *testing.T) {
	s.node1.Docker(s.create(s.vols(), "web"))
	s.node2.Docker(s.create(s.vols(), "web"))
	s.node2.Docker("run -d --name web --network none -v web:/data " + guest.Image + " sleep 9999")
	s.node1.DockerFails("volume rm web", patient, "in use on host node2")
	assert.Equal(t, s.node2.Must("docker", "exec", "web", "sh", "-c", "echo late >/data/late; cat /data/late"), "late")
	s.node2.Docker("rm -f web")
	eventually(t, "node1 knows that node2 has left the volume", func() bool {
		return s.node1.Try("docker", "volume", "rm", "web").Err == nil
	})
	kept := strings.Fields(s.server.Must("find", s.vols()+"/.berth/trash", "-name", "late"))
	assert.Equal(t, len(kept), 1, "%q", kept)
}

// known is what both engines list from here on.
func known() map[string]string {
	return map[string]string{"own": guest.VolumeDriver, "site": guest.VolumeDriver, "app": guest.VolumeDriver}
}

func (s *shares) serverAway(t *testing.T) {
	s.onBoth(t, "all is known", func(t *testing.T, n *guest.Node) {
		eventually(t, "removed volumes are gone", func() bool { return len(n.Volumes(quick)) == len(known()) })
	})
	s.server.Cut()
	s.berthd.Signal(t, unix.SIGKILL)
	s.berthd.WaitEnd(t)
	s.startBerthd()
	s.onBoth(t, "names are answered, own volumes go on, others are refused in time", func(t *testing.T, n *guest.Node) {
		assert.DeepEqual(t, n.Volumes(quick), known())
		r := n.TryFor(quick, "docker", "volume", "inspect", "--format", "{{.Name}}", "site")
		assert.NilError(t, r.Err, "%s", r.Out)
		n.DockerFails("run --rm --network none -v site:/data "+guest.Image+" true", patient, "does not answer", s.server.Addr)
		assert.Equal(t, shell(n, "own", "echo on >/data/f; cat /data/f"), "on")
		n.DockerFails(s.create(s.vols(), "other"), patient, "does not answer", s.server.Addr)
		n.DockerFails(s.create(s.server.Export+"/elsewhere", "another"), patient, "does not answer", s.server.Addr)
		n.Docker("volume create -d berth-vol own2")
		n.Docker("volume rm own2")
		assert.DeepEqual(t, n.Volumes(quick), known())
	})
	for _, took := range requests(t, s.berthd.Log(t), "Mount", "Create") {
		assert.Assert(t, took <= berthLimit, "node1's Berth took %s", took)
	}
}

func (s *shares) serverBack(t *testing.T) {
	s.server.Join()
	s.onBoth(t, "read", func(t *testing.T, n *guest.Node) {
		read := []string{"docker", "run", "--rm", "--network=none", "-v", "site:/data", guest.Image, "cat", "/data/notes"}
		eventually(t, "the volume can be used again", func() bool { return n.Try(read...).Out == "kept" })
		assert.DeepEqual(t, n.Volumes(quick), known())
	})
}

// stale: the server's directory is replaced by a copy, as by a restored backup, which
// has other handles.
func (s *shares) stale(t *testing.T) {
	n := s.node2
	n.Docker("run -d --name holds --network none -v site:/data " + guest.Image + " sleep 9999")
	s.server.Must("sh", "-ec", "cd "+s.server.Export+"/new; cp -a volumes copy; mv volumes old; mv copy volumes; rm -rf old")
	// While a container has the old directory, nobody takes it away.
	n.DockerFails("run --rm --network none -v site:/data "+guest.Image+" true", patient, "stopped")
	assert.DeepEqual(t, n.Volumes(quick), known())
	n.Docker("rm -f holds")
	// The client may go on to believe what it knows of the directory above.
	s.onBoth(t, "mounted anew", func(t *testing.T, n *guest.Node) {
		read := []string{"docker", "run", "--rm", "--network=none", "-v", "site:/data", guest.Image, "cat", "/data/notes"}
		eventually(t, "the volume can be used again", func() bool { return n.Try(read...).Out == "kept" })
	})
	assert.Assert(t, strings.Contains(s.berthd.Log(t), "mounting it anew"))
}

func (s *shares) reboot(t *testing.T) {
	n := s.node2
	shell(n, "own", "echo on >/data/f")
	known := n.Volumes(quick)
	s.server.Down()
	n.LosePower()
	n.RestartEngine()
	assert.DeepEqual(t, n.Volumes(quick), known)
	assert.Equal(t, shell(n, "own", "cat /data/f"), "on")
	n.DockerFails("run --rm --network none -v site:/data "+guest.Image+" true", patient, "does not answer", "refused")
	s.server.Up()
	read := []string{"docker", "run", "--rm", "--network=none", "-v", "site:/data", guest.Image, "cat", "/data/notes"}
	eventually(t, "the volume can be used again", func() bool { return n.Try(read...).Out == "kept" })
	assert.DeepEqual(t, n.Volumes(quick), known)
}
