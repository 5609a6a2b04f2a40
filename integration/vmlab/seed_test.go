package vmlab

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"github.com/berth-plugin/berth/integration/vmlab/guest"
)

const (
	// root is where both nodes mount the export; Berth keeps its volumes there.
	root = "/srv/volumes"
	// quick is the limit for answers that must not wait for the storage; those that
	// do take Berth's limit of 20 s at least.
	quick = 20 * time.Second
	// patient is the limit for a docker command that waits for Berth's word, on a
	// busy machine. That Berth itself keeps to its time shows in its log.
	patient = 90 * time.Second
	// berthLimit is how long a request to Berth may take.
	berthLimit = 25 * time.Second
)

// TestSeedStory tells how Berth's volumes began: two hosts mount one NFS export
// and share the volumes on it. On node1 Berth runs beside the engine, on node2 as
// a managed plugin.
func TestSeedStory(t *testing.T) {
	opts := Options{
		Modules:  []string{"bridge", "nfsd", "nfsv4", "nf_tables", "overlay", "veth"},
		Binaries: map[string]string{"berthd": "github.com/berth-plugin/berth/cmd/berthd"},
		Files:    map[string]string{"plugin": "../../build/plugin/" + guest.VolumeDriver},
		Timeout:  15 * time.Minute,
	}
	InGuest(t, opts, func(t *testing.T) {
		s := furnish(t)
		tell(t, s.on, []chapter[*seed]{
			{"a volume made on node1 serves the same page on both", (*seed).samePage},
			{"a container moves and finds its data", (*seed).move},
			{"a volume removed on one node while the other uses it is in the trash", (*seed).removeInUse},
			{"the server goes away", (*seed).serverAway},
			{"the server comes back", (*seed).serverBack},
			{"an unmounted root is never taken for an empty one", (*seed).unmounted},
		})
	})
}

// seed is what the story plays with.
type seed struct {
	server       *guest.NFSServer
	node1, node2 *guest.Node
	berthd       *guest.Daemon // on node1
}

func furnish(t *testing.T) *seed {
	began := time.Now()
	lan := guest.NewLAN(t)
	s := &seed{node1: lan.NewNode(t, "node1"), node2: lan.NewNode(t, "node2")}
	s.server = lan.NewNFSServer(t, "nfs")
	s.node1.MountExport(s.server, root)
	s.startBerthd()
	s.onBoth(t, "engines and Berth", func(t *testing.T, n *guest.Node) {
		n.StartEngine()
		if n.Name == s.node1.Name {
			return
		}
		// The plugin starts before its root is mounted, as it may at boot.
		n.InstallBerthVolumes(filepath.Join(Dir, "plugin"), root)
		n.MountExport(s.server, root)
	})
	t.Logf("%.1f s: server, nodes, engines and Berth", time.Since(began).Seconds())
	return s
}

// startBerthd starts Berth on node1.
func (s *seed) startBerthd() {
	s.berthd = s.node1.StartBerthVolumes(filepath.Join(Dir, "berthd"), root)
}

// on is the same seed for a subtest.
func (s *seed) on(t *testing.T) *seed {
	return &seed{
		server: &guest.NFSServer{Node: s.server.On(t), Export: s.server.Export},
		node1:  s.node1.On(t), node2: s.node2.On(t), berthd: s.berthd,
	}
}

// onBoth does the same on both nodes at the same time.
func (s *seed) onBoth(t *testing.T, what string, do func(t *testing.T, n *guest.Node)) {
	t.Helper()
	ok := t.Run(what, func(t *testing.T) {
		for _, n := range []*guest.Node{s.node1, s.node2} {
			t.Run(n.Name, func(t *testing.T) {
				t.Parallel()
				do(t, n.On(t))
			})
		}
	})
	if !ok {
		t.FailNow()
	}
}

// shell runs a line of shell in a throw-away container with one volume at /data.
func shell(n *guest.Node, volume, line string) string {
	return n.Must("docker", "run", "--rm", "--network=none", "-v", volume+":/data", guest.Image, "sh", "-c", line)
}

// eventually waits for what NFS clients may see late: they keep attributes for up
// to a minute, 3 s at first.
func eventually(t *testing.T, what string, true func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !true(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func (s *seed) samePage(t *testing.T) {
	const page = "seen from everywhere\n"
	s.node1.Docker("volume create -d berth-vol site")
	assert.Equal(t, s.node2.Docker("volume ls --quiet"), "site")
	assert.Equal(t, s.node2.Docker("volume inspect --format {{.Name}} site"), "site")

	s.onBoth(t, "serve", func(t *testing.T, n *guest.Node) {
		n.Docker("run -d --name web --network host -v site:/www " + guest.Image + " httpd -f -h /www")
	})
	s.node1.Must("docker", "exec", "web", "sh", "-c", "echo 'seen from everywhere' >/www/index.html")
	assert.Equal(t, s.node1.Fetch(s.node2.Addr, 80, "index.html"), page)
	assert.Equal(t, s.node2.Fetch(s.node1.Addr, 80, "index.html"), page)
	assert.Equal(t, s.node1.Docker("exec web wget -q -O - http://"+s.node2.Addr+"/index.html")+"\n", page)

	s.node2.Must("docker", "exec", "web", "sh", "-c", "echo 'changed on node2' >/www/index.html")
	eventually(t, "node1 serves what node2 has written", func() bool {
		return s.node2.Fetch(s.node1.Addr, 80, "index.html") == "changed on node2\n"
	})
	s.node1.Docker("rm -f web")
}

func (s *seed) move(t *testing.T) {
	const app = "docker run --rm --network none -v notes:/data --volume-driver berth-vol " + guest.Image
	s.node1.Must(append(strings.Fields(app), "sh", "-c", "echo kept >/data/notes")...)
	assert.Equal(t, s.node2.Must(strings.Fields(app+" cat /data/notes")...), "kept")
}

// removeInUse: each engine knows only its own containers, so it is Berth that refuses
// to remove on node1 what node2 serves from. What was removed can be put back by hand.
func (s *seed) removeInUse(t *testing.T) {
	s.node2.DockerFails("volume rm site", patient, "volume is in use")
	s.node1.DockerFails("volume rm site", patient, "in use on host node2")
	assert.Equal(t, s.node1.Fetch(s.node2.Addr, 80, "index.html"), "changed on node2\n")
	s.node2.Docker("rm -f web")
	eventually(t, "node1 knows that node2 has left the volume", func() bool {
		return s.node1.Try("docker", "volume", "rm", "site").Err == nil
	})
	assert.DeepEqual(t, s.node1.Volumes(quick), map[string]string{"notes": guest.VolumeDriver})

	kept := strings.Fields(s.node1.Must("find", root+"/.berth/trash", "-name", "index.html"))
	assert.Equal(t, len(kept), 1, "%q", kept)
	s.node1.Must("mv", filepath.Dir(kept[0]), root+"/site")
	s.node1.Docker("volume create -d berth-vol site")
	assert.Equal(t, shell(s.node2, "site", "cat /data/index.html"), "changed on node2")
}

// both is what the engines are to list after the first chapters.
func both() map[string]string {
	return map[string]string{"site": guest.VolumeDriver, "notes": guest.VolumeDriver}
}

func (s *seed) serverAway(t *testing.T) {
	assert.DeepEqual(t, s.node1.Volumes(quick), both())
	s.server.Cut()
	// A service that starts now knows its volumes, too.
	s.berthd.Signal(t, unix.SIGKILL)
	s.berthd.WaitEnd(t)
	s.startBerthd()
	s.onBoth(t, "names are answered", func(t *testing.T, n *guest.Node) {
		assert.DeepEqual(t, n.Volumes(quick), both())
		r := n.TryFor(quick, "docker", "volume", "inspect", "--format", "{{.Name}}", "notes")
		assert.NilError(t, r.Err, "%s", r.Out)
	})
	s.onBoth(t, "data is not", func(t *testing.T, n *guest.Node) {
		t.Run("run", func(t *testing.T) {
			t.Parallel()
			n.On(t).DockerFails("run --rm --network none -v notes:/data "+guest.Image+" true", patient, "volume root", "does not answer")
		})
		t.Run("create", func(t *testing.T) {
			t.Parallel()
			n.On(t).DockerFails("volume create -d berth-vol other", patient, "other", "volume root", "does not answer")
		})
		t.Run("a local volume", func(t *testing.T) {
			t.Parallel()
			n := n.On(t)
			n.Docker("volume create plain")
			assert.Equal(t, shell(n, "plain", "echo on >/data/f; cat /data/f"), "on")
			n.Docker("volume rm plain")
		})
	})
	waits := requests(t, s.berthd.Log(t), "Mount", "Create")
	if longest := slices.Max(waits); longest < 10*time.Second || longest > berthLimit {
		t.Errorf("node1's Berth said after %s that the storage is away, want 10 s to %s", longest, berthLimit)
	}
	s.onBoth(t, "nothing else was made", func(t *testing.T, n *guest.Node) {
		assert.DeepEqual(t, n.Volumes(quick), both())
	})
}

// requests finds in Berth's log how long refused requests of the methods took.
func requests(t *testing.T, log string, methods ...string) []time.Duration {
	t.Helper()
	line := regexp.MustCompile(`msg=refused duration=(\S+) .* method=VolumeDriver\.(?:` + strings.Join(methods, "|") + `) `)
	var took []time.Duration
	for _, match := range line.FindAllStringSubmatch(log, -1) {
		d, err := time.ParseDuration(match[1])
		assert.NilError(t, err)
		took = append(took, d)
	}
	assert.Assert(t, len(took) > 0, "no refused request in\n%s", log)
	return took
}

func (s *seed) serverBack(t *testing.T) {
	s.server.Join()
	s.onBoth(t, "read", func(t *testing.T, n *guest.Node) {
		read := []string{"docker", "run", "--rm", "--network=none", "-v", "notes:/data", guest.Image, "cat", "/data/notes"}
		eventually(t, "the volume can be used again", func() bool { return n.Try(read...).Out == "kept" })
		assert.DeepEqual(t, n.Volumes(quick), both())
	})
}

func (s *seed) unmounted(t *testing.T) {
	s.onBoth(t, "unmount", func(t *testing.T, n *guest.Node) {
		n.Must("umount", root)
		n.DockerFails("volume create -d berth-vol other", patient, "other", "volume root", "is its file system mounted?")
		n.DockerFails("run --rm --network none -v notes:/data "+guest.Image+" true", patient, "volume root", "is its file system mounted?")
		assert.DeepEqual(t, n.Volumes(quick), both())
		assert.Equal(t, n.Must("find", root, "-mindepth", "1"), "", "the directory below the mount point was used")
		n.MountExport(s.server, root)
		n.Docker("volume create -d berth-vol of-" + n.Name)
	})
	assert.Equal(t, shell(s.node2, "notes", "cat /data/notes"), "kept")
	assert.DeepEqual(t, s.node1.Volumes(quick), s.node2.Volumes(quick))
}
